"""Post-mortems of logs: of a small real trainer with and without faults, and of bad files."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lm_jax.doctor.log import examine_log
from lm_jax.doctor.log.read import METRICS
from tests.doctor.log_models import PEAK, B, D, T, V, declared, train, train_on_a_cycle

fault = pytest.mark.fault
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def healthy():
    """Log and declarations of three healthy runs."""
    return [(train(seed), declared(seed)) for seed in SEEDS]


def silent(report):
    return not report.failed and not report.warned


def failing(report, *names):
    assert set(names) <= set(report.failed), [f for f in report if f.status in ("fail", "warn")]
    for name in names:
        assert report[name].remedy and report[name].evidence
    report.show(Console(quiet=True))
    json.loads(report.to_json())
    return [report[name] for name in names]


# Healthy logs


def test_healthy_runs_are_silent(healthy):
    for rows, facts in healthy:
        report = examine_log(rows, **facts)
        assert silent(report), [f for f in report if f.status in ("fail", "warn")]
        skipped = {f.check for f in report if f.status == "skip"}
        assert skipped <= {
            "log.resume",
            "log.throughput",
            "log.components",
            "log.compared",
            "log.loss_scale",
        }


def test_every_check_can_pass(healthy):
    """With everything declared and logged, no check is left out."""
    rows, facts = healthy[0]
    rows = [
        row
        | (
            {}
            if "valid/loss" in row
            else {
                "perf/tokens_per_second": 1e5,
                "distill/objective": row["train/loss"] + 0.7,
                "distill/weighted/lm_ce": row["train/loss"],
                "distill/weighted/kd": 0.7,
            }
        )
        for row in rows
    ]
    rows = [
        row | {"valid/lm_ce": row["valid/loss"]} if "valid/loss" in row else row for row in rows
    ]
    text = {"tokenizer": "words", "corpus": "zipf", "unit": "token"}
    report = examine_log(
        rows,
        **facts | {"resumes": [150], "peak_flops": 1e12},
        comparisons=[text | {"name": "other"}],
        measured_on=text,
    )
    assert silent(report), [f for f in report if f.status in ("fail", "warn")]
    skipped = [f.check for f in report if f.status == "skip"]
    assert skipped == ["log.loss_scale"]


def test_only_rows_and_nothing_declared(healthy):
    for rows, _ in healthy:
        assert silent(examine_log(rows))


def character_level(seed, ending=1.4, steps=2000):
    """A course as of characters, simulated: perplexities from 66 down to 4."""
    rng = np.random.default_rng(seed)
    step = np.arange(1, steps + 1)
    course = ending + (4.19 - ending) * np.exp(-step / 40) + 0.8 * step**-0.4
    loss = np.abs(course + 0.06 * rng.standard_normal(steps))  # no loss is below 0
    rows = [
        {
            "step": int(s),
            "train/loss": float(x),
            "optim/lr": 3e-3 * min(1, s / 50) * (1 - s / (steps + 1)),
            "optim/grad_norm": float(g),
            "data/tokens": 768.0 * s,
            "data/epoch": s / 700,
        }
        for s, x, g in zip(step, loss, rng.lognormal(0, 0.4, steps), strict=True)
    ]
    held_out = float(course[-1] + 0.1)
    return [
        *rows,
        {"step": steps, "valid/loss": held_out, "valid/token_ppl": math.exp(held_out)},
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_character_level_perplexities_are_no_alarm(seed):
    rows = character_level(seed)
    assert 3 < rows[-1]["valid/token_ppl"] < 6
    assert silent(examine_log(rows, vocab_size=66))
    lines = {"unigram": 28.4, "kn2": 12.0}
    assert silent(examine_log(rows, vocab_size=66, references=lines, resumes=[900]))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_source_of_hardly_any_entropy_is_no_alarm(seed):
    """A loss near 0 is right where the entropy rate is near 0, whatever a bigram reaches."""
    rows = character_level(seed, ending=-0.035)
    lines = {"unigram": 60.0, "kn2": 20.0, "entropy_rate": 0.01}
    assert silent(examine_log(rows, vocab_size=2000, references=lines, split_tokens=100_000))


def test_overfitting_is_no_alarm_if_declared():
    rows = train(0, steps=150, windows=B, reshuffle=False)
    rows = [row for row in rows if "train/loss" in row]
    assert rows[-1]["train/loss"] < 1
    assert silent(examine_log(rows, vocab_size=V, train_tokens=B * T, overfit=True))


def test_a_short_run_is_no_alarm():
    assert silent(examine_log(train(0, steps=8), **declared(0, steps=30)))


def test_an_interrupted_run_is_not_judged_by_its_end(healthy):
    rows, facts = healthy[0]
    report = examine_log(rows[:150], **facts)
    assert silent(report)
    assert report["log.lr_end"].status == "skip"


def test_float16_may_skip_updates_while_it_seeks_its_scale():
    rows = character_level(0)
    for i in (0, 1, 1000):
        rows[i] |= {"optim/grad_norm": None, "optim/skipped_updates": 1.0, "optim/loss_scale": 1024}
    assert silent(examine_log(rows, vocab_size=66))


# The loss itself


@fault(1, "log.fall")
@fault(74, "log.floor")
def test_copied_targets():
    report = examine_log(train(0, shift=False), **declared(0))
    fall, floor = failing(report, "log.fall", "log.floor")
    assert fall.values["exponent"] > 1 and "loss.oracle" in fall.remedy
    assert "model.suffix_swap" in floor.remedy


@fault(13, "log.floor")
def test_no_causal_mask():
    rows = train(0, causal=False, steps=900, peak=0.02)
    failing(examine_log(rows, **declared(0, steps=900, peak=0.02)), "log.floor")


def test_a_low_perplexity_without_references_only_warns():
    rows = [{"step": 1000, "valid/loss": 1.2}]
    assert examine_log(rows, vocab_size=16000).warned == ["log.floor"]
    assert silent(examine_log(rows, vocab_size=200))


def test_below_the_entropy_of_the_source():
    rows = character_level(0)
    facts = dict(vocab_size=66, split_tokens=200_000, references={"entropy_rate": 1.7})
    (found,) = failing(examine_log(rows, **facts), "log.floor")
    assert found.values["error"] < 0.01


@fault(75, "log.baseline")
def test_worse_than_counting():
    """With the targets of another row of the batch, context is of no use."""
    report = examine_log(train(0, crossed=True), **declared(0))
    (found,) = failing(report, "log.baseline")
    assert "model.row_independence" in found.remedy


@fault(75, "log.above_uniform")
def test_worse_than_a_uniform_guess():
    report = examine_log(train(0, peak=2.0), **declared(0, peak=2.0))
    failing(report, "log.above_uniform")


def test_a_model_that_learns_slowly_is_above_uniform_only_early():
    rows = train(0, scale=2.0, steps=60)
    assert rows[0]["train/loss"] > math.log(V)
    assert "log.above_uniform" not in examine_log(rows, **declared(0, steps=60)).failed


@fault(46, "log.trend")
@fault(46, "log.updates")
@fault(46, "log.identical")
def test_an_optimiser_that_never_steps():
    report = examine_log(train(0, stepping=False), **declared(0))
    trend, updates, same = failing(report, "log.trend", "log.updates", "log.identical")
    assert "hyper-parameter" in trend.remedy and "counter" in updates.remedy
    assert len(same.values["valid"]) == 2 and trend.values["z"] < 2.33


def test_a_loss_of_nothing_has_no_gradient():
    """A text of one symbol, which is learned in a few updates."""
    losses = [0.7, 0.2, 0.05, *[0.0] * 97]
    rows = [
        {"step": n, "train/loss": loss, "optim/lr": 1e-3, "optim/grad_norm": loss}
        for n, loss in enumerate(losses, start=1)
    ]
    assert "log.updates" not in examine_log(rows).failed
    stuck = [row | {"train/loss": 0.7} for row in rows]
    assert "log.updates" in examine_log(stuck).failed


@pytest.mark.parametrize("seed", SEEDS)
def test_a_frozen_model_is_seen_in_few_rows(seed):
    """Seven rows are not decisive, but they are no trend either."""
    rows = [row for row in train(seed, stepping=False) if "train/loss" in row][::45]
    report = examine_log(rows, vocab_size=V)
    assert "log.trend" in report.failed + report.warned


def curve(*points, noise=0.02, rows=300):
    """Training losses between points (step, loss), with noise."""
    steps, values = zip(*points, strict=True)
    at = np.linspace(steps[0], steps[-1], rows).round()
    loss = np.interp(at, steps, values) + noise * np.random.default_rng(0).standard_normal(rows)
    return [{"step": int(s), "train/loss": float(x)} for s, x in zip(at, loss, strict=True)]


def test_a_divergence_is_no_frozen_model():
    rows = curve((1, 10.8), (300, 3.2), (600, 6.2))
    report = examine_log(rows, vocab_size=50_000)
    (found,) = failing(report, "log.divergence")
    assert report["log.trend"].status == "skip" and "divergence" in report["log.trend"].evidence
    course = found.values["course"]
    assert course["lowest"] == pytest.approx(3.2, abs=0.1)
    assert course["end"] == pytest.approx(6.2, abs=0.1)
    assert "last good row is step 4" in found.evidence  # half of the rise
    assert course["step"] == pytest.approx(300, abs=20)
    rows = curve((1, 10.8), (600, 14.0))
    report = examine_log(rows, vocab_size=50_000)
    assert "log.divergence" in report.failed and report["log.trend"].status == "skip"
    rows = curve((1, 10.8), (300, 3.2), (600, 4.2))
    report = examine_log(rows, vocab_size=50_000)
    assert not report.failed and "log.divergence" in report.warned


@pytest.mark.parametrize("seed", SEEDS)
def test_batches_like_their_neighbours_are_no_divergence(seed):
    rng = np.random.default_rng(seed)
    drift = np.zeros(600)  # correlation 0.9 of one row and the next, sd 0.5
    for i in range(1, 600):
        drift[i] = 0.9 * drift[i - 1] + 0.22 * rng.standard_normal()
    rows = curve((1, 10.8), (100, 4.2), (600, 3.5), rows=600)
    rows = [row | {"train/loss": row["train/loss"] + x} for row, x in zip(rows, drift, strict=True)]
    assert examine_log(rows)["log.divergence"].status == "pass"


@pytest.mark.parametrize(("ending", "noise"), [(1.80, 0.012), (0.0055, 0.0005)])
def test_a_log_that_begins_again_after_the_fall_is_no_frozen_model(ending, noise):
    rows = curve((10, ending), (3000, ending), noise=noise)
    rows = [{"step": 0, "train/loss": 4.17}, *rows]
    assert silent(examine_log(rows, vocab_size=65))


@pytest.mark.slow
def test_text_without_entropy_is_not_taken_for_a_copied_target():
    rows = train_on_a_cycle()
    assert rows[-1]["train/loss"] < 0.1
    lines = {"unigram": 2000.0, "kn2": 1.02}
    report = examine_log(rows, vocab_size=2000, references=lines)
    assert silent(report) and "bigram" in report["log.fall"].evidence
    assert silent(examine_log(rows, vocab_size=2000, references={"entropy_rate": 0.0}))
    report = examine_log(rows, vocab_size=2000)
    assert not report.failed and "log.fall" in report.warned
    assert "near-zero entropy" in report["log.fall"].evidence


@pytest.mark.parametrize("name", ["train/loss", "valid/loss", "test/loss", "distill/kd_kl"])
def test_a_loss_below_zero(name):
    assert examine_log([{"step": 1, name: -0.01}]).failed == ["log.negative"]
    assert silent(examine_log([{"step": 1, name: -1e-6}]))


def test_a_low_training_loss_on_unknown_data_warns():
    rows = curve((1, 9.7), (400, 4.0), (2000, 1.2))
    assert examine_log(rows, vocab_size=16_000).warned == ["log.floor"]
    assert silent(examine_log(rows, vocab_size=16_000, overfit=True))
    assert silent(examine_log(rows, vocab_size=16_000, references={"kn2": 9.0}))
    assert silent(examine_log(curve((1, 9.7), (400, 4.0), (2000, 2.9)), vocab_size=16_000))


@fault(12, "log.quantised")
def test_a_loss_in_bfloat16():
    report = examine_log(train(0, dtype=jnp.bfloat16, steps=100), **declared(0, steps=100))
    # The sum over tokens is in bfloat16 as well.
    assert "log.quantised" in report.failed


@pytest.mark.parametrize(("digits", "status"), [(6, "fail"), (5, "fail"), (4, "fail"), (1, "skip")])
def test_bfloat16_is_seen_through_the_printed_digits(digits, status):
    rng = np.random.default_rng(0)
    exact = np.asarray(jnp.asarray(rng.uniform(2.1, 3.9, 60), jnp.bfloat16), float)
    rows = [{"step": i, "train/loss": round(float(x), digits)} for i, x in enumerate(exact)]
    assert examine_log(rows)["log.quantised"].status == status
    rows = [
        {"step": i, "train/loss": round(float(x), digits)}
        for i, x in enumerate(rng.uniform(2.1, 3.9, 60))
    ]
    assert examine_log(rows)["log.quantised"].status in ("pass", "skip")


@fault(8, "log.finite")
def test_a_batch_without_scored_tokens():
    report = examine_log(train(0, unscored_at=(70,)), **declared(0))
    (found,) = failing(report, "log.finite")
    assert found.values["found"]["train/loss"] == {"first_step": 70, "count": 1, "stays": False}
    assert "loss.nothing_scored" in found.remedy


def test_poisoned_parameters_stay():
    rows = character_level(0)
    for row in rows[500:-1]:
        row |= {"train/loss": None}
    found = examine_log(rows).findings[1]
    assert found.values["found"]["train/loss"]["stays"] and "every later row" in found.evidence


@fault(53, "log.imputed")
def test_a_loss_that_was_replaced_by_zero():
    report = examine_log(train(0, unscored_at=(70, 150), impute=True), **declared(0))
    (found,) = failing(report, "log.imputed")
    assert found.values["steps"] == {"train/loss": [70, 150]}


def test_small_losses_that_are_printed_as_zero_are_not_replaced():
    rng = np.random.default_rng(0)
    rows = [
        {"step": i, "train/loss": round(x, 2)} for i, x in enumerate(rng.uniform(4e-3, 8e-3, 60))
    ]
    assert silent(examine_log(rows, vocab_size=10))
    rows = [{"step": i, "train/loss": 0.0 if i == 30 else 0.31 + i % 2 / 100} for i in range(60)]
    assert examine_log(rows, vocab_size=10).failed == ["log.imputed"]


def test_spikes_are_named_with_the_gradient_norm():
    rows = character_level(0)
    for i in range(1200, 1206):
        rows[i] = rows[i] | {"train/loss": 4.0, "optim/grad_norm": 60.0}
    found = examine_log(rows)["log.spikes"]
    assert found.status == "warn" and found.values["places"] == ["step 1201"]
    assert "gradient norm" in found.evidence


# Resumes and epochs


@fault(35, "log.resume")
def test_a_resume_that_reads_the_data_again():
    rows = train(0, resume_at=150, lost=("data",))
    (found,) = failing(examine_log(rows, **declared(0), resumes=[150]), "log.resume")
    assert "repeat the noise" in found.evidence and "beginning" in found.remedy
    rows[150]["resumed"] = 150  # as this trainer logs it
    (logged,) = failing(examine_log(rows, **declared(0)), "log.resume")
    assert logged.evidence == found.evidence


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_resume_is_silent(seed):
    rows = train(seed, resume_at=150)
    assert silent(examine_log(rows, **declared(seed), resumes=[150]))
    assert rows == train(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_resume_amid_a_steep_fall_is_silent(seed):
    """The loss falls by 4 nats within the first 100 steps, in an S."""
    rows = character_level(seed)
    for row in rows[:-1]:
        row["train/loss"] += 2 / (1 + math.exp((row["step"] - 60) / 8))
    for at in (30, 50, 60, 80, 120):
        assert silent(examine_log(rows, resumes=[at])), at


def test_a_resume_that_loses_state_jumps_up():
    rows = train(0, resume_at=150, lost=("optimiser",))
    (found,) = failing(examine_log(rows, **declared(0), resumes=[150]), "log.resume")
    assert found.values["jump 150"] > 0 and ", +" in found.evidence


@pytest.mark.parametrize("jump", [-0.12, 0.12])
def test_a_jump_of_half_the_noise_of_a_row_is_seen(jump):
    """32 rows on either side, of noise 0.06: SE 0.03 at most."""
    rows = character_level(1)
    for row in rows[1000:-1]:
        row["train/loss"] += 1.6 * jump
    assert "log.resume" in examine_log(rows, resumes=[1000]).failed


def test_a_killed_run_that_appended_to_its_log():
    """Rows after the lost checkpoint are replaced, and the resume is found."""
    rows = character_level(0)
    longer = rows[:900] + rows[800:]
    report = examine_log(longer, vocab_size=66)
    assert silent(report) and report["log.resume"].values["resumes judged"] == 1


@fault(33, "log.epoch_order")
def test_the_same_order_in_every_epoch():
    facts = declared(0, windows=480)
    assert "log.epoch_order" not in examine_log(train(0, windows=480), **facts).failed
    report = examine_log(train(0, windows=480, reshuffle=False), **facts)
    (found,) = failing(report, "log.epoch_order")
    assert found.values["correlation"] > 0.5


# Learning rate, norms, speed and budgets


@fault(45, "log.lr_end")
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_a_schedule_sized_in_micro_batches(micro_batches):
    rows = train(0, micro_batches=micro_batches)
    (found,) = failing(examine_log(rows, **declared(0)), "log.lr_end")
    assert found.values["accumulation"] == micro_batches
    assert "micro-batches" in found.evidence


def test_warm_up_from_zero_and_longer_than_the_run():
    lr = np.arange(200) / 500 * 1e-3
    rows = [
        row | {"optim/lr": float(x)} for row, x in zip(character_level(0)[:200], lr, strict=True)
    ]
    report = examine_log(rows, vocab_size=66, steps=200)
    assert report.failed == ["log.warmup"] and report.warned == ["log.lr_zero"]
    assert examine_log(rows, vocab_size=66)["log.warmup"].status == "skip"


def test_a_run_of_unknown_length_is_not_judged_by_its_end():
    """500 of 5000 updates, with a warm-up of 300."""
    rows = curve((1, 4.2), (500, 2.9), rows=500)
    for row in rows:
        s = row["step"]
        row["optim/lr"] = min(s / 300, 0.5 * (1 + math.cos(math.pi * max(0, s - 300) / 4700)))
    for end in (299, 300, 350, 500):
        report = examine_log(rows[:end], vocab_size=66, lr_end=0.0)
        assert not report.failed and set(report.warned) <= {"log.lr_end"}, end
    assert "steps is not given" in report["log.lr_end"].evidence
    for end in (299, 300):
        report = examine_log(rows[:end], vocab_size=66, lr_end=0.0)
        assert {report[f"log.{name}"].status for name in ("lr_end", "warmup")} == {"skip"}
    assert examine_log(rows, lr_end=0.0, steps=500).failed == ["log.lr_end"]


def test_a_schedule_that_ends_too_early():
    rows = character_level(0)
    for row in rows[500:-1]:
        row["optim/lr"] = 0.0
    (found,) = failing(examine_log(rows, lr_end=0.0), "log.lr_zero")
    assert found.values["idle"] > 0.7


def test_clipping_is_explained_and_never_a_fault():
    rows = train(0, clip=0.1)
    report = examine_log(rows, **declared(0))
    assert silent(report)
    found = report["log.clipping"]
    assert found.values["rate"] == 1 and "explains no bad loss" in found.evidence


@fault(63, "log.throughput")
@fault(63, "log.budget")
def test_tokens_counted_once_for_each_of_8_micro_batches():
    facts = declared(0)
    N = facts["parameters"]
    for counted, status in ((1, "pass"), (8, "fail")):
        rows = train(0, tokens_counted=counted)
        # Seconds of a step at 20 % of the peak.
        speed = {"perf/tokens_per_second": counted * B * T / 0.001}
        rows = [row | speed if "train/loss" in row else row for row in rows]
        peak = 6 * N * B * T / 0.001 / 0.2
        report = examine_log(rows, **facts | {"train_tokens": None, "peak_flops": peak})
        assert report["log.throughput"].status == status
        assert report["log.budget"].status == status


@pytest.mark.parametrize(
    ("logged", "status"),
    [((-100.0, 38.0, 37.0), "pass"), ((-1.0, 0.38), "pass"), ((-1.0,), "skip"), ((88.0,), "fail")],
)
def test_a_share_of_the_peak_in_percent(logged, status):
    rows = [{"step": i, "perf/mfu": x} for i, x in enumerate(logged)]
    assert examine_log(rows)["log.throughput"].status == status


def test_steps_that_are_counted_from_zero():
    rows = [{"step": s, "data/tokens": 1000.0 * (s + 1)} for s in range(0, 50, 7)]
    assert examine_log(rows, tokens_per_step=1000)["log.budget"].status == "pass"


def test_a_stated_budget():
    budgets = [{"stated": 6e9, "steps": 30_000, "tokens": 131_072}]
    found = examine_log(character_level(0), budgets=budgets)["log.budget"]
    assert found.status == "fail" and "3.932e+09" in found.evidence


@fault(92, "log.components")
def test_weighted_terms_that_do_not_add_up():
    rows = train(0, steps=100, extra=0.01)
    for row in rows:
        if "distill/objective" in row:
            kd = row["distill/objective"] - row["train/loss"]
            row |= {"distill/weighted/lm_ce": row["train/loss"], "distill/weighted/kd": kd}
    assert examine_log(rows)["log.components"].status == "pass"
    for row in rows:
        if "distill/weighted/kd" in row:
            row["distill/weighted/kd"] /= 0.01  # the raw value under the name of the weighted
    failing(examine_log(rows), "log.components")


# Evaluations


@fault(71, "log.ppl_of_loss")
def test_a_capped_perplexity():
    rows = train(0, peak=2.0, perplexity=lambda each, loss: math.exp(min(loss, 20)))
    assert rows[-1]["valid/loss"] > 20
    (capped,) = failing(examine_log(rows, **declared(0)), "log.ppl_of_loss")
    assert "e^20" in capped.evidence


def test_a_perplexity_that_is_infinite_too_soon():
    rows = [{"step": 200, "valid/loss": 10.5, "valid/token_ppl": math.inf}]
    assert "log.ppl_of_loss" in examine_log(rows).failed
    for nats in (103.0, 800.0):  # float32 ends at 88.7
        rows = [{"step": 200, "valid/loss": nats, "valid/token_ppl": math.inf}]
        assert "log.ppl_of_loss" not in examine_log(rows).failed


def test_overfitting_is_named():
    def rows(*valid):
        evaluations = zip((1, 500, 1000, 2000, 3000), valid, strict=True)
        train = curve((1, 4.2), (500, 2.4), (3000, 0.3))
        return train + [{"step": s, "valid/loss": x} for s, x in evaluations]

    facts = dict(vocab_size=65, references={"unigram": 28.0})
    report = examine_log(rows(4.1, 2.6, 2.5, 3.4, 3.9), **facts)
    assert not report.failed and report.warned == ["log.overfit"]
    assert "overfits" in report["log.baseline"].evidence
    past = rows(4.1, 2.6, 2.5, 3.9, 4.99)  # worse than a guess, 4.17
    report = examine_log(past, **facts)
    assert report.failed == ["log.overfit"] and not report.warned
    assert "overfits" in report["log.overfit"].evidence
    assert "log.overfit" in examine_log(past).failed  # worse than at the start
    report = examine_log(past, overfit=True, **facts)
    assert silent(report) and report["log.baseline"].status == "skip"
    for row in past[:-5]:
        row["train/loss"] = 2.4 + row["train/loss"] / 100  # does not go on
    assert "log.above_uniform" in examine_log(past[:300] + past[-1:], **facts).failed
    assert silent(examine_log(rows(4.1, 2.6, 2.5, 2.6, 2.7), **facts))


@fault(72, "log.above_uniform")
def test_the_perplexity_of_a_total_objective():
    rows = train(0, extra=2.0)
    report = examine_log(rows, **declared(0))
    (above,) = failing(report, "log.above_uniform")
    assert above.values["last valid/loss"] > math.log(V) and "total objective" in above.remedy


def test_the_perplexity_beside_lm_ce():
    row = {"step": 500, "valid/token_ppl": math.exp(3.0), "valid/lm_ce": 3.0, "valid/loss": 9.0}
    assert silent(examine_log([row]))
    wrong = examine_log([row | {"valid/token_ppl": math.exp(9.0)}])
    assert wrong.failed == ["log.ppl_of_loss"] and "lm_ce" in wrong["log.ppl_of_loss"].evidence


@fault(70, "log.ppl_of_loss")
def test_averaged_exponentials():
    rows = train(0, perplexity=lambda each, loss: float(np.exp(each.mean(1)).mean()))
    (found,) = failing(examine_log(rows, **declared(0)), "log.ppl_of_loss")
    assert found.values["excess"] > 0


@fault(73, "log.logged_tokens")
def test_more_tokens_than_the_split_has():
    (found,) = failing(examine_log(train(0, valid_slots=3), **declared(0)), "log.logged_tokens")
    assert found.values["share"] == 3


def test_accuracy_and_loss_of_other_tokens():
    """Half of the scored slots are padding and copied at no cost; the accuracy leaves them out."""
    row = {"step": 100, "valid/loss": 0.05, "valid/accuracy": 0.4}
    assert examine_log([row]).failed == ["log.accuracy"]
    assert silent(examine_log([row | {"valid/accuracy": 0.95}]))


def test_one_split_under_two_names():
    row = {"step": 100, "valid/loss": 3.1415926, "test/loss": 3.1415926}
    assert examine_log([row]).failed == ["log.identical"]
    assert silent(examine_log([row | {"test/loss": 3.1415927}]))


def test_equal_evaluations_of_few_digits_or_no_learning_rate_are_no_alarm():
    rows = [{"step": s, "valid/loss": 3.21} for s in (100, 200)]
    assert silent(examine_log(rows))
    rows = [{"step": s, "valid/loss": 3.2101234, "optim/lr": lr} for s, lr in ((1, 1), (200, 0))]
    assert "log.identical" not in examine_log(rows).failed


@fault(76, "log.compared")
def test_perplexities_of_other_tokens():
    mine = {"tokenizer": "bpe 50k", "corpus": "wikitext-2", "unit": "token"}
    other = mine | {"name": "GPT-2", "tokenizer": "gpt2"}
    report = examine_log([], comparisons=[other], measured_on=mine)
    assert report["log.compared"].status == "fail"
    assert "bits per byte" in report["log.compared"].remedy
    report = examine_log([], comparisons=[{"name": "a paper"}], measured_on=mine)
    assert report["log.compared"].status == "warn"


# Bad input


def test_an_empty_log_fails_and_skips():
    report = examine_log([])
    assert report.failed == ["log.readable"]
    assert all(f.status in ("fail", "skip") for f in report)
    for rows in ([{}, {}], [{"train/loss": "high"}] * 3):
        assert examine_log(rows)["log.finite"].status == "skip"
    report = examine_log([{"step": i, "valid/loss": math.nan} for i in range(9)])
    assert report.failed == ["log.finite"]
    assert report["log.ppl_of_loss"].status == "skip"


def test_rows_without_a_known_metric():
    assert "log.readable" in examine_log([{"step": 1, "wer": 0.3}]).failed


def test_numbers_that_are_none():
    report = examine_log([{"step": 1, "train/loss": "high"}, {"step": 2, "train/loss": 3.0}])
    assert report.failed == ["log.readable"] and "train/loss" in report.findings[0].evidence


@pytest.mark.parametrize("seed", SEEDS)
def test_nonsense_never_raises(seed):
    """Rows of random metrics, values and order; every check says something."""
    rng = np.random.default_rng(seed)
    values = [None, math.nan, math.inf, -1, 0, 0.0, 1e-300, 1e300, 3.5, 20.0, "x", "nan", [1], {}]
    for _ in range(60):
        rows = [
            {str(name): values[rng.integers(len(values))] for name in rng.choice(METRICS, 12)}
            | ({"step": int(rng.integers(500))} if rng.random() < 0.9 else {})
            for _ in range(rng.integers(1, 80))
        ]
        report = examine_log(
            rows,
            vocab_size=50,
            split_tokens=100,
            train_tokens=1000,
            tokens_per_step=10,
            references={"unigram": 20.0, "kn2": 10.0},
            parameters=1e6,
            peak_flops=1e12,
            lr_end=0.0,
            resumes=[100],
        )
        assert len(report.findings) == 30 and not any(f.status == "error" for f in report)
        json.loads(report.to_json())


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (dict(records=[3]), "records"),
        (dict(records={"step": 1}), "records"),
        (dict(vocab_size=1), "vocab_size"),
        (dict(parameters=0), "parameters"),
        (dict(references={"kn2": -1.0}), "references"),
        (dict(budgets=[{"steps": 3}]), "budgets"),
        (dict(comparisons=[{"ppl": 3}]), "comparisons"),
        (dict(records=5), "records"),
        (dict(records="rows"), "records"),
        (dict(records=[{"step": 1, 3: 2.0}]), "records"),
        (dict(vocab_size="abc"), "vocab_size"),
        (dict(steps="a"), "steps"),
        (dict(train_tokens="a"), "train_tokens"),
        (dict(lr_end="a"), "lr_end"),
        (dict(lr_end=-1.0), "lr_end"),
        (dict(split_tokens="a"), "split_tokens"),
        (dict(split_tokens=0), "split_tokens"),
        (dict(split_tokens={"valid": None}), "split_tokens"),
        (dict(references="a"), "references"),
        (dict(references={"unigram": None}), "references"),
        (dict(resumes=[None]), "resumes"),
        (dict(resumes=5), "resumes"),
        (dict(budgets=[{"stated": 3.0, "steps": None}]), "budgets"),
        (dict(budgets=[None]), "budgets"),
        (dict(budgets=3), "budgets"),
        (dict(comparisons=[None]), "comparisons"),
        (dict(measured_on="gpt2"), "measured_on"),
        (dict(problems=["x"]), "problems"),
    ],
)
def test_misuse_is_named(wrong, name):
    with pytest.raises(ValueError, match=name):
        examine_log(**{"records": []} | wrong)


def test_the_toy_is_what_it_says():
    """The declared parameters are those of the tree; the run is one of the scale assumed."""
    assert declared()["parameters"] == V * D + 4 * D * D
    assert max(row["optim/lr"] for row in train(0) if "optim/lr" in row) == pytest.approx(PEAK)
