"""The notebook for Colab: as it lies in git, and run from top to bottom at a toy size."""

import json
import os
import re

import numpy as np
import pytest

from tests.helpers import ROOT

NOTEBOOK = ROOT / "scripts" / "lm_jax_colab.ipynb"
TOY = """
cfg.doctor = "off"  # other tests have it on
cfg.data.cache_dir, cfg.data.seq_len, cfg.data.batch_size = "cache", 32, 4
cfg.tokenizer.vocab_size = 270
cfg.model.layers, cfg.model.d_model, cfg.model.heads = 1, 32, 2
cfg.train.steps, cfg.train.eval_every, cfg.train.checkpoint_every = "20", "10", "10"
cfg.optim.warmup = "5"
"""


class Executed:
    """The notebook after a kernel of the running Python has run it in `folder`."""

    def __init__(self, folder):
        nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
        for name in ("ipykernel", "torch"):
            pytest.importorskip(name, reason=f"{name} is not installed")
        import nbformat

        notebook = nbformat.read(NOTEBOOK, as_version=4)
        self.folder, self.cells = folder, {cell["id"]: cell for cell in notebook.cells}
        self.cells["config"].source += TOY
        resources = {"metadata": {"path": str(folder)}}
        environment = {"LM_JAX_SHARED_DATA": str(folder), "PYTHONPATH": str(ROOT)}
        environment["OMP_NUM_THREADS"] = "1"  # PyTorch's wait for each other on a busy machine
        client = nbclient.NotebookClient(notebook, timeout=120, resources=resources)
        client.execute(env=os.environ | environment)

    def said(self, cell):
        """What stands below a cell, as text."""
        outputs = self.cells[cell].outputs
        return "\n".join(one.get("text") or one["data"]["text/plain"] for one in outputs)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    words = "ba du kilo mefa no pi roso tu".split()
    lines = np.random.default_rng(0).choice(words, (4000, 6))
    (folder / "tinyshakespeare").mkdir()
    text = "\n".join(map(" ".join, lines))
    (folder / "tinyshakespeare" / "input.txt").write_text(text)
    return Executed(folder)


def test_it_lies_in_git_without_outputs():
    text = NOTEBOOK.read_text()
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert list(notebook["metadata"]) == ["kernelspec"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert all(cell["metadata"] == {} and re.fullmatch(r"[a-z-]+", cell["id"]) for cell in cells)
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_it_is_a_valid_notebook():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))


@pytest.mark.slow
@pytest.mark.long
def test_a_run_is_trained_shown_and_sampled(executed):
    assert "update 20 of 20" in executed.said("run")
    assert "image/png" in executed.cells["plot"].outputs[0]["data"]
    assert re.match(r"doctor: \d+ passed", executed.said("doctor"))
    assert "sample 2 of 2\nROMEO:" in executed.said("sample")


@pytest.mark.slow
@pytest.mark.long
def test_the_missing_mask_is_named(executed):
    believed, honest = re.findall(r"\d\.\d\d", executed.said("believed"))[:2]
    assert float(believed) < float(honest) / 2
    assert re.match(r"doctor: .*failed: model.suffix_swap", executed.said("caught"))
    assert re.match(r"doctor: \d+ passed", executed.said("mended"))


@pytest.mark.slow
@pytest.mark.long
def test_an_export_is_written(executed):
    assert list(executed.folder.glob("exported/*/model.safetensors"))


@pytest.mark.slow
@pytest.mark.long
def test_transformers_writes_on_from_the_export(executed):
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert "same logits" in executed.said("export")
    assert "JULIET:" in executed.said("transformers")
