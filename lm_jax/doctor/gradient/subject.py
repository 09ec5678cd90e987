"""A scalar loss of parameters as a black box, and its gradient against central differences."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.gradient import differences
from lm_jax.doctor.gradient.differences import Slope, slope
from lm_jax.doctor.old import Skip, Verdict, call, verdict
from lm_jax.doctor.trees import as_array, is_float_leaf

TOLERANCE = 1e-6  # relative error that float64 is far below
DECISIVE = 0.1  # a difference whose bound exceeds this share of the gradient decides nothing
DIRECTIONS = 5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A directional derivative by the gradient and by central differences."""

    name: str
    direction: list[np.ndarray | None] = dataclasses.field(repr=False)
    given: float
    slope: Slope
    typical: float  # derivative to be expected along such a direction

    @property
    def scale(self) -> float:
        """Size against which the error counts."""
        return max(abs(self.given), abs(self.slope.value), self.typical)

    @property
    def error(self) -> float:
        """Relative to the scale."""
        return abs(self.given - self.slope.value) / self.scale if self.scale else 0.0

    @property
    def bound(self) -> float:
        """Error that the difference itself may have, relative to the scale."""
        return self.slope.bound / self.scale if self.scale else 0.0

    @property
    def wrong(self) -> bool:
        """The error is more than differences and float64 explain."""
        return not self.error <= self.bound + TOLERANCE

    @property
    def undecided(self) -> bool:
        """The difference is too coarse to tell."""
        return not self.wrong and self.bound > DECISIVE


