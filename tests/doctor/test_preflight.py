"""The checks before a run, and the command line."""

import json
import pathlib
import subprocess
import sys

import pytest

from lm_jax import config, loop, loss, preflight
from lm_jax.config import Config, rules
from lm_jax.preflight.command import main
from tests.helpers import CONFIGS, load_config, shared_data, small, thirds


def not_in_order(report):
    return [(f.check, f.status, f.evidence) for f in report if f.status in ("fail", "warn")]


SHIPPED = {"gpt_demo": "tinyshakespeare", "musota": "wikitext-2", "wikitext2": "wikitext-2"}
RUN = {"quickstart"}  # examined by its run, in tests/test_quickstart.py
# They want a corpus of gigabytes, as scripts/bench_stream.py makes and examines; what they choose
# of the code is among the families below.
LARGE = {"gpt2_124m", "llama_110m", "llama_1b", "stream_226m"}
TAUGHT = {"distill"}  # wants a teacher, as the tests in tests/distill train
# Of the others: their text is examined here or in test_data.py, their options are among the
# families below, and optimiser, activation and start are those of quickstart and wikitext2.
VARIANTS = {"ensemble", "phase1", "shakespeare_char", "small_corpus", "text", "wikitext2_cpu"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_configs_are_in_order(name, cache_dir):
    cfg = load_config(name).get_config()
    cfg.data.cache_dir = cache_dir
    cfg.data.source_dir = str(shared_data(SHIPPED[name]))
    report = preflight.examine_config(cfg)
    assert not not_in_order(report)
    assert sum(f.status == "pass" for f in report) > 50


def test_every_shipped_config_is_tried():
    assert set(SHIPPED) | RUN | LARGE | TAUGHT | VARIANTS == set(CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    thirds(
        [
            dict(
                loss__impl="fused",
                loss__label_smoothing=0.1,
                attention__impl="blockwise",
                optim__name="muon",
                model__embedding_rank=6,
                data__window_offset=True,
            ),
            dict(
                model__tied=False,
                model__norm="layernorm",
                model__positions="learned",
                model__mlp="gelu",
                model__bias=True,
                model__kv_heads=1,
                model__qk_norm=True,
                data__document_mask=False,
            ),
            dict(
                train__compute_dtype="bfloat16",
                model__scan_layers=True,
                model__remat=True,
                optim__ema_decay=0.99,
            ),
        ]
    ),
    ids=lambda changes: " ".join(changes),
)
def test_families_of_models_are_in_order(text, changes):
    assert not not_in_order(preflight.examine_config(small(text, **changes)))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("steps", ["2", "1"])
def test_a_run_of_very_few_updates_is_in_order(text, steps):
    every = dict(train__eval_every="1", train__checkpoint_every="1", train__log_every="1")
    last = dict(optim__warmup="0", optim__end_lr=0.0)  # nothing moves in the last update
    cfg = small(text, train__steps=steps, train__steps_per_call=1, **every, **last)
    assert not not_in_order(preflight.examine_config(cfg))


@pytest.mark.slow
@pytest.mark.long
def test_the_full_set_is_in_order(text):
    report = preflight.examine_config(small(text), level="full")
    assert not not_in_order(report)
    assert report["training.gibbs"].status == report["gradient.directional"].status == "pass"


@pytest.mark.slow
def test_a_run_with_a_broken_loss_is_refused(text, tmp_path, monkeypatch, capsys):
    right = loss.shift

    def no_shift(batch):
        b = right(batch)
        return b._replace(targets=b.inputs)

    monkeypatch.setattr(loss, "shift", no_shift)
    with pytest.raises(preflight.Unfit, match=r"loss\.oracle.*--config\.doctor=off"):
        loop.train_and_evaluate(small(text, doctor="fast"), tmp_path)
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert "loss.oracle" in found["failed"]
    assert "loss.oracle" in capsys.readouterr().out
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_unknown_level_is_named():
    with pytest.raises(ValueError, match="level: 'deep' is neither fast nor full"):
        preflight.examine_config(Config(), level="deep")
    with pytest.raises(config.ConfigError, match="config.doctor"):
        rules.validate(config.replace(Config(), doctor="deep"))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lm_jax.doctor", *arguments], capture_output=True, text=True
    )


