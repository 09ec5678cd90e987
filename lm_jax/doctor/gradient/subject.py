"""A scalar loss of parameters as a black box, and its gradient against central differences."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import Bound, Broken, Facts, Skip, call, function, kind_of, require, whole
from lm_jax.doctor.findings import Measure, at_most, listed, none, note
from lm_jax.doctor.gradient.differences import STEPS, Slope, rounding, slope

TOLERANCE = 1e-6  # relative error that float64 is far below
DECISIVE = 0.1  # a difference whose bound exceeds this share of the gradient decides nothing
DIRECTIONS = 5
Function = Annotated[Callable[..., Any], function]
Gradient = Annotated[Callable[..., Any] | None, function]  # None: by jax.grad
_NAMES = Bound("give a list of names", lambda x: isinstance(x, Iterable) and type(x) is not str)


@dataclasses.dataclass
class Subject(Facts):
    """Examine the gradient of a scalar loss with respect to a pytree of parameters."""

    loss_fn: Annotated[Function, "float64 parameters -> scalar; must not depend on chance."]
    params: Annotated[Any, "pytree of floats without structure (not zeros or ones), and others."]
    _: dataclasses.KW_ONLY
    grad_fn: Annotated[Gradient, "parameters -> gradients; both then get NumPy arrays."] = None
    seed: Annotated[int, "of directions and coordinates.", whole()] = 0
    unused: Annotated[Iterable[str], "leaves, or what holds them, without a gradient.", _NAMES] = ()

    def __post_init__(self) -> None:
        """Find the floating-point leaves."""
        super().__post_init__()
        self.unused = tuple(self.unused)
        paths, self.tree = jax.tree.flatten_with_path(self.params)
        names = [trees.path_name(path) for path, _ in paths]
        if len(set(names)) < len(names):  # a key with a slash
            names = [jax.tree_util.keystr(path) for path, _ in paths]
        self.all = {name: leaf for name, (_, leaf) in zip(names, paths, strict=True)}
        self.leaves = {
            name: trees.as_array(leaf).astype(np.float64)
            for name, leaf in self.all.items()
            if (trees.is_float_leaf(leaf) or isinstance(leaf, float)) and trees.as_array(leaf).size
        }
        require(bool(self.leaves), "params", "no floating-point leaf; give arrays to differentiate")

    def merged(self, leaves: Mapping[str, Any]) -> Any:
        """The parameters with these leaves."""
        return jax.tree.unflatten(self.tree, [leaves.get(n, x) for n, x in self.all.items()])

    def loss(self, leaves: Mapping[str, Any]) -> Any:
        """The loss as it was given."""
        return self.loss_fn(self.merged(leaves))

    @functools.cached_property
    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Loss and gradient, compiled where JAX differentiates and can compile."""
        if given := self.grad_fn:
            return self.loss, lambda leaves: given(self.merged(leaves))
        pair = jax.jit(self.loss), jax.jit(jax.grad(self.loss))
        try:
            pair[1](self.arguments(self.leaves))
        except Exception:  # what is wrong, if it is not the compilation, shows again uncompiled
            return self.loss, jax.grad(self.loss)
        return pair

    def arguments(self, leaves: trees.Arrays) -> dict[str, Any]:
        """The leaves in the kind of array that the functions get, safe to write to."""
        return {n: x.copy() if self.grad_fn else jnp.asarray(x) for n, x in leaves.items()}

    def value(self, leaves: trees.Arrays, *, as_given: bool = False) -> float:
        """The loss; never compiled if `as_given`."""
        with jax.enable_x64(True):
            function = self.loss if as_given else self.functions[0]
            array = call("loss_fn", lambda: trees.as_array(function(self.arguments(leaves))))
        if array.shape or array.dtype == object:
            what = f"an array {array.shape}" if array.shape else kind_of(array.item())
            raise Broken(f"loss_fn returned {what}, not a scalar")
        return call("the loss as a number", float, array)

    def gradient(self, leaves: trees.Arrays) -> trees.Arrays:
        """Gradient of every floating-point leaf, evaluated afresh; zeros where it is None."""
        with jax.enable_x64(True):
            what = "grad_fn" if self.grad_fn else "jax.grad of loss_fn, as no grad_fn is given,"
            tree = call(what, self.functions[1], self.arguments(leaves))
        if self.grad_fn:
            found: Any
            paths, found = jax.tree.flatten_with_path(tree, is_leaf=lambda x: x is None)
            if found != self.tree:
                names = listed(trees.path_name(path) for path, _ in paths)
                raise Broken(f"grad_fn returned {names}, not a tree of {listed(self.all)}")
            tree = {name: grad for name, (_, grad) in zip(self.all, paths, strict=True)}
        arrays = {}
        for name, leaf in leaves.items():
            grad = np.zeros(leaf.shape) if tree[name] is None else tree[name]
            arrays[name] = call("the gradient", lambda x: np.array(trees.as_array(x), float), grad)
            if (shape := arrays[name].shape) != leaf.shape:
                raise Broken(f"the gradient of {name} has shape {shape}, not {leaf.shape}")
        return arrays


@dataclasses.dataclass(eq=False)
class Comparison:
    """A directional derivative by the gradient and by central differences."""

    name: str
    direction: trees.Arrays
    given: float
    slope: Slope
    scale: float  # size against which the error counts
    error: float  # relative to the scale
    bound: float  # error that the difference itself may have, relative to the scale

    @property
    def wrong(self) -> bool:
        """The error is more than differences and float64 explain."""
        return not self.error <= self.bound + TOLERANCE


