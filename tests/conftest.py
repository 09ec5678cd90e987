"""Settings for all tests: CPU, no silent rank promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The warpgroups of an interpreted kernel wait for each other: each needs a thread of XLA's pool.
os.environ.setdefault("NPROC", "8")

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def parsed_flags():
    """Grain and TFDS read absl flags, which pytest does not parse."""
    flags.FLAGS.mark_as_parsed()
