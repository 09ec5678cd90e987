"""A teacher's most likely ids for every training window, kept on disk.

A window is looked up by the hash of its tokens and segments. The order of the data does not matter,
and another corpus or tokenizer cannot be taken for the right one.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lm_jax import console
from lm_jax.config import Config, ConfigError
from lm_jax.data import windows
from lm_jax.data.store import Store
from lm_jax.data.windows import Batch
from lm_jax.files import whole, write_json

MANIFEST, HASHES, IDS, LOG_P = "manifest.json", "hashes.npy", "ids.npy", "log_p.npy"
ROWS = 64  # windows handed out at a time by `write_cache`


def describe_cache(cfg: Config, store: Store) -> dict[str, Any]:
    """The facts in which a cache and the run that reads it must agree."""
    return {
        "tokenizer_hash": store.tokenizer.identity,
        "vocab_size": store.tokenizer.vocab_size,
        "train_sha256": store.manifest["splits"]["train"]["sha256"],
        "seq_len": cfg.data.seq_len,
        "document_mask": cfg.data.document_mask,
        "top_k": cfg.distill.top_k,
        "temperature": cfg.distill.temperature.points()[0][1],
    }


def _hashes(batch: Batch) -> list[int]:
    """64 bits of a hash of each window of a batch [..., T + 1], by its tokens and segments."""
    both = np.concatenate([batch["tokens"], batch["segment_ids"]], axis=-1).astype(np.int32)
    rows = both.reshape(-1, both.shape[-1])
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return [int.from_bytes(digest, "little") for digest in digests]


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
    split, T, k = store.split("train"), cfg.data.seq_len, cfg.distill.top_k
    N = windows.count_windows(split, T, False)
    small = store.tokenizer.vocab_size <= 1 << 16
    for name in (IDS, LOG_P):  # a link there would be followed
        (folder / name).unlink(missing_ok=True)
    new = np.lib.format.open_memmap
    ids = new(folder / IDS, "w+", np.uint16 if small else np.uint32, (N, T, k))
    log_p = new(folder / LOG_P, "w+", np.float32, (N, T, k + 1))
    hashes = np.zeros(N, np.uint64)
    batches = windows.eval_batches(
        split, seq_len=T, batch_size=ROWS, document_mask=cfg.data.document_mask
    )
    with console.phase("reading the teacher", N) as reading:
        for first, batch in zip(range(0, N, ROWS), batches, strict=True):
            rows = min(ROWS, N - first)  # the last batch is padded
            here = slice(first, first + rows)
            made_ids, made_log_p = most_likely(batch)
            if not np.isfinite(made_log_p[:rows]).all():
                raise ConfigError(
                    f"config.distill.teachers: no finite log-probabilities in windows {first} to "
                    f"{first + rows - 1}; give a teacher that reads them, or set "
                    "config.train.compute_dtype to float32."
                )
            ids[here], log_p[here] = made_ids[:rows], made_log_p[:rows]
            hashes[here] = _hashes(batch)[:rows]
            reading.update(first + rows, f"{first + rows:,} of {N:,} windows")
    ids.flush()
    log_p.flush()
    with whole(folder / HASHES) as file:
        np.save(file, hashes)
    # Last: without it the folder is no cache.
    kept = {"sha256": _hash_arrays(folder), "teacher": origin}
    write_json(folder / MANIFEST, describe_cache(cfg, store) | kept)
    return N


def _hash_arrays(folder: pathlib.Path) -> dict[str, str]:
    """sha256 of each file of a cache; a missing one has none."""
    found = {}
    with console.phase(f"hashing {folder}"):
        for name in (HASHES, IDS, LOG_P):
            with contextlib.suppress(FileNotFoundError), (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def require_cache(folder: pathlib.Path) -> None:
    """Raise ConfigError if a folder holds no finished cache."""
    if not (folder / MANIFEST).exists():
        raise ConfigError(
            f"config.distill.cache: {folder} holds no finished cache; run "
            "scripts/cache_teacher.py first."
        )


def open_cache(cfg: Config, store: Store) -> tuple[Callable[[Batch], Batch], str]:
    """A function that adds `kept_ids` and `kept_log_p` [..., T, k (+ 1)] to batches of the run.

    It raises ConfigError for a window that the cache does not hold. With it comes the sha256 of the
    cache's manifest.

    Raises:
        ConfigError: if there is no finished cache, or one of other data, tokenizer or options, or
            if its files are not those that were written.
    """
    folder = pathlib.Path(cfg.distill.cache)
    require_cache(folder)
    manifest = (folder / MANIFEST).read_bytes()
    facts = describe_cache(cfg, store)
    try:
        kept = json.loads(manifest)
        hashes = dict(kept["sha256"])
        given = {name: kept[name] for name in facts}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"config.distill.cache: {folder / MANIFEST} is damaged or of an older version, which "
            f"kept no hashes ({error!r}); run scripts/cache_teacher.py into another folder."
        ) from error
    for name, wanted in facts.items():
        if given[name] != wanted:
            raise ConfigError(
                f"config.distill.cache: {folder} was made for {name} {given[name]!r}, but this run "
                f"has {wanted!r}; run scripts/cache_teacher.py with this config."
            )
    found = _hash_arrays(folder)
    if wrecked := [n for n in (HASHES, IDS, LOG_P) if n not in found or found[n] != hashes.get(n)]:
        raise ConfigError(
            f"config.distill.cache: {', '.join(wrecked)} in {folder} is not what was written; "
            "restore it, or run scripts/cache_teacher.py into another folder."
        )
    place = {int(h): i for i, h in enumerate(np.load(folder / HASHES))}
    ids, log_p = (np.load(folder / name, mmap_mode="r") for name in (IDS, LOG_P))

    def extend(batch: Batch) -> Batch:
        try:
            found = [place[window] for window in _hashes(batch)]
        except KeyError as error:
            raise ConfigError(
                f"config.distill.cache: {folder} lacks a window of this run; run "
                "scripts/cache_teacher.py with this config."
            ) from error
        at = np.reshape(found, batch["tokens"].shape[:-1])
        return batch | {"kept_ids": ids[at].astype(np.int32), "kept_log_p": log_p[at]}

    return extend, hashlib.sha256(manifest).hexdigest()
