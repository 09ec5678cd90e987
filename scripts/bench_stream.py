"""A corpus larger than memory: speed and memory of tokenising it and of reading batches.

    python scripts/bench_stream.py --gigabytes=2 [--folder=DIR] [--json=FILE]

Writes a corpus of made-up words with the frequencies and lengths of a natural language, no two
documents alike, as JSONL shards. Prepares an eighth, a quarter, half and all of it as
`configs/stream_226m.py` would, with two processes, the smallest also with one (of one thread);
reads training batches for one epoch, and examines the largest with the doctor; tokenises documents
of up to 26 MB. Every stage runs in a process of its own, whose memory (with that of its children)
is looked at 20 times a second. Kills a small preparation with SIGKILL and compares what follows
byte for byte. The corpus and the stores are deleted at the end; they take three times the size of
the text.
"""

import argparse
import hashlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from benchmark import machine

from lm_jax.config.flags import load_config
from lm_jax.config.manual import script_parser
from lm_jax.data.references import references

GIB = 1 << 30
SHARDS = 16
LONG_MEGABYTES = (1, 13, 26)
LEXICON = 300_000
ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "stream_226m.py")


# --- the corpus ----------------------------------------------------------------------------------


def make_lexicon(seed: int) -> list[str]:
    """Pronounceable words, the frequent ones short."""
    rng = np.random.default_rng(seed)
    consonants = np.array(list("tnshrdlcmfpgwybvkxjqz")), np.arange(21, 0, -1) / 231
    vowels = np.array(list("eaoiu")), np.array([13, 8, 8, 7, 3]) / 39
    lengths = 1 + rng.poisson(0.6 + 1.35 * np.log10(np.arange(1, 3 * LEXICON)))
    total = int(lengths.sum())
    drawn = [rng.choice(letters, total, p=p).tolist() for letters, p in (consonants, vowels)]
    words: dict[str, None] = {}
    at = 0
    for length, kind in zip(
        lengths.tolist(), rng.integers(0, 2, len(lengths)).tolist(), strict=True
    ):
        words["".join(drawn[(i + kind) % 2][at + i] for i in range(length))] = None
        at += length
    return list(words)[:LEXICON]


