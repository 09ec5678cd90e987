"""A kernel against a reference, over sizes around its blocks."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.old import (
    Finding,
    Report,
    Skip,
    Verdict,
    call,
    check,
    run_all,
    verdict,
    whole,
)

SIZES = (1, 7, 127, 128, 129, 200, 1025)


@dataclasses.dataclass(eq=False)
class Kernel:
    """The examined function, its reference, and what both give for each size."""

    fn: Callable
    reference: Callable
    make: Callable
    sizes: tuple[int, ...]
    seed: int

    @functools.cached_property
    def arguments(self) -> dict[int, tuple]:
        """Arguments of every size."""
        made = {}
        for size in self.sizes:
            rng = np.random.default_rng((self.seed, size))
            arguments = call(f"make at size {size}", self.make, size, rng)
            made[size] = tuple(arguments) if isinstance(arguments, tuple | list) else (arguments,)
        return made

    def tolerance(self, size: int) -> float:
        """Error allowed relative to the largest entry: a few roundings of the type of the data.

        Four roundings of the inputs' type, and 64 of the float32 that accumulates.
        """
        kinds = [jnp.result_type(x) for x in jax.tree.leaves(self.arguments[size])]
        kinds = [k for k in kinds if jnp.issubdtype(k, jnp.floating)]
        if not kinds:
            raise Skip(f"make returned no floating-point argument at size {size}")
        eps = max(float(jnp.finfo(k).eps) for k in kinds)
        return 4 * eps + 64 * min(eps, 2.0**-23)

    def values(self, function: Callable, arguments: tuple) -> dict[str, np.ndarray]:
        """Outputs by name."""
        return _named(call("the function", jax.jit(function), *arguments), "output")

    def gradients(self, function: Callable, arguments: tuple) -> dict[str, np.ndarray]:
        """Gradients of a random combination of the outputs, by argument."""
        flat, tree = jax.tree.flatten(arguments)
        moving = [i for i, x in enumerate(flat) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]

        def combined(leaves: list) -> jax.Array:
            merged = list(flat)
            for i, leaf in zip(moving, leaves, strict=True):
                merged[i] = leaf
            total = jnp.zeros((), jnp.promote_types(jnp.result_type(leaves[0]), jnp.float32))
            for k, out in enumerate(jax.tree.leaves(function(*jax.tree.unflatten(tree, merged)))):
                signs = np.random.default_rng((self.seed, k)).choice([-1, 1], np.shape(out))
                total += (out.astype(total.dtype) * signs).sum()
            return total

        grads = call("the gradient", jax.jit(jax.grad(combined)), [flat[i] for i in moving])
        keys = jax.tree_util.tree_flatten_with_path(arguments)[0]
        names = [jax.tree_util.keystr(keys[i][0], simple=True, separator="/") for i in moving]
        return {f"argument {n}": _wide(g) for n, g in zip(names, grads, strict=True)}

    def compare(self, quantity: Callable[[Callable, tuple], dict[str, np.ndarray]]) -> Verdict:
        """Kernel and reference at every size; the reference gets float64."""
        errors: dict[int, tuple[float, str]] = {}
        refused = {}
        for size, arguments in self.arguments.items():
            try:
                given = quantity(self.fn, arguments)
            except Skip as reason:
                refused[size] = str(reason)
                continue
            with jax.enable_x64(True):
                wide = jax.tree.map(_as_float64, arguments)
                expected = quantity(self.reference, wide)
            if list(given) != list(expected):
                return verdict(False, f"Size {size}: {list(given)} against {list(expected)}.")
            for name, value in given.items():
                error = _error(value, expected[name])
                if size not in errors or not error <= errors[size][0]:
                    errors[size] = error, name
        wrong = [size for size, (e, _) in errors.items() if not e <= self.tolerance(size)]
        if refused and not wrong:
            size, why = next(iter(refused.items()))
            raise Skip(f"no comparison at sizes {list(refused)} (at {size}: {why})")
        shown = max(errors, key=lambda s: np.nan_to_num(errors[s][0] / self.tolerance(s), nan=1e9))
        error, name = errors[shown]
        return verdict(
            not wrong,
            f"Sizes {', '.join(map(str, errors))}: largest error {error:.2g} of the largest entry "
            f"({name} at size {shown}), tolerance {self.tolerance(shown):.1g}; wrong at "
            f"{', '.join(map(str, wrong)) or 'none'}.",
            wrong_sizes=wrong,
            errors={size: e for size, (e, _) in errors.items()},
        )


def _as_float64(x: Any) -> Any:
    return jnp.asarray(x, jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _named(outputs: Any, kind: str) -> dict[str, np.ndarray]:
    return {f"{kind} {i}": _wide(x) for i, x in enumerate(jax.tree.leaves(outputs))}


def _error(given: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest finite entry; equal infinities agree."""
    if given.shape != expected.shape:
        return float("inf")
    if not given.size:
        raise Skip("an output or a gradient is empty: there is nothing to compare")
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    with np.errstate(invalid="ignore"):
        off = np.where(given == expected, 0.0, np.abs(given - expected))
    return float(off.max(initial=0.0) / (size or 1.0))


@check(
    "gradient.kernel_value",
    remedy="Mask what lies beyond the end of the last block before it enters a sum, a maximum or "
    "a softmax, and loop over all blocks.",
)
def kernel_value(kernel: Kernel) -> Verdict:
    """Outputs equal those of the reference at every size."""
    return kernel.compare(kernel.values)


@check(
    "gradient.kernel_gradient",
    remedy="Mask the last block in the backward pass as in the forward pass, and write all of "
    "every gradient.",
)
def kernel_gradient(kernel: Kernel) -> Verdict:
    """Gradients equal those of the reference at every size."""
    return kernel.compare(kernel.gradients)


CHECKS: tuple[Callable[..., Finding], ...] = (kernel_value, kernel_gradient)


def examine_kernel(
    fn: Callable,
    reference: Callable,
    make: Callable,
    *,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
) -> Report:
    """Compare a kernel and its gradients with a plain reference over many sizes.

    Args:
        fn: the kernel, arrays -> array or pytree of arrays, which JAX compiles and differentiates.
        reference: the same in plain JAX; it gets float64 where `fn` gets a shorter type.
        make: (size, NumPy generator) -> tuple of arguments. The size is the length that the kernel
            cuts into blocks: time, or the vocabulary.
        sizes: around the block sizes of the kernel, one, and beyond the largest block.
        seed: of the generator.

    Raises:
        ValueError: a size is not positive, or what should be a function is none.
    """
    for name, function in {"fn": fn, "reference": reference, "make": make}.items():
        if not callable(function):
            raise ValueError(f"{name} must be a function.")
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise ValueError(f"sizes={sizes!r}: give a list of the lengths to try.")
    for size in sizes:
        whole(size, "sizes", 1)
    return run_all(CHECKS, Kernel(fn, reference, make, tuple(sizes), seed))
