"""Faults planted in distillations, and the checks that must see them."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.doctor.distill import examine_distillation
from lm_jax.kernels.linear_divergence import Member, linear_divergence
from tests.doctor import toy_distillation as toy
from tests.doctor.toy_distillation import V, kl

PIPELINE = "teacher_fn teacher_params targets_fn batch".split()
OBJECTIVE = "teacher_params targets_fn batch student_params objective_fn".split()
LOOP = "targets_fn teacher_params batch init_fn step_fn student_of teacher_of".split()


def silent(report, skipped=()):
    assert not report.failed and not report.warned, [
        (f.check, f.evidence) for f in report if f.status in ("fail", "warn", "error")
    ]
    if skipped is not None:
        assert {f.check for f in report if f.status == "skip"} == {f"distill.{n}" for n in skipped}


def failed(check, names=None, given=None, **changes):
    """The finding of the check, which alone or with others fails."""
    given = given or {}
    report = examine_distillation(**{n: given[n] for n in names or given} | changes)
    assert check in report.failed, report[check]
    assert report[check].remedy
    return report[check]


def topk(student, teacher, weights, temperature, k, *, unique=True):
    """Divergence over the union of both models' most likely tokens, as ids and a mask."""
    ids = jnp.concatenate([jax.lax.top_k(z, k)[1] for z in (teacher, student)], -1)
    ids = jnp.sort(ids, -1)
    repeat = jnp.pad(ids[..., 1:] == ids[..., :-1], ((0, 0), (0, 0), (1, 0)))
    masked = [
        jnp.where(repeat & unique, -1e9, jnp.take_along_axis(z, ids, -1))
        for z in (student, teacher)
    ]
    return kl(*masked, weights, temperature)


# Healthy twins


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_silent_on_a_healthy_distillation(seed):
    given = toy.arguments(seed)
    silent(examine_distillation(**given, records=toy.train(given), topk_fn=topk))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_silent_on_the_divergence_of_this_package(kind):
    @functools.partial(jax.jit, static_argnums=3)
    def kd_fn(student, teacher, weights, temperature):
        head = jnp.eye(student.shape[-1], dtype=student.dtype)
        found = linear_divergence(
            student,
            head,
            [Member(teacher, head)],
            weights,
            kind=kind,
            temperature=temperature,
            beta=0.3,
        )
        return found.objective, found.count

    for seed in range(3):
        report = examine_distillation(kd_fn=kd_fn, kind=kind, beta=0.3, vocab_size=21, seed=seed)
        assert [f.check for f in report if f.status == "pass"] == [
            f"distill.{n}" for n in "temperature divergence padding precision saturation".split()
        ]
        silent(report, None)


def numpy_kl(student, teacher, weights, temperature, *, power=2):
    def log_softmax(z):
        z = np.asarray(z, np.float64) / temperature
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(teacher), log_softmax(student)
    nats = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return temperature**power * (nats * weights).sum(), weights.sum()


def test_a_numpy_divergence_is_examined_without_gradients():
    report = examine_distillation(kd_fn=numpy_kl, vocab_size=V)
    silent(report, None)
    assert "cannot differentiate" in report["distill.precision"].evidence
    for name in "temperature divergence padding saturation".split():
        assert report[f"distill.{name}"].status == "pass"


def test_silent_on_targets_stored_in_bfloat16():
    given = toy.arguments(0)
    whole = given["targets_fn"]

    def stored(params, batch):
        return whole(params, batch).astype(jnp.bfloat16)

    given = {n: given[n] for n in PIPELINE} | {"targets_fn": stored}
    report = examine_distillation(**given)
    silent(report, None)
    assert report["distill.alignment"].values["divergence"] > 1e-6


# The divergence


@pytest.mark.fault(81, "distill.temperature")
@pytest.mark.parametrize("fn", [kl, numpy_kl])
@pytest.mark.parametrize(("power", "word"), [(0, "T^2 missing"), (4, "T^2 too often")])
def test_t2_missing_or_twice(fn, power, word):
    finding = failed("distill.temperature", kd_fn=functools.partial(fn, power=power), vocab_size=V)
    assert word in finding.evidence
    assert np.isclose(finding.values["ratio at spread 0.5"], 4.0 ** (2 - power), rtol=0.05)


