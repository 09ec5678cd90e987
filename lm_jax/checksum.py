"""What tells a state that changed: a number for every leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.optim import path_name

_ON_HOST = 1 << 20  # elements of a leaf up to which a compilation costs more than it saves


def checksums(tree: Any) -> dict[str, int]:
    """A number for every leaf by name, the same however the leaf is split over devices.

    A leaf with one other element, in one bit or all of them, has another number.
    """
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        here = not isinstance(leaf, jax.Array) or jax.default_backend() == "cpu"
        small = leaf.size <= _ON_HOST and here and jax.process_count() == 1
        found[path_name(path)] = _checksum(np.asarray(leaf)) if small else _compiled_checksum(leaf)
    return {name: int(value) for name, value in found.items()}


def _checksum(leaf: Any) -> Any:
    """The sum of MurmurHash3's finaliser, a bijection, over bits and place; for either NumPy."""
    bits = leaf.reshape(leaf.shape or (1,))
    bits = bits.view(f"uint{8 * min(bits.dtype.itemsize, 4)}").astype(np.uint32)
    stride = 1
    for axis, size in reversed(list(enumerate(bits.shape))):
        where = (np if isinstance(bits, np.ndarray) else jnp).arange(size, dtype=np.uint32)
        place = where * np.uint32(stride * 0x9E3779B1 % 2**32)
        bits = bits + place.reshape([-1 if i == axis else 1 for i in range(bits.ndim)])
        stride *= size
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits.sum(dtype=np.uint32)


_compiled_checksum = jax.jit(_checksum)
