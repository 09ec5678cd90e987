"""Optimisers and schedules."""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.optimiser import decay, loop, schedule, subject, update

examine_optimiser = examination(subject.Subject, loop, update, schedule, decay)
