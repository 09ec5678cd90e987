"""lm_jax: a language-model trainer that proves its numbers."""
