"""An optimiser or a whole step as a black box: what every call leaves in its state, on the host."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from lm_jax.doctor import facts, trees
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import Bound, Broken, Facts, Skip, above, call, function, require, whole
from lm_jax.doctor.training.subject import kind, opened, stepped

UPDATES = 3  # made from every start
_names = Bound("give a list of names", lambda x: isinstance(x, Collection) and type(x) is not str)
_counts = Bound(
    "give a list of whole numbers of 2 or more",  # one micro-batch is what they are compared with
    lambda x: isinstance(x, Collection) and all(map(whole(2).holds, x)),
)
_dtype = Bound("give the name of a float dtype", trees.names_float)
Function = Annotated[Callable[..., Any] | None, function]
Number = Annotated[float | None, above(0, or_equal=True)]


@dataclasses.dataclass(kw_only=True)
class Subject(Facts):
    """Examine how a loop updates its parameters; what is not given is skipped by name.

    The loop is a whole step or only its second half, from gradients on. It always starts from
    fresh copies of `params`, so that it may donate or overwrite what it is given; the host holds a
    few copies of the state meanwhile. States may hold modules and optimisers of PyTorch. Metrics
    that are read: `optim/lr`, `optim/grad_norm`, `optim/grad_norm_clipped`,
    `optim/skipped_updates`.
    """

    params: Annotated[Any, "tree of arrays to start from; of a module its named_parameters."] = None
    init_fn: Annotated[Function, "`(params) -> state`, or `-> opt_state` without `step_fn`."] = None
    step_fn: Annotated[Function, "`(state, batch) -> state` or `(state, metrics)`."] = None
    params_of: Annotated[Function, "`(state) -> params`."] = None
    batch: Annotated[
        Any,
        "what `step_fn` and `gradient_fn` read; for the accumulation a dict whose `weights` "
        "[B, ...] leave rows with unequal numbers of scored tokens.",
    ] = None
    empty_batch: Annotated[Any, "one without a scored token, so that its gradient is 0."] = None
    bad_batch: Annotated[Any, "one whose gradient is not finite."] = None
    calls_per_update: Annotated[int, "calls of `step_fn` that make one update.", whole(1)] = 1
    updates_of: Annotated[Function, "`(state) -> int`, the loop's own count of updates."] = None
    first_update: Annotated[int, "number of the update a fresh state makes first.", whole()] = 0
    update_fn: Annotated[
        Function,
        "`(params, grads, opt_state, update) -> (params, opt_state)`, or these and metrics. Beside "
        "`step_fn` only clipping is seen by it, and `opt_state` is the whole state of `init_fn`.",
    ] = None
    gradient_fn: Annotated[
        Function, "`(params, batch, micro_batches) -> grads` of the mean nats, without dropout."
    ] = None
    micro_batches: Annotated[
        Sequence[int] | None, "the numbers of micro-batches to compare with one.", _counts
    ] = None
    compute_dtype: Annotated[str, "of the passes, which sets rounding.", _dtype] = "float32"
    learning_rate: Annotated[Function, "`(update) -> float`."] = None
    steps: Annotated[int | None, "updates of the run.", whole(1)] = None
    end_lr: Annotated[Number, "learning rate declared for the last update."] = None
    weight_decay: Annotated[Number, "decoupled, in params -= lr weight_decay params."] = None
    decayed: Annotated[Any, "tree like `params`, true where it decays; None: matrices."] = None
    clip_norm: Annotated[Number, "largest norm of the whole gradient; None or 0: any."] = None
    ema_of: Annotated[Function, "`(state) -> average of params`, as evaluation uses it."] = None
    first_eval: Annotated[int, "updates before the average is first evaluated.", whole(1)] = 100
    unused: Annotated[
        Collection[str], "leaves, or what holds them, that need not move.", _names
    ] = ()
    seed: Annotated[int, "of the noise.", whole()] = 0

    def __post_init__(self) -> None:
        """Refuse arguments that do not fit together."""
        super().__post_init__()
        both = "params", "init_fn"
        for loop, needed in {"update_fn": both, "step_fn": (*both, "params_of", "batch")}.items():
            for name in needed:
                fit = getattr(self, loop) is None or getattr(self, name) is not None
                require(fit, name, f"give it with {loop}")
        module = isinstance(self.params, Iterator) or hasattr(self.params, "named_parameters")
        remedy = "give dict(module.named_parameters()), and load it into a module in init_fn"
        require(not module, "params", remedy)
        fit = self.params is None or any(x.size for x in trees.float_leaves(self.params).values())
        require(fit, "params", "give a pytree that holds floating-point arrays")


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
        self.subject: Any = subject
        self.params = trees.copies(subject.params)
        self.shapes = trees.shapes(trees.named(self.params))
        self.calls_per_update = subject.calls_per_update
        self.batch = Batch("batch", subject.batch)
        self.empty = Batch("empty_batch", subject.empty_batch)
        self.bad = [Batch("bad_batch", subject.bad_batch)]

    def start(self, params: Any) -> Any:
        """A new run's live state."""
        return call("init_fn", self.subject.init_fn, params)

    def advance(self, live: Any, batch: Batch) -> tuple[Any, Any]:
        """One call; the state and its metrics."""
        before, what = kind(live), f"step_fn on {batch.name}"
        return stepped(before, call(what, self.subject.step_fn, live, batch.value))

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
                    raise facts.give(batch.name)
                for i in range(1, self.calls_per_update + 1):
                    fresh = batch._replace(value=trees.copies(batch.value))
                    live, metrics = self.advance(live, fresh)
                    if every_call or i == self.calls_per_update:
                        points.append(self.look(live, metrics))
            return points
        finally:  # a state_dict holds the very tensors of a module that init_fn may load it into
            both = map(jax.tree.leaves, (self.subject.params, self.params))
            for own, copy in zip(*both, strict=True):
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
        params, state, update = live
        what, update_fn = f"update_fn on {batch.name}", self.subject.update_fn
        made = call(what, update_fn, params, batch.value, state, update)
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
    if subject.step_fn is None and half is None:
        raise Skip("Not given: step_fn or update_fn.", "step_fn")
    return half if half and subject.step_fn is None else Loop(subject)


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
