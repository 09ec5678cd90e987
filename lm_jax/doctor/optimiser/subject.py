"""A training loop as a black box: what every call leaves in its state, as seen from the host."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.old import Arguments, Skip, call

Arrays = dict[str, np.ndarray]

UPDATES = 3  # made by each trajectory
FLOAT32_EPS = float(np.finfo(np.float32).eps)


class Point(NamedTuple):
    """The state after a call."""

    params: Arrays
    arrays: Arrays  # floating arrays of the state that have an axis: moments, averages
    counters: dict[str, int]  # whole numbers of the state that have none
    metrics: dict[str, float]
    average: Arrays | None
    updates: int  # as the loop counts them; 0 without updates_of


@dataclasses.dataclass(frozen=True)
class Given(Arguments):
    """The arguments of `examine_optimiser`, which has their types and describes them."""

    params: Any
    init_fn: Any
    step_fn: Any
    params_of: Any
    batch: Any
    empty_batch: Any
    bad_batch: Any
    calls_per_update: int
    updates_of: Any
    first_update: int
    update_fn: Any
    gradient_fn: Any
    micro_batches: Any
    compute_dtype: str
    learning_rate: Any
    steps: Any
    end_lr: Any
    weight_decay: Any
    decayed: Any
    clip_norm: Any
    ema_of: Any
    first_eval: int
    unused: Any
    seed: int

    @functools.cached_property
    def loop(self) -> "Loop":
        """The loop, whichever way it was given."""
        if self.step_fn is None and self.update_fn is None:
            raise Skip("Not given: step_fn or update_fn.")
        return Loop(self)

    def lr(self, update: int) -> float:
        """Learning rate of an update."""
        self.need("learning_rate")
        return call("learning_rate", lambda: float(self.learning_rate(update)))

    def first_lrs(self) -> list[float]:
        """Learning rates of the updates of a trajectory."""
        return [self.lr(self.first_update + i) for i in range(UPDATES)]

    def logged(self, name: str) -> list[float]:
        """A metric at the updates of the good trajectory."""
        points = self.loop.good[self.calls_per_update :: self.calls_per_update]
        if any(name not in point.metrics for point in points):
            raise Skip(f"The metrics of a call have no '{name}'.")
        return [point.metrics[name] for point in points]

    @functools.cached_property
    def whole_gradient(self) -> Arrays:
        """The gradient of the batch in one piece."""
        return self.gradient(1)

    def gradient(self, micro_batches: int) -> Arrays:
        """The gradient of the batch in so many pieces, in float64."""
        self.need("gradient_fn", "params", "batch")
        made = call("gradient_fn", self.gradient_fn, self.params, self.batch, micro_batches)
        found = {name: x.astype(np.float64) for name, x in named(made).items()}
        if _shapes(found) != _shapes(named(self.params)):
            raise Skip("gradient_fn does not return a tree like the parameters.")
        return found

    @property
    def eps(self) -> float:
        """Step of the compute dtype near 1."""
        return float(jnp.finfo(self.compute_dtype).eps)


class Loop:
    """Calls the loop on fresh copies of the parameters, with a good, an empty and bad batches.

    A loop given as an `update_fn` reads gradients where the other reads batches: noise, zeros,
    and the noise with one element that is not finite.
    """

    def __init__(self, given: Given):
        """The loop is `given.update_fn` or else `given.step_fn`."""
        self.given = given
        self.batch, self.empty = given.batch, given.empty_batch
        self.bad = {} if given.bad_batch is None else {"the bad batch": given.bad_batch}
        if given.update_fn is not None:
            self.batch = self.direction(1.0)
            self.empty = jax.tree.map(lambda g: g * 0, self.batch)
            self.bad = {
                "an Inf in one gradient": self._with(np.inf),
                "a NaN in one gradient": self._with(np.nan),
            }
        self._live: Any = None

    def direction(self, norm: float) -> Any:
        """Gradients of a global norm, the same direction every time."""
        rng = np.random.default_rng(self.given.seed)
        noise = jax.tree.map(lambda x: rng.standard_normal(np.shape(x)), self.given.params)
        total = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(noise)))
        return jax.tree.map(
            lambda g, x: jnp.asarray(g * norm / total, np.asarray(x).dtype),
            noise,
            self.given.params,
        )

    def _with(self, value: float) -> Any:
        leaves, tree = jax.tree.flatten(self.batch)
        largest = int(np.argmax([leaf.size for leaf in leaves]))
        leaf = np.array(leaves[largest])
        leaf.ravel()[leaf.size // 2] = value
        leaves[largest] = jnp.asarray(leaf)
        return jax.tree.unflatten(tree, leaves)

    def randomised(self) -> Any:
        """Parameters of which no leaf is zero or constant."""
        rng = np.random.default_rng(self.given.seed)
        return jax.tree.map(
            lambda x: jnp.asarray(0.3 * rng.standard_normal(np.shape(x)), np.asarray(x).dtype),
            self.given.params,
        )

    def start(self, params: Any = None) -> Any:
        """A new run's live state."""
        params = self.given.params if params is None else params
        state = call("init_fn", self.given.init_fn, _copies(params))
        if self.given.update_fn is None:
            return state
        return _copies(params), state, self.given.first_update

    def advance(self, live: Any, batch: Any) -> tuple[Any, dict[str, float]]:
        """One call; the state and its metrics."""
        if self.given.update_fn is not None:
            params, state, step = live
            made = call("update_fn", self.given.update_fn, params, batch, state, step)
            if not isinstance(made, tuple) or len(made) not in (2, 3):
                raise Skip("update_fn returned neither (params, opt_state) nor these and metrics.")
            live, rest = (made[0], made[1], step + 1), made[2:]
        else:
            made = call("step_fn", self.given.step_fn, live, batch)
            # A state may itself be a tuple, even a pair: metrics are a mapping at its end.
            pair = type(made) is tuple and len(made) == 2 and isinstance(made[1], Mapping)
            live, rest = (made[0], made[1:]) if pair else (made, ())
        return live, _numbers(rest[0]) if rest else {}

    def look(self, live: Any, metrics: dict[str, float] | None = None) -> Point:
        """A copy of the live state on the host.

        Raises:
            Skip: if the parameters are no longer those that were given.
        """
        given = self.given
        params, state = live[:2] if given.update_fn is not None else (None, live)
        if given.update_fn is None:
            params = call("params_of", given.params_of, state)
        found = call("np.asarray of the parameters", named, params)
        if _shapes(found) != _shapes(named(given.params)):
            raise Skip("After a call the parameters have other names or shapes than those given.")
        average = None
        if given.ema_of is not None:
            average = call("ema_of", lambda: named(given.ema_of(state)))
            if _shapes(average) != _shapes(found):
                raise Skip("ema_of does not return a tree like the parameters.")
        arrays = {
            _name(path): np.array(leaf)
            for path, leaf in jax.tree.leaves_with_path(state)
            if isinstance(leaf, jax.Array | np.ndarray | np.generic)
            and jnp.issubdtype(leaf.dtype, np.number)
        }
        return Point(
            params=found,
            arrays={n: x for n, x in arrays.items() if x.ndim and is_floating(x)},
            counters={n: int(x) for n, x in arrays.items() if not (x.ndim or is_floating(x))},
            metrics=metrics or {},
            average=average,
            updates=call("updates_of", lambda: int(given.updates_of(state)))
            if given.updates_of
            else 0,
        )

    def trajectory(self, batch: Any, updates: int, params: Any = None) -> list[Point]:
        """The start and the state after every call of so many updates."""
        live = self.start(params)
        points = [self.look(live)]
        for _ in range(updates * self.given.calls_per_update):
            live, metrics = self.advance(live, batch)
            points.append(self.look(live, metrics))
        self._live = live
        return points

    @functools.cached_property
    def good(self) -> list[Point]:
        """Calls with the good batch."""
        return self.trajectory(self.batch, UPDATES)

    @functools.cached_property
    def still(self) -> list[Point]:
        """Calls in which every gradient is zero, from randomised parameters."""
        if self.empty is None:
            raise Skip("Not given: empty_batch, a batch without a scored token.")
        points = self.trajectory(self.empty, UPDATES, self.randomised())
        norm = points[-1].metrics.get("optim/grad_norm", 0.0)
        if norm != 0:
            raise Skip(f"The gradient of empty_batch has norm {norm:.3g}, not 0.")
        return points

    @functools.cached_property
    def poisoned(self) -> list[tuple[str, Point, Point, Point]]:
        """For each bad batch its name, and the state before it, after it and an update later."""
        if not self.bad:
            raise Skip("Not given: bad_batch, a batch whose gradient is not finite.")
        rows = []
        for name, batch in self.bad.items():
            before = self.trajectory(self.batch, 1)[-1]
            live, metrics = self._live, dict[str, float]()
            for _ in range(self.given.calls_per_update):
                live, metrics = self.advance(live, batch)
            after = self.look(live, metrics)
            for _ in range(self.given.calls_per_update):
                live, metrics = self.advance(live, self.batch)
            rows.append((name, before, after, self.look(live, metrics)))
        return rows


def named(tree: Any) -> Arrays:
    """Copies of the leaves on the host by their path."""
    return {_name(path): np.array(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def is_floating(x: np.ndarray) -> bool:
    """Also of bfloat16, which NumPy does not know as a float."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit by bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """All leaves in one float64 vector."""
    if not arrays:
        return np.zeros(0)
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in arrays.values()])


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first of the names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _copies(tree: Any) -> Any:
    """Fresh leaves: a step may donate or overwrite what it is given."""
    return jax.tree.map(lambda x: jnp.array(x) if isinstance(x, jax.Array) else np.array(x), tree)


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in arrays.items()}


def _numbers(metrics: Any) -> dict[str, float]:
    """The last value of each metric that is a number."""
    if not isinstance(metrics, Mapping):
        raise Skip(
            f"The metrics are a {type(metrics).__name__}, not a mapping of names to numbers."
        )
    values = {name: np.asarray(value) for name, value in metrics.items()}
    return {
        str(name): float(x.ravel()[-1])
        for name, x in values.items()
        if x.size and jnp.issubdtype(x.dtype, np.number)
    }


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
