"""What users see first: the names of `lm_jax`, a run with its verbs, the command `lm-jax`."""

import ast
import importlib.machinery
import inspect
import json
import pathlib
import pickle
import pkgutil
import re
import shutil
import subprocess
import sys
import time
import tomllib
import types

import numpy as np
import pytest
from absl import flags

import lm_jax
from lm_jax import loop, page
from lm_jax import main as run_command
from lm_jax.__main__ import COMMANDS, main
from lm_jax.files import finite_or_none
from lm_jax.history import History
from tests.helpers import Page, words

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NAMES = [name for name in lm_jax.__all__ if not name.startswith("__")]


def fresh(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout


def test_import_is_light():
    code = (
        "import sys, time; began = time.perf_counter(); import lm_jax; dir(lm_jax); "
        "print(time.perf_counter() - began); "
        "heavy = {'jax', 'numpy', 'absl', 'grain', 'tokenizers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    assert min(float(fresh(code)) for _ in range(3)) < 0.3  # the machine may be busy


def test_names_are_imported_when_used():
    code = "import sys, lm_jax; lm_jax.{}; print([m for m in ('jax', 'flax') if m in sys.modules])"
    assert fresh(code.format("Config().train")) == "[]\n"
    assert fresh(code.format("train")) == "[]\n"  # whose first line is said before JAX starts
    assert fresh(code.format("open_run")) == "['jax', 'flax']\n"


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "lm_jax" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        for alias in node.names
    }
    assert sorted(seen) == sorted(NAMES) == sorted(lm_jax._LAZY)
    for name, (module, attribute) in seen.items():
        assert getattr(lm_jax, name) is pkgutil.resolve_name(f"{module}.{attribute}")
    with pytest.raises(AttributeError, match="'lm_jax' has no attribute 'nothing'"):
        lm_jax.nothing  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_no_name_hides_a_module_and_the_readme_has_each(name):
    here = any((ROOT / "lm_jax" / path).exists() for path in (name, f"{name}.py"))
    assert here == inspect.ismodule(getattr(lm_jax, name))
    assert f"`lm_jax.{name}`" in README


def example(thing):
    """The code in a docstring."""
    return inspect.cleandoc(re.search(r"```python\n(.*?)```", thing.__doc__, re.DOTALL)[1])


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """What the examples of all public names leave, run one after the other in a folder."""
    left, folder = {"lm_jax": lm_jax}, tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as home:
        home.setenv("HOME", str(folder))  # of the prepared corpus
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for name in ("Config", "train", "open_run", "compare_runs", "doctor"):
                exec(example(getattr(lm_jax, name)), left)
        yield left | {"run": lm_jax.open_run(folder / "runs" / "example")}


def test_examples_do_what_they_show(examples):
    results, losses = examples["run"].scores, examples["losses"]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert results["test"]["loss"] == pytest.approx(losses[-1], rel=0.01)
    assert examples["longer"]["stride"] == 16
    assert len(examples["samples"]) == 2 and all(len(one.ids) == 20 for one in examples["samples"])
    (arm,) = examples["comparison"].values["arms"]
    assert arm["name"] == "example"
    assert "log.updates" in [finding.check for finding in examples["report"].findings]


def test_a_run_does_what_the_commands_do(examples, capsys):
    run = examples["run"]
    assert run.step == 20 and run.config.seed == 0
    result = run.evaluate("valid")
    assert finite_or_none(result) == run.scores["valid"]
    (run.workdir / "eval_valid.json").unlink()
    main(["lm-jax", "evaluate", f"--workdir={run.workdir}", "--split", "valid"])
    assert json.loads((run.workdir / "eval_valid.json").read_text()) == finite_or_none(result)
    made = run.generate(tokens=5, seed=3)
    main(["lm-jax", "generate", "--workdir", str(run.workdir), "--tokens=5", "--seed=3"])
    record = json.loads((run.workdir / "samples.jsonl").read_text().splitlines()[-1])
    assert record["text"] == made[0].text in capsys.readouterr().out
    main(["lm-jax", "compare", str(run.workdir), "--split=valid"])
    assert "| example |" in capsys.readouterr().out
    assert run.evaluate("valid", stride=0) == result  # the length of a window, as in the config
    with pytest.raises(ValueError, match="config.eval.stride"):
        run.evaluate("valid", stride=-1)
    assert len(repr(run)) < 5000


def test_a_finished_run_is_opened_and_not_trained_again(examples, monkeypatch, capsys):
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *_: pytest.fail("trained"))
    run = lm_jax.train(examples["cfg"], examples["run"].workdir)
    assert capsys.readouterr().out == f"{run.workdir}: finished, update 20 of 20 is saved\n"
    assert run.scores == examples["run"].scores


