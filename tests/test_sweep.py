"""A sweep plans one folder a run, runs several side by side, skips, resumes and reports."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from lm_jax.config.flags import load_module
from lm_jax.rundir import occupied
from tests.helpers import ROOT, thirds

SCRIPT = ROOT / "scripts" / "sweep.py"
sweep = load_module(SCRIPT)

# Stands for a training: logs an update, takes its time, saves when it is told to stop.
TRAIN = """
import os, pathlib, signal, sys, time
workdir, seconds, code = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
def stop(number, _):
    with (workdir / "signals.txt").open("a") as file:
        file.write(f"{os.getpid()} {number}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
begin = time.time()
time.sleep(0.3)
with (workdir / "metrics.jsonl").open("a") as file:
    file.write("{}\\n")
time.sleep(seconds)
with (workdir / "ran.txt").open("a") as file:
    file.write(f"{begin} {time.time()}\\n")
print("trained")
if code == 0:
    (workdir / "eval_test.json").write_text("{}")
sys.exit(code)
"""


CONFIG = "from lm_jax.config import Config\n\n\ndef get_config():\n    return Config()\n"


@pytest.fixture
def specs(tmp_path):
    """Two config files."""
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(CONFIG)
    return [str(tmp_path / "a.py"), str(tmp_path / "b.py")]


def pretend(runs, seconds=0.1, codes=None):
    for run in runs:
        code = (codes or {}).get(run.workdir.name, 0)
        run.command = [sys.executable, "-c", TRAIN, str(run.workdir), str(seconds), str(code)]
    return runs


def spans(runs):
    lines = [(run.workdir / "ran.txt").read_text().splitlines()[-1].split() for run in runs]
    return sorted((float(begin), float(end)) for begin, end in lines)


def test_a_folder_for_every_arm_and_seed(tmp_path):
    folder = ROOT / "configs"
    runs = sweep.plan(
        [f"{folder}/quickstart.py", f"{folder}/musota.py:*"],
        [0, 7],
        tmp_path,
        ["--config.doctor=off"],
    )
    arms = ["quickstart", "musota-musota", "musota-total", "musota-blocks", "musota-flops"]
    assert [run.workdir.name for run in runs] == [f"{arm}-{s}" for s in (0, 7) for arm in arms]
    assert runs[5].command[1:] == [
        *("-m", "lm_jax.main", f"--config={folder}/quickstart.py", "--config.seed=7"),
        *(f"--workdir={tmp_path}/quickstart-7", "--config.doctor=off"),
    ]


@pytest.mark.parametrize(
    ("more", "flags", "message"),
    [
        (["{0}"], [], "a-0: two runs would share it"),
        (["{1}:*"], [], "b.py: lists no ARMS"),
        ([str(ROOT / "configs" / "musota.py:none")], [], "musota.py:none: no such arm"),
        (["none.py"], [], "none.py: no such config"),
        ([], ["--config.seed=5"], "--config.seed=5: the sweep sets it for every run"),
        ([], ["--workdir=x"], "--workdir=x: the sweep sets it for every run"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(tmp_path, specs, more, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        sweep.plan([specs[0], *(m.format(*specs) for m in more)], [0], tmp_path, flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("jobs", "resumed"), thirds([(2, False), (1, False), (1, True), (2, True)])
)
def test_runs_side_by_side_once_the_first_has_its_memory(tmp_path, specs, jobs, resumed):
    runs = pretend(sweep.plan(specs, [0], tmp_path, []), seconds=1.5)
    if resumed:
        for run in runs:
            run.workdir.mkdir()
            (run.workdir / "metrics.jsonl").write_text("{}\n")
    assert sweep.sweep(runs, jobs)
    (first_begin, first_end), (second_begin, _) = spans(runs)
    assert (second_begin < first_end) == (jobs == 2)
    assert second_begin > first_begin + 0.3  # when the first had logged an update
    assert "trained" in (runs[0].workdir / "log.txt").read_text()


def test_a_run_that_a_killed_sweep_has_left_is_waited_for(tmp_path, specs, capsys):
    runs = pretend(sweep.plan(specs[:1], [0], tmp_path, []))
    with contextlib.ExitStack() as held:
        held.enter_context(occupied(runs[0].workdir))
        free = time.time() + 1
        threading.Timer(1, held.close).start()
        assert sweep.sweep(runs, jobs=1)
    ((begin, _),) = spans(runs)
    assert begin > free
    assert capsys.readouterr().out.count("a-0: another process trains there; waiting for it") == 1


def test_memory_that_is_not_there_is_waited_for(tmp_path, specs, monkeypatch):
    monkeypatch.setattr(sweep, "free_bytes", lambda: 0)
    monkeypatch.setattr(sweep, "peak_bytes", lambda process: 1)
    runs = pretend(sweep.plan(specs, [0], tmp_path, []), seconds=0.6)
    assert sweep.sweep(runs, jobs=2)
    (_, first_end), (second_begin, _) = spans(runs)
    assert second_begin > first_end


def test_what_failed_runs_again_and_what_finished_does_not(tmp_path, specs, capsys):
    runs = pretend(sweep.plan(specs, [0], tmp_path, []), codes={"a-0": 3})
    assert not sweep.sweep(runs, 1)
    assert "a-0: failed with exit code 3, see" in capsys.readouterr().out
    assert sweep.sweep(pretend(runs), 1)
    assert "2 runs, 1 finished before" in capsys.readouterr().out
    counts = [len((run.workdir / "ran.txt").read_text().splitlines()) for run in runs]
    assert counts == [2, 1]


def test_a_run_that_was_told_to_stop_is_not_finished(tmp_path, specs, capsys):
    (run,) = pretend(sweep.plan(specs[:1], [0], tmp_path, []))
    run.command = [sys.executable, "-c", "raise SystemExit(143)"]
    assert not sweep.sweep([run], 1)
    assert not run.finished and "a-0: stopped, see" in capsys.readouterr().out


def test_another_run_in_the_folder_of_a_finished_one_is_refused(tmp_path, specs):
    flags = ["--config.optim.peak_lr=1"]
    (run,) = sweep.plan(specs[:1], [0], tmp_path, flags)
    run.workdir.mkdir()
    (run.workdir / "eval_test.json").write_text("{}")
    assert run.end(0)
    (again,) = sweep.plan(specs[:1], [0], pathlib.Path(os.path.relpath(tmp_path)), flags)
    assert again.finished
    assert json.loads((run.workdir / "sweep.json").read_text()) == again.record
    message = "a-0: was finished with other flags or another text of .*a.py; give another --root"
    with pytest.raises(ValueError, match=message):
        sweep.plan(specs[:1], [0], tmp_path, ["--config.optim.peak_lr=2"])
    pathlib.Path(specs[0]).write_text(CONFIG + "# another text\n")
    with pytest.raises(ValueError, match=message):
        sweep.plan(specs[:1], [0], tmp_path, flags)


@pytest.mark.parametrize(
    ("number", "whole_group"),
    thirds(itertools.product((signal.SIGINT, signal.SIGTERM), (True, False))),
)
def test_a_stopped_sweep_stops_its_runs_once(tmp_path, specs, number, whole_group):
    code = f"""
import pathlib, sys
sys.argv = ["sweep.py", {specs[0]!r}, "--root={tmp_path}"]
from lm_jax.config.flags import load_module
from tests.helpers import ROOT
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
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "a-0" / "metrics.jsonl"
    deadline = time.time() + 60
    while not metrics.exists() and time.time() < deadline:
        time.sleep(0.05)
    assert metrics.exists()
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (
        process.returncode == 128 + number and said == f"stopped by {number.name} while running\n"
    )
    ((pid, received),) = (
        map(int, line.split())
        for line in (tmp_path / "a-0" / "signals.txt").read_text().splitlines()
    )
    assert received == signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (tmp_path / "a-0" / "sweep.json").exists()
