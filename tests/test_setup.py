"""What a run puts together before its first update, and what it leaves alone."""

import contextlib
import shutil

import pytest

from lm_jax import loop, preflight, setup
from lm_jax.checkpoint import find_kept
from lm_jax.config import ConfigError
from lm_jax.data import open as data_open
from lm_jax.workdir import open_trained, read_record
from tests.helpers import small


def test_a_run_opens_its_data_once(text, tmp_path, monkeypatch):
    opened, real = [], data_open.prepare

    def prepare(*arguments, **options):
        opened.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(data_open, "prepare", prepare)
    loop.train_and_evaluate(small(text, train__steps="4", optim__warmup="1"), tmp_path)
    assert len(opened) == 1


def test_the_best_checkpoint_and_scores_of_another_run_are_not_those_of_this_one(text, tmp_path):
    loop.train_and_evaluate(small(text), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    left = tmp_path / "eval_train.json"
    left.write_text("{}")
    changes = dict(train__steps="4", train__eval_every="2", optim__peak_lr=1e-6)
    results = loop.train_and_evaluate(small(text, optim__warmup="1", **changes), tmp_path)
    assert results["valid"]["step"] <= 4 and not left.exists()
    assert [int(path.name) for path in (tmp_path / "best").iterdir()] == [results["test"]["step"]]


def test_a_refused_run_leaves_no_results_of_another(text, tmp_path, monkeypatch):
    loop.train_and_evaluate(small(text), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")

    def refuse(*arguments, **options):
        raise preflight.Unfit("refused")

    monkeypatch.setattr(preflight, "examine_once", refuse)
    with pytest.raises(preflight.Unfit):
        loop.train_and_evaluate(small(text, doctor="fast", model__d_model=8), tmp_path)
    assert not list(tmp_path.glob("eval_*")) and not list((tmp_path / "best").iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim__schedule": "wsd"}, r"config\.optim\.decay"),
        ({"mesh__fsdp": 7}, r"config\.mesh\.fsdp: 7 does not divide"),
        ({"data__batch_size": 7, "data__micro_batch": 3}, r"config\.data\.micro_batch"),
        ({"attention__impl": "cudnn"}, r"config\.attention\.impl: cudnn (needs|cannot)"),
        (
            {"tokenizer__kind": "hf", "tokenizer__folder": "none"},
            r"config\.tokenizer\.folder: none holds no tokenizer\.json",
        ),
        ({"distill__teachers": "none"}, r"config\.distill\.teachers: none/config\.json"),
        (
            {"distill__cache": "none", "distill__support": "top_k", "distill__top_k": 2},
            r"config\.distill\.cache: none holds no finished cache",
        ),
        ({"data__cache_dir": "file"}, r"config\.data\.cache_dir: .*file is a file"),
        ({}, r"--workdir: .*file is a file"),
    ],
)
def test_what_cannot_be_is_said_before_data_are_read(text, tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(data_open, "prepare", lambda *_, **__: pytest.fail("data were read"))
    cfg = small(text, **{"data__cache_dir": str(tmp_path / "cache")} | changes)
    with pytest.raises(ConfigError, match=said):
        loop.train_and_evaluate(cfg, tmp_path / ("run" if changes else "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_says_what_became_of_its_spans(text, tmp_path):
    with contextlib.ExitStack() as held:
        cfg = small(text, train__steps="5", optim__warmup="100", data__growth="90")
        run = setup.assemble(cfg, tmp_path, None, held)
    assert [line for line in run.lines if "updates made" in line] == [
        "config.data.growth: 90 updates made 4, four fifths of the 5 of the run",
        "config.optim.warmup: 100 updates made 1, a fifth of the 5 of the run",
    ]
    assert read_record(tmp_path).cfg.optim.warmup == "1"


def test_an_impossible_config_leaves_no_folder(text, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.data\.micro_batch"):
        loop.train_and_evaluate(
            small(text, data__batch_size=7, data__micro_batch=3), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_without_a_best_checkpoint_the_next_evaluation_gives_one(text, tmp_path):
    # The learning rate rises until the model is worse than at the start.
    cfg = small(text, optim__peak_lr=10.0, optim__warmup="11", train__eval_every="2")
    loop.train_and_evaluate(cfg, tmp_path)
    newest = find_kept(tmp_path)[0]
    assert newest.manifest()["best_position"] <= 8 and newest.update == 12
    shutil.rmtree(tmp_path / "best")
    assert open_trained(tmp_path).step == 12
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    loop.train_and_evaluate(cfg, tmp_path)
    assert open_trained(tmp_path).step in (10, 12)
