"""`python -m lm_jax.doctor`; what it does stands in `lm_jax.preflight.command`."""

from absl import app

from lm_jax.config.flags import parse
from lm_jax.preflight.command import main

app.run(main, flags_parser=parse)
