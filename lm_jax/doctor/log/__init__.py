"""Logs of any trainer."""

from lm_jax.doctor.log.examine import examine_log

__all__ = ["examine_log"]
