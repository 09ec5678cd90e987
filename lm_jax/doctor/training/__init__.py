"""Short trainings on random tokens: is anything learned that cannot be known?"""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.training import subject

examine_training = examination(subject.Subject, subject)
