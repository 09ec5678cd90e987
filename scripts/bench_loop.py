"""What surrounds the step: input wait, evaluation speed, time to the first update.

    python scripts/bench_loop.py --config=configs/wikitext2_cpu.py --source_dir=DIR [--updates=60]
    python scripts/bench_loop.py --overlap [--updates=60]

Trains some updates in a temporary workdir through the normal loop and reads `metrics.jsonl`; then
times, in turns, evaluation of the valid split (data path included) and the bare forward and loss
part of the training step on one batch that is already on the device. Last, starts the quickstart
in a process of its own and waits for its first row of metrics.

With --overlap it times the parts of the loop instead, on 8 pretended devices of one process and in
2 processes, around a step of products and a host that sleeps for as long as it might read and log.
In 0.4 several processes agreed on a signal in every call, which waited for the step. A batch may be
put on the devices just before its call is dispatched, or before the loop waits for the call before.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import platform
import socket
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

STEP, SIZE, HOST = 8, 512, 0.02  # products of a step, their size; seconds that the host takes


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


def overlap(updates: int) -> dict[str, Any]:
    """Milliseconds of the parts of a call, by how many share them."""
    eight = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = [
        os.environ
        | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "XLA_FLAGS": ""}
        | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(n)}
        for n in range(2)
    ]
    found = {}
    for name, several in (("8 devices", [eight]), ("2 processes", two)):
        command = [sys.executable, __file__, "--parts", f"--updates={updates}"]
        children = [
            subprocess.Popen(command, env=one | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE)
            for one in several
        ]
        said = [one.communicate()[0] for one in children]
        assert all(one.returncode == 0 for one in children)
        found[name] = json.loads(said[0].splitlines()[-1])
    return found


def parts(updates: int) -> dict[str, float]:
    """The same in this process: medians of all calls."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from lm_jax import processes, sharding, signals
    from lm_jax.config import Config

    processes.join_others(Config().cluster)
    mesh, rows = sharding.make_mesh(Config().mesh), 32 // jax.process_count()
    batch = {name: np.ones((1, rows, 1025), np.int32) for name in ("tokens", "segment_ids")}
    batch["weights"] = np.ones((1, rows, 1025), np.float32)
    shared = signals.Shared(mesh)

    @jax.jit
    def step(x, batch):
        y = sum(value.sum() for value in batch.values())
        for _ in range(STEP // jax.local_device_count()):
            x = jax.numpy.tanh(x @ x)
        return x, {"loss": x.sum() + y}

    def put():
        return sharding.put_batch(mesh, batch, axis=1)

    def loop(agrees: bool, ahead: bool) -> dict[str, float]:
        state, pending, placed = jax.numpy.ones((SIZE, SIZE)), None, put()
        seconds: dict[str, list[float]] = {"call": [], "agree": [], "put": []}

        def timed(name, function):
            began = time.perf_counter()
            value = function()
            seconds[name].append(time.perf_counter() - began)
            return value

        for _ in range(updates):
            began = time.perf_counter()
            if not ahead:
                placed = timed("put", put)
            state, metrics = step(state, placed)
            answer = None if agrees else timed("agree", shared.ask)
            if ahead:
                placed = timed("put", put)
            if pending is not None:
                jax.device_get(pending)
            pending = metrics, answer
            if agrees:
                timed("agree", lambda: multihost_utils.process_allgather(np.int32(0)))
            time.sleep(HOST)
            seconds["call"].append(time.perf_counter() - began)
        jax.block_until_ready(state)
        return {name: 1e3 * statistics.median(values[3:]) for name, values in seconds.items()}

    def bare() -> float:
        state, placed, times = jax.numpy.ones((SIZE, SIZE)), put(), []
        for _ in range(updates):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, placed))
            times.append(time.perf_counter() - began)
        return 1e3 * statistics.median(times[3:])

    ways = {"now": (False, False), "put_ahead": (False, True)}
    if jax.process_count() > 1:
        ways["agreed_in_every_call"] = True, False
    found: dict[str, list[float]] = collections.defaultdict(list)
    with jax.set_mesh(mesh):
        for _ in range(5):  # in turns
            found["step_ms"].append(bare())
            for name, way in ways.items():
                for part, ms in loop(*way).items():
                    found[f"{name}_{part}_ms"].append(ms)
    return {"host_ms": 1e3 * HOST} | {k: statistics.median(v) for k, v in found.items()}


def main() -> None:
    """Measure and print one JSON object."""
    parser = script_parser(__doc__)
    parser.add_argument("--config", help="of the run that is timed")
    parser.add_argument("--overlap", action="store_true", help="time the parts of the loop alone")
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--source_dir", default="")
    parser.add_argument("--updates", type=int, default=60, help="that are timed")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the numbers")
    args = parser.parse_args()
    keep_freed_memory()
    if args.parts:
        print(json.dumps(parts(args.updates)))
        return
    if args.overlap:
        command = f"python scripts/bench_loop.py --overlap --updates={args.updates}"
        today = datetime.date.today().isoformat()
        device = f"{os.cpu_count()} CPU cores ({platform.machine()})"
        found = {"device": device, "date": today, "command": command} | overlap(args.updates)
        tell(found, args.json)
        return
    if not args.config:
        parser.error("give --config or --overlap.")
    cfg = load_config(args.config)
    cfg.data.source_dir = args.source_dir
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        result = {"first_update_seconds": first_update(workdir / "quickstart")}
        result |= bench_loop(cfg, workdir / "run", args.updates)
    tell(result, args.json)


def tell(result: dict[str, Any], path: pathlib.Path | None) -> None:
    """Print it, and write it where it was asked for."""
    print(json.dumps(result, indent=1))
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
