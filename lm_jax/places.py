"""The folder that `--workdir` names; of a URL one of this machine, which follows it."""

import _thread
import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator

from lm_jax import console
from lm_jax.config import Config, ConfigError
from lm_jax.files import is_url, user_path
from lm_jax.marker import marked
from lm_jax.mirror import Mirror
from lm_jax.processes import find_place
from lm_jax.remote import Bucket

POLL = 1.0  # seconds between looks at what there is to push
PAUSE = 2.0  # seconds before a failed push is tried again, doubled each time
_LONGEST = 300.0  # of these
_TRIES = 4  # pushes at the end

_opened: dict[pathlib.Path, Bucket] = {}  # by mirror


@contextlib.contextmanager
def trained_in(given: str | os.PathLike, cfg: Config) -> Iterator[pathlib.Path]:
    """The folder in which a run is trained; of a URL its mirror, which is pushed meanwhile.

    Raises:
        ConfigError: if the URL cannot be opened, if another trainer has it, or if this is one of
            several processes.
        OSError: if the store cannot be reached, also at the end.
    """
    if not is_url(given):
        yield user_path(given)
        return
    url = str(given)
    if find_place().count != 1:
        raise ConfigError(
            f"--workdir={url}: several processes train in a folder that all of them see; give one, "
            "or mount the bucket and give the path."
        )

    def refuse(holder: str) -> None:
        raise ConfigError(
            f"--workdir={url}: {holder} is training there; wait for it, or give another URL."
        )

    mirror = Mirror(url, cfg.data.cache_dir, "train", cfg.train.keep)
    with marked(mirror.bucket, refuse) as mine:
        with console.phase(f"reading {url}"):
            mirror.open(mine)
        _opened[mirror.folder] = mirror.bucket
        console.say(f"{url}: its files are in {mirror.folder} meanwhile")
        with _pushing(mirror):
            yield mirror.folder


@contextlib.contextmanager
def _pushing(mirror: Mirror) -> Iterator[None]:
    """Push in a thread while the block runs, and once more after it.

    A run that another process has taken over is stopped, as by a SIGTERM.
    """
    ended = threading.Event()

    def watch() -> None:
        seen, pause = None, POLL
        while not ended.wait(pause):
            try:
                if (now := mirror.signs()) != seen:
                    mirror.push()
                    seen, pause = now, POLL
            except OSError as error:
                pause = min(max(PAUSE, 2 * pause), _LONGEST)
                console.say(f"not pushed, tried again in {pause:.0f} s: {error}")
            except RuntimeError as error:
                console.say(str(error))
                if not ended.is_set():
                    _thread.interrupt_main(signal.SIGTERM)  # nothing where no one handles it
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        try:
            _push_at_last(mirror)
        except (OSError, RuntimeError) as error:  # what the block raised is told last
            console.say(str(error))
        raise
    ended.set()
    thread.join()
    _push_at_last(mirror)


def _push_at_last(mirror: Mirror) -> None:
    with console.phase(f"pushing to {mirror.bucket.url}"):
        for attempt in range(_TRIES):
            try:
                mirror.push()
                return
            except OSError as error:
                if attempt == _TRIES - 1:
                    raise OSError(
                        f"{str(error).rstrip('.')}; it goes on from {mirror.folder}, which holds "
                        "all of the run."
                    ) from error
            time.sleep(PAUSE * 2**attempt)


def pulled(given: str | os.PathLike, checkpoint: str | int | None = None) -> pathlib.Path:
    """The folder in which a run is read; of a URL its mirror, brought up to date.

    Args:
        given: a path, or the URL of a run.
        checkpoint: which is read: best, last or a number of updates; None: none is.

    Raises:
        ConfigError: if the URL cannot be opened.
        FileNotFoundError: if no run is there.
        OSError: if the store cannot be reached.
    """
    if not is_url(given):
        return user_path(given)
    mirror = Mirror(str(given), Config().data.cache_dir, "read")
    mirror.pull(None if checkpoint is None else str(checkpoint))
    _opened[mirror.folder] = mirror.bucket
    return mirror.folder


def put_back(folder: pathlib.Path, *names: str) -> None:
    """Push files that were written into the folder of a run that lies in a store.

    Of several processes the first one does it.
    """
    if find_place().rank == 0 and (bucket := _opened.get(folder)):
        for name in names:
            bucket.put(name, folder / name)
