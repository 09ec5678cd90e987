"""What surrounds the step: input wait, evaluation speed, time to the first update.

    python scripts/bench_loop.py --config=configs/wikitext2_cpu.py --source_dir=DIR [--updates=60]

Trains some updates in a temporary workdir through the normal loop and reads `metrics.jsonl`; then
times, in turns, evaluation of the valid split (data path included) and the bare forward and loss
part of the training step on one batch that is already on the device. Last, starts the quickstart
in a process of its own and waits for its first row of metrics.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from lm_jax.config.flags import load_config
from lm_jax.config.manual import script_parser
from lm_jax.main import keep_freed_memory
from lm_jax.objective import NextToken
from lm_jax.workdir import METRICS, open_trained, read_metrics


def bench_loop(cfg: Any, workdir: pathlib.Path, updates: int) -> dict[str, float]:
    """Input wait of a real run, and evaluation against the forward part, in tokens/s."""
    import jax

    from lm_jax import evaluate, sharding, step
    from lm_jax.config import Duration
    from lm_jax.data import windows
    from lm_jax.loop import train_and_evaluate

    cfg.train.steps, cfg.optim.warmup = Duration(str(updates)), Duration("1")
    cfg.train.eval_every, cfg.eval.splits = Duration("0"), "valid"
    train_and_evaluate(cfg, workdir)
    waits = [row["perf/input_wait"] for row in read_metrics(workdir) if "perf/input_wait" in row][
        5:
    ]

    run = open_trained(workdir)
    evaluator = evaluate.Evaluator(
        run.cfg, run.store, run.mesh, step.make_eval_step(run.cfg, run.graphdef)
    )
    dtype = jax.numpy.dtype(run.cfg.train.compute_dtype)

    @jax.jit
    def forward(params, batch):
        return NextToken(run.graphdef, dtype).scored(params, batch)

    split = run.store.split("valid")
    batches = windows.eval_batches(
        split,
        seq_len=run.cfg.data.seq_len,
        batch_size=run.cfg.data.batch_size,
        document_mask=run.cfg.data.document_mask,
    )
    batch = sharding.put_batch(run.mesh, next(batches), axis=0)
    calls = -(-len(split.tokens) // (run.cfg.data.batch_size * run.cfg.data.seq_len))
    seconds: dict[str, list[float]] = {"evaluation": [], "forward": []}
    for _ in range(4):
        began = time.perf_counter()
        evaluator(run.params, "valid")
        seconds["evaluation"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(forward(run.params, batch))
        seconds["forward"].append(time.perf_counter() - began)
    # The first of each includes its compilation.
    speed = {k: len(split.tokens) / statistics.median(v[1:]) for k, v in seconds.items()}
    return {
        "input_wait": statistics.mean(waits),
        "evaluation_tokens_per_second": speed["evaluation"],
        "forward_tokens_per_second": speed["forward"],
        "evaluation_against_forward": speed["evaluation"] / speed["forward"],
    }


def first_update(workdir: pathlib.Path) -> float:
    """Seconds from the start of the quickstart's process to its first row of metrics."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lm_jax.main", "--config=configs/quickstart.py"]
        + [f"--workdir={workdir}", f"--config.data.cache_dir={workdir}/cache"],
        stdout=subprocess.DEVNULL,
    )
    metrics = workdir / METRICS
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, "the quickstart ended without a row of metrics"
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def main() -> None:
    """Measure and print one JSON object."""
    parser = script_parser(__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--source_dir", default="")
    parser.add_argument("--updates", type=int, default=60, help="that are timed")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the numbers")
    args = parser.parse_args()
    keep_freed_memory()
    cfg = load_config(args.config)
    cfg.data.source_dir = args.source_dir
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        result = {"first_update_seconds": first_update(workdir / "quickstart")}
        result |= bench_loop(cfg, workdir / "run", args.updates)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