def test_a_run_is_exported(examples, tmp_path):
    run = lm_jax.open_run(str(examples["run"].workdir), checkpoint="last")
    folder = run.export(str(tmp_path / "exported"), scored=False)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_a_run_without_a_folder_is_named_as_by_the_command(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(run_command, "train_in", lambda folder, cfg: named.append(str(folder)))
    monkeypatch.setattr("lm_jax.run.open_run", lambda folder: folder)
    path = tmp_path / "own.py"
    path.write_text("import lm_jax\n\ndef get_config():\n    return lm_jax.Config(seed=3)\n")
    cfg = lm_jax.load_config(path)
    cfg.model.layers, cfg.train.steps, cfg.data.corpus = 2, "7", "wikitext2"
    monkeypatch.setenv("HOME", str(tmp_path))
    lm_jax.train(path)
    lm_jax.train(cfg)
    lm_jax.train("~/own.py", "~/own")  # which a shell leaves so in --workdir=~/own
    assert named == ["runs/own-3", "runs/wikitext2-layers2-3", str(tmp_path / "own")]
    with pytest.raises(FileNotFoundError, match="nothing: no such config"):
        lm_jax.train("nothing")


def test_history_is_tables_with_pandas_and_without(examples, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    history = examples["run"].history()
    assert list(history.train)[:2] == history.train.columns[:2] == ["step", "loss"]
    assert len(history.train) == 20 and list(history.train["step"]) == list(range(1, 21))
    assert [row["train/loss"] for row in history.rows[:20]] == list(history.train["loss"])
    assert len(history.valid) == 1 and history.valid["step"][0] == 20
    assert np.isnan(history.valid["word_ppl"]).all() and "optim/lr" in history.train.columns
    shown = repr(history.train).splitlines()
    assert len(shown) == 13 and shown[1].split()[0] == "1" and "20 rows; also " in shown[-1]
    assert repr(History([]).train) == "step  loss\n0 rows"
    assert list(dict(history.train)["loss"]) == list(history.train["loss"])
    frames = types.ModuleType("pandas")
    frames.__spec__, frames.DataFrame = importlib.machinery.ModuleSpec("pandas", None), dict
    monkeypatch.setitem(sys.modules, "pandas", frames)
    framed = examples["run"].history().train
    assert type(framed) is dict and list(framed["loss"]) == list(history.train["loss"])


def test_a_run_is_plotted(examples, tmp_path):
    figure = examples["run"].plot()
    titles = [part.texts[0].get_text() for part in figure.subfigs if part.texts]
    assert titles == ["Loss", "Gradient norm", "Learning rate", "Speed"]
    names = [text.get_text() for text in figure.subfigs[0].legends[0].texts]
    assert names == ["train", "valid", "reference lines"]
    assert figure._repr_png_().startswith(b"\x89PNG")
    folder = shutil.copytree(examples["run"].workdir, tmp_path / "run")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no update is logged yet"):
        lm_jax.open_run(folder).plot()


def test_a_notebook_shows_what_is_there(examples, tmp_path):
    """Each as text and as HTML, which is escaped and loads nothing."""
    run = lm_jax.open_run(shutil.copytree(examples["run"].workdir, tmp_path / "<b>"))
    valid, cfg = run.scores["valid"], lm_jax.Config(doctor="off")
    cfg.data.source_dir = "<i>"
    finding = lm_jax.doctor.Finding("log.x", "fail", "7 > <u>.", "Lower it.")
    shown = [
        (run, ["<b>", "finished, update 20 of 20", f"{valid['loss']:.4f}", "entropy rate"]),
        (cfg, ["doctor", "off", "source_dir", "<i>"]),
        (lm_jax.doctor.Report((finding,)), ["doctor: 1 failed: log.x", "7 > <u>.", "Lower it."]),
        (examples["comparison"], ["One arm: nothing to rank.", "example", "tokens/s"]),
        (examples["samples"], [examples["samples"][1].text]),
        (examples["samples"][:1], [examples["samples"][0].text]),
        (examples["samples"][:0], ["no samples"]),
        (run.history(), ["train", "loss"]),
    ]
    for thing, said in shown:
        for text in (repr(thing), words(thing._repr_html_())):
            assert all(word in text for word in said), text
    Page(page.document("shown", "".join(thing._repr_html_() for thing, _ in shown[:-1])))


def test_a_relative_folder_stays_where_it_was(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(examples["run"].workdir.parent)
    run = lm_jax.open_run(examples["run"].workdir.name)
    assert lm_jax.compare_runs(run.workdir.name).values["arms"][0]["name"] == "example"
    monkeypatch.chdir(tmp_path)
    assert run.history().rows == examples["run"].history().rows
    with pytest.raises(ValueError, match="no run is given"):
        lm_jax.compare_runs([])


def test_a_killed_run_is_opened(examples, tmp_path):
    folder = shutil.copytree(examples["run"].workdir, tmp_path / "killed")
    shutil.rmtree(folder / "best")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "tra')
    run = lm_jax.open_run(str(folder))
    assert run.history().rows == examples["run"].history().rows
    assert run.step == 20 and run.generate(tokens=3)[0].ids
    assert pickle.loads(pickle.dumps(run)).workdir == folder


def test_the_list_of_commands_is_quick():
    code = "import lm_jax.__main__ as m; m.main(['lm-jax']); assert 'jax' not in m.sys.modules"
    times = []
    for _ in range(3):  # the machine may be busy
        began = time.perf_counter()
        shown = fresh(code)
        times.append(time.perf_counter() - began)
    assert min(times) < 1
    assert re.findall(r"^  (\w+) +\w", shown, re.MULTILINE) == list(COMMANDS)
    assert all(f"`lm-jax {name}" in README for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_misuse(name, capsys):
    for arguments, code in (("--help", 0), ("--bogus=1", 2), ("--split=none", 2)):
        with pytest.raises(SystemExit) as stopped:
            main(["lm-jax", name, arguments])
        assert (stopped.value.code or 0) == code
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == (code > 0)
        assert ("python -m lm_jax." in out and "  --" in out) == (code == 0)
    assert not {"workdir", "config", "split", "log"} & set(flags.FLAGS)


def test_unknown_command(capsys):
    for name, said in (("trane", "did you mean train?\n"), ("x", "choose from train, prepare, ")):
        with pytest.raises(SystemExit) as stopped:
            main(["lm-jax", name])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"{name}: no such command; {said}")


def test_what_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pkgutil.resolve_name(project["project"]["scripts"]["lm-jax"]) is main
    for file in project["tool"]["setuptools"]["package-data"]["lm_jax"]:
        assert (ROOT / "lm_jax" / file).exists()