def test_exit_codes_of_the_command(tmp_path, capsys):
    def called(*arguments):
        """Exit code, output and errors of the command, in this process."""
        with pytest.raises(SystemExit) as ended:
            main(["doctor", *arguments])
        return ended.value.code or 0, *capsys.readouterr()

    log = tmp_path / "log.csv"
    log.write_text("it,train_loss\n" + "".join(f"{10 * i},{12 + i % 3}\n" for i in range(200)))
    arguments = (f"--log={log}", "--map=step=it,loss=train_loss", "--vocab_size=1000")
    code, out, err = called(*arguments, "--json")
    assert code == 1, err
    assert "log.above_uniform" in json.loads(out)["failed"]
    log.write_text("it,train_loss\n" + "".join(f"{10 * i},{6.5 - i / 200}\n" for i in range(200)))
    code, out, err = called(*arguments)
    assert code == 0, out + err
    assert out.startswith("read 200 rows of CSV: it -> step, train_loss -> train/loss\n")
    for misuse in (
        (),
        (f"--log={tmp_path / 'none'}",),
        (*arguments, "--workdir=x"),
        ("--what",),
        (*arguments, "other.csv"),
        (*arguments, "--split_tokens=0"),
        (arguments[0], "--map=loss=train_loss,loss=it"),
        (*arguments, "--references=unigram=many"),
        (*arguments, "--references=kn9=3"),
    ):
        code, out, err = called(*misuse)
        assert code == 2 and len(err.strip().splitlines()) == 1, misuse
        assert "Traceback" not in err
    facts = ("--steps=9000", "--train_tokens=1e6", "--tokens_per_step=100", "--lr_peak=0.1")
    code, out, err = called(*arguments, *facts, "--references=unigram=760,kn2=250", "--json")
    assert code == 0, err
    found = {f["check"]: f["evidence"] for f in json.loads(out)["findings"]}
    assert "6.633 (unigram)" in found["log.baseline"]  # ln 760


def folder(path, **changes):
    """A folder as a run leaves it, with other contents of files where given."""
    record = {
        "config": config.to_dict(Config()),
        "data": {"vocab_size": 1000, "splits": {"train": {"tokens": 10_000}}},
        "devices": ["cpu"],
    }
    files = {
        "config.json": json.dumps(record),
        "metrics.jsonl": '{"step": 1, "train/loss": 6.9}\n',
        "eval_valid.json": '{"references": {"unigram": 300.0}}',
    } | changes.pop("files", {})
    for name, content in files.items():
        (path / name).write_text(content)
    (path / "config.json").write_text(
        json.dumps(record | changes) if changes else files["config.json"]
    )
    return str(path)


def test_a_folder_is_given_as_a_path_or_as_text(tmp_path):
    assert not preflight.examine_workdir(folder(tmp_path)).failed
    assert not preflight.examine_workdir(tmp_path).failed


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"config": {"mod'])
def test_a_folder_with_a_broken_config_is_named(tmp_path, content):
    with pytest.raises(ValueError, match="config.json"):
        preflight.examine_workdir(folder(tmp_path, files={"config.json": content}))


@pytest.mark.parametrize(
    "changes",
    [{"devices": []}, {"data": {}}, {"data": None}, {"config": 3}, {"config": {"data": None}}],
)
def test_a_folder_with_another_config_is_named(tmp_path, changes):
    with pytest.raises(ValueError, match="config.json"):
        preflight.examine_workdir(folder(tmp_path, **changes))


@pytest.mark.parametrize("content", ["{}", "null", "3", '{"references": null}', '{"refer'])
def test_a_folder_with_a_broken_evaluation_is_named(tmp_path, content):
    with pytest.raises(ValueError, match="eval_valid.json"):
        preflight.examine_workdir(folder(tmp_path, files={"eval_valid.json": content}))


def test_a_broken_folder_ends_the_command_with_one_sentence(tmp_path):
    result = command(f"--workdir={folder(tmp_path, devices=[])}")
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_run_is_examined_from_its_folder(text, tmp_path):
    loop.train_and_evaluate(small(text), tmp_path)
    result = command(f"--workdir={tmp_path}", "--json")
    findings = json.loads(result.stdout)["findings"]
    assert result.returncode == 0, result.stdout
    passed = {f["check"] for f in findings if f["status"] == "pass"}
    assert {"log.updates", "log.logged_tokens", "log.ppl_of_loss"} <= passed


def test_a_watch_reads_only_what_is_new(tmp_path):
    watch = preflight.Watch(pathlib.Path(folder(tmp_path)))
    metrics = tmp_path / "metrics.jsonl"
    assert watch.look({}) == []
    nan, late = '{"step": 2, "train/loss": null}\n', '{"step": 3, "train/loss": 6.8}\n'
    with metrics.open("a") as file:
        file.write(nan + late[:9])  # the rest of a row may come later
    (told,) = watch.look({})
    assert told.startswith("doctor: log.finite (fail): ") and "step 2" in told
    first = metrics.read_text().splitlines()[0]
    metrics.write_text(metrics.read_text().replace(first, " " * len(first)) + late[9:])
    assert watch.look({}) == []  # what was read once is not read again, and told once
    assert (
        "train/loss" in json.loads((tmp_path / "watch.json").read_text())["findings"][0]["evidence"]
    )
