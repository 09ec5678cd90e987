"""`python -m lm_jax.harness`; what it does stands in `lm_jax.harness.command`."""

from lm_jax.harness.command import main

main()
