"""The device mesh and who holds what: rows of a batch, parts of the parameters."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm_jax import collectives
from lm_jax.collectives import DATA, FSDP, PARTS, ROWS, TENSOR
from lm_jax.config import Config, ConfigError, MeshConfig

_TABLES = ("embedding", "position_embedding", "projection")


def make_mesh(cfg: MeshConfig) -> Mesh:
    """All devices as [data, fsdp, tensor].

    Raises:
        ConfigError: if `fsdp` times `tensor` does not divide the number of devices.
    """
    count, part = jax.device_count(), cfg.fsdp * cfg.tensor
    if count % part:
        alone = cfg.tensor == 1
        what = f"fsdp: {part}" if alone else f"tensor: {cfg.tensor} times fsdp={cfg.fsdp}"
        raise ConfigError(
            f"config.mesh.{what} does not divide the {count} devices; choose a divisor."
        )
    return _mesh(count // part, cfg.fsdp, cfg.tensor)


def mesh_that_fits(cfg: MeshConfig) -> Mesh:
    """As `make_mesh`, with smaller axes where a run is opened on fewer devices than trained it."""
    count = jax.device_count()
    tensor = math.gcd(count, cfg.tensor)
    fsdp = math.gcd(count // tensor, cfg.fsdp)
    return _mesh(count // tensor // fsdp, fsdp, tensor)


def _mesh(*sizes: int) -> Mesh:
    return jax.make_mesh(sizes, (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3)


def places(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every array of a state or of parameters, by name and shape.

    Matrices (`kernel`) are split by rows, tables by columns, so that neither the vocabulary nor the
    heads need be divisible. All else, and what cannot be cut evenly, is on every device. Optimiser
    moments have the names of their parameters and lie beside them.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(mesh, tree))


def _spec(mesh: Any, path: Any, shape: tuple[int, ...]) -> PartitionSpec:
    parts = math.prod(mesh.shape.get(axis, 1) for axis in PARTS)
    *_, name = names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path] or [""]
    # The first axis of what is in blocks is that of the layers.
    matrix = len(shape) - ("blocks" in names) == 2
    axis = len(shape) - (2 if name == "kernel" else 1)
    if parts == 1 or not matrix or name not in ("kernel", *_TABLES) or shape[axis] % parts:
        return PartitionSpec()
    return PartitionSpec(*[None] * axis, PARTS)


def over_rows(
    function: Callable[..., Any],
    *,
    rows: Sequence[int],
    results: Sequence[int | str],
    mesh: Mesh | None = None,
) -> Callable[..., Any]:
    """A function that each device of a mesh computes for its rows of a batch.

    Nothing of it is left to the partitioner, which would gather the rows of all devices where that
    is cheaper for one product. On one device, and without a mesh, it is the function itself.

    Args:
        function: of trees of arrays; `lm_jax.models` gather the parameters where they use them.
        rows: which of its arguments have rows first; the others are laid out as `places` says.
        results: of each of its results what it is: "sum", over rows; "rows", one of each; or the
            number of the argument of which it is the gradient, summed over rows.
        mesh: if None, the one that is set when the function is called.
    """

    def mapped(*args: Any) -> Any:
        where = mesh or jax.sharding.get_abstract_mesh()
        if where.size <= 1:
            return function(*args)
        by_row, whole = PartitionSpec(ROWS), PartitionSpec()
        specs = [_specs(where, arg) if i not in rows else by_row for i, arg in enumerate(args)]
        kinds = {"sum": whole, "rows": by_row}
        out = tuple(kinds[kind] if isinstance(kind, str) else specs[kind] for kind in results)

        def on_device(*args: Any) -> tuple[Any, ...]:
            found = function(*args)
            return tuple(
                one if kind == "rows" else _summed(one, spec)
                for one, kind, spec in zip(found, results, out, strict=True)
            )

        return jax.shard_map(
            on_device, mesh=where, in_specs=tuple(specs), out_specs=out, check_vma=False
        )(*args)

    return mapped


def _specs(mesh: Any, tree: Any) -> Any:
    return jax.tree.map_with_path(lambda path, x: _spec(mesh, path, x.shape), tree)


def _summed(tree: Any, specs: Any) -> Any:
    """Sums over the devices that share rows; what they hold in parts is summed over `fsdp`."""

    def total(x: Any, spec: PartitionSpec) -> Any:
        return collectives.total(x, (DATA,) if PARTS in spec else ROWS)

    if isinstance(specs, PartitionSpec):
        return collectives.total(tree)
    return jax.tree.map(total, tree, specs)


def row_shares(mesh: Mesh | None = None) -> int:
    """Devices of a mesh, or of that which is set, that share the rows of a batch; 1 without one."""
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    return math.prod(shape.get(axis, 1) for axis in ROWS)


def share_of_rows(mesh: Mesh) -> dict[str, int]:
    """What this process reads of every batch, for `train_batches` and `eval_batches`.

    Processes whose devices compute the same rows, along the axis `tensor`, read the same share.

    Raises:
        ConfigError: in all processes, if some share rows with others that have rows of their own.
    """
    shares = row_shares(mesh)
    by_share = mesh.devices.reshape(shares, -1)
    by_process: dict[int, list[int]] = {}
    for i, devices in enumerate(by_share):
        for process in {d.process_index for d in devices.flat}:
            by_process.setdefault(process, []).append(i)
    mine = by_process[jax.process_index()]
    size = len(mine)
    for first, *more in by_process.values():
        if first % size or [first, *more] != [*range(first, first + size)]:
            raise ConfigError(
                f"config.mesh.tensor: {by_share.shape[1]} devices that compute the same rows do "
                "not fit the devices of a process; choose a divisor or a multiple of their number."
            )
    return {"process_index": mine[0] // size, "process_count": shares // size}


def put_batch(mesh: Mesh, batch: Any, axis: int) -> Any:
    """Host arrays to the devices; `axis` holds the rows and this process has its share of them."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def round_up(rows: int, mesh: Mesh | None = None) -> int:
    """The next number of rows that the devices of `row_shares` can share."""
    return math.ceil(rows / row_shares(mesh)) * row_shares(mesh)


def accumulation(cfg: Config) -> int:
    """Number of micro-batches: the fewest equal ones of at most `data.micro_batch` rows a device.

    The rows are shared by the devices of the mesh that is set; without one there is one device.

    Raises:
        ConfigError: if the devices cannot share the rows of an update, or if equal micro-batches
            would have less than half the size that was asked for.
    """
    devices = row_shares()
    rows, left = divmod(cfg.data.batch_size, devices)
    if left:
        tensor = f" (config.mesh.tensor={cfg.mesh.tensor} of each)" if cfg.mesh.tensor > 1 else ""
        raise ConfigError(
            f"config.data.batch_size: {cfg.data.batch_size} sequences cannot be shared by "
            f"{devices} devices{tensor}; choose a multiple."
        )
    most = min(rows, cfg.data.micro_batch or rows)
    number = next(n for n in range(math.ceil(rows / most), rows + 1) if rows % n == 0)
    if 2 * rows < most * number:
        raise ConfigError(
            f"config.data.micro_batch: the {rows} sequences of a device cannot be cut into equal "
            f"parts of {most} or a few less; choose a divisor of {rows}."
        )
    return number
