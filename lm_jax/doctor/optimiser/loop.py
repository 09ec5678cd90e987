"""A training loop as a black box: what every call leaves in its state, as seen from the host."""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import Broken, Skip, call, give
from lm_jax.doctor.optimiser.subject import UPDATES, Subject
from lm_jax.doctor.training.loop import kind, opened, stepped


class Point(NamedTuple):
    """The state after a call."""

    params: trees.Arrays
    arrays: trees.Arrays  # floating arrays of the state that have an axis: moments, averages
    counters: dict[str, int]  # whole numbers of the state
    average: trees.Arrays
    updates: int  # as the loop counts them; 0 without updates_of
    metrics: dict[str, float]


class Batch(NamedTuple):
    """What an update reads, or None."""

    name: str
    value: Any


class Loop:
    """The whole step, called on fresh copies of the parameters."""

    def __init__(self, subject: Subject):
        """Batches are the given ones: a good one, an empty one and a bad one."""
        self.subject = subject
        self.params = trees.copies(subject.params)
        self.shapes = trees.shapes(trees.named(self.params))
        self.calls_per_update = subject.calls_per_update
        self.batch = Batch("batch", subject.batch)
        self.empty = Batch("empty_batch", subject.empty_batch)
        self.bad = [Batch("bad_batch", subject.bad_batch)]

    def start(self, params: Any) -> Any:
        """A new run's live state."""
        init_fn: Any = self.subject.init_fn
        return call("init_fn", init_fn, params)

    def advance(self, live: Any, batch: Batch) -> tuple[Any, Any]:
        """One call; the state and its metrics."""
        step_fn: Any = self.subject.step_fn
        before = kind(live)
        return stepped(before, call(f"step_fn on {batch.name}", step_fn, live, batch.value))

    def parts(self, live: Any) -> tuple[trees.Arrays, Any]:
        """Parameters, and the state in which to look for moments and averages."""
        return self.read("params_of", self.subject.params_of, live), live

    def read(self, name: str, function: Any, state: Any) -> trees.Arrays:
        """A tree like the parameters that is part of the state."""
        found = trees.named(opened(call(name, function, state)))
        if trees.shapes(found) != self.shapes:
            raise Broken(f"{name} returned other names or shapes than those of params")
        return found

    def look(self, live: Any, metrics: Any) -> Point:
        """A copy of the live state on the host."""
        ema_of, updates_of = self.subject.ema_of, self.subject.updates_of
        params, state = self.parts(live)
        leaves = {trees.path_name(p): x for p, x in jax.tree.leaves_with_path(opened(state))}
        floats = {n: trees.as_array(x) for n, x in leaves.items() if trees.is_float_leaf(x)}
        return Point(
            params=params,
            arrays={n: np.array(x) for n, x in floats.items() if x.ndim},
            counters={n: int(x) for n, x in leaves.items() if _is_whole(x)},
            average=self.read("ema_of", ema_of, state) if ema_of else {},
            updates=call("updates_of", lambda: int(updates_of(state) if updates_of else 0)),
            metrics=_numbers(metrics),
        )

    def play(self, *batches: Batch, params: Any = None, every_call: bool = False) -> list[Point]:
        """The start, and the state after each update or call; a batch makes one update."""
        try:
            live = self.start(trees.copies(self.params if params is None else params))
            points = [self.look(live, {})]
            for batch in batches:
                if batch.value is None:
                    raise give(batch.name)
                for i in range(1, self.calls_per_update + 1):
                    fresh = batch._replace(value=trees.copies(batch.value))
                    live, metrics = self.advance(live, fresh)
                    if every_call or i == self.calls_per_update:
                        points.append(self.look(live, metrics))
            return points
        finally:  # a state_dict holds the very tensors of a module that init_fn may load it into
            pairs = zip(*map(jax.tree.leaves, (self.subject.params, self.params)), strict=True)
            for own, copy in pairs:
                if hasattr(own, "detach"):
                    own.detach().copy_(copy.detach())


