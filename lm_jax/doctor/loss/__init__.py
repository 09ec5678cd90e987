"""Losses: which tokens they score, the numbers they return, and their gradients."""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.loss import subject, target, value

examine_loss = examination(subject.Subject, subject, target, value)
