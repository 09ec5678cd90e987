"""The loop, evaluation and checkpoints on a small text, end to end."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lm_jax import config, evaluate, loop, report, rundir, setup, signals, step
from lm_jax.checkpoint import Damaged
from lm_jax.compare import compare
from lm_jax.config import Config, ConfigError
from lm_jax.config.resolve import resolve
from lm_jax.data.open import open_data
from lm_jax.doctor import provenance
from lm_jax.main import main, train_in
from lm_jax.signals import Interrupted
from lm_jax.start import find_origin
from lm_jax.workdir import open_trained
from tests.helpers import ROOT, StopAfter, final_state, record_batches, rows, small, thirds


@pytest.fixture(scope="module")
def straight_batches(text, tmp_path_factory):
    """A run of 12 updates that was never stopped: workdir, results and batch hashes."""
    workdir = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = record_batches(monkeypatch)
        results = loop.train_and_evaluate(small(text), workdir)
    return workdir, results, seen


@pytest.fixture(scope="module")
def straight(straight_batches):
    return straight_batches[:2]


def test_a_run_leaves_what_it_promises(straight):
    workdir, results = straight
    record = json.loads((workdir / "config.json").read_text())
    cfg = config.from_dict(record["config"])
    assert record["hash"] == config.config_hash(cfg) and cfg.train.steps == "12"
    assert {"python", "jax", "flax", "optax"} <= set(record["versions"])
    assert record["devices"] and record["data"]["tokenizer_hash"]
    for name in ("valid", "test"):
        result = json.loads((workdir / f"eval_{name}.json").read_text())
        assert result == results[name]
        assert result["token_count"] == result["split_token_count"] > 0
        assert set(result["references"]) == {"uniform", "unigram", "kn2", "kn3"}
        np.testing.assert_allclose(np.log(result["token_ppl"]), result["loss"], rtol=1e-9)
        counts = record["data"]["splits"][name]
        nats = result["loss"] * result["token_count"]
        np.testing.assert_allclose(result["word_ppl"], np.exp(nats / counts["words"]))
        np.testing.assert_allclose(
            result["bits_per_byte"], nats / np.log(2) / counts["bytes"], rtol=1e-9
        )
        documents = np.load(workdir / f"documents_{name}.npz")
        assert len(documents["nats"]) == counts["documents"] > 1
        np.testing.assert_allclose(documents["nats"].sum(), nats, rtol=1e-6)
        assert documents["tokens"].sum() == counts["tokens"]
        assert documents["bytes"].sum() == counts["bytes"]
    training = [row for row in rows(workdir) if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(1, 13))
    assert training[0]["optim/lr"] > 0
    np.testing.assert_allclose(training[-1]["optim/lr"], 1e-4, rtol=1e-5)
    assert training[-1]["data/examples"] == 48
    assert {"optim/grad_norm", "optim/update_norm", "perf/input_wait", "data/tokens"} <= set(
        training[0]
    )
    assert [row["step"] for row in rows(workdir) if "valid/loss" in row] == [6, 12]
    assert training[0]["train/loss"] > training[-1]["train/loss"]


@pytest.mark.parametrize("stop", thirds([4, 2, 6, 10]))
def test_stop_and_resume_is_bit_identical(straight_batches, text, tmp_path, monkeypatch, stop):
    straight = straight_batches[:2]
    with monkeypatch.context() as patched:
        before = record_batches(patched)
        patched.setattr(signals, "agreed", StopAfter(stop))
        with pytest.raises(Interrupted) as stopped:
            loop.train_and_evaluate(small(text), tmp_path)
    assert str(stopped.value) == f"stopped by SIGTERM after update {stop}" and len(before) == stop
    after = record_batches(monkeypatch)
    results = loop.train_and_evaluate(small(text), tmp_path)
    assert before + after == straight_batches[2] and len(after) == 12 - stop
    for a, b in zip(final_state(straight[0]), final_state(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)
    assert results == straight[1]
    assert {row["step"]: row["resumed"] for row in rows(tmp_path) if "resumed" in row} == {
        stop + 1: stop
    }
    for a, b in zip(rows(straight[0]), rows(tmp_path), strict=True):
        b.pop("resumed", None)
        assert {k: v for k, v in a.items() if not k.startswith("perf/")} == {
            k: v for k, v in b.items() if not k.startswith("perf/")
        }


def command(text, workdir, **changes):
    """The run as a process of its own, through the command line."""
    cfg = small(text, **changes)
    default = dict(config.named_fields(Config()))
    (workdir.parent / "cfg.py").write_text(
        "from lm_jax.config import Config\ndef get_config():\n    return Config()\n"
    )
    overrides = [
        f"--config.{path}={value}"
        for path, value in config.named_fields(cfg)
        if value != default[path]
    ]
    return [
        sys.executable,
        "-m",
        "lm_jax.main",
        f"--config={workdir.parent / 'cfg.py'}",
        f"--workdir={workdir}",
        *overrides,
    ]


def start(args):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        args, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def saved(workdir):
    folder = workdir / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return {int(name) for name in names if name.isdigit()}


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(text, tmp_path):
    workdir = tmp_path / "run"
    process = start(command(text, workdir, train__steps="100000", train__checkpoint_every="0"))
    metrics = workdir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 2000, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    last = out.strip().splitlines()[-1]
    assert last.startswith("stopped by SIGTERM after update") and "goes on" in last
    assert saved(workdir) == {rows(workdir)[-1]["step"]}


def test_command_line_errors_are_one_sentence(text, tmp_path, capsys):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from lm_jax.config import Config\n"
        "def get_config():\n    cfg = Config()\n    cfg.train.step = '3'\n    return cfg\n"
    )
    for override, said in (
        ("--config.model.layerz=3", "did you mean config.model.layers?"),
        ("--config.model.layers=four", "config.model.layers"),
        ("--config.model.heads=3", "config.model.heads: 3 does not divide"),
        ("--config.train.steps=abc", "config.train.steps: 'abc' is no duration"),
        ("--config.optim.peak_lr=nan", "config.optim.peak_lr: nan is not finite"),
        ("--config.data.files=none*.txt", "none*.txt"),
        ("--config=nowhere.py", "nowhere.py"),
        (f"--config={wrong}", "config.train.step: there is no such field; did you mean"),
        (
            f"--config={ROOT / 'configs' / 'phase1.py'}:emb99",
            "emb99: no such arm; use one of emb25",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command(text, tmp_path / "run")[2:], override])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_config_is_refused_by_name(straight, text):
    workdir, _ = straight
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"config\.optim\.peak_lr: 0\.001 -> 0\.5.*--workdir"):
        loop.train_and_evaluate(small(text, optim__peak_lr=0.5), workdir)
    with pytest.raises(ConfigError, match="another corpus or tokenizer"):
        changed = text / "00.txt"
        old = changed.read_text()
        changed.write_text(old + "ba\n")
        try:
            loop.train_and_evaluate(small(text), workdir)
        finally:
            changed.write_text(old)
    assert (workdir / "config.json").read_bytes() == before


def test_evaluation_refuses_another_corpus(straight, text):
    changed = text / "00.txt"
    old = changed.read_text()
    changed.write_text(old.replace("ba", "ab"))
    try:
        with pytest.raises(ConfigError, match="another corpus or has another tokenizer"):
            open_trained(straight[0]).store  # noqa: B018
    finally:
        changed.write_text(old)


def test_a_config_that_never_trained_can_be_mended(text, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.mesh\.fsdp"):
        loop.train_and_evaluate(small(text, mesh__fsdp=3), tmp_path)
    loop.train_and_evaluate(small(text, train__steps="4", optim__warmup="1"), tmp_path)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_to_be_scored_must_be_there(text, tmp_path, split):
    cfg = small(text, eval__splits="valid,test", **{f"data__{split}_fraction": 0.0})
    with pytest.raises(ValueError, match=rf"config\.data\.{split}_fraction"):
        loop.train_and_evaluate(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lines_without_ends_have_references(text, tmp_path):
    cfg = small(text, data__document="line", tokenizer__kind="word", data__seq_len=8)
    results = loop.train_and_evaluate(cfg, tmp_path)
    assert results["test"]["token_count"] == results["test"]["split_token_count"]


def test_a_run_from_before_a_field_was_there_goes_on(straight, text, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["distill"], record["config"]["model"]["norm_eps"]
    path.write_text(json.dumps(record))
    assert loop.train_and_evaluate(small(text), tmp_path / "run") == straight[1]


def test_finished_run_is_only_reported_again(straight, text):
    workdir, results = straight
    written = (workdir / "metrics.jsonl").read_text()
    assert loop.train_and_evaluate(small(text), workdir) == results
    assert (workdir / "metrics.jsonl").read_text() == written


def test_a_finished_run_gets_the_page_that_a_kill_kept_from_it(straight, text, monkeypatch):
    pages = []
    monkeypatch.setattr(report, "write", pages.append)
    page = straight[0] / "report.html"
    page.write_text("of an evaluation before the end")
    os.utime(page, (0, 0))
    for _ in range(2):
        assert not train_in(straight[0], small(text))
        os.utime(page)
    assert pages == [straight[0]]


def test_batch_size_and_stride_of_evaluation(straight):
    run = open_trained(straight[0])

    def score(batch_size, stride):
        cfg = config.replace(run.cfg, eval__batch_size=batch_size, eval__stride=stride)
        evaluator = evaluate.Evaluator(
            cfg, run.store, run.mesh, step.make_eval_step(cfg, run.graphdef)
        )
        return evaluator(run.params, "test")

    whole = score(64, 32)
    for batch_size in (1, 7):
        np.testing.assert_allclose(score(batch_size, 32)["loss"], whole["loss"], rtol=1e-5)
    for stride in (1, 5, 16):
        strided = score(16, stride)
        assert strided["token_count"] == whole["token_count"] and strided["stride"] == stride
        assert strided["loss"] != whole["loss"]


@pytest.mark.slow
def test_divergence_stops_with_the_reason(text, tmp_path, capsys):
    cfg = small(text, optim__peak_lr=1e17, train__max_nonfinite=3)
    with pytest.raises(FloatingPointError, match=r"updates 2 to 4 were all skipped"):
        loop.train_and_evaluate(cfg, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "update 2 skipped: loss or gradient of batch 1 is not finite" in said
    assert said.count("first nan in `") == 1
    assert "last parameter before it params/" in said
    assert [row["optim/skipped_updates"] for row in rows(tmp_path)] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        (dict(optim__peak_lr=1e-30), ["log.updates (fail)", "log.identical (fail)"]),
        (dict(optim__clip_norm=1e-3), ["log.clipping (note)"]),
    ],
)
def test_what_metrics_rule_out_is_told_once_while_training(
    text, tmp_path, monkeypatch, capsys, changes, told
):
    monkeypatch.setattr(setup, "examine_run", lambda *_: None)
    changes = dict(train__eval_every="3", train__steps_per_call=1, optim__clip_norm=100.0) | changes
    cfg = small(text, doctor="fast", **changes)
    loop.train_and_evaluate(cfg, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(x.split()[1:3]).strip(":") for x in lines if x.startswith("doctor")] == told
    failed = json.loads((tmp_path / "watch.json").read_text())["failed"]
    assert bool(failed) == ("fail" in str(told))


def test_evaluate_command(straight, monkeypatch, capsys):
    workdir, results = straight
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={workdir}", "--split=valid"])
    evaluate.main()
    assert json.loads((workdir / "eval_valid.json").read_text()) == results["valid"]
    assert "this model" in capsys.readouterr().out


def test_a_run_can_be_compared(straight):
    workdir, results = straight
    (arm,) = compare.compare_runs([workdir]).values["arms"]
    assert arm["folders"] == [str(workdir)] and arm["seeds"] == [0]
    assert arm["bits_per_byte"]["by_seed"] == [results["test"]["bits_per_byte"]]
    assert arm["token_perplexity"]["mean"] == pytest.approx(results["test"]["token_ppl"])
    assert arm["word_perplexity"]["mean"] == pytest.approx(results["test"]["word_ppl"])
    training = [row for row in rows(workdir) if "train/loss" in row]
    assert arm["tokens_seen"] == training[-1]["data/tokens"]
    (curve,) = arm["curves"]
    assert curve["valid_tokens"] == [training[i - 1]["data/tokens"] for i in (6, 12)]
    assert curve["train_tokens"] == [row["data/tokens"] for row in training]


def flip(folder):
    """Turn bits all over the data of a checkpoint, which may lie in several files."""
    for path in (folder / "state").glob("**/d/*"):
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[::64] ^= 4
        path.write_bytes(data.tobytes())


def test_damage_costs_updates_and_no_run(straight, text, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(signals, "agreed", StopAfter(8))
        with pytest.raises(Interrupted):
            loop.train_and_evaluate(small(text), folder)
    flip(folder / "checkpoints" / "8")
    (folder / "best" / "6" / "manifest" / "metadata").write_text("{")
    capsys.readouterr()
    loop.train_and_evaluate(small(text), folder)
    said = capsys.readouterr().out
    assert "checkpoints/8: damaged (" in said and "; update 4 is taken in its place" in said
    assert "best/6: damaged (" in said
    assert (folder / "checkpoints/8.damaged").exists() and (folder / "best/6.damaged").exists()
    for a, b in zip(final_state(straight[0]), final_state(folder), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row["step"] for row in rows(folder) if "train/loss" in row] == list(range(1, 13))
    best = open_trained(folder).step
    flip(folder / "best" / str(best))
    assert loop.train_and_evaluate(small(text), folder)["test"]["step"] == 12
    assert f"best/{best}: damaged (" in capsys.readouterr().out
    flip(folder / "checkpoints" / "12")
    assert open_trained(folder, checkpoint="last").step == 8
    with pytest.raises(Damaged, match="checkpoints/12: damaged"):
        open_trained(folder, checkpoint=12)
    branch = small(text, train__start_from=str(folder))
    assert find_origin(resolve(branch, windows=50), open_data(branch)).update == 8


@pytest.mark.parametrize(
    ("peak_lr", "said", "told"),
    [
        (1e15, "updates 2 to 4 were all skipped", "updates 2 to 4, which were not finite"),
        (1e25, "update 1 made the parameters infi", "update 1, which made the parameters infinite"),
    ],
)
def test_divergence_saves_nothing_and_the_next_start_says_so(
    text, tmp_path, capsys, monkeypatch, peak_lr, said, told
):
    monkeypatch.setattr(provenance, "trace", lambda *_, **__: None)  # takes long
    changes = dict(optim__peak_lr=peak_lr, train__max_nonfinite=3, train__checkpoint_every="3")
    cfg = small(text, optim__warmup="1", train__steps_per_call=1, **changes)
    for _ in range(2):
        capsys.readouterr()
        with pytest.raises(FloatingPointError, match=said):
            loop.train_and_evaluate(cfg, tmp_path)
        assert not list((tmp_path / "checkpoints").iterdir())
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("the last run here")]
    assert len(lines) == 1 and f"ended at {told}, and ends there again" in lines[0]
    assert "lower config.optim.peak_lr" in lines[0]


def test_a_signal_among_skipped_updates_saves_and_the_count_goes_on(text, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "trace", lambda *_, **__: None)  # takes long
    cfg = small(text, optim__peak_lr=1e15, optim__warmup="1", train__max_nonfinite=6)
    with monkeypatch.context() as patched:
        patched.setattr(signals, "agreed", StopAfter(4))
        with pytest.raises(Interrupted):
            loop.train_and_evaluate(cfg, tmp_path)
    assert saved(tmp_path) == {4}
    with pytest.raises(FloatingPointError, match=r"updates 2 to 7 were all skipped"):
        loop.train_and_evaluate(cfg, tmp_path)
    assert saved(tmp_path) == {4}
    assert None not in [row.get("optim/param_norm", 0) for row in rows(tmp_path)]


def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(straight, text, tmp_path):
    folder = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # in place of root's full disk
    try:
        with pytest.raises(OSError, match="File too large; make room there") as raised:
            loop.train_and_evaluate(small(text), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(folder) and "--workdir" in str(raised.value)
    assert loop.train_and_evaluate(small(text), folder) == straight[1]
    for a, b in zip(final_state(straight[0]), final_state(folder), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_place_that_takes_nothing_is_named_with_its_flag(tmp_path):
    def failing(path, number):
        with rundir.disk_told(tmp_path, str(tmp_path / "cache")):
            raise OSError(number, os.strerror(number), path)

    for path, flag in ((None, "--workdir"), (tmp_path / "cache" / "x", "config.data.cache_dir")):
        with pytest.raises(OSError, match=f"make room there and give .* another {flag}") as raised:
            failing(path, errno.ENOSPC)
        assert raised.value.filename == str(path or tmp_path)
    with pytest.raises(OSError, match="make it writable"):
        failing(tmp_path / "config.json", errno.EROFS)
    with pytest.raises(ConnectionResetError):
        failing(None, errno.ECONNRESET)
    with pytest.raises(RuntimeError, match="was removed while the run went on"):
        with rundir.disk_told(tmp_path, ""):
            tmp_path.rmdir()
            (tmp_path / "x").open("w")


def test_a_folder_that_was_removed_is_told_by_its_name(text, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(signals, "agreed", lambda: shutil.rmtree(folder, ignore_errors=True))
    with pytest.raises(RuntimeError, match=rf"{folder}(/best)?: was removed while the run went on"):
        loop.train_and_evaluate(small(text, train__checkpoint_every="0"), folder)
