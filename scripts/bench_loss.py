"""Linear layer and loss in one operation against the same with all logits, in one process.

    python scripts/bench_loss.py [--cases=...] [--repeats=20] [--without=PEER,...] [--json=FILE]
        [--jsonl=FILE] [--plot=FILE] [--chunk_rows=N,...] [--block_seconds=S] [--device=cpu|gpu]

One run is the loss and its gradients by hidden states and head. The peers take turns, so that a
change of the machine's speed falls on all of them; reported are medians over the repeats, the
median of the ratios to this package within a repeat, and the temporary memory that XLA plans for
one run (for PyTorch on a GPU: the peak it allocated). The speed of a square matrix product before
and after says whether the clock held. Every peer's value and norm of the head gradient are
compared with this package's; a peer that cannot run is reported with the reason.

JAX peers run in a loop inside one jit in which every run depends on the one before. Head matrix
and head gradient are float32, the products in the dtype of the case. Without `--cases`, the device
decides; no new case is begun after `--seconds`, so that on an H200 the whole ends within 8 minutes.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its share

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from benchmark import append, arguments, chosen, clock, machine, plot, take_turns, together, words

from lm_jax import loss
from lm_jax.kernels.linear_divergence import Member, linear_divergence
from lm_jax.kernels.linear_loss import linear_cross_entropy
from lm_jax.main import keep_freed_memory
from lm_jax.models.layers import head_logits


class Case(NamedTuple):
    """What is computed: on rows of 512 tokens, hidden states `width` wide."""

    tokens: int
    width: int
    vocabulary: int
    dtype: str
    kind: str = "cross-entropy"  # or "divergence", from a teacher of the same width
    timed: bool = True  # False: compile only, for the memory


CASES = {
    "cpu_16k": Case(4096, 256, 16_384, "float32"),
    "cpu_50k": Case(8192, 768, 50_257, "float32", timed=False),
    "cpu_50k_bf16": Case(8192, 768, 50_257, "bfloat16", timed=False),
    "cpu_kl": Case(4096, 256, 16_384, "float32", kind="divergence"),
    "toy": Case(512, 32, 300, "bfloat16"),
    "gpu_17m": Case(16_384, 384, 16_384, "bfloat16"),
    "gpu_124m": Case(32_768, 768, 50_304, "bfloat16"),
    "gpu_16k_d256": Case(65_536, 256, 16_384, "bfloat16"),
    "gpu_16k": Case(65_536, 768, 16_384, "bfloat16"),
    "gpu_50k": Case(65_536, 768, 50_257, "bfloat16"),
    "gpu_128k": Case(16_384, 768, 128_256, "bfloat16"),
    "gpu_kl": Case(16_384, 768, 50_257, "bfloat16", kind="divergence"),
}
OURS = "lm_jax"
Arrays = tuple[jax.Array, ...]


def abstract(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Hidden states, head, then what the kind needs besides; weights last."""
    rows = (case.tokens // 512, 512)
    x = jax.ShapeDtypeStruct((*rows, case.width), case.dtype)
    head = jax.ShapeDtypeStruct((case.vocabulary, case.width), jnp.float32)
    weights = jax.ShapeDtypeStruct(rows, jnp.float32)
    if case.kind == "divergence":
        return x, head, x, head, weights
    return x, head, jax.ShapeDtypeStruct(rows, jnp.int32), weights


def draw(case: Case) -> Arrays:
    """Values for `abstract`, logits of unit variance."""

    def array(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.dtype == jnp.int32:
            return jax.random.randint(key, like.shape, 0, case.vocabulary)
        if like.ndim == 2 and like.shape[0] == case.vocabulary:
            return jax.random.normal(key, like.shape) * case.width**-0.5
        return jax.random.normal(key, like.shape, like.dtype)

    likes = abstract(case)
    keys = jax.random.split(jax.random.key(0), len(likes))
    arrays = [jax.jit(array, static_argnums=1)(k, a) for k, a in zip(keys, likes, strict=True)]
    return *arrays[:-1], jnp.ones_like(arrays[-1])


def materialised_divergence(x, head, y, other, weights):
    """KL(teacher || student) from all logits of both."""
    log_q, log_p = (jax.nn.log_softmax(head_logits(*a, 0.0)) for a in ((x, head), (y, other)))
    log_p = jax.lax.stop_gradient(log_p)
    return (weights * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)).sum()


def optax_cross_entropy(x, head, targets, weights):
    """The loss of optax on float32 logits."""
    logits = (x @ head.T.astype(x.dtype)).astype(jnp.float32)
    return (weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets)).sum()


