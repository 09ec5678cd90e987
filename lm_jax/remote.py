"""What lies in an object store, and the files of a corpus that are fetched from one."""

import concurrent.futures
import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator

from lm_jax import console
from lm_jax.config import ConfigError
from lm_jax.files import can_write, read_json, whole, write_json

_READERS = 8  # files that are fetched at once
_BLOCK = 8 << 20
_OWNER = ".lm_jax.owner"


@contextlib.contextmanager
def _asked(url: str) -> Iterator[None]:
    """Let every error of a store, of which each package has its own, be an OSError with its URL."""
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise OSError(
            f"{url}: the store cannot be reached or refuses ({what}); look at the URL, the "
            "credentials and the network, and give the same command again."
        ) from error


class Bucket:
    """What lies below a URL, by names relative to it."""

    def __init__(self, url: str):
        """Open it by fsspec.

        Raises:
            ConfigError: if a package for it is missing.
        """
        with _asked(url):
            try:
                import fsspec

                self._fs, root = fsspec.core.url_to_fs(url)
            except ImportError as error:
                raise ConfigError(
                    f"{url}: {str(error).rstrip('.')}; run `pip install 'lm_jax[remote]'`, and "
                    "install the package of the store beside it: s3fs for s3://, gcsfs for gs://."
                ) from error
            except ValueError as error:
                raise ConfigError(
                    f"{url}: {str(error).rstrip('.')}; give a path, or a URL that fsspec knows, "
                    "such as s3://bucket/name with s3fs installed or gs://bucket/name with gcsfs."
                ) from error
        if hasattr(self._fs, "auto_mkdir"):  # of a local folder, where that is not the rule
            self._fs.auto_mkdir = True
        self.url, self._root = url.rstrip("/"), root.rstrip("/")
        self.name = f"{self.url}/{_OWNER}"  # as a marker

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def find(self) -> list[str]:
        """The names of all files."""
        with _asked(self.url):
            self._fs.invalidate_cache()
            found = self._fs.find(self._root) if self._fs.exists(self._root) else []
            return sorted(path[len(self._root) + 1 :] for path in found)

    def content(self, name: str) -> bytes | None:
        """What a file holds; None if it is not there."""
        with _asked(self.url):
            try:
                return self._fs.cat_file(self._at(name))
            except FileNotFoundError:
                return None

    def get(self, name: str, path: pathlib.Path, size: int | None = None) -> None:
        """Fetch a file, whole or not at all; an OSError if it has not this size."""
        self.copy(self._at(name), path, size)

    def copy(self, found: str, path: pathlib.Path, size: int | None) -> None:
        """As `get`, of a file that `matches` has found."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as file:
            for block in self._blocks(found):
                file.write(block)
            if size not in (None, file.tell()):
                raise OSError(
                    f"{self.url}: {found} has {file.tell():,} bytes instead of {size:,}; give the "
                    "same command again, or restore the file."
                )

    def _blocks(self, found: str) -> Iterator[bytes]:
        with _asked(self.url), self._fs.open(found, "rb") as source:
            while block := source.read(_BLOCK):
                yield block

    def put(self, name: str, path: pathlib.Path) -> None:
        """Push a file."""
        with _asked(self.url):
            self._fs.put_file(str(path), self._at(name))

    def put_content(self, name: str, content: bytes) -> None:
        """Push a file of this content."""
        with _asked(self.url):
            self._fs.pipe_file(self._at(name), content)

    def drop(self, name: str) -> None:
        """Remove a file."""
        with _asked(self.url), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def matches(self) -> dict[str, tuple[int | None, str]]:
        """The files that it names as a glob: the size of each, and what tells its versions."""
        with _asked(self.url):
            self._fs.invalidate_cache()
            return {
                path: (info.get("size"), self._fs.ukey(path))
                for path, info in self._fs.glob(self._root, detail=True).items()
                if info["type"] == "file"
            }

    def full(self, found: str) -> str:
        """The URL of a file that `matches` has found."""
        url: str = self._fs.unstrip_protocol(found)
        return url

    def read(self) -> bytes | None:
        """Of the marker of who trains there."""
        return self.content(_OWNER)

    def write(self, content: bytes) -> None:
        """As above."""
        self.put_content(_OWNER, content)

    def remove(self) -> None:
        """As above."""
        self.drop(_OWNER)


def fetch(pattern: str, cache: pathlib.Path, *, allowed: bool) -> dict[str, pathlib.Path]:
    """The files that a URL, which may be a glob, names; each version is fetched into a cache once.

    Args:
        pattern: the URL.
        cache: folder that keeps them.
        allowed: whether the store may be asked; if not, what was found the last time is taken.

    Returns:
        Their copies by URL, in no order.

    Raises:
        ConfigError: if a package for the store is missing.
        FileNotFoundError: if no file is there, or nothing may be asked that was not before.
        OSError: if the store cannot be read.
    """
    folder = cache / "fetched"
    memory = folder / f"{_hash(pattern)}.json"
    if not allowed:
        known = read_json(memory) if memory.exists() else {}
        found = {url: folder / name for url, name in known.items()}
        if not found or not all(path.is_file() for path in found.values()):
            raise FileNotFoundError(
                f"{pattern} was not fetched here, and what the record of a run names is not "
                "downloaded: copy its files, and name them with --config.data.source_dir and "
                "--config.data.files."
            )
        return found
    bucket = Bucket(pattern)
    listed = bucket.matches()
    if not listed:
        raise FileNotFoundError(f"{pattern} names no file: correct it in config.data.")
    names = {
        found: f"{_hash(json.dumps([bucket.full(found), *told]))}/{found.rpartition('/')[2]}"
        for found, told in listed.items()
    }
    missing = [found for found, name in names.items() if not (folder / name).is_file()]

    def get(found: str) -> None:
        bucket.copy(found, folder / names[found], listed[found][0])

    if missing:
        with (
            console.phase(f"fetching {len(missing)} files of {pattern}"),
            concurrent.futures.ThreadPoolExecutor(_READERS) as pool,
        ):
            list(pool.map(get, missing))
    names = {bucket.full(found): name for found, name in names.items()}
    if can_write(folder) and (not memory.exists() or read_json(memory) != names):
        write_json(memory, names)
    return {url: folder / name for url, name in names.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
