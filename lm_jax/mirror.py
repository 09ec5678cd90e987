"""A run in an object store, and the folder of this machine that is its mirror.

What the store holds is a run after every single write: the files of a
checkpoint come first, then the index that names them, and what it no longer names goes last.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from lm_jax import console
from lm_jax.config import ConfigError
from lm_jax.files import locked, read_json, user_path, whole_folder, write_json
from lm_jax.remote import Bucket
from lm_jax.rundir import BEST, CHECKPOINTS, RECORD, REPORT, newest_update, updates

INDEX = ".lm_jax.json"  # names the checkpoints in a store, and their files
_TRIES = 5  # looks at checkpoints that go
_LATE = re.compile(r"eval_\w+\.json|report\.html")  # say that a run is finished: after the index

Files = dict[str, int]  # sizes by name


class Mirror:
    """A folder of this machine, and the run in a store that it stands for."""

    def __init__(self, url: str, cache_dir: str, use: str, keep: int = 0):
        """Name them.

        Args:
            url: of the run.
            cache_dir: folder of the mirrors.
            use: "train" or "read"; who reads does not disturb who trains here.
            keep: newest checkpoints that the store keeps; 0: all.
        """
        self.bucket, self._keep = Bucket(url), keep
        named = hashlib.sha256(self.bucket.url.encode()).hexdigest()[:16]
        self._place = user_path(cache_dir).absolute() / "mirrors" / named / use
        self.folder = self._place / self.bucket.url.rpartition("/")[2]
        self._record = self._place / "mirror.json"  # which indices the folder is not behind
        self._index: dict[str, Any] = {}
        self._swept = False  # of what a push that was cut short has left
        self._small: dict[str, tuple[int, int] | None] = {}  # in the store, by what was pushed

    def open(self, mine: Callable[[], bool]) -> None:
        """Make the folder what the store holds, unless it is ahead of it: a push was cut short.

        Args:
            mine: whether the run is still held by this process.

        Raises:
            ConfigError: if something else is at the URL.
        """
        self._mine = mine
        index = self._read_index()
        if index is None:
            if there := [name for name in self.bucket.find() if not name.startswith(".")]:
                raise ConfigError(
                    f"--workdir={self.bucket.url}: holds {there[0]} and no run that lm_jax keeps "
                    "there; give a URL that is new or empty."
                )
            index = {"token": "", "checkpoints": {}}
        self._index = index
        known = read_json(self._record)["tokens"] if self._record.exists() else []
        names = self._names()
        ahead = newest_update(self.folder) is not None or not index["checkpoints"]
        if index["token"] in known and self.folder.is_dir() and ahead:
            self._small = dict.fromkeys(names)
        else:
            self._record.unlink(missing_ok=True)
            self._pull(names, _needed(index))
            self._small = {name: _stamp(self.folder / name) for name in names}
        # From now on the mirrors of other machines are behind.
        self._write_index(index["checkpoints"])

    def pull(self, checkpoint: str | None) -> None:
        """Make the folder what the store holds, without other checkpoints than are asked for.

        Args:
            checkpoint: best, last or a number of updates; None: none.

        Raises:
            FileNotFoundError: if there is no run.
        """
        self._place.mkdir(parents=True, exist_ok=True)

        def say(holder: str) -> None:
            console.say(f"waiting until {holder} has read {self.bucket.url}")

        with locked(self._place / "lock", say), console.phase(f"reading {self.bucket.url}"):
            index = self._read_index()
            if index is None:
                raise FileNotFoundError(f"{self.bucket.url}: no run is there; correct the URL.")
            self._index = index
            wanted = [] if checkpoint is None else _needed(index)
            wanted += [n for n in index["checkpoints"] if n.rpartition("/")[2] == checkpoint]
            self._pull(self._names(), wanted)

    def push(self) -> None:
        """Make the store hold what the folder does.

        Raises:
            RuntimeError: if another process has taken the run over.
            OSError: if the store takes nothing; a later push goes on from there.
        """
        if not self._mine():
            raise RuntimeError(
                f"{self.bucket.url}: another process has taken the run over, for this one gave no "
                f"sign of life; what it has made since is in {self.folder} alone."
            )
        entries: dict[str, Any] = self._index["checkpoints"]
        used, token = {entry["at"] for entry in entries.values()}, secrets.token_hex(8)
        with self._staged() as (local, new, staged):
            for name in new:
                at = name if name not in used else f"{name}-{token}"
                for file in local[name]:
                    self.bucket.put(f"{at}/{file}", staged / name / file)
                entries = {**entries, name: {"at": at, "files": local[name]}}
        here = self._stamps()
        for name in self._outdated(here):
            self.bucket.drop(name)
            del self._small[name]
        self._push_small({name: one for name, one in here.items() if not _LATE.fullmatch(name)})
        kept = {name: entries[name] for name in self._kept(entries, local)}
        if changed := kept != self._index["checkpoints"]:
            self._write_index(kept)
        self._push_small({name: one for name, one in here.items() if _LATE.fullmatch(name)})
        named = {f"{one['at']}/{file}" for one in kept.values() for file in one["files"]}
        for name in self.bucket.find() if changed or not self._swept else ():
            if _of_checkpoint(name) and name not in named:
                self.bucket.drop(name)
        self._swept = True

    def _kept(self, entries: dict[str, Any], local: dict[str, Files]) -> list[str]:
        """The checkpoints that the store is to hold.

        Old ones that are not here stay as long as they would here. One that is newer than all here
        was set aside.
        """
        here = [int(name.rpartition("/")[2]) for name in local if name.startswith(CHECKPOINTS)]
        if not here:
            return list(entries)
        numbers = {int(n.rpartition("/")[2]) for n in entries if n.startswith(CHECKPOINTS)}
        newest = sorted(n for n in numbers if n <= max(here))[-self._keep :]
        return [f"{CHECKPOINTS}/{n}" for n in newest] + [n for n in local if n.startswith(BEST)]

    def _outdated(self, here: dict[str, tuple[int, int]]) -> list[str]:
        """Files there that are not here, and scores of an end that the record no longer names."""
        longer = self._small.get(RECORD) != here.get(RECORD)
        return [
            name
            for name, pushed in self._small.items()
            if name not in here or (longer and _LATE.fullmatch(name) and pushed != here[name])
        ]

    def _push_small(self, here: dict[str, tuple[int, int]]) -> None:
        for name, stamp in here.items():
            if self._small.get(name) != stamp and (self.folder / name).exists():
                self.bucket.put(name, self.folder / name)
                self._small[name] = stamp

    def signs(self) -> Any:
        """What changes with a checkpoint or an evaluation."""
        names = [path for kind in (CHECKPOINTS, BEST) for path in updates(self.folder / kind)]
        pages = [self.folder / REPORT, self.folder / RECORD]
        return names, [_stamp(path) for path in pages if path.exists()]

    def _local(self) -> dict[str, Files]:
        """The finished checkpoints here, but for old ones that may be on their way out.

        The newest are looked at before the best one that they name, which was finished earlier.
        """
        return {
            f"{kind}/{update}": {
                str(path.relative_to(folder)): path.stat().st_size
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            for kind, most in ((CHECKPOINTS, self._keep), (BEST, 1))
            for update in updates(self.folder / kind)[-most:]
            for folder in [self.folder / kind / str(update)]
        }

    @contextlib.contextmanager
    def _staged(self) -> Iterator[tuple[dict[str, Files], list[str], pathlib.Path]]:
        """The checkpoints here, those of them that the store has not, and links to their files.

        The links stay when the run removes the files.
        """
        staged, known = self._place / "staged", self._index["checkpoints"]
        for left in reversed(range(_TRIES)):
            shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed
            try:
                local = self._local()
                new = [n for n, files in local.items() if known.get(n, {}).get("files") != files]
                for name, file in [(n, file) for n in new for file in local[n]]:
                    (staged / name / file).parent.mkdir(parents=True, exist_ok=True)
                    os.link(self.folder / name / file, staged / name / file)
                break
            except FileNotFoundError:  # an old one was removed meanwhile
                if not left:
                    raise
        yield local, new, staged
        shutil.rmtree(staged, ignore_errors=True)

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """The other files here."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if not _hidden(name) and not _of_checkpoint(name) and path.is_file():
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found[name] = _stamp(path)
        return found

    def _names(self) -> list[str]:
        """The other files there."""
        return [n for n in self.bucket.find() if not _hidden(n) and not _of_checkpoint(n)]

    def _pull(self, names: list[str], wanted: list[str]) -> None:
        """Get these files and checkpoints, and remove all others."""
        entries, local = self._index["checkpoints"], self._local()
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind in (CHECKPOINTS, BEST):
            for path in (self.folder / kind).glob("*"):
                name = f"{kind}/{path.name}"
                if name not in entries or local.get(name) != entries[name]["files"]:
                    shutil.rmtree(path)
        for name in self._stamps().keys() - set(names):
            (self.folder / name).unlink()
        for name in names:
            self.bucket.get(name, self.folder / name)
        for name in wanted:
            if not (self.folder / name).exists():
                with whole_folder(self.folder / name) as folder:
                    for file, size in entries[name]["files"].items():
                        self.bucket.get(f"{entries[name]['at']}/{file}", folder / file, size)

    def _read_index(self) -> dict[str, Any] | None:
        content = self.bucket.content(INDEX)
        if content is None:
            return None
        try:
            index: dict[str, Any] = json.loads(content)
            return {"token": index["token"], "checkpoints": dict(index["checkpoints"])}
        except (ValueError, TypeError, LookupError) as error:
            raise ConfigError(
                f"{self.bucket.url}/{INDEX}: is not as lm_jax writes it; restore the file, or "
                "give another URL."
            ) from error

    def _write_index(self, checkpoints: dict[str, Any]) -> None:
        index = {"token": secrets.token_hex(8), "checkpoints": checkpoints}
        # A kill may come before or after it is there.
        write_json(self._record, {"tokens": [self._index["token"], index["token"]]})
        self.bucket.put_content(INDEX, json.dumps(index).encode())
        write_json(self._record, {"tokens": [index["token"]]})
        self._index = index


def _needed(index: dict[str, Any]) -> list[str]:
    """The newest checkpoint and the best one."""
    last = {}
    for name in sorted(index["checkpoints"], key=lambda name: int(name.rpartition("/")[2])):
        last[name.partition("/")[0]] = name
    return list(last.values())


def _of_checkpoint(name: str) -> bool:
    return name.partition("/")[0] in (CHECKPOINTS, BEST)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
