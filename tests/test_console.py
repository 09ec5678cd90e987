"""What a person sees while a command works, and how it ends."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from lm_jax import console, loop, signals
from lm_jax.config import ConfigError
from lm_jax.door import command
from lm_jax.signals import Interrupted
from tests.helpers import ROOT, final_state, rows, small


def on_terminal(arguments, columns, cwd=ROOT):
    """What a command writes to a terminal, with the seconds to each piece, and its exit code."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    began, pieces = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=end,
        stdout=end,
        stderr=end,
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    os.close(end)
    with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as lines:  # its end
        while piece := lines.read(1 << 16):
            pieces.append((time.monotonic() - began, piece.decode(errors="replace")))
    return pieces, process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, pytest.param(160, marks=pytest.mark.long)])
def test_a_terminal_shows_what_goes_on(columns, text, tmp_path):
    overrides = {
        "data.cache_dir": tmp_path,
        "doctor": "off",
        "data.corpus": "text",
        "data.files": f"{text}/*.txt",
        "data.test_fraction": 0.1,
        "data.seq_len": 32,
        "data.batch_size": 4,
        "model.layers": 1,
        "model.d_model": 32,
        "train.steps": 60,
        "train.eval_every": 30,
        "optim.warmup": 5,
    }
    pieces, code = on_terminal(
        ["-m", "lm_jax.main", f"--config={ROOT}/configs/quickstart.py", "--workdir=run"]
        + [f"--config.{path}={value}" for path, value in overrides.items()],
        columns,
        tmp_path,
    )
    shown = "".join(piece for _, piece in pieces)
    assert code == 0, shown
    times = [seconds for seconds, _ in pieces]
    assert "new run" in pieces[0][1] and times[0] < 2
    assert max(np.diff(times)) < 5
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert max(map(len, re.split(r"[\r\n]+", plain))) <= columns
    told = ["starting JAX", "reading text", "learning the tokenizer", "tokenising"]
    told += ["compiling", "training  ", "scoring valid", "update 30: valid loss", "scoring test"]
    places = [plain.index(name) for name in told]
    assert places == sorted(places)
    assert re.search(r"training +\d+% +loss \d\.\d+ .* tok/s", plain)
    assert "python -m lm_jax.generate --workdir=" in plain


def test_a_line_fits_and_keeps_what_matters_most():
    phase = console.Phase("training", 1000)
    phase.update(370, "loss 3.2140", "valid 3.3010", "41,200 tok/s", "370/1,000")
    whole = phase.line()
    assert whole.startswith(
        "training  37%  loss 3.2140  valid 3.3010  41,200 tok/s  370/1,000  eta"
    )
    for width in range(60, len(whole)):
        line = phase.line(width)
        assert len(line) <= width and "37%  loss 3.2140" in line and "eta" in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (0.1, "0:01"), (59.5, "1:00"), (3599.2, "1:00:00"), (90061, "25:01:01")],
)
def test_seconds_are_told_as_a_clock_does(seconds, text):
    assert console.clock(seconds) == text


