"""What a compiled step will do, counted in its optimised HLO text, without a device.

Counted are the kernels that one call executes, each as often as the loops around it run, the matrix
products among them by the dtypes of their operands, and the bytes they must read and write. The
roofline is the sum over kernels of the longest of three times: bytes over the bandwidth of a device
(`devices.py`), operations over its rate for the dtype, and `LAUNCH`. Kernels of attention are
opaque to XLA and listed apart, collectives in `traffic.py`.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

from devices import H200_MEASURED, Device

LAUNCH = 1.5e-6  # seconds a kernel takes at least
ATTENTION = re.compile(r"attention|mosaic_gpu|cudnn\$fmha")
# Collectives, and how much of an operand each of n devices sends; see `traffic.py`.
SENT = {
    "all-gather": lambda n: n - 1.0,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2} | {
    name: int(name[1:]) // 8 for name in ("f32", "s32", "u32", "f64", "s64", "u64")
}
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+)(?: \(.*)? \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.+)")
_NO_KERNEL = set(
    "parameter constant bitcast get-tuple-element tuple after-all partition-id replica-id".split()
)
_VIEWS = {"bitcast", "copy", "reshape"}  # inside a fusion they move nothing
_PARTS = {"slice", "dynamic-slice", "gather"}  # read only what they return


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, kind: str) -> list[str]:
        """Names of the computations that it calls as `kind`: calls, to_apply or body."""
        return re.findall(rf"\b{kind}=%?([\w.-]+)", self.attributes)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, executed `times` in one call of the step."""

    name: str
    op: str
    times: int
    bytes: int  # of one execution
    flops: int  # of its matrix products
    products: str  # "", "16 bit" or "float32": the widest operand of its matrix products

    def seconds(self, device: Device) -> float:
        """The least that one execution takes."""
        compute = self.flops / device.rate(self.products) if self.products else 0.0
        return max(self.bytes / device.bandwidth, compute, LAUNCH)


