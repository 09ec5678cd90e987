"""The data of a config, prepared on first use."""

import contextlib
import fcntl
import os
import pathlib
import platform
from collections.abc import Iterator

from lm_jax import console
from lm_jax.config import Config, rules
from lm_jax.data import corpora
from lm_jax.data.store import Store, prepare


def open_data(cfg: Config) -> Store:
    """The token store a config asks for, prepared on first use, by one process at a time.

    Raises:
        ValueError: if the corpus cannot be read, or lacks a split that is to be scored.
    """
    data = cfg.data
    cache_dir = pathlib.Path(data.cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / "lock"):
        with console.phase(f"reading {data.corpus}"):
            corpus = corpora.open_corpus(
                data.corpus,
                source_dir=data.source_dir,
                files=data.files,
                valid_files=data.valid_files,
                test_files=data.test_files,
                document=data.document,
                valid_fraction=data.valid_fraction,
                test_fraction=data.test_fraction,
                cache_dir=str(cache_dir),
            )
        store = prepare(
            corpus,
            tokenizer_kind=cfg.tokenizer.kind,
            vocab_size=cfg.tokenizer.vocab_size,
            folder=cfg.tokenizer.folder,
            sample=cfg.tokenizer.sample,
            workers=data.workers,
            cache_dir=str(cache_dir),
        )
    for name in ["valid", *rules.eval_splits(cfg, store.manifest["splits"])]:
        store.split(name)
    return store


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a cache; a process that must wait says so, and for which one."""
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read() or "another process"
            console.say(f"waiting until {holder} has prepared its data in {path.parent}")
            with console.phase("waiting"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield
