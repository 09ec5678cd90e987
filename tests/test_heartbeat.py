"""Several processes stop together, and end when one of them hangs or dies."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lm_jax import config, evaluate, sharding, signals, together
from lm_jax.config import Config
from lm_jax.data.open import open_data
from lm_jax.heartbeat import SIGNS, Heartbeat, Sign, Watch
from lm_jax.rundir import newest_update
from lm_jax.signals import Interrupted
from tests.helpers import ROOT, rows, small


class Others:
    """The signs of three processes as process 0 reads them; a turn is 10 s, as nobody's clock."""

    def __init__(self, seconds=40.0):
        self.now = {n: Sign(7, n, f"h{n}") for n in range(3)}
        self.watch, self.silent = Watch(self.now[0], 3, seconds, 10.0), set()

    def move(self, *processes, **news):
        for n in processes:
            self.now[n] = Sign(**{**vars(self.now[n]), **news})

    def turn(self, **options):
        for n in set(self.now) - self.silent:
            self.move(n, beat=self.now[n].beat + 1)
        return self.watch.judge(self.now, **options)

    def turns(self, count):
        return [self.turn() for _ in range(count)]


def test_one_that_waits_for_its_batch_is_named_once_none_has_moved():
    others = Others()
    for update in range(1, 30):  # longer than 40 s in all, but they move
        others.move(0, 1, 2, calls=update, update=2 * update, doing="it computes")
        assert not others.turn()
    others.move(0, 2, calls=30, update=60)
    others.move(1, doing="it waits for its batch")
    *before, last = others.turns(5)
    assert not any(before)
    assert last.startswith(
        "process 1 (host h1) has not moved since update 58, for 40 s, it waits for its batch"
    )
    others = Others()
    others.move(0, 1, 2, calls=3, update=3, doing="it computes")
    assert others.turns(5)[-1].startswith("the run has not moved since update 3, for 40 s")


def test_what_may_take_long_is_no_hang_unless_a_signal_waits():
    others = Others()
    others.move(0, 1, calls=3, update=3, doing="it computes")  # process 2 saves, or compiles
    assert not any(others.turns(100))
    assert [bool(others.turn(stopping=True)) for _ in range(4)] == [False, False, False, True]


def test_scoring_is_alive_while_its_batches_go_on():
    others = Others()
    parts = [Heartbeat(".", 40.0, process=n, count=3) for n in range(3)]

    def batch(*processes, more=True):
        for n in processes:
            parts[n].scored(more)
            sign = parts[n].sign()
            others.move(n, calls=sign.calls, doing=sign.doing)

    for _ in range(30):
        batch(0, 1, 2)
        assert not others.turn()
    batch(0, 2)
    *before, last = others.turns(5)
    assert not any(before)
    assert last.startswith("process 1 (host h1) has not moved since update 0, for 40 s, it scores")
    for _ in range(3):  # a signal does not wait for all of it
        batch(0, 1, 2)
        assert not others.turn(stopping=True)
    batch(0, 1, 2)
    assert others.turn(stopping=True)
    batch(0, 1, 2, more=False)  # what follows may take long
    assert not any(others.turns(100))


@pytest.mark.parametrize(("seconds", "limit"), [(40.0, 4), (300.0, 6)])
def test_one_without_a_sign_is_gone_be_it_at_rest(seconds, limit):
    others = Others(seconds)
    others.turn()
    others.silent = {2}
    others.move(2, update=5)  # its last
    others.turn()
    *before, last = others.turns(limit)
    assert not any(before)
    assert f"process 2 (host h2) gave no sign of life for {10 * limit} s, after update 5" in last
    others = Others(600.0)
    others.watch.urgent = True  # a computation failed
    others.turn()
    others.silent = {1}
    assert [bool(x) for x in others.turns(5)] == [False] * 4 + [True]


def test_one_that_has_finished_is_missed_by_nobody():
    others = Others()
    others.turn()
    del others.now[2]
    assert not any(others.turns(20))


@pytest.fixture
def pair(tmp_path):
    """Two processes of a run, without their threads, and the codes that they end with."""
    codes = []
    parts = [
        Heartbeat(tmp_path, 300.0, process=n, count=2, run=7, end=codes.append) for n in (0, 1)
    ]
    for part in parts:
        part.settles()
    return *parts, codes, tmp_path


class Words(dict):
    """What JAX's coordination service keeps."""

    key_value_set = dict.__setitem__

    def key_value_dir_get(self, folder):
        return [(key, text) for key, text in self.items() if key.startswith(folder)]


