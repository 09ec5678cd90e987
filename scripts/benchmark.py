"""What the benchmarks share: the machine in words, its clock, and peers that take turns."""

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_SECONDS = {"cpu": 0.2, "gpu": 0.1}  # of one peer in one turn


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


def take_turns(peers: Mapping[str, Peer], turns: int) -> dict[str, list[float]]:
    """Milliseconds of one run of each peer in every turn.

    All take a turn before any takes the next, so that a change of the machine's speed falls on all.
    """
    block = BLOCK_SECONDS[device()]
    runs = {name: max(1, round(3 * block / peer.seconds(3))) for name, peer in peers.items()}
    found: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(turns):
        for name, peer in peers.items():
            found[name].append(1e3 * peer.seconds(runs[name]) / runs[name])
    return found
