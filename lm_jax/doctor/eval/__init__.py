"""Evaluation and generation."""

from lm_jax.doctor.eval.examine import examine_evaluation

__all__ = ["examine_evaluation"]
