"""Compile for an H200 on a machine without a GPU, and hold predicted memory against the record.

    python scripts/aot.py [--record] [--only=wikitext2]

Needs Python 3.12 and, besides the package, the compiler of XLA for CUDA in the version of jax:

    pip install jax==0.11.2
    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm

Every kernel of attention and the whole train steps of `configs/wikitext2.py` and of
`configs/gpt2_124m.py` go through XLA and ptxas. A kernel that cannot be compiled or needs more
shared memory than there is ends with an error. Of each program is printed what `hlo.py` counts and
the peak of predicted memory. A figure above the one in `scripts/results/aot.json`, which `--record`
writes, is an error; so are a loop whose length the compiler does not know, for which a GPU asks the
host in every round, and a step of gpt2_124m that takes more than half of the memory that it takes
with xla and all logits. Nothing is run: no speed, no values.
"""

import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hlo
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm_jax import config, step
from lm_jax.config import Config
from lm_jax.config.flags import load_module
from lm_jax.config.manual import script_parser
from lm_jax.config.resolve import resolve
from lm_jax.kernels.attention import attend
from lm_jax.models.families import choose_attention, create_model
from lm_jax.objective import NextToken

ROOT = pathlib.Path(__file__).parents[1]
RECORD = ROOT / "scripts" / "results" / "aot.json"
PLAIN = "gpt2_124m, xla, materialised"
# What XLA asks about a device; NVIDIA's data sheet and the CUDA programming guide, table of
# technical specifications for compute capability 9.0.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""


def compile_step(cfg: Config, mesh: Mesh) -> Any:
    """The compiled train step of a config, with the attention and the dtype that it gets there."""
    with jax.set_mesh(mesh):
        cfg = resolve(cfg, windows=10_000)
        graphdef, init = create_model(cfg, cfg.tokenizer.vocab_size, choose_attention(cfg)[0])
        state = jax.eval_shape(lambda: step.init_state(cfg, init(jax.random.key(0))))
    shape = (1, cfg.data.batch_size, cfg.data.seq_len + 1)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "segment_ids": jax.ShapeDtypeStruct(shape, jnp.int32),
        "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    return compile_for(mesh, step.make_train_step(cfg, NextToken.of(cfg, graphdef)), state, batch)


def compile_for(mesh: Mesh, function: Any, *args: Any) -> Any:
    """Compile a jitted function for the devices of a mesh, arguments replicated."""
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args)
    with jax.set_mesh(mesh), mock.patch.object(jax.nn, "dot_product_attention", without_cudnn):
        lowered = function.trace(*args).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options={"xla_gpu_mock_custom_calls": True})


def without_cudnn(query: Any, key: Any, value: Any, *, mask: Any, **options: Any) -> jax.Array:
    """`jax.nn.dot_product_attention` with opaque calls in the place of cuDNN's kernels.

    They have the shapes of the real ones, which take a mask as a bias; cuDNN is not installed here.
    """
    if options["implementation"] != "cudnn":
        return REAL_ATTENTION(query, key, value, mask=mask, **options)
    lowest = jnp.finfo(query.dtype).min
    masks = () if mask is None else (jnp.where(mask, 0, lowest).astype(query.dtype),)
    return opaque_attention(query, key, value, *masks)


REAL_ATTENTION = jax.nn.dot_product_attention


@jax.custom_vjp
def opaque_attention(query: Any, *inputs: Any) -> jax.Array:
    """A kernel that XLA knows by its shapes alone."""
    return _opaque_forward(query, *inputs)[0]


def _opaque_forward(query: Any, *inputs: Any) -> tuple[Any, Any]:
    B, T, H, _ = query.shape
    outputs = (_like(query), jax.ShapeDtypeStruct((B, H, T), jnp.float32))
    found = jax.ffi.ffi_call("attention_forward", outputs)(query, *inputs)
    return found[0], ((query, *inputs), found)


def _opaque_backward(residuals: Any, g: Any) -> tuple[Any, ...]:
    inputs, found = residuals
    outputs = [_like(x) for x in inputs[:3]]
    gradients = jax.ffi.ffi_call("attention_backward", outputs)(*inputs, *found, g)
    return (*gradients, *(jnp.zeros_like(mask) for mask in inputs[3:]))


