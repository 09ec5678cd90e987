"""Times of attention that were measured: they decide between cudnn and pallas."""

from typing import Any, NamedTuple

import jax.numpy as jnp


class Times(NamedTuple):
    """Milliseconds of forward and backward pass in one shape, both measured in turns."""

    device_kind: str  # as JAX names it
    dtype: str
    head_dim: int  # C
    seq_len: int  # T
    segments: bool  # whether rows hold several documents
    cudnn: float
    pallas: float


ATTENTION: tuple[Times, ...] = ()  # none yet


def find(device_kind: str, dtype: Any, head_dim: int, seq_len: int, segments: bool) -> Times | None:
    """The times in this shape on this kind of device; None where none were measured."""
    shape = (device_kind, jnp.dtype(dtype).name, head_dim, seq_len, segments)
    return next((times for times in ATTENTION if times[:5] == shape), None)
