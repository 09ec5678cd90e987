"""Five published post-mortems: what their own numbers say, and what they do not.

The records in `cases/` hold what five public trainers published about runs that failed. Three
things in them are not quotations: learning rates of `mu_sota` are computed from the schedule and
the steps of its run; where a range was published (`mlp_cuda`), its ends stand in rows of arbitrary
epochs; and the evaluation of `distillation_run_3` has an arbitrary step. Each post-mortem named a
cause that was wrong or secondary.
"""

import importlib
import json
import math
import pathlib
import pkgutil
import re

import pytest

from lm_jax import doctor
from lm_jax.doctor.arms import examine_arms
from lm_jax.doctor.checks import Check
from lm_jax.doctor.log import examine_log
from lm_jax.doctor.log.read import read_log

CASES = pathlib.Path(__file__).parent / "cases"

# Of WikiText-2 at word level, Kneser-Ney and relative frequencies fitted on train.
WIKITEXT_2 = {"unigram": 965.1, "kn2": 288.8}


def records(name):
    log = read_log(CASES / f"{name}.jsonl")
    assert log.records and not log.problems
    return log.records


def said(*reports):
    """All that the reports have to say about what is not in order."""
    findings = [f for report in reports for f in report if f.status in ("fail", "warn")]
    return " ".join(f"{f.evidence} {f.remedy}" for f in findings)


def blames(text, *patterns):
    return [p for p in patterns if re.search(p, text, re.IGNORECASE)]


def test_stellux_the_target_is_seen_and_the_arms_are_one():
    """Blamed: dividing by batches. Real: no shift, scored padding, keys read at another level."""
    report = examine_log(
        records("stellux_glu3x"),
        vocab_size=16_000,
        parameters=9_720_864,
        split_tokens=260_000,  # 217,646 words of the valid split, more as sub-words
        references={"unigram": 1019.0, "kn2": 496.0},  # fitted on 245 k tokens
    )
    assert report.failed == ["log.logged_tokens", "log.floor"]
    assert report["log.logged_tokens"].values["share"] > 100
    text = said(report)
    for probe in ("loss.oracle", "model.suffix_swap", "training.gibbs", "loss.padding"):
        assert probe in text
    assert "no label shift" in text and "padding is scored" in text

    built = {"d_model": 216, "layers": 11, "d_ff": 574, "rho": 0.35, "g": 2.66}
    arms = {
        row["name"]: {
            "config": row["asked"],
            "resolved": built,
            "parameters": 9_720_864,
            "losses": [math.log(row["ppl"])],
        }
        for row in map(json.loads, (CASES / "stellux_arms.jsonl").read_text().splitlines())
    }
    ablation = examine_arms(arms, winner="glu3x")
    assert ablation.failed == ["arms.same", "arms.ranking"]
    assert len(ablation["arms.same"].values["same"][0].split(" = ")) == 7
    assert "nesting level" in ablation["arms.same"].remedy
    # Seven runs of one model differ by this much.
    error = 0.00127 * math.sqrt(2)  # of a difference
    assert ablation["arms.ranking"].values["error"] == pytest.approx(error, rel=0.05)
    assert not blames(
        said(report, ablation),
        "divid",
        "number of batches",
        "mean squared",
        "ignore_index",
        "reduction",
    )


def test_tinker_200m_copies_and_nothing_else_is_needed():
    """Blamed besides the shift: repeated documents (15 %) and kernels (5 %)."""
    rows = records("tinker_200m")
    facts = dict(vocab_size=32_768, tokens_per_step=98_304, parameters=226_546_432)
    # Even if the 10,000 documents of the second blame were all there was: the fall is over
    # before the first of them comes again.
    report = examine_log(rows, train_tokens=1e7, **facts)
    assert report.failed == ["log.fall"] and not report.warned
    text = said(report)
    assert "labels are not shifted" in text and "no causal mask" in text
    assert "loss.oracle" in text and "model.suffix_swap" in text
    assert not blames(text, "TF32", "flash", "kernel", "take", "repe[at]", "duplicate", "worker")
    assert "near-zero entropy would look alike" in text
    # If the log does not say whether the data were new, it is not decisive alone.
    assert examine_log(rows, **facts).warned == ["log.fall"]

    claimed = examine_log(
        [row | {"perf/tokens_per_second": 600_000} for row in records("tinker_200m_repaired")],
        peak_flops=312e12,
        budgets=[{"stated": 6e9, "steps": 30_000, "tokens": 131_072}],
        **facts,
    )
    assert claimed.failed == ["log.throughput", "log.budget"]
    counted = {"tinker": {"parameters": 226_546_432, "claimed_parameters": 180_000_000}}
    assert examine_arms(counted).failed == ["arms.parameters"]


