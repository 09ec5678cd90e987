"""The README's blocks of code run as they stand, in order and in one folder.

Two things differ from what a reader does: the configs are small ones of the same names, which lie
in that folder, and `STANDS_FOR` says what the placeholders are.
"""

import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import CONFIGS, ROOT

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What is not run, and why.
NOT_RUN = {
    r"pip install ": "the environment of the tests is there; .ci/run installs",
    r"pytest ": ".ci/run runs the tests",
}
STANDS_FOR = {
    r"\bDIR\b": "texts",
    r"--config\.train\.steps=\d+": "--config.train.steps=24",
    r"--tokens=\d+": "--tokens=8",
    r"\.steps = \"\d+\"": '.steps = "12"',
    r"(?m)^(cfg = .*)$": "\\1\nsmall(cfg)",
}
SMALL = """
def small(cfg):
    cfg.doctor = "off"
    cfg.data.seq_len, cfg.data.batch_size, cfg.data.cache_dir = 32, 4, "cache"
    cfg.tokenizer.vocab_size = min(cfg.tokenizer.vocab_size, 264)
    if cfg.tokenizer.kind == "char":  # which knows no letter of a prompt that the texts lack
        cfg.tokenizer.kind = "byte"
    cfg.model.layers, cfg.model.d_model, cfg.model.heads, cfg.model.kv_heads = 1, 16, 2, 0
    cfg.optim.warmup, cfg.optim.end_lr = "2", 0.1
    cfg.train.steps, cfg.train.steps_per_call = "12", 2
    cfg.train.eval_every, cfg.train.checkpoint_every = "6", "6"
    return cfg
"""
SMALLER = f"""
import functools, pathlib
from lm_jax.config.flags import load_module
{SMALL}
shipped = load_module(pathlib.Path({{path!r}}))
if hasattr(shipped, "ARMS"):
    ARMS = shipped.ARMS


@functools.wraps(shipped.get_config)
def get_config(*arm):
    return small(shipped.get_config(*arm))
"""


def steps():
    """Python blocks and single commands of the README, in order, as (language, source)."""
    for language, body in BLOCK.findall((ROOT / "README.md").read_text()):
        if language == "python":
            yield language, body
        elif language in ("", "bash", "sh", "shell", "console"):
            lines = re.sub(r"\\\n\s*", "", body).splitlines()
            lines = [line.removeprefix("$ ").partition("  # ")[0] for line in lines]
            for command in "&&".join(line for line in lines if line[:1] != "#").split("&&"):
                if command.strip():
                    yield "bash", command.strip()


def is_run(source):
    """Whether a step is run here."""
    if "import torch" in source and importlib.util.find_spec("torch") is None:
        return False
    return not any(re.search(reason, source) for reason in NOT_RUN)


@pytest.fixture
def folder(tmp_path):
    """Where a reader is: with texts, small configs and the log of a trainer."""
    (tmp_path / "configs").mkdir()
    for name in CONFIGS:
        path = str(ROOT / "configs" / f"{name}.py")
        (tmp_path / "configs" / f"{name}.py").write_text(SMALLER.format(path=path))
    (tmp_path / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        lines = (" ".join(rng.choice(["ba", "du", "kilo", "mefa", "roso"], 6)) for _ in range(12))
        (tmp_path / "texts" / f"{i:02}.txt").write_text("\n".join(lines) + "\n")
    losses = 10.8 - 4 * np.arange(400) / 400 + rng.normal(0, 0.05, 400)
    rows = (f"iter {i}: loss {loss:.4f}, time 50.00ms\n" for i, loss in enumerate(losses))
    (tmp_path / "log.txt").write_text("".join(rows))
    return tmp_path


@pytest.mark.slow
def test_every_block_runs(folder):
    bin_first = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": bin_first}
    done = []
    for language, source in filter(lambda step: is_run(step[1]), steps()):
        for pattern, meaning in STANDS_FOR.items():
            if language == "bash" or pattern.endswith(("$", '"')):
                source = re.sub(pattern, meaning, source)
        command = [sys.executable, "-c", SMALL + source] if language == "python" else source
        run = subprocess.run(
            command,
            shell=language == "bash",
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{source}\n{run.stdout[-2000:]}{run.stderr[-3000:]}"
        done.append(source)
    assert any("lm_jax.main" in source or "lm-jax train" in source for source in done)
    assert any("import lm_jax" in source for source in done)


def test_nothing_is_left_out_that_is_not_in_the_readme():
    """The first command, and Python without torch, are run wherever the tests are."""
    run = [source for _, source in steps() if is_run(source)]
    assert "python -m lm_jax.main --config=configs/quickstart.py" in run
