"""Distillation: the divergence, the teacher and its targets, the objective and its log."""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.distill import divergence, objective, subject, targets

examine_distillation = examination(subject.Subject, subject, divergence, targets, objective)
