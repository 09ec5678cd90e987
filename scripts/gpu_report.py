"""Measure everything that matters on a GPU in one go, and write the table for the README.

    python scripts/gpu_report.py [--minutes=8] [--parts=info,correct,steps,attention,loss,train]
        [--out=DIR] [--source_dir=DIR] [--cache_dir=DIR] [--autotune=FILE]
    python scripts/gpu_report.py --parts=table --out=DIR

Every part is a process of its own with a limit of time, so that a hang or a fault costs one part:

    info       device, driver, clocks, versions, speed of a matrix product and of copying
    correct    attention, the loss and whole updates against their definitions in float32
    steps      tokens a second of configs/wikitext2.py and configs/gpt2_124m.py, and of PyTorch;
               after that of their variants
    attention  the implementations of attention and their peers
    loss       linear layer with cross-entropy, and its peers
    train      WikiText-2 with configs/wikitext2.py, cut to the updates that fit, to its test score

Each figure is added to DIR/results.jsonl as it comes; what a part had measured when it was killed
stays. An implementation that `correct` finds wrong, or that raised or did not come back there, is
left out of the parts after it and named. The table is made from results.jsonl
alone, always: DIR/report.md and the terminal. DIR also gets log.txt, the scores and the config of
the training, and autotune.tgz, the choices of XLA's autotuner, which `--autotune` gives to the next
session.

Of `--minutes`, each part gets its share of what is left when it begins: 20 : 85 : 180 : 50 : 35 :
110, which are its seconds at the default of 8. What a part leaves over goes to those after it; the
limits never add up to more than `--minutes`.

Without a GPU everything runs at toy sizes. The exit code is 1 if a check failed or a part did not
end well.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmark import append
from gpu_table import Rows, left_out, read, report

from lm_jax.config.manual import script_parser

SCRIPTS = pathlib.Path(__file__).parent
SHARES = {"info": 20, "correct": 85, "steps": 180, "attention": 50, "loss": 35, "train": 110}
WORK = pathlib.Path(tempfile.gettempdir()) / "lm_jax_gpu_report"
TUNED = "xla_gpu_per_fusion_autotune_cache_dir"  # JAX's name of it, in the compilation cache
LARGEST = 16_000_000  # bytes of a file in the folder
PALLAS = ("pallas", "pallas_deterministic")
ATTENTION = (
    "gpu_17m gpu_17m_documents gpu_124m gpu_124m_documents gpu_c128_t1024 gpu_c128_t4096 "
    "gpu_c64_t4096 gpu_c64_t2048"
).split()
# Peers that do not run beside the newest JAX, or could hang, or take long to compile.
APART = "tokamax xla,tokamax chunked_xla,tokamax triton,tokamax mosaic,jax triton,jax mosaic"
SLOW = "blockwise,optax"
TOY_WITHOUT = "lm_jax plain,lm_jax xla"


def on_gpu() -> bool:
    """Whether JAX will compute on an NVIDIA GPU; JAX itself is not asked, it would take memory."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and pathlib.Path("/dev/nvidiactl").exists()


def script(name: str, results: pathlib.Path, *args: str) -> list[str]:
    """The command that runs a script of this folder, which adds its figures to `results`."""
    return [sys.executable, str(SCRIPTS / name), f"--jsonl={results}", *args]


def commands(part: str, args: argparse.Namespace, seconds: float, rows: Rows) -> list[list[str]]:
    """The processes of a part, which run side by side for at most so many seconds."""
    gpu, results = on_gpu(), args.out / "results.jsonl"
    toy = [] if gpu else ["--toy"]
    device = f"--device={'gpu' if gpu else 'cpu'}"
    short = ["--repeats=2", "--block_seconds=0.02"]
    wrong = sorted(left_out(rows))
    sizes = "17M,124M" if gpu else "17M toy,124M toy"
    if part == "info":
        return [script("gpu_info.py", results, f"--cases={sizes}")]
    if part == "correct":
        begin = f"--seconds={0.9 * seconds:.0f}"
        groups = ("xla,cudnn,blockwise", ",".join(PALLAS))  # a hang of the latter costs itself only
        return [script("gpu_correct.py", results, begin, f"--impls={g}", *toy) for g in groups]
    if part == "steps":
        without = step_peers_without(rows, wrong) + ([] if gpu else TOY_WITHOUT.split(","))
        block = ["--repeats=5", "--block_seconds=0.25"] if gpu else short
        cases = f"{sizes},17M variants,124M variants" if gpu else "124M toy,17M toy variants"
        how = [device, f"--cases={cases}", f"--without={','.join(without)}", *block]
        return [script("bench_step.py", results, *how, f"--seconds={0.92 * seconds:.0f}")]
    block = ["--repeats=5", "--block_seconds=0.02"] if gpu else short
    apart = f"--without={','.join([APART, *([SLOW] if gpu else []), *wrong])}"
    if part == "attention":
        how = [device, f"--cases={','.join(ATTENTION) if gpu else 'toy'}", apart, *block]
        return [script("bench_attention.py", results, *how, f"--seconds={0.75 * seconds:.0f}")]
    if part == "loss":
        how = [device, f"--cases={'gpu_17m,gpu_124m,gpu_kl' if gpu else 'toy'}", apart, *block]
        return [script("bench_loss.py", results, *how, f"--seconds={0.6 * seconds:.0f}")]
    folders = [f"--{n}={getattr(args, n)}" for n in ("source_dir", "cache_dir") if getattr(args, n)]
    how = [f"--out={args.out}", f"--seconds={seconds - 8:.0f}", *folders, *toy]
    return [script("gpu_train.py", results, *how)]


