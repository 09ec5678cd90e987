"""Compile for an H200 on a machine without a GPU, and hold predicted memory against the record.

    python scripts/aot.py [--record]

Needs Python 3.12 and, besides the package, the compiler of XLA for CUDA in the version of jax:

    pip install jax==0.11.2
    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm

Every kernel and the whole train steps of `configs/wikitext2.py` and of a model of 124M parameters
go through XLA and ptxas. A kernel that cannot be compiled or needs more shared memory than there
is ends with an error, and so does a step whose predicted peak memory is more than 2 % above the
one in `scripts/results/aot.json`; `--record` writes that file. Nothing is run: no speed, no values.
"""

import argparse
import importlib.util
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

from lm_jax import config, step
from lm_jax.config import Config, Duration
from lm_jax.kernels.flash import flash

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
    cfg = config.resolve(cfg, windows=10_000)
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


def wikitext2() -> Config:
    """The config of that name."""
    spec = importlib.util.spec_from_file_location("wikitext2", ROOT / "configs" / "wikitext2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def kernels() -> dict[str, Callable[[Mesh], Any]]:
    """Attention kernels by name, with segments, window, softcap and dropout and without."""

    def of(width: int, plain: bool, deterministic: bool) -> Callable[[Mesh], Any]:
        q = jax.ShapeDtypeStruct((4, 1024, 8, width), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((4, 1024, 4, width), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
        seed = jax.ShapeDtypeStruct((2,), jnp.uint32)

        def gradients(q: Any, k: Any, v: Any, ids: Any, seed: Any) -> Any:
            def total(q: Any, k: Any, v: Any) -> jax.Array:
                out, lse = flash(
                    q,
                    k,
                    v,
                    None if plain else ids,
                    None if plain else seed,
                    causal=True,
                    window=None if plain else 300,
                    softcap=0.0 if plain else 20.0,
                    scale=width**-0.5,
                    dropout_rate=0.1,
                    deterministic=deterministic,
                )
                return out.astype(jnp.float32).sum() + lse.sum()

            return jax.grad(total, (0, 1, 2))(q, k, v)

        return lambda mesh: compile_for(mesh, jax.jit(gradients), q, k, k, ids, seed)

    return {
        f"flash {width}{'' if plain else ', everything'}{', deterministic' * deterministic}": of(
            width, plain, deterministic
        )
        for width in (64, 128)
        for plain in (True, False)
        for deterministic in (False, True)
    }


def steps() -> dict[str, Callable[[Mesh], Any]]:
    """Train steps by name, compiled when called."""

    def of(make: Callable[[], Config], vocab_size: int, attention: str, loss: str) -> Callable:
        cfg = config.replace(make(), loss__impl=loss)
        return lambda mesh: compile_step(cfg, vocab_size, mesh, attention)

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
    record = {} if args.record else json.loads(RECORD.read_text())["peak_gib"]
    peaks, above = {}, []
    for name, compiled in (kernels() | steps()).items():
        began = time.perf_counter()
        peaks[name] = round(compiled(mesh).memory_analysis().peak_memory_in_bytes / 2**30, 2)
        print(f"{name}: {peaks[name]} GiB, {time.perf_counter() - began:.0f} s", flush=True)
        if not args.record and peaks[name] > 1.02 * record[name]:
            above.append(f"{name} (recorded: {record[name]} GiB)")
    if args.record:
        RECORD.write_text(json.dumps({"jax": jax.__version__, "peak_gib": peaks}, indent=1) + "\n")
    if above:
        raise SystemExit(f"predicted peak memory above the record: {'; '.join(above)}")


if __name__ == "__main__":
    main()