class Module:
    """The computations of an HLO module by name."""

    def __init__(self, text: str):
        """Read the text of `compiled.as_text()`."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")])
        self.devices = math.prod(map(int, counts))
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                current.append(_instruction(match[2], match[3], bool(match[1])))
        self.unknown_loops: list[str] = []

    def kernels(self) -> list[Kernel]:
        """What the entry computation executes; fills `unknown_loops`, counted as run once."""
        return [self._kernel(i, types, times) for i, types, times in self.executed()]

    def executed(self) -> Iterator[tuple[Instruction, dict[str, str], int]]:
        """Instructions that do something, the types beside them, and how often each is executed."""
        self.unknown_loops = []
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[Instruction, dict[str, str], int]]:
        computation = self.computations[name]
        types = {i.name: i.type for i in computation}
        for i in computation:
            if i.op in _NO_KERNEL or i.op.endswith("-done"):
                continue
            if i.op == "while":
                known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', i.attributes)
                if not known:
                    self.unknown_loops.append(i.name)
                yield from self._walk(i.called("body")[0], times * int(known[1] if known else 1))
            elif i.op == "conditional":
                self.unknown_loops.append(i.name)  # the host decides here too
            elif i.op in ("call", "async-start"):
                for called in i.called("to_apply") + i.called("calls"):
                    yield from self._walk(called, times)
            else:
                yield i, types, times

    def _kernel(self, i: Instruction, types: dict[str, str], times: int) -> Kernel:
        flops, products = 0, ""
        if i.op in ("fusion", "fusion-start"):
            fused = i.called("calls")[0]
            moved = self._moved(fused)
            for count, kind in self._products(fused):
                flops, products = flops + count, max(products, kind)
        else:
            moved = size(i.type) + sum(size(types[operand]) for operand in i.operands)
        name = i.op
        if target := re.search(r'custom_call_target="([^"]*)"', i.attributes):
            name = target[1]
            if name.startswith("__cublas"):  # where XLA has no own kernel of a product
                flops, products = _product(i, types)
        return Kernel(name, i.op, times, moved, flops, products)

    def _moved(self, name: str) -> int:
        """Bytes that a fusion reads and writes: of a part, no more than the part."""
        computation = self.computations[name]
        by_name = {i.name: i for i in computation}
        uses: dict[str, list[tuple[Instruction, int]]] = {}
        for i in computation:
            for position, operand in enumerate(i.operands):
                uses.setdefault(operand, []).append((i, position))

        def ends(name: str) -> Iterator[tuple[Instruction, int]]:
            for user, position in uses.get(name, []):
                # A part of a part is read by what uses it.
                if user.op in _VIEWS or (user.op == "slice" and uses.get(user.name)):
                    yield from ends(user.name)
                else:
                    yield user, position

        def read(parameter: Instruction) -> int:
            whole, parts = size(parameter.type), 0
            for user, position in ends(parameter.name):
                if position == 0 and user.op in _PARTS:
                    parts += size(user.type)
                elif not (position == 0 and user.op == "dynamic-update-slice"):
                    return whole
            return min(whole, parts)

        def written(i: Instruction) -> int:
            while i.op in _VIEWS and i.operands[0] in by_name:
                i = by_name[i.operands[0]]
            if i.op == "dynamic-update-slice":
                return size(by_name[i.operands[1]].type)
            return size(i.type)

        root = next(i for i in computation if i.root)
        roots = [by_name[n] for n in root.operands] if root.op == "tuple" else [root]
        return sum(read(i) for i in computation if i.op == "parameter") + sum(map(written, roots))

    def _products(self, name: str) -> Iterator[tuple[int, str]]:
        """Operations and kind of every matrix product in a fusion."""
        types = {i.name: i.type for i in self.computations[name]}
        for i in self.computations[name]:
            for called in i.called("calls") if i.op in ("fusion", "call") else []:
                yield from self._products(called)
            if i.op == "dot":
                yield _product(i, types)


def count(module: Module, device: Device = H200_MEASURED) -> dict[str, float]:
    """The figures of a compiled step, those of attention's own kernels and of collectives apart."""
    kernels = module.kernels()
    attention = [k for k in kernels if k.op == "custom-call" and ATTENTION.search(k.name)]
    rest = [k for k in kernels if k not in attention and k.op.removesuffix("-start") not in SENT]
    products: Counter[str] = Counter()
    for k in rest:
        products[k.products] += k.times
    return {
        "kernels": sum(k.times for k in kernels),
        "float32_products": products["float32"],
        "16_bit_products": products["16 bit"],
        "gigabytes": round(sum(k.times * k.bytes for k in rest) / 1e9, 3),
        "roofline_ms": round(1e3 * sum(k.times * k.seconds(device) for k in rest), 3),
        "unknown_loops": len(module.unknown_loops),
        "attention_kernels": sum(k.times for k in attention),
    }


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    operands = tuple(re.findall(r"%([\w.-]+)", rest[start:end]))
    return Instruction(name, type_, rest[:start], operands, rest[end + 1 :], root)


def _product(i: Instruction, types: dict[str, str]) -> tuple[int, str]:
    """Operations and kind of a matrix product."""
    (left, sizes), (right, _) = (_shapes(types[n])[0] for n in i.operands[:2])
    axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([0-9,"]*)', i.attributes)
    assert axes is not None
    depth = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    outputs = math.prod(_shapes(i.type)[0][1])
    wide = "f32" in (left, right) or "f64" in (left, right)
    return 2 * outputs * depth, "float32" if wide else "16 bit"


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise ValueError(f"an open parenthesis in {text[:80]!r}")


def _shapes(type_: str) -> list[tuple[str, list[int]]]:
    return [(d, [int(n) for n in sizes.split(",") if n]) for d, sizes in _SHAPE.findall(type_)]


def size(type_: str) -> int:
    """Bytes of all arrays in a type."""
    return sum(_BYTES[dtype] * math.prod(sizes) for dtype, sizes in _shapes(type_))
