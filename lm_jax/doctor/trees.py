"""Trees of arrays of NumPy, JAX or PyTorch: their leaves by name, copies, noise."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]
MASK_VALUE = 1e4  # numbers of this size stand for an infinity in a mask and are no parameters
LEAF_STD = 0.3  # of randomised parameters up to a width of 32, as the leaks were measured


def is_floating(dtype: Any) -> bool:
    """Whether the dtype is a float of any width, bfloat16 and the like included."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def names_float(dtype: Any) -> bool:
    """Whether this is, or is the name of, a float dtype."""
    try:
        return is_floating(jnp.dtype(dtype))
    except TypeError:
        return False


def as_array(value: Any) -> np.ndarray:
    """A NumPy array of anything that has one inside; bfloat16 of PyTorch becomes that of JAX."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":
        return np.asarray(value.float().numpy().astype(jnp.bfloat16))
    return np.asarray(value.numpy())


def logits_of(out: Any, rows: int, time: int) -> Any:
    """The logits [B, T, V] in what a forward pass returned: alone, flat, or among other things."""
    if hasattr(out, "logits"):
        out = out.logits
    elif isinstance(out, Mapping):
        out = out["logits"] if "logits" in out else tuple(out.values())
    if isinstance(out, tuple | list):
        arrays = [x for x in out if hasattr(x, "ndim")]
        found = [x for x in arrays if x.ndim == 3]
        found += [x for x in arrays if x.ndim == 2 and len(x) == rows * time]
        out = found[0] if found else out
    flat = getattr(out, "ndim", 0) == 2 and len(out) == rows * time
    return out.reshape(rows, time, -1) if flat else out


def is_float_leaf(leaf: Any) -> bool:
    """Whether a leaf is an array of floats, of NumPy, JAX or PyTorch."""
    if hasattr(leaf, "is_floating_point"):
        return bool(leaf.is_floating_point())
    return hasattr(leaf, "dtype") and names_float(leaf.dtype)


def path_name(path: Any) -> str:
    """A leaf's path as `a/b/0/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "the array"


def named(tree: Any) -> Arrays:
    """Copies of all leaves on the host by their path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {path_name(path): np.array(as_array(leaf)) for path, leaf in leaves}


def float_leaves(tree: Any) -> Arrays:
    """Floating-point leaves by path, not copied; leaves that are one object come once."""
    first: dict[int, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if is_float_leaf(leaf):
            first.setdefault(id(leaf), (path, leaf))
    return {path_name(path): as_array(leaf) for path, leaf in first.values()}


def shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shape of every array."""
    return {name: x.shape for name, x in arrays.items()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal bit by bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """All arrays in one float64 vector."""
    vectors = [np.asarray(x, np.float64).ravel() for x in arrays.values()]
    return np.concatenate([np.zeros(0), *vectors])


def nonfinite(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the arrays that hold a NaN or an infinity."""
    return [n for n, x in arrays.items() if not np.isfinite(x.astype(np.float64)).all()]


def norm(arrays: Iterable[np.ndarray]) -> float:
    """Root of the sum of all squares, in float64."""
    return float(np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in arrays)))


def rms(values: Any) -> float:
    """Root of the mean square, in float64."""
    return float(np.sqrt(np.square(as_array(values).astype(np.float64)).mean()))


def copies(tree: Any) -> Any:
    """Fresh leaves of the same kind: what is handed over may be overwritten or donated."""

    def copy(leaf: Any) -> Any:
        if hasattr(leaf, "detach"):
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        if isinstance(leaf, jax.Array):
            return jnp.array(leaf)
        return np.array(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf

    return jax.tree.map(copy, tree)


def like(leaf: Any, values: np.ndarray) -> Any:
    """`values` in the dtype and the kind of array of `leaf`."""
    if hasattr(leaf, "detach"):
        made = leaf.detach().new_tensor(np.asarray(values, np.float64))
        return made.requires_grad_(leaf.requires_grad)
    if isinstance(leaf, jax.Array):
        return jnp.asarray(values, leaf.dtype)
    return np.asarray(values).astype(leaf.dtype)


def is_mask(leaf: Any) -> bool:
    """Whether an array is a mask: triangular, of just two values, or with as good as infinities."""
    values: np.ndarray = np.asarray(as_array(leaf), np.float64)
    low, high = np.min(values, initial=np.inf), np.max(values, initial=-np.inf)
    if values.ndim > 1 and low < high:
        square = values.shape[-1] == values.shape[-2]
        if ((values == low) | (values == high)).all() or (square and not np.triu(values, 1).any()):
            return True
    return bool(np.maximum(-low, high) >= MASK_VALUE)


def _moved(params: Any, move: Callable[[np.ndarray], np.ndarray]) -> Any:
    """`move` of every floating-point leaf but masks, in which noise would itself be a leak."""

    def moved(leaf: Any) -> Any:
        if not is_float_leaf(leaf) or is_mask(leaf):
            return leaf
        return like(leaf, move(as_array(leaf).astype(np.float64)))

    return jax.tree.map(moved, params)


def randomise(params: Any, seed: int) -> Any:
    """Noise N(0, 0.3^2) in place of every parameter, so that no zero hides anything.

    For matrices wider than 32 it is less by the root of the width: activations keep their size.
    """
    rng = np.random.default_rng((seed, 1))

    def noise(values: np.ndarray) -> np.ndarray:
        width = sorted(values.shape)[-2] if values.ndim > 1 else 1
        std = LEAF_STD * min(1.0, (32 / max(width, 1)) ** 0.5)
        return std * rng.standard_normal(values.shape)

    return _moved(params, noise)


def nudge(params: Any, size: float, seed: int) -> Any:
    """Every element of every parameter moved by the relative `size`, up or down."""
    rng = np.random.default_rng((seed, 2))
    return _moved(params, lambda x: x * (1 + size * rng.choice([-1.0, 1.0], x.shape)))
