"""The matrix model against its equations, written out block by block in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm_jax import config, evaluate, sharding, step
from lm_jax.config import ConfigError, MeshConfig
from lm_jax.config.resolve import resolve
from lm_jax.data.open import open_data
from lm_jax.kernels.dropout import Draw
from lm_jax.models import musota
from lm_jax.models.families import create_model
from tests.helpers import randomise, small, thirds, tiny_config

V = 29
MUSOTA = dict(model__family="musota", model__d_model=128, model__heads=4, model__init="normal")


def test_blocks_are_squares_of_the_matrix_and_back():
    cells = np.arange(64).reshape(8, 8)
    blocks = np.asarray(musota.to_blocks(jnp.arange(64.0))).reshape(16, 4)
    for b, name in enumerate(musota.BLOCKS):
        r, c = divmod(b, 4)
        expected = cells[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].ravel()
        np.testing.assert_array_equal(blocks[b], expected, err_msg=name)
    assert sorted(blocks.ravel()) == list(range(64))
    x = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    np.testing.assert_array_equal(musota.to_matrix(musota.to_blocks(x)), x)
    np.testing.assert_array_equal(musota.to_blocks(musota.to_matrix(x)), x)
    assert (np.asarray(musota.to_blocks(x)) != x).any()  # a reshape would not do


@pytest.mark.parametrize(("n", "T", "vocab"), [(12, 128, 50_000), (24, 512, 50_000), (1, 7, 11)])
def test_parameters_are_those_of_the_closed_form(n, T, vocab):
    cfg = tiny_config(**MUSOTA, model__layers=n, data__seq_len=T)
    _, init = create_model(cfg, vocab, "reference")
    leaves = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    assert sum(x.size for x in leaves) == vocab * (129 + 16 * n) + 64 * T + 52_640 * n + 128


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    return np.asarray(jax.scipy.special.erf(x / np.sqrt(2)) + 1) * x / 2


def attention(x_TE, kernel, bias, out, out_bias, heads):
    """One causal multi-head attention, and its weights averaged over heads."""
    T, E = x_TE.shape
    q, k, v = np.split(x_TE @ kernel + bias, 3, axis=1)
    y, weights = np.zeros((T, E)), np.zeros((T, T))
    for h in range(heads):
        own = slice(h * E // heads, (h + 1) * E // heads)
        for t in range(T):
            a = softmax(k[: t + 1, own] @ q[t, own] / np.sqrt(E // heads))
            y[t, own] = a @ v[: t + 1, own]
            weights[t, : t + 1] += a / heads
    return y @ out + out_bias, weights


def layers_of(params):
    layers = len(jax.tree.leaves(params["blocks"])[0])
    return [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(layers)]


def by_equations(params, tokens):
    """Logits [T, V] and sensitivities [L, T, 16] of one document."""
    T = len(tokens)
    m = params["embedding"][tokens] + params["position_embedding"][:T]
    seen = []
    for p in layers_of(params):
        grid = m.reshape(T, 4, 2, 4, 2)
        x = np.stack([grid[:, b // 4, :, b % 4].reshape(T, 4) for b in range(16)], axis=1)
        w, o = p["within"]["qkv"], p["within"]["out"]
        z = np.concatenate(
            [
                attention(x[:, b], w["kernel"][b], w["bias"][b], o["kernel"][b], o["bias"][b], 2)[0]
                for b in range(16)
            ],
            axis=1,
        )
        w, o = p["across"]["qkv"], p["across"]["out"]
        y, a = attention(z, w["kernel"], w["bias"], o["kernel"], o["bias"], 8)
        z = layer_norm(z + y, p["across_norm"])
        y = gelu(z @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]
        z = layer_norm(z + y, p["mlp_norm"]).reshape(T, 16, 4)
        entropy = [0.0]
        for t in range(1, T):
            entropy.append(-(a[t] * np.log(a[t] + 1e-9)).sum() / np.log(t + 1))
        g = p["gate"]
        inputs = np.concatenate([g["affinity"][tokens], np.array(entropy)[:, None]], axis=1)
        hidden = gelu(inputs @ g["up"]["kernel"] + g["up"]["bias"])
        s = g["base"] / (1 + np.exp(-(hidden @ g["down"]["kernel"] + g["down"]["bias"])))
        x = x + s[:, :, None] * (z - x)
        for b in range(16):
            grid[:, b // 4, :, b % 4] = x[:, b].reshape(T, 2, 2)
        m = grid.reshape(T, 64)
        seen.append(s)
    m = layer_norm(m, params["final_norm"])
    return m @ params["head"]["kernel"] + params["head_bias"], np.array(seen)


@pytest.mark.parametrize("impl", thirds(["reference", "blockwise", "xla"]))
def test_the_model_is_its_equations(impl):
    cfg = tiny_config(**MUSOTA)
    graphdef, init = create_model(cfg, V, impl)
    params = randomise(jax.eval_shape(init, jax.random.key(0)), 1, 0.5)
    rng = np.random.default_rng(2)
    tokens_BT = rng.integers(0, V, (3, 9)).astype(np.int32)
    positions_BT = np.broadcast_to(np.arange(9, dtype=np.int32), (3, 9))

    @jax.jit
    def observe(params):
        model = nnx.merge(graphdef, params)
        x_BTD, s_LBTk = model.observed(tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
        return model.logits(x_BTD), s_LBTk

    logits_BTV, s_LBTk = observe(params)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for b in range(3):
        logits, seen = by_equations(wide, tokens_BT[b])
        np.testing.assert_allclose(logits_BTV[b], logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(s_LBTk[:, b], seen, rtol=1e-4, atol=1e-5)


def test_entropy_is_a_share_of_its_maximum():
    even = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    sharp = np.eye(6)
    found = musota.normalised_entropy(jnp.asarray([even, sharp]), jnp.arange(6)[None])
    np.testing.assert_allclose(found[0], [0, 1, 1, 1, 1, 1], atol=1e-5)
    np.testing.assert_allclose(found[1], 0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_dropout_reaches_the_gate():
    """In the first layer nothing before the gate is random but the gate itself."""
    cfg = tiny_config(**MUSOTA, model__dropout=0.5)
    graphdef, init = create_model(cfg, V, "reference")
    model = nnx.merge(graphdef, randomise(jax.eval_shape(init, jax.random.key(0)), 1, 0.5))
    tokens_BT = np.arange(8, dtype=np.int32)[None]
    read = (tokens_BT, np.ones_like(tokens_BT), tokens_BT)
    first, second, still = (
        np.asarray(model.observed(*read, draw=draw)[1][0])
        for draw in (Draw(jax.random.key(1)), Draw(jax.random.key(2)), None)
    )
    assert (first != second).any() and (first != still).any()


def test_fields_without_meaning_are_refused():
    with pytest.raises(ConfigError, match="model.heads: 2 has no meaning for .*leave it at 4"):
        tiny_config(**MUSOTA | {"model__heads": 2})
    again = config.from_dict(config.to_dict(tiny_config(**MUSOTA)))
    assert resolve(again, windows=50) == tiny_config(**MUSOTA)


@pytest.mark.slow
def test_evaluation_reports_the_sensitivity_of_every_block(text):  # noqa: F811
    kind = {"model__layers": 2, "model__d_model": 128, "model__heads": 4, "model__family": "musota"}
    cfg = resolve(small(text, **kind), windows=50)
    store = open_data(cfg)
    graphdef, init = create_model(cfg, store.tokenizer.vocab_size, "reference")
    params = randomise(jax.eval_shape(init, jax.random.key(0)), 3, 0.5)
    eval_step = step.make_eval_step(cfg, graphdef)
    evaluator = evaluate.Evaluator(cfg, store, sharding.make_mesh(MeshConfig()), eval_step)
    found = evaluator(params, "valid")["sensitivity"]
    assert tuple(found) == musota.BLOCKS
    split = store.split("valid")

    @jax.jit
    def observe(tokens):
        model = nnx.merge(graphdef, params)
        return model.observed(tokens, jnp.ones_like(tokens), jnp.arange(32)[None])[1][:, 0]

    total = np.zeros((2, 16))
    for start, end in itertools.pairwise(split.document_starts):
        document = np.concatenate([[split.separator], split.tokens[start:end]])[:-1]
        for first in range(0, len(document), 32):
            part = document[first : first + 32]
            padded = np.pad(part, (0, 32 - len(part)))[None].astype(np.int32)
            total += np.asarray(observe(padded))[:, : len(part)].sum(1)
    # Documents are cut into windows elsewhere here, so the context of some tokens differs.
    means = total / len(split.tokens)
    np.testing.assert_allclose(np.array(list(found.values())).T, means, rtol=0.02)
