"""A training of `configs/wikitext2.py` that ends with a test score within given seconds.

    python scripts/gpu_train.py --jsonl=FILE --out=DIR --seconds=S [--source_dir=DIR] [--toy]

The run is shortened to as many updates as fit, by the speed of the step in FILE if it is there. One
that is late all the same is told to stop, and its best checkpoint is scored.
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import benchmark
from gpu_table import read

from lm_jax import config
from lm_jax.config import rules
from lm_jax.config.flags import load_module
from lm_jax.config.manual import script_parser
from lm_jax.config.resolve import resolve
from lm_jax.data import windows as pipeline
from lm_jax.data.open import open_data

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "wikitext2.py"
SPANS = 6  # evaluations
CALL = 8  # updates in a call
OVERHEAD = 60.0  # seconds for start, compilation, evaluations, saving and the report
RESERVE = 35.0  # seconds before the end at which a late run is told to stop
SCORES = "loss token_ppl word_ppl bits_per_byte accuracy token_count step references".split()
TOY = {
    "model.layers": 1,
    "model.d_model": 32,
    "model.heads": 2,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "eval.batch_size": 64,
    "eval.stride": 0,
    "tokenizer.vocab_size": 1024,
}


def step_ms(path: pathlib.Path) -> float:
    """Milliseconds of an update, as measured, or of an H200."""
    rows = [row for row in read(path) if row["part"] == "steps" and "turn" in row]
    for case, peer in (("17M variants", f"lm_jax x{CALL}"), ("17M", "lm_jax")):
        found = [row["step_ms"].get(peer) for row in rows if row["case"] == case]
        if found := [ms for ms in found if ms]:
            return statistics.median(found)
    return 8.2


def plan(args: argparse.Namespace) -> tuple[list[str], int]:
    """Flags of the training, and the number of updates of the whole run of the config."""
    changes: dict[str, Any] = dict(TOY) if args.toy else {}
    for name in ("source_dir", "cache_dir"):
        if getattr(args, name):
            changes[f"data.{name}"] = getattr(args, name)
    cfg = load_module(CONFIG).get_config()
    cfg = config.replace(cfg, **{k.replace(".", "__"): v for k, v in changes.items()})
    train = open_data(rules.validate(cfg)).split("train")
    windows = pipeline.count_windows(train, cfg.data.seq_len, cfg.data.window_offset)
    resolved = resolve(cfg, windows=windows)
    whole = int(resolved.train.steps)
    fit = max(0, int(1e3 * (args.seconds - OVERHEAD) / (1.05 * step_ms(args.jsonl))))
    span = max(1, (CALL * SPANS if args.toy else min(whole, fit)) // (CALL * SPANS)) * CALL
    changes |= {
        "doctor": "off",
        "train.steps": span * SPANS,
        "train.eval_every": span,
        "train.checkpoint_every": 0,
        "train.steps_per_call": CALL,
        "train.log_every": span,
        "optim.warmup": min(int(resolved.optim.warmup), span * SPANS // 10),
    }
    return [f"--config.{name}={value}" for name, value in changes.items()], whole


class Curve:
    """The valid scores of a run, passed on as they come."""

    def __init__(self, path: pathlib.Path, jsonl: pathlib.Path):
        """`path` is the run's `metrics.jsonl`."""
        self.path, self.jsonl, self.seen = path, jsonl, 0

    def look(self) -> None:
        """Write down what is new."""
        text = self.path.read_text() if self.path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        for row in map(json.loads, lines[self.seen :]):
            if "valid/loss" in row:
                found = {name: row[f"valid/{name}"] for name in ("loss", "word_ppl")}
                benchmark.append(self.jsonl, {"part": "train", "valid_at": row["step"], **found})
        self.seen = len(lines)

    def speed(self) -> dict[str, Any]:
        """Medians over the second half, and the time of all updates together."""
        text = self.path.read_text() if self.path.exists() else ""
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        rows = [row for row in rows if "perf/step_ms" in row]
        if not rows:
            return {"updates": 0}
        found: dict[str, Any] = {"updates": rows[-1]["step"]}
        found["update_seconds"] = sum(row["perf/step_ms"] for row in rows) / 1e3
        for name in ("tokens_per_second", "step_ms", "input_wait", "mfu"):
            values = [r[f"perf/{name}"] for r in rows[len(rows) // 2 :] if f"perf/{name}" in r]
            found[name] = statistics.median(values) if values else None
        return found


def train(command: list[str], curve: Curve, until: float, patience: float) -> tuple[int, bool]:
    """Run it, tell it to stop at `until`, and end it if it is still there `patience` later.

    Returns:
        Its exit code and whether it was stopped.
    """
    process = subprocess.Popen(command, cwd=ROOT)
    stopped = False
    while process.poll() is None:
        time.sleep(0.2)
        curve.look()
        if not stopped and time.perf_counter() > until:
            process.terminate()
            stopped = True
        if time.perf_counter() > until + patience:
            process.kill()
    curve.look()
    return process.returncode, stopped


def score(workdir: pathlib.Path, split: str, until: float, args: argparse.Namespace) -> bool:
    """Write down the scores of a split, computed now if the training has not; whether there are."""
    path = workdir / f"eval_{split}.json"
    left = until - time.perf_counter()
    command = [sys.executable, "-m", "lm_jax.evaluate", f"--workdir={workdir}", f"--split={split}"]
    if not path.exists() and left > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=ROOT, timeout=left)
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    found = {name: result[name] for name in SCORES}
    benchmark.append(args.jsonl, {"part": "train", "split": split, **found})
    shutil.copy(path, args.out)
    return True


def main() -> None:
    """Train, score and write down."""
    parser = script_parser(__doc__)
    parser.add_argument("--jsonl", type=pathlib.Path, required=True, help="results, a line each")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="for scores and config")
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--source_dir", help="folder with wiki.{train,valid,test}.tokens")
    parser.add_argument("--cache_dir", help="prepared data")
    parser.add_argument("--toy", action="store_true", help="a small model for a CPU")
    args = parser.parse_args()
    until = time.perf_counter() + args.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what there is is written even so
    benchmark.use("cpu")  # this process leaves the GPU to the training
    flags, whole = plan(args)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        curve = Curve(workdir / "metrics.jsonl", args.jsonl)
        main_ = [sys.executable, "-m", "lm_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
        began = time.perf_counter()
        reserve = min(RESERVE, 0.3 * args.seconds)
        code, stopped = None, True
        try:
            code, stopped = train([*main_, *flags], curve, until - reserve, 0.4 * reserve)
        finally:
            row = {"part": "train", "code": code, "stopped": stopped, "of": whole, "flags": flags}
            wall = time.perf_counter() - began
            benchmark.append(args.jsonl, row | {"wall_seconds": wall, **curve.speed()})
        scored = [score(workdir, split, until, args) for split in ("test", "valid")]
        if (workdir / "config.json").exists():
            shutil.copy(workdir / "config.json", args.out)
    sys.exit(not all(scored))


if __name__ == "__main__":
    main()
