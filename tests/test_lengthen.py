"""Runs that are lengthened, branched off, started from others, changed, named and locked."""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tracemalloc

import absl.flags
import jax
import numpy as np
import pytest

from lm_jax import checkpoint, config, length, loop, rundir, setup, signals, workdir
from lm_jax.config import ConfigError
from lm_jax.config.flags import parse_flags
from lm_jax.config.resolve import resolve
from lm_jax.config.section import get
from lm_jax.data.open import open_data
from lm_jax.models import huggingface
from lm_jax.optim import learning_rate
from lm_jax.signals import Interrupted
from lm_jax.start import find_origin
from tests.helpers import ROOT, StopAfter, final_state, record_batches, rows, small
from tests.hugging_face import (
    LLAMA,
    LLAMA3,
    YARN,
    byte_level,
    random_tensors,
    save_checkpoint,
    save_tokenizer,
)


def constant(text, **changes):
    base = dict(optim__schedule="constant", train__keep=0, train__checkpoint_every="2")
    return small(text, **base | dict(data__micro_batch=0) | changes)


def trained(cfg, folder):
    """Hashes of the batches of a run, which is trained."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = record_batches(monkeypatch)
        loop.train_and_evaluate(cfg, folder)
    return seen


def cut(steps, *, start=0, per_call=1, evaluate=0, save=0):
    cfg = config.replace(
        config.Config(),
        train__steps=str(steps),
        train__steps_per_call=per_call,
        train__eval_every=str(evaluate),
        train__checkpoint_every=str(save),
    )
    return length.Calls(cfg, start)


def as_listed(steps, start, *spans):
    """The definition: a call ends at every multiple of a span, and at the end."""
    ends = {end for span in spans if span for end in range(span, steps, span)} | {steps}
    bounds = [start, *sorted(end for end in ends if end > start)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


def test_calls_end_where_an_event_is_due():
    small = itertools.product((1, 2, 12), (1, 3), (0, 1, 4), (0, 6, 20), (0, 2, 12))
    high = [90, 20, 30, 40, 95]
    large = np.random.default_rng(0).integers([1, 1, 0, 0, 0], high, (80, 5)).tolist()
    for steps, per_call, evaluate, save, start in [*small, *large]:
        calls = cut(steps, start=start, per_call=per_call, evaluate=evaluate, save=save)
        expected = as_listed(steps, start, per_call, evaluate, save)
        assert [*calls] == expected and len(calls) == len(expected)
        ends = {call.stop for call in as_listed(steps, 0, per_call, evaluate, save)}
        assert [n for n in range(steps + 1) if n and calls.ends_at(n)] == sorted(ends)


def test_calls_of_a_long_run_take_no_memory():
    tracemalloc.start()
    calls = cut(3_000_000, start=7, per_call=8, evaluate=250, save=1)
    assert len(calls) == 2_999_993 and calls[-1] == range(2_999_999, 3_000_000)
    assert calls[1_000_000] == range(1_000_007, 1_000_008)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.fixture(scope="module")
def short(text, tmp_path_factory):
    """A run of 8 updates and its batches."""
    folder = tmp_path_factory.mktemp("short") / "run-0"
    return folder, trained(constant(text, train__steps="8"), folder)


@pytest.fixture(scope="module")
def long(text, tmp_path_factory):
    """The same of 12 updates from the start."""
    folder = tmp_path_factory.mktemp("long") / "run-0"
    return folder, trained(constant(text, train__steps="12"), folder)


@pytest.fixture
def copied(short, tmp_path):
    return shutil.copytree(short[0], tmp_path / "run-0")


def plain(rows):
    """Rows without what time alone decides."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def test_a_lengthened_run_is_one_of_that_length(short, long, copied, text, capsys):
    assert short[1] + trained(constant(text, train__steps="12"), copied) == long[1]
    assert (
        "lengthened from 8 to 12 updates: the learning rate at update 8 goes from 1.00e-03 to "
        "1.00e-03\n" in capsys.readouterr().out
    )
    for a, b in zip(final_state(long[0]), final_state(copied), strict=True):
        np.testing.assert_array_equal(a, b)
    found = [row for row in plain(rows(copied)) if (row["step"], "train/loss" in row) != (8, False)]
    assert [row.pop("resumed") for row in found if "resumed" in row] == [8]
    assert found == plain(rows(long[0]))
    for name in ("eval_valid.json", "eval_test.json"):
        assert read(copied, name) == read(long[0], name)
    record = read(copied)
    (change,) = record.pop("lengthened")
    assert change.pop("when") and change == {"from": 8, "to": 12, "at": 8}
    assert record["config"] == read(long[0])["config"] and record["hash"] == read(long[0])["hash"]


