"""Models."""

from lm_jax.doctor.model.examine import examine_model

__all__ = ["examine_model"]
