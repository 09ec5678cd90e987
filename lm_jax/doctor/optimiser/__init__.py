"""Optimisers and schedules."""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.optimiser import decay, schedule, subject, update

examine_optimiser = examination(subject.Subject, subject, update, schedule, decay)