def tokamax_cross_entropy(x, head, targets, weights, *, implementation):
    """The operation of tokamax, which knows no weights."""
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(
        x.reshape(-1, x.shape[-1]),
        targets.reshape(-1),
        head.T.astype(x.dtype),
        reduction="sum",
        implementation=implementation,
    )


def jax_peers(case: Case, chunk_rows: list[int]) -> dict[str, Callable[..., jax.Array]]:
    """Functions of the case's arrays that return the loss."""

    def ours(*args, chunk_rows=None):
        if case.kind == "divergence":
            x, head, y, other, weights = args
            return linear_divergence(
                x, head, [Member(y, other)], weights, kind="forward", chunk_rows=chunk_rows
            ).objective
        return linear_cross_entropy(*args, chunk_rows=chunk_rows).objective

    peers: dict[str, Callable[..., jax.Array]] = {OURS: ours}
    for rows in chunk_rows:
        peers[f"{OURS}, {rows} rows"] = partial(ours, chunk_rows=rows)
    if case.kind == "divergence":
        return peers | {"materialised": materialised_divergence}
    return peers | {
        "materialised": lambda x, head, *rest: loss.cross_entropy(head_logits(x, head, 0.0), *rest)[
            0
        ],
        "optax": optax_cross_entropy,
        "tokamax xla": partial(tokamax_cross_entropy, implementation="xla"),
        "tokamax chunked_xla": partial(tokamax_cross_entropy, implementation="chunked_xla"),
    }


class JaxPeer:
    """A loss under `jax.value_and_grad`."""

    def __init__(self, f: Callable[..., jax.Array], case: Case):
        """Compile one run, for the memory it takes, and the loop if it is to be timed."""
        differentiated = jax.value_and_grad(f, (0, 1))
        self.once = jax.jit(differentiated).lower(*abstract(case)).compile()
        memory = self.once.memory_analysis()
        self.temp_bytes = memory.temp_size_in_bytes if memory else None
        if not case.timed:
            return

        def loop(runs, x, *rest):
            def body(_, previous):
                # Times 1, which the compiler cannot know: no run can start before the last ended.
                once_more = 1 + 1e-30 * previous[0].astype(jnp.float32)
                return differentiated(x * once_more.astype(x.dtype), *rest)

            shapes = jax.eval_shape(differentiated, x, *rest)
            start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            return jax.lax.fori_loop(0, runs, body, start)

        self.loop = jax.jit(loop).lower(1, *abstract(case)).compile()

    def prepare(self, args: Arrays) -> tuple[float, float]:
        """The loss and the norm of the head gradient of one run."""
        self.args = args
        value, (_, dhead) = self.once(*args)
        self.seconds(1)
        return float(value), float(jnp.linalg.norm(dhead))

    def seconds(self, runs: int) -> float:
        """Wall time of so many runs."""
        began = time.perf_counter()
        jax.block_until_ready(self.loop(runs, *self.args))
        return time.perf_counter() - began


class TorchPeer:
    """`torch.compile` of a linear layer and PyTorch's cross-entropy on float32 logits."""

    def __init__(self, case: Case):
        """Import and compile lazily; memory is known after the first run."""
        import torch

        self.torch = torch
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch has no CUDA")
        self.temp_bytes: int | None = None

    def prepare(self, args: Arrays) -> tuple[float, float]:
        """Copy the arrays, run once; the loss and the norm of the head gradient."""
        torch = self.torch
        x, head, targets = (
            torch.from_numpy(np.array(a, np.float32 if i < 2 else np.int64)).to(self.device)
            for i, a in enumerate(args[:3])
        )
        self.x = x.to(getattr(torch, str(args[0].dtype))).requires_grad_()
        self.head, self.targets = head.requires_grad_(), targets.flatten()

        def f(x, head, targets):
            logits = torch.nn.functional.linear(x, head.to(x.dtype)).float()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")

        self.f = torch.compile(f)
        self.seconds(1)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.seconds(1)
            self.temp_bytes = torch.cuda.max_memory_allocated() - before
        return self.value.item(), self.head.grad.norm().item()

    def seconds(self, runs: int) -> float:
        """Wall time of so many runs."""
        began = time.perf_counter()
        for _ in range(runs):
            self.x.grad = self.head.grad = None
            self.value = self.f(self.x, self.head, self.targets)
            self.value.backward()
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        else:
            self.value.item()
        return time.perf_counter() - began