def test_tinker_200m_repaired_is_in_order():
    """What was measured after the shift was put in is credible."""
    report = examine_log(
        records("tinker_200m_repaired"),
        vocab_size=32_768,
        tokens_per_step=131_072,
        train_tokens=1e10,
        parameters=226_546_432,
        peak_flops=312e12,
    )
    assert not report.failed and not report.warned
    assert report["log.throughput"].values["mfu"] == pytest.approx(0.39, abs=0.01)


def test_mu_sota_may_see_the_future_and_its_schedule_never_ends():
    """Blamed: too little training, rate, warm-up, length, data. Real: no mask, layout, schedule."""
    text_of = {"tokenizer": "bpe 50k on train", "corpus": "wikitext-2", "unit": "token"}
    report = examine_log(
        records("mu_sota"),
        vocab_size=50_000,
        parameters=16_690_000,
        train_tokens=2_088_628,
        lr_peak=3e-4,
        lr_end=0.0,
        steps=5230,  # the 10 epochs that were published as the whole run
        references=WIKITEXT_2,
        measured_on=text_of,
        comparisons=[
            {"name": "GPT-2 small", "tokenizer": "gpt2", "corpus": "wikitext-2", "unit": "word"},
            {"name": "GPT-3", "tokenizer": "gpt2", "corpus": "penn treebank", "unit": "word"},
        ],
        budgets=[
            # Windows half overlap: of length 128 there would be twice as many.
            {"stated": 2_088_628, "windows": 16_733, "stride": 64},
            {"stated": 1.8 * 60, "epochs": 10, "minutes": 7.3},
        ],
    )
    assert report.failed == ["log.lr_end", "log.budget", "log.compared"]
    assert report.warned == ["log.baseline"]
    assert report["log.lr_end"].values["accumulation"] == 2
    text = said(report)
    assert "model.suffix_swap" in text and "model.truncation" in text
    assert "bigram" in text or "kn2" in text
    assert not blames(
        text,
        "more epochs",
        "train(ed)? longer",
        "too high",
        "lower the",
        "warm-up of",
        "longer sequences",
        "starv",
        "insufficient",
        "more data",
    )
    matched = {
        "MU-SOTA": {"parameters": 16_690_000, "table_parameters": 16_050_000},
        "dense": {"parameters": 16_689_504, "table_parameters": 10_400_000},
    }
    assert examine_arms(matched, matched=True).warned == ["arms.matched"]


def test_mlp_cuda_is_worse_than_a_guess():
    """Blamed: the loss-gradient kernel, clipping. Real: row 0 attended, no mask, wrong backward."""
    report = examine_log(records("mlp_cuda_characters"), vocab_size=34)
    assert report.failed == ["log.above_uniform"]
    text = said(report)
    for probe in ("model.row_independence", "model.suffix_swap", "gradient.directional"):
        assert probe in text

    words = examine_log(records("mlp_cuda_words"), vocab_size=2004)
    assert not words.failed
    clipping = words["log.clipping"]
    assert clipping.status == "pass" and "explains no bad loss" in clipping.evidence
    assert not blames(said(report, words), "kernel", "clip", "gradients are (too )?large")


def test_distillation_never_stepped():
    """Blamed: temperature 3. Real: no optimiser step, 0/0 labels, the objective's perplexity."""
    second = examine_log(records("distillation_run_2"), vocab_size=49_152)
    assert {"log.updates", "log.identical"} <= set(second.failed)
    third = examine_log(records("distillation_run_3"), vocab_size=49_152)
    assert set(third.failed) >= {
        "log.finite",
        "log.above_uniform",
        "log.ppl_of_loss",
    }
    assert "log.trend" in third.failed + third.warned
    text = said(second, third)
    assert "optimiser does not step" in text and "counter" in text
    assert "frozen model" in text and "training.updates" in text
    assert "0/0 where no token is scored" in text
    assert "e^20" in text and "total objective" in text
    assert not blames(text, "temperature", r"T\^2", "T²", "explo", "overflow", "fp16", "float16")


def test_every_probe_that_is_named_exists():
    """Remedies of these families point to checks of this package."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(doctor.__path__, f"{doctor.__name__}.")
        if not found.name.endswith("__main__")
    ]
    made = [x for module in modules for x in vars(module).values() if isinstance(x, Check)]
    names = {check.name for check in made}
    families = "|".join(sorted({name.split(".")[0] for name in names}))
    for check in made:
        if check.name.startswith(("log.", "arms.")):
            named = re.findall(rf"\b(?:{families})\.[a-z_]+\b", check.remedy)
            assert set(named) <= names, check.name
