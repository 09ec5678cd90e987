"""Comparison of runs: known answers of its statistics, and what it refuses."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest

from lm_jax import config
from lm_jax.compare import compare, ranking
from lm_jax.config import Config
from lm_jax.config.resolve import resolve
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.models.families import size as size_of
from tests.helpers import Page
from tests.hugging_face import byte_level, save_tokenizer

DOCUMENTS, TOKENS, BYTES = 50, 40, 160  # of the split, and of each document
STEPS = 20


def write_run(
    folder,
    seed,
    nats_per_token,
    *,
    done=STEPS,
    kind="bpe",
    tokenizer="t0",
    vocab_size=300,
    tokens=TOKENS,
    fingerprint="wiki",
    documents=DOCUMENTS,
    bytes_known=True,
    stride=16,
    **changes,
):
    """A workdir as a finished run leaves it; documents differ in difficulty, for all alike."""
    base = {
        "data__seq_len": 16,
        "tokenizer__kind": kind,
        "tokenizer__vocab_size": 300,
        "model__layers": 2,
        "seed": seed,
    }
    cfg = resolve(
        config.replace(Config(), train__steps=str(STEPS), optim__warmup="1", **base | changes),
        windows=9,
    )
    folder.mkdir(parents=True)
    counts = {
        "tokens": documents * tokens,
        "documents": documents,
        "bytes": documents * BYTES,
        "words": documents * 30,
    }
    data = {
        "corpus": fingerprint,
        "corpus_fingerprint": fingerprint,
        "tokenizer_kind": kind,
        "tokenizer_hash": tokenizer,
        "vocab_size": vocab_size,
        "splits": {"train": counts, "valid": counts, "test": counts},
    }
    record = {"config": config.to_dict(cfg), "data": data, "devices": ["cpu"]}
    (folder / "config.json").write_text(json.dumps(record))
    hard_D = np.random.default_rng(0).normal(0, 5, documents)
    own_D = np.random.default_rng([seed, *folder.name.encode()]).normal(0, 1, documents)
    nats_D = nats_per_token * tokens + hard_D - hard_D.mean() + own_D - own_D.mean()
    nats, count = float(nats_D.sum()), counts["tokens"]
    result = {
        "loss": nats / count,
        "token_count": count,
        "bits_per_byte": nats / counts["bytes"] / math.log(2),
        "stride": stride,
        "references": {"uniform": 299.0, "unigram": 90.0, "kn2": 30.0, "kn3": 29.0},
    }
    (folder / "eval_test.json").write_text(json.dumps(result))
    arrays = {"nats": nats_D, "tokens": np.full(documents, tokens)}
    if bytes_known:
        arrays["bytes"] = np.full(documents, BYTES)
    np.savez(folder / "documents_test.npz", **arrays)
    rows = []
    for step in range(1, done + 1):
        speed = {"perf/tokens_per_second": 1000.0, "perf/step_ms": 500.0}
        rows.append({"step": step, "train/loss": 6 / step, "data/tokens": 100 * step, **speed})
        if step % 10 == 0:
            rows.append({"step": step, "valid/bits_per_byte": 2 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_arm(root, name, values, **options):
    return [write_run(root / f"{name}-{i}", i, x, **options) for i, x in enumerate(values)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Arms "good" and "fair" inside their noise, "poor" far behind; 3 seeds each."""
    root = tmp_path_factory.mktemp("runs")
    folders = write_arm(root, "fair", [3.03, 2.99, 3.02], optim__peak_lr=2e-3)
    folders += write_arm(root, "poor", [3.50, 3.51, 3.49], model__d_model=64)
    folders += write_arm(root, "good", [3.01, 2.98, 3.02])
    return folders


def verdicts(comparison):
    return {(p["better"], p["worse"]): p["verdict"] for p in comparison.values["pairs"]}


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 5):
        bounds = [ranking.interval(x)[1:] for x in rng.normal(1, 0.1, (4000, seeds))]
        share = np.mean([low < 1 < high for low, high in bounds])
        assert share == pytest.approx(0.95, abs=0.014)  # 4 standard errors of 4000 draws


