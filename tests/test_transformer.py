import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm_jax import loss
from lm_jax.kernels.attention import attend
from lm_jax.kernels.dropout import Draw
from lm_jax.kernels.rowwise import along_last, normalise, swiglu
from lm_jax.models.families import create_model
from lm_jax.models.layers import Norm, add_bias
from lm_jax.models.rotary import rotary
from lm_jax.models.transformer import offset_keys
from lm_jax.objective import NextToken
from tests.helpers import FAMILIES, every, random_batch, randomise, thirds, tiny_config

V = 29


def build(seed=0, impl="reference", **changes):
    cfg = tiny_config(**changes)
    graphdef, init = create_model(cfg, V, impl)
    return cfg, graphdef, randomise(jax.eval_shape(init, jax.random.key(seed)), seed)


def logits(graphdef, params, batch, **kwargs):
    @jax.jit  # op by op takes longer, most of it compiling each
    def forward(params, batch):
        model = nnx.merge(graphdef, params)
        b = loss.shift(batch)
        return model.logits(model(b.inputs, b.segment_ids, b.positions, **kwargs))

    return forward(params, batch)


def one_document(rng, rows=3, width=12):
    return random_batch(rng, (rows, width), V, documents=1)


@pytest.mark.parametrize("family", every(FAMILIES))
def test_later_tokens_change_nothing_before(family):
    _, graphdef, params = build(**FAMILIES[family])
    rng = np.random.default_rng(0)
    batch = one_document(rng)
    f = jax.jit(lambda tokens: logits(graphdef, params, {**batch, "tokens": tokens}))
    before = f(batch["tokens"])
    for cut in (1, 3, 5, 7, 10):
        changed = batch["tokens"].copy()
        changed[:, cut:] = rng.integers(1, V, changed[:, cut:].shape)
        after = f(changed)
        np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
        assert (np.abs(before[:, cut:] - after[:, cut:]).max(axis=(1, 2)) > 1e-3).all()


@pytest.mark.parametrize("family", every(FAMILIES))
def test_truncation_and_rows(family):
    _, graphdef, params = build(**FAMILIES[family])
    rng = np.random.default_rng(1)
    batch = one_document(rng)
    full = logits(graphdef, params, batch)
    for n in (1, 5):
        short = {k: v[:, : n + 1] for k, v in batch.items()}
        np.testing.assert_allclose(logits(graphdef, params, short), full[:, :n], atol=2e-5)
    alone = logits(graphdef, params, {k: v[1:2] for k, v in batch.items()})
    np.testing.assert_allclose(alone, full[1:2], atol=2e-5)


@pytest.mark.parametrize("family", every(FAMILIES))
def test_context_is_used(family):
    _, graphdef, params = build(**FAMILIES[family])
    batch = one_document(np.random.default_rng(2))
    changed = {**batch, "tokens": batch["tokens"].copy()}
    changed["tokens"][:, 0] = (changed["tokens"][:, 0] % (V - 1)) + 1
    difference = np.abs(logits(graphdef, params, batch) - logits(graphdef, params, changed))
    assert (difference[:, 5].max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("family", every(FAMILIES))
def test_documents_do_not_see_each_other(family):
    _, graphdef, params = build(**FAMILIES[family])
    rng = np.random.default_rng(3)
    batch = one_document(rng)
    batch["segment_ids"][:, 5:] = 2
    packed = logits(graphdef, params, batch)
    changed = {**batch, "tokens": batch["tokens"].copy()}
    changed["tokens"][:, :5] = rng.integers(1, V, (3, 5))
    np.testing.assert_array_equal(packed[:, 5:], logits(graphdef, params, changed)[:, 5:])
    alone = {k: v[:, 5:] for k, v in batch.items()}
    np.testing.assert_allclose(packed[:, 5:], logits(graphdef, params, alone), atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "musota"])
def test_padding_before_the_text_is_not_seen(family):
    """As in the first window of an epoch whose windows are moved, also where documents mix."""
    options = dict(data__document_mask=False, data__window_offset=True)
    _, graphdef, params = build(**FAMILIES[family] | options)
    batch = one_document(np.random.default_rng(4))
    batch["segment_ids"][:, :5] = 0
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][:, :5] = (batch["tokens"][:, :5] + 3) % V
    a, b = (np.asarray(logits(graphdef, params, x))[:, 5:] for x in (batch, other))
    np.testing.assert_array_equal(a, b)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    y = jnp.zeros((70_000, 1), jnp.float16)
    _, backward = jax.vjp(lambda bias: add_bias(y, bias), jnp.zeros((1, 1)))
    assert backward(jnp.ones_like(y))[0] == 70_000  # beyond float16


