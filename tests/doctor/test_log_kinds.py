"""Logs of the kinds that public runs show, each fault with a healthy twin beside it."""

import functools
import math

import numpy as np
import pytest

from lm_jax.doctor.log import Records, examine_log

V = 50_304


def noise(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size)


def rows_of(values, every=10, first=0, **more):
    """Rows with a training loss, and further columns."""
    columns = {"train/loss": values} | {name.replace("__", "/"): x for name, x in more.items()}
    steps = first + every * np.arange(len(values))
    return [
        {"step": int(step)} | {name: float(x[i]) for name, x in columns.items()}
        for i, step in enumerate(steps)
    ]


def course(rows=200, start=10.9, end=3.3, sd=0.03, seed=0):
    """A healthy run from scratch."""
    return end + (start - end) * np.exp(-np.arange(rows) / (rows / 8)) + sd * noise(rows, seed)


def notable(report):
    return {f.check: f.status for f in report if f.status in ("fail", "warn", "error")}


def quiet(rows, **facts):
    report = examine_log(rows, **facts)
    assert not notable(report), [f for f in report if f.status in ("fail", "warn", "error")]
    return report


def found(check, rows, status="fail", **facts):
    """The finding of the check, which alone is notable."""
    report = examine_log(rows, **facts)
    assert notable(report) == {f"log.{check}": status}
    return report[f"log.{check}"]


# ---- Noise that comes again -----------------------------------------------------------------


def epochs(period, rows=240, reshuffle=False, sd=0.1, digits=6):
    """A flat course whose batches come again after `period` rows."""
    batches = noise(rows, 1) if reshuffle else np.resize(noise(period, 1), rows)
    own = 0.3 * noise(rows, 2)
    return np.round(3.4 - 0.001 * np.arange(rows) + sd * (batches + own), digits)


@pytest.mark.parametrize("stated", [95.0, 100.0, 104.0, None])
def test_same_batches_although_the_length_of_an_epoch_is_stated_wrong(stated):
    facts = {"train_tokens": stated, "tokens_per_step": 0.1} if stated else {}
    status = "fail" if stated else "warn"
    finding = found("epoch_order", rows_of(epochs(100)), status, **facts)
    assert finding.values["correlation"] > 0.5 and "100 apart" in finding.evidence
    quiet(rows_of(epochs(100, reshuffle=True)), **facts)


@pytest.mark.parametrize(("rows", "period"), [(600, 150), (2000, 700)])
def test_same_batches_without_an_epoch_in_long_logs(rows, period):
    assert f"{period} apart" in found("epoch_order", rows_of(epochs(period, rows)), "warn").evidence


def test_same_batches_through_printed_digits():
    """Most values are tied: the noise is that of 20 units of the last digit."""
    values = epochs(500, 2000, sd=0.002, digits=4)
    assert "500 apart" in found("epoch_order", rows_of(values), "warn").evidence
    # At the end hardly a row differs from its neighbours.
    size = np.where(np.arange(2000) < 1500, 0.02, 0.0004)
    quiet(rows_of(np.round(course(2000, sd=0) + size * noise(2000), 3)))


@pytest.mark.parametrize("window", [20, 50])
def test_a_mean_over_a_window_is_no_repetition(window):
    for seed in range(5):
        values = course(2000, sd=0.1, seed=seed)
        quiet(rows_of(np.convolve(values, np.ones(window) / window, "valid")))


def test_same_batches_are_seen_in_the_first_half_of_the_second_epoch():
    facts = {"train_tokens": 100.0, "tokens_per_step": 0.1}
    found("epoch_order", rows_of(epochs(100, rows=145)), **facts)


@pytest.mark.parametrize("digits", [2, 6])
def test_a_smooth_curve_is_no_repetition(digits):
    smooth = np.round(3 + 5 / (1 + np.arange(200)) ** 0.5, digits)
    rows = rows_of(smooth, data__epoch=np.arange(200) / 50)
    quiet(rows, resumes=[1000])


@pytest.mark.parametrize("seed", range(3))
def test_running_means_are_no_spikes_and_no_repetition(seed):
    values, mean = course(300, sd=0.1, seed=seed), 10.9
    for i, value in enumerate(values):
        mean = values[i] = 0.9 * mean + 0.1 * value
    rows = rows_of(values, data__epoch=np.arange(300) / 75)
    quiet(rows, vocab_size=V, resumes=[1500])
    for row in rows[200:206]:
        row["train/loss"] += 1.0
    assert "log.spikes" in notable(examine_log(rows, vocab_size=V))