@pytest.mark.parametrize("documents", [2, 60, 20_000])
def test_bootstrap_gives_the_analytic_error_of_a_ratio(documents):
    rng = np.random.default_rng(1)
    bytes_D = rng.integers(50, 5000, documents).astype(float)
    if documents == 2:  # where the answer for the ratio of two sums holds only for equal ones
        bytes_D[:] = 1000
    common_D = bytes_D * rng.normal(1, 0.5, documents)  # pairing removes it
    a_D, b_D = common_D, common_D + bytes_D * rng.normal(0.01, 0.05, documents)
    found = ranking.document_errors({"a": a_D, "b": b_D}, bytes_D)[frozenset("ab")]
    d_D = (b_D - a_D) / math.log(2)
    residual_D = d_D - d_D.sum() / bytes_D.sum() * bytes_D  # of the ratio, by the delta method
    exact = math.sqrt(documents / (documents - 1) * np.square(residual_D).sum()) / bytes_D.sum()
    # 10,000 resamples err by 1/sqrt(2 * 10000), 2,000 blocks of documents by 1/sqrt(2 * 2000).
    assert found == pytest.approx(exact, rel=0.06)


def test_equal_arms_are_separated_at_most_once_in_twenty():
    rng = np.random.default_rng(2)
    for seeds, over_documents in ((2, 0.0), (3, 0.0), (5, 0.0), (2, 0.1)):
        count = 0
        for a, b in rng.normal(1, 0.1, (2000, 2, seeds)):
            a, b = a + rng.normal(0, over_documents / math.sqrt(2)), b
            b = b + rng.normal(0, over_documents / math.sqrt(2))
            a, b = sorted((a, b), key=np.mean)
            count += ranking.judge(a, b, over_documents)["verdict"] == "separated"
        assert count / 2000 < 0.065  # 0.05 and 3 standard errors


def test_error_has_both_sources():
    a, b = np.array([1.0, 1.2, 1.4]), np.array([2.0, 2.0, 2.6])
    pair = ranking.judge(a, b, 0.3)
    seeds = math.sqrt(0.04 / 3 + 0.12 / 3)
    assert pair["gap_bits_per_byte"] == pytest.approx(1.0)
    assert pair["standard_error_seeds"] == pytest.approx(seeds)
    assert pair["standard_error"] == pytest.approx(math.hypot(seeds, 0.3))
    without = ranking.judge(a, b, 0.0)
    # Welch's test as scipy computes it.
    from scipy import stats

    welch = stats.ttest_ind(b, a, equal_var=False)
    low, high = welch.confidence_interval()
    assert without["degrees_of_freedom"] == pytest.approx(welch.df)
    assert (without["gap_low95"], without["gap_high95"]) == pytest.approx((low, high))
    assert ranking.judge(a, a, 0.0)["verdict"] == "not distinguishable"
    assert ranking.judge(a, a + 1e-9, 0.0)["verdict"] == "not distinguishable"
    fixed = np.array([1.0, 1.0])
    assert ranking.judge(fixed, fixed, 0.0)["verdict"] == "not distinguishable"
    assert ranking.judge(fixed, fixed + 1, 0.1)["verdict"] == "separated"
    assert ranking.judge(fixed, fixed + 0.198, 0.1)["verdict"] == "not distinguishable"
    assert ranking.judge(fixed, fixed + 1, None)["verdict"] == "not ranked"


@pytest.mark.parametrize(
    ("separated", "groups"),
    [
        ("ab ac bc", ["a", "b", "c"]),
        ("ac bc", ["ab", "c"]),
        ("ab ac", ["a", "bc"]),
        ("ac", ["abc"]),  # not transitive: b belongs to both
        ("ab bc", ["abc"]),
        ("", ["abc"]),
    ],
)
def test_a_chain_is_cut_only_where_all_pairs_are_separated(separated, groups):
    pairs = {frozenset(pair) for pair in separated.split()}
    assert ranking.rank("abc", pairs) == [list(g) for g in groups]


def test_ranks_outside_the_noise_and_refuses_inside(three):
    comparison = compare.compare_runs(three)
    assert [arm["name"] for arm in comparison.values["arms"]] == ["good", "fair", "poor"]
    assert verdicts(comparison) == {
        ("good", "fair"): "not distinguishable",
        ("good", "poor"): "separated",
        ("fair", "poor"): "separated",
    }
    assert comparison.values["ranking"] == [["good", "fair"], ["poor"]]
    assert "Ranking: {good, fair} < poor" in comparison.markdown()
    assert comparison.values["same_model"] == []
    assert not any("training text" in note for note in comparison.values["notes"])
    inside = compare.compare_runs([f for f in three if "poor" not in f.name])
    assert inside.values["ranking"] == [["good", "fair"]]
    assert "No ranking: good, fair cannot be told apart." in inside.markdown()


