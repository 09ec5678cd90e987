"""Logs of any trainer."""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.log import course, evaluation, loop, loss, subject, uniform
from lm_jax.doctor.log.series import Records

examine_log = examination(subject.Subject, subject, loss, course, uniform, loop, evaluation)

__all__ = ["Records", "examine_log"]
