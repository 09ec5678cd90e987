"""The soak: a share of it, and that it sees what is lost."""

import os
import pathlib
import shutil
import sys
from typing import Any

import pytest

from tests.helpers import ROOT, thirds

sys.path.insert(0, str(ROOT / "scripts"))
import soak_hurts
import soak_runs


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    """With what a run leaves that nobody hurts, and one that was stopped half-way."""
    compiled = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    soak = soak_hurts.Soak(tmp_path_factory.mktemp("soak"), compiled, seed=0)
    soak.prepare(["damage"])
    return soak


def nothing_lost(hurts):
    return [hurt.lost for hurt in hurts] == [[]] * len(hurts)


@pytest.mark.slow
def test_a_run_that_is_killed_loses_nothing(soak):
    killed = soak_hurts.kill(soak, "killed", ["tokenising", "saving", "evaluating"])
    assert nothing_lost(killed), killed
    assert sum(not hurt.missed for hurt in killed) >= 2


@pytest.mark.slow
def test_a_run_that_is_stopped_says_one_line_and_loses_nothing(soak):
    """The half that the fixture has stopped, and what `damage` compares after it went on."""
    said = (soak.folder / "half-logs" / "00.err").read_text().splitlines()
    assert len(said) == 1 and said[0].startswith("stopped by SIGTERM after update")
    place = soak_runs.Place(soak.folder / "half", soak.folder / "corpus", soak.compilations)
    assert place.logged() == place.newest() >= 24


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "refused"),
    thirds([(("config.json", "cut"), True), (("references", "removed"), False)]),
)
def test_damaged_files_change_no_number(soak, case, refused):
    hurts = soak_hurts.damage(soak, f"damage {case}", [case])
    assert nothing_lost(hurts) and hurts[0].refused == refused, hurts


# A run that goes on with an empty state of its optimiser.
FORGETS = """
import jax; from lm_jax.checkpoint import Checkpoints
def restore(*given, restore=Checkpoints.restore, **more):
    state, manifest = restore(*given, **more)
    return state | {"opt_state": jax.tree.map(lambda x: x * 0, state["opt_state"])}, manifest
Checkpoints.restore = restore
"""


@pytest.mark.slow
def test_a_state_that_is_forgotten_is_seen(soak):
    place, hurt = soak.place("planted"), soak_hurts.Hurt("damage", "none", "planted")
    shutil.copytree(soak.folder / "half", place.root, dirs_exist_ok=True)
    place.planted = FORGETS
    soak.finish(place, hurt)
    words = " ".join(hurt.lost)
    assert "other numbers: checkpoints/36 and" in words and "eval_valid.json" in words


# By a signal after update 38: what is saved then is kept in the place of an older one.
STOPPED: dict[str, Any] = {
    "files": {"run/a", "run/checkpoints/38/x"},
    "checkpoints": [38, 40],
    "checkpoints/36": None,
    "checkpoints/38": "4",
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"files": {"run/a", "run/.a.PID"}}, ["left over: run/.a.PID"]),
        ({"files": set()}, ["missing: run/a"]),
        ({"best/4 w": "0"}, ["other numbers: best/4 w"]),
        (
            {"metrics.jsonl 3 train": None, "metrics.jsonl 4 train": {}},
            ["metrics.jsonl 3 train and 1 more"],
        ),
        ({"eval_test.json": {}}, ["other numbers: eval_test.json"]),
        (STOPPED, []),
        (STOPPED | {"checkpoints/40": "0"}, ["other numbers: checkpoints/40"]),
    ],
)
def test_what_differs_is_told(changed, words):
    whole = {"files": {"run/a"}, "best/4 w": "1", "metrics.jsonl 3 train": {"train/loss": 1.0}}
    whole |= {"checkpoints": [36, 40], "checkpoints/36": "2", "checkpoints/40": "3"}
    told = soak_runs.lost(whole, whole | changed)
    assert len(told) == len(words) and all(map(str.endswith, told, words))
