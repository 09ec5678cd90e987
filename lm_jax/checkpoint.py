"""Checkpoints: state, position in the data and manifest of one instant, written together."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from lm_jax import console
from lm_jax.checksum import checksums
from lm_jax.data.files import hash_json
from lm_jax.files import copy_folder
from lm_jax.optim import path_name
from lm_jax.orbax_errors import disk_error, hush_orbax
from lm_jax.rundir import BEST, CHECKPOINTS, updates

Manifest = dict[str, Any]
T = TypeVar("T")
# What the manifest of a checkpoint holds for itself: checksums of its leaves, a hash of the rest.
_CHECKSUMS, _SEAL = "checksums", "seal"
_SHOWN = 160  # characters of an error of orbax
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class Damaged(ValueError):
    """A checkpoint that cannot be read, or whose contents are not what was saved."""

    def __init__(self, told: str):
        """Note which, and what is wrong with it."""
        self.told = told
        super().__init__(
            f"{told}; restore it, move it away if an older one is there, or name another one or "
            "another --workdir."
        )


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

        self._workdir = workdir
        self._newest = manager(CHECKPOINTS, keep)
        self._best = manager(BEST, 1)
        aside = any(self._newest.directory.glob("*.damaged*"))
        if aside and self.position() is None and jax.process_count() == 1:
            for best in kept_in(workdir, BEST):  # a kill came before its copy was in place
                self._set_aside([], instead=best)

    def save(self, state: Any, manifest: Manifest, *, best: bool = False) -> None:
        """Start saving `state`; `manifest["position"]` is the next batch's number and the name.

        Raises:
            RuntimeError: if a later checkpoint is there, which this one cannot replace, or if the
                folder is gone.
            OSError: if the disk takes no more; also of the save before, which went on until now.
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
        # A copy, for the loop changes its own while this one is being written.
        sealed = json.loads(json.dumps(manifest | {_CHECKSUMS: checksums(state)}))
        sealed[_SEAL] = hash_json(sealed)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), manifest=ocp.args.JsonSave(sealed)
        )
        with self._writing():
            saved = manager.save(position, args=args)
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

    def restore(self, read: Callable[["Kept"], T]) -> T:
        """What `read` finds in the newest good checkpoint, be it the best one if all else fails.

        Damaged ones that are newer are named, and get another name, so that they are in nobody's
        way and nothing is lost.

        Raises:
            Damaged: if there is no good one.
        """
        newest, best = kept_in(self._workdir, CHECKPOINTS), kept_in(self._workdir, BEST)
        if jax.process_count() > 1:  # which would have to agree: they read in step
            newest, best = newest[:1], []
        good, found = first_good([*newest, *best], read)
        if good in best:
            self._set_aside(newest, instead=good)
        else:
            self._set_aside(newest[: newest.index(good)])
        return found

    def best(self) -> Manifest:
        """The manifest of the best checkpoint; empty if there is none, or none that is good."""
        for one in kept_in(self._workdir, BEST):
            try:
                return one.manifest()
            except Damaged as error:
                console.say(f"{error.told}; the next evaluation gives another one")
                if jax.process_count() == 1:
                    self._set_aside([one])
        return {}

    def _set_aside(self, damaged: Sequence["Kept"], instead: "Kept | None" = None) -> None:
        """Rename checkpoints, copy another to the newest ones, and look again at what is there.

        The copy is in its place before others leave theirs: without any newest checkpoint the
        folder would be one of a new run.
        """
        target = None
        if instead is not None:
            target = self._newest.directory / instead.path.name
            half = target.with_name(f"{target.name}.orbax-checkpoint-tmp")
            copy_folder(instead.path, half)
            for one in damaged:
                if one.path == target:
                    _rename(one)
            os.replace(half, target)
        for one in damaged:
            if one.path != target:
                _rename(one)
        for manager in (self._newest, self._best):
            manager.reload()

    def wait(self) -> None:
        """Wait until running saves are finished."""
        for manager in (self._newest, self._best):
            with self._writing():
                manager.wait_until_finished()

    def close(self) -> None:
        """Wait for running saves and release the folders."""
        self.wait()
        for manager in (self._newest, self._best):
            manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Give an error of the disk, for which tensorstore has a ValueError, its own kind."""
        hush_orbax()
        try:
            yield
        except ValueError as error:
            if (code := disk_error(error)) is None:
                raise
            raise OSError(code, os.strerror(code), str(self._workdir)) from error


@dataclasses.dataclass(frozen=True)
class Kept:
    """One finished checkpoint of a run, read where it lies; the run may go on meanwhile."""

    path: pathlib.Path

    @property
    def update(self) -> int:
        """Updates that it has behind it."""
        return int(self.path.name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of the state, by name."""
        with self._reading() as reader:
            return leaf_shapes(self._tree(reader))

    def manifest(self) -> Manifest:
        """The manifest saved with it.

        Raises:
            Damaged: if it cannot be read, or is not what was saved; also in the methods below.
        """
        return {name: value for name, value in self._sealed().items() if name != _CHECKSUMS}

    def restore(self, abstract: dict[str, Any]) -> Any:
        """The named fields of the state, with the shapes, dtypes and shardings of `abstract`."""
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self._read(lambda reader: (abstract, how))

    def verify(self, *names: str) -> None:
        """Read the named fields of the state, or all of it, into the memory of the host."""

        def parts(reader: ocp.Checkpointer) -> tuple[Any, Any]:
            tree = self._tree(reader)
            tree = {name: tree[name] for name in names or tree}
            how = ocp.RestoreArgs(restore_type=np.ndarray)
            return tree, jax.tree.map(lambda _: how, tree)

        self._read(parts)

    def _read(self, parts: Callable[[ocp.Checkpointer], tuple[Any, Any]]) -> Any:
        known = self._sealed().get(_CHECKSUMS)
        with self._reading() as reader:
            # With a damaged index, threads of orbax would outlive their loop and say so.
            index = {"driver": "ocdbt", "base": f"{(self.path / 'state').as_uri()}/"}
            tensorstore.KvStore.open(index).result().list().result()
            tree, how = parts(reader)
            part = ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=True)
            found = reader.restore(self.path, args=ocp.args.Composite(state=part))["state"]
            if known is not None:  # checkpoints of version 0.3 have none
                for name, checksum in checksums(found).items():
                    if checksum != known.get(name):
                        raise self._damaged(f"{name} is not what was saved")
            return found

    def _sealed(self) -> Manifest:
        with self._reading() as reader:
            args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
            found: Manifest = reader.restore(self.path, args=args)["manifest"]
            known = found.pop(_SEAL, None)
        if (known or _CHECKSUMS in found) and known != hash_json(found):
            raise self._damaged("its manifest is not what was saved")
        return found

    def _goes(self, error: Exception) -> bool:
        """Whether it is being removed, which orbax does file by file."""
        missing = isinstance(error, FileNotFoundError) or re.search("(?i)not.found", str(error))
        for _ in range(10 if missing else 0):
            if not self.path.exists():
                break
            time.sleep(0.1)
        return not self.path.exists()

    def _damaged(self, why: str) -> Damaged:
        return Damaged(f"{self.path}: damaged ({why})")

    def _tree(self, reader: ocp.Checkpointer) -> Any:
        return reader.metadata(self.path).item_metadata["state"].tree

    @contextlib.contextmanager
    def _reading(self) -> Iterator[ocp.Checkpointer]:
        hush_orbax()
        items = dict(state=ocp.PyTreeCheckpointHandler(), manifest=ocp.JsonCheckpointHandler())
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items)) as reader:
                yield reader
        except (Damaged, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and tensorstore have no kind of error for it
            if self._goes(error):
                raise FileNotFoundError(
                    f"{self.path} is gone, as old ones of a run that goes on are; try again."
                ) from error
            code = getattr(error, "errno", None) or disk_error(error)
            if not all(os.access(part, os.R_OK | os.X_OK) for part in self.path.glob("*/")):
                code = errno.EACCES  # which orbax takes for something that is not there
            if code not in (None, *_MISSING):  # the disk, or rights, which may come back
                raise OSError(code, os.strerror(code), str(self.path)) from error
            what = str(error.__cause__ or error).partition("\n")[0].partition(" [")[0].rstrip(".")
            raise self._damaged(what[:_SHOWN]) from error


def _rename(damaged: Kept) -> None:
    """Let a damaged checkpoint be in nobody's way."""
    names = (f"{damaged.update}.damaged{n or ''}" for n in itertools.count())
    free = (damaged.path.with_name(name) for name in names)
    damaged.path.rename(next(path for path in free if not path.exists()))


def kept_in(workdir: pathlib.Path, name: str) -> list[Kept]:
    """The checkpoints in one folder of a run, newest first."""
    folder = (workdir / name).absolute()
    return [Kept(folder / str(update)) for update in reversed(updates(folder))]


def find_kept(workdir: pathlib.Path) -> list[Kept]:
    """All checkpoints of a run, newest first; of one update there may be two, the best after."""
    found = [*kept_in(workdir, CHECKPOINTS), *kept_in(workdir, BEST)]
    return sorted(found, key=lambda one: one.update, reverse=True)


def first_good(kept: Sequence[Kept], read: Callable[[Kept], T]) -> tuple[Kept, T]:
    """The first checkpoint that is good, and what `read` finds in it; damaged ones are named.

    Raises:
        Damaged: if none is.
    """
    damaged: list[Damaged] = []
    for one in kept:
        try:
            found = read(one)
        except Damaged as error:
            damaged.append(error)
            continue
        for bad in damaged:
            console.say(f"{bad.told}; update {one.update:,} is taken in its place")
        return one, found
    raise Damaged("; ".join(bad.told for bad in damaged))


def leaf_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf by name."""
    return {path_name(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a state, for `restore`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
