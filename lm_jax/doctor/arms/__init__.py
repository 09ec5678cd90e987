"""Runs against each other: do they differ, are they what they claim, can they be ranked?"""

from lm_jax.doctor.arms import examine, subject
from lm_jax.doctor.checks import examination

examine_arms = examination(subject.Subject, subject, examine)
