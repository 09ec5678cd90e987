"""Compile for GPUs on a machine without one, and hold what is predicted against the record.

    python scripts/aot.py [--record] [--only=wikitext2]

Needs Python 3.12 and, besides the package, the compiler of XLA for CUDA in the version of jax:

    pip install jax==0.11.2
    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm

Every kernel of attention and whole train steps go through XLA and ptxas for one H200, and train
steps of `configs/llama_110m.py`, `configs/llama_1b.py` and `configs/gpt2_124m.py` for 8 and 64. A
kernel that cannot be compiled or needs more shared memory than there is ends with an error. Of each
program is printed what `hlo.py` and `traffic.py` count and the peak of predicted memory. A
figure above the one in `scripts/results/aot.json`, which `--record` writes, is an error; so are a
loop whose length the compiler does not know, for which a GPU asks the host in every round, an array
that XLA can only split by copying it whole, and what is above `LIMITS` and `RATIOS`. Nothing is
run: no speed, no values.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import traffic
from devices import DEVICES, Device
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm_jax import config, sharding, step
from lm_jax.collectives import DATA, FSDP, ROWS, TENSOR
from lm_jax.config import Config
from lm_jax.config.flags import load_module
from lm_jax.config.manual import script_parser
from lm_jax.config.resolve import resolve
from lm_jax.kernels.attention import attend
from lm_jax.kernels.dropout import Draw
from lm_jax.models.families import choose_attention, create_model
from lm_jax.objective import NextToken

ROOT = pathlib.Path(__file__).parents[1]
RECORD = ROOT / "scripts" / "results" / "aot.json"
PLAIN = "gpt2_124m, xla, materialised"
# What a device may send in an update of parameters and gradients in parts, each gathered twice and
# summed once with a little room, and the memory that it may take.
LIMITS = {
    "llama_110m fsdp 8": {"sent_gib": 1.0, "peak_bytes": 1.35 * 2**30},
    "llama_110m fsdp 8, V 50,257": {"sent_gib": 1.1, "peak_bytes": 1.89 * 2**30},
    "llama_1b fsdp 8": {"sent_gib": 8.9, "peak_bytes": 4.47 * 2**30},
}
# What a program may have of a figure of another one.
RATIOS = {
    ("gpt2_124m", PLAIN): ("peak_bytes", 0.5),
    ("llama_110m fsdp 64", "llama_110m fsdp 8"): ("sent_gib", 1.2),
    ("gpt2_124m data 8, accumulation 4", "gpt2_124m data 8"): ("sent_gib", 1.01),
}
# The axes of the mesh of a run.
AXES = (DATA, FSDP, TENSOR)


def mesh_of(sizes: dict[str, int], device: Device = DEVICES["h200"]) -> Mesh:
    """Devices that are not there, in a mesh of `AXES`; an axis without a size has one."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=device.target(), topology=f"1x1x{math.prod(shape)}"
    )
    return Mesh(np.array(topology.devices).reshape(shape), AXES)


def compile_step(cfg: Config, mesh: Mesh) -> Any:
    """The compiled train step of a config, with the attention and the dtype that it gets there."""
    with pretended(mesh):
        cfg = resolve(cfg, windows=10_000)
        graphdef, init = create_model(cfg, cfg.tokenizer.vocab_size, choose_attention(cfg)[0])
        state = jax.eval_shape(lambda: step.init_state(cfg, init(jax.random.key(0))))
    shape = (1, cfg.data.batch_size, cfg.data.seq_len + 1)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "segment_ids": jax.ShapeDtypeStruct(shape, jnp.int32),
        "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    rows = NamedSharding(mesh, PartitionSpec(None, ROWS))
    state = placed(state, sharding.places(mesh, state))
    batch = placed(batch, jax.tree.map(lambda _: rows, batch))
    return compile_for(mesh, step.make_train_step(cfg, NextToken.of(cfg, graphdef)), state, batch)


