"""What a run puts together before its first update, and what it leaves alone."""

import shutil

import pytest

from lm_jax import preflight, train
from lm_jax.checkpoint import Checkpoints
from lm_jax.config import ConfigError
from lm_jax.data import open as data_open
from lm_jax.workdir import open_trained
from tests.helpers import small


def test_a_run_opens_its_data_once(text, tmp_path, monkeypatch):
    opened, real = [], data_open.prepare

    def prepare(*arguments, **options):
        opened.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(data_open, "prepare", prepare)
    train.train_and_evaluate(small(text, train__steps="4", optim__warmup="1"), tmp_path)
    assert len(opened) == 1


def test_the_best_checkpoint_and_scores_of_another_run_are_not_those_of_this_one(text, tmp_path):
    train.train_and_evaluate(small(text), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    left = tmp_path / "eval_train.json"
    left.write_text("{}")
    changes = dict(train__steps="4", train__eval_every="2", optim__peak_lr=1e-6)
    results = train.train_and_evaluate(small(text, optim__warmup="1", **changes), tmp_path)
    assert results["valid"]["step"] <= 4 and not left.exists()
    assert [int(path.name) for path in (tmp_path / "best").iterdir()] == [results["test"]["step"]]


def test_a_refused_run_leaves_no_results_of_another(text, tmp_path, monkeypatch):
    train.train_and_evaluate(small(text), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")

    def refuse(*arguments, **options):
        raise preflight.Unfit("refused")

    monkeypatch.setattr(preflight, "examine_config", refuse)
    with pytest.raises(preflight.Unfit):
        train.train_and_evaluate(small(text, doctor="fast", model__d_model=8), tmp_path)
    assert not list(tmp_path.glob("eval_*")) and not list((tmp_path / "best").iterdir())


def test_an_impossible_config_leaves_no_folder(text, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.data\.micro_batch"):
        train.train_and_evaluate(
            small(text, data__batch_size=7, data__micro_batch=3), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_without_a_best_checkpoint_the_next_evaluation_gives_one(text, tmp_path):
    # The learning rate rises until the model is worse than at the start.
    cfg = small(text, optim__peak_lr=10.0, optim__warmup="11", train__eval_every="2")
    train.train_and_evaluate(cfg, tmp_path)
    newest = Checkpoints(tmp_path, 1, read_only=True)
    assert newest.manifest()["best_position"] <= 8 and newest.position() == 12
    newest.close()
    shutil.rmtree(tmp_path / "best")
    assert open_trained(tmp_path).step == 12
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    train.train_and_evaluate(cfg, tmp_path)
    assert open_trained(tmp_path).step in (10, 12)