def without_temperature(student, teacher, weights, temperature):
    return kl(student, teacher, weights, 1.0)


@pytest.mark.parametrize("t2", [True, False])
def test_a_temperature_that_divides_nothing(t2):
    failed("distill.temperature", kd_fn=without_temperature, vocab_size=V, t2=t2)


def reversed_kl(student, teacher, weights, temperature):
    return kl(teacher, student, weights, temperature)


def cross_entropy(student, teacher, weights, temperature):
    log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (teacher, student))
    return -(temperature**2) * ((jnp.exp(log_p) * log_q).sum(-1) * weights).sum(), weights.sum()


def per_entry(student, teacher, weights, temperature):
    total, count = kl(student, teacher, weights, temperature)
    return total / V, count


def mean(student, teacher, weights, temperature):
    total, count = kl(student, teacher, weights, temperature)
    return total / count, 1.0


def halves_count_whole(student, teacher, weights, temperature):
    return kl(student, teacher, jnp.ceil(weights), temperature)[0], weights.sum()


@pytest.mark.parametrize(
    ("kd_fn", "check", "word"),
    [
        (reversed_kl, "divergence", "which is reverse"),
        (cross_entropy, "divergence", "a cross-entropy"),
        (per_entry, "divergence", "error of the divergence"),
        (mean, "padding", "the count is off"),
        (halves_count_whole, "padding", "half the weights"),
    ],
)
def test_one_cause_is_one_failure(kd_fn, check, word):
    report = examine_distillation(kd_fn=kd_fn, vocab_size=V)
    assert report.failed == [f"distill.{check}"] and not report.warned
    assert word in report[f"distill.{check}"].evidence.lower()


def without_log(student, teacher, weights, temperature):
    """As of a library whose KL expects log-probabilities and is given probabilities."""
    p, q = (jax.nn.softmax(z / temperature) for z in (teacher, student))
    nats = (p * (jnp.log(p) - q)).sum(-1)
    return temperature**2 * (nats * weights).sum(), weights.sum()


def batch_mean(student, teacher, weights, temperature):
    total, _ = kl(student, teacher, weights, temperature)
    return total, jnp.float32(len(student))


def over_time(student, teacher, weights, temperature):
    log_p, log_q = (jax.nn.log_softmax(z / temperature, axis=1) for z in (teacher, student))
    nats = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return temperature**2 * (nats * weights).sum(), weights.sum()


@pytest.mark.fault(82, "distill.divergence")
@pytest.mark.parametrize("kd_fn", [reversed_kl, without_log, batch_mean, over_time])
def test_direction_logs_and_axis(kd_fn):
    finding = failed("distill.divergence", kd_fn=kd_fn, vocab_size=V)
    assert ("which is reverse" in finding.evidence) == (kd_fn is reversed_kl)


def unmasked(student, teacher, weights, temperature):
    return kl(student, teacher, jnp.ones_like(weights), temperature)


@pytest.mark.fault(82, "distill.padding")
@pytest.mark.parametrize("kd_fn", [batch_mean, over_time, unmasked])
def test_padding_and_length(kd_fn):
    failed("distill.padding", kd_fn=kd_fn, vocab_size=V)


def narrow(student, teacher, weights, temperature):
    """The softmax in bfloat16, its sum in float32."""
    z, y = (jax.nn.log_softmax((x / temperature).astype(jnp.bfloat16)) for x in (student, teacher))
    nats = (jnp.exp(y) * (y - z)).astype(jnp.float32).sum(-1)
    return temperature**2 * (nats * weights).sum(), weights.sum()


@pytest.mark.fault(88, "distill.precision")
def test_divergence_in_bfloat16():
    finding = failed("distill.precision", kd_fn=narrow, vocab_size=V)
    assert finding.values["float32"] > 0.03


