"""Files that are there whole or not at all, and locks on files."""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from lm_jax.marker import marked, process_lives, wall_clock


def is_url(given: str | os.PathLike) -> bool:
    """Whether something is named by a URL, such as gs://bucket/run, and by no path."""
    return isinstance(given, str) and bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", given))


def user_path(given: str | os.PathLike) -> Path:
    """The path that a user named: `~` is their home, also in `--flag=~/x`, where shells keep it.

    Raises:
        ValueError: if it is a URL.
    """
    if is_url(given):
        raise ValueError(f"{given} is a URL; mount the bucket, and give a path.")
    return Path(given).expanduser()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the name `path` once all of it is on the disk.

    Readers see the old file or the new one, even if the machine dies. Until then the bytes are in a
    hidden file in the same folder; an error removes it, a kill leaves it.
    """
    temporary = _beside(path)
    with temporary.open("xb") as file:  # a new file, and no link that waits there
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno and error.filename is None:  # of a write
                error.filename = str(path)
            temporary.unlink(missing_ok=True)
            raise


def _beside(path: Path) -> Path:
    """A hidden name beside a path, which no one can know before."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def remove_halves(folder: Path) -> None:
    """Removes the files that processes which are gone were writing; see `whole`."""
    for path in folder.glob(".*"):
        written_by = re.fullmatch(r"\..+\.(\d+)-[0-9a-f]{8}", path.name)
        if written_by and path.is_file() and not process_lives(int(written_by[1])):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the name `path` at the end of the block.

    Until then it is a hidden one beside it; an error removes it, a kill leaves it.

    Raises:
        ValueError: if there is something at `path` that is no empty folder, or if it is the current
            one.
    """
    given, path, what = path, path.resolve(), ""
    if path == Path.cwd():  # a shell would stay in the old one
        what = "is the folder in which you are"
    elif path.exists() and not (path.is_dir() and not any(path.iterdir())):
        what = "holds files already" if path.is_dir() else "is a file"
    if what:
        raise ValueError(f"{given} {what}; name a folder that is new or empty.")
    temporary = _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder, whole or not at all; an error is that of the first file."""
    with whole_folder(target) as copy:
        for path in source.rglob("*"):
            if path.is_dir():
                (copy / path.relative_to(source)).mkdir()
            else:
                shutil.copyfile(path, copy / path.relative_to(source))


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
_HOLDER = b"process "  # begins what a lock says


@contextlib.contextmanager
def locked(path: Path, taken: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a file, which the end of the process releases too, be it a kill.

    In a folder that cannot be written the lock of another user is held as it is, and where there is
    none nothing is locked: what is finished there can be read all the same. A file system without
    locks has a marker beside the file in their place; see `marked`.

    Args:
        path: the file, which stays and tells who has the lock.
        taken: called with the process that has it, in words; if it returns, that one is waited for.

    Raises:
        ValueError: if it is another file than a lock, such as a link; it stays as it is.
    """
    lock = _open_lock(path)
    if lock is None:
        yield
        return
    with lock, contextlib.ExitStack() as instead:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            taken(lock.read() or "another process")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if lock.writable():
                instead.enter_context(marked(_Beside(path), taken))
        if lock.writable():
            lock.seek(0)
            lock.truncate()
            lock.write(
                f"{_HOLDER.decode()}{os.getpid()} on {platform.node()} (since {wall_clock()})"
            )
            lock.flush()
        yield


class _Beside:
    """The marker beside a lock."""

    def __init__(self, lock: Path):
        self._path = lock.with_name(f"{lock.name}.owner")
        self.name = str(self._path)

    def read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def write(self, content: bytes) -> None:
        with whole(self._path) as file:
            file.write(content)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _open_lock(path: Path) -> IO[str] | None:
    """The file of a lock; None if there is none and none can be made."""
    refused = ValueError(f"{path} is no lock of lm_jax; move it away, or name another folder.")
    safely = os.O_NOFOLLOW | os.O_NONBLOCK  # no link is followed and no pipe waited for
    mode = "r+"
    try:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | safely, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            mode, number = "r", os.open(path, os.O_RDONLY | safely)
    except (FileNotFoundError, PermissionError):
        if path.parent.is_dir():
            return None
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise refused from error
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode) or os.pread(number, 8, 0) not in (b"", _HOLDER):
        os.close(number)
        raise refused
    return open(number, mode, encoding="utf-8", errors="replace")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(there for there in (path, *path.absolute().parents) if os.path.exists(there))


def can_write(folder: Path) -> bool:
    """Whether files can be written into a folder, which need not be there yet."""
    there = existing(folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all."""
    with whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a readable JSON file, whole or not at all.

    Floats that are not finite, such as a perplexity beyond float64, become null: JSON has no number
    for them.
    """
    write_text(path, json.dumps(finite_or_none(value), indent=2, allow_nan=False) + "\n")


def finite_or_none(value: Any) -> Any:
    """The same tree of dicts and lists with None for every float that is not finite."""
    if isinstance(value, dict):
        return {key: finite_or_none(leaf) for key, leaf in value.items()}
    if isinstance(value, list):
        return [finite_or_none(leaf) for leaf in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: if there is no such file or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it into the folder.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); restore the file.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; restore the file.")
    return values
