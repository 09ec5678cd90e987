"""Checkpoints: state, position in the data and manifest of one instant, written together."""

import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from lm_jax.config import ConfigError
from lm_jax.rundir import BEST, CHECKPOINTS, updates

Manifest = dict[str, Any]


class Checkpoints:
    """The newest checkpoints and, apart from them, the best one.

    Saving is asynchronous and atomic: a step that was not finished is ignored and cleaned up, so
    a kill at any moment loses no more than the updates since the last finished checkpoint.
    """

    def __init__(self, workdir: pathlib.Path, keep: int):
        """Open or create `workdir/checkpoints` and `workdir/best`.

        Args:
            workdir: folder of the run, which no other process trains.
            keep: newest checkpoints kept; 0: all.
        """

        def manager(name: str, keep: int) -> ocp.CheckpointManager:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep or None, cleanup_tmp_directories=True
            )
            path = (workdir / name).absolute()
            return ocp.CheckpointManager(path, item_names=("state", "manifest"), options=options)

        self._newest = manager(CHECKPOINTS, keep)
        self._best = manager(BEST, 1)

    def save(self, state: Any, manifest: Manifest, *, best: bool = False) -> None:
        """Start saving `state`; `manifest["position"]` is the next batch's number and the name.

        Raises:
            RuntimeError: if a later checkpoint is there, which this one cannot replace, or if the
                folder is gone.
        """
        manager, position = (self._best if best else self._newest), manifest["position"]
        if not manager.directory.exists():
            raise RuntimeError(
                f"{manager.directory}: was removed while the run went on, and with it the run."
            )
        # A finished newest checkpoint may name the best one, so that must be finished before; and
        # of several processes, orbax's barriers are one for both folders.
        self.wait()
        if best:  # after a kill, one of an update that was made anew may be there
            self.clear_best(position)
        # The manifest changes while it is being written.
        saved = manager.save(
            position,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), manifest=ocp.args.JsonSave(dict(manifest))
            ),
        )
        if not saved:
            raise RuntimeError(
                f"{manager.directory}: update {position} could not be saved beside that of update "
                f"{manager.latest_step()}; give another --workdir."
            )

    def clear_best(self, position: int = 0) -> None:
        """Remove the best checkpoint if it is of update `position` or later."""
        for later in [step for step in self._best.all_steps() if step >= position]:
            self._best.delete(later)

    def position(self, *, best: bool = False) -> int | None:
        """Number of updates in the newest (or best) finished checkpoint; None if there is none."""
        return (self._best if best else self._newest).latest_step()

    def manifest(self, *, best: bool = False) -> Manifest:
        """The manifest saved with the newest (or best) checkpoint."""
        manager = self._best if best else self._newest
        args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
        return manager.restore(manager.latest_step(), args=args).manifest

    def restore(self, abstract: Any, *, best: bool = False) -> Any:
        """The newest (or best) state, with the shapes, dtypes and shardings of `abstract`."""
        manager = self._best if best else self._newest
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return manager.restore(manager.latest_step(), args=args).state

    def wait(self) -> None:
        """Wait until running saves are finished."""
        for manager in (self._newest, self._best):
            manager.wait_until_finished()

    def close(self) -> None:
        """Wait for running saves and release the folders."""
        self.wait()
        for manager in (self._newest, self._best):
            manager.close()


@dataclasses.dataclass(frozen=True)
class Kept:
    """One finished checkpoint of a run, read where it lies; the run may go on meanwhile."""

    path: pathlib.Path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of the state, by name."""
        with self._reader() as reader:
            return leaf_shapes(reader.metadata(self.path).item_metadata["state"].tree)

    def manifest(self) -> Manifest:
        """The manifest saved with it."""
        with self._reader() as reader:
            args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
            found: Manifest = reader.restore(self.path, args=args)["manifest"]
            return found

    def restore(self, abstract: dict[str, Any]) -> Any:
        """The named fields of the state, with the shapes, dtypes and shardings of `abstract`."""
        with self._reader() as reader:
            how = ocp.checkpoint_utils.construct_restore_args(abstract)
            part = ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=True)
            args = ocp.args.Composite(state=part)
            return reader.restore(self.path, args=args)["state"]

    def _reader(self) -> ocp.Checkpointer:
        items = dict(state=ocp.PyTreeCheckpointHandler(), manifest=ocp.JsonCheckpointHandler())
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items))


def find_kept(workdir: pathlib.Path) -> dict[int, Kept]:
    """The checkpoints in a folder, the best among them, by update."""
    folders = [(workdir / name).absolute() for name in (BEST, CHECKPOINTS)]
    return {update: Kept(folder / str(update)) for folder in folders for update in updates(folder)}


def leaf_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf by name."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


def refuse_older(config_json: pathlib.Path, record: dict[str, Any]) -> None:
    """Refuse a run whose checkpoints have another layout than those of this version.

    Version 0.1 kept the parameters layer by layer, this one keeps all layers in one array.

    Raises:
        ConfigError: naming the version that can go on.
    """
    version = record.get("versions", {}).get("lm_jax", "")
    if version.startswith("0.1."):
        raise ConfigError(
            f"{config_json}: the run was made by lm_jax {version}, whose checkpoints this version "
            "does not read; go on with that one, or train anew in another --workdir."
        )


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a state, for `restore`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