def guarded(student, teacher, weights, temperature, *, where):
    z, y = student / temperature, teacher / temperature
    if where == "clamp":
        z, y = (jnp.clip(x, -20, 20) for x in (z, y))
    if where == "half":
        z, y = (jnp.nan_to_num(x.astype(jnp.float16), posinf=0.0) for x in (z, y))
        return kl(z, y, weights, 1.0)
    p, q = jax.nn.softmax(y), jax.nn.softmax(z)
    log_p, log_q = jnp.log(p + 1e-8), jnp.log(q + 1e-8)
    if where == "outside":
        log_p, log_q = jax.nn.log_softmax(y) + 1e-3, jax.nn.log_softmax(z)
    if where == "clamp":
        log_p, log_q = jax.nn.log_softmax(y), jax.nn.log_softmax(z)
    nats = (p * (log_p - log_q)).sum(-1)
    return temperature**2 * (nats * weights).sum(), weights.sum()


@pytest.mark.fault(94, "distill.saturation")
@pytest.mark.parametrize("where", ["clamp", "half", "inside", "outside"])
def test_epsilon_and_clamps(where):
    failed("distill.saturation", kd_fn=functools.partial(guarded, where=where), vocab_size=V)


@pytest.mark.fault(91, "distill.subset")
def test_duplicates_in_the_union():
    fn = functools.partial(topk, unique=False)
    failed("distill.subset", topk_fn=fn, vocab_size=V)


def sparse(student, teacher, weights, temperature, k, *, fault=""):
    """Over the teacher's k likeliest tokens, and one entry for the others unless `fault`."""
    log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (teacher, student))
    ids = jnp.argsort(-teacher)[..., :k]
    log_p, log_q = (jnp.take_along_axis(z, ids, -1) for z in (log_p, log_q))
    if not fault:
        rest = [
            jnp.log1p(-jnp.exp(z).sum(-1, keepdims=True).clip(max=1 - 1e-7)) for z in (log_p, log_q)
        ]
        log_p, log_q = (jnp.concatenate(x, -1) for x in zip((log_p, log_q), rest, strict=True))
    if fault == "teacher alone":
        log_p = jax.nn.log_softmax(log_p)
    nats = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return temperature**2 * (nats * weights).sum(), weights.sum()


@pytest.mark.parametrize("fault", ["", "teacher alone", "none adds up to 1"])
def test_likeliest_tokens_without_the_others(fault):
    fn = functools.partial(sparse, fault=fault)
    report = examine_distillation(topk_fn=fn, topk_union=False, vocab_size=V)
    assert not report.failed and report.warned == ["distill.subset"] * bool(fault)


# The teacher


@pytest.mark.fault(83, "distill.teacher_gradient")
@pytest.mark.fault(83, "distill.teacher_fixed")
def test_a_trainable_projection_of_the_teacher():
    given = toy.arguments(0, project=True, frozen=False)
    finding = failed("distill.teacher_gradient", OBJECTIVE, given)
    assert "projection" in finding.evidence
    finding = failed("distill.teacher_fixed", LOOP, given)
    assert "projection" in finding.values["moved"] and finding.values["drift"] > 1e-3


@pytest.mark.fault(83, "distill.teacher_gradient")
def test_a_teacher_without_stop_gradient():
    failed("distill.teacher_gradient", OBJECTIVE, toy.arguments(1, frozen=False))


@pytest.mark.fault(84, "distill.teacher_eval")
def test_dropout_in_the_teacher():
    finding = failed("distill.teacher_eval", PIPELINE, toy.arguments(0, drop=True))
    assert finding.values["teacher_fn"] == 0 < finding.values["targets_fn"]


@pytest.mark.fault(84, "distill.alignment")
def test_dropout_of_one_mask_in_the_teacher():
    failed("distill.alignment", PIPELINE, toy.arguments(0, drop="one mask"))


@pytest.mark.fault(85, "distill.present")
@pytest.mark.parametrize("source", ["student", "weight 0"])
def test_distillation_absent(source):
    finding = failed("distill.present", OBJECTIVE, toy.arguments(0, source=source))
    assert finding.values["moved"] == 0


@pytest.mark.fault(86, "distill.alignment")
@pytest.mark.parametrize("cache", ["shuffled", "shifted"])
def test_targets_misaligned(cache):
    finding = failed("distill.alignment", PIPELINE, toy.arguments(0, cache=cache))
    assert finding.values["divergence"] > 0.5
    assert ("1 position too late" in finding.evidence) == (cache == "shifted")


