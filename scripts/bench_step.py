"""Train-step speed against PyTorch, interleaved in one run.

    pip install torch==2.13.0
    python scripts/bench_step.py [--cases=char,10M] [--repeats=7] [--json=FILE] [--jsonl=FILE]
    python scripts/bench_step.py --device=gpu [--cases=17M,124M] [--peers=PEER,...] [--seconds=S]

Every peer is a process with the same parameters and batch. All of a case start at the same time;
one that is not ready in time is left out and named. Then they take turns in blocks of steps, so
that a change of the machine's speed falls on all of them; while one runs, the others wait for
input. Reported are medians over the blocks and their ratios to the first peer. The losses of the
first updates must agree where the models are equal; if not, the exit code is 1.

char and 10M, for a CPU: a pre-norm decoder with LayerNorm without bias, learned positions, GELU and
a tied head; AdamW, global-norm clip at 1, float32. PyTorch uses `scaled_dot_product_attention` and
its fused AdamW; it reads its loss after every update, this trainer after a call of 5 updates, as
both do in practice. All processes get the same malloc settings.

17M and 124M, for a GPU: `configs/wikitext2.py`, and `configs/gpt2_124m.py` with one micro-batch of
32 rows and its layers unrolled, in bfloat16 against `torch.compile` under autocast; losses are read
after a block. At 124M the models are equal. At 17M PyTorch has the same matrix products in a
plainer model: no dropout, no rotary positions, queries and keys as they are, LayerNorm, GELU for
SwiGLU, AdamW for Muon, and no average of the weights. Behind the name of this trainer stand an
attention, "plain" where rows are not divided into documents, as PyTorch's never are, and "x8" for
8 updates in a call. Other attentions and x8 are compared with this trainer alone, in the cases "17M
variants" and "124M variants".
"""

import argparse
import json
import os
import pathlib
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers share a GPU

from benchmark import DEVICES, append, words
from gpu_peers import CASES, config_of, serve

from lm_jax.config.manual import script_parser

BLOCK_SECONDS = {"cpu": 2.0, "gpu": 0.4}
DEFAULT = {"cpu": "char,10M", "gpu": "17M,124M,17M variants,124M variants"}
# Largest relative difference of a loss, and of how many first updates.
TOLERANCE = {"float32": (2e-4, 5), "bfloat16": (1e-2, 3)}
Emit = Callable[..., None]