def test_scan_and_remat_are_the_same_function():
    _, graphdef, params = build()
    _, scanned_def, _ = build(model__scan_layers=True)
    _, remat_def, _ = build(model__remat=True)
    batch = random_batch(np.random.default_rng(4), (3, 12), V)

    def grads(graphdef, params):
        def total(params):
            return NextToken(graphdef).scored(params, batch).objective

        return jax.jit(jax.value_and_grad(total))(params)

    value, grad = grads(graphdef, params)
    for other in (scanned_def, remat_def):
        other_value, other_grad = grads(other, params)
        np.testing.assert_allclose(value, other_value, rtol=1e-6)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
        jax.tree.map(close, other_grad, grad)


def test_tied_table_is_one_leaf():
    _, _, tied = build()
    _, _, untied = build(model__tied=False)
    count = lambda params: sum(x.size for x in jax.tree.leaves(params))  # noqa: E731
    assert count(untied) - count(tied) == V * 16
    assert "head" not in tied


def test_grouped_heads_repeat_in_order():
    rng = np.random.default_rng(5)
    q = rng.normal(size=(2, 7, 6, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 7, 3, 4)).astype(np.float32)
    ids = np.ones((2, 7), np.int32)
    grouped = attend(q, k, v, segment_ids_BT=ids, impl="reference")
    for head in range(6):
        one = slice(head // 2, head // 2 + 1)
        alone = attend(
            q[:, :, head : head + 1],
            k[:, :, one],
            v[:, :, one],
            segment_ids_BT=ids,
            impl="reference",
        )
        np.testing.assert_allclose(grouped[:, :, head : head + 1], alone, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 17])
