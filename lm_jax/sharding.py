"""The device mesh and who holds what: batches by row, parameters whole or split by fsdp."""

import math
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm_jax.config import Config, ConfigError


def make_mesh(fsdp: int) -> Mesh:
    """All devices as [data, fsdp].

    Args:
        fsdp: devices that share one copy of the parameters.

    Raises:
        ConfigError: if `fsdp` does not divide the number of devices.
    """
    count = jax.device_count()
    if count % fsdp:
        raise ConfigError(
            f"config.mesh.fsdp: {fsdp} does not divide the {count} devices; choose a divisor."
        )
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count // fsdp, fsdp), ("data", "fsdp"), axis_types=auto)


def by_shape(mesh: Mesh, tree: Any) -> Any:
    """A sharding for every array: its longest axis that fsdp divides is split, if there is one.

    Optimiser moments have the shapes of their parameters and so end up beside them.
    """
    size = mesh.shape["fsdp"]

    def rule(x: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(x.shape)
        axes = [i for i, n in enumerate(x.shape) if n % size == 0 and n >= size]
        if size > 1 and axes:
            spec[max(axes, key=lambda i: x.shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(rule, tree)


def put_batch(mesh: Mesh, batch: Any, axis: int) -> Any:
    """Host arrays to the devices; `axis` holds the rows and this process has its share of them."""
    spec = PartitionSpec(*[None] * axis, ("data", "fsdp"))
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def round_up(rows: int) -> int:
    """The next number of rows that all devices can share."""
    return math.ceil(rows / jax.device_count()) * jax.device_count()


def accumulation(cfg: Config) -> int:
    """Number of micro-batches: the fewest equal ones of at most `data.micro_batch` rows a device.

    The rows are shared by the devices of the mesh that is set; without one there is one device.

    Raises:
        ConfigError: if the devices cannot share the rows of an update, or if equal micro-batches
            would have less than half the size that was asked for.
    """
    devices = jax.sharding.get_abstract_mesh().size or 1
    rows, left = divmod(cfg.data.batch_size, devices)
    if left:
        raise ConfigError(
            f"config.data.batch_size: {cfg.data.batch_size} sequences cannot be shared by "
            f"{devices} devices; choose a multiple."
        )
    most = min(rows, cfg.data.micro_batch or rows)
    number = next(n for n in range(math.ceil(rows / most), rows + 1) if rows % n == 0)
    if 2 * rows < most * number:
        raise ConfigError(
            f"config.data.micro_batch: the {rows} sequences of a device cannot be cut into equal "
            f"parts of {most} or a few less; choose a divisor of {rows}."
        )
    return number


def initialize() -> None:
    """Join the other processes where a cluster started several; a lone process does nothing.

    Slurm and Open MPI are recognised by jax.distributed; elsewhere set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if jax.distributed.is_initialized() or not _several_processes():
        return
    if "JAX_NUM_PROCESSES" in os.environ:  # of the three, jax itself reads the address alone
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
    else:
        jax.distributed.initialize()


def _several_processes() -> bool:
    names = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return any(int(os.environ.get(name, "1")) > 1 for name in names)
