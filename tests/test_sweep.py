"""A sweep plans one folder a run, runs several side by side, skips, resumes and reports."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lm_jax.flags import load_module

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "sweep.py"
sweep = load_module(SCRIPT)

# Stands for a training: notes when it runs, and is slow enough to meet the others.
TRAIN = """
import pathlib, sys, time
workdir = pathlib.Path(sys.argv[1])
begin = time.time()
(workdir / "metrics.jsonl").write_text("{}")
time.sleep(float(sys.argv[2]))
(workdir / "ran.txt").open("a").write(f"{begin} {time.time()}\\n")
print("trained")
sys.exit(int(sys.argv[3]))
"""


def pretend(runs, seconds=0.1, codes=None):
    for run in runs:
        code = (codes or {}).get(run.workdir.name, 0)
        run.command = [sys.executable, "-c", TRAIN, str(run.workdir), str(seconds), str(code)]
    return runs


def spans(runs):
    lines = [(run.workdir / "ran.txt").read_text().split() for run in runs]
    return sorted((float(begin), float(end)) for begin, end in lines)


def test_a_folder_for_every_arm_and_seed(tmp_path):
    specs = ["configs/quickstart.py", f"{ROOT}/configs/musota.py:*"]
    runs = sweep.plan(specs, [0, 7], tmp_path, ["--config.doctor=off"])
    arms = ["quickstart", "musota-musota", "musota-total", "musota-blocks", "musota-flops"]
    assert [run.workdir.name for run in runs] == [f"{arm}-{s}" for s in (0, 7) for arm in arms]
    assert runs[5].command[1:] == [
        *("-m", "lm_jax.main", "--config=configs/quickstart.py", "--config.seed=7"),
        *(f"--workdir={tmp_path}/quickstart-7", "--config.doctor=off"),
    ]
    with pytest.raises(ValueError, match="quickstart-0: two runs would share it"):
        sweep.plan(["configs/quickstart.py", "other/quickstart.py"], [0], tmp_path, [])
    with pytest.raises(ValueError, match="quickstart.py: lists no ARMS"):
        sweep.plan([f"{ROOT}/configs/quickstart.py:*"], [0], tmp_path, [])
    with pytest.raises(FileNotFoundError, match="configs/none.py: no such file"):
        sweep.plan(["configs/none.py:*"], [0], tmp_path, [])


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_side_by_side(tmp_path, jobs):
    runs = pretend(sweep.plan(["a.py", "b.py"], [0], tmp_path, []), seconds=1.0)
    assert sweep.sweep(runs, jobs)
    (_, first_end), (second_begin, _) = spans(runs)
    assert (second_begin < first_end) == (jobs == 2)
    assert "trained" in (runs[0].workdir / "log.txt").read_text()


def test_memory_that_is_not_there_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "free_bytes", lambda: 0)
    monkeypatch.setattr(sweep, "peak_bytes", lambda process: 1)
    runs = pretend(sweep.plan(["a.py", "b.py"], [0], tmp_path, []), seconds=0.6)
    assert sweep.sweep(runs, jobs=2)
    (_, first_end), (second_begin, _) = spans(runs)
    assert second_begin > first_end


def test_what_failed_runs_again_and_what_finished_does_not(tmp_path, capsys):
    runs = pretend(sweep.plan(["a.py", "b.py"], [0], tmp_path, []), codes={"a-0": 3})
    assert not sweep.sweep(runs, 1)
    assert "a-0: failed with exit code 3, see" in capsys.readouterr().out
    assert sweep.sweep(pretend(runs), 1)
    assert "2 runs, 1 finished before" in capsys.readouterr().out
    counts = [len((run.workdir / "ran.txt").read_text().splitlines()) for run in runs]
    assert counts == [2, 1]


def test_another_command_for_a_finished_folder_is_refused(tmp_path):
    (run,) = sweep.plan(["a.py"], [0], tmp_path, ["--config.optim.peak_lr=1"])
    run.workdir.mkdir()
    (run.workdir / "sweep.json").write_text(json.dumps(run.command))
    assert sweep.plan(["a.py"], [0], tmp_path, ["--config.optim.peak_lr=1"])[0].finished
    with pytest.raises(ValueError, match="a-0: was finished with `.*peak_lr=1`, not with `.*_lr=2"):
        sweep.plan(["a.py"], [0], tmp_path, ["--config.optim.peak_lr=2"])


def test_a_stopped_sweep_stops_its_runs(tmp_path):
    code = f"""
import pathlib, sys
sys.argv = ["sweep.py", "a.py", "--root={tmp_path}"]
from lm_jax.flags import load_module
sweep = load_module(pathlib.Path({str(SCRIPT)!r}))
plan = sweep.plan
def slow(*arguments):
    runs = plan(*arguments)
    for run in runs:
        run.command = [sys.executable, "-c", {TRAIN!r}, str(run.workdir), "60", "0"]
    return runs
sweep.plan = slow
sweep.main()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    metrics = tmp_path / "a-0" / "metrics.jsonl"
    for _ in range(300):
        if metrics.exists():
            break
        time.sleep(0.1)
    assert metrics.exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not (tmp_path / "a-0" / "ran.txt").exists()
    assert not (tmp_path / "a-0" / "sweep.json").exists()
