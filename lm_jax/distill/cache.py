"""A teacher's most likely ids for every training window, kept on disk.

A window is looked up by the hash of its tokens and segments. The order of the data does not matter,
and another corpus or tokenizer cannot be taken for the right one.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lm_jax.config import Config, ConfigError
from lm_jax.data import windows as pipeline
from lm_jax.data.store import Store
from lm_jax.files import whole, write_json

Batch = dict[str, np.ndarray]
MANIFEST, HASHES, IDS, LOG_P = "manifest.json", "hashes.npy", "ids.npy", "log_p.npy"
ROWS = 64  # windows handed out at a time by `write_cache`


def describe_cache(cfg: Config, store: Store) -> dict[str, Any]:
    """The facts in which a cache and the run that reads it must agree."""
    return {
        "tokenizer_hash": store.tokenizer.content_hash,
        "vocab_size": store.tokenizer.vocab_size,
        "train_sha256": store.manifest["splits"]["train"]["sha256"],
        "seq_len": cfg.data.seq_len,
        "document_mask": cfg.data.document_mask,
        "top_k": cfg.distill.top_k,
        "temperature": cfg.distill.temperature.points()[0][1],
    }


def row_hash(tokens_T: np.ndarray, segment_ids_T: np.ndarray) -> int:
    """64 bits of a hash of a window."""
    digest = hashlib.blake2b(np.ascontiguousarray(tokens_T, np.int32).tobytes(), digest_size=8)
    digest.update(np.ascontiguousarray(segment_ids_T, np.int32).tobytes())
    return int.from_bytes(digest.digest(), "little")


def write_cache(
    folder: pathlib.Path,
    cfg: Config,
    store: Store,
    most_likely: Callable[[Batch], tuple[np.ndarray, np.ndarray]],
    origin: dict[str, Any],
) -> int:
    """Keep the most likely ids of all windows of the training split; returns their number.

    Args:
        folder: to be made or, unfinished, written again.
        cfg: resolved config of the student, with `distill.top_k` and a constant temperature.
        store: its data.
        most_likely: of windows [ROWS, T + 1]: ids [ROWS, T, k] and log-probabilities
            [ROWS, T, k + 1], see `kernels.divergences.Kept`.
        origin: what to record of the teacher.

    Raises:
        FileExistsError: if the folder holds a finished cache.
    """
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder}: holds a cache already; give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    windows = pipeline.Windows(store.split("train"), cfg.data.seq_len, cfg.data.document_mask)
    N, T, k = len(windows), cfg.data.seq_len, cfg.distill.top_k
    small = store.tokenizer.vocab_size <= 1 << 16
    ids = _new(folder / IDS, np.uint16 if small else np.uint32, (N, T, k))
    log_p = _new(folder / LOG_P, np.float32, (N, T, k + 1))
    hashes = np.zeros(N, np.uint64)
    for first in range(0, N, ROWS):
        indices = np.arange(first, first + ROWS)
        batch = windows.batch(np.where(indices < N, indices, pipeline.PADDING_ROW))
        here = slice(first, min(N, first + ROWS))
        rows = here.stop - first
        made_ids, made_log_p = most_likely(batch)
        ids[here], log_p[here] = made_ids[:rows], made_log_p[:rows]
        hashes[here] = [
            row_hash(*row) for row in zip(batch["tokens"], batch["segment_ids"], strict=True)
        ][:rows]
    ids.flush()
    log_p.flush()
    with whole(folder / HASHES) as file:
        np.save(file, hashes)
    # Last: without it the folder is no cache.
    write_json(folder / MANIFEST, describe_cache(cfg, store) | {"teacher": origin})
    return N


def _new(path: pathlib.Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def open_cache(cfg: Config, store: Store) -> tuple[Callable[[Batch], Batch], str]:
    """A function that adds `kept_ids` and `kept_log_p` [..., T, k (+ 1)] to batches of the run.

    It raises ConfigError for a window that the cache does not hold. With it comes the sha256 of the
    cache's manifest.

    Raises:
        ConfigError: if there is no finished cache, or one of other data, tokenizer or options.
    """
    folder = pathlib.Path(cfg.distill.cache)
    if not (folder / MANIFEST).exists():
        raise ConfigError(
            f"config.distill.cache: {folder} holds no finished cache; run "
            "scripts/cache_teacher.py first."
        )
    manifest = (folder / MANIFEST).read_bytes()
    kept = json.loads(manifest)
    for name, wanted in describe_cache(cfg, store).items():
        if kept[name] != wanted:
            raise ConfigError(
                f"config.distill.cache: {folder} was made for {name} {kept[name]!r}, but this run "
                f"has {wanted!r}; run scripts/cache_teacher.py with this config."
            )
    place = {int(h): i for i, h in enumerate(np.load(folder / HASHES))}
    ids, log_p = (np.load(folder / name, mmap_mode="r") for name in (IDS, LOG_P))

    def extend(batch: Batch) -> Batch:
        lead = batch["tokens"].shape[:-1]
        rows = [
            batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "segment_ids")
        ]
        try:
            found = [place[row_hash(*row)] for row in zip(*rows, strict=True)]
        except KeyError as error:
            raise ConfigError(
                f"config.distill.cache: {folder} lacks a window of this run; run "
                "scripts/cache_teacher.py with this config."
            ) from error
        kept_ids = ids[found].astype(np.int32)
        return batch | {
            "kept_ids": kept_ids.reshape(*lead, *kept_ids.shape[1:]),
            "kept_log_p": log_p[found].reshape(*lead, *log_p.shape[1:]),
        }

    return extend, hashlib.sha256(manifest).hexdigest()
