"""What the benchmarks share: the machine in words, its clock, peers that take turns, and files."""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import lm_jax  # noqa: F401  says where CUDA is, which JAX reads when it is imported

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config.manual import script_parser

BLOCK_SECONDS = {"cpu": 0.2, "gpu": 0.1}  # of one peer in one turn
DEVICES = {"cpu": "cpu", "gpu": "cuda,cpu"}  # and what JAX calls them


class Peer(Protocol):
    """Something that can be timed."""

    def seconds(self, runs: int) -> float:
        """Wall time of so many runs."""


class Steps:
    """A step whose state goes from call to call."""

    def __init__(self, call: Callable[[Any, Any], tuple[Any, Any]], state: Any, batch: Any):
        """Compile it: `call(state, batch) -> (state, what to wait for)`."""
        self.call, self.state, self.batch = call, state, batch
        self.seconds(1)

    def seconds(self, runs: int) -> float:
        """Wall time of so many calls."""
        began = time.perf_counter()
        for _ in range(runs):
            self.state, result = self.call(self.state, self.batch)
        jax.block_until_ready(result)
        return time.perf_counter() - began


def random_batch(rows: int, length: int, vocab_size: int) -> dict[str, jax.Array]:
    """Rows of random tokens, each one document, every token scored."""
    tokens = np.random.default_rng(0).integers(1, vocab_size, (rows, length + 1)).astype(np.int32)
    ones = np.ones_like(tokens)
    batch = {"tokens": tokens, "segment_ids": ones, "weights": ones.astype(np.float32)}
    return jax.device_put(batch)


def device() -> str:
    """The word gpu or cpu."""
    return "gpu" if jax.default_backend() == "gpu" else "cpu"


def machine() -> dict[str, Any]:
    """Device and versions, and the clock at the start."""
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "clock_tflops": [clock()],
    }


def clock() -> float:
    """TFLOP/s of a square matrix product, the best of five."""
    n, dtype = (8192, jnp.bfloat16) if device() == "gpu" else (2048, jnp.float32)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        product(a).block_until_ready()
        rates.append(2e-12 * n**3 / (time.perf_counter() - began))
    return max(rates)


def take_turns(
    peers: Mapping[str, Peer], turns: int, block: float | None = None
) -> dict[str, list[float]]:
    """Milliseconds of one run of each peer in every turn, which takes about `block` seconds.

    All take a turn before any takes the next, so that a change of the machine's speed falls on all.
    """
    block = block or BLOCK_SECONDS[device()]
    runs = {name: max(1, round(3 * block / peer.seconds(3))) for name, peer in peers.items()}
    found: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(turns):
        for name, peer in peers.items():
            found[name].append(1e3 * peer.seconds(runs[name]) / runs[name])
    return found


def arguments(about: str, cases: Mapping[str, Any], repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags that the benchmarks of kernels have in common."""
    parser = script_parser(about)
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(cases)}")
    parser.add_argument("--without", default="", help="peers that are left out, comma-separated")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of each peer")
    parser.add_argument("--block_seconds", type=float, help="length of a turn")
    parser.add_argument("--seconds", type=float, default=420, help="begin no case after so many")
    parser.add_argument("--device", choices=DEVICES, help="default: the one that JAX finds")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all numbers at the end")
    parser.add_argument("--jsonl", type=pathlib.Path, help="file to which each case adds a line")
    parser.add_argument("--plot", type=pathlib.Path, help="where to draw them")
    return parser


def chosen(args: argparse.Namespace, cases: Mapping[str, Any]) -> list[str]:
    """The names of the cases that were asked for, or those of the device, which is set.

    Raises:
        SystemExit: if there is no case of a name.
    """
    use(args.device)
    names = args.cases.split(",") if args.cases else [n for n in cases if n.startswith(device())]
    if unknown := [name for name in names if name not in cases]:
        raise SystemExit(f"--cases: {unknown} are none of {', '.join(cases)}")
    return names


def use(name: str | None) -> None:
    """Compute on the cpu or the gpu, whatever the environment says; None leaves it as it is."""
    if name:
        jax.config.update("jax_platforms", DEVICES[name])


def append(path: pathlib.Path | None, row: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file, which is on the disk afterwards; None is no file.

    It is written in one piece: a kill leaves no half of it, and processes do not mix theirs.
    """
    if path is None:
        return
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())
        os.fsync(file.fileno())


def together(makers: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Call all makers at once on a GPU, where most wait for compilers, and one by one elsewhere.

    Returns:
        By name a function that waits for the result, or raises what the maker raised.
    """
    if device() == "cpu":
        return dict(makers)
    pool = concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2))
    calls: dict[str, Callable[[], Any]] = {n: pool.submit(m).result for n, m in makers.items()}
    pool.shutdown(wait=False)
    return calls


def words(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def plot(titles: Mapping[str, Mapping[str, Any]], path: pathlib.Path, columns: int = 1) -> None:
    """Bars for each title: how many times as fast the first peer is as each of the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = math.ceil(len(titles) / columns)
    size = (4 + 4 * columns, 2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, peers) in zip(axes.flat, titles.items(), strict=True):
        ratios = {peer: result.get("speed_ratio", math.nan) for peer, result in peers.items()}
        axis.barh([*ratios][1:], [*ratios.values()][1:])
        axis.axvline(1, color="black")
        axis.set_title(f"{title}: speed of {next(iter(ratios))} over that of")
    figure.savefig(path)