def bench(
    case: Case, repeats: int, chunk_rows: list[int], block: float | None, without: Collection[str]
) -> dict[str, Any]:
    """All peers at one case but those `without`."""
    makers: dict[str, Callable[[], JaxPeer | TorchPeer]] = {
        name: partial(JaxPeer, f, case) for name, f in jax_peers(case, chunk_rows).items()
    }
    if case.kind == "cross-entropy" and case.timed:
        makers["torch.compile"] = partial(TorchPeer, case)
    args = draw(case) if case.timed else ()
    peers: dict[str, JaxPeer | TorchPeer] = {}
    results: dict[str, dict[str, Any]] = {}
    wanted = {name: make for name, make in makers.items() if name not in without}
    for name, make in together(wanted).items():
        try:
            peer = make()
            values = peer.prepare(args) if case.timed else None
        except Exception as error:  # whatever it is, it goes into the report
            results[name] = {"not_run": words(error)}
            continue
        peers[name] = peer
        results[name] = {"temp_bytes": peer.temp_bytes, "value_and_norm": values, "ms": []}
    if case.timed:
        for name, ms in take_turns(peers, repeats, block).items():
            results[name]["ms"] = ms
    ours = results[OURS]
    for result in results.values():
        if "not_run" in result or "not_run" in ours:
            continue
        if ours["temp_bytes"] and result["temp_bytes"]:
            result["memory_ratio"] = ours["temp_bytes"] / result["temp_bytes"]
        if case.timed:
            ratios = [a / b for a, b in zip(result["ms"], ours["ms"], strict=True)]
            result["speed_ratio"] = statistics.median(ratios)
            pairs = zip(result["value_and_norm"], ours["value_and_norm"], strict=True)
            result["relative_difference"] = [a / b - 1 for a, b in pairs]
    return {"case": case._asdict(), "peers": results}


def line(name: str, result: dict[str, Any]) -> str:
    """One peer in words."""
    if "not_run" in result:
        return f"  {name:22} not run: {result['not_run']}"
    text = f"  {name:22}"
    if result["ms"]:
        text += f" {statistics.median(result['ms']):9.2f} ms"
    if result["temp_bytes"]:
        text += f" {result['temp_bytes'] / 1e6:9.0f} MB"
    if name != OURS and "speed_ratio" in result:
        text += f"  {OURS} is {result['speed_ratio']:.2f}x as fast"
    if name != OURS and "memory_ratio" in result:
        text += f"  and takes {result['memory_ratio']:.3f}x the memory"
    worst = max(map(abs, result.get("relative_difference", [0])))
    return text + (f"  differs by {worst:.1e}" if name != OURS and result["ms"] else "")


def main() -> None:
    """Run all cases and print a table."""
    parser = arguments(__doc__, CASES, repeats=20)
    parser.add_argument("--chunk_rows", default="", help="also time these, comma-separated")
    args = parser.parse_args()
    keep_freed_memory()
    flags.FLAGS.mark_as_parsed()  # tokamax reads some, and argparse does not parse them
    names = chosen(args, CASES)
    began = time.perf_counter()
    results: dict[str, Any] = machine() | {"cases": {}}
    chunk_rows = [int(n) for n in args.chunk_rows.split(",") if n]
    for name in names:
        row = {"part": "loss", "case": name}
        if time.perf_counter() - began > args.seconds:
            print(f"{name} not run: out of time")
            append(args.jsonl, row | {"not_run": "out of time"})
            continue
        without = args.without.split(",")
        found = bench(CASES[name], args.repeats, chunk_rows, args.block_seconds, without)
        results["cases"][name] = found
        append(args.jsonl, row | {"shape": found["case"], "peers": found["peers"]})
        print(f"{name}: {CASES[name]}")
        for peer, result in found["peers"].items():
            print(line(peer, result), flush=True)
    results["clock_tflops"].append(clock())
    print("clock: {:.2f} TFLOP/s before, {:.2f} after".format(*results["clock_tflops"]))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        cases = results["cases"].items()
        plot({name: found["peers"] for name, found in cases if found["case"]["timed"]}, args.plot)


if __name__ == "__main__":
    main()