def placed(tree: Any, where: Any) -> Any:
    """Shapes of arrays that lie on devices."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, where
    )


def compile_for(mesh: Mesh, function: Any, *args: Any) -> Any:
    """Compile a jitted function for the devices of a mesh."""
    with pretended(mesh):
        lowered = function.trace(*args).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options={"xla_gpu_mock_custom_calls": True})


@contextlib.contextmanager
def pretended(mesh: Mesh) -> Iterator[None]:
    """As if the devices of a mesh were there, and cuDNN."""
    with jax.set_mesh(mesh), mock.patch.object(jax.nn, "dot_product_attention", without_cudnn):
        yield


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


def kernels() -> dict[str, Callable[[], Any]]:
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
                draw=Draw(jax.random.wrap_key_data(words)),
                return_lse=True,
                **options,
            )
            return out.astype(jnp.float32).sum() + lse.sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    mesh = mesh_of({})
    args = (q, k, k, ids, words)
    whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), args)
    return compile_for(mesh, jax.jit(gradients), *placed(args, whole))


def steps() -> dict[str, Callable[[], Any]]:
    """Train steps by name, compiled when called."""

    def of(name: str, mesh: dict[str, int] | None = None, **changes: Any) -> Callable[[], Any]:
        cfg = load_module(ROOT / "configs" / f"{name}.py").get_config()
        return lambda: compile_step(config.replace(cfg, **changes), mesh_of(mesh or {}))

    plain: dict[str, Any] = dict(attention__impl="xla", loss__impl="materialised")
    eight, copies, scan = {"fsdp": 8}, {"data": 8}, dict(model__scan_layers=True)
    return {
        "wikitext2": of("wikitext2"),
        "gpt2_124m": of("gpt2_124m"),
        PLAIN: of("gpt2_124m", **plain),
        "llama_110m fsdp 8": of("llama_110m", eight, data__batch_size=64),
        "llama_110m fsdp 8, V 50,257": of(
            "llama_110m", eight, data__batch_size=64, tokenizer__vocab_size=50_257
        ),
        "llama_1b fsdp 8": of("llama_1b", eight, data__batch_size=32),
        "llama_110m fsdp 64": of("llama_110m", {"fsdp": 64}, data__batch_size=512),
        "gpt2_124m data 8": of("gpt2_124m", copies, **scan),
        "gpt2_124m data 8, accumulation 4": of("gpt2_124m", copies, data__micro_batch=15, **scan),
    }


def count(executable: Any) -> dict[str, float]:
    """The figures of a compiled program; of several devices also what they send."""
    module = hlo.Module(executable.as_text())
    found = hlo.count(module)
    found["peak_bytes"] = executable.memory_analysis().peak_memory_in_bytes
    return found | (traffic.count(module) if module.devices > 1 else {})


@contextlib.contextmanager
def stderr_of_xla() -> Iterator[list[str]]:
    """What the process writes to stderr inside is in the list afterwards, and printed there."""
    said: list[str] = []
    own = os.dup(2)
    with tempfile.TemporaryFile("w+") as file:
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            said.append(file.read())
            sys.stderr.write(said[0])


def above(found: dict[str, dict[str, float]]) -> list[str]:
    """What is above `LIMITS` and `RATIOS`, in words."""
    wrong = [
        f"{name}: {key} is {found[name][key]:,}, above {limit:,}"
        for name, limits in LIMITS.items()
        for key, limit in limits.items()
        if name in found and found[name][key] > limit
    ]
    for (name, other), (key, most) in RATIOS.items():
        if {name, other} <= set(found):
            ratio = found[name][key] / found[other][key]
            print(f"{key} of {name} over that of {other}: {ratio:.3f}")
            if ratio > most:
                wrong.append(f"{key} of {name} is {ratio:.3f} of that of {other}, above {most}")
    return wrong


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
    record = json.loads(RECORD.read_text())["programs"]
    programs = {name: f for name, f in (kernels() | steps()).items() if args.only in name}
    found: dict[str, dict[str, float]] = {}
    wrong = []
    for name, compiled in programs.items():
        began = time.perf_counter()
        with stderr_of_xla() as said:
            executable = compiled()
        seconds = time.perf_counter() - began
        found[name] = count(executable)
        if "involuntary" in said[0].lower():
            wrong.append(f"{name}: XLA copies an array whole to split it (see its log)")
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
    wrong += above(found)
    if wrong:
        raise SystemExit("; ".join(wrong))


def line(figures: dict[str, float]) -> str:
    """The figures of a program in words."""
    sent = f", sends {figures['sent_gib']:.2f} GiB" if "sent_gib" in figures else ""
    return (
        f"{figures['peak_bytes'] / 2**30:.2f} GiB{sent}, {figures['kernels']:,} kernels, "
        f"{figures['16_bit_products']:,} products in 16 bit and {figures['float32_products']:,} in "
        f"float32, {figures['gigabytes']:,.1f} GB, roofline {figures['roofline_ms']:,.2f} ms "
        f"without the {figures['attention_kernels']} kernels of attention"
    )


if __name__ == "__main__":
    main()