class Process:
    """The other end of `serve`."""

    def __init__(self, case: str, peer: str, device: str):
        """Start the peer."""
        args = [f"--serve={peer}", f"--cases={case}", f"--device={device}"]
        env = os.environ | ({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, __file__, *args], stdin=pipe, stdout=pipe, text=True, env=env
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def read(self, until: float) -> dict[str, Any]:
        """The next answer, at the latest when `time.perf_counter()` is `until`."""
        began = time.perf_counter()
        try:
            line = self.lines.get(timeout=max(0.01, until - began))
        except queue.Empty:
            raise TimeoutError(f"no answer within {until - began:.0f} s") from None
        row = json.loads(line) if line else {"error": "its process died"}
        if "error" in row:
            raise RuntimeError(row["error"])
        return row

    def run(self, calls: int, patience: float) -> dict[str, Any]:
        """Run `calls` calls of the peer's step, which take at most so many seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        return self.read(time.perf_counter() + patience)

    def close(self) -> None:
        """End the peer, which need not listen."""
        self.process.kill()
        self.process.wait()


def start(
    case: str, peers: list[str], device: str, patience: tuple[float, float], emit: Emit
) -> tuple[dict[str, Process], dict[str, dict[str, Any]]]:
    """Start all peers at once; those that are ready in time, and what they said of themselves.

    It waits `patience[0]` seconds for all of them, and `patience[1]` where none was ready by then.
    """
    began = time.perf_counter()
    cfg = config_of(CASES[case])
    tokens = cfg.data.batch_size * cfg.data.seq_len
    starting = {peer: Process(case, peer, device) for peer in peers}
    processes: dict[str, Process] = {}
    said: dict[str, dict[str, Any]] = {}
    while starting and time.perf_counter() - began < patience[not processes]:
        time.sleep(0.05)
        for peer, process in list(starting.items()):
            if process.lines.empty():
                continue
            del starting[peer]
            try:
                said[peer] = process.read(time.perf_counter())
            except Exception as error:  # whatever it is, it goes into the report
                process.close()
                emit(peer=peer, not_run=words(error).removeprefix("RuntimeError: "))
                continue
            processes[peer] = process
            after = round(time.perf_counter() - began, 1)
            emit(peer=peer, tokens=tokens, ready_after=after, **said[peer])
    for peer, process in starting.items():
        process.process.kill()
        emit(peer=peer, not_run=f"not ready after {time.perf_counter() - began:.0f} s")
    for process in starting.values():
        process.close()
    ready = {peer: said[peer] for peer in peers if peer in processes}
    compare(case, ready, emit)
    return {peer: processes[peer] for peer in ready}, ready


def compare(case: str, ready: dict[str, dict[str, Any]], emit: Emit) -> None:
    """Whether the first losses of all peers are those of the first."""
    tolerance, count = TOLERANCE[config_of(CASES[case]).train.compute_dtype]
    for peer, row in ready.items():
        first = next(iter(ready))
        if CASES[case].equal or (peer.startswith("lm_jax") and first.startswith("lm_jax")):
            pairs = zip(row["losses"][:count], ready[first]["losses"], strict=False)
            row["differs"] = max(abs(a / b - 1) for a, b in pairs)
            row["agrees"] = row["differs"] <= tolerance  # False for NaN
            emit(peer=peer, differs=row["differs"], agrees=row["agrees"])


def bench(
    case: str, peers: list[str], args: argparse.Namespace, seconds: float, emit: Emit
) -> dict[str, Any]:
    """Interleaved blocks of all peers at one case, in so many seconds."""
    block = args.block_seconds or BLOCK_SECONDS[args.device]
    turns = 1.5 * len(peers) * (args.repeats + 1) * block
    until = time.perf_counter() + seconds
    patience = max(0.5 * seconds, seconds - turns - 3)
    longest = max(patience, seconds - 2)
    processes, ready = start(case, peers, args.device, (patience, longest), emit)
    open_ = list(processes.values())
    try:
        step_ms = take_turns(processes, ready, args.repeats, block, until, emit)
    finally:
        for process in open_:
            process.close()
    return summary(case, ready, step_ms)


def take_turns(
    processes: dict[str, Process],
    ready: dict[str, dict[str, Any]],
    repeats: int,
    block: float,
    until: float,
    emit: Emit,
) -> dict[str, list[float]]:
    """Milliseconds of an update of each peer in every turn; one turn, however late it is."""
    step_ms: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for turn in range(-1, repeats):  # the first is to learn how many calls fill a block
        if turn > 0 and time.perf_counter() > until:
            break
        for peer, process in list(processes.items()):
            # A peer that takes longer for a block hangs.
            patience = min(30.0, max(5.0, until - time.perf_counter())) + 10 * block
            try:
                if turn < 0:
                    process.run(2, patience)
                    calls[peer] = max(1, round(2 * block / process.run(2, patience)["seconds"]))
                    continue
                seconds = process.run(calls[peer], patience)["seconds"]
            except Exception as error:
                emit(peer=peer, not_run=words(error).removeprefix("RuntimeError: "))
                processes.pop(peer).close()
                continue
            found = 1e3 * seconds / (calls[peer] * ready[peer]["count"])
            step_ms.setdefault(peer, []).append(found)
            emit(turn=turn, step_ms={peer: found})
    return step_ms


def summary(case: str, ready: dict[str, Any], step_ms: dict[str, list[float]]) -> dict[str, Any]:
    """What is kept of a case."""
    cfg = config_of(CASES[case])
    tokens = cfg.data.batch_size * cfg.data.seq_len
    medians = {peer: statistics.median(values) for peer, values in step_ms.items()}
    first = next(iter(medians), "")
    return {
        "first_losses": {peer: row["losses"] for peer, row in ready.items()},
        "agrees": {peer: row["agrees"] for peer, row in ready.items() if "agrees" in row},
        "versions": {peer: row["version"] for peer, row in ready.items()},
        "step_ms": step_ms,
        "tokens_per_second": {peer: 1e3 * tokens / ms for peer, ms in medians.items()},
        "speed_against": {p: ms / medians[first] for p, ms in medians.items() if p != first},
    }


def show(case: str, result: dict[str, Any]) -> None:
    """One line a peer."""
    for peer, values in result["step_ms"].items():
        ratio = result["speed_against"].get(peer)
        print(
            f"{case:13} {peer:20} {statistics.median(values):8.1f} ms "
            f"{result['tokens_per_second'][peer]:9,.0f} tok/s"
            + (f"  {next(iter(result['step_ms']))} is {ratio:.2f}x as fast" if ratio else "")
            + ("" if result["agrees"].get(peer, True) else "  ITS LOSSES DIFFER"),
            flush=True,
        )


def main() -> None:
    """Time all cases and print a table."""
    parser = script_parser(__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="of all peers")
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--peers", help="comma-separated; default: those of the case")
    parser.add_argument("--without", default="", help="peers that are left out, comma-separated")
    parser.add_argument("--repeats", type=int, default=7, help="blocks per peer")
    parser.add_argument("--block_seconds", type=float, help="default: 2 on a CPU, 0.4 on a GPU")
    parser.add_argument("--seconds", type=float, default=3600, help="for all, shared by the cases")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all numbers at the end")
    parser.add_argument("--jsonl", type=pathlib.Path, help="file to which each figure adds a line")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(CASES[args.cases], args.serve, args.device)
        return
    until = time.perf_counter() + args.seconds
    names = (args.cases or DEFAULT[args.device]).split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases: {unknown} are none of {', '.join(CASES)}")
    results: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    without = args.without.split(",")
    chosen = args.peers.split(",") if args.peers else None
    peers = {name: [p for p in chosen or CASES[name].peers if p not in without] for name in names}
    names = [name for name in names if chosen or len(peers[name]) > 1]  # one alone shows nothing
    for i, name in enumerate(names):

        def emit(name: str = name, **row: Any) -> None:
            if "not_run" in row:
                print(f"{name:13} {row['peer']:20} not run: {row['not_run']}", flush=True)
            append(args.jsonl, {"part": "steps", "case": name, **row})

        now = time.perf_counter()  # what a case leaves over goes to those after it
        share = CASES[name].share / sum(CASES[n].share for n in names[i:])
        results[name] = bench(name, peers[name], args, share * (until - now), emit)
        show(name, results[name])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(not all(all(results[name]["agrees"].values()) for name in names))


if __name__ == "__main__":
    main()
