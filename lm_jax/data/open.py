"""The data of a config, prepared on first use."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from lm_jax import console
from lm_jax.config import Config, ConfigError, rules
from lm_jax.data import corpora
from lm_jax.data.store import Store, prepare, same_data
from lm_jax.files import locked


def open_data(cfg: Config, expected: Mapping[str, Any] | None = None) -> Store:
    """The token store a config asks for, prepared on first use, by one process at a time.

    Args:
        cfg: the config.
        expected: the manifest that a run remembers of it; None or empty: any store will do.

    Raises:
        ConfigError: if it is not the one that is expected; another corpus is not prepared.
        ValueError: if the corpus cannot be read, or lacks a split that is to be scored.
    """
    with opened_corpus(cfg, fetch=not expected) as corpus:  # a record may come from somebody else
        if expected and corpus.fingerprint != expected["corpus_fingerprint"]:
            raise _other_data(cfg)
        store = prepare(corpus, workers=cfg.data.workers, **how_tokenised(cfg))
    if expected and not same_data(expected, store.manifest):
        raise _other_data(cfg)
    for name in ["valid", *rules.eval_splits(cfg, store.manifest["splits"])]:
        store.split(name)
    return store


@contextlib.contextmanager
def opened_corpus(cfg: Config, *, fetch: bool = True) -> Iterator[corpora.Corpus]:
    """The corpus of a config; until the end of the block no other process prepares its tokens.

    Args:
        cfg: the config.
        fetch: whether what is not there may be downloaded.

    Raises:
        ValueError: if the corpus cannot be read.
    """
    data = cfg.data
    cache_dir = pathlib.Path(data.cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)

    def say(holder: str) -> None:
        console.say(f"waiting until {holder} has prepared its data in {cache_dir}")

    with console.phase(f"reading {data.corpus}"), locked(cache_dir / "lock", say):
        yield corpora.open_corpus(
            data.corpus,
            source_dir=data.source_dir,
            files=data.files,
            valid_files=data.valid_files,
            test_files=data.test_files,
            document=data.document,
            skip_missing=data.skip_missing,
            valid_fraction=data.valid_fraction,
            test_fraction=data.test_fraction,
            cache_dir=str(cache_dir),
            fetch=fetch,
        )


def how_tokenised(cfg: Config) -> dict[str, Any]:
    """What of a config decides how its corpus is tokenised and where the tokens lie."""
    return {
        "tokenizer_kind": cfg.tokenizer.kind,
        "vocab_size": cfg.tokenizer.vocab_size,
        "folder": cfg.tokenizer.folder,
        "sample": cfg.tokenizer.sample,
        "cache_dir": cfg.data.cache_dir,
    }


def _other_data(cfg: Config) -> ConfigError:
    data = cfg.data
    where = f" in config.data.source_dir={data.source_dir!r}" if data.source_dir else ""
    return ConfigError(
        f"config.data.corpus: {data.corpus!r}{where} is another corpus or has another tokenizer "
        "than the run was trained on; restore the data, or name their folder with "
        "--config.data.source_dir."
    )
