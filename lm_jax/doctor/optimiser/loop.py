"""A training loop as a black box: what every call leaves in its state, as seen from the host."""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    """What a call reads."""

    name: str
    value: Any


class Loop:
    """Calls the loop on fresh copies of the parameters, with a good, an empty and bad batches.

    A loop given as an `update_fn` reads gradients where the other reads batches: noise, zeros,
    and the noise with one element that is not finite.
    """

    def __init__(self, subject: Subject):
        """The loop is `subject.update_fn` or else `subject.step_fn`."""
        self.subject = subject
        self.params = trees.copies(subject.params)
        self.shapes = trees.shapes(trees.named(self.params))
        if subject.update_fn is None:
            self.params_of: tuple[str, Any] = "params_of", subject.params_of
            self.batch = Batch("batch", subject.batch)
            empty, bad = subject.empty_batch, subject.bad_batch
            self.empty = None if empty is None else Batch("empty_batch", empty)
            self.bad = [] if bad is None else [Batch("bad_batch", bad)]
            return
        self.params_of = "update_fn", operator.itemgetter(0)
        self.batch = self.gradient("random gradients")
        self.empty = self.gradient("zero gradients", norm=0.0)
        self.bad = [self.gradient(f"gradients with one {x}", one=x) for x in (np.inf, np.nan)]

    def gradient(self, name: str, norm: float = 1.0, one: float | None = None) -> Batch:
        """Gradients of a global norm, in the same direction every time, `one` in the middle."""
        if self.subject.update_fn is None:
            raise give("update_fn")
        rng = self.subject.rng(1)
        noise = [np.array(rng.standard_normal(shape)) for shape in self.shapes.values()]
        noise = [np.array(norm / trees.norm(noise) * x) for x in noise]
        if one is not None:
            largest = max(noise, key=np.size)
            largest.flat[largest.size // 2] = one
        leaves, tree = jax.tree.flatten(self.params)
        return Batch(name, jax.tree.unflatten(tree, map(trees.like, leaves, noise)))

    def randomised(self) -> Any:
        """Parameters of which no leaf is zero or constant."""

        def trained(new: Any, old: Any) -> Any:
            return new.requires_grad_(old.requires_grad) if hasattr(old, "detach") else new

        noise = trees.randomise(self.params, self.subject.seed)
        return jax.tree.map(trained, noise, self.params)

    def start(self, params: Any) -> Any:
        """A new run's live state."""
        own, init_fn = trees.copies(params), self.subject.init_fn
        state = call("init_fn", init_fn, own)  # type: ignore[arg-type]
        if self.subject.update_fn is None:
            return state
        # Optimisers of PyTorch hold the tensors that they move; JAX may donate both arguments.
        second = jax.tree.map(lambda x: x if hasattr(x, "detach") else trees.copies(x), own)
        return second, state, self.subject.first_update

    def advance(self, live: Any, batch: Batch) -> tuple[Any, dict[str, float]]:
        """One call; the state and its metrics."""
        step_fn: Any = self.subject.step_fn
        value = trees.copies(batch.value)
        if self.subject.update_fn is None:
            before = kind(live)
            live, metrics = stepped(before, call(f"step_fn on {batch.name}", step_fn, live, value))
            return live, _numbers(metrics)
        params, state, update = live
        given = self.subject.update_fn, params, value, state, update
        made = call(f"update_fn on {batch.name}", *given)
        if not isinstance(made, tuple) or len(made) not in (2, 3):
            raise Broken("update_fn returned neither (params, opt_state) nor these and metrics")
        return (*made[:2], update + 1), _numbers((*made, None)[2])

    def look(self, live: Any, metrics: dict[str, float]) -> Point:
        """A copy of the live state on the host."""
        given = self.subject
        state = live if given.update_fn is None else live[1]
        leaves = {trees.path_name(p): x for p, x in jax.tree.leaves_with_path(opened(state))}
        floats = {n: trees.as_array(x) for n, x in leaves.items() if trees.is_float_leaf(x)}
        updates_of: Any = given.updates_of or (lambda _: 0)
        return Point(
            params=self._read(*self.params_of, live),
            arrays={n: np.array(x) for n, x in floats.items() if x.ndim},
            counters={n: int(x) for n, x in leaves.items() if _is_whole(x)},
            average=self._read("ema_of", given.ema_of, state) if given.ema_of else {},
            updates=call("updates_of", lambda: int(updates_of(state))),
            metrics=metrics,
        )

    def _read(self, name: str, function: Any, state: Any) -> trees.Arrays:
        """A tree like the parameters that is part of the state."""
        found = trees.named(opened(call(name, function, state)))
        if trees.shapes(found) != self.shapes:
            raise Broken(f"{name} returned other names or shapes than those of params")
        return found

    def play(self, *batches: Batch, params: Any = None, every_call: bool = False) -> list[Point]:
        """The start, and the state after each update or call; a batch makes one update."""
        calls = self.subject.calls_per_update
        try:
            live = self.start(self.params if params is None else params)
            points = [self.look(live, {})]
            for batch in batches:
                for i in range(calls):
                    live, metrics = self.advance(live, batch)
                    if every_call or i == calls - 1:
                        points.append(self.look(live, metrics))
            return points
        finally:  # a state_dict holds the very tensors of a module that init_fn may load it into
            given, kept = jax.tree.leaves(self.subject.params), jax.tree.leaves(self.params)
            for own, copy in zip(given, kept, strict=True):
                if hasattr(own, "detach"):
                    own.detach().copy_(copy.detach())


def _is_whole(leaf: Any) -> bool:
    array = hasattr(leaf, "dtype") and "int" in str(leaf.dtype) and not leaf.ndim
    return array or isinstance(leaf, int)


def _numbers(metrics: Any) -> dict[str, float]:
    """The last value of each metric that is a number."""
    if not isinstance(metrics, Mapping):
        return {}
    values = {str(name): trees.as_array(value) for name, value in metrics.items()}
    kinds = {n: x.dtype == bool or jnp.issubdtype(x.dtype, np.number) for n, x in values.items()}
    return {name: float(x.ravel()[-1]) for name, x in values.items() if x.size and kinds[name]}


def logged(points: list[Point], name: str) -> list[float]:
    """A metric at every update."""
    if any(name not in point.metrics for point in points[1:]):
        raise Skip(f"The metrics of a call have no '{name}'.")
    return [point.metrics[name] for point in points[1:]]


@fixture
def loop(subject: Subject) -> Loop:
    """The loop, whichever way it was given."""
    if subject.step_fn is None and subject.update_fn is None:
        raise Skip("Not given: step_fn or update_fn.", "step_fn")
    return Loop(subject)


@fixture
def calls(loop: Loop) -> list[Point]:
    """The state after every call with the good batch."""
    return loop.play(*[loop.batch] * UPDATES, every_call=True)


@fixture
def good(subject: Subject, calls: list[Point]) -> list[Point]:
    """The state after every update with the good batch."""
    return calls[:: subject.calls_per_update]


@fixture
def still(loop: Loop, good: list[Point]) -> list[Point]:
    """Updates in which every gradient is zero, from randomised parameters."""
    if loop.empty is None:
        raise give("empty_batch")
    points = loop.play(*[loop.empty] * UPDATES, params=loop.randomised())
    norm = points[-1].metrics.get("optim/grad_norm", 0.0)
    if norm != 0:
        raise Skip(f"The gradient of empty_batch has norm {norm:.3g}, not 0.")
    return points


@fixture
def poisoned(loop: Loop, good: list[Point]) -> dict[str, list[Point]]:
    """For each bad batch the start and the states before it, after it, and an update later."""
    if not loop.bad:
        raise give("bad_batch")
    return {bad.name: loop.play(loop.batch, bad, loop.batch) for bad in loop.bad}
