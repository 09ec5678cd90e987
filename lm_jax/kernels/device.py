"""The device that code is compiled for, which need not be one of this machine."""

from typing import Any

import jax


def target() -> Any:
    """That of the abstract mesh, which a compilation without the device sets, or the first one."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
