"""Training data: ids, splits, windows, tokenizer, and the order they are read in."""

from lm_jax.doctor.checks import examination
from lm_jax.doctor.data import overlap, readers, rows, subject, tokens

examine_data = examination(subject.Subject, subject, rows, tokens, overlap, readers)

__all__ = ["examine_data"]
