"""Faults planted in evaluation, decoding and sampling, and the checks that must see them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from lm_jax import config, decode, evaluate, generate, loss, metrics, sharding
from lm_jax.config import MeshConfig, rules
from lm_jax.config.resolve import resolve
from lm_jax.data import windows as pipeline
from lm_jax.data.open import open_data
from lm_jax.data.store import Split
from lm_jax.data.tokenizers.kinds import CharTokenizer
from lm_jax.doctor.eval import examine_evaluation
from lm_jax.kernels.dropout import Draw
from lm_jax.models.families import create_model
from lm_jax.models.layers import Decoder
from lm_jax.preflight import run
from lm_jax.workdir import Trained
from tests.doctor import toy_decoder
from tests.helpers import randomise, small, tiny_config

V, T = toy_decoder.V, 12


def silent(report, skipped=None):
    assert not report.failed and not report.warned, [
        (f.check, f.evidence) for f in report if f.status in ("fail", "warn")
    ]
    if skipped is not None:
        assert {f.check for f in report if f.status == "skip"} == set(skipped)


def failed(check, alone=True, **given):
    """The finding of the check, which fails."""
    report = examine_evaluation(**dict(vocab_size=V, seq_len=30) | given)
    assert check in report.failed, report[check]
    assert report[check].remedy and (report.failed == [check] or not alone), report.failed
    return report[check]


def make_split(seed, documents=9):
    """Documents of very unequal length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, documents)
    tokens = rng.integers(1, V, lengths.sum()).astype(np.uint16)
    starts = np.concatenate([[0], lengths.cumsum()])
    return Split("valid", tokens, starts, int(lengths.sum()), documents, 0)


# Healthy twins


class Letters:
    """Stands for a store of one split."""

    tokenizer = CharTokenizer("abcdefghijklmnopqrstuv")

    def __init__(self, split):
        self.only = split

    def split(self, name):
        return self.only


def evaluator(split, cfg):
    """lm_jax's evaluation with the model replaced."""

    def evaluate_fn(predict, batch_size, stride=0):
        changed = config.replace(cfg, eval__batch_size=batch_size, eval__stride=stride or T)

        def eval_step(params, batch):
            b = loss.shift(batch)
            logits = predict(b.inputs)
            nats, count = loss.token_nats(logits, b.targets, b.weights)
            return {
                "nats": nats.sum(),
                "count": count.sum(),
                "correct": loss.correct(logits, b.targets, b.weights).sum(),
                "token_nats": nats,
                "token_weights": count,
            }

        mesh = sharding.make_mesh(MeshConfig())
        return evaluate.Evaluator(changed, Letters(split), mesh, eval_step)(None, "valid")

    return evaluate_fn


def batches_of(split, process, processes, stride=None):
    return pipeline.eval_batches(
        split,
        seq_len=T,
        batch_size=4,
        document_mask=True,
        stride=stride,
        process_index=process,
        process_count=processes,
    )