@pytest.mark.fault(87, "distill.roles")
@pytest.mark.fault(87, "distill.teacher_fixed")
def test_teacher_and_student_swapped():
    given = toy.arguments(0, swap=True, frozen=False)
    finding = failed("distill.roles", LOOP, given)
    assert not finding.values["moved"]
    failed("distill.teacher_fixed", LOOP, given)


@pytest.mark.fault(87, "distill.roles")
def test_another_model_in_the_place_of_the_student():
    given = toy.arguments(0)
    finding = failed("distill.roles", LOOP, given, student_parameters=13)
    assert finding.values["parameters of the student"] != 13 and "expected 13" in finding.evidence


@pytest.mark.parametrize("lowest", [-np.inf, -100.0])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_cache_of_the_likeliest_tokens(k, lowest):
    given = {n: toy.arguments(0)[n] for n in PIPELINE}

    def cached(shift=0):
        def targets_fn(params, batch):
            log_p = jax.nn.log_softmax(given["teacher_fn"](params, batch["tokens"]))
            kept = jnp.where(log_p >= jnp.sort(log_p)[..., [-k]], log_p, lowest)
            return jnp.roll(kept, shift, 1)

        return given | {"targets_fn": targets_fn}

    silent(examine_distillation(**cached()), None)
    finding = failed("distill.alignment", given=cached(1))
    assert finding.values["divergence"] > 0.5


def test_targets_kept_in_bfloat16_and_normalised_after():
    given = {n: toy.arguments(0)[n] for n in PIPELINE}

    def targets_fn(params, batch):
        log_p = jax.nn.log_softmax(given["teacher_fn"](params, batch["tokens"]))
        return jax.nn.log_softmax(log_p.astype(jnp.bfloat16).astype(jnp.float32))

    report = examine_distillation(**given | {"targets_fn": targets_fn})
    assert not report.failed and report.warned == ["distill.alignment"]
    assert "bfloat16" in report["distill.alignment"].evidence


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_targets_that_are_no_numbers_are_one_error(value):
    given = {n: toy.arguments(0)[n] for n in PIPELINE}
    whole = given["targets_fn"]
    given["targets_fn"] = lambda params, batch: whole(params, batch).at[3, 2, 1].set(value)
    report = examine_distillation(**given)
    assert report.failed == ["distill.teacher_eval"]
    assert "NaN or infinite" in report["distill.teacher_eval"].evidence


def test_a_teacher_that_drops_is_one_failure():
    given = toy.arguments(0, drop=True)
    report = examine_distillation(**{n: given[n] for n in {*PIPELINE, *LOOP}})
    assert report.failed == ["distill.teacher_eval"]


@pytest.mark.fault(89, "distill.information")
def test_a_vocabulary_papered_over():
    for seed in range(3):
        given = toy.arguments(seed, project=True)
        finding = failed("distill.information", PIPELINE, given)
        assert finding.values["excess"] > 0
    failed("distill.information", PIPELINE, given, unigram_nats=2.3)


@pytest.mark.fault(90, "distill.future")
def test_states_interpolated_along_time():
    finding = failed("distill.future", PIPELINE, toy.arguments(0, blur=True))
    assert finding.values["earlier"] > 0.01


# The log


@functools.lru_cache
def log(**faults):
    given = toy.arguments(0, **faults)
    return tuple(toy.train(given))


def fast(update):
    return 8 * update


@pytest.mark.fault(92, "distill.terms")
@pytest.mark.parametrize(("total", "word"), [("raw", "add up"), ("scaled", "T^2 kd_kl")])
def test_one_name_for_two_values(total, word):
    assert word in failed("distill.terms", records=log(total=total)).evidence


@pytest.mark.parametrize("digits", [2, 3, 4, 6])
def test_terms_are_held_against_each_other_as_they_are_printed(digits):
    def rounded(record):
        return {n: round(float(x), digits) for n, x in record.items()}

    silent(examine_distillation(records=[rounded(r) for r in log()]), None)
    finding = failed("distill.terms", records=[rounded(r) for r in log(total="scaled")])
    assert "T^2 kd_kl" in finding.evidence


