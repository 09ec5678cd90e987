"""`python -m lm_jax.doctor`; what it does stands in `lm_jax.preflight.command`."""

from lm_jax.preflight.command import main

main()
