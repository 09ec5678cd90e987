"""Compile for an H200 on a machine without a GPU, and hold predicted memory against the record.

    python scripts/aot.py [--record]

Needs Python 3.12 and, besides the package, the compiler of XLA for CUDA in the version of jax:

    pip install jax==0.11.2
    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm

Every kernel and the whole train steps of `configs/wikitext2.py` and of a model of 124M parameters
go through XLA and ptxas. A kernel that cannot be compiled or needs more shared memory than there
is ends with an error. So does a peak of predicted memory above the one in
`scripts/results/aot.json`, which `--record` writes, and a 124M step with pallas and the fused loss
that takes more than half of what xla and all logits take. Nothing is run: no speed, no values.
"""

import argparse
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm_jax import config, resolution, step
from lm_jax.config import Config, Duration
from lm_jax.flags import load_module
from lm_jax.kernels.attention import attend

ROOT = pathlib.Path(__file__).parents[1]
RECORD = ROOT / "scripts" / "results" / "aot.json"
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


def gpt2_124m() -> Config:
    """GPT-2 small: 64 windows of 1024 tokens an update, bfloat16."""
    cfg = Config()
    cfg.data.seq_len, cfg.data.batch_size = 1024, 64
    cfg.model.layers, cfg.model.d_model, cfg.model.heads = 12, 768, 12
    cfg.model.norm, cfg.model.positions, cfg.model.mlp = "layernorm", "learned", "gelu"
    cfg.model.bias = True
    cfg.train.compute_dtype = "bfloat16"
    cfg.train.steps = Duration("1000")
    return cfg


def compile_step(cfg: Config, vocab_size: int, mesh: Mesh, attention: str) -> Any:
    """The compiled train step of a config."""
    cfg = resolution.resolve(cfg, windows=10_000)
    graphdef, init = step.create_model(cfg, vocab_size, attention)
    state = jax.eval_shape(lambda key: step.init_state(cfg, init(key)), jax.random.key(0))
    shape = (1, cfg.data.batch_size, cfg.data.seq_len + 1)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "segment_ids": jax.ShapeDtypeStruct(shape, jnp.int32),
        "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    return compile_for(mesh, step.make_train_step(cfg, graphdef), state, batch)


def compile_for(mesh: Mesh, function: Any, *args: Any) -> Any:
    """Compile a jitted function for the devices of a mesh, arguments replicated."""
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args)
    with jax.set_mesh(mesh):
        return function.trace(*args).lower(lowering_platforms=("cuda",)).compile()


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

    def of(make: Callable[[], Config], vocab_size: int, attention: str, loss: str) -> Callable:
        cfg = config.replace(make(), loss__impl=loss)
        return lambda mesh: compile_step(cfg, vocab_size, mesh, attention)

    wikitext2 = load_module(ROOT / "configs" / "wikitext2.py").get_config
    return {
        "wikitext2, pallas, fused": of(wikitext2, 16_384, "pallas", "fused"),
        "124M, pallas, fused": of(gpt2_124m, 50_304, "pallas", "fused"),
        "124M, xla, materialised": of(gpt2_124m, 50_304, "xla", "materialised"),
    }


def main() -> None:
    """Compile everything, compare with the record or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the record")
    args = parser.parse_args()
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices), ("data",))
    record = {} if args.record else json.loads(RECORD.read_text())["peak_bytes"]
    peaks, wrong = {}, []
    for name, compiled in (kernels() | steps()).items():
        began = time.perf_counter()
        peaks[name] = compiled(mesh).memory_analysis().peak_memory_in_bytes
        seconds = time.perf_counter() - began
        print(f"{name}: {peaks[name] / 2**30:.2f} GiB, {seconds:.0f} s", flush=True)
        if not args.record and peaks[name] > record.get(name, 0):
            wrong.append(f"{name} takes {peaks[name]:,} bytes, recorded: {record.get(name)}")
    if set(record) - set(peaks):
        wrong.append(f"recorded but not compiled: {set(record) - set(peaks)}")
    ratio = peaks["124M, pallas, fused"] / peaks["124M, xla, materialised"]
    print(f"124M, pallas and fused over xla and materialised: {ratio:.3f}")
    if ratio > 0.5:
        wrong.append(f"the ratio is {ratio:.3f}, above 0.5")
    if wrong:
        raise SystemExit("; ".join(wrong))
    if args.record:
        RECORD.write_text(
            json.dumps({"jax": jax.__version__, "peak_bytes": peaks}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