def test_a_rise_of_two_percent_is_no_spike():
    """As where means since the start of an epoch begin again."""
    values = 3.3 + 0.005 * noise(300)
    values[150:160] += 0.07
    quiet(rows_of(values))


def test_noise_that_shrinks_with_the_loss_is_no_spike():
    values = np.maximum(10.8 * np.exp(-np.arange(3000) / 400), 0.02) * (1 + 0.08 * noise(3000))
    quiet(rows_of(values))


# ---- Evaluations ----------------------------------------------------------------------------


def decay(*last):
    """Evaluations 5 updates apart to the end of a decay."""
    left = np.arange(50, 0, -1)
    losses = [*np.round(3.2726 + 1.5e-5 * left**1.5, 5), *last]
    return [{"step": 2000 + 5 * i, "valid/loss": float(x)} for i, x in enumerate(losses)]


def test_evaluations_may_be_equal_where_ties_are_likely():
    quiet(decay(3.27259, 3.27259))
    rows = decay()
    for row in rows[21:28]:
        row["valid/loss"] = rows[20]["valid/loss"]  # the evaluation is not run again
    assert len(found("identical", rows).values["valid"]) == 7


def test_an_evaluation_that_is_not_run_again_near_small_changes():
    losses = np.round(2.2 + np.exp(-np.arange(30) / 6), 4)
    losses[8] = losses[7] - 1e-4
    losses[24:] = losses[24]
    rows = [{"step": 500 * i, "valid/loss": float(x)} for i, x in enumerate(losses)]
    assert len(found("identical", rows).values["valid"]) == 5


@pytest.mark.parametrize("digits", [3, 4, 6])
def test_the_validation_loss_is_the_training_loss(digits):
    train, valid = (np.round(course(start=2.4, end=1.4, seed=i), digits) for i in (0, 1))
    finding = found("identical", rows_of(train, valid__loss=train), vocab_size=65)
    assert "train and valid" in finding.evidence
    quiet(rows_of(train, valid__loss=valid), vocab_size=65)
    quiet(rows_of(train, valid__loss=train), vocab_size=65, overfit=True)


def test_overfitting_past_a_guess_fails():
    train = np.maximum(10.9 * 0.8 ** np.arange(30), 0.05)
    valid = 10.9 - np.minimum(np.arange(30), 8) / 3
    finding = found(
        "overfit", rows_of(train, valid__loss=valid + np.arange(30) ** 2 / 200), vocab_size=V
    )
    assert "rises" in finding.evidence or "overfits" in finding.evidence
    found("overfit", rows_of(train, valid__loss=valid + np.arange(30) ** 2 / 500), "warn")


# ---- Levels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [100, 150])
def test_flat_above_a_guess_fails_and_falling_does_not(turn):
    at = np.arange(200)
    flat = 8 - 2.9 * np.minimum(at, turn) / turn + 0.03 * noise(200)
    finding = found("above_uniform", rows_of(flat), vocab_size=80)
    assert "no longer falling" in finding.evidence
    falling = 8 - 2.9 * at / 200 + 0.03 * noise(200)
    finding = found("above_uniform", rows_of(falling), "warn", vocab_size=80)
    assert "no longer" not in finding.evidence
    quiet(rows_of(8 - 5 * np.minimum(at, turn) / turn + 0.03 * noise(200)), vocab_size=3000)


def test_falling_too_slowly_to_get_below_a_guess_fails():
    slow = 12 - 0.4 * np.arange(20_000) / 20_000 + 0.03 * noise(20_000)
    assert (
        "no longer falling"
        in examine_log(rows_of(slow), vocab_size=V)["log.above_uniform"].evidence
    )


def test_half_of_the_run_above_a_guess_warns():
    values = np.where(np.arange(180) < 80, 17.7 + 0.3 * noise(180), 5.5 + 0.1 * noise(180))
    finding = found("above_uniform", rows_of(values), "warn", vocab_size=V)
    assert finding.evidence.startswith("Share of rows")
    quiet(rows_of(course(180, start=11.5)), vocab_size=V)


def test_no_vocabulary_has_such_a_loss():
    assert "log.above_uniform" in examine_log(rows_of(18 + 0.3 * noise(80))).failed
    quiet(rows_of(course(80, start=12.4, end=9.0)))


