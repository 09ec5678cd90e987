"""What the devices of a compiled step send one another, counted in its optimised HLO text.

Counted are gathers, reductions, exchanges and permutations, each as often as the loops around it
run. A device of n sends in a ring, of an operand with so many bytes: `all-gather` bytes (n - 1),
`reduce-scatter` and `all-to-all` bytes (n - 1) / n, `all-reduce` twice that, `collective-permute`
the bytes. Other algorithms of NCCL send as much or more.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

import hlo

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_SPACED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_LISTED = re.compile(r"replica_groups=\{(?:\{([\d,]*)\})?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, executed `times` in one call of the step."""

    op: str
    times: int
    devices: int  # that take part in it together
    bytes: int  # of its operands, on one device

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one execution."""
        return self.bytes * hlo.SENT[self.op](self.devices)


def collectives(module: hlo.Module) -> Iterator[Collective]:
    """The collectives that the entry computation executes."""
    for i, types, times in module.executed():
        if i.op in ("fusion", "fusion-start"):
            for name in i.called("calls"):
                inside = module.computations[name]
                types = {j.name: j.type for j in inside}
                yield from (_collective(j, types, times, module) for j in inside if _kind(j))
        elif _kind(i):
            yield _collective(i, types, times, module)


def count(module: hlo.Module) -> dict[str, float]:
    """By kind how often a step has it; GiB that a device sends in all, and that it gathers."""
    found = list(collectives(module))
    times: Counter[str] = Counter()
    for c in found:
        times[c.op] += c.times
    gathered = sum(c.times * c.bytes * c.devices for c in found if c.op == "all-gather")
    return {
        **{kind.replace("-", "_"): times[kind] for kind in hlo.SENT if times[kind]},
        "sent_gib": round(sum(c.times * c.sent for c in found) / 2**30, 3),
        "gathered_gib": round(gathered / 2**30, 3),
    }


def _kind(i: hlo.Instruction) -> str:
    kind = i.op.removesuffix("-start")
    return kind if kind in hlo.SENT else ""


def _collective(
    i: hlo.Instruction, types: dict[str, str], times: int, module: hlo.Module
) -> Collective:
    size = sum(hlo.size(types[operand]) for operand in i.operands)
    devices = module.devices if _kind(i) == "collective-permute" else group(i, module.devices)
    return Collective(_kind(i), times, devices, size)


def group(i: hlo.Instruction, devices: int) -> int:
    """The devices of a group of a collective, written in one of four ways.

    Raises:
        ValueError: if it is written in another.
    """
    if mesh := _MESH.search(i.attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if spaced := _SPACED.search(i.attributes):
        return int(spaced[1])
    if listed := _LISTED.search(i.attributes):
        return len(listed[1].split(",")) if listed[1] else devices
    raise ValueError(f"{i.name}: no replica_groups in {i.attributes[:80]!r}")
