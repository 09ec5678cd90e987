"""Gradients and kernels."""

from lm_jax.doctor.gradient.examine import examine_gradients
from lm_jax.doctor.gradient.kernel import examine_kernel

__all__ = ["examine_gradients", "examine_kernel"]