@pytest.mark.parametrize("settled", [False, True])
def test_an_error_while_a_run_is_put_together_ends_the_other(
    tmp_path, capsys, monkeypatch, settled
):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    codes, left, words = [], [], Words()
    monkeypatch.setattr(together, "store", lambda: words)
    monkeypatch.setattr(atexit, "register", lambda action, code: left.append(code))
    first, second = (
        Heartbeat(tmp_path / "run", 300.0, process=n, count=2, run=7, end=codes.append)
        for n in (0, 1)
    )
    if settled:
        (tmp_path / "run").mkdir()
        second.settles()
    for _ in range(100):  # longer than 60 s without a sign in the folder
        first.tick()
        second.tick()
    assert not codes
    first.__exit__(Interrupted, Interrupted(signal.SIGTERM, "while it waited"), None)
    second.tick()
    assert not codes  # an error of all of them is told by each
    second.tick()
    assert codes == [1] and left == [143]
    err = capsys.readouterr().err
    assert "process 0 (host " in err and "stopped by SIGTERM while it waited; nothing is" in err
    assert (tmp_path / "run").exists() == settled


def test_one_that_has_not_the_folder_writes_nothing_there(pair):
    first, second, codes, folder = pair
    other = Heartbeat(folder, 300.0, process=1, count=2, run=8, end=codes.append)
    before = (folder / SIGNS / "1.json").read_text()
    other.tick()
    other.__exit__(None, None, None)
    assert (folder / SIGNS / "1.json").read_text() == before


def test_an_error_of_one_ends_the_other_with_its_sentence(pair, capsys, monkeypatch):
    first, second, codes, folder = pair
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for _ in range(100):
        first.tick()
        second.tick()
    assert not codes
    (folder / "checkpoints" / "40").mkdir(parents=True)
    first.__exit__(ValueError, ValueError("data/x.parquet: damaged.\nmore"), None)
    second.tick()
    assert codes == [1]
    err = capsys.readouterr().err
    assert "process 0 (host " in err and "ended: data/x.parquet: damaged; " in err
    assert "goes on from update 40" in err


def test_a_signal_ends_a_rest_unless_they_save_for_it(pair, monkeypatch):
    first, second, codes, _ = pair
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(signals, "waits", lambda: True)
    for agreed in (signal.SIGTERM, None):
        monkeypatch.setattr(signals, "agreed", lambda agreed=agreed: agreed)
        for _ in range(305):
            first.tick()
            second.tick()
        assert codes == ([] if agreed else [1, 1])


def test_signs_of_an_earlier_run_are_none(pair):
    first, second, codes, folder = pair
    old = Heartbeat(folder, 300.0, process=1, count=2, run=6, end=codes.append)
    old.settles()
    path = folder / SIGNS / "1.json"
    path.write_text(path.read_text().replace('"ended": ""', '"ended": "long ago"'))
    first.tick()
    assert not codes
    second.tick()
    first.tick()
    path.write_text('{"run": 7')  # half written
    first.tick()
    assert not codes


def test_processes_that_stop_together_leave_nothing(pair, monkeypatch):
    first, second, codes, folder = pair
    monkeypatch.setattr(signals, "agreed", lambda: signal.SIGTERM)
    for one in (first, second):
        one.tick()
        one.__exit__(Interrupted, Interrupted(signal.SIGTERM), None)
    assert not codes and not (folder / SIGNS).exists()


def test_a_process_alone_says_that_it_stands_still_and_goes_on(tmp_path, capsys):
    ended = []
    with Heartbeat(tmp_path, 0.08, end=ended.append) as one:
        one.reads()
        time.sleep(0.3)
        assert not capsys.readouterr().out  # the first batch
        one.dispatched(range(4), (4, 2, 9))
        one.reads()
        time.sleep(0.3)
    assert "the run has not moved since update 4, for 0.08 s, it waits" in capsys.readouterr().out
    assert not ended and not (tmp_path / SIGNS).exists()


def test_the_evaluator_says_after_each_batch_whether_more_follow(text):
    cfg = small(text)
    store, mesh, heard = open_data(cfg), sharding.make_mesh(cfg.mesh), []

    def eval_step(params, batch):
        weights = np.asarray(batch["weights"])[..., 1:]
        sums = {"nats": 0.0, "count": weights.sum(), "correct": 0.0}
        return sums | {"token_nats": 0 * weights, "token_weights": weights}

    cfg = config.replace(cfg, eval__batch_size=8, eval__stride=32)
    evaluate.Evaluator(cfg, store, mesh, eval_step, heard.append)(None, "valid")
    assert len(heard) > 3 and heard == [True] * (len(heard) - 1) + [False]


def test_several_processes_stop_between_two_splits(monkeypatch):
    evaluator = evaluate.Evaluator(Config(), None, sharding.make_mesh(Config().mesh), None)
    scored = []

    def score_run(evaluator, run, workdir, name):
        scored.append(name)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(evaluate, "score_run", score_run)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with signals.handled(), signals.let_through("this scoring"):
        with pytest.raises(Interrupted, match="stopped by SIGTERM before test was scored"):
            evaluate.score_splits(evaluator, None, None, ["valid", "test"])
        assert signals.agreed() == signal.SIGTERM  # and nobody calls it an error
    assert scored == ["valid"]