def step_peers_without(rows: Rows, wrong: list[str]) -> list[str]:
    """Peers of the step that are left out: wrong ones, and those that "auto" stands for anyway."""
    auto = {(row["case"], row["peer"]): row["attention"] for row in rows if "reason" in row}
    found = [f"lm_jax {impl}{plain}" for impl in wrong for plain in ("", " plain")]
    for plain in ("", " plain"):
        chosen = {impl for (_, peer), impl in auto.items() if peer == f"lm_jax{plain}"}
        if len(chosen) == 1:
            found.append(f"lm_jax {chosen.pop()}{plain}")
    return found


def environment(part: str) -> dict[str, str]:
    """Variables of a part's processes."""
    cache = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", WORK / "jax_cache"))
    # `correct` autotunes nothing, and what it compiles must not be taken for tuned.
    cache = cache / "untuned" if part == "correct" else cache
    path = [str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def run(part: str, processes: list[list[str]], seconds: float, log: Any) -> dict[str, Any]:
    """Run the processes of a part side by side; how they ended."""
    began = time.perf_counter()
    how: dict[str, Any] = dict(stdout=log, stderr=log, start_new_session=True, cwd=SCRIPTS.parent)
    started = [subprocess.Popen(args, env=environment(part), **how) for args in processes]
    killed = False
    try:
        for process in started:
            process.wait(max(0.1, seconds - 3 - (time.perf_counter() - began)))
    except subprocess.TimeoutExpired:
        killed = True
    finally:
        end(started)
    codes = [process.returncode for process in started]
    took = round(time.perf_counter() - began, 1)
    return {"part": "end", "of": part, "codes": codes, "killed": killed, "seconds": took}


def end(started: list[subprocess.Popen]) -> None:
    """End processes with all that they started."""
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 1.0)):
        until = time.perf_counter() + patience
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.01, until - time.perf_counter()))


def measure(args: argparse.Namespace, parts: list[str]) -> Iterator[dict[str, Any]]:
    """Run the parts; a row about the end of each."""
    until = time.perf_counter() + 60 * args.minutes
    with (args.out / "log.txt").open("a") as log:
        for i, part in enumerate(parts):
            share = SHARES[part] / sum(SHARES[p] for p in parts[i:])
            seconds = share * (until - time.perf_counter())
            print(f"== {part}: at most {seconds:.0f} s", flush=True)
            print(f"== {part}", file=log, flush=True)
            rows = read(args.out / "results.jsonl")
            yield run(part, commands(part, args, seconds, rows), seconds, log)


def write(out: pathlib.Path) -> tuple[str, bool]:
    """The table of all that is there by now, also as a file; whether nothing is wrong."""
    text, fine = report(read(out / "results.jsonl"))
    (out / "report.md").write_text(text)
    return text, fine


def pack(out: pathlib.Path) -> None:
    """Put the autotuner's choices into the folder, and cut what is too large."""
    cache = pathlib.Path(environment("")["JAX_COMPILATION_CACHE_DIR"])
    packed = out / "autotune.tgz"
    if (cache / TUNED).is_dir():
        with tarfile.open(packed, "w:gz") as tar:
            tar.add(cache / TUNED, TUNED)
        if packed.stat().st_size > LARGEST:
            packed.unlink()
    log = out / "log.txt"
    if log.exists() and log.stat().st_size > LARGEST:
        log.write_bytes(log.read_bytes()[-LARGEST // 2 :])


def main() -> None:
    """Run the parts and write the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together")
    parser.add_argument("--parts", default=",".join(SHARES), help="or table: from what is there")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_report"))
    parser.add_argument("--source_dir", help="folder with wiki.{train,valid,test}.tokens")
    parser.add_argument("--cache_dir", help="prepared data")
    parser.add_argument("--autotune", type=pathlib.Path, help="autotune.tgz of another session")
    args = parser.parse_args()
    parts = [] if args.parts == "table" else args.parts.split(",")
    if unknown := [part for part in parts if part not in SHARES]:
        parser.error(f"--parts: {unknown} are none of {', '.join(SHARES)}, table")
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.autotune:
        with tarfile.open(args.autotune) as tar:
            tar.extractall(environment("")["JAX_COMPILATION_CACHE_DIR"], filter="data")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the table is written even so
    try:
        for row in measure(args, parts):
            append(args.out / "results.jsonl", row)
            write(args.out)
            pack(args.out)
    finally:
        if parts:
            pack(args.out)
        text, fine = write(args.out)
        print(text)
    sys.exit(not fine)


if __name__ == "__main__":
    main()
