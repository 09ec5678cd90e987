"""The whole path against an oracle: a source whose entropy rate is known."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lm_jax import config
from lm_jax.data.open import open_data
from lm_jax.data.synthetic import MarkovSource
from lm_jax.loop import train_and_evaluate
from tests.helpers import ROOT, load_config, source_nats, source_symbols


@pytest.mark.slow
def test_quickstart_comes_down_to_the_entropy_rate(tmp_path):
    cfg = load_config("quickstart").get_config()
    # A run of the command in the README that is finished is not made again.
    workdir = os.environ.get("LM_JAX_QUICKSTART")
    if workdir is None:
        workdir, cache_dir = str(tmp_path / "run"), str(tmp_path / "cache")
        cfg = config.replace(cfg, data__cache_dir=cache_dir)
        command = [sys.executable, "-m", "lm_jax.main", "--config=configs/quickstart.py"]
        command += [f"--workdir={workdir}", f"--config.data.cache_dir={cache_dir}"]
        # Optimised, as users run it.
        subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, check=True)
    examined = json.loads((pathlib.Path(workdir) / "doctor.json").read_text())["findings"]
    statuses = [finding["status"] for finding in examined]
    assert {"fail", "warn"}.isdisjoint(statuses) and statuses.count("pass") > 50
    store = open_data(cfg)
    results = train_and_evaluate(cfg, workdir)
    source = MarkovSource()
    for name in ("valid", "test"):
        split = store.split(name)
        starts = split.document_starts
        nats = []
        for first, last in zip(starts[:-1], starts[1:], strict=True):
            text = store.tokenizer.decode(np.asarray(split.tokens[first:last]))
            nats.append(source_nats(source, source_symbols(text)))
        nats = np.concatenate(nats)
        standard_error = nats.std() / np.sqrt(len(nats))
        loss = results[name]["loss"]
        assert loss < 1.02 * source.entropy_rate
        assert loss > source.entropy_rate - 3 * standard_error
        # Nobody predicts a sample better than its source, but for luck in the 200,000 draws.
        assert loss > nats.mean() - 3 * standard_error
