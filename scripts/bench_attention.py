"""The implementations of attention against each other and against their peers, in one process.

    python scripts/bench_attention.py [--cases=...] [--repeats=20] [--without=PEER,...]
        [--json=FILE] [--jsonl=FILE] [--plot=FILE] [--block_seconds=S] [--device=cpu|gpu]

Timed are the output alone, and the gradients by queries, keys and values (which contain it). The
peers take turns, so that a change of the machine's speed falls on all of them; reported are medians
over the repeats and the median of the ratios to ours within a repeat: pallas on a Hopper GPU,
blockwise elsewhere. The speed of a square matrix product before and after says whether the clock
held. Every peer's result is compared with ours; a peer that cannot run is reported with the reason.
JAX peers run in a loop inside one jit in which no run can start before the last one ended.

On a GPU, causal and in bfloat16: the shapes of `configs/wikitext2.py` and `configs/gpt2_124m.py`
(32 rows), then 16,384 tokens of 2,048 channels, and what the kernels can do besides: rows of four
documents, a window, dropout. There, "all pairs" is ours without the feature. On a CPU also the
temporary memory that XLA plans. Without `--cases` the device decides; no new case is begun after
`--seconds`, so that on an H200 all ends within 8 minutes.
"""

import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its share

import benchmark
import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.attention import attend
from lm_jax.kernels.dropout import Draw
from lm_jax.kernels.mosaic import unavailable
from lm_jax.main import keep_freed_memory


class Case(NamedTuple):
    """Causal attention of `rows` rows of T positions, H heads of width C."""

    rows: int
    T: int
    H: int
    C: int
    dtype: str = "bfloat16"
    documents: int = 1
    window: int | None = None
    dropout: float = 0.0

    def plain(self) -> bool:
        """Whether the only mask is the causal one and nothing is dropped."""
        return self.documents == 1 and self.window is None and not self.dropout

    def flops(self, gradient: bool) -> float:
        """Of the visible half of the products: two forward and five backward (Dao 2023)."""
        return self.rows * self.H * self.T**2 * self.C * 2 * (3.5 if gradient else 1)