def test_values_are_those_of_the_runs(three):
    values = compare.compare_runs(three).values
    arm = values["arms"][2]
    assert arm["seeds"] == [0, 1, 2] and arm["tokenizer"] == "bpe 300"
    cfg = config.from_dict(json.loads((three[3] / "config.json").read_text())["config"])
    size = size_of(cfg.model, 300, 16)
    parts = [arm[f"parameters_{p}"] for p in ("total", "table", "positions", "blocks")]
    assert parts == [size.total, size.table, size.positions, size.blocks]
    assert arm["flops_per_token"] == size.flops
    assert arm["tokens_seen"] == 2000 and arm["text_bytes_seen"] == 2000 * BYTES / TOKENS
    assert arm["training_seconds"] == 10
    assert arm["tokens_per_second"] == 1000
    per_byte = TOKENS / BYTES / math.log(2)
    assert arm["bits_per_byte"]["by_seed"] == pytest.approx(
        [3.50 * per_byte, 3.51 * per_byte, 3.49 * per_byte]
    )
    half = 4.302653 * 0.01 / math.sqrt(3)  # Student's t for 2 degrees of freedom
    assert arm["bits_per_byte"]["high95"] == pytest.approx((3.5 + half) * per_byte, rel=1e-6)
    assert arm["token_perplexity"]["mean"] == pytest.approx(math.exp(3.5))
    assert arm["token_perplexity"]["low95"] == pytest.approx(math.exp(3.5 - half))
    assert arm["word_perplexity"]["mean"] == pytest.approx(math.exp(3.5 * TOKENS / 30))
    names = [row["name"] for row in values["references"]]
    assert names == ["uniform", "unigram", "kn2", "kn3"]
    assert values["references"][1]["bits_per_byte"] == pytest.approx(math.log(90) * per_byte)
    assert values["references"][1]["token_perplexity"] == pytest.approx(90)
    curve = arm["curves"][0]
    assert curve["valid_tokens"] == [1000, 2000] and curve["valid_bits_per_byte"] == [0.2, 0.1]
    assert curve["train_tokens"] == [100 * step for step in range(1, 21)]
    assert curve["train_bits_per_byte"][1] == pytest.approx(3 * per_byte)


def test_one_seed_is_not_ranked_but_does_not_stop_the_others(three, tmp_path):
    single = write_run(tmp_path / "single", 0, 2.0, optim__peak_lr=5e-3)
    comparison = compare.compare_runs([*three, single])
    assert verdicts(comparison)["single", "poor"] == "not ranked"
    assert comparison.values["ranking"] == [["good", "fair"], ["poor"]]
    assert comparison.values["arms"][0]["bits_per_byte"]["low95"] is None
    assert any(note.startswith("One seed of single") for note in comparison.values["notes"])
    two = compare.compare_runs([single, three[0]])
    assert two.values["ranking"] == [] and "No ranking" in two.markdown()
    assert compare.compare_runs([single]).values["pairs"] == []


def test_the_same_model_is_flagged(three, tmp_path):
    twin = write_arm(tmp_path, "twin", [3.0, 3.0, 3.01], train__log_every="7")
    values = compare.compare_runs([*three, *twin]).values
    assert values["same_model"] == [["good", "twin"]] or values["same_model"] == [["twin", "good"]]
    assert any("they are the same model" in note for note in values["notes"])
    (pair,) = (p for p in values["pairs"] if {p["better"], p["worse"]} == {"good", "twin"})
    assert (pair["verdict"], pair["reason"]) == ("not ranked", "the same model")
    # "fair" differs in its learning rate alone.
    assert sum("equally many parameters" in note for note in values["notes"]) == 2


def test_another_tokenizer_leaves_no_token_perplexity(three, tmp_path):
    words = write_arm(
        tmp_path,
        "words",
        [4.0, 4.1, 4.0],
        kind="word",
        tokenizer="t1",
        tokens=30,
    )
    comparison = compare.compare_runs([*three, *words])
    assert not comparison.values["one_tokenizer"]
    assert all(arm["token_perplexity"] is None for arm in comparison.values["arms"])
    assert "token perplexity" not in comparison.markdown() + comparison.html()
    assert any(note.startswith("The tokenizers differ") for note in comparison.values["notes"])
    # As many tokens, which stand for more text.
    assert "The arms saw from 8,000 to 10,667 bytes of training text." in comparison.values["notes"]
    assert comparison.values["documents_weighed_by"] == "bytes"
    assert set(verdicts(comparison).values()) == {"separated", "not distinguishable"}
    assert len(comparison.values["references"]) == 8


