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
    metrics: dict[str, float]
    average: trees.Arrays | None
    updates: int  # as the loop counts them; 0 without updates_of


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
        self.init_fn: Any = subject.init_fn
        self.call_fn: Any = subject.update_fn or subject.step_fn
        self.params = trees.copies(subject.params)
        self.shapes = trees.shapes(trees.named(self.params))
        if subject.update_fn is not None:
            self.batch = self.direction(1.0)
            zeros = jax.tree.map(lambda g: g * 0, self.batch.value)
            self.empty: Batch | None = Batch("zero gradients", zeros)
            self.bad = [self._poisoned("Inf", np.inf), self._poisoned("NaN", np.nan)]
            return
        self.batch = Batch("batch", subject.batch)
        given = [Batch(n, getattr(subject, n)) for n in ("empty_batch", "bad_batch")]
        self.empty = given[0] if given[0].value is not None else None
        self.bad = [given[1]] if given[1].value is not None else []

    def direction(self, norm: float) -> Batch:
        """Gradients of a global norm, the same direction every time."""
        if self.subject.update_fn is None:
            raise give("update_fn")
        rng = self.subject.rng(1)
        noise = [np.asarray(rng.standard_normal(shape)) for shape in self.shapes.values()]
        leaves, tree = jax.tree.flatten(self.params)
        scale = norm / trees.norm(noise)
        grads = [trees.like(x, scale * g) for x, g in zip(leaves, noise, strict=True)]
        return Batch("random gradients", jax.tree.unflatten(tree, grads))

    def _poisoned(self, name: str, value: float) -> Batch:
        leaves, tree = jax.tree.flatten(self.batch.value)
        arrays = [trees.as_array(leaf) for leaf in leaves]
        largest = int(np.argmax([x.size for x in arrays]))
        bad = arrays[largest].astype(np.float64)
        bad.flat[bad.size // 2] = value
        leaves[largest] = trees.like(leaves[largest], bad)
        return Batch(f"gradients with one {name}", jax.tree.unflatten(tree, leaves))

    def randomised(self) -> Any:
        """Parameters of which no leaf is zero or constant."""

        def trained(new: Any, old: Any) -> Any:
            return new.requires_grad_(old.requires_grad) if hasattr(old, "detach") else new

        noise = trees.randomise(self.params, self.subject.seed)
        return jax.tree.map(trained, noise, self.params)

    def start(self, params: Any) -> Any:
        """A new run's live state."""
        own = trees.copies(params)
        state = call("init_fn", self.init_fn, own)
        if self.subject.update_fn is None:
            return state
        # Optimisers of PyTorch hold the tensors that they move; JAX may donate both arguments.
        second = jax.tree.map(lambda x: x if hasattr(x, "detach") else trees.copies(x), own)
        return second, state, self.subject.first_update

    def advance(self, live: Any, batch: Batch) -> tuple[Any, dict[str, float]]:
        """One call; the state and its metrics."""
        value = trees.copies(batch.value)
        if self.subject.update_fn is None:
            before = kind(live)
            made = call(f"step_fn on {batch.name}", self.call_fn, live, value)
            live, metrics = stepped(before, made)
            return live, _numbers(metrics)
        params, state, update = live
        what = f"update_fn on {batch.name}"
        made = call(what, self.call_fn, params, value, state, update)
        if not isinstance(made, tuple) or len(made) not in (2, 3):
            raise Broken("update_fn returned neither (params, opt_state) nor these and metrics")
        return (made[0], made[1], update + 1), _numbers(made[2] if len(made) == 3 else None)

    def look(self, live: Any, metrics: dict[str, float] | None = None) -> Point:
        """A copy of the live state on the host."""
        given = self.subject
        params, state = live[:2] if given.update_fn is not None else (None, live)

        def like_params(name: str, tree: Any) -> trees.Arrays:
            found = trees.named(opened(tree))
            if trees.shapes(found) != self.shapes:
                raise Broken(f"{name} returned other names or shapes than those of params")
            return found

        if given.params_of is not None and given.update_fn is None:
            found = like_params("params_of", call("params_of", given.params_of, state))
        else:
            found = like_params("update_fn", params)
        average = None
        if given.ema_of is not None:
            average = like_params("ema_of", call("ema_of", given.ema_of, state))
        leaves = {
            trees.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(opened(state))
        }
        arrays = {
            n: np.array(trees.as_array(x)) for n, x in leaves.items() if trees.is_float_leaf(x)
        }
        return Point(
            params=found,
            arrays={n: x for n, x in arrays.items() if x.ndim},
            counters={n: _whole(x) for n, x in leaves.items() if _whole(x) is not None},
            metrics=metrics or {},
            average=average,
            updates=call("updates_of", lambda: int(given.updates_of(state)))
            if given.updates_of
            else 0,
        )

    def play(self, *batches: Batch, params: Any = None, every_call: bool = False) -> list[Point]:
        """The start, and the state after each update or call; a batch makes one update."""
        calls = self.subject.calls_per_update
        try:
            live = self.start(self.params if params is None else params)
            points = [self.look(live)]
            for batch in batches:
                for i in range(calls):
                    live, metrics = self.advance(live, batch)
                    if every_call or i == calls - 1:
                        points.append(self.look(live, metrics))
        finally:
            self._restore()
        return points

    def _restore(self) -> None:
        """Undo what was done to the given parameters: a state_dict holds the module's own."""
        for own, kept in zip(
            *map(jax.tree.leaves, (self.subject.params, self.params)), strict=True
        ):
            if hasattr(own, "detach"):
                own.detach().copy_(kept.detach())


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
        raise give("empty_batch", why="Not given: empty_batch, one without a scored token.")
    points = loop.play(*[loop.empty] * UPDATES, params=loop.randomised())
    norm = points[-1].metrics.get("optim/grad_norm", 0.0)
    if norm != 0:
        raise Skip(f"The gradient of empty_batch has norm {norm:.3g}, not 0.")
    return points


class Poisoned(NamedTuple):
    """The state before a bad update, after it, and after one more good update."""

    name: str
    before: Point
    after: Point
    later: Point


@fixture
def poisoned(loop: Loop, good: list[Point]) -> list[Poisoned]:
    """Updates with each of the bad batches."""
    if not loop.bad:
        raise give("bad_batch", why="Not given: bad_batch, one whose gradient is not finite.")
    return [Poisoned(bad.name, *loop.play(loop.batch, bad, loop.batch)[1:]) for bad in loop.bad]


def logged(points: list[Point], name: str) -> list[float]:
    """A metric at every update."""
    if any(name not in point.metrics for point in points[1:]):
        raise Skip(f"The metrics of a call have no '{name}'.")
    return [point.metrics[name] for point in points[1:]]


def _whole(leaf: Any) -> int | None:
    try:
        return operator.index(leaf)
    except TypeError:
        return None


def _numbers(metrics: Any) -> dict[str, float]:
    """The last value of each metric that is a number."""
    if not isinstance(metrics, Mapping):
        return {}
    values = {str(name): trees.as_array(value) for name, value in metrics.items()}
    return {
        name: float(x.ravel()[-1])
        for name, x in values.items()
        if x.size and (x.dtype == bool or jnp.issubdtype(x.dtype, np.number))
    }
