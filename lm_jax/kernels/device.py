"""The device that code is compiled for, which need not be one of this machine."""

import re
from typing import Any

import jax

# Compute capabilities (https://developer.nvidia.com/cuda/gpus) by a part of the device kind, for
# devices that do not say theirs. The first name that fits counts.
_CAPABILITIES = {
    r"GB300|B300": (10, 3),
    r"GB200|B200|B100": (10, 0),
    r"GH200|H100|H200|H800|H20": (9, 0),
    r"L4|L40S?|L20|RTX 40\d\d|RTX \d{4} Ada": (8, 9),
    r"A100|A800|A30": (8, 0),
    r"A10G?|A40|A16|A2|RTX A\d{4}|RTX 30\d\d": (8, 6),
    r"RTX 50\d\d|RTX PRO \d{4}": (12, 0),
    r"T4|RTX 20\d\d|Quadro RTX \d{4}|TITAN RTX|GTX 16\d\d": (7, 5),
    r"V100|TITAN V": (7, 0),
    r"P100": (6, 0),
}


def target() -> Any:
    """The mesh's abstract device, which a compilation without the device sets, else the first one.

    It has the attributes `platform` and `device_kind`; for others see `compute_capability`.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def compute_capability(device: Any) -> tuple[int, int] | None:
    """Major and minor compute capability of an NVIDIA GPU; None of other and unknown devices.

    A `jax.Device` knows it. The abstract device of a mesh knows only its kind: it is looked up
    among the devices of this machine, and then in a table.
    """
    if device.platform != "gpu":
        return None
    alike = [d for d in (device, *jax.devices()) if d.device_kind == device.device_kind]
    for known in alike:
        digits = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(known, "compute_capability", "")))
        if digits:
            return int(digits[1]), int(digits[2])
    for kind, capability in _CAPABILITIES.items():
        if re.search(rf"\b({kind})\b", device.device_kind):
            return capability
    return None


def describe(device: Any) -> str:
    """A device in words: its compute capability, or else its kind."""
    capability = compute_capability(device)
    if capability is None:
        return "a cpu" if device.platform == "cpu" else device.device_kind
    return "compute capability {}.{}".format(*capability)


def choose_dtype(name: str) -> tuple[str, str]:
    """The dtype that `train.compute_dtype`, auto or a name, stands for on `target()`, and why."""
    if name != "auto":
        return name, "named in the config"
    device = target()
    capability = compute_capability(device) or (0, 0)
    where = describe(device)
    if device.platform == "tpu" or capability >= (8, 0):
        return "bfloat16", f"fast on {where}"
    if capability >= (7, 0):
        return "float16", f"fast on {where}, which has no fast bfloat16"
    return "float32", f"16 bits are not known to be faster on {where}"
