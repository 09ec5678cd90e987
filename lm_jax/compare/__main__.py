"""`python -m lm_jax.compare`."""

from lm_jax.compare.compare import main

main()