@functools.lru_cache
def package_model(dtype, name="adamw"):
    """lm_jax's forward pass, cache and generation, as a function from a seed to arguments."""
    cfg = tiny_config(
        data__seq_len=31, model__dropout=0.1, train__compute_dtype=dtype, optim__name=name
    )
    graphdef, init = create_model(cfg, V, "reference")
    init, dtype = jax.jit(init), jnp.dtype(dtype)

    @jax.jit
    def forward(params, tokens_BT, key=None):
        model = nnx.merge(graphdef, params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        draw = None if key is None else Draw(key)
        x_BTD = model(tokens_BT, jnp.ones_like(tokens_BT), positions_BT, dtype=dtype, draw=draw)
        return model.logits(x_BTD)

    @jax.jit
    def extend(params, tokens_BT, cache):
        model = nnx.merge(graphdef, params)
        x_BTD, cache = model.extend(tokens_BT, cache, dtype=dtype)
        return model.logits(x_BTD), cache

    @functools.cache
    def given(seed, std=None):
        params = init(jax.random.key(seed))
        params = params if std is None else randomise(params, seed, std)
        run = Trained(cfg, Letters.tokenizer, None, graphdef, params, 7, {})
        empty_cache = nnx.merge(graphdef, params).empty_cache
        made = generate.generate(run, "abc", tokens=20, temperature=1.0, seed=seed)[0]
        context = [0, *Letters.tokenizer.encode("abc").tolist()]
        return dict(
            vocab_size=V,
            seq_len=30,
            seed=seed,
            compute_dtype=dtype.name,
            logits_fn=functools.partial(forward, params),
            train_logits_fn=lambda tokens, seed: forward(params, tokens, jax.random.key(seed)),
            extend_fn=lambda tokens, cache: extend(
                params, tokens, cache or empty_cache(len(tokens), 31, dtype)
            ),
            continuation=(context, made.ids, made.log_probs),
        )

    return given


package_sample = jax.jit(decode.sample, static_argnames=("top_k", "top_p"))


def package_sampler(logits, seed, temperature=1.0, top_k=0, top_p=1.0):
    keys = jax.random.split(jax.random.key(seed), len(logits))
    return package_sample(jnp.asarray(logits), keys, temperature, top_k, top_p)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_silent_on_the_decoding_of_this_package(dtype):
    for std in (None, 0.3):
        report = examine_evaluation(**package_model(dtype)(0, std))
        silent(report)
        passed = {f.check for f in report if f.status == "pass"}
        names = ("deterministic", "cached_decode", "generation")
        assert passed == {f"eval.{name}" for name in names}


@pytest.mark.parametrize("seed", [0, 1])
def test_silent_on_the_evaluation_and_the_sampler_of_this_package(seed):
    split = make_split(seed)
    report = examine_evaluation(
        vocab_size=V,
        seed=seed,
        evaluate_fn=evaluator(split, tiny_config(data__seq_len=T)),
        targets=split.tokens,
        strides=(1, 5, T),
        batches_fn=functools.partial(batches_of, split),
        processes=4,
        sampler=package_sampler,
        sampler_options=("temperature", "top_k", "top_p"),
        never_sampled=(0,),
        loss=3.0,
        references=dict(uniform=22.0, unigram=21.0, kn2=20.5, kn3=20.5, entropy_rate=2.9),
    )
    skipped = ("deterministic", "cached_decode", "generation", "repetition_penalty")
    silent(report, {f"eval.{name}" for name in skipped})


@pytest.mark.parametrize("seed", range(3))
def test_silent_on_a_healthy_toy(seed):
    params = toy_decoder.init(seed)
    forward = functools.partial(toy_decoder.forward, params)
    extend = toy_decoder.extender(params)
    context = [3, 1, 4]
    report = examine_evaluation(
        vocab_size=V,
        seq_len=30,
        seed=seed,
        logits_fn=forward,
        train_logits_fn=lambda tokens, seed: forward(tokens, key=jax.random.key(seed)),
        extend_fn=extend,
        continuation=(context, *toy_decoder.generate(params, context, 15, extend)),
        sampler=toy_decoder.sampler(),
        sampler_options=("temperature", "top_k", "top_p", "repetition_penalty"),
    )
    silent(report)
    assert sum(f.status == "pass" for f in report) == 7


def small_run(text, **changes):
    """The preflight's small twin of a run."""
    cfg = small(text, **changes)
    return run.Small(resolve(cfg, windows=50), open_data(rules.validate(cfg)))


def test_the_preflight_examines_evaluation_generation_and_sampler(text):
    # This package has no penalty for repetition.
    silent(small_run(text).evaluation(), {"eval.repetition_penalty"})


@pytest.mark.fault(71, "eval.cap")
@pytest.mark.fault(26, "eval.cached_decode")
@pytest.mark.fault(77, "eval.generation")
@pytest.mark.fault(79, "eval.coverage")
def test_the_preflight_finds_faults_of_this_package(text, monkeypatch):
    """Its evaluator, generator and sampler are those of the trainer, so what breaks one is seen."""
    batches, extend, exp = pipeline.eval_batches, Decoder.extend, metrics.exp

    def same_for_all(split, **how):
        return batches(split, **how | {"process_index": 0})

    monkeypatch.setattr(pipeline, "eval_batches", same_for_all)
    monkeypatch.setattr(metrics, "exp", lambda nats: exp(min(nats, 20.0)))

    def one_ahead(model, tokens, cache, **how):
        return extend(model, tokens, cache._replace(length=cache.length + 1), **how)

    monkeypatch.setattr(Decoder, "extend", one_ahead)
    report = small_run(text, data__seq_len=16, model__dropout=0.0).evaluation()
    names = ("cap", "coverage", "cached_decode", "generation")
    assert report.failed == [f"eval.{name}" for name in names]


def test_torch_is_silent(split):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    params = toy_decoder.init(0)
    forward, extend = functools.partial(toy_decoder.forward, params), toy_decoder.extender(params)

    def tensor(x, dtype=torch.float32):
        """It needs a gradient, as what a model without `no_grad` returns."""
        return torch.tensor(np.asarray(x), dtype=dtype).requires_grad_()

    def evaluate_fn(predict, batch_size):
        windows, nats, count = pipeline.Windows(split, T, True), torch.zeros(()), 0.0
        for first in range(0, len(windows), batch_size):
            rows = windows.batch(np.arange(first, min(first + batch_size, len(windows))))
            tokens, weights = (torch.from_numpy(rows[name]) for name in ("tokens", "weights"))
            logits = predict(tokens[:, :-1])
            assert logits.dtype == torch.float32 and logits.is_contiguous()
            nll = torch.nn.functional.cross_entropy(
                logits.view(-1, V), tokens[:, 1:].long().flatten(), reduction="none"
            )
            nats = nats + (nll * weights[:, 1:].flatten()).sum()
            count = count + weights[:, 1:].sum()
        loss = (nats / count).requires_grad_()
        return {"loss": loss, "token_ppl": loss.double().exp(), "token_count": count}

    def extend_fn(tokens, cache):
        logits, cache = extend(tokens, cache)
        return tensor(logits), cache

    def batches_fn(process, processes):
        for batch in batches_of(split, process, processes):
            yield {name: torch.from_numpy(x) for name, x in batch.items()}

    def sampler(logits, seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        if not temperature:
            return torch.from_numpy(logits).argmax(-1)
        p = torch.softmax(torch.from_numpy(logits).double() / temperature, -1)
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    ids, log_probs = toy_decoder.generate(params, [3, 1], 15, extend)
    given = dict(
        vocab_size=V,
        seq_len=20,
        evaluate_fn=evaluate_fn,
        targets=torch.from_numpy(split.tokens.astype(np.int64)),
        batches_fn=batches_fn,
        logits_fn=lambda tokens: tensor(forward(tokens)),
        extend_fn=extend_fn,
        continuation=(torch.tensor([3, 1]), torch.tensor(ids), tensor(log_probs)),
        sampler=sampler,
        sampler_options=("temperature",),
    )
    skipped = ("stride", "references", "top_k", "top_p", "repetition_penalty")
    silent(examine_evaluation(**given), {f"eval.{name}" for name in skipped})
    logits_fn = lambda tokens: tensor(forward(tokens), torch.bfloat16)  # noqa: E731
    wide = examine_evaluation(**given | dict(logits_fn=logits_fn, compute_dtype="bfloat16"))
    assert not wide.failed, [wide[name] for name in wide.failed]
    noisy = lambda tokens: tensor(forward(tokens, key=jax.random.key(len(calls))))  # noqa: E731
    calls = []
    report = examine_evaluation(**given | dict(logits_fn=lambda t: calls.append(t) or noisy(t)))
    assert "eval.deterministic" in report.failed


# Aggregation, caps, coverage


def score(split, predict, batch_size, stride=None, how="sums", fault="", cap=None):
    """A plain evaluation loop over the real windows, aggregated in the way that `how` says."""
    windows = pipeline.Windows(split, T, True, stride)
    means, rows, nats, tokens = [], [], 0.0, 0.0
    for first in range(0, len(windows), batch_size):
        batch = windows.batch(np.arange(first, min(first + batch_size, len(windows))))
        weights = batch["weights"][:, 1:].copy()
        if fault == "all of every window":
            # The text of a window that earlier ones have scored already counts again.
            weights = np.float32(batch["tokens"][:, 1:] != 0)
        if fault == "pads":
            weights[:] = 1
        log_p = scipy.special.log_softmax(np.asarray(predict(batch["tokens"][:, :-1])), axis=-1)
        picked = np.take_along_axis(log_p, batch["tokens"][:, 1:, None], 2)[..., 0]
        nats_B, count_B = -(picked * weights).sum(1), weights.sum(1)
        means.append(nats_B.sum() / count_B.sum())
        rows.extend((nats_B / np.maximum(count_B, 1)).tolist())
        nats, tokens = nats + nats_B.sum(), tokens + count_B.sum()
    mean = {"sums": nats / tokens, "batch means": np.mean(means), "row means": np.mean(rows)}
    loss = float(mean.get(how, nats / tokens))
    ppl = float(np.exp(np.float64(means)).mean()) if how == "mean of exp" else math.exp(loss)
    if cap is not None:
        ppl = cap(loss)
    return {"loss": loss, "token_ppl": ppl, "token_count": tokens}


@pytest.fixture(scope="module")
def split():
    return make_split(0)


def test_silent_on_the_plain_loop(split):
    report = examine_evaluation(
        vocab_size=V,
        evaluate_fn=functools.partial(score, split),
        targets=split.tokens,
        strides=(4, T),
    )
    silent(report)
    assert sum(f.status == "pass" for f in report) == 5


def planted(check, split, alone=True, **how):
    return failed(
        check,
        alone,
        evaluate_fn=functools.partial(score, split, **how),
        targets=split.tokens,
    )


@pytest.mark.fault(70, "eval.aggregation")
@pytest.mark.parametrize("how", ["batch means", "row means"])
def test_mean_of_means(split, how):
    found = planted("eval.aggregation", split, how=how)
    assert set(found.values["loss"]) == {f"batch size {n}" for n in (1, 7, 64)}


@pytest.mark.fault(70, "eval.perplexity")
def test_mean_of_exponentials(split):
    # Alone: the loss is right. Several batches of a planted cost have one mean.
    assert planted("eval.perplexity", split, how="mean of exp")


@pytest.mark.fault(71, "eval.cap")
@pytest.mark.parametrize("name", ["ppl", "perplexity"])
def test_a_perplexity_by_another_name_is_looked_at(split, name):
    def evaluate_fn(predict, batch_size):
        found = score(split, predict, batch_size, cap=lambda loss: math.exp(min(loss, 20)))
        return {"loss": found["loss"], name: found["token_ppl"]}

    failed("eval.cap", evaluate_fn=evaluate_fn, targets=split.tokens)


@pytest.mark.parametrize("unit", [math.log(2), 1.01])
def test_a_loss_in_another_unit_or_of_other_tokens_is_one_failure(split, unit):
    def evaluate_fn(predict, batch_size):
        loss = score(split, predict, batch_size)["loss"] / unit
        return {"loss": loss, "token_ppl": math.exp(loss)}

    found = failed("eval.aggregation", evaluate_fn=evaluate_fn, targets=split.tokens)
    assert "the same at every batch size" in found.evidence


@pytest.mark.fault(71, "eval.cap")
@pytest.mark.parametrize(
    "cap, words",
    [
        (lambda loss: math.exp(min(loss, 20)), "485165195.4"),
        (lambda loss: math.exp(min(loss, 100)), "= exp(100)"),
        (lambda loss: math.inf if loss > 10 else math.exp(loss), "perplexity inf"),
    ],
)
def test_capped_perplexity(split, cap, words):
    assert words in planted("eval.cap", split, cap=cap).evidence


@pytest.mark.fault(71, "eval.cap")
def test_capped_nats(split):
    def evaluate_fn(predict, batch_size):
        result = score(split, predict, batch_size)
        return {name: min(value, 50) if name == "loss" else value for name, value in result.items()}

    found = failed("eval.cap", evaluate_fn=evaluate_fn, targets=split.tokens)
    assert "reported as loss 50" in found.evidence


def test_float32_that_overflows_is_no_cap(split):
    report = examine_evaluation(
        vocab_size=V,
        targets=split.tokens,
        evaluate_fn=functools.partial(
            score, split, cap=lambda nats: math.inf if nats > 88.7 else math.exp(nats)
        ),
    )
    silent(report)


@pytest.mark.fault(73, "eval.token_count")
def test_padding_is_scored(split):
    found = planted("eval.token_count", split, fault="pads", alone=False)
    assert min(found.values["token_count"].values()) > len(split.tokens)


@pytest.mark.fault(73, "eval.token_count")
@pytest.mark.fault(80, "eval.stride")
def test_sliding_window_scores_tokens_again(split):
    given = dict(
        evaluate_fn=functools.partial(score, split, fault="all of every window"),
        targets=split.tokens,
        strides=(4,),
    )
    found = failed("eval.stride", **given)  # nothing is wrong at the stride of a window
    assert "at stride 4" in found.evidence
    given["evaluate_fn"] = functools.partial(score, split, stride=4, fault="all of every window")
    given["strides"] = ()
    failed("eval.token_count", alone=False, **given)


@pytest.mark.fault(80, "eval.coverage")
@pytest.mark.fault(73, "eval.coverage")
def test_windows_that_overlap_or_leave_the_end_out(split):
    def overlapping(process, processes):
        for batch in batches_of(split, process, processes, stride=4):
            yield batch | {"weights": np.float32(batch["tokens"] != 0)}

    found = failed("eval.coverage", batches_fn=overlapping, targets=split.tokens)
    assert found.values["missing"] == 0 and found.values["extra"] > len(split.tokens)

    def dropped(process, processes):
        return list(batches_of(split, process, processes))[:-1]

    found = failed("eval.coverage", batches_fn=dropped, targets=split.tokens)
    assert found.values["extra"] == 0 < found.values["missing"]


@pytest.mark.fault(79, "eval.coverage")
@pytest.mark.fault(79, "eval.token_count")
def test_evaluation_of_the_first_process_only(split):
    def first_only(process, processes):
        # Every process takes its rows, but only those of process 0 are summed.
        batches = list(batches_of(split, process, processes))
        return [batch | {"weights": batch["weights"] * (process == 0)} for batch in batches]

    found = failed("eval.coverage", batches_fn=first_only)
    assert found.values["missing by 2 processes"] > 0 == found.values["extra by 2 processes"]
    assert not found.values["batches that differ when read again"]

    def evaluate_fn(predict, batch_size):
        nats = count = 0.0
        for batch in batches_of(split, 0, 2):
            b = loss.shift({name: jnp.asarray(x) for name, x in batch.items()})
            more, n = loss.cross_entropy(predict(b.inputs), b.targets, b.weights)
            nats, count = nats + float(more), count + float(n)
        return {"loss": nats / count, "token_count": count}

    failed("eval.token_count", alone=False, evaluate_fn=evaluate_fn, targets=split.tokens)


def test_every_process_scores_everything(split):
    def all_of_it(process, processes):
        return batches_of(split, 0, 1)

    found = failed("eval.coverage", batches_fn=all_of_it)
    assert found.values["extra by 2 processes"] == len(split.tokens)


@pytest.mark.fault(79, "eval.coverage")
def test_evaluation_on_a_random_subset(split):
    rng = np.random.default_rng(0)

    def batches_fn(process, processes):
        windows = pipeline.Windows(split, T, True)
        yield windows.batch(rng.permutation(len(windows))[:6])

    found = failed("eval.coverage", batches_fn=batches_fn, processes=1)
    assert found.values["batches that differ when read again"] == [0]


# The model


@pytest.mark.fault(58, "eval.deterministic")
def test_dropout_left_on_in_evaluation():
    params, calls = toy_decoder.init(0), iter(range(100))

    def logits_fn(tokens):
        return toy_decoder.forward(params, tokens, key=jax.random.key(next(calls)))

    failed("eval.deterministic", logits_fn=logits_fn)


@pytest.mark.fault(58, "eval.deterministic")
def test_dropout_off_in_training():
    forward = functools.partial(toy_decoder.forward, toy_decoder.init(0))
    given = dict(logits_fn=forward, train_logits_fn=lambda tokens, seed: forward(tokens))
    found = failed("eval.deterministic", **given)
    assert found.evidence.startswith("Largest difference between logits of training")


@pytest.mark.fault(26, "eval.cached_decode")
@pytest.mark.parametrize(
    "fault, position",
    [("positions restart", 1), ("off by one after the prompt", 1), ("one slot is overwritten", 11)],
)
def test_cache_at_wrong_positions(fault, position):
    params = toy_decoder.init(0)
    found = failed(
        "eval.cached_decode",
        logits_fn=functools.partial(toy_decoder.forward, params),
        extend_fn=toy_decoder.extender(params, fault),
    )
    assert f"first at position {position}" in found.evidence.split(";")[0]


def test_logits_of_minus_infinity_are_in_order():
    """Ids that a model excludes, as one with a padded table does; elsewhere they are a fault."""
    params = toy_decoder.init(0)
    extend, excluded = toy_decoder.extender(params), jnp.arange(V) == 5

    def masked(logits):
        return jnp.where(excluded, -jnp.inf, logits)

    def extend_fn(tokens, cache):
        logits, cache = extend(tokens, cache)
        return masked(logits), cache

    given = dict(
        vocab_size=V,
        seq_len=9,
        logits_fn=lambda tokens: masked(toy_decoder.forward(params, tokens)),
        extend_fn=extend_fn,
    )
    report = examine_evaluation(**given)
    silent(report)
    assert {f.check for f in report if f.status == "pass"} == {
        "eval.deterministic",
        "eval.cached_decode",
    }
    assert examine_evaluation(**given | dict(extend_fn=extend)).failed == ["eval.cached_decode"]


@pytest.mark.fault(26, "eval.cached_decode")
@pytest.mark.parametrize("std", [None, 0.3])
def test_cache_of_this_package_with_a_slot_too_many(std):
    given = package_model("float32")(0, std)
    healthy = given["extend_fn"]

    def extend_fn(tokens, cache):
        logits, cache = healthy(tokens, cache)
        return logits, cache._replace(length=cache.length + (cache.length == 7))

    failed("eval.cached_decode", **given | {"extend_fn": extend_fn, "seq_len": 28})


@pytest.mark.fault(77, "eval.generation")
@pytest.mark.parametrize("given_log_probs", [True, False])
@pytest.mark.parametrize("fault", ["cache", "leak", "batch"])
def test_generation_is_another_model_than_scoring(fault, given_log_probs):
    params, context = toy_decoder.init(1), [3, 1, 4]
    extend = toy_decoder.extender(params, "positions restart" if fault == "cache" else "")
    ids, log_probs = toy_decoder.generate(params, context, 25, extend)

    def logits_fn(tokens):
        if fault == "batch":  # scoring runs in batches of eight
            others = np.random.default_rng(0).integers(0, V, (7, tokens.shape[1]))
            tokens = np.concatenate([tokens, others])
            return toy_decoder.forward(params, tokens, mixing=True)[: len(tokens) - 7]
        return toy_decoder.forward(params, tokens, causal=fault != "leak")

    found = failed(
        "eval.generation",
        logits_fn=logits_fn,
        continuation=(context, ids, log_probs if given_log_probs else None),
    )
    assert "first at position" in found.evidence and "of 25" in found.evidence


# The sampler


@pytest.mark.fault(78, "eval.repetition_penalty")
def test_penalty_that_does_nothing():
    def sampler(logits, seed, repetition_penalty, seen):
        return toy_decoder.sampler()(logits, seed)

    found = failed(
        "eval.repetition_penalty", sampler=sampler, sampler_options=("repetition_penalty",)
    )
    assert found.values["lowered"] == 0


@pytest.mark.fault(78, "eval.repetition_penalty")
def test_penalty_that_divides_negative_logits():
    found = failed(
        "eval.repetition_penalty",
        sampler=toy_decoder.sampler("penalty divides"),
        sampler_options=("repetition_penalty",),
    )
    assert all("logit -" in raised for raised in found.values["raised"])


@pytest.mark.fault(78, "eval.top_p")
@pytest.mark.parametrize("fault", ["last one cut", "first dropped"])
def test_top_p_cuts_too_much(fault):
    with np.errstate(invalid="ignore"):
        failed("eval.top_p", sampler=toy_decoder.sampler(fault), sampler_options=("top_p",))


@pytest.mark.fault(78, "eval.temperature")
@pytest.mark.parametrize("fault", ["zero means one", "multiplied"])
def test_temperature(fault):
    failed("eval.temperature", sampler=toy_decoder.sampler(fault), sampler_options=("temperature",))


def test_top_k_of_one_more():
    failed("eval.top_k", sampler=toy_decoder.sampler("one more"), sampler_options=("top_k",))


def test_a_temperature_of_zero_may_be_refused():
    report = examine_evaluation(
        vocab_size=V,
        sampler=toy_decoder.sampler("zero is refused"),
        sampler_options=("temperature",),
    )
    assert report["eval.temperature"].status == "pass"


def test_draws_at_temperature_zero_that_are_no_ids_are_an_error():
    """Refusing 0 is in order, answering with something else is not."""
    right = toy_decoder.sampler()

    def sampler(logits, seed, temperature):
        return right(logits, seed, temperature=temperature) + (100 if temperature == 0 else 0)

    found = examine_evaluation(vocab_size=V, sampler=sampler, sampler_options=("temperature",))
    assert found["eval.temperature"].status == "error"


def test_references():
    good = dict(uniform=1000.0, unigram=500.0, kn2=100.0, kn3=80.0)
    report = examine_evaluation(vocab_size=1000, loss=4.0, references=good)
    assert report["eval.references"].status == "pass"
    for change in (dict(loss=6.5, references=good), dict(references=good | dict(kn3=200.0))):
        assert examine_evaluation(vocab_size=1000, **change).warned == ["eval.references"]
    below = dict(loss=2.0, references=good | dict(entropy_rate=2.5))
    assert examine_evaluation(vocab_size=1000, **below).failed == ["eval.references"]
    lost = examine_evaluation(vocab_size=1000, loss=math.nan, references=good)
    assert lost.failed == ["eval.references"]
    assert examine_evaluation(vocab_size=1000, references={"kn2": 5.0}).clean is False


# Bad input


def test_nothing_given_is_skipped_by_name():
    report = examine_evaluation(vocab_size=V)
    assert {f.status for f in report} == {"skip"} and not report.clean
    assert "evaluate_fn" in report["eval.aggregation"].needs
    without = examine_evaluation(vocab_size=V, sampler=toy_decoder.sampler())
    assert not without.clean and "sampler_options" in without["eval.top_k"].needs


def raising(*_, **__):
    raise RuntimeError("out of cheese")


def everything(split):
    """All functions, healthy."""
    params = toy_decoder.init(0)
    forward, extend = functools.partial(toy_decoder.forward, params), toy_decoder.extender(params)
    return dict(
        vocab_size=V,
        seq_len=5,
        targets=split.tokens,
        batch_sizes=(64,),
        strides=(3,),
        evaluate_fn=lambda predict, rows, stride=None: score(split, predict, rows, stride),
        batches_fn=functools.partial(batches_of, split),
        logits_fn=forward,
        train_logits_fn=lambda tokens, seed: forward(tokens, key=jax.random.key(seed)),
        extend_fn=extend,
        continuation=([3], *toy_decoder.generate(params, [3], 5, extend)),
        sampler=toy_decoder.sampler(),
        sampler_options=("temperature", "top_k", "top_p", "repetition_penalty"),
    )


FIRST = dict(
    evaluate_fn="aggregation",
    batches_fn="coverage",
    logits_fn="deterministic",
    train_logits_fn="deterministic",
    extend_fn="cached_decode",
    sampler="temperature",
)


def test_functions_that_raise_are_errors(split):
    given = everything(split)
    silent(examine_evaluation(**given), {"eval.references"})
    for name, check in FIRST.items():
        report = examine_evaluation(**given | {name: raising})
        assert report.failed == [f"eval.{check}"]
        found = report[f"eval.{check}"]
        assert found.status == "error" and f"{name} raised" in found.evidence
        assert "out of cheese (test_evaluation.py:" in found.evidence
    report = examine_evaluation(**given | dict.fromkeys(FIRST, raising))
    assert not report.clean and "pass" not in {f.status for f in report}
    # Those of training and of the cache wait for the logits of evaluation.
    firsts = ("aggregation", "coverage", "deterministic", "temperature")
    assert report.failed == [f"eval.{name}" for name in firsts]


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("logits_fn", lambda tokens: np.zeros((2, 3)), "shape (2, 3)"),
        (
            "logits_fn",
            lambda tokens: np.full((*tokens.shape, V), np.nan),
            "414 numbers that are NaN",
        ),
        ("extend_fn", lambda tokens, cache: None, "returned None, not (logits, cache)"),
        ("logits_fn", lambda tokens: (np.zeros(3), None), "a tuple of 2, not an array"),
        ("evaluate_fn", lambda predict, batch_size: {"nats": 3.0}, "a dict with nats, not"),
        ("continuation", ([1], [2], [1.0, 2.0]), "shape (2,)"),
        ("continuation", ([], [2], None), "one id of context"),
        ("continuation", ([1], ["a"], None), "a list of 1, not an array"),
        ("sampler", lambda logits, seed, **_: np.zeros(3), "float64 (3,)"),
        ("evaluate_fn", lambda predict, batch_size: 3.0, "'loss'"),
        ("evaluate_fn", lambda predict, batch_size: {"loss": "low"}, "float of loss"),
        ("batches_fn", lambda process, processes: [np.zeros(3)], "'tokens'"),
        ("batches_fn", lambda process, processes: [], "no batch"),
    ],
)
def test_wrong_shapes_and_values_are_errors_with_the_reason(split, name, value, words):
    given = dict(
        vocab_size=V,
        seq_len=9,
        targets=split.tokens,
        logits_fn=functools.partial(toy_decoder.forward, toy_decoder.init(0)),
        sampler_options=("top_p",),
    )
    report = examine_evaluation(**given | {name: value})
    assert len(report.failed) == 1 and words in report[report.failed[0]].evidence
    assert report[report.failed[0]].status == "error"


def test_nan_from_evaluation_fails(split):
    report = examine_evaluation(
        vocab_size=V, targets=split.tokens, evaluate_fn=lambda *_: {"loss": math.nan}
    )
    assert "eval.aggregation" in report.failed and "eval.cap" in report.failed


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(vocab_size=1), "vocab_size"),
        (dict(targets=np.array([V])), "targets"),
        (dict(targets=np.array([0.5])), "targets"),
        (dict(batch_sizes=()), "batch_sizes"),
        (dict(strides=(0,)), "strides"),
        (dict(sampler_options=("heat",)), "sampler_options"),
        (dict(continuation=([1], [2])), "continuation"),
        (dict(continuation=5), "continuation=5"),
        (dict(targets=[[1], [2, 3]]), "targets"),
        (dict(loss="low"), "loss='low'"),
        (dict(never_sampled=5), "never_sampled=5"),
        (dict(references={"uni": 3.0}), "uniform, unigram"),
        (dict(references={"unigram": None}), "unigram"),
    ],
)
def test_misuse(change, word):
    with pytest.raises(ValueError, match=word):
        examine_evaluation(**dict(vocab_size=V) | change)
