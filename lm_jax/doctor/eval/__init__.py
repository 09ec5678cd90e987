"""Evaluation and generation: is every target scored once, and is the scored model the one used?"""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.eval import decoding, sampling, scoring, subject

examine_evaluation = examination(subject.Subject, subject, scoring, decoding, sampling)