@pytest.mark.parametrize("parts", [2, 3, 4, 5, 6, 8, 12, 16, 40])
def test_a_first_loss_that_is_divided(parts):
    finding = examine_log(rows_of(course() / parts), vocab_size=V)["log.first_loss"]
    assert finding.status == "warn" and f"ln V / {parts} =" in finding.evidence
    pretrained = 2.7 - 0.3 * np.arange(200) / 200 + 0.05 * noise(200)
    quiet(rows_of(pretrained), vocab_size=V)
    tuned = course(start=2.7, end=1.0)
    quiet(
        rows_of(tuned, valid__loss=tuned + 0.1 + 0.01 * noise(200, 1)), vocab_size=V, overfit=True
    )


def test_text_that_is_known_by_heart():
    steps = dict(every=500, first=500)
    values = [0.47, 0.026, 0.014, 0.011, 0.009, 0.008]
    epoch = 16 * (1 + np.arange(6))
    rows = rows_of(values, data__epoch=epoch, **steps)
    assert "96 epochs" in found("floor", rows, "warn", vocab_size=V).evidence
    quiet(rows, vocab_size=V, overfit=True)
    quiet(rows_of([2.9, 2.4, 2.2, 2.1, 2.0, 1.9], data__epoch=epoch / 32, **steps), vocab_size=V)


def test_stuck_without_a_vocabulary():
    at = np.arange(200)
    rows = rows_of(7.68 - 0.03 * at / 200 + 0.08 * noise(200), every=50)
    assert found("trend", rows, "warn").values["fell"] < 0.02
    # Of a significant but tiny slope too.
    found("trend", rows_of(7.68 - 0.1 * at / 200 + 0.02 * noise(200), every=50), "warn")
    quiet(rows_of(course(start=7.7, end=4.0), every=50))
    quiet(rows_of(3.3 - 0.03 * at / 200 + 0.08 * noise(200), every=50))  # goes on from a checkpoint


@pytest.mark.parametrize("start", [7.6, 10.9])
@pytest.mark.parametrize("facts", [{}, {"vocab_size": 128_256}])
def test_stuck_at_the_frequencies_of_ids(start, facts):
    values = 7.55 + 0.05 * noise(200) + (start - 7.55) * (np.arange(200) < 3)
    assert examine_log(rows_of(values, every=50), **facts)["log.trend"].status != "pass"
    late = np.where(np.arange(200) < 60, values, 3.5 + 0.05 * noise(200))
    quiet(rows_of(late, every=50), **facts)


# ---- Values that were put in ----------------------------------------------------------------


@pytest.mark.parametrize("start", [[], [2.31], [2.31, 2.2, 2.15], [13.2, 5.4]])
def test_a_loss_that_is_zero_from_some_row_on(start):
    assert "log.imputed" in examine_log(rows_of([*start, *np.zeros(9)])).failed
    quiet(rows_of([2.3, 1.1, 0.5, 0.21, 0.1, 0.05, 0.02, 0.01, 0.0, 0.0]))  # printed to 2 digits


def test_a_sign_is_the_one_cause():
    found("negative", rows_of(-course(300)))


def test_components_are_looked_at():
    values = np.round(course(), 4)
    parts = dict(train__lm_loss=values - 0.3, train__aux_loss=np.full(200, 0.3))
    quiet(rows_of(values, **parts))
    rows = rows_of(values, **parts)
    for i in (50, 51, 120):
        rows[i]["train/lm_loss"] = 0.0
    assert "lm_loss" in found("imputed", rows, "warn").evidence
    rows[60]["train/lm_loss"] = None
    assert found_first(rows, "finite")["train/lm_loss"]["first_step"] == 600
    rows[60]["train/lm_loss"] = -1.0
    assert examine_log(rows)["log.negative"].status == "warn"
    late = np.where(np.arange(200) < 50, 0.0, 0.2 + 0.01 * noise(200))  # switched on late
    quiet(rows_of(values, train__kd_loss=late))


def found_first(rows, check):
    return examine_log(rows)[f"log.{check}"].values["found"]


def test_a_constant_in_the_place_of_a_lost_loss():
    values = course()
    values[[90, 120, 121, 150]] = 7.5
    report = examine_log(rows_of(values))
    assert report["log.imputed"].values["steps"]["train/loss"] == [900, 1200, 1210, 1500]
    values[[90, 120, 121, 150]] = 7.5 + 0.01 * noise(4)
    assert examine_log(rows_of(values))["log.imputed"].status == "pass"


# ---- Scale and norms ------------------------------------------------------------------------


