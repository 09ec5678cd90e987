"""What a run needs of the memory of a device, and what to lower where it is too much.

What a run needs at least, known before anything is compiled: its state, the gradients, the batches
of a call and the states between layers. The other activations are not estimated.
"""

import contextlib
import math
import pathlib
import resource
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm_jax import sharding
from lm_jax.config import Config, ConfigError
from lm_jax.config.section import get
from lm_jax.models.families import family

_BATCH = 12  # bytes of a token in a batch: its id, its document, its weight
_WORDS = {
    "state": "for parameters, gradients and optimiser",
    "batches": "for the batches of a call",
    "between": "for the states between layers",
}


class Need(NamedTuple):
    """Bytes of one device, each a lower bound."""

    state: int  # parameters, their gradients, the optimiser, averages
    batches: int  # of one call
    between: int  # the states between the layers, of a micro-batch, or of an evaluation


def device_bytes() -> int | None:
    """What a device of this process can hold; of a CPU its part of what the host has left."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    host = host_bytes()
    return host and host // jax.local_device_count()


def host_bytes() -> int | None:
    """Memory and swap that are free on this machine or in this container; None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, LookupError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        found.append(free["MemAvailable"] + free["SwapFree"])
    # Of a container all: what is used there may be copies of files, which give way.
    with contextlib.suppress(OSError, ValueError):
        found.append(int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(limit)
    return min(found, default=None)


def need(cfg: Config, mesh: Mesh, state: Any) -> Need:
    """What a run needs of each device at least.

    Args:
        cfg: resolved.
        mesh: the devices.
        state: the shapes of a `TrainState`.
    """

    def held(tree: Any) -> int:
        places = sharding.places(mesh, tree)
        shapes = jax.tree.map(lambda x, place: place.shard_shape(x.shape), tree, places)
        sizes = jax.tree.map(lambda x, shape: math.prod(shape) * x.dtype.itemsize, tree, shapes)
        return sum(jax.tree.leaves(sizes))

    H, _, C = family(cfg.model).heads(cfg.model)
    row = cfg.data.seq_len * min(cfg.model.d_model, H * C)
    row *= jnp.dtype(cfg.train.compute_dtype).itemsize
    call = min(cfg.train.steps_per_call, int(cfg.train.steps)) * cfg.data.batch_size
    shares = sharding.row_shares(mesh)
    batches = call // shares * (cfg.data.seq_len + 1) * _BATCH
    scored = cfg.eval.batch_size // shares
    between = max(_rows(cfg, mesh) * cfg.model.layers, scored) * row
    return Need(held(state) + held(state.trained), batches, between)


def _rows(cfg: Config, mesh: Mesh) -> int:
    """Rows of a micro-batch on a device."""
    with jax.set_mesh(mesh):
        return cfg.data.batch_size // sharding.row_shares() // sharding.accumulation(cfg)


def require_memory(cfg: Config, mesh: Mesh, state: Any) -> None:
    """Refuse a run that no device of this kind can hold.

    Args:
        cfg: resolved.
        mesh: the devices.
        state: the shapes of a `TrainState`.

    Raises:
        ConfigError: naming the field to lower first, and how far.
    """
    there, needed = device_bytes(), need(cfg, mesh, state)
    total, largest = sum(needed), max(needed)
    if there is None or total <= there:
        return
    share = min(0.9, max(there / 2, there - total + largest) / largest)
    model, name = cfg.model, needed._fields[needed.index(largest)]
    if name == "state":
        path = "model.layers"
        if model.layers * share < 1 and model.reads("d_model"):
            path, share = "model.d_model", math.sqrt(share)  # matrices grow with its square
    elif name == "batches":
        path = "train.steps_per_call" if cfg.train.steps_per_call > 1 else "data.batch_size"
    else:
        scored = cfg.eval.batch_size // sharding.row_shares(mesh) > _rows(cfg, mesh) * model.layers
        path = _first(cfg, mesh, scoring=scored)
    value, lower = _lower(cfg, mesh, path, share)
    parts = ", ".join(f"{part / 1e9:,.1f} {_WORDS[k]}" for k, part in needed._asdict().items())
    sharing = (
        " or raise config.mesh.fsdp"
        if name == "state" and cfg.mesh.fsdp * cfg.mesh.tensor < mesh.size
        else ""
    )
    raise ConfigError(
        f"config.{path}: {value:,} makes a run of at least {total / 1e9:,.1f} GB a device "
        f"({parts}), and {there / 1e9:,.1f} GB are there; lower it to about {lower:,}{sharing}."
    )


def _first(cfg: Config, mesh: Mesh, *, scoring: bool) -> str:
    """The field that costs least to lower."""
    if scoring:
        return "eval.batch_size" if cfg.eval.batch_size > 1 else "data.seq_len"
    return "data.micro_batch" if _rows(cfg, mesh) > 1 else "data.seq_len"


def _lower(cfg: Config, mesh: Mesh, path: str, share: float) -> tuple[int, int]:
    """What a field has, and a share of that; of a micro-batch a divisor, for parts are equal."""
    if path == "data.micro_batch":
        rows = _rows(cfg, mesh)
        most = max(1, int(rows * share))
        return rows, next(n for n in range(most, 0, -1) if rows % n == 0)
    return get(cfg, path), max(1, int(get(cfg, path) * share))


@contextlib.contextmanager
def exhausted(cfg: Config, mesh: Mesh, *, scoring: bool = False) -> Iterator[None]:
    """Say of a run whose memory is used up inside what to lower first, and how far.

    Args:
        cfg: resolved.
        mesh: the devices.
        scoring: whether it is evaluated inside, not trained.

    Raises:
        RuntimeError: in the place of what JAX raises.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        path = _first(cfg, mesh, scoring=scoring)
        remedy = "lower config.{} from {:,} to {:,}".format(path, *_lower(cfg, mesh, path, 0.5))
        if path == "data.seq_len" and not cfg.model.remat and not scoring:
            remedy = "set config.model.remat=True"
        raise RuntimeError(
            f"The memory of the device is used up {'in evaluation' if scoring else 'in training'}: "
            f"{remedy}; --debug shows where."
        ) from error
