"""A checkout on PYTHONPATH: not installed and without TensorFlow Datasets."""

import json
import os
import pathlib
import subprocess
import sys

import lm_jax

ROOT = pathlib.Path(__file__).parents[1]

# Python runs this before anything else.
SITECUSTOMIZE = """
import importlib.metadata, sys

sys.modules["tensorflow_datasets"] = None
find = importlib.metadata.Distribution.from_name.__func__


def find_others(cls, name):
    if name == "lm_jax":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(cls, name)


importlib.metadata.Distribution.from_name = classmethod(find_others)
"""


def test_wikitext2_trains_from_a_checkout(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "source").mkdir()
    for split, count in (("train", 20), ("valid", 2), ("test", 2)):
        articles = (f" \n = {split} {i} = \n \n words of article {i} \n" for i in range(count))
        (tmp_path / "source" / f"wiki.{split}.tokens").write_text("".join(articles))
    overrides = {
        "data.source_dir": tmp_path / "source",
        "data.cache_dir": tmp_path / "cache",
        "data.seq_len": 32,
        "data.batch_size": 2,
        "tokenizer.vocab_size": 270,
        "model.layers": 1,
        "model.d_model": 16,
        "model.heads": 2,
        "optim.warmup": "1",
        "train.steps": "2",
        "train.compute_dtype": "float32",
        "eval.splits": "valid",
        "doctor": "off",
    }
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "lm_jax.main", f"--workdir={workdir}"]
    command += [f"--config={ROOT / 'configs' / 'wikitext2.py'}"]
    command += [f"--config.{name}={value}" for name, value in overrides.items()]
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    record = json.loads((workdir / "config.json").read_text())
    assert record["versions"]["lm_jax"] == lm_jax.__version__
    assert record["data"]["splits"]["train"]["documents"] == 20
    assert json.loads((workdir / "eval_valid.json").read_text())["loss"] > 0
