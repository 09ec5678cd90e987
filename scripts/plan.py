"""Before renting: whether a training fits on GPUs that are not here, and how fast it is at best.

    python scripts/plan.py --config=llama_1b --mesh=data=1,fsdp=8 --device=h100

Compiles the train step for these devices without them, as `scripts/aot.py` does, which tells what
to install. Shown are the memory that XLA predicts, what the devices send one another, and the least
time of an update: by the rates of the data sheets in `scripts/devices.py`, so it is a bound and not
a measurement. Where the step does not fit, fewer rows at a time are tried. Fields of the config are
flags, as `--config.model.layers=16`. What `--mesh` does not name is 1.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import aot
import hlo
import jax
import traffic
from absl import flags
from devices import DEVICES, Device

from lm_jax import config, sharding
from lm_jax.config import Config, ConfigError
from lm_jax.config.flags import parse_flags
from lm_jax.config.resolve import resolve
from lm_jax.door import command
from lm_jax.models.families import choose_attention, family, size

RECORD = aot.ROOT / "scripts" / "results" / "plan.json"
USABLE = 0.9  # of a device's memory; CUDA, NCCL and what lies between arrays take the rest
_NOTES = """
A bound, not a measurement. Assumed are the rates of the data sheet
({source}),
every kernel at the longest of its products, its memory traffic and {launch} us,
attention at the rate of products with one document in a row, and rings in
which every device sends {link:g} GB/s. What XLA predicts of memory is without
CUDA's own.
"""


class Work(NamedTuple):
    """What an update asks of each device."""

    peak: float  # bytes
    flops: float  # of products that XLA sees
    products: float  # seconds of them
    traffic: float  # bytes to and from its own memory
    kernels: float  # seconds of all that XLA sees, without collectives
    attention: float  # FLOP of kernels that XLA does not see into
    sent: float  # bytes to other devices
    kinds: dict[str, int]  # of collectives, and how often


class Times(NamedTuple):
    """The least seconds of an update."""

    compute: float
    communication: float

    @property
    def hidden(self) -> float:
        """With all communication beneath computation."""
        return max(self)

    @property
    def waiting(self) -> float:
        """With computation waiting for all communication."""
        return sum(self)


def work(module: hlo.Module, device: Device, *, peak: float, attention: float) -> Work:
    """The work of a compiled step; `attention` is what counts if it has kernels of its own."""
    found = hlo.count(module, device)
    kernels = [k for k in module.kernels() if k.products]
    sent = list(traffic.collectives(module))
    kinds: dict[str, int] = {}
    for c in sent:
        kinds[c.op] = kinds.get(c.op, 0) + c.times
    return Work(
        peak=peak,
        flops=sum(k.times * k.flops for k in kernels),
        products=sum(k.times * k.flops / device.rate(k.products) for k in kernels),
        traffic=1e9 * found["gigabytes"],
        kernels=1e-3 * found["roofline_ms"],
        attention=attention if found["attention_kernels"] else 0.0,
        sent=sum(c.times * c.sent for c in sent),
        kinds=kinds,
    )


def times(found: Work, device: Device, link: float) -> Times:
    """The bound of an update; `link` is bytes a second that a device sends."""
    return Times(found.kernels + found.attention / device.half, found.sent / link)


def attention_flops(cfg: Config, devices: int) -> float:
    """Of the attention of an update on one device, causal; the backward pass has 5 products for 2.

    Args:
        cfg: resolved.
        devices: that share the rows, or the heads of a row.
    """
    H, _, C = family(cfg.model).heads(cfg.model)
    forward = 2 * H * C * cfg.data.seq_len**2 * cfg.data.batch_size * cfg.model.layers / devices
    return forward * (1 + cfg.model.remat + 2.5)


def fewer(rows: int, most: int) -> Iterator[int]:
    """Rows at a time to try: of the divisors of `rows`, the largest up to `most`, then halves."""
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    while most:
        yield max(n for n in divisors if n <= most)
        most = max(n for n in divisors if n <= most) // 2


def parse_mesh(text: str) -> dict[str, int]:
    """`data=1,fsdp=8` as a dict.

    Raises:
        ConfigError: if it is written otherwise, or a run has no such axis.
    """
    sizes = dict(part.partition("=")[::2] for part in text.split(","))
    if not all(size.isdecimal() and int(size) for size in sizes.values()):
        raise ConfigError(f"--mesh: {text!r} is no mesh; write it as data=1,fsdp=8.")
    for axis in sizes:
        if axis not in aot.AXES:
            raise ConfigError(f"--mesh: a run has no axis {axis}; use {', '.join(aot.AXES)}.")
    return {axis: int(size) for axis, size in sizes.items()}


def described(found: Work, device: Device, link: float, tokens: int, devices: int) -> str:
    """What a step needs and its bound, in lines of at most 80 columns."""
    bound = times(found, device, link)
    fits = found.peak <= USABLE * device.memory
    lines = [
        f"  memory         {found.peak / 2**30:9.1f} GiB at most, of "
        f"{device.memory / 2**30:.1f}: {'fits' if fits else 'does not fit'}"
    ]
    if not fits:
        return lines[0]
    if found.peak > 0.75 * device.memory:
        lines.append(f"                 with XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE} set")

    def row(name: str, seconds: float, amount: str) -> None:
        lines.append(f"  {name:14} {1e3 * seconds:9,.1f} ms  {amount}")

    row("products", found.products, f"{found.flops / 1e12:,.1f} TFLOP")
    row("memory traffic", found.traffic / device.bandwidth, f"{found.traffic / 1e9:,.1f} GB")
    row("all kernels", found.kernels, "each by the longest of the two")
    row("attention", found.attention / device.half, f"{found.attention / 1e12:,.1f} TFLOP")
    if devices == 1:
        row("at best", bound.compute, f"{tokens / bound.compute:,.0f} tokens/s")
        return "\n".join(lines)
    row("communication", bound.communication, f"{found.sent / 2**30:,.1f} GiB sent by a device")
    lines += [f"    {kind:18} {times:6,} times" for kind, times in found.kinds.items()]
    for seconds, how in (
        (bound.hidden, "communication is hidden"),
        (bound.waiting, "computation waits"),
    ):
        row("at best", seconds, f"{tokens / seconds:,.0f} tokens/s if {how}")
    return "\n".join(lines)


def report(cfg: Config, sizes: dict[str, int], name: str, link: float) -> dict[str, Any]:
    """Print the plan of a config on a mesh, with the most rows at a time that fit.

    Returns:
        Its figures, for the record.
    """
    device = DEVICES[name]
    try:
        mesh = aot.mesh_of(sizes, device)
    except NotImplementedError as error:
        raise ConfigError(
            "XLA for CUDA is not installed here; the first lines of scripts/aot.py say how."
        ) from error
    with aot.pretended(mesh):
        resolved = resolve(cfg, windows=10_000)
        impl, _ = choose_attention(resolved)
        total = size(resolved.model, resolved.tokenizer.vocab_size, resolved.data.seq_len).total
        number = sharding.accumulation(resolved)
    rows = resolved.data.batch_size // sharding.row_shares(mesh)
    tokens = resolved.data.batch_size * resolved.data.seq_len
    print(f"{mesh.size} x {device.kind}, {', '.join(f'{a}={n}' for a, n in mesh.shape.items())}")
    print(f"{total:,} parameters, {tokens:,} tokens an update, {resolved.train.compute_dtype},")
    print(f"attention {impl}", flush=True)
    for each in fewer(rows, rows // number):
        print(f"\n{each} of {rows} rows of a device at a time", flush=True)
        with aot.stderr_of_xla():
            compiled = aot.compile_step(config.replace(cfg, data__micro_batch=each), mesh)
        found = work(
            hlo.Module(compiled.as_text()),
            device,
            peak=compiled.memory_analysis().peak_memory_in_bytes,
            attention=attention_flops(resolved, mesh.size),
        )
        print(described(found, device, link, tokens, mesh.size), flush=True)
        if found.peak <= USABLE * device.memory:
            break
    print(_NOTES.format(source=device.source, launch=1e6 * hlo.LAUNCH, link=link / 1e9), end="")
    return {
        "device": name,
        "devices": mesh.size,
        "parameters": total,
        "rows": each,
        "tokens": tokens,
        "fits": found.peak <= USABLE * device.memory,
        **found._asdict(),
        **times(found, device, link)._asdict(),
    }


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given: Any = flags.FlagValues()
    flags.DEFINE_string("mesh", "data=1", "Devices along each axis, as data=1,fsdp=8.", given)
    flags.DEFINE_enum("device", "h100", list(DEVICES), "Kind of the devices.", given)
    about = "GB/s that a device sends to the slowest of the others; 0: what its data sheet says."
    flags.DEFINE_float("link", 0.0, about, lower_bound=0, flag_values=given)
    flags.DEFINE_bool(
        "record", False, f"Keep the figures in {RECORD.relative_to(aot.ROOT)}.", given
    )
    parse_flags(given, argv, __doc__, subject=["config"])
    link = 1e9 * given.link or DEVICES[given.device].link
    found = report(given.config, parse_mesh(given.mesh), given.device, link)
    if given.record:
        arguments = " ".join(word for word in (argv or sys.argv)[1:] if word != "--record")
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {"plans": {}}
        record["jax"] = jax.__version__
        record["plans"][arguments] = found
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if not found["fits"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