def scales(low):
    """A loss scale that halves from 2^15 to `low`, and a norm that stays when it is reached."""
    scale = np.maximum(2.0**15 / 2.0 ** np.maximum(0, np.arange(200) // 5 - 10), low)
    norm = np.round(1.5 + 0.3 * noise(200), 3)
    return {"optim__loss_scale": scale, "optim__grad_norm": norm}


def test_a_loss_scale_that_collapses():
    assert found("loss_scale", rows_of(course(), **scales(1.0))).values["low"] == 1
    found("loss_scale", rows_of(course(), **scales(64.0)), "warn")
    quiet(rows_of(course(), **scales(4096.0)))
    quiet(rows_of(course(), optim__loss_scale=np.ones(200)))  # bfloat16, as some print it


def test_gradient_norms_that_repeat():
    norm = scales(1.0)["optim__grad_norm"]
    stale = np.where(np.arange(200) < 120, norm, 2.265)
    assert "2.265" in found("updates", rows_of(course(), optim__grad_norm=stale)).evidence
    stale = np.where(np.arange(200) < 100, np.round(norm, 2), 0.95)
    assert "0.95" in found("updates", rows_of(course(), optim__grad_norm=stale)).evidence
    quiet(rows_of(course(), optim__grad_norm=np.minimum(norm, 1.0)))  # of clipped gradients
    quiet(rows_of(course(), optim__grad_norm=np.round(norm / 10, 2)))  # two digits


def test_gradient_norms_that_are_not_measured():
    zero = dict(optim__grad_norm=np.zeros(200))
    assert "not measured" in quiet(rows_of(course(), **zero))["log.updates"].evidence
    flat = rows_of(10.8 + 0.02 * noise(200), **zero)
    assert "log.updates" in examine_log(flat).failed


# ---- Divergence and spikes ------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 5, 7])
def test_divergence_in_a_few_rows(rows):
    values = [6.41, 6.44, 6.38, 6.4, 7.3, 9.1, 10.2][-rows:]
    assert notable(examine_log(rows_of(values), vocab_size=V)) == {"log.divergence": "warn"}
    quiet(rows_of([6.41, 6.44, 6.38, 6.4, 6.3, 6.5, 6.6][-rows:]), vocab_size=V)


@pytest.mark.parametrize(("rows", "every"), [(19, 10), (200, 100_003)])
def test_one_cause_is_named_where_a_run_diverged(rows, every):
    values = course(rows)
    turn = rows * 6 // 10
    values[turn:] = 270 * 0.99 ** np.arange(rows - turn)
    finding = found("divergence", rows_of(values, every), vocab_size=V)
    assert f"last good row is step {every * (turn - 1)} " in finding.evidence
    assert f"and step {every * turn} has 270" in finding.evidence
    report = examine_log(rows_of(values, every), vocab_size=V, references={"unigram": 900.0})
    for name in ("trend", "above_uniform", "baseline", "spikes"):
        assert "log.divergence" in report[f"log.{name}"].evidence


def test_a_resume_or_a_divergence_is_no_order_of_epochs():
    values = epochs(100, rows=200, reshuffle=True)
    values[100:] = values[:100] - 0.001
    finding = found("resume", rows_of(values), resumes=[990])
    assert "repeat the noise" in finding.evidence


def test_a_spike_in_a_few_rows():
    values = course(20, sd=0.01)
    quiet(rows_of(values))
    values[15] += 4
    assert "step 150" in found("spikes", rows_of(values), "warn").evidence


# ---- Steps and units ------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("every", [1, 10])
def test_steps_count_from_0_or_1(first, every):
    rows = rows_of(course(100), first=first, every=every, optim__lr=1e-3 * np.linspace(1, 0.1, 100))
    report = quiet(rows, vocab_size=V, steps=100 * every, lr_peak=1e-3, lr_end=1e-4)
    for name in ("lr_end", "warmup", "above_uniform"):
        assert report[f"log.{name}"].status == "pass"
    assert examine_log(rows[:80], steps=100 * every, lr_end=1e-4)["log.lr_end"].status == "skip"


def test_warm_up_has_one_limit():
    at = np.arange(100)
    for share, status in ((0.25, "pass"), (0.4, "warn"), (1.0, "fail")):
        lr = np.minimum(at / (99 * share), 1) * np.where(at > 99 * share, 0.99, 1.0)
        rows = rows_of(course(100), optim__lr=1e-3 * lr + 1e-6)
        assert examine_log(rows, steps=990)["log.warmup"].status == status


def test_warm_up_in_a_few_rows():
    """The peak was reached at step 100, between two rows."""
    rows = rows_of([10.8, 7.0, 6.0, 5.5], every=200, optim__lr=[1e-5, 1e-3, 7e-4, 3e-4])
    quiet(rows, steps=600)


@pytest.mark.parametrize("rows", [1, 6])
def test_losses_in_bits(rows):
    bits = np.round(15.6 * 0.9 ** np.arange(rows), 3)
    lines = rows_of(bits, every=100, train__token_ppl=np.round(2**bits, 2))
    report = quiet(lines, vocab_size=V)
    assert "in bits" in report["log.ppl_of_loss"].evidence
    if rows > 1:
        lines[3]["train/token_ppl"] *= 1.2
        assert "log.ppl_of_loss" in examine_log(lines).failed


def test_a_share_of_the_peak_may_be_a_percent():
    share = dict(perf__mfu=np.array([-100.0, *np.full(9, 0.84)]))
    assert quiet(rows_of(course(10), **share))["log.throughput"].values["mfu"] < 0.01
    quiet(rows_of(course(10), perf__mfu=np.full(10, 36.1)))
    either = rows_of(course(10), perf__mfu=np.full(10, 0.9))
    assert "percent" in found("throughput", either, "warn").evidence


# ---- Reading --------------------------------------------------------------------------------


def test_what_was_read_is_told():
    facts = dict(columns={"loss": "train/loss", "iter": "step"}, ignored=["time"])
    evidence = examine_log(rows_of(course()), **facts)["log.readable"].evidence
    assert "loss -> train/loss, iter -> step" in evidence and "time" in evidence
    report = examine_log([{"step": 1, "wer": 0.3}], columns={"iter": "step"}, ignored=["wer"])
    assert not report.clean and "wer" in report["log.readable"].evidence
    for wrong in (dict(columns=["loss"]), dict(ignored="time"), dict(ignored=[3])):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            examine_log([], **wrong)


@functools.cache
def long_rows():
    values = course(30_000)
    return rows_of(values, every=1, first=1, optim__grad_norm=1 + 0.1 * noise(30_000, 3) ** 2)


def test_rows_may_be_added_to_records():
    rows = long_rows()[:3000]
    back = rows + [row | {"train/loss": row["train/loss"] + 0.01} for row in rows[2500:]]
    kept = Records()
    for start in range(0, len(back), 700):
        kept.extend(back[start : start + 700])
    once = Records(back)
    assert kept.count == len(once) == 3500
    for name in once.names:
        for a, b in zip(kept.series(name), once.series(name), strict=True):
            assert np.array_equal(a, b)
    assert kept.back == once.back == {"train/loss": [2500], "optim/grad_norm": [2500]}
    assert [f.evidence for f in examine_log(kept)] == [f.evidence for f in examine_log(back)]
    with pytest.raises(ValueError, match="records"):
        kept.extend([3])


def test_old_rows_of_a_long_log_are_thinned_for_a_watcher():
    kept, rows = Records(most=2000), long_rows()[:]
    rows[5000] = rows[5000] | {"train/loss": None}
    for start in range(0, len(rows), 500):
        kept.extend(rows[start : start + 500])
    short = kept.series("train/loss")
    assert 1000 < len(short) <= 2000 and (np.diff(short.steps) > 0).all()
    assert short.values[-1000:].tolist() == [row["train/loss"] for row in rows[-1000:]]
    assert short.steps[~np.isfinite(short.values)].tolist() == [5001]
    assert short.steps[0] < 200  # some of the beginning stay
    assert len(kept) == 30_000
    assert len(Records(rows, most=2000).series("train/loss")) <= 2000  # all at once
    kept.extend([{"step": 25_000, "train/loss": 7.0}])  # resumed from there
    assert kept.series("train/loss").steps[-1] == 25_000


@pytest.mark.parametrize("seed", range(3))
def test_a_thinned_log_raises_no_alarm(seed):
    rows = rows_of(course(30_000) + 0.1 * noise(30_000, seed), every=1, first=1)
    kept = Records(most=2000)
    for start in range(0, len(rows), 1000):
        kept.extend(rows[start : start + 1000])
        assert not notable(examine_log(kept, vocab_size=V)), start


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_few_rows_of_anything(rows):
    strange = [math.nan, math.inf, 1e300, -1e-300, 0.0, 7.0, 3.0]
    for shift in range(len(strange)):
        values = np.roll(strange, shift)[:rows]
        names = ("optim/lr", "optim/grad_norm", "valid/loss", "train/token_ppl", "data/epoch")
        lines = rows_of(values, optim__loss_scale=values, **dict.fromkeys(names, values))
        for order in (lines, lines[::-1], lines + lines):
            report = examine_log(order, vocab_size=V, resumes=[1], steps=20, lr_end=0.0)
            assert not [f for f in report if f.status == "error"]