def test_a_tokenizer_in_another_file_is_the_same(tmp_path):
    """As the twin of a run has it whose tokenizer.json was saved anew."""
    tree, folders = byte_level(), []
    framed = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    framed = {"post_processor": framed | {"use_regex": True}}
    for name, changes, size in [("a", {}, 300), ("b", framed, 300), ("wide", framed, 320)]:
        source = save_tokenizer(tmp_path / "hf", tree | changes, "<|endoftext|>", vocab_size=size)
        tokenizer = HfTokenizer.from_folder(source)
        options = {"tokenizer": tokenizer.content_hash, "vocab_size": tokenizer.vocab_size}
        options |= {"kind": "hf", "bytes_known": False, "tokenizer__vocab_size": 0}
        options |= {"tokenizer__folder": name}
        for folder in write_arm(tmp_path, name, [3.0, 3.01], **options):
            tokenizer.save(folder / "tokenizer")
            folders.append(folder)
    values = compare.compare_runs(folders).values
    assert values["one_tokenizer"] and len(values["references"]) == 4
    assert {frozenset(names) for names in values["same_model"]} == {frozenset("ab")}
    assert all(arm["token_perplexity"] for arm in values["arms"])
    for folder in folders[2:]:
        shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="drops part of the text"):
        compare.compare_runs(folders)
    seeds = write_arm(tmp_path, "seeds", [3.0, 3.01], tokenizer="t0")
    shutil.rmtree(seeds[1])
    write_run(seeds[1], 1, 3.0, tokenizer="t0", vocab_size=320)
    with pytest.raises(ValueError, match="their tokenizers differ"):
        compare.compare_runs(seeds)


def test_a_tokenizer_that_drops_text_is_compared_with_itself_alone(three, tmp_path):
    options = {"kind": "word", "tokenizer": "t1", "bytes_known": False}
    words = write_arm(tmp_path, "words", [4.0, 4.1], **options)
    for runs in ([*three, *words], [*words, *three]):
        with pytest.raises(ValueError, match="words-[01]: its tokenizer drops part of the text"):
            compare.compare_runs(runs)


def test_documents_of_unknown_bytes_are_weighed_by_tokens(tmp_path):
    errors = []
    for known in (True, False):
        options = {"kind": "word", "bytes_known": known}
        root = tmp_path / str(known)
        folders = write_arm(root, "a", [4.0, 4.1], **options)
        folders += write_arm(root, "b", [4.2, 4.1], model__d_model=64, **options)
        comparison = compare.compare_runs(folders)
        assert comparison.values["documents_weighed_by"] == ("bytes" if known else "tokens")
        assert known != any("weighed by their tokens" in x for x in comparison.values["notes"])
        errors.append(comparison.values["pairs"][0]["standard_error_documents"])
    assert errors[0] == pytest.approx(errors[1]) != 0  # here every token has as many bytes


@pytest.mark.parametrize("kept", ["nats tokens bytes", "nats tokens"])
def test_other_documents_are_not_paired(three, tmp_path, kept):
    options = {"tokenizer": "t1"} if "bytes" in kept else {}
    fewer = write_arm(tmp_path, "fewer", [4.0, 4.1, 4.0], **options)
    for folder in fewer:
        arrays = dict(np.load(folder / "documents_test.npz"))
        joined = {k: np.append(v[:-2], v[-2:].sum()) for k, v in arrays.items() if k in kept}
        np.savez(folder / "documents_test.npz", **joined)
    comparison = compare.compare_runs([*three, *fewer])
    assert set(verdicts(comparison).values()) == {"not ranked"}
    assert any("cannot be paired" in note for note in comparison.values["notes"])


def test_one_document_is_no_sample(tmp_path):
    folders = write_arm(tmp_path, "a", [3.0, 3.01], documents=1)
    folders += write_arm(tmp_path, "b", [4.0, 4.01], documents=1, model__d_model=64)
    comparison = compare.compare_runs(folders)
    assert set(verdicts(comparison).values()) == {"not ranked"}
    assert any(note.startswith("The split is one document") for note in comparison.values["notes"])


def refused(folders, *said, error=ValueError, split="test"):
    with pytest.raises(error) as caught:
        compare.compare_runs(folders, split=split)
    sentence = str(caught.value)
    assert all(part in sentence for part in said), sentence
    assert sentence.count(". ") == 0 and sentence.endswith("."), sentence


