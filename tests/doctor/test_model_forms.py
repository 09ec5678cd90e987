"""Models in the forms in which people hand them in: plain NumPy functions, masks, blocks, id 0."""

import types

import numpy as np
import pytest

from lm_jax.doctor import examine_model
from lm_jax.doctor.model.subject import MOST_LOGITS, Subject

V, T = 65, 32
RNG = np.random.default_rng(0)
PARAMS = {
    "table": (0.5 * RNG.standard_normal((V, 16))).astype(np.float32),
    "head": (0.2 * RNG.standard_normal((16, V))).astype(np.float32),
}


def past(x_BTD):
    return np.cumsum(x_BTD, 1) / np.arange(1, x_BTD.shape[1] + 1)[None, :, None]


def apply(params, tokens):
    return (past(params["table"][tokens]) @ params["head"]).astype(np.float32)


def examine(fn=apply, params=PARAMS, **more):
    return examine_model(fn, params=params, **(dict(vocab_size=V, seq_len=T) | more))


def silent(report):
    assert not report.failed + report.warned, [
        (f.check, f.evidence) for f in report if f.status not in ("pass", "skip")
    ]
    return report


class Module:
    """Holds weights of its own, as modules of other frameworks do."""

    def __init__(self):
        self.weights = {name: x.copy() for name, x in PARAMS.items()}

    def load(self, params):
        for name, x in params.items():
            self.weights[name][:] = x

    def fn(self, params, tokens):
        self.load(params)
        return apply(self.weights, tokens)


def test_a_module_loaded_inside_ends_with_its_own_weights():
    module = Module()
    silent(examine(module.fn, params=module.weights, token_table=module.weights["table"]))
    assert all(np.array_equal(module.weights[n], x) for n, x in PARAMS.items())

    def segmented(params, tokens, ids):
        module.load(params)
        if not np.array_equal(params["table"], PARAMS["table"]):
            raise ValueError("no such weights")
        return apply(module.weights, tokens)

    report = examine(module.fn, params=module.weights, segmented=segmented)
    assert report["model.segment_isolation"].status == "error"
    assert all(np.array_equal(module.weights[n], x) for n, x in PARAMS.items())


def test_parameters_that_are_ignored_are_said():
    report = examine(lambda params, tokens: apply(PARAMS, tokens))
    assert report["model.randomised"].status == "warn" and not report.failed
    assert "parameters" in report["model.randomised"].evidence
    assert report["model.randomised"].values["change"] == 0