def documents(lexicon: list[str], seed: int, size: int) -> Iterator[str]:
    """Documents of some 3 kB until they hold `size` bytes; words by Zipf and Mandelbrot."""
    rng = np.random.default_rng(seed)
    weight = 1 / (np.arange(len(lexicon)) + 3.7)
    cumulative = np.cumsum(weight) / weight.sum()
    words, done = np.array(lexicon, object), 0
    while done < size:
        drawn = words[np.minimum(np.searchsorted(cumulative, rng.random(1 << 16)), len(words) - 1)]
        ends = np.cumsum(rng.integers(4, 30, len(drawn) // 17)).tolist()
        sentences = [
            " ".join(drawn[first:end].tolist()).capitalize() + "."
            for first, end in zip([0, *ends], ends, strict=False)
        ]
        while sentences:
            count = 1 + int(rng.lognormal(3, 0.8))
            text = " ".join(sentences[:count])
            sentences = sentences[count:]
            done += len(text) + 1
            yield text + "\n"


def write_shards(folder: pathlib.Path, size: int) -> list[pathlib.Path]:
    """The corpus as JSONL."""
    lexicon = make_lexicon(0)
    paths = [folder / f"{number:02}.jsonl" for number in range(SHARDS)]
    for number, path in enumerate(paths):
        with path.open("w") as file:
            for text in documents(lexicon, number, size // SHARDS):
                file.write(json.dumps({"text": text}) + "\n")
    return paths


# --- stages, each in a process of its own ---------------------------------------------------------


def open_corpus(options: dict[str, Any]) -> Any:
    """The corpus of a stage."""
    from lm_jax.data import corpora

    data = load_config(CONFIG).data
    return corpora.open_corpus(
        "text",
        files=options["files"],
        document=options.get("document", data.document),
        valid_fraction=options.get("valid_fraction", data.valid_fraction),
        cache_dir=options["cache_dir"],
    )


def prepare(options: dict[str, Any]) -> dict[str, Any]:
    """Tokenises; wall and CPU time of what parts write, and wall time of the rest."""
    from lm_jax.data import parts, recipe, store

    tokenizer = load_config(CONFIG).tokenizer
    seconds: dict[str, float] = {}

    def cpu() -> float:
        usage = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        return sum(one.ru_utime + one.ru_stime for one in usage)

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            began, used = time.perf_counter(), cpu()
            result = function(*arguments, **keywords)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            seconds[f"{name}_cpu"] = seconds.get(f"{name}_cpu", 0.0) + cpu() - used
            return result

        return call

    corpus = timed("open_corpus", open_corpus)(options)
    timed("open_corpus_again", open_corpus)(options)
    parts.write_all = timed("tokenise", parts.write_all)
    parts.join = timed("join", parts.join)
    recipe.train_tokenizer = timed("learn", recipe.train_tokenizer)
    store.open_store = timed("open_store", store.open_store)
    found = store.prepare(
        corpus,
        tokenizer_kind="bpe",
        vocab_size=options.get("vocab_size", tokenizer.vocab_size),
        sample=options.get("sample", tokenizer.sample),
        workers=options["workers"],
        cache_dir=options["cache_dir"],
    )
    splits = found.manifest["splits"].values()
    megabytes = sum(split["bytes"] for split in splits) / 1e6
    return {
        "path": str(found.path),
        "megabytes": megabytes,
        "tokens": sum(split["tokens"] for split in splits),
        "documents": sum(split["documents"] for split in splits),
        "mb_per_second": megabytes / seconds["tokenise"],
        "mb_per_core_second": megabytes / seconds["tokenise_cpu"],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def read(options: dict[str, Any]) -> dict[str, Any]:
    """Training batches of one epoch, as the loop reads them."""
    from lm_jax.data import store, windows

    data = load_config(CONFIG).data
    split = store.open_store(options["path"]).split("train")
    count = windows.count_windows(split, data.seq_len, False) // data.batch_size
    batches = windows.train_batches(
        split,
        seq_len=data.seq_len,
        batch_size=data.batch_size,
        document_mask=data.document_mask,
        seed=0,
        calls=[range(i, i + 1) for i in range(count)],
    )
    began = time.perf_counter()
    tokens = sum(batch["tokens"].size for batch in batches)
    seconds = time.perf_counter() - began
    return {"batches": count, "tokens": tokens, "tokens_per_second": tokens / seconds}


def examine(options: dict[str, Any]) -> dict[str, Any]:
    """The doctor's preflight, and the reference predictors of the valid split."""
    from lm_jax import preflight
    from lm_jax.data import store

    found, cfg = store.open_store(options["path"]), load_config(CONFIG)
    began = time.perf_counter()
    report = preflight.examine_config(cfg, store=found)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    references(found, "valid")
    return {
        "doctor_seconds": seconds,
        "failed": report.failed,
        "references_seconds": time.perf_counter() - began,
    }


def documents_only(options: dict[str, Any]) -> dict[str, Any]:
    """All documents of a format, without tokenising them."""
    corpus = open_corpus(options)
    digest, size = hashlib.sha256(), 0
    began = time.perf_counter()
    for text in corpus.documents("train"):
        digest.update(text.encode())
        size += len(text)
    return {
        "sha256": digest.hexdigest(),
        "mb_per_second": size / 1e6 / (time.perf_counter() - began),
    }


STAGES = {stage.__name__: stage for stage in (prepare, read, examine, documents_only)}


def memory(root: int) -> tuple[int, int]:
    """Bytes of a process and its descendants: resident, and of these anonymous."""
    parents, found = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*/status"):
        try:
            status = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        pid = int(path.parent.name)
        parents[pid] = int(status["PPid"])
        sizes = [1024 * int(status.get(key, "0 kB").split()[0]) for key in ("VmRSS", "RssAnon")]
        found[pid] = np.array(sizes)
    family, total = [root], np.zeros(2, np.int64)
    for pid in family:
        total += found.get(pid, 0)
        family += [child for child, parent in parents.items() if parent == pid]
    return int(total[0]), int(total[1])


def start(stage: str, options: dict[str, Any]) -> subprocess.Popen:
    """Starts a stage."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, __file__, f"--stage={stage}", f"--options={json.dumps(options)}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)


def run(stage: str, **options: Any) -> dict[str, Any]:
    """What a stage found, and the most memory it took."""
    process = start(stage, options)
    peak = np.zeros(2, np.int64)
    while process.poll() is None:
        peak = np.maximum(peak, memory(process.pid))
        time.sleep(0.05)
    assert process.stdout is not None and process.returncode == 0, stage
    megabytes = (peak / 1e6).round(1).tolist()
    result = json.loads(process.stdout.read())
    result |= {"peak_rss_mb": megabytes[0], "peak_anonymous_mb": megabytes[1]}
    print(stage, json.dumps(result), file=sys.stderr, flush=True)
    return result


# --- the measurements -----------------------------------------------------------------------------


def joined(paths: list[pathlib.Path]) -> str:
    """The files as the config names them."""
    return ",".join(map(str, paths))


def growth(paths: list[pathlib.Path], folder: pathlib.Path) -> dict[str, Any]:
    """Speed and memory by size, with two processes, and with one for the smallest."""
    rows, hashes = [], {}
    for count, workers in ((2, 1), (2, 2), (4, 2), (8, 2), (16, 2)):
        cache = folder / "cache"
        row = run("prepare", files=joined(paths[:count]), workers=workers, cache_dir=str(cache))
        path = row.pop("path")
        hashes[count, workers] = content_hash(path)
        if workers == 2:
            row["reading"] = run("read", path=path)
        if count == SHARDS:
            examined = run("examine", path=path)
        rows.append({"workers": workers, **row})
        shutil.rmtree(cache)
    identical = hashes[2, 1] == hashes[2, 2]
    return {"by_size": rows, "one_and_two_workers_identical": identical, "doctor": examined}


def content_hash(path: str) -> str:
    """Hash of every file of a folder."""
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(path).rglob("*")):
        if file.is_file():
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def kill_and_resume(path: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Kills a preparation by two processes half way, and lets another finish it."""
    options = {"files": str(path), "vocab_size": 2000, "sample": 1_000_000}
    whole = run("prepare", **options, workers=1, cache_dir=str(folder / "whole"))
    process = start("prepare", {**options, "workers": 2, "cache_dir": str(folder / "killed")})
    while not finished_parts(folder / "killed"):
        assert process.poll() is None, "the preparation ended before it had a part"
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(10)  # its processes end with the part that they are at
    kept = finished_parts(folder / "killed")
    assert not list((folder / "killed").glob("stores/*/manifest.json"))
    resumed = run("prepare", **options, workers=2, cache_dir=str(folder / "killed"))
    return {
        "parts_kept": sorted(kept),
        "seconds_whole_and_resumed": [
            stage["seconds"]["tokenise_cpu"] for stage in (whole, resumed)
        ],
        "identical": content_hash(whole["path"]) == content_hash(resumed["path"]),
    }


def finished_parts(cache: pathlib.Path) -> list[str]:
    """Parts of a preparation under way."""
    return [path.name for path in cache.glob("stores/*.parts/*-of-*")]


def formats(path: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Speed of reading the documents of one shard in each format."""
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    with path.open() as file:
        texts = [json.loads(line)["text"] for line in file]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), folder / "a.parquet", row_group_size=1000
    )
    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()
    files = {
        "jsonl:text": path,
        "parquet:text": folder / "a.parquet",
        "arrayrecord": folder / "a.array_record",
    }
    found = {
        document: run(
            "documents_only", files=str(file), document=document, cache_dir=str(folder / "formats")
        )
        for document, file in files.items()
    }
    assert len({result.pop("sha256") for result in found.values()}) == 1
    return found


def long_documents(folder: pathlib.Path) -> list[dict[str, float]]:
    """Memory of tokenising, by one process, a single document beside a megabyte of others."""
    lexicon, rows = make_lexicon(0), []
    for megabytes in LONG_MEGABYTES:
        path, cache = folder / "long.jsonl", folder / "long"
        with path.open("w") as file:
            whole = "".join(documents(lexicon, 1, megabytes * 10**6))
            for text in [*documents(lexicon, 0, 10**6), whole]:
                file.write(json.dumps({"text": text}) + "\n")
        found = run(
            "prepare",
            files=str(path),
            valid_fraction=0.1,
            vocab_size=8000,
            sample=1_000_000,
            workers=1,
            cache_dir=str(cache),
        )
        rows.append({"document_mb": len(whole) / 1e6, "peak_rss_mb": found["peak_rss_mb"]})
        shutil.rmtree(cache)
    return rows


def main() -> None:
    """Measure and print one JSON object."""
    parser = script_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of text, in units of 2^30")
    parser.add_argument("--folder", type=pathlib.Path, help="for the corpus; default: temporary")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the numbers")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(STAGES[args.stage](args.options)))
        return
    result: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = pathlib.Path(name)
        began = time.perf_counter()
        paths = write_shards(folder, int(args.gigabytes * GIB))
        print(f"generated in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        result["formats"] = formats(paths[0], folder)
        result["long_documents"] = long_documents(folder)
        result["kill"] = kill_and_resume(paths[0], folder)
        result |= growth(paths, folder)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
