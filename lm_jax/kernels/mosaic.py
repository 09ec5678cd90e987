"""Where Pallas Mosaic GPU runs."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from lm_jax.kernels import device as devices

_OLDEST_JAX = (0, 11, 2)
_WIDEST_HEAD = 128
_INTERPRETER_THREADS = 8


def unavailable(dtype: Any, head_dim: int, *, interpret: bool = False) -> str | None:
    """Why the Mosaic GPU kernels cannot run on `device.target()`, or None when they can.

    Args:
        dtype: of queries, keys and values.
        head_dim: C.
        interpret: whether the kernels are to be interpreted on the CPU instead of compiled.
    """
    if jax.__version_info__ < _OLDEST_JAX:
        oldest = ".".join(map(str, _OLDEST_JAX))
        return f"jax {jax.__version__} is older than {oldest} (which needs Python 3.12)"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"dtype {jnp.dtype(dtype)} is neither bfloat16 nor float16"
    if head_dim % 8 or not 8 <= head_dim <= _WIDEST_HEAD:
        return f"head width {head_dim} is not a multiple of 8 up to {_WIDEST_HEAD}"
    if interpret:
        # The interpreter's warpgroups wait for each other in the threads of XLA.
        threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
        if threads >= _INTERPRETER_THREADS:
            return None
        return (
            f"the interpreter deadlocks with {threads} threads; set NPROC={_INTERPRETER_THREADS} "
            "in the environment before JAX starts"
        )
    device = devices.target()
    if device.platform != "gpu":
        return f"the device is a {device.platform}, not a Hopper GPU"
    if devices.compute_capability(device) != (9, 0):  # no WGMMA, no TMA
        return f"{device.device_kind} is not a Hopper GPU (compute capability 9.0)"
    return None