def test_the_schedule_of_the_new_length_is_said(copied, text):
    record, then = read(copied), constant(text, train__steps="8", optim__schedule="cosine")
    record["config"]["optim"] |= {"schedule": "cosine", "warmup": "1"}  # of 20, cut to a fifth
    record["asked"]["optim"]["warmup"] = "20"
    record["config"]["data"]["growth"], record["asked"]["data"]["growth"] = "6", "20"
    record["config"]["train"]["steps_per_call"] = 3
    (copied / "config.json").write_text(json.dumps(record))
    then.optim.warmup = "1"
    now = config.replace(then, train__steps="12", train__steps_per_call=3, optim__warmup="20")
    now.data.growth = "20"
    now.train.checkpoint_every = "0"
    with contextlib.ExitStack() as held:
        *_, line, bits, changed = setup.assemble(now, copied, None, held).lines
    now.optim.warmup = "2"
    before, after = (float(learning_rate(x.optim, int(x.train.steps))(8)) for x in (then, now))
    assert line.endswith(f"update 8 goes from {before:.2e} to {after:.2e}") and before < after
    assert bits.startswith("update 8 is no end of a call") and "checkpoint_every" in changed
    assert "config.optim.warmup: '1' -> '2'" in changed
    assert "config.data.growth: '6' -> '9'" in changed


def test_results_of_the_old_end_do_not_outlive_it(copied, text, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(signals, "agreed", StopAfter(1))
        with pytest.raises(Interrupted):
            loop.train_and_evaluate(constant(text, train__steps="14"), copied)
    assert not [*copied.glob("eval_*"), *copied.glob("documents_*")]
    state = rundir.read_state(copied)
    assert (state.position, state.steps, state.finished) == (10, 14, False)
    said = r"train\.steps: 10 is not beyond update 10,.*run-steps10-0"
    with pytest.raises(ConfigError, match=said):
        loop.train_and_evaluate(constant(text, train__steps="10"), copied)
    loop.train_and_evaluate(constant(text, train__steps="12"), copied)
    assert [change["to"] for change in read(copied)["lengthened"]] == [14, 12]
    assert read(copied, "eval_test.json")["step"] <= 12 and rundir.read_state(copied).finished


def test_incidental_fields_may_change_and_others_are_named(copied, text, tmp_path, capsys):
    moved = shutil.copytree(text, tmp_path / "moved")
    places = dict(data__source_dir=str(moved), data__files="[0-9]*.txt")
    cfg = constant(text, train__steps="8", train__keep=5, data__threads=2, **places)
    loop.train_and_evaluate(cfg, copied)
    assert "config.train.keep: 0 -> 5" in capsys.readouterr().out
    record = read(copied)
    assert record["config"]["train"]["keep"] == record["asked"]["train"]["keep"] == 5
    assert rundir.read_state(copied).answers(cfg) and "lengthened" not in record
    other = config.replace(cfg, optim__peak_lr=0.5, train__eval_every="3")
    assert not rundir.read_state(copied).answers(other)
    said = r"eval_every: '6' -> '3'.*--workdir=\S*run-peak_lr0.5-eval_every3-0\.$"
    with pytest.raises(ConfigError, match=said) as refused:
        loop.train_and_evaluate(other, copied)
    assert "keep" not in str(refused.value) and "files" not in str(refused.value)
    assert read(copied) == record


def test_a_branch_goes_on_from_a_kept_update(short, long, text, tmp_path):
    trunk, folder = shutil.copytree(long[0], tmp_path / "trunk"), tmp_path / "branch"
    given = dict(train__start_from=f"{trunk}@6", train__start_state=True, train__steps="12")
    cfg = constant(text, **given)
    assert trained(cfg, folder) == long[1][6:]
    for a, b in zip(final_state(long[0]), final_state(folder), strict=True):
        np.testing.assert_array_equal(a, b)
    own, others = plain(rows(folder)), [row for row in plain(rows(long[0])) if row["step"] > 6]
    assert own[0].pop("resumed") == 6 and own == others
    start = {"folder": str(trunk), "update": 6, "state": True, "config_hash": read(trunk)["hash"]}
    assert read(folder)["start"] == start
    shutil.rmtree(trunk)
    assert loop.train_and_evaluate(cfg, folder)["test"] == read(long[0], "eval_test.json")


def begun(cfg, folder):
    """The state before the first update."""
    with contextlib.ExitStack() as held:
        run = setup.assemble(cfg, folder, None, held)
        with contextlib.closing(run.checkpoints):
            return run, *run.begin()


def test_weights_start_a_run_of_its_own(long, text, tmp_path):
    cfg = constant(text, train__start_from=f"{long[0]}@6", optim__ema_decay=0.9, optim__name="muon")
    run, state, manifest = begun(cfg, tmp_path)
    (saved,) = (one for one in checkpoint.find_kept(long[0]) if one.update == 6)
    like = checkpoint.abstract_like(state.params, jax.tree.map(lambda x: x.sharding, state.params))
    for a in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, a, saved.restore({"params": like})["params"])
    assert run.start == state.step == manifest["position"] == manifest["tokens"] == 0
    assert read(tmp_path)["start"]["update"] == 6


