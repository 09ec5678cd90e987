import importlib.machinery
import json
import math
import sys
import tracemalloc
import types

import numpy as np
import pytest

from lm_jax import writers
from lm_jax.config import Config, ConfigError, replace
from lm_jax.writers import Writers

ROW = {
    "train/loss": 2.5,
    "optim/lr": 1e-3,
    "optim/grad_norm": 0.75,
    "perf/tokens_per_second": 12345.6,
    "perf/input_wait": 0.0123,
}


def opened(workdir, *, steps=10, start=0, resuming=False, again=False, **fields):
    changes = {f"train__{name}": value for name, value in fields.items()}
    cfg = replace(Config(), train__steps=str(steps), **changes)
    return Writers(workdir, cfg, start=start, resuming=resuming, again=again)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_written_at_once_and_exactly(tmp_path):
    out = opened(tmp_path)
    out.write(1, {"train/loss": 1 / 3, "optim/lr": math.nan})
    first = rows(tmp_path)  # before anything is closed
    out.write(1, {"valid/loss": math.inf})
    out.close()
    assert len(first) == 1 and first[0]["step"] == 1 and first[0]["train/loss"] == 1 / 3
    assert first[0]["optim/lr"] is None  # JSON has no NaN
    assert rows(tmp_path)[1] == {"step": 1, "valid/loss": None}


def test_resume_drops_later_rows_and_half_a_line(tmp_path):
    out = opened(tmp_path)
    for step in range(1, 6):
        out.write(step, ROW)
        if step == 3:
            out.write(step, {"valid/loss": 2.0})
    out.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/lo')
    out = opened(tmp_path, start=3)
    out.write(4, {"train/loss": 9.0})
    out.close()
    assert [(row["step"], *list(row)[1:2]) for row in rows(tmp_path)] == [
        (1, "train/loss"),
        (2, "train/loss"),
        (3, "train/loss"),
        (3, "valid/loss"),
        (4, "train/loss"),
    ]
    assert rows(tmp_path)[-1]["train/loss"] == 9.0
    opened(tmp_path, start=0).close()  # killed before its first checkpoint
    assert rows(tmp_path) == []


def test_an_evaluation_that_is_made_again_is_logged_once(tmp_path):
    """A run that stopped before its score goes on, and is killed before its next checkpoint."""
    out = opened(tmp_path)
    for step in (1, 2, 3):
        out.write(step, ROW)
    out.write(3, {"valid/loss": 2.0})
    out.write(4, ROW)
    out.close()
    out = opened(tmp_path, start=3, resuming=True, again=True)
    out.write(3, {"valid/loss": 2.0})
    out.close()
    assert [(row["step"], "valid/loss" in row) for row in rows(tmp_path)] == [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
    ]


def test_a_row_without_its_step_stops_no_run(tmp_path):
    out = opened(tmp_path)
    for step in range(1, 41):
        out.write(step, ROW)
    out.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for n in range(40):
        path.write_bytes(
            b"".join([*lines[:n], lines[n].replace(b"step", b"stdp"), *lines[n + 1 :]])
        )
        opened(tmp_path, start=30).close()
        assert 29 <= len(rows(tmp_path)) <= 31  # a broken one may stay or go where it was cut


def test_rows_that_are_lost_are_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    out = opened(tmp_path)
    for step in range(1, 7):
        out.write(step, ROW)
    out.close()
    opened(tmp_path, start=6, resuming=True).close()
    assert not capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-200])
    opened(tmp_path, start=6, resuming=True).close()
    last = rows(tmp_path)[-1]["step"]
    assert f"{path} lacks the rows of updates {last + 1} to 6" in capsys.readouterr().out
    path.unlink()
    opened(tmp_path, start=6, resuming=True).close()
    assert f"{path} lacks the rows of updates 1 to 6" in capsys.readouterr().out
    opened(tmp_path, start=6).close()  # goes on from the state of another run
    assert not capsys.readouterr().out


