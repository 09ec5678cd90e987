"""What a run puts together before its first update, and what it leaves alone."""

import shutil

from lm_jax import train
from lm_jax.data import open as data_open
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