@dataclasses.dataclass(eq=False)
class Point:
    """Loss and gradient around a point of parameters."""

    subject: Subject
    leaves: trees.Arrays

    @functools.cached_property
    def centre(self) -> float:
        """The loss there."""
        return self.subject.value(self.leaves)

    @functools.cached_property
    def grads(self) -> trees.Arrays:
        """The gradient there."""
        return self.subject.gradient(self.leaves)

    def along(self, direction: trees.Arrays) -> Callable[[float], float]:
        """The loss on the line through the parameters."""
        return lambda t: self.subject.value(
            {n: x + t * direction[n] if n in direction else x for n, x in self.leaves.items()}
        )

    def random(self, draw: int, masks: Mapping[str, np.ndarray]) -> trees.Arrays:
        """A random direction of length 1 in the masked coordinates."""
        rng = self.subject.rng(draw)
        d = {name: mask * rng.normal(size=mask.shape) for name, mask in masks.items()}
        length = trees.norm(d.values())
        return {name: x / length for name, x in d.items()}

    @functools.cached_property
    def directions(self) -> list[trees.Arrays]:
        """Random directions in all leaves."""
        ones = {name: np.ones(leaf.shape) for name, leaf in self.leaves.items()}
        return [self.random(draw, ones) for draw in range(DIRECTIONS)]

    @functools.cached_property
    def noise(self) -> float:
        """Standard deviation of the rounding of the loss: the median of three lines."""
        lines = map(self.along, self.directions[:3])
        return float(np.median([rounding(line, self.centre) for line in lines]))

    @property
    def relative_noise(self) -> float:
        """Rounding of the loss relative to its value."""
        return self.noise / max(abs(self.centre), 1e-300)

    @functools.cached_property
    def sweeps(self) -> list[Comparison]:
        """The random directions, over all steps."""
        pairs = enumerate(self.directions)
        return [self.compare(f"direction {i}", d, STEPS) for i, d in pairs]

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """Steps around the one that serves the random directions best."""
        best = np.median([comparison.slope.step for comparison in self.sweeps])
        return best * np.array([10.0, np.sqrt(10.0), 1.0])

    @functools.cached_property
    def typical(self) -> float:
        """Root mean square of the whole gradient: the derivative along a random unit direction."""
        return trees.rms(trees.flat(self.grads))

    def compare(self, name: str, direction: trees.Arrays, steps: Any = None) -> Comparison:
        """The gradient against central differences along a direction.

        Errors count against the derivative, or what it typically is in these leaves, or a
        thousandth of that in all.
        """
        steps = self.steps if steps is None else steps
        found = slope(self.along(direction), self.centre, self.noise, steps)
        given = sum(float((self.grads[n] * d).sum()) for n, d in direction.items())
        here = trees.rms(trees.flat({n: self.grads[n] for n in direction}))
        scale = max(abs(given), abs(found.value), here, 1e-3 * self.typical) or 1.0
        error = abs(given - found.value) / scale
        return Comparison(name, direction, given, found, scale, error, found.bound / scale)

    @functools.cached_property
    def elsewhere(self) -> "Point":
        """The same function at parameters moved by a tenth of their size."""
        rng = self.subject.rng(400)
        sizes = {name: 0.1 * max(trees.rms(x), 0.1) for name, x in self.leaves.items()}
        moved = {n: x + sizes[n] * rng.normal(size=x.shape) for n, x in self.leaves.items()}
        return Point(self.subject, moved)

    def confirmed(self, c: Comparison) -> bool:
        """Whether a wrong derivative is wrong elsewhere too; at a point of many kinks none is."""
        try:
            return self.elsewhere.compare(c.name, c.direction).wrong
        except Broken:
            return True

    def judged(self, comparisons: list[Comparison], what: str) -> list[Measure]:
        """What comparisons say; a `Skip` if differences decide too few to call it a pass."""
        wrong = [c for c in comparisons if c.wrong and self.confirmed(c)]
        right = [c for c in comparisons if not c.wrong and c.bound <= DECISIVE]
        vague = [c for c in comparisons if c not in wrong and c not in right]
        if not wrong and 2 * len(vague) > len(comparisons):
            undecided = f"{len(vague)} of {len(comparisons)} differences along {what} cannot decide"
            raise Skip(f"{undecided}: the loss rounds to {self.relative_noise:.1g} of its value.")
        wrong.sort(key=lambda c: -c.error)
        worst = wrong[0] if wrong else max(right, key=lambda c: c.error / (c.bound + 1e-9))
        at = f"gradient {worst.given:.6g}, difference {worst.slope.value:.6g}"
        name, limit = f"relative error of {worst.name}", worst.bound + TOLERANCE
        errors = {c.name: c.error for c in comparisons}
        return [
            none(f"wrong {what}", [c.name for c in wrong], of=len(comparisons), key="wrong"),
            at_most(name, worst.error, limit, where=at, key="error"),
            note(f"{len(comparisons)} {what}", errors, key="errors"),
            note(f"{len(vague)} undecided", {c.name: c.bound for c in comparisons}, key="bounds"),
        ]


@fixture
def point(subject: Subject) -> Point:
    """The parameters as they were given."""
    return Point(subject, subject.leaves)
