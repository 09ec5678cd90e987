"""lm_jax: a language-model trainer that proves its numbers."""

__version__ = "0.1.0"