def _like(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


opaque_attention.defvjp(_opaque_forward, _opaque_backward)


def kernels() -> dict[str, Callable[[Mesh], Any]]:
    """The gradient of attention by implementation and case, compiled when called."""
    everything = dict(segments=True, window=300, softcap=20.0, dropout_rate=0.1)
    cases: dict[str, dict[str, Any]] = {
        "64": dict(width=64),
        "64, everything": dict(width=64, **everything),
        "64, not causal": dict(width=64, causal=False),
        "64, float16": dict(width=64, dtype=jnp.float16),
        "80, 1000 positions": dict(width=80, length=1000),
        "128": dict(width=128),
        "128, everything": dict(width=128, **everything),
    }
    return {
        f"{impl} {name}": functools.partial(attention_gradient, impl=impl, **case)
        for impl in ("pallas", "pallas_deterministic", "blockwise")
        for name, case in cases.items()
    }


def attention_gradient(
    mesh: Mesh,
    *,
    impl: str,
    width: int,
    length: int = 1024,
    dtype: Any = jnp.bfloat16,
    segments: bool = False,
    **options: Any,
) -> Any:
    """The compiled gradient of attention with 8 query heads that share 4 key/value heads."""
    q, k = (jax.ShapeDtypeStruct((4, length, heads, width), dtype) for heads in (8, 4))
    ids = jax.ShapeDtypeStruct((4, length), jnp.int32)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def gradients(q: Any, k: Any, v: Any, ids: Any, words: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> jax.Array:
            out, lse = attend(
                q,
                k,
                v,
                impl=impl,
                segment_ids_BT=ids if segments else None,
                dropout_key=jax.random.wrap_key_data(words),
                return_lse=True,
                **options,
            )
            return out.astype(jnp.float32).sum() + lse.sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    return compile_for(mesh, jax.jit(gradients), q, k, k, ids, words)


def steps() -> dict[str, Callable[[Mesh], Any]]:
    """Train steps by name, compiled when called."""

    def of(name: str, **changes: Any) -> Callable[[Mesh], Any]:
        cfg = load_module(ROOT / "configs" / f"{name}.py").get_config()
        return lambda mesh: compile_step(config.replace(cfg, **changes), mesh)

    plain = dict(attention__impl="xla", loss__impl="materialised")
    return {
        "wikitext2": of("wikitext2"),
        "gpt2_124m": of("gpt2_124m"),
        PLAIN: of("gpt2_124m", **plain),
    }


def worse(name: str, found: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """What of a program is more than is recorded, in words."""
    return [
        f"{name}: {key} is {value:,}, recorded is {recorded.get(key)}"
        for key, value in found.items()
        if value > recorded.get(key, -1)
    ]


def main() -> None:
    """Compile everything, compare with the record or write it."""
    parser = script_parser(__doc__)
    parser.add_argument("--record", action="store_true", help="write the record")
    parser.add_argument("--only", default="", help="compile only what has this in its name")
    args = parser.parse_args()
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices), ("data",))
    record = json.loads(RECORD.read_text())["programs"]
    programs = {name: f for name, f in (kernels() | steps()).items() if args.only in name}
    found: dict[str, dict[str, float]] = {}
    wrong = []
    for name, compiled in programs.items():
        began = time.perf_counter()
        executable = compiled(mesh)
        seconds = time.perf_counter() - began
        peak = executable.memory_analysis().peak_memory_in_bytes
        found[name] = hlo.count(executable.as_text()) | {"peak_bytes": peak}
        print(f"{name}: {line(found[name])} ({seconds:.0f} s)", flush=True)
        if found[name]["unknown_loops"]:
            wrong.append(f"{name} has loops whose length the compiler does not know")
        if not args.record:
            wrong += worse(name, found[name], record.get(name, {}))
    if args.record:
        kept = record | found if args.only else found
        RECORD.write_text(json.dumps({"jax": jax.__version__, "programs": kept}, indent=1) + "\n")
    elif gone := {n for n in record if args.only in n} - set(found):
        wrong.append(f"recorded but not compiled: {gone}")
    if {"gpt2_124m", PLAIN} <= set(found):
        ratio = found["gpt2_124m"]["peak_bytes"] / found[PLAIN]["peak_bytes"]
        print(f"memory of gpt2_124m over that with xla and all logits: {ratio:.3f}")
        if ratio > 0.5:
            wrong.append(f"that ratio is {ratio:.3f}, above 0.5")
    if wrong:
        raise SystemExit("; ".join(wrong))


def line(figures: dict[str, float]) -> str:
    """The figures of a program in words."""
    return (
        f"{figures['peak_bytes'] / 2**30:.2f} GiB, {figures['kernels']:,} kernels, "
        f"{figures['16_bit_products']:,} products in 16 bit and {figures['float32_products']:,} in "
        f"float32, {figures['gigabytes']:,.1f} GB, roofline {figures['roofline_ms']:,.2f} ms "
        f"without the {figures['attention_kernels']} kernels of attention"
    )


if __name__ == "__main__":
    main()