@dataclasses.dataclass(eq=False)
class Gradients:
    """The examined function of the floating-point leaves, in float64."""

    loss_fn: Callable
    params: Any
    grad_fn: Callable | None
    seed: int
    unused: tuple[str, ...]

    def __post_init__(self) -> None:
        """Split the parameters into floating-point leaves and the rest."""
        paths, self.tree = jax.tree_util.tree_flatten_with_path(self.params)
        self.all_leaves = [leaf for _, leaf in paths]
        self.places = [
            i
            for i, leaf in enumerate(self.all_leaves)
            if (is_float_leaf(leaf) or isinstance(leaf, float)) and as_array(leaf).size
        ]
        keys = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
        self.names = [keys[i] or "parameters" for i in self.places]
        self.leaves = [as_array(self.all_leaves[i]).astype(np.float64) for i in self.places]

    def merge(self, leaves: Iterable) -> Any:
        """The parameters with other floating-point leaves."""
        merged = list(self.all_leaves)
        for place, leaf in zip(self.places, leaves, strict=True):
            merged[place] = leaf
        return jax.tree.unflatten(self.tree, merged)

    def loss(self, leaves: list) -> Any:
        """The loss as it was given."""
        return self.loss_fn(self.merge(leaves))

    @functools.cached_property
    def functions(self) -> tuple[Callable, Callable]:
        """Loss and gradient, compiled where JAX differentiates and can compile."""
        if self.grad_fn:
            return self.loss, lambda leaves: self.grad_fn(self.merge(leaves))
        try:
            pair = jax.jit(self.loss), jax.jit(jax.grad(self.loss))
            pair[1]([jnp.asarray(x) for x in self.leaves])
        except Exception:  # what is wrong, if it is not the compilation, shows again uncompiled
            return self.loss, jax.grad(self.loss)
        return pair

    def arguments(self, leaves: list[np.ndarray]) -> list:
        """The leaves in the kind of array that the functions get, safe to write to."""
        return [leaf.copy() if self.grad_fn else jnp.asarray(leaf) for leaf in leaves]

    def value(self, leaves: list[np.ndarray], *, as_given: bool = False) -> float:
        """The loss; never compiled if `as_given`."""
        function = self.loss if as_given else self.functions[0]
        result = call("the loss", function, self.arguments(leaves))
        if call("the shape of the loss", np.shape, result) != ():
            raise Skip(f"the loss has shape {np.shape(result)} and is no scalar")
        return call("the loss as a number", float, result)

    def gradient(self, leaves: list[np.ndarray]) -> list[np.ndarray]:
        """Gradient of every floating-point leaf, evaluated afresh."""
        tree = call("the gradient function", self.functions[1], self.arguments(leaves))
        grads = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
        if len(grads) not in (len(leaves), len(self.all_leaves)):
            raise Skip(f"the gradient has {len(grads)} leaves for {len(leaves)} parameters")
        if self.grad_fn and len(grads) == len(self.all_leaves):
            found: Any = jax.tree.structure(tree, is_leaf=lambda x: x is None)
            if found != self.tree:
                raise Skip(f"the gradient has the structure {found}, the parameters {self.tree}")
        if len(grads) != len(leaves):
            grads = [grads[i] for i in self.places]
        arrays = [
            np.array(call("a gradient as an array", as_array, g)).astype(np.float64) for g in grads
        ]
        for name, array, leaf in zip(self.names, arrays, leaves, strict=True):
            if array.shape != leaf.shape:
                raise Skip(f"the gradient of {name} has shape {array.shape}, not {leaf.shape}")
        return arrays

    @functools.cached_property
    def centre(self) -> float:
        """The loss at the given parameters."""
        return self.value(self.leaves)

    @functools.cached_property
    def grads(self) -> list[np.ndarray]:
        """The gradient at the given parameters; a `Skip` if not all of it is finite."""
        grads = self.gradient(self.leaves)
        if not np.isfinite(self.centre) or not all(np.isfinite(g).all() for g in grads):
            raise Skip("the loss or its gradient is not finite (gradient.finite)")
        return grads

    @functools.cached_property
    def typical(self) -> float:
        """Root mean square of the whole gradient: the derivative along a random unit direction."""
        squares = sum(float((g**2).sum()) for g in self.grads)
        return float(np.sqrt(squares / sum(g.size for g in self.grads)))

    def along(self, direction: list[np.ndarray | None]) -> Callable[[float], float]:
        """The loss on the line through the parameters; None stands for a leaf that stays."""

        def loss(t: float) -> float:
            pairs = zip(self.leaves, direction, strict=True)
            return self.value([x if d is None else x + t * d for x, d in pairs])

        return loss

    def random(self, draw: int, masks: list[np.ndarray | None]) -> list[np.ndarray | None]:
        """A random direction of length 1 in the masked coordinates."""
        rng = np.random.default_rng((self.seed, draw))
        d = [None if m is None else m * rng.normal(size=m.shape) for m in masks]
        length = np.sqrt(sum(float((x**2).sum()) for x in d if x is not None))
        return [None if x is None else x / length for x in d]

    def only(self, leaf: int, mask: np.ndarray) -> list[np.ndarray | None]:
        """Nothing but the masked part of one leaf."""
        return [mask if i == leaf else None for i in range(len(self.leaves))]

    @functools.cached_property
    def whole(self) -> list[list[np.ndarray | None]]:
        """Random directions in all leaves."""
        ones: list[np.ndarray | None] = [np.ones(leaf.shape) for leaf in self.leaves]
        return [self.random(draw, ones) for draw in range(DIRECTIONS)]

    @functools.cached_property
    def noise(self) -> float:
        """Standard deviation of the rounding of the loss: the median of three lines."""
        lines = [self.along(direction) for direction in self.whole[:3]]
        return float(np.median([differences.rounding(line, self.centre) for line in lines]))

    @functools.cached_property
    def sweeps(self) -> list[Comparison]:
        """The random directions, over all steps."""
        return [
            self.compare(f"direction {i}", d, self.typical, differences.STEPS)
            for i, d in enumerate(self.whole)
        ]

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """Steps around the one that serves the random directions best."""
        best = np.median([comparison.slope.step for comparison in self.sweeps])
        return best * np.array([10.0, np.sqrt(10.0), 1.0])

    def compare(
        self, name: str, direction: list[np.ndarray | None], typical: float, steps: Any
    ) -> Comparison:
        """The gradient against central differences along a direction."""
        found = slope(self.along(direction), self.centre, self.noise, steps)
        pairs = zip(self.grads, direction, strict=True)
        given = sum(float((g * d).sum()) for g, d in pairs if d is not None)
        return Comparison(name, direction, given, found, typical)

    def coordinate(self, leaf: int, index: int) -> Comparison:
        """One coordinate of one leaf, by its flat index."""
        unit = np.zeros(self.leaves[leaf].shape)
        unit.flat[index] = 1.0
        place = ",".join(str(int(i)) for i in np.unravel_index(index, unit.shape))
        name = f"{self.names[leaf]}[{place}]" if place else self.names[leaf]
        return self.compare(name, self.only(leaf, unit), self.typical_of(leaf), self.steps)

    def typical_of(self, leaf: int) -> float:
        """Root mean square of the gradient of a leaf, or a thousandth of the whole if more."""
        return max(float(np.sqrt((self.grads[leaf] ** 2).mean())), 1e-3 * self.typical)

    def declared(self, name: str) -> bool:
        """Whether the leaf, or what holds it, is declared unused."""
        return any(name == u or name.startswith(f"{u}/") for u in self.unused)

    @functools.cached_property
    def elsewhere(self) -> "Gradients":
        """The same function at parameters moved by a tenth of their size."""
        rng = np.random.default_rng((self.seed, 400))
        sizes = [max(float(np.sqrt((x**2).mean())), 0.1) for x in self.leaves]
        pairs = zip(self.leaves, sizes, strict=True)
        moved = [x + 0.1 * size * rng.normal(size=x.shape) for x, size in pairs]
        return dataclasses.replace(self, params=self.merge(moved))

    def confirmed(self, c: Comparison) -> bool:
        """Whether a wrong derivative is wrong elsewhere too.

        Zeros and ties put many kinks on one point, and no slope there is wrong; a wrong backward
        pass is wrong at any point.
        """
        try:
            there = self.elsewhere
            return there.compare(c.name, c.direction, c.typical, there.steps).wrong
        except Skip:
            return True

    def judged(self, comparisons: list[Comparison], what: str) -> Verdict:
        """The verdict on comparisons; a skip if differences decide too few to call it a pass."""
        wrong = [c for c in comparisons if c.wrong and self.confirmed(c)]
        wrong.sort(key=lambda c: -c.error)
        undecided = [c for c in comparisons if c.undecided or (c.wrong and c not in wrong)]
        if not wrong and 2 * len(undecided) > len(comparisons):
            raise Skip(
                f"{len(undecided)} of {len(comparisons)} differences along {what} cannot decide: "
                f"rounding of the loss is {self.relative_noise:.1g} of its value, which leaves "
                f"relative errors of {min(c.bound for c in undecided):.1g} or more"
            )
        worst = wrong[0] if wrong else max(comparisons, key=lambda c: c.error / (c.bound + 1e-9))
        evidence = (
            f"{len(comparisons)} {what}: worst relative error {worst.error:.2g} at {worst.name} "
            f"(gradient {worst.given:.6g}, difference {worst.slope.value:.6g} with step "
            f"{worst.slope.step:.1g}); {worst.bound + TOLERANCE:.1g} is explained by rounding and "
            f"step. {len(wrong)} wrong, {len(undecided)} undecided."
        )
        return verdict(
            not wrong,
            evidence,
            worst=worst.name,
            errors={c.name: c.error for c in comparisons},
            bounds={c.name: c.bound for c in comparisons},
            wrong=[c.name for c in wrong],
        )

    @property
    def relative_noise(self) -> float:
        """Rounding of the loss relative to its value."""
        return self.noise / max(abs(self.centre), 1e-300)