def test_a_pipe_gets_a_line_when_time_has_passed(capsys, monkeypatch):
    monkeypatch.setattr(console, "QUIET", 1.5)  # a line is at least a second after the last
    began = time.monotonic()
    with console.phase("compiling"):
        time.sleep(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compiling" and lines[1].startswith("compiling  0:0")
    assert len(lines) <= 1 + (time.monotonic() - began)


def test_a_training_outlives_the_reader_of_its_lines(monkeypatch):
    for line in (console.say, lambda text: console.sheet().print(text)):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stream, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            line("one")
            line("two")


@pytest.fixture
def hangup():
    """Has SIGHUP heard, although the tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
def test_a_signal_that_is_swallowed_comes_again():
    class Deaf:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(Interrupted), signals.handled():
        Deaf()
        time.sleep(5)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with signals.handled():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)


def test_an_import_that_a_signal_breaks_is_a_stop(capsys):
    """As a C extension tells it, and gives up that is being initialised."""
    with pytest.raises(Interrupted, match="SIGTERM"), signals.handled():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        except Interrupted:
            sys.excepthook(*sys.exc_info())
            raise ImportError("while initializing the extension") from None
    assert not capsys.readouterr().err
    with pytest.raises(ImportError), signals.handled():
        try:
            raise ImportError("of its own")
        except ImportError:
            sys.excepthook(*sys.exc_info())
            raise
    assert "of its own" in capsys.readouterr().err


def test_a_signal_is_forgotten_by_what_comes_after_the_stopped_run():
    with pytest.raises(Interrupted), signals.handled():
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.agreed() is None  # as a thread asks, which cannot handle signals itself


@pytest.fixture
def signal_while(monkeypatch, hangup):
    """Sends this process a signal when a phase begins."""
    real, waiting = console.phase, {}

    @contextlib.contextmanager
    def phase(name, *counts):
        with real(name, *counts) as one:
            for prefix in [prefix for prefix in waiting if name.startswith(prefix)]:
                os.kill(os.getpid(), waiting.pop(prefix))
            yield one

    monkeypatch.setattr(console, "phase", phase)
    return lambda number, prefix: waiting.update({prefix: number})


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("reading", signal.SIGHUP),
        ("learning", signal.SIGTERM),
        ("tokenising", signal.SIGINT),
        ("examining", signal.SIGINT),
        ("drawing", signal.SIGTERM),
        ("compiling", signal.SIGHUP),
    ],
)
def test_a_signal_stops_where_nothing_can_be_lost(text, tmp_path, signal_while, phase, number):
    doctor = "fast" if phase == "examining" else "off"
    cfg = small(text, data__cache_dir=str(tmp_path / "cache"), doctor=doctor)
    before = signal.getsignal(number)
    signal_while(number, phase)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} while {phase}") as stopped:
        loop.train_and_evaluate(cfg, tmp_path / "run")
    assert stopped.value.number == number
    assert stopped.value._render_traceback_() == [str(stopped.value)]  # in a notebook
    assert console.going_on() == "" and signal.getsignal(number) is before


def test_a_signal_saves_before_an_evaluation(text, tmp_path, signal_while):
    straight = loop.train_and_evaluate(small(text), tmp_path / "straight")
    workdir = tmp_path / "run"
    signal_while(signal.SIGTERM, "scoring valid")
    with pytest.raises(Interrupted, match="after update 6"):
        loop.train_and_evaluate(small(text), workdir)
    assert (workdir / "checkpoints" / "6").is_dir()
    assert not any("valid/loss" in row for row in rows(workdir))
    assert loop.train_and_evaluate(small(text), workdir) == straight
    for a, b in zip(final_state(tmp_path / "straight"), final_state(workdir), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row["step"] for row in rows(workdir) if "valid/loss" in row] == [6, 12]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("config.seed: mend it."), 2, "config.seed: mend it."),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2, "x.txt: No such file"),
        (FloatingPointError("updates 1 to 9 were all skipped."), 1, "all skipped"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GiB"), 1, "lower config.data.micro_batch"),
        (Interrupted(signal.SIGHUP, "while reading"), 129, "stopped by SIGHUP while reading"),
        (Interrupted(signal.SIGINT, "while reading"), 130, "stopped by SIGINT while reading"),
        (Interrupted(signal.SIGTERM, "while reading"), 143, "stopped by SIGTERM while reading"),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(error, code, said, capsys):
    @command
    def main(argv=None):
        assert argv == ["program"]
        raise error

    with pytest.raises(SystemExit) as ended:
        main(["program"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == code and said in line
    if not isinstance(error, Interrupted):
        with pytest.raises(type(error)):
            main(["program", "--debug"])


def test_an_error_of_a_library_says_what_it_is(capsys):
    @command
    def main(argv=None):
        json.loads("no JSON")

    with pytest.raises(SystemExit):
        main(["program"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("JSONDecodeError: Expecting value") and line.endswith(
        "--debug shows where."
    )


@pytest.mark.slow
def test_a_deaf_program_ends_all_the_same():
    code = (
        "import hashlib, os, threading\n"
        "from lm_jax import console\n"
        "from lm_jax.door import command\n"
        "@command\n"
        "def main(argv=None):\n"
        "    with console.phase('compiling'):\n"
        "        threading.Timer(0.5, os.kill, (os.getpid(), 15)).start()\n"
        "        hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 27)\n"
        "main()\n"
    )
    pieces, code = on_terminal(["-c", code], 80)
    text = "".join(piece for _, piece in pieces)
    assert code == 143 and pieces[-1][0] < 10
    assert text.splitlines()[-1] == "stopped by SIGTERM while compiling"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