@pytest.mark.fault(93, "distill.clock")
def test_a_curriculum_in_micro_steps():
    finding = failed("distill.clock", records=log(clock=fast), weights_fn=toy.curriculum)
    assert "8 times as fast" in finding.evidence


@pytest.mark.fault(93, "distill.eval_components")
def test_evaluation_at_the_temperature_of_training():
    given = toy.arguments(0, eval_alpha=toy.curriculum)
    names = "eval_fn student_params teacher_params batch steps".split()
    finding = failed("distill.eval_components", names, given)
    assert [text.split()[0] for text in finding.values["changed"]] == ["kd_kl", "kd_kl_t2"]


@pytest.mark.fault(95, "distill.contrastive")
def test_few_candidates():
    failed("distill.contrastive", contrastive_candidates=4)


# Bad input


def test_nothing_given_is_nothing_examined():
    report = examine_distillation()
    assert {f.status for f in report} == {"skip"}
    assert all("Not given" in f.evidence for f in report)


def broken(*_):
    raise RuntimeError("no such thing")


def test_functions_that_raise_or_return_nonsense():
    given = toy.arguments(0)
    functions = [n for n in given if n.endswith("_fn")]
    report = examine_distillation(**given | dict.fromkeys(functions, broken), records=())
    assert [f.check for f in report if f.status == "pass"] == ["distill.contrastive"]

    def nan(*_):
        return jnp.float32(np.nan), jnp.float32(1)

    report = examine_distillation(kd_fn=nan)
    assert {"distill.temperature", "distill.divergence", "distill.padding"} <= set(report.failed)
    assert not [f for f in report if f.status == "pass"]
    report = examine_distillation(
        **{n: given[n] for n in PIPELINE} | {"targets_fn": lambda *_: jnp.full((16, 12, V), np.nan)}
    )
    assert not [f for f in report if f.status == "pass"], [f for f in report if f.status == "pass"]
    report = examine_distillation(kd_fn=lambda *_: 1.0, targets_fn=lambda *_: 1.0, **_rest(given))
    assert {f.status for f in report} == {"error", "skip"}
    assert "not two scalars (sum, count)" in report["distill.temperature"].evidence
    assert "returned shape ()" in report["distill.teacher_eval"].evidence


def _rest(given):
    return {n: given[n] for n in ("teacher_params", "batch")}


PATHS = {
    "kd_fn": [],
    "topk_fn": [],
    "teacher_fn": PIPELINE,
    "targets_fn": PIPELINE,
    "suffix_fn": PIPELINE,
    "objective_fn": OBJECTIVE,
    "whole_fn": OBJECTIVE,
    "eval_fn": "eval_fn student_params teacher_params batch steps".split(),
    **dict.fromkeys("init_fn step_fn student_of teacher_of".split(), LOOP),
    "weights_fn": ["records"],
}


@pytest.mark.parametrize("name", PATHS)
def test_a_function_that_raises_is_an_error_and_told_once(name):
    given = toy.arguments(0) | {"records": log()}
    report = examine_distillation(**{n: given[n] for n in PATHS[name]} | {name: broken})
    told = f"{name} raised RuntimeError: no such thing (test_distillation.py"
    assert [f.status for f in report if told in f.evidence] == ["error"]
    assert len(report.failed) == 1


def test_a_gradient_that_raises_is_no_missing_gradient():
    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), broken)
    report = examine_distillation(
        kd_fn=lambda student, *others: kl(same(student), *others), vocab_size=V
    )
    assert len(report.failed) == 1
    assert "the gradient of kd_fn raised" in report[report.failed[0]].evidence


def test_a_total_that_is_no_number_is_an_error():
    given = {n: toy.arguments(0)[n] for n in OBJECTIVE}
    for name, made in (("whole_fn", "abc"), ("objective_fn", 3.0), ("objective_fn", (1.0, {}, 2))):
        report = examine_distillation(**given | {name: lambda *_, made=made: made})
        found = report[report.failed[0]]
        assert len(report.failed) == 1 and found.status == "error" and name in found.evidence


