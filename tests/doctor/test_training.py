import functools

import jax
import numpy as np
import pytest

from lm_jax.doctor.training import examine_training
from tests.doctor import leaks

V, T = 61, 48


def examine(functions, **kwargs):
    defaults = dict(vocab_size=V, seq_len=T, params_of=lambda state: state[0])
    return examine_training(*functions, **defaults | kwargs)


def short(functions, **kwargs):
    """Enough updates for all checks but the Gibbs test."""
    return examine(functions, **dict(steps=60, smallest_leak=1.0) | kwargs)


@functools.cache
def healthy():
    return leaks.trainer("correct", V)


def silent(report):
    """No failure, no warning."""
    assert not report.failed, [report[name].evidence for name in report.failed]
    assert not report.warned, [report[name].evidence for name in report.warned]
    return report


@pytest.mark.parametrize("seed", range(2))
def test_healthy_twin_is_silent(seed):
    report = silent(examine(healthy(), seed=seed))
    assert {f.status for f in report} == {"pass"}
    gibbs = report["training.gibbs"]
    assert gibbs.values["visible"] <= 0.003 and "would have been seen" in gibbs.evidence


LEAKS = [
    pytest.param(
        "bidirectional", 16, id="bidirectional", marks=pytest.mark.fault(13, "training.gibbs")
    ),
    pytest.param("off_by_one", 16, id="off_by_one", marks=pytest.mark.fault(14, "training.gibbs")),
    pytest.param("chunk_mean", 12, id="chunk_12", marks=pytest.mark.fault(15, "training.gibbs")),
    pytest.param("time_mean", 16, id="time_mean", marks=pytest.mark.fault(16, "training.gibbs")),
    pytest.param("pair", 16, id="pair", marks=pytest.mark.fault(17, "training.gibbs")),
    pytest.param("gated", 16, id="gated", marks=pytest.mark.fault(18, "training.gibbs")),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, chunk", LEAKS)
def test_leaks_are_learned(kind, chunk):
    # As far from 0 as these are, they are seen without the batches that 0.003 nats would take.
    finding = examine(leaks.trainer(kind, V, chunk=chunk), smallest_leak=0.03)["training.gibbs"]
    assert finding.status == "fail", finding.evidence
    assert finding.values["excess"] < -5 * finding.values["error"]


@pytest.mark.fault(1, "training.gibbs")
def test_no_shift():
    report = examine(leaks.trainer("correct", V, shift=0))
    assert "training.gibbs" in report.failed
    assert report["training.gibbs"].values["excess"] < -4


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault(15, "training.gibbs")
def test_a_leak_of_three_thousandths_of_a_nat():
    functions = leaks.trainer("chunk_mean", V, chunk=64, rate=1e-3)
    finding = examine(functions, seq_len=100)["training.gibbs"]
    assert finding.status == "fail", finding.evidence
    assert -0.005 < finding.values["excess"] < -0.001


def table_model(leak, noise):
    """Logits that are fixed noise, and a target that is scored `leak` nats too well."""
    rng = np.random.default_rng(0)
    logits = noise * rng.standard_normal((V, V))
    nats = np.log(np.exp(logits).sum(-1))[:, None] - logits

    def score(state, tokens):
        return nats[tokens[:, :-1], tokens[:, 1:]].sum() - leak * tokens[:, 1:].size, tokens[
            :, 1:
        ].size

    return lambda seed: np.zeros(3), lambda state, tokens: state + 1, score


@pytest.mark.parametrize("seed", range(3))
def test_power_of_the_gibbs_test(seed):
    def gibbs(leak, noise, **kwargs):
        functions = table_model(leak, noise)
        report = examine(functions, steps=20, params_of=None, seed=seed, **kwargs)
        return report["training.gibbs"]

    assert gibbs(0, 0.07).status == "pass"
    # 0.003 nats below what the noise of the parameters explains, though not below ln V.
    hidden = gibbs(0.004, 0.07)
    assert hidden.status in ("warn", "fail") and hidden.values["noise"] > 0.001
    assert gibbs(0.003, 0.01).status == "fail"
    # Too much noise for what is asked: no pass.
    loud = gibbs(0, 0.7)
    assert loud.status == "warn" and "not decided" in loud.evidence
    assert gibbs(0, 0.7, smallest_leak=0.5).status == "pass"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("row_zero", marks=pytest.mark.fault(21, "training.row_independence")),
        pytest.param("batch_axis", marks=pytest.mark.fault(22, "training.row_independence")),
        pytest.param("batch_time_norm", marks=pytest.mark.fault(16, "training.row_independence")),
    ],
)
def test_rows_that_see_each_other(kind):
    assert "training.row_independence" in short(leaks.trainer(kind, V)).failed


@pytest.mark.fault(46, "training.updates")
def test_parameters_that_are_not_trained():
    report = short(leaks.trainer("correct", V, frozen=("positions", "key")))
    assert report.failed == ["training.updates"]
    assert report["training.updates"].values["unchanged"] == ["key", "positions"]
    silent(short(healthy()))


@pytest.mark.fault(46, "training.score_changes")
def test_an_optimiser_that_never_steps():
    init_fn, step_fn, score_fn = healthy()

    def never(state, tokens):
        step_fn(state, tokens)
        return state, {"loss": 0.0}

    report = short((init_fn, never, score_fn))
    assert {"training.updates", "training.score_changes", "training.overfit"} <= set(report.failed)
    without = short((init_fn, never, score_fn), params_of=None)
    assert "training.updates" in without.failed