class Half(Loop):
    """The second half of a step, which reads gradients where the whole one reads batches."""

    def __init__(self, subject: Subject):
        """Batches are noise, zeros, and the noise with one element that is not finite."""
        super().__init__(subject)
        self.calls_per_update = 1
        self.batch = self.gradient("random gradients")
        self.empty = self.gradient("zero gradients", norm=0.0)
        self.bad = [self.gradient(f"gradients with one {x}", one=x) for x in (np.inf, np.nan)]

    def gradient(self, name: str, norm: float = 1.0, one: float | None = None) -> Batch:
        """Gradients of a global norm, in the same direction every time, `one` in the middle."""
        rng = self.subject.rng(1)
        noise = [np.array(rng.standard_normal(shape)) for shape in self.shapes.values()]
        noise = [np.array(norm / trees.norm(noise) * x) for x in noise]
        if one is not None:
            largest = max(noise, key=np.size)
            largest.flat[largest.size // 2] = one
        leaves, tree = jax.tree.flatten(self.params)
        return Batch(name, jax.tree.unflatten(tree, map(trees.like, leaves, noise)))

    def start(self, params: Any) -> Any:
        """Parameters, optimiser state and number of the update."""
        state = super().start(params)
        # Optimisers of PyTorch hold the tensors that they move; JAX may donate both arguments.
        own = jax.tree.map(lambda x: x if hasattr(x, "detach") else trees.copies(x), params)
        return own, state, self.subject.first_update

    def advance(self, live: Any, batch: Batch) -> tuple[Any, Any]:
        """One update; what is live after it and its metrics."""
        update_fn: Any = self.subject.update_fn
        params, state, update = live
        made = call(f"update_fn on {batch.name}", update_fn, params, batch.value, state, update)
        if not isinstance(made, tuple) or len(made) not in (2, 3):
            raise Broken("update_fn returned neither (params, opt_state) nor these and metrics")
        return (*made[:2], update + 1), (*made, None)[2]

    def parts(self, live: Any) -> tuple[trees.Arrays, Any]:
        """Parameters and optimiser state."""
        return self.read("update_fn", lambda pair: pair[0], live), live[1]


def _is_whole(leaf: Any) -> bool:
    array = hasattr(leaf, "dtype") and "int" in str(leaf.dtype) and not leaf.ndim
    return array or isinstance(leaf, int)


def _numbers(metrics: Any) -> dict[str, float]:
    """The last value of each metric that is a number."""
    found = {}
    for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
        with contextlib.suppress(TypeError, ValueError, IndexError):
            found[str(name)] = float(trees.as_array(value).ravel()[-1])
    return found


def logged(points: list[Point], name: str) -> list[float]:
    """A metric at every update."""
    if any(name not in point.metrics for point in points[1:]):
        raise Skip(f"The metrics of a call have no '{name}'.")
    return [point.metrics[name] for point in points[1:]]


@fixture
def half(subject: Subject, update_fn: Any) -> Half:
    """The second half of the step."""
    return Half(subject)


@fixture
def loop(subject: Subject, half: Half | None = None) -> Loop:
    """The whole step, or else its second half."""
    if subject.step_fn is not None:
        return Loop(subject)
    if half is None:
        raise Skip("Not given: step_fn or update_fn.", "step_fn")
    return half


@fixture
def calls(loop: Loop) -> list[Point]:
    """The state after every call with the good batch."""
    return loop.play(*[loop.batch] * UPDATES, every_call=True)


@fixture
def good(loop: Loop, calls: list[Point]) -> list[Point]:
    """The state after every update with the good batch."""
    return calls[:: loop.calls_per_update]


@fixture
def still(loop: Loop, good: list[Point]) -> list[Point]:
    """Updates in which every gradient is zero, from randomised parameters."""
    noise = trees.randomise(loop.params, loop.subject.seed)
    points = loop.play(*[loop.empty] * UPDATES, params=noise)
    norm = points[-1].metrics.get("optim/grad_norm", 0.0)
    if norm != 0:
        raise Skip(f"The gradient of empty_batch has norm {norm:.3g}, not 0.")
    return points