def test_refusals_name_the_folder_and_the_remedy(three, tmp_path):
    other = write_run(tmp_path / "other", 0, 3.0, fingerprint="shakespeare")
    refused([*three, other], str(other), str(three[0]), "different texts", "one corpus")
    short = write_run(tmp_path / "short", 0, 3.0, done=STEPS - 1)
    refused([short], str(short), "update 19 of 20", f"lm_jax.main --config=FILE --workdir={short}")
    (short / "metrics.jsonl").unlink()
    refused([short], "update 0 of 20")
    bare = write_run(tmp_path / "bare", 0, 3.0)
    for name in ("eval_test.json", "documents_test.npz", "config.json"):
        command = f"lm_jax.evaluate --workdir={bare} --split=test"
        (bare / name).unlink()
        remedy = "workdir of a run" if name == "config.json" else command
        refused([*three, bare], str(bare), name, remedy, error=FileNotFoundError)
        (bare / name).write_bytes((three[0] / name).read_bytes())
    refused(
        three,
        str(three[0]),
        "eval_valid.json",
        "--split=valid",
        error=FileNotFoundError,
        split="valid",
    )


def test_files_of_two_evaluations_do_not_belong_together(three, tmp_path):
    mixed = write_run(tmp_path / "mixed", 0, 3.3)
    (mixed / "documents_test.npz").write_bytes((three[0] / "documents_test.npz").read_bytes())
    refused([mixed], str(mixed), "different evaluations", f"--workdir={mixed}")


def test_a_split_that_the_corpus_lacks(tmp_path):
    run = write_run(tmp_path / "run", 0, 3.0)
    record = json.loads((run / "config.json").read_text())
    del record["data"]["splits"]["test"]
    (run / "config.json").write_text(json.dumps(record))
    refused([run], str(run), "has no test split", "--split=valid")


def test_a_loss_that_is_not_finite(tmp_path):
    run = write_run(tmp_path / "run", 0, 3.0)
    result = json.loads((run / "eval_test.json").read_text())
    (run / "eval_test.json").write_text(json.dumps(result | {"loss": None}))
    refused([run], str(run), "not finite")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim__peak_lr": 2e-3}, ["config.optim.peak_lr", "0.001", "0.002"]),
        ({"stride": 4}, ["config.eval.stride", "16", "4"]),
        ({"tokenizer": "t1"}, ["tokenizers differ"]),
        ({"seed": 0}, ["both have seed 0"]),
        ({"data__cache_dir": "elsewhere", "data__threads": 2, "doctor": "off"}, []),
    ],
)
def test_seeds_of_an_arm_have_equal_configs(tmp_path, options, said):
    first = write_run(tmp_path / "a" / "arm-0", 0, 3.0)
    seed = options.pop("seed", 1)
    second = write_run(tmp_path / "b" / f"arm-{seed}", seed, 3.0, **options)
    if said:
        refused([second, first], str(first), str(second), "'arm'", *said)
    else:
        (arm,) = compare.compare_runs([second, first]).values["arms"]
        assert arm["name"] == "arm" and arm["seeds"] == [0, 1]


def test_each_seed_may_be_held_against_a_student_of_its_own(tmp_path):
    runs = [
        write_run(
            tmp_path / f"arm-{seed}",
            seed,
            3.0,
            distill__teachers="teacher",
            distill__alone=f"alone-{seed}",
        )
        for seed in (0, 1)
    ]
    (arm,) = compare.compare_runs(runs).values["arms"]
    assert arm["seeds"] == [0, 1]


def test_page_needs_no_network_and_can_be_read_aloud(three, tmp_path):
    odd = write_arm(tmp_path, "a<b & |c|", [3.3, 3.31], optim__peak_lr=0.1)
    comparison = compare.compare_runs([*three, *odd])
    source = comparison.html()
    page = Page(source)
    figures = [a for tag, a in page.tags if tag == "svg"]
    assert len(figures) == 4 and all(len(names) >= 4 for names in page.legends)
    assert all("good" in a["aria-label"] and "a<b & |c|" in a["aria-label"] for a in figures)
    assert r"a<b & \|c\|" in comparison.markdown()


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    compare.main()


def test_command_writes_all_three_files(three, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, *three, f"--out={tmp_path / 'new' / 'out'}")
    printed = capsys.readouterr().out
    out = tmp_path / "new" / "out"
    assert printed.strip() == (out / "compare.md").read_text().strip()
    values = json.loads((out / "compare.json").read_text())
    assert values["ranking"] == [["good", "fair"], ["poor"]]
    documented = set(re.findall(r"`(\w+)`", compare.__doc__))
    for part in (values, values["pairs"][0], values["arms"][0]["bits_per_byte"]):
        assert set(part) <= documented
    assert {k for k in values["arms"][0] if not k.startswith("parameters_")} <= documented
    assert (out / "compare.html").read_text().startswith("<!doctype html>")


def test_command_refuses_in_one_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, tmp_path)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"{tmp_path}/config.json: no such file; give the workdir of a run."
    ]