@pytest.mark.parametrize(("decay", "name"), [(0.0, "params"), (0.9, "ema")])
def test_the_weights_taken_are_those_that_are_scored(copied, text, monkeypatch, decay, name):
    record = read(copied)
    record["config"]["optim"]["ema_decay"] = decay
    (copied / "config.json").write_text(json.dumps(record))
    monkeypatch.setattr(checkpoint.Kept, "restore", lambda self, like: dict.fromkeys(like, [*like]))
    cfg = resolve(constant(text, train__start_from=str(copied)), windows=50)
    assert find_origin(cfg, open_data(cfg)).weights(None) == [name]


def test_a_checkpoint_of_hugging_face_starts_a_run(text, tmp_path):
    folder = save_tokenizer(tmp_path / "hf", byte_level(), special="<|endoftext|>")
    fields = LLAMA | {"vocab_size": 340}
    save_checkpoint(folder, fields, random_tensors(fields))
    model, *_ = huggingface.load(folder)
    own = {f"model__{name}": value for name, value in config.named_fields(model)}
    hf = dict(tokenizer__kind="hf", tokenizer__folder=str(folder))
    cfg = small(text, train__start_from=str(folder), **own, **hf)
    _, state, _ = begun(cfg, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, state.params, huggingface.load(folder)[-1])
    for changes, said in (
        (dict(model__layers=3), r"architecture; give --config\.model\.layers=2 to start"),
        (dict(tokenizer__kind="byte", tokenizer__folder=""), r"give --config\.tokenizer\.kind=hf"),
        (dict(train__start_state=True), "weights alone"),
    ):
        with pytest.raises(ConfigError, match=said):
            begun(config.replace(cfg, **changes), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(head_dim=6, rope_scaling=LLAMA3, attention_bias=True),
        dict(model_type="mistral", sliding_window=5),
        dict(model_type="qwen2", rope_scaling={"type": "linear", "factor": 2.5}),
        dict(model_type="qwen3", head_dim=6, rope_scaling=YARN),
    ],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_the_flags_that_the_error_gives_start_the_run(text, tmp_path, changes):
    folder = save_tokenizer(tmp_path / "a b", byte_level(), special="<|endoftext|>")
    fields = LLAMA | {"vocab_size": 340} | changes
    save_checkpoint(folder, fields, random_tensors(fields))
    cfg = small(text, train__start_from=str(folder), tokenizer__kind="bpe")
    cfg = config.replace(cfg, tokenizer__vocab_size=270)
    with pytest.raises(ConfigError, match="another architecture or tokenizer; give --") as refused:
        begun(cfg, tmp_path / "run")
    named = [part for part in shlex.split(str(refused.value)) if part.startswith("--")]
    given = absl.flags.FlagValues()
    parse_flags(given, ["main", "--config=quickstart", *named], None, subject=["config"])
    told = [flag.partition("=")[0].removeprefix("--config.") for flag in named]
    own = {path.replace(".", "__"): get(given.config, path) for path in told}
    cfg = config.replace(cfg, **own, train__steps="1", train__eval_every="0", optim__warmup="0")
    _, state, _ = begun(cfg, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, state.params, huggingface.load(folder)[-1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train__start_from": "{}@5"},
            r"@5 is not kept; \S+ holds the updates: 2, 4, 6, 8, 10, 12\.",
        ),
        ({"train__start_from": "{}0"}, r"config\.train\.start_from: .*give the workdir of a run"),
        ({"model__layers": 2, "model__bias": True}, r"layers=1 --config\.model\.bias=False to s"),
        ({"tokenizer__kind": "byte"}, r"config\.tokenizer\.kind: .*\(char, \d+\).*\(byte, 257\)"),
        ({"optim__name": "muon"}, r"config\.optim\.name: muon cannot go on.*it is adamw"),
        ({"optim__ema_decay": 0.9}, r"config\.optim\.ema_decay: 0\.9 cannot go on.*it is 0\.0"),
        ({"train__steps": "6"}, r"config\.train\.steps: 6 is not beyond update 12"),
    ],
)
def test_what_does_not_fit_is_named(long, text, tmp_path, changes, said):
    given = dict(train__start_from="{}", train__start_state=True) | changes
    given["train__start_from"] = given["train__start_from"].format(long[0])
    with pytest.raises(ConfigError, match=said) as refused:
        loop.train_and_evaluate(constant(text, **given), tmp_path / "run")
    assert not (tmp_path / "run").exists() and "\n" not in str(refused.value)


