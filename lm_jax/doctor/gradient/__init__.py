"""Gradients against central differences in float64, and kernels against references."""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.gradient import kernel, point, subject

examine_gradients = examination(subject.Subject, subject, point)
examine_kernel = examination(kernel.Subject, kernel)