CHILD = """
import pathlib, time
from lm_jax import config, loop, processes
from lm_jax.data import windows
from lm_jax.door import command
from tests.helpers import small
real = windows.train_batches
def slow(*args, process_index, **options):
    for number, batch in enumerate(real(*args, process_index=process_index, **options)):
        time.sleep(1000 if number == 9 and process_index == {stuck} else 0.02)
        yield batch
windows.train_batches = slow
{before}
@command
def main(argv):
    processes.join_others(config.Config().cluster)
    loop.train_and_evaluate(
        small(
            pathlib.Path({text!r}), train__steps="100000", train__hang_seconds=6.0,
            train__eval_every="0", train__steps_per_call=1, data__micro_batch=1,
        ),
        {workdir!r},
    )
main([])
"""


class Launch:
    """One start of the same command in several processes."""

    def __init__(self, text, workdir, count=2, stuck=-1, before=""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.workdir = workdir
        self.before = self.updates()
        places = dict(text=str(text), workdir=str(workdir))
        code = CHILD.format(**places, stuck=stuck, before=before)
        self.children = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=os.environ
                | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PLATFORMS": "cpu"}
                | {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(n)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for n in range(count)
        ]

    def updates(self):
        metrics = self.workdir / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def hurt(self, process, number):
        """Send a signal once it trains; the exit codes of the others, and the last lines of all."""
        end = time.monotonic() + 120
        while number and self.updates() < self.before + 9:
            assert time.monotonic() < end and all(one.poll() is None for one in self.children)
            time.sleep(0.1)
        if number:
            self.children[process].send_signal(number)
        began = time.monotonic()
        try:
            for n, one in enumerate(self.children):
                if n != process or number not in (signal.SIGSTOP, signal.SIGKILL):
                    one.wait(timeout=120)
            self.seconds = time.monotonic() - began
        finally:
            for one in self.children:
                one.kill()
            said = [one.communicate()[0] for one in self.children]
        codes = [one.returncode for one in self.children]
        assert not any("Traceback" in text for text in said), said
        return codes, [text.splitlines()[-1] for text in said]


@pytest.mark.slow
def test_one_that_is_killed_ends_the_other_and_a_signal_stops_both(text, tmp_path):
    workdir = tmp_path / "run"
    codes, lines = (launch := Launch(text, workdir)).hurt(1, signal.SIGKILL)
    assert codes == [1, -signal.SIGKILL] and launch.seconds < 12
    last = newest_update(workdir)
    assert "process 1 (host " in lines[0] and f"goes on from update {last:,}" in lines[0]
    codes, lines = Launch(text, workdir).hurt(1, signal.SIGTERM)  # heard by one, and not the first
    assert codes == [143, 143]
    assert lines == [f"stopped by SIGTERM after update {newest_update(workdir)}"] * 2
    assert [row["resumed"] for row in rows(workdir) if "resumed" in row] == [last]
    assert not (workdir / SIGNS).exists()


WAITS = """
import os, signal
from lm_jax import setup
def wait(cfg):
    if os.environ["JAX_PROCESS_ID"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1000)
setup.open_data = wait
"""
DIFFERS = """
import functools, os
small = functools.partial(small, seed=int(os.environ["JAX_PROCESS_ID"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "codes", "told"),
    [
        (WAITS, [143, 1], "process 0 (host {host}) ended: stopped by SIGTERM; nothing is saved"),
        pytest.param(DIFFERS, [1, 2], "config.seed: 0 -> 1", marks=pytest.mark.long),
    ],
    ids=["waits", "differs"],
)
def test_what_ends_one_before_the_first_update_ends_all(text, tmp_path, before, codes, told):
    launch = Launch(text, workdir := tmp_path / "run", before=before)
    found, lines = launch.hurt(0, 0)
    assert found == codes and told.format(host=socket.gethostname()) in lines[1]
    assert launch.seconds < 60 and not workdir.exists()  # JAX waits for 300 s


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "process", "number", "told"),
    [
        (2, 0, signal.SIGKILL, "as it does when process 0 is gone"),
        (2, 1, 0, "process 1 (host {host}) has not moved since update 9, for 6 s, it waits for"),
        (4, 2, signal.SIGSTOP, "process 2 (host {host}) gave no sign of life for 6 s, after"),
    ],
    ids=["coordinator", "reader", "four"],
)
def test_no_process_waits_for_one_that_is_gone(text, tmp_path, count, process, number, told):
    launch = Launch(text, tmp_path / "run", count, stuck=-1 if number else process)
    codes, lines = launch.hurt(process, number)
    for n, (code, line) in enumerate(zip(codes, lines, strict=True)):
        if number and n == process:
            continue
        assert code == 1 and told.format(host=socket.gethostname()) in line
        assert "goes on from update" in line
    assert launch.seconds < 25 or not number
