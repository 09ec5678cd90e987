"""A checkout on PYTHONPATH: not installed, without TensorFlow Datasets or nvidia's wheels."""

import json
import os
import subprocess
import sys

import pytest

import lm_jax
from tests.helpers import ROOT

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


@pytest.mark.slow
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


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit in a folder `cuda-13`; the folder `path` has a link to its nvcc."""
    for name in ("bin/nvcc", "bin/ptxas", "nvvm/libdevice/libdevice.10.bc"):
        program(tmp_path / "cuda-13" / name)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "nvcc").symlink_to(tmp_path / "cuda-13" / "bin" / "nvcc")
    return tmp_path / "cuda-13"


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def cuda_root(tmp_path, **changes):
    """CUDA_ROOT once lm_jax is imported, where nothing else than `tmp_path` has CUDA."""
    code = "import os, sys, lm_jax; print(os.environ.get('CUDA_ROOT'), 'jax' in sys.modules)"
    env = {"PATH": str(tmp_path / "path"), "PYTHONPATH": f"{tmp_path / 'wheels'}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        # -S: without the packages that are installed here
        [sys.executable, "-S", "-c", code],
        env=env | changes,
        capture_output=True,
        text=True,
    )
    root, jax_is_imported = run.stdout.split()
    assert jax_is_imported == "False"
    return root


def test_jax_is_told_the_folder_of_nvcc(tmp_path, toolkit):
    assert cuda_root(tmp_path) == str(toolkit)
    assert cuda_root(tmp_path, CUDA_ROOT="/given") == "/given"


@pytest.mark.parametrize("package", ["cu13", "cuda_nvcc"])
def test_wheels_with_ptxas_are_left_to_jax(tmp_path, toolkit, package):
    program(tmp_path / "wheels" / "nvidia" / package / "bin" / "ptxas")
    assert cuda_root(tmp_path) == "None"


def test_wheels_in_which_jax_finds_nothing_do_not_count(tmp_path, toolkit):
    (tmp_path / "wheels" / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    assert cuda_root(tmp_path) == str(toolkit)
    # JAX looks no further than cu13.
    program(tmp_path / "wheels" / "nvidia" / "cuda_nvcc" / "bin" / "ptxas")
    assert cuda_root(tmp_path) == str(toolkit)


def test_no_other_folder_is_taken_for_a_toolkit(tmp_path):
    default = "/usr/local/cuda"
    expected = os.path.realpath(default) if os.path.exists(f"{default}/bin/nvcc") else "None"
    assert cuda_root(tmp_path) == expected
    for name in ("nvcc", "ptxas"):  # scripts that call those of the toolkit
        program(tmp_path / "bin" / name)
    assert cuda_root(tmp_path, PATH=str(tmp_path / "bin")) == expected
