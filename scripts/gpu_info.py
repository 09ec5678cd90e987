"""The device in words and numbers, a JSON line each: see `gpu_report.py`."""

import importlib.metadata
import os
import pathlib
import subprocess
import time

import benchmark
import gpu_peers
import jax
import jax.numpy as jnp

from lm_jax.config.manual import script_parser
from lm_jax.models.families import choose_attention

PACKAGES = (
    "jax jaxlib jax-cuda13-plugin jax-cuda12-plugin flax optax orbax-checkpoint grain numpy torch "
    "triton nvidia-cudnn-cu13 nvidia-cudnn-cu12 flash-attn3-jax"
).split()
ASKED = "name driver_version clocks.sm clocks.mem clocks.max.sm power.limit memory.total".split()


def versions() -> dict[str, str | None]:
    """Of all packages that figures depend on; None: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def driver() -> dict[str, str]:
    """What nvidia-smi says; nothing where there is none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(ASKED, (word.strip() for word in said.splitlines()[0].split(",")), strict=True))


def copy_rate() -> float:
    """TB/s of reading and writing 4.3 GB (on a CPU 4 MB) twenty times in one call, best of three.

    The number of times is an argument, so that the compiler cannot unroll and join them.
    """
    size = 2**30 if benchmark.device() == "gpu" else 2**20

    def repeated(x, times):
        return jax.lax.fori_loop(0, times, lambda _, x: x + 1, x)

    call = jax.jit(repeated, donate_argnums=0)
    x = call(jnp.zeros(size, jnp.float32), 1).block_until_ready()
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        x = call(x, 20).block_until_ready()
        rates.append(20 * 2 * x.nbytes / (time.perf_counter() - began) / 1e12)
    return max(rates)


def main() -> None:
    """Write everything."""
    parser = script_parser(__doc__)
    parser.add_argument("--jsonl", type=pathlib.Path, required=True)
    parser.add_argument("--cases", default="17M,124M", help="of bench_step.py")
    args = parser.parse_args()

    def say(**row: object) -> None:
        print(row, flush=True)
        benchmark.append(args.jsonl, {"part": "info", **row})

    say(versions=versions())
    say(device=jax.devices()[0].device_kind, backend=benchmark.device(), cpus=os.cpu_count())
    say(driver=driver())
    for case in args.cases.split(","):
        for peer in ("lm_jax", "lm_jax plain"):
            cfg = gpu_peers.config_of(gpu_peers.CASES[case], peer)
            impl, reason = choose_attention(cfg)
            say(case=case, peer=peer, attention=impl, reason=reason)
    say(gemm_tflops=benchmark.clock())
    say(copy_tb_per_s=copy_rate())


if __name__ == "__main__":
    main()
