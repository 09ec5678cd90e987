"""The typed run config: fields with their defaults, copies, hash."""

from lm_jax.config.copies import config_hash, difference, from_dict, from_record, replace, to_dict
from lm_jax.config.fields import (
    INSIDE,
    ROUTED,
    STATES,
    Config,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    incidental_fields,
)
from lm_jax.config.section import ConfigError, named_fields
from lm_jax.config.values import Curve, Duration, RopeScaling, Span

__all__ = ["INSIDE", "ROUTED", "STATES", "Config", "ConfigError", "Curve", "Duration"]
__all__ += ["MeshConfig", "ModelConfig", "OptimConfig", "config_hash", "difference", "from_dict"]
__all__ += ["RopeScaling", "Span", "from_record", "incidental_fields", "named_fields", "replace"]
__all__ += ["to_dict"]