def test_a_batch_in_which_nothing_is_scored_is_an_error():
    given = {n: toy.arguments(0)[n] for n in PIPELINE}
    given["batch"] = given["batch"] | {"weights": np.zeros_like(given["batch"]["weights"])}
    report = examine_distillation(**given)
    assert report.failed == ["distill.alignment"]
    assert "no token of batch is scored" in report["distill.alignment"].evidence


def test_leaves_that_are_not_there():
    given = {n: toy.arguments(0)[n] for n in LOOP}
    for name in ("student_of", "teacher_of"):
        report = examine_distillation(**given | {name: lambda _: {}})
        assert f"{name} returned no arrays" in report[report.failed[0]].evidence


def test_a_state_that_is_a_pair_of_mappings():
    given = toy.arguments(0)
    init_fn, step_fn = given["init_fn"], given["step_fn"]

    def pair(state):
        return {"student": state["student"]}, {n: x for n, x in state.items() if n != "student"}

    loop = dict(
        init_fn=lambda seed: pair(init_fn(seed)),
        step_fn=lambda state, batch: pair(step_fn(state[0] | state[1], batch)[0]),
        student_of=lambda state: state[0],
        teacher_of=lambda state: state[1]["teacher"],
    )
    report = examine_distillation(**{n: given[n] for n in LOOP} | loop)
    silent(report, None)
    assert report["distill.roles"].status == report["distill.teacher_fixed"].status == "pass"


# What cannot be seen is not passed


def test_a_teacher_that_says_the_same_everywhere_aligns_with_anything():
    given = {n: toy.arguments(0)[n] for n in PIPELINE}
    same = jnp.zeros((*given["batch"]["tokens"].shape, V))
    given |= dict.fromkeys(("teacher_fn", "targets_fn"), lambda params, batch: same)
    finding = examine_distillation(**given)["distill.alignment"]
    assert finding.status == "skip" and "a shift would not show" in finding.evidence


@pytest.mark.parametrize("mask", [-1e9, -np.inf])
def test_logits_that_are_masked_hide_nothing(mask):
    def masked(**faults):
        given = {n: toy.arguments(0, **faults)[n] for n in PIPELINE}

        def wide(function):
            pad = ((0, 0), (0, 0), (0, 3))
            return lambda *args: jnp.pad(function(*args), pad, constant_values=mask)

        return given | {n: wide(given[n]) for n in ("teacher_fn", "targets_fn")}

    silent(examine_distillation(**masked()), None)
    assert examine_distillation(**masked())["distill.future"].status == "pass"
    failed("distill.future", given=masked(blur=True))
    failed("distill.alignment", given=masked(cache="shifted"))


def test_a_divergence_below_rounding_is_not_judged():
    report = examine_distillation(
        kd_fn=lambda *args: (jnp.float32(0), args[2].sum()), kind="jsd", beta=1e-7
    )
    assert "drowns in float32's rounding" in report["distill.divergence"].evidence
    assert "distill.temperature" in report.failed


def test_a_small_weight_is_judged_by_its_own_size():
    weights = {"kd_kl": 1e-4, "temperature": 2.0}
    record = {"step": 1, "distill/kd_kl": 3.217, "distill/temperature": 2.0}

    def clock(weight):
        logged = record | {"distill/weighted/kd_kl": weight * record["distill/kd_kl"]}
        return examine_distillation(records=[logged], weights_fn=lambda _: weights)["distill.clock"]

    assert clock(1e-4).status == "pass"
    assert clock(2e-4).status == "fail"