@pytest.mark.parametrize("every", [0, 1])
def test_where_the_last_run_ended_is_read_from_the_end_of_its_log(tmp_path, every):
    path, tell = tmp_path / "metrics.jsonl", writers.tell_divergence
    logged = []
    for step in range(1, 5001):
        logged.append({"step": step, "optim/skipped_updates": float(step > 4950), "x": "y" * 300})
        logged += [{"step": step, "valid/loss": None}] * every
    path.write_text("".join(json.dumps(row) + "\n" for row in logged))
    tracemalloc.start()
    (line,) = tell(tmp_path, 4900, 50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "ended at updates 4,951 to 5,000," in line and "in another --workdir" in line
    assert peak < path.stat().st_size / 4
    assert (
        tell(tmp_path, 4900, 51) == tell(tmp_path, 5000, 50) == tell(tmp_path / "x", None, 5) == []
    )


def test_a_number_has_the_digits_that_it_has(tmp_path):
    """Those of float32 read back as the same; those of an evaluation and counts stay exact."""
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    out, epoch, count = opened(tmp_path), 123.00001234567891, 2**40 + 1
    for step, value in enumerate(values, start=1):
        told = {"data/epoch": epoch, "data/tokens": count, "perf/step_ms": 81.92345678}
        out.write(step, {"optim/grad_norm": value, "train/loss": np.float32(np.nan)} | told)
    out.write(100, {"valid/loss": 1 / 3})
    out.close()
    *train, valid = rows(tmp_path)
    assert valid["valid/loss"] == 1 / 3 and train[0]["train/loss"] is None
    read = np.array([row["optim/grad_norm"] for row in train])
    assert (read.astype(np.float32) == values).all()
    assert train[0]["data/tokens"] == count and abs(train[0]["data/epoch"] - epoch) < 1e-8
    length = len((tmp_path / "metrics.jsonl").read_text()) / 101
    plain = {"step": 50, "optim/grad_norm": float(values[50]), "train/loss": None} | told
    assert length < 0.85 * len(json.dumps(plain))


@pytest.mark.parametrize("start", [0, 1, 699, 700, 701, 1000])
@pytest.mark.parametrize("end", ["", '{"step": 1001, "tr', '{"step": 1001, "train/loss": 1}'])
def test_a_resumed_run_cuts_its_rows_where_it_goes_on(tmp_path, start, end):
    path = tmp_path / "metrics.jsonl"
    logged = [{"step": n, "train/loss": 1 / n} for n in range(1, 1001)]
    logged = [row for one in logged for row in (one, {"step": one["step"], "valid/loss": 2.0})]
    path.write_text("".join(json.dumps(row) + "\n" for row in logged) + end)
    opened(tmp_path, start=start).close()
    assert rows(tmp_path) == logged[: 2 * start]
    path.write_text("".join(json.dumps(row) + "\n" for row in logged)[:-1])  # no last line end
    out = opened(tmp_path, start=1000)
    out.write(1001, {"train/loss": 3.0})
    out.close()
    assert rows(tmp_path)[:-1] == logged and rows(tmp_path)[-1]["step"] == 1001


def test_a_long_log_is_neither_read_nor_written_anew(tmp_path):
    """The file stays the same one."""
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 50_001):
            file.write(f'{{"step": {step}, "train/loss": 2.5, "optim/lr": 0.001}}\n')
    before = path.stat().st_ino
    tracemalloc.start()
    opened(tmp_path, start=49_000).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_ino == before and peak < 1 << 20
    assert rows(tmp_path)[-1]["step"] == 49_000


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    out = opened(tmp_path, tensorboard=True, wandb="project")
    out.write(1, ROW)
    out.text(1, "sample", "once")
    out.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", [0, 3])
