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


# `python scripts/bench_attention.py --device=gpu`, scripts/results/gpu_h200.jsonl; with documents,
# four of random lengths a row.
ATTENTION: tuple[Times, ...] = (
    Times("NVIDIA H200", "bfloat16", 64, 512, False, cudnn=0.217, pallas=0.243),
    Times("NVIDIA H200", "bfloat16", 64, 512, True, cudnn=0.296, pallas=0.220),
    Times("NVIDIA H200", "bfloat16", 64, 1024, False, cudnn=1.042, pallas=0.952),
    Times("NVIDIA H200", "bfloat16", 64, 1024, True, cudnn=1.448, pallas=0.910),
    Times("NVIDIA H200", "bfloat16", 64, 2048, False, cudnn=1.975, pallas=1.813),
    Times("NVIDIA H200", "bfloat16", 64, 4096, False, cudnn=3.073, pallas=2.952),
    Times("NVIDIA H200", "bfloat16", 128, 1024, False, cudnn=1.072, pallas=1.085),
    Times("NVIDIA H200", "bfloat16", 128, 4096, False, cudnn=2.417, pallas=2.638),
)


def times_of(
    device_kind: str, dtype: Any, head_dim: int, seq_len: int, segments: bool
) -> Times | None:
    """The times in this shape on this kind of device; None where none were measured."""
    shape = (device_kind, jnp.dtype(dtype).name, head_dim, seq_len, segments)
    return next((times for times in ATTENTION if times[:5] == shape), None)