@pytest.mark.slow
def test_a_large_vocabulary_takes_no_copies_in_float64():
    size, shape = 50_257, (2, 128)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, shape)
    logits = rng.normal(size=(50, size)).astype(np.float32)[tokens]
    tracemalloc.start()
    report = examine_distillation(
        teacher_fn=lambda *_: logits,
        targets_fn=lambda *_: np.roll(logits, 1, axis=1),
        teacher_params={"a": np.ones(1)},
        batch={"tokens": tokens},
        unigram_nats=6.0,
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "distill.alignment" in report.failed and "distill.information" in report.failed
    # The rolled ones are here twice; float64 of all of them would be twice as large each time.
    assert peak < 2 * logits.nbytes + 5.5e8, peak


# PyTorch


@pytest.mark.parametrize("detached", [True, False])
def test_tensors_of_torch_that_need_a_gradient(detached):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    given = toy.arguments(0)

    def tensors(params):
        made = {n: torch.tensor(np.asarray(x), dtype=torch.bfloat16) for n, x in params.items()}
        return {n: x.requires_grad_() for n, x in made.items()}

    def forward(params, tokens):
        x = params["embedding"][tokens]
        before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return torch.tanh(x + before @ params["earlier"]) @ params["head"]

    def targets_fn(params, batch):
        logits = forward(params, batch["tokens"])
        return logits.detach() if detached else logits

    def objective_fn(student, teacher, batch, alpha):
        z, y = forward(student, batch["tokens"]).float(), targets_fn(teacher, batch).float()
        log_q, log_p = torch.log_softmax(z, -1), torch.log_softmax(y, -1)
        kd = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        ahead = batch["tokens"][:, 1:].flatten().long()
        lm = torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), ahead)
        return alpha * kd + (1 - alpha) * lm, {"kd_kl_t2": kd, "lm_ce": lm}

    def kd_fn(student, teacher, weights, temperature):
        z, y, weights = (torch.tensor(x, requires_grad=True) for x in (student, teacher, weights))
        log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (z, y))
        nats = (log_p.exp() * (log_p - log_q)).sum(-1)
        return temperature**2 * (nats * weights).sum(), weights.sum()

    student, teacher = tensors(given["student_params"]), tensors(given["teacher_params"])
    facts = dict(
        kd_fn=kd_fn,
        vocab_size=V,
        teacher_fn=forward,
        teacher_params=teacher,
        targets_fn=targets_fn,
        batch={n: torch.tensor(x) for n, x in given["batch"].items()},
        compute_dtype="bfloat16",
        student_params=student,
        objective_fn=objective_fn,
        eval_fn=lambda student, teacher, batch, update: objective_fn(student, teacher, batch, 0)[1],
        init_fn=lambda seed: {"student": student, "teacher": teacher},
        student_of=lambda state: state["student"],
        teacher_of=lambda state: state["teacher"],
        steps=10,
    )

    def step_fn(state, batch):
        objective_fn(state["student"], state["teacher"], batch, 0.5)[0].backward()
        with torch.no_grad():
            for leaf in state["student"].values():
                leaf -= 0.1 * leaf.grad
        return state

    report = examine_distillation(**facts, step_fn=step_fn)
    status = {f.check.removeprefix("distill."): f.status for f in report}
    leaks = status.pop("teacher_gradient")
    assert leaks == ("pass" if detached else "fail"), report["distill.teacher_gradient"]
    missing = {n for n, x in status.items() if x != "pass"}
    assert missing == {"precision", "subset", "terms", "clock", "contrastive"}, report
    frozen = {n: x.detach() for n, x in student.items()}
    finding = examine_distillation(**facts | {"student_params": frozen})["distill.teacher_gradient"]
    assert finding.status == "skip" and "needs a gradient" in finding.evidence


def test_a_cache_that_ignores_the_tokens_is_not_passed():
    given = toy.arguments(0)
    stored = given["targets_fn"](given["teacher_params"], given["batch"])
    report = examine_distillation(
        **{n: given[n] for n in PIPELINE} | {"targets_fn": lambda *_: stored}
    )
    assert "a cache?" in report["distill.future"].evidence
    silent(report, None)


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("kind", dict(kind="backward")),
        ("beta", dict(beta=1.0)),
        ("vocab_size", dict(vocab_size=1)),
        ("calls", dict(calls=0)),
        ("kd_fn", dict(kd_fn=3)),
        ("batch", dict(batch=[1])),
        ("tokens", dict(batch={"tokens": np.zeros((2, 1), int)})),
        ("tokens", dict(batch={"tokens": np.zeros((2, 8))})),
        ("records", dict(records=[1])),
        ("records", dict(records="a log")),
        ("t2", dict(t2="yes")),
    ],
)
def test_arguments_that_make_no_sense(word, changes):
    with pytest.raises(ValueError, match=word):
        examine_distillation(**changes)