def test_tensorboard_shows_every_update_once(tmp_path, start):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = opened(tmp_path, tensorboard=True)
    for step in range(1, 6):
        out.write(step, {"train/loss": step / 8})
    out.close()
    (first,) = (tmp_path / "tensorboard").iterdir()  # the name ends in the second of its opening
    first.rename(first.with_name("events.out.tfevents.1000000000.host"))
    out = opened(tmp_path, start=start, tensorboard=True)  # 4 and 5 were lost, or all
    for step in range(start + 1, 7):
        out.write(step, {"train/loss": 10 + step})
    out.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    kept = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert kept == [(n, n / 8 if n <= start else 10 + n) for n in range(1, 7)]


def test_tensorboard_shows_texts_and_the_config(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):  # a run that goes on has its config there already
        out = opened(tmp_path, start=start, tensorboard=True)
        out.text(start + 2, "sample", "once < twice")
        out.close()
        for path in (tmp_path / "tensorboard").iterdir():  # the name ends in a second
            path.rename(path.with_name(f"events.out.tfevents.{len(path.name)}{start}.host"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (shown,) = events.Tensors("config/text_summary")
    assert b"optim.peak_lr=0.001" in shown.tensor_proto.string_val[0]
    samples = events.Tensors("sample/text_summary")
    assert [(x.step, x.tensor_proto.string_val[0]) for x in samples] == [
        (2, b"once < twice"),
        (4, b"once < twice"),
    ]


def test_wandb_keeps_its_id(tmp_path, monkeypatch):
    """Offline: what would be sent lies in the workdir, one folder for each time it was opened."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for start in (0, 3):
        out = opened(tmp_path, start=start, wandb="project")
        out.write(start + 1, ROW)
        out.text(start + 1, "sample", "once < twice")
        out.close()
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}*/*.wandb"))) == 2
    texts = [p.read_text() for p in tmp_path.glob("wandb/*/files/media/html/sample_*.html")]
    assert texts and all("<pre>once &lt; twice</pre>" in text for text in texts)


def test_wandb_begins_anew_with_a_run_that_does(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, *_, **__):
            pass

        def log(self, row):
            calls.append(row)

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append((options["project"], options["id"]))
        return Run()

    fake = types.SimpleNamespace(init=init, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 0, 4):
        out = opened(tmp_path, start=start, wandb="project")
        out.write(start + 1, {"train/loss": 2.0})
        out.close()
    (_, first), (_, second), (_, third) = (call for call in calls if isinstance(call, tuple))
    assert first != second == third
    assert calls[-2:] == [{"update": 5, "train/loss": 2.0}, "finished"]


@pytest.mark.parametrize(
    ("field", "value", "package"),
    [("tensorboard", True, "tensorboardX"), ("wandb", "project", "wandb")],
)
def test_a_missing_package_is_one_sentence(monkeypatch, field, value, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    writers.check(Config())
    with pytest.raises(ConfigError) as refused:
        writers.check(replace(Config(), **{f"train__{field}": value}))
    assert str(refused.value) == (
        f"config.train.{field}: {value!r} needs {package}, which is not installed; "
        f"run `pip install 'lm_jax[{field}]'`, or leave the field out."
    )


@pytest.mark.parametrize(
    ("mode", "login", "refusal"),
    [
        ("online", lambda prompt: True, None),
        ("online", lambda prompt: False, "no login is known"),
        ("online", lambda prompt: 1 / 0, "division by zero"),
        ("offline", lambda prompt: False, None),
    ],
)
def test_wandb_without_login_is_one_sentence(monkeypatch, mode, login, refusal):
    settings = types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
    errors = types.SimpleNamespace(Error=ZeroDivisionError)
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.setup, fake.login, fake.errors = lambda: settings, login, errors
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = replace(Config(), train__wandb="project")
    if refusal is None:
        writers.check(cfg)
        return
    with pytest.raises(ConfigError) as refused:
        writers.check(cfg)
    assert str(refused.value) == (
        f"config.train.wandb: 'project' cannot be opened ({refusal}); run `wandb login`, or set "
        "WANDB_MODE=offline and send the run later with `wandb sync`."
    )
