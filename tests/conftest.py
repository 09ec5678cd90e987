"""Settings for all tests: CPU, quick compiling, no silent rank promotion."""

import gc
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The warpgroups of an interpreted kernel wait for each other: each needs a thread of XLA's pool.
os.environ.setdefault("NPROC", "8")
# Most of the time of the tests is compiling: code is not optimised, except where a test asks for
# what users run, and what several tests compile is shared. Workers and subprocesses inherit this.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="lm_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import numpy as np
import pytest
from absl import flags

# Begun first, so that at the end no worker waits for another with one of these.
LONG = (
    "test_all_parts_run test_a_terminal_shows_what_goes_on test_shipped_configs_are_in_order "
    "test_the_preflight_is_in_order test_the_full_set_is_in_order test_every_block_runs"
).split()

jax.config.update("jax_numpy_rank_promotion", "raise")
# What is compiled stays for the whole session: looking through all of it for garbage takes time.
gc.set_threshold(20_000, 50, 50)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: getattr(item, "originalname", "") not in LONG)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Tokenised corpora, prepared once for all workers (one at a time: the cache is locked)."""
    root = tmp_path_factory.getbasetemp()
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    return str((root.parent if worker else root) / "corpora")


@pytest.fixture(scope="session", autouse=True)
def no_pages():
    """Drawing the page of a run takes longer than most runs of the tests; see test_report.py."""
    from lm_jax import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def parsed_flags():
    """Grain and TFDS read absl flags, which pytest does not parse."""
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with 40 small documents of a made-up language."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["ba", "du", "kilo", "mefa", "no", "pi", "roso", "tu"]
    for i in range(40):
        lines = (" ".join(rng.choice(words, 6)) for _ in range(12))
        (folder / f"{i:02}.txt").write_text("\n".join(lines) + "\n")
    return folder
