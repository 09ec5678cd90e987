"""Several runs as one: exact scores, samples, the folder that stands for them, and refusals."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, logsumexp

from lm_jax import config, evaluate, generate, loop
from lm_jax import loss as losses
from lm_jax.compare import compare
from lm_jax.config import ConfigError
from lm_jax.config.resolve import resolve
from lm_jax.data import windows
from lm_jax.data.tokenizers.kinds import CharTokenizer
from lm_jax.distill.opening import open_teacher
from lm_jax.ensemble import (
    Named,
    as_one,
    each_run,
    mean_nats,
    named_together,
    open_ensemble,
    open_models,
)
from lm_jax.evaluate import Evaluator
from lm_jax.kernels.linear_divergence import Member
from lm_jax.workdir import open_trained
from tests.helpers import randomise, small

SIZES: tuple[dict, ...] = ({}, dict(model__layers=2, model__d_model=24, model__logit_softcap=3.0))


@pytest.fixture(scope="module")
def root(text, tmp_path_factory):
    """Two finished runs of two updates, of other sizes and seeds."""
    folder = tmp_path_factory.mktemp("ensemble")
    short = dict(train__steps="2", train__eval_every="0", optim__warmup="1", optim__peak_lr=0.05)
    for seed, changes in enumerate(SIZES):
        cfg = small(text, seed=seed, **short, **changes)
        loop.train_and_evaluate(cfg, folder / f"run-{seed}")
    return folder


@pytest.fixture(scope="module")
def runs(root):
    """The same with random parameters, whose mean is far from each."""
    opened = [open_trained(root / f"run-{seed}") for seed in range(2)]
    return [
        dataclasses.replace(run, params=randomise(run.params, seed, 0.7))
        for seed, run in enumerate(opened)
    ]


@pytest.fixture(scope="module")
def both(root):
    """The folder that stands for the two."""
    evaluate.main(["evaluate", f"{root}/run-0,{root}/run-1", f"--out={root / 'both'}"])
    return root / "both"


def logits_of(run, *inputs):
    def forward(params):
        model = nnx.merge(run.graphdef, params)
        return model.logits(model(*inputs, dtype=jnp.float32))

    return np.float64(jax.jit(forward)(run.params))


def mean_log_p(logits):
    """Logarithm of the mean of probabilities, float64."""
    return logsumexp([log_softmax(z, axis=-1) for z in logits], axis=0) - np.log(len(logits))


def test_the_mean_is_that_of_numpy_document_by_document(runs):
    store, cfg = runs[0].store, runs[0].cfg
    split = store.split("test")
    several = as_one(["a", "b"], runs)
    result, nats_D = Evaluator.of(several, store).score(several.params, "test")
    nats, right = [], 0
    sizes = dict(seq_len=cfg.data.seq_len, batch_size=8, stride=cfg.eval.stride)
    for batch in windows.eval_batches(split, document_mask=True, **sizes):
        b = losses.shift({name: jnp.asarray(x) for name, x in batch.items()})
        log_p = mean_log_p([logits_of(run, b.inputs, b.segment_ids, b.positions) for run in runs])
        scored, targets = np.asarray(b.weights) > 0, np.asarray(b.targets)
        nats.append(-np.take_along_axis(log_p, targets[..., None], -1)[..., 0][scored])
        right += (log_p.argmax(-1) == targets)[scored].sum()
    nats = np.concatenate(nats)
    expected_D = np.add.reduceat(nats, split.document_starts[:-1])
    np.testing.assert_allclose(nats_D, expected_D, rtol=1e-5)
    assert result["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert result["accuracy"] == pytest.approx(right / len(nats))
    each = [Evaluator.of(run, store)(run.params, "test")["loss"] for run in runs]
    assert list(result["members"]) == ["a", "b"]
    assert list(result["members"].values()) == pytest.approx(each, rel=1e-5)
    assert result["loss"] < np.mean(each) - 0.1  # they differ, so that other means would show


@pytest.mark.parametrize("number", [1, 2])
def test_the_mean_of_equal_runs_is_the_run(runs, number):
    run = runs[1]
    alone, alone_D = Evaluator.of(run, run.store).score(run.params, "valid")
    several = as_one([f"run {n}" for n in range(number)], [run] * number)
    result, nats_D = Evaluator.of(several, run.store).score(several.params, "valid")
    assert len(result.pop("members")) == number
    assert result == pytest.approx(alone, rel=1e-6)
    np.testing.assert_allclose(nats_D, alone_D, rtol=1e-5)


def test_no_logits_of_all_positions_exist_at_once():
    rng = np.random.default_rng(0)
    B, T, V = 4, 4801, 100
    shapes = [((B, T, 5), (V, 5)), ((B, T, 3), (V, 3))]
    arrays = [[np.float32(rng.normal(size=shape)) for shape in pair] for pair in shapes]
    logits = [np.float64(x) @ np.float64(head).T for x, head in arrays]
    logits[1] = 2 * np.tanh(logits[1] / 2)
    targets_BT = rng.integers(0, V, (B, T))
    weights_BT = np.float32(rng.random((B, T)) < 0.8)
    arrays[1][0][weights_BT == 0] = np.nan

    def nats_of(arrays):
        members = [Member(*arrays[0]), Member(*arrays[1], softcap=2.0)]
        return mean_nats(members, targets_BT, weights_BT)

    compiled = jax.jit(nats_of).lower(arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * T * V
    found = compiled(arrays)
    for scores, nats_BT in zip([mean_log_p(logits), *logits], [found[0], *found[2:]], strict=True):
        log_p = log_softmax(scores, axis=-1)
        expected_BT = -np.take_along_axis(log_p, targets_BT[..., None], -1)[..., 0] * weights_BT
        np.testing.assert_allclose(nats_BT, expected_BT, atol=1e-4)
    right_BT = (mean_log_p(logits).argmax(-1) == targets_BT) * weights_BT
    np.testing.assert_array_equal(found[1], right_BT)


def test_greedy_samples_are_the_argmax_of_the_mean(runs):
    several = as_one(["a", "b"], runs)
    (one,) = generate.generate(several, "ba", tokens=12, temperature=0)
    tokenizer = several.tokenizer
    ids = [tokenizer.separator, *tokenizer.encode("ba").tolist()]
    whole = np.array([ids + one.ids], np.int32)
    positions = np.arange(whole.shape[1])[None]
    each = [logits_of(run, whole, np.ones_like(whole), positions) for run in runs]
    each = [logits[:, len(ids) - 1 : -1] for logits in each]
    log_p = mean_log_p(each)[0]
    np.testing.assert_allclose(one.log_probs, log_p[np.arange(12), one.ids], atol=1e-4)
    log_p[:, tokenizer.separator] = -np.inf
    assert one.ids == log_p.argmax(1).tolist()
    for logits in each:
        assert one.ids != logits[0].argmax(1).tolist()


def test_command_scores_and_keeps_the_mean(root, both, capsys):
    given = f"{root}/run-0,{root}/run-1"
    before = {path.name for path in root.iterdir()}
    evaluate.main(["evaluate", given])
    told = capsys.readouterr()
    assert "mean of 2 runs" in told.out and "this model" not in told.out
    assert "holds the result" not in told.err
    assert {path.name for path in root.iterdir()} == before
    kept = json.loads((both / "eval_test.json").read_text())
    alone = json.loads((root / "run-0" / "eval_test.json").read_text())
    assert kept.keys() == {*alone, "members"} and kept["step"] == 4
    with np.load(both / "documents_test.npz") as documents:
        nats = documents["nats"].sum()
    assert nats == pytest.approx(kept["loss"] * kept["token_count"])
    assert [kept["members"][f"{root}/run-{n}"] for n in (0, 1)] == pytest.approx(
        [json.loads((root / f"run-{n}" / "eval_test.json").read_text())["loss"] for n in (0, 1)],
        rel=1e-5,
    )
    evaluate.main(["evaluate", str(both)])
    assert json.loads((both / "eval_test.json").read_text()) == kept
    assert "eval_test.json holds the result" in capsys.readouterr().err


def test_a_folder_stands_for_its_runs_wherever_they_lie(root, both, tmp_path, monkeypatch, capsys):
    moved = shutil.copytree(root, tmp_path / "moved")
    members = json.loads((moved / "both" / "ensemble.json").read_text())["members"]
    assert [one["folder"] for one in members] == ["../run-0", "../run-1"]
    monkeypatch.chdir(moved)
    assert [one.folder for one in named_together("both")] == ["run-0", "run-1"]
    flags = ["--prompt=ba", "--tokens=5", "--temperature=0"]
    generate.main(["generate", "both", *flags])
    told = capsys.readouterr().out
    generate.main(["generate", "run-0,run-1", *flags])
    assert told.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    (sample,) = map(json.loads, (moved / "both" / "samples.jsonl").read_text().splitlines())
    assert len(sample["ids"]) == 5
    shutil.rmtree(moved / "run-1")
    shutil.copytree(moved / "run-0", moved / "run-1")
    for main, name in ((evaluate.main, "evaluate"), (generate.main, "generate")):
        with pytest.raises(SystemExit):
            main([name, "both"])
        assert "run-1: its parameters are not those that ensemble.json" in capsys.readouterr().err


def test_an_ensemble_teaches_as_its_runs(text, root, both):
    def teacher(names, **changes):
        cfg = resolve(small(text, distill__teachers=names, **changes), windows=50)
        return open_teacher(cfg, open_trained(root / "run-0").store)

    assert teacher(str(both)).identity == teacher(f"{root}/run-0,{root}/run-1").identity
    assert each_run("") == [Named("", "best")]
    with pytest.raises(ConfigError, match=r"config\.distill\.feature: .* not of 2; set it to 0\.$"):
        teacher(str(both), distill__feature="0.1")


def test_an_ensemble_is_an_arm(root, both, tmp_path):
    single = shutil.copytree(root / "run-1", tmp_path / "other-1")
    comparison = compare.compare_runs([root / "run-0", both, single])
    arms = {arm["name"]: arm for arm in comparison.values["arms"]}
    assert {*arms} == {"run", "both", "other"}
    assert arms["both"]["members"] == [f"{root}/run-0", f"{root}/run-1"]
    assert arms["run"]["members"] == arms["both"]["curves"] == arms["both"]["seeds"] == []
    for key in ("parameters_total", "flops_per_token", "tokens_seen", "training_seconds"):
        total = arms["run"][key] + arms["other"][key]
        assert arms["both"][key] == pytest.approx(total), key
    assert len(comparison.values["pairs"]) == 3
    assert all(pair["standard_error_documents"] > 0 for pair in comparison.values["pairs"])
    said = comparison.markdown()
    assert f"both is the mean of 2 runs ({root}/run-0, {root}/run-1)" in said
    assert re.search(r"^\| both \| [\d.]+ \| .*\| mean of 2 \|", said, re.MULTILINE)
    assert "both" in comparison.html()
    assert compare.compare_runs(both).html()
    shutil.copytree(both, tmp_path / "ens" / "run")
    members = json.loads((both / "ensemble.json").read_text())
    for member, seed in zip(members["members"], (0, 1), strict=True):
        member["folder"] = str(root / f"run-{seed}")
    (tmp_path / "ens" / "run" / "ensemble.json").write_text(json.dumps(members))
    with pytest.raises(ValueError, match="an ensemble is an arm of its own; rename its folder"):
        compare.compare_runs([root / "run-0", tmp_path / "ens" / "run"])


def test_runs_that_cannot_be_averaged_are_named(runs):
    def changed(**changes):
        cfg = config.replace(runs[1].cfg, **changes)
        return dataclasses.replace(runs[1], cfg=cfg)

    other = CharTokenizer(" .abcdefghijklmnopqrstuvwxyz")
    moved = {**runs[1].data, "corpus_fingerprint": "another"}
    for run, said in (
        (changed(data__seq_len=16), "b has config.data.seq_len=16 and a 32, so that they read"),
        (changed(data__document_mask=False), "b has config.data.document_mask=False"),
        (dataclasses.replace(runs[1], tokenizer=other), "b has another tokenizer than a"),
        (dataclasses.replace(runs[1], data=moved), "b was trained on other data than a"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)) as raised:
            as_one(["a", "b"], [runs[0], run])
        assert str(raised.value).endswith("leave one of them out.")
    several = as_one(["a", "b"], [runs[0], changed(eval__stride=8)])
    with pytest.raises(ConfigError, match=r"--stride: .* ones \(32 of a, 8 of b\); give one\.$"):
        evaluate.score_split(several, None, "test", None)
    assert evaluate.score_split(several, None, "test", 32)["stride"] == 32


def test_refusals_are_one_sentence(root, both, tmp_path, capsys):
    a, b = root / "run-0", root / "run-1"
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text('{"model_type": "gpt2"}')
    (broken := tmp_path / "broken").mkdir()
    (broken / "ensemble.json").write_text('{"members": [{"folder": "x"}]}')
    for arguments, said in (
        ([f"{a},{a}"], "names a run twice"),
        ([f"{a},"], "nothing between two commas"),
        ([f"{a},{tmp_path / 'none'}"], "config.json: no such file"),
        ([f"{a},{hf}"], f"{hf} is a Hugging Face checkpoint, and only runs are averaged"),
        ([f"{a},{b}", "--config.data.corpus=text"], "a run is scored on its own data"),
        ([f"{a},{b}", "--split=train", "--stride=99"], "config.eval.stride"),
        ([f"{a},{b}", f"--out={a}"], f"--out={a}: is the folder of a run"),
        ([f"{b},{a}", f"--out={both}"], "is of other runs or checkpoints; give another --out."),
        ([str(both), "--checkpoint=last"], "--checkpoint=last: "),
        ([str(broken)], f"{broken}/ensemble.json: does not name the runs of an ensemble"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(["evaluate", *arguments])
        *_, line = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and said in line and line.endswith("."), line


def test_a_comma_in_the_name_of_a_folder(root, tmp_path):
    folder = shutil.copytree(root / "run-0", tmp_path / "a,b")
    run, own = open_models(str(folder))
    assert own == folder and run.step == 2
    last = named_together(f"{root}/run-0, {root}/run-1", "last")
    assert open_ensemble(last).step == 4