def test_attention_against_a_loop(length):
    rng = np.random.default_rng(6)
    q, k, v = rng.normal(size=(3, 2, length, 2, 4))
    ids = np.sort(rng.integers(1, 3, (2, length)))
    ids[1, length // 2 :] = 0
    expected = np.zeros((2, length, 2, 4))
    for b, t, h in np.ndindex(2, length, 2):
        seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t] > 0]
        if seen:
            score = np.array([q[b, t, h] @ k[b, s, h] for s in seen]) / 2
            weight = np.exp(score - score.max())
            expected[b, t, h] = weight @ v[b, seen, h] / weight.sum()
    for impl in ("reference", "xla"):
        attended = jax.jit(functools.partial(attend, segment_ids_BT=ids, impl=impl))
        out = attended(*np.float32((q, k, v)))
        np.testing.assert_allclose(out, expected, atol=2e-6)

    def total(q, impl):
        out = attend(q, np.float32(k), np.float32(v), segment_ids_BT=ids, impl=impl)
        return (out**2).sum()

    for impl in ("reference", "xla"):
        grad = jax.jit(jax.grad(total), static_argnums=1)(jnp.float32(q), impl)
        np.testing.assert_array_equal(grad[1, length // 2 :], 0)
        assert np.isfinite(grad).all()


def test_offset_keys_are_half_those_of_the_token_before():
    k_BKTC = jnp.arange(2 * 3 * 8.0).reshape(1, 2, 3, 8)
    found = offset_keys(k_BKTC, jnp.array([[[0, 1, 0]]]))
    before, own = [2, 3, 6, 7], [0, 1, 4, 5]  # of the pairs (i, i + 4) the slower two
    np.testing.assert_array_equal(found[..., 1, before], k_BKTC[..., 0, before])
    np.testing.assert_array_equal(found[..., own], k_BKTC[..., own])
    for first in (0, 2):  # of a document
        np.testing.assert_array_equal(found[..., first, :], k_BKTC[..., first, :])


def test_what_starts_at_zero_changes_nothing():
    batch = one_document(np.random.default_rng(4))
    added = dict(model__embedding_values=True, model__embedding_skip=True, model__head_gate=True)
    graphdef, init = create_model(tiny_config(**added), V, "reference")
    params = init(jax.random.key(0))
    found = logits(graphdef, params, batch)
    del params["blocks"]["skip"]
    for name in ("gate", "embedded_norm", "embedded_values"):
        del params["blocks"]["attention"][name]
    graphdef, _ = create_model(tiny_config(), V, "reference")
    np.testing.assert_allclose(found, logits(graphdef, params, batch), rtol=1e-5, atol=1e-6)


def test_rotary_depends_on_distance_only():
    rng = np.random.default_rng(7)
    q, k = rng.normal(size=(2, 1, 9, 2, 8)).astype(np.float32)
    positions = np.arange(9)[None]

    def scores(shift):
        a, b = (rotary(x, positions + shift, 100.0) for x in (q, k))
        return np.einsum("bthc,bshc->bhts", a, b)

    np.testing.assert_allclose(scores(0), scores(13), atol=1e-4)
    assert np.abs(scores(0) - np.einsum("bthc,bshc->bhts", q, k)).max() > 0.1


@pytest.mark.parametrize("rate", thirds(["attention_dropout", "dropout", "embedding_dropout"]))
def test_dropout_is_off_without_a_key_and_fresh_with_each(rate):
    _, graphdef, params = build(**{f"model__{rate}": 0.3})
    _, plain, _ = build()
    batch = one_document(np.random.default_rng(8))
    off = logits(graphdef, params, batch)
    np.testing.assert_array_equal(off, logits(plain, params, batch))
    a, b, again = (logits(graphdef, params, batch, draw=Draw(jax.random.key(i))) for i in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 1e-3 and np.abs(a - off).max() > 1e-3


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_the_epsilon_of_a_norm_is_added_to_the_mean_square(kind):
    x = np.random.default_rng(12).normal(size=(3, 8)).astype(np.float32)
    centred = x - (x.mean(-1, keepdims=True) if kind == "layernorm" else 0)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(Norm(8, kind, False, 0.5)(x), expected, rtol=1e-5)


def test_the_configured_epsilon_reaches_every_norm():
    _, graphdef, params = build(**FAMILIES["grouped"] | {"model__norm_eps": 0.25})
    model = nnx.merge(graphdef, params)
    found = [node.eps for _, node in nnx.iter_graph(model) if isinstance(node, Norm)]
    assert found == [0.25] * (4 + 1)  # a layer has four, q and k among them


def test_softcap_bounds_logits():
    _, graphdef, params = build(model__logit_softcap=0.5)
    out = logits(graphdef, params, one_document(np.random.default_rng(9)))
    assert 0.4 < np.abs(out).max() <= 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_follows_float32(dtype):
    _, graphdef, params = build()
    params = jax.tree.map(lambda x: x / 3, params)
    batch = one_document(np.random.default_rng(10))
    wide = logits(graphdef, params, batch)
    low = logits(graphdef, params, batch, dtype=jnp.dtype(dtype))
    assert low.dtype == jnp.float32
    eps = float(jnp.finfo(dtype).eps)
    assert 0 < np.abs(low - wide).max() < 20 * eps * np.abs(wide).max()


def test_initialisation_is_declared():
    cfg = tiny_config(model__d_model=64, model__init="normal", model__tied=False)
    _, init = create_model(cfg, 500, "reference")
    params = jax.jit(init)(jax.random.key(0))
    block = jax.tree.map(lambda x: x[1], params["blocks"])
    residual = 0.02 / np.sqrt(2 * cfg.model.layers)
    for leaf, std in (
        (params["embedding"], 0.02),
        (params["head"]["kernel"], 0.02),
        (block["attention"]["qkv"]["kernel"], 0.02),
        (block["attention"]["out"]["kernel"], residual),
        (block["mlp"]["down"]["kernel"], residual),
    ):
        assert abs(leaf.std() / std - 1) < 5 / np.sqrt(leaf.size)
    layers = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(cfg.model.layers)]
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves((params, layers)) if x.std() > 0]
    assert len(set(leaves)) == len(leaves)


def test_table_gradient_is_summed_in_float32():
    """Summed in bfloat16, a token that occurs 4096 times would stop counting at 256."""
    cfg, graphdef, params = build()
    ones = np.ones((64, 64), np.int32)

    def total(params):
        model = nnx.merge(graphdef, params)
        positions = np.zeros_like(ones)
        return model(ones, ones, positions, dtype=jnp.bfloat16).astype(jnp.float32).sum()

    wide = jax.grad(total)(jax.tree.map(lambda x: x / 3, params))["embedding"][1]

    def total_float32(params):
        model = nnx.merge(graphdef, params)
        return model(ones, ones, np.zeros_like(ones)).sum()

    exact = jax.grad(total_float32)(jax.tree.map(lambda x: x / 3, params))["embedding"][1]
    assert np.abs(wide - exact).max() < 0.05 * np.abs(exact).max()


def test_scan_compiles_one_block_whatever_the_depth():
    def size(layers):
        _, graphdef, params = build(model__layers=layers, model__scan_layers=True)
        batch = one_document(np.random.default_rng(11))
        return len(str(jax.make_jaxpr(lambda p: logits(graphdef, p, batch))(params)).splitlines())

    assert size(2) == size(6)


@pytest.mark.parametrize("centred", [False, True])
def test_gradients_of_their_own_are_those_of_autodiff(centred):
    with jax.enable_x64(True):
        rng = np.random.default_rng(12)
        x, g = rng.standard_normal((2, 3, 4, 10)), rng.standard_normal((2, 3, 4, 10))
        scale, bias = rng.standard_normal((2, 10))

        def plain(x, scale, bias):
            x = x - x.mean(-1, keepdims=True) if centred else x
            y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
            return y * along_last(scale, x) + along_last(bias, x)

        y, pull = jax.vjp(lambda *args: normalise(*args, centred, 1e-3), x, scale, bias)
        expected, pull_plain = jax.vjp(plain, x, scale, bias)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
        jax.tree.map(close, (y, pull(g)), (expected, pull_plain(g)))

        def gated(x):
            return jax.nn.silu(x[..., :5]) * x[..., 5:]

        y, pull = jax.vjp(swiglu, x)
        expected, pull_plain = jax.vjp(gated, x)
        jax.tree.map(close, (y, pull(y)), (expected, pull_plain(y)))