CASES = {
    "gpu_17m": Case(32, 512, 6, 64),
    "gpu_17m_documents": Case(32, 512, 6, 64, documents=4),
    "gpu_124m": Case(32, 1024, 12, 64),
    "gpu_124m_documents": Case(32, 1024, 12, 64, documents=4),
    **{
        f"gpu_c{C}_t{T}": Case(16_384 // T, T, 2048 // C, C)
        for C in (64, 128)
        for T in (512, 1024, 2048, 4096)
    },
    "gpu_documents": Case(4, 4096, 32, 64, documents=4),
    "gpu_window": Case(4, 4096, 32, 64, window=256),
    "gpu_dropout": Case(8, 2048, 32, 64, dropout=0.1),
    **{f"cpu_t{T}": Case(4096 // T, T, 4, 64, "float32") for T in (64, 128, 256, 512, 1024, 2048)},
    "toy": Case(2, 64, 2, 16),
    "cpu_t4096": Case(1, 4096, 4, 64, "float32"),
    "cpu_many_rows": Case(32, 256, 8, 32, "float32"),
    "cpu_window": Case(1, 4096, 4, 64, "float32", window=256),
    "cpu_dropout": Case(2, 1024, 4, 64, "float32", dropout=0.1),
}
PASSES = ("gradient", "forward")
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def draw(case: Case) -> list[jax.Array]:
    """Queries, keys, values and the cotangent of the output."""
    shape = (case.rows, case.T, case.H, case.C)
    return [jax.random.normal(k, shape, case.dtype) for k in jax.random.split(jax.random.key(0), 4)]


def ours(case: Case, impl: str) -> Attention:
    """`attend` with what the case asks for."""
    ids_BT = None
    if case.documents > 1:
        ids_T = 1 + np.arange(case.T) * case.documents // case.T
        ids_BT = jnp.asarray(np.broadcast_to(ids_T, (case.rows, case.T)))
    return functools.partial(
        attend,
        impl=impl,
        segment_ids_BT=ids_BT,
        window=case.window,
        dropout_rate=case.dropout,
        draw=Draw(jax.random.key(1)) if case.dropout else None,
    )


def jax_triton(case: Case) -> Attention:
    """The Triton kernel that comes with JAX."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    return lambda *qkv: mha(*qkv, None, sm_scale=case.C**-0.5, causal=True)


def jax_mosaic(case: Case) -> Attention:
    """The Hopper kernel that comes with JAX; it has no scale (which costs it nothing here)."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu as kernels

    keys = 256 if case.C == 64 else 128
    tuning = kernels.TuningConfig(block_q=64, block_kv=keys, max_concurrent_steps=2, causal=True)
    return lambda *qkv: kernels.attention(*qkv, tuning)


def flash_attn3(case: Case) -> Attention:
    """FlashAttention-3 through flash-attn3-jax, whose wheels know one head width."""
    from flash_attn3_jax import flash_mha

    if case.C != 128:
        raise ValueError(f"built for heads 128 wide, not {case.C}")
    return functools.partial(flash_mha, is_causal=True)


def tokamax(case: Case, implementation: str) -> Attention:
    """The kernels of tokamax."""
    import tokamax as library

    return functools.partial(
        library.dot_product_attention, is_causal=True, implementation=implementation
    )


class JaxPeer:
    """A JAX function, timed in a loop inside jit."""

    def __init__(self, f: Attention, gradient: bool, args: list[jax.Array]):
        """Compile the loop."""

        def once(q, k, v, dout):
            if not gradient:
                return (f(q, k, v),)
            return jax.vjp(f, q, k, v)[1](dout)

        def loop(runs, *args):
            def body(_, carry):
                args, previous = carry
                # Changed in one element by next to nothing, which the compiler cannot know: no
                # run, nor any part of it, can be done before the last one ended.
                nothing = 1e-30 * previous[0][0, 0, 0, 0].astype(jnp.float32)
                args = [x.at[0, 0, 0, 0].add(nothing.astype(x.dtype)) for x in args]
                return args, once(*args)

            zeros = tuple(jnp.zeros(x.shape, x.dtype) for x in once_shape)
            return jax.lax.fori_loop(0, runs, body, (list(args), zeros))[1]

        once_shape = jax.eval_shape(once, *args)
        self.args = args
        self.loop = jax.jit(loop).lower(1, *args).compile()
        self.temp_bytes: int | None = None
        if jax.default_backend() == "cpu":
            memory = jax.jit(once).lower(*args).compile().memory_analysis()
            assert memory is not None
            self.temp_bytes = memory.temp_size_in_bytes

    def seconds(self, runs: int) -> float:
        """Wall time of so many runs."""
        began = time.perf_counter()
        self.results = jax.block_until_ready(self.loop(runs, *self.args))
        return time.perf_counter() - began

    def values(self) -> list[np.ndarray]:
        """Output, or gradients, of the last run."""
        return [np.asarray(x, np.float32) for x in self.results]


class TorchPeer:
    """`scaled_dot_product_attention` of PyTorch with a named backend."""

    def __init__(self, backend: str, case: Case, gradient: bool, args: list[jax.Array]):
        """Copy the arrays; heads before positions, as it wants them."""
        import torch
        from torch.nn.attention import SDPBackend

        if not torch.cuda.is_available():
            raise RuntimeError("this PyTorch has no CUDA")
        self.torch, self.gradient, self.dropout = torch, gradient, case.dropout
        self.backend = getattr(SDPBackend, backend)
        dtype = getattr(torch, case.dtype)
        *inputs, self.dout = (
            torch.from_numpy(np.asarray(x, np.float32)).to("cuda", dtype).transpose(1, 2)
            for x in args
        )
        self.inputs = [x.requires_grad_(gradient) for x in inputs]
        self.temp_bytes: int | None = None

    def seconds(self, runs: int) -> float:
        """Wall time of so many runs."""
        began = time.perf_counter()
        with self.torch.nn.attention.sdpa_kernel(self.backend):
            for _ in range(runs):
                out = self.torch.nn.functional.scaled_dot_product_attention(
                    *self.inputs, is_causal=True, dropout_p=self.dropout
                )
                self.results = [out]
                if self.gradient:
                    self.results = list(self.torch.autograd.grad(out, self.inputs, self.dout))
        self.torch.cuda.synchronize()
        return time.perf_counter() - began

    def values(self) -> list[np.ndarray]:
        """Output, or gradients, of the last run."""
        return [x.detach().transpose(1, 2).float().cpu().numpy() for x in self.results]


Peer = JaxPeer | TorchPeer


def makers(case: Case, gradient: bool, args: list[jax.Array]) -> dict[str, Callable[[], Peer]]:
    """What is compared at this case, ours first; each is made only when called."""

    def of_jax(make: Callable[..., Attention], *how: Any) -> Callable[[], Peer]:
        return lambda: JaxPeer(make(case, *how), gradient, args)

    def of_torch(backend: str) -> Callable[[], Peer]:
        return lambda: TorchPeer(backend, case, gradient, args)

    first = "pallas" if unavailable(case.dtype, case.C) is None else "blockwise"
    names = dict.fromkeys([first, "blockwise", "xla", "cudnn", "pallas"])
    if benchmark.device() == "cpu":
        names["reference"] = None
    peers = {name: of_jax(ours, name) for name in names}
    if not case.plain():
        plain = case._replace(documents=1, window=None, dropout=0.0)
        peers["all pairs"] = lambda: JaxPeer(ours(plain, first), gradient, args)
    if case.plain():
        if gradient:
            peers["pallas_deterministic"] = of_jax(ours, "pallas_deterministic")
        peers["flash_attn3"] = of_jax(flash_attn3)
        peers["jax mosaic"] = of_jax(jax_mosaic)
        peers["jax triton"] = of_jax(jax_triton)
        for kind in ("mosaic", "triton"):
            peers[f"tokamax {kind}"] = of_jax(tokamax, kind)
    if case.documents == 1 and case.window is None:
        peers["torch flash"] = of_torch("FLASH_ATTENTION")
        peers["torch cudnn"] = of_torch("CUDNN_ATTENTION")
    return peers


def difference(values: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Largest over the arrays of |a - b| / |b| in the Euclidean norm."""
    pairs = zip(values, expected, strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def bench(
    case: Case, gradient: bool, repeats: int, block: float | None, without: Collection[str]
) -> dict[str, dict[str, Any]]:
    """All peers at one case but those `without`; the first that runs is the measure of the rest."""
    args = draw(case)
    peers: dict[str, Peer] = {}
    results: dict[str, dict[str, Any]] = {}
    expected: list[np.ndarray] = []
    wanted = {n: make for n, make in makers(case, gradient, args).items() if n not in without}
    for name, make in benchmark.together(wanted).items():
        try:
            peer = make()
            peer.seconds(1)
        except Exception as error:  # whatever it is, it goes into the report
            results[name] = {"not_run": benchmark.words(error)}
            continue
        expected = expected or peer.values()
        peers[name] = peer
        differs = difference(peer.values(), expected)
        results[name] = {"temp_bytes": peer.temp_bytes, "difference": differs}
    for name, ms in benchmark.take_turns(peers, repeats, block).items():
        results[name]["ms"] = ms
    for name in peers:
        result, first = results[name], results[next(iter(peers))]
        ratios = [a / b for a, b in zip(result["ms"], first["ms"], strict=True)]
        result["median_ms"] = statistics.median(result["ms"])
        result["speed_ratio"] = statistics.median(ratios)
        if result["temp_bytes"]:
            result["memory_ratio"] = first["temp_bytes"] / result["temp_bytes"]
    return results


def show(case: Case, gradient: bool, results: dict[str, dict[str, Any]]) -> None:
    """One line a peer."""
    measure = next((name for name, result in results.items() if "ms" in result), "nothing")
    for name, result in results.items():
        if "not_run" in result:
            print(f"    {name:22} not run: {result['not_run']}")
            continue
        text = f"    {name:22} {result['median_ms']:9.3f} ms"
        if case.plain():
            text += f" {1e-9 * case.flops(gradient) / result['median_ms']:7.3g} TFLOP/s"
        if result["temp_bytes"]:
            text += f" {result['temp_bytes'] / 2**20:7.1f} MiB"
        if name != measure:
            text += f"  {measure} is {result['speed_ratio']:.2f}x as fast"
            if "memory_ratio" in result:
                text += f" in {result['memory_ratio']:.3f}x the memory"
            text += f", differs by {result['difference']:.1e}"
        print(text, flush=True)


def main() -> None:
    """Run all cases and print a table."""
    args = benchmark.arguments(__doc__, CASES, repeats=20).parse_args()
    keep_freed_memory()
    names = benchmark.chosen(args, CASES)
    began = time.perf_counter()
    results: dict[str, Any] = benchmark.machine() | {"cases": {}}
    print(f"{results['device']}, jax {jax.__version__}, python {results['python']}")
    for name, which in itertools.product(names, PASSES):
        row = {"part": "attention", "case": name, "pass": which}
        if time.perf_counter() - began > args.seconds:
            print(f"{name}, {which}, not run: out of time")
            benchmark.append(args.jsonl, row | {"not_run": "out of time"})
            continue
        case, gradient = CASES[name], which == "gradient"
        print(f"{name}, {which}: {case}")
        found = bench(case, gradient, args.repeats, args.block_seconds, args.without.split(","))
        results["cases"].setdefault(name, {"case": case._asdict()})[which] = found
        flops = case.flops(gradient) if case.plain() else None
        benchmark.append(
            args.jsonl, row | {"shape": case._asdict(), "flops": flops, "peers": found}
        )
        show(case, gradient, found)
    results["clock_tflops"].append(benchmark.clock())
    print("clock: {:.2f} TFLOP/s before, {:.2f} after".format(*results["clock_tflops"]))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        cases = results["cases"].items()
        titles = {f"{n}, {w}": found[w] for n, found in cases for w in PASSES if w in found}
        benchmark.plot(titles, args.plot, columns=2)


if __name__ == "__main__":
    main()