MASKS = {
    "two values": np.where(np.tri(T) > 0, 0, -1e9),
    "infinity": np.where(
        np.tri(T) > 0, -0.1 * np.abs(np.subtract.outer(range(T), range(T))), -np.inf
    ),
    "smallest": np.where(np.tri(T) > 0, -0.1 * np.arange(T), np.finfo(np.float32).min),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_stay_when_parameters_are_noise(kind):
    def fn(params, tokens):
        mask = params["mask"][: tokens.shape[1], : tokens.shape[1]]
        weights = np.exp(mask - mask.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ params["table"][tokens] @ params["head"]).astype(np.float32)

    report = silent(examine(fn, PARAMS | {"mask": MASKS[kind].astype(np.float32)}))
    assert report["model.randomised"].status == "pass"


def test_a_triangle_of_decays_stays():
    def fn(params, tokens):
        n = tokens.shape[1]
        return params["decay"][:n, :n] @ params["table"][tokens] @ params["head"]

    decay = np.tril(0.9 ** np.subtract.outer(np.arange(T), np.arange(T))).astype(np.float32)
    report = silent(examine(fn, PARAMS | {"decay": decay}))
    assert report["model.randomised"].status == "pass"


SEQUENCES = {
    "state space": np.tile(np.log(np.arange(1.0, 17.0)), (8, 1)),
    "few frequencies": 10000.0 ** (-np.arange(4) / 4),
    "slopes of 12 heads": 2.0 ** -np.array([1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    "rotary": 10000.0 ** (-np.arange(32) / 32),
    "sinusoids": np.sin(np.arange(64)[:, None] / 1e4 ** (np.arange(16) / 16)),
    "zigzag": np.tile([0.0, 0.5, -0.5], 20),
    "cosines": np.cos(np.pi * (np.arange(32)[:, None] + 0.5) * np.arange(32) / 32),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences_that_layers_share_by_design(kind):
    layers = {f"layer{i}": SEQUENCES[kind].astype(np.float32) for i in range(4)}
    assert examine(params=PARAMS | layers)["model.identical_leaves"].status == "pass"
    stacked = {"layers": np.stack([np.atleast_2d(x) for x in layers.values()])}
    assert examine(params=PARAMS | stacked)["model.identical_leaves"].status == "pass"


@pytest.mark.fault(59, "model.identical_leaves")
@pytest.mark.parametrize("shape", [(12,), (4, 8), (32, 16)])
@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_random_numbers_that_layers_share(shape, draw):
    x = getattr(np.random.default_rng(1), draw)(size=shape).astype(np.float32)
    report = examine(params=PARAMS | {"a": x, "b": x.copy()})
    assert report["model.identical_leaves"].values["twins"] == ["b = a"]
    assert report.failed == ["model.identical_leaves"]


def blocks(size):
    def fn(params, tokens):
        x = params["table"][tokens]
        parts = [past(x[:, i : i + size]) for i in range(0, x.shape[1], size)]
        return (np.concatenate(parts, 1) @ params["head"]).astype(np.float32)

    return fn


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_attention_that_is_local_to_blocks(size):
    report = silent(examine(blocks(size)))
    assert report["model.context_use"].status == "pass"


@pytest.mark.parametrize("size", [8, 16])
def test_packed_documents_in_blocks(size):
    def segmented(params, tokens, ids):
        x = params["table"][tokens] * (ids > 0)[..., None]
        y = np.zeros_like(x)
        for t in range(tokens.shape[1]):
            seen = np.arange(t // size * size, t + 1)
            mine = (ids[:, seen] == ids[:, t : t + 1])[..., None]
            y[:, t] = (x[:, seen] * mine).sum(1) / mine.sum(1)
        return (y @ params["head"]).astype(np.float32)

    report = silent(examine(blocks(size), segmented=segmented))
    assert report["model.segment_restart"].status == "pass"


@pytest.mark.fault(22, "model.context_use")
def test_without_context():
    report = examine(blocks(1))
    assert report.failed == ["model.context_use"]


def by_id_zero(how):
    def fn(params, tokens):
        y, zero = apply(params, tokens), tokens == 0
        if how == "padding":  # is not attended to and predicts nothing
            x = params["table"][tokens] * ~zero[..., None]
            count = np.maximum(np.cumsum(~zero, 1), 1)[..., None]
            y = np.where(zero[..., None], 0, np.cumsum(x, 1) / count @ params["head"])
        if how == "counted":
            y = y / (1 + zero.sum(1))[:, None, None]
        if how == "mask replaced":
            mean = params["table"][tokens].mean(1, keepdims=True) @ params["head"]
            y = np.where(zero.any(1)[:, None, None], mean, y)
        if how == "nan":
            y = np.where(zero[..., None], np.nan, y)
        return y.astype(np.float32)

    return fn


@pytest.mark.fault(20, "model.id_zero")
def test_a_mask_of_padding_ids_replaces_the_causal_one():
    assert examine(by_id_zero("mask replaced")).failed == ["model.id_zero"]
    assert silent(examine(by_id_zero("padding")))["model.id_zero"].status == "pass"
    for how in ("counted", "nan"):
        report = examine(by_id_zero(how))
        assert report.warned == ["model.id_zero"] and not report.failed


def test_float32_is_assumed_of_float32():
    def weak(params, tokens):  # one ten-thousandth of the logits depends on the length
        return apply(params, tokens) * np.float32(1 + 1e-4 * tokens.shape[1])

    report = examine(weak)
    assert "float32" in report["model.output"].evidence
    assert "model.truncation" in report.failed
    silent(examine())


@pytest.mark.parametrize(
    "how",
    [
        lambda z: (z, None),
        lambda z: (z, {"keys": np.zeros((2, 3))}),
        lambda z: {"logits": z, "loss": 0.0},
        lambda z: types.SimpleNamespace(logits=z),
        lambda z: z.reshape(-1, V),
        lambda z: z.tolist(),
    ],
)
def test_logits_among_other_things(how):
    silent(examine(lambda params, tokens: how(apply(params, tokens))))

    def leak(params, tokens):
        return how(apply(params, tokens) + apply(params, tokens[:, ::-1])[:, ::-1])

    assert "model.suffix_swap" in examine(leak).failed


@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min, -1e9])
def test_a_vocabulary_that_is_padded(low):
    def masked(logits):
        return np.where(np.arange(V) < V - 5, logits, np.float32(low))

    silent(examine(lambda params, tokens: masked(apply(params, tokens))))

    def leak(params, tokens):
        return masked(apply(params, tokens) + 0.1 * apply(params, tokens).mean(1, keepdims=True))

    assert "model.suffix_swap" in examine(leak).failed
    everything = examine(lambda params, tokens: apply(params, tokens) + np.float32(low))
    assert everything.failed


def test_low_precision_shows_in_the_logits():
    def low(params, tokens):  # as under autocast
        from ml_dtypes import bfloat16

        return apply(params, tokens).astype(bfloat16).astype(np.float32)

    assert "bfloat16" in silent(examine(low))["model.output"].evidence


def test_memory_is_bounded_by_rows():
    def zeros(tokens):
        return np.broadcast_to(np.float32(0), (*tokens.shape, 50_257))

    large = Subject(zeros, vocab_size=50_257, seq_len=1024)
    assert large.tokens.shape == large.wide.shape == (2, 1024)
    assert large.given.base.size <= MOST_LOGITS
    small = Subject(apply, vocab_size=V, seq_len=T)
    assert small.tokens.shape == (3, T) and small.wide.shape == (T - 1, T)
    declared = Subject(apply, vocab_size=50_257, seq_len=1024, batch_size=4)
    assert declared.tokens.shape == (4, 1024)  # a function may take that number alone


@pytest.mark.fault(58, "model.eval_repeats")
def test_dropout_is_named_and_the_rest_waits():
    rng = np.random.default_rng(0)

    def fn(params, tokens):
        logits = apply(params, tokens)
        return (logits * (rng.random(logits.shape) < 0.9)).astype(np.float32)

    report = examine(fn)
    assert report.failed == ["model.eval_repeats"]
    assert "dropout" in report["model.eval_repeats"].evidence
    assert "eval_repeats" in report["model.suffix_swap"].evidence