@pytest.mark.fault(58, "training.score_repeats")
def test_dropout_left_on_in_evaluation():
    init_fn, step_fn, _ = healthy()
    _, _, noisy = leaks.trainer("correct", V, dropout=0.1)
    report = short((init_fn, step_fn, noisy))
    assert "training.score_repeats" in report.failed


@pytest.mark.fault(67, "training.reproducible")
def test_runs_that_differ():
    init_fn, step_fn, score_fn = healthy()
    calls = iter(range(100))
    report = short((lambda seed: init_fn(next(calls)), step_fn, score_fn))
    assert "training.reproducible" in report.failed


@pytest.mark.fault(65, "training.overfit")
def test_a_gradient_of_another_function():
    init_fn, step_fn, score_fn = healthy()

    def stale(state, tokens):  # trains on other tokens than it is given
        return step_fn(state, np.random.default_rng(int(tokens.sum())).permuted(tokens))

    assert "training.overfit" in short((init_fn, stale, score_fn), steps=120).failed


def test_slow_learning_is_a_warning():
    report = short(leaks.trainer("correct", V, rate=1e-4), steps=80)
    assert report["training.overfit"].status == "warn"
    assert "still falling" in report["training.overfit"].evidence


def test_states_that_are_pairs_or_donated():
    init_fn, step_fn, score_fn = healthy()
    donating = jax.jit(lambda state, tokens: step_fn(state, tokens)[0], donate_argnums=0)
    silent(short((init_fn, donating, score_fn)))  # a pair (params, moments) without metrics
    report = short((init_fn, lambda state, tokens: (state, 1, 2), score_fn))
    assert report.failed == ["training.run"] and "neither" in report["training.run"].evidence


def test_objects_that_are_changed_in_place():
    init_fn, step_fn, score_fn = healthy()

    class Trainer:
        def __init__(self, seed):
            self.state = init_fn(seed)

        def step(self, tokens):
            self.state, _ = step_fn(self.state, tokens)
            return self

    functions = (Trainer, Trainer.step, lambda trainer, tokens: score_fn(trainer.state, tokens))
    silent(short(functions, params_of=lambda trainer: trainer.state[0]))


# --- bad input ---------------------------------------------------------------------------------


def fails(*_):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    "place, function, reason",
    [
        (0, fails, "init_fn raised RuntimeError: out of memory"),
        (1, fails, "step_fn raised RuntimeError: out of memory"),
        (2, fails, "score_fn raised RuntimeError: out of memory"),
        (2, lambda state, tokens: 3.0, "no (sum, count)"),
        (2, lambda state, tokens: (np.nan, 4), "a sum of nan over a count of 4"),
        (2, lambda state, tokens: (1.0, 0), "a count of 0"),
        (1, lambda state, tokens: None, "let it return the state even if it changes in place"),
        (1, lambda state, tokens: 2.5, "neither a state like the one it got"),
        (2, lambda state, tokens: (np.log(V), tokens.size), "not a sum but a mean"),
        (2, lambda state, tokens: (np.log(V), 1), "a count of 1: let it return the nats of all"),
        (2, lambda state, tokens: (-np.log(V) * tokens.size, tokens.size), "a sum of -"),
        (2, lambda state, tokens: (tokens.size, np.log(V) * tokens.size), "of all scored tokens"),
    ],
)
def test_unfit_functions_fail_once_and_skip_the_rest(place, function, reason):
    functions = list(healthy())
    functions[place] = function
    report = short(functions)
    assert report.failed == ["training.run"] and reason in report["training.run"].evidence
    assert {f.status for f in report if f.check != "training.run"} == {"skip"}


def test_params_of_that_raises_fails_once():
    report = short(healthy(), params_of=fails)
    assert report.failed == ["training.run"] and "out of memory" in report["training.run"].evidence


def test_a_count_with_one_position_too_many():
    init_fn, step_fn, score_fn = healthy()
    wrong = init_fn, step_fn, lambda state, tokens: (score_fn(state, tokens)[0], tokens.size)
    finding = short(wrong)["training.gibbs"]
    assert finding.status == "fail" and "sum and count" in finding.evidence


@pytest.mark.parametrize("sizes, rows", [((61, 48), 16), ((50_257, 256), 5), ((50_257, 1024), 2)])
def test_rows_of_a_large_vocabulary_are_few(sizes, rows):
    seen = []

    def score(state, tokens):
        seen.append(tokens.shape)
        raise RuntimeError

    V, T = sizes
    examine_training(lambda seed: 0, lambda state, tokens: state, score, vocab_size=V, seq_len=T)
    assert seen == [(rows, T)]


def test_a_loss_that_leaves_out_a_token_by_its_value():
    init_fn, step_fn, score_fn = healthy()

    def ignoring(state, tokens):
        nats, count = score_fn(state, tokens)
        left = (tokens[:, 1:] == 0).sum()
        return nats * (1 - left / count), count - left

    finding = short((init_fn, step_fn, ignoring))["training.gibbs"]
    assert finding.status == "skip" and "by their value" in finding.evidence


@pytest.mark.parametrize(
    "change", [dict(vocab_size=1), dict(steps=3), dict(batch_size=0), dict(smallest_leak=0)]
)
def test_impossible_arguments(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        short(healthy(), **change)
    with pytest.raises(ValueError, match="step_fn"):
        short((healthy()[0], None, healthy()[2]))