def test_a_state_with_other_leaves_is_refused(long, text, tmp_path, monkeypatch):
    shapes = checkpoint.Kept.shapes
    monkeypatch.setattr(checkpoint.Kept, "shapes", lambda self: shapes(self) | {"beside/x": (2,)})
    cfg = constant(text, train__start_from=f"{long[0]}@6", train__start_state=True)
    with pytest.raises(ConfigError, match=r"start_state: .* other leaves .*\(beside/x\)"):
        begun(cfg, tmp_path)


HOLD = """
import pathlib, sys
from lm_jax import rundir
assert "jax" not in sys.modules
with rundir.occupied(pathlib.Path(sys.argv[1])):
    print(rundir.read_state(pathlib.Path(sys.argv[1])).finished, flush=True)
    sys.stdin.read()
"""


def test_one_trainer_to_a_folder(copied, text):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(copied)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "True\n"
    cfg, before = constant(text, train__steps="8"), read(copied)
    said = rf"run-0: process {holder.pid} on \S+ \(since 20.*\) is training there; wait"
    with pytest.raises(ConfigError, match=said):
        loop.train_and_evaluate(cfg, copied)
    assert read(copied) == before
    assert workdir.open_trained(copied).step == 8  # readers are not kept out
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    for _ in range(2):  # neither by the one that was killed nor by the one that has ended
        loop.train_and_evaluate(cfg, copied)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "a-arm-3"),
        ({"train.steps": "2000", "data.threads": 4, "seed": 3}, "a-arm-3"),
        ({"optim.peak_lr": 0.01}, "a-arm-peak_lr0.01-3"),
        ({"optim.peak_lr": 1e-5, "optim.name": "muon"}, "a-arm-peak_lr1e-05-name_muon-3"),
        ({"model.tied": False, "tokenizer.kind": "bpe"}, "a-arm-tied_False-tokenizer_kind_bpe-3"),
        ({"train.start_from": "runs/trunk-0@500"}, "a-arm-start_from_trunk-0@500-3"),
        ({"data.files": "*.txt"}, r"a-arm-files_?\w{8}-3"),
        ({"data.files": ""}, r"a-arm-files_\w{8}-3"),
        ({"optim.warmup": "2M tokens"}, "a-arm-warmup2Mtokens-3"),
        ({path: "x" * 40 for path in ("data.files", "data.document")}, r"a-arm-\w{8}-3"),
    ],
)
def test_a_changed_field_has_a_folder_of_its_own(changes, name):
    found = rundir.run_name("configs/a.py:arm", 3, changes)
    assert re.fullmatch(name, found), found
