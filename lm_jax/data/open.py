"""The data of a config, prepared on first use."""

import pathlib
from collections.abc import Mapping
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
    data = cfg.data
    cache_dir = pathlib.Path(data.cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)

    def say(holder: str) -> None:
        console.say(f"waiting until {holder} has prepared its data in {cache_dir}")

    with console.phase(f"reading {data.corpus}"), locked(cache_dir / "lock", say):
        corpus = corpora.open_corpus(
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
            fetch=not expected,  # a record may come from somebody else
        )
        if expected and corpus.fingerprint != expected["corpus_fingerprint"]:
            raise _other_data(cfg)
        store = prepare(
            corpus,
            tokenizer_kind=cfg.tokenizer.kind,
            vocab_size=cfg.tokenizer.vocab_size,
            folder=cfg.tokenizer.folder,
            sample=cfg.tokenizer.sample,
            workers=data.workers,
            cache_dir=str(cache_dir),
        )
    if expected and not same_data(expected, store.manifest):
        raise _other_data(cfg)
    for name in ["valid", *rules.eval_splits(cfg, store.manifest["splits"])]:
        store.split(name)
    return store


def _other_data(cfg: Config) -> ConfigError:
    data = cfg.data
    where = f" in config.data.source_dir={data.source_dir!r}" if data.source_dir else ""
    return ConfigError(
        f"config.data.corpus: {data.corpus!r}{where} is another corpus or has another tokenizer "
        "than the run was trained on; restore the data, or name their folder with "
        "--config.data.source_dir."
    )
