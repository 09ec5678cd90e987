"""Training data: ids, splits, windows, tokenizer, and the order they are read in."""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.data import grams, overlap, readers, subject, tokens

examine_data = examination(subject.Subject, subject, grams, tokens, overlap, readers)
