"""Terms on states, maps and rows against their definitions in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from lm_jax.distill import router, terms
from lm_jax.distill.terms import CONTRAST_TEMPERATURE

B, T, D, E, X = 3, 7, 8, 12, 5


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def weights_and_segments():
    weights = (np.random.default_rng(1).random((B, T)) < 0.7).astype(np.float32)
    segments = np.sort(np.random.default_rng(2).integers(1, 4, (B, T)), -1).astype(np.int32)
    return weights, segments


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def test_squared_error_of_a_normalised_target():
    weights, _ = weights_and_segments()
    y, target = normal(B, T, E), 7 * normal(B, T, E, seed=1)
    total = terms.squared_error(y, terms.normalised(target), weights)
    expected = (weights * ((y - rms(target)) ** 2).mean(-1)).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    nothing = terms.squared_error(0 * y, terms.normalised(target), weights)
    np.testing.assert_allclose(nothing / weights.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("term", [terms.squared_error, terms.contrastive, terms.attention])
def test_padding_may_hold_anything(term):
    weights, _ = weights_and_segments()
    y, target = normal(B, T, E), normal(B, T, E, seed=1)
    of_y = jax.jit(jax.value_and_grad(lambda *given: jax.tree.leaves(term(*given, weights))[0]))
    clean, gradient = of_y(y, target)
    y[weights == 0] = target[weights == 0] = np.nan
    found = of_y(y, target)
    assert found[0] == clean
    np.testing.assert_array_equal(found[1], gradient)


@pytest.mark.parametrize(
    ("student", "teacher", "chosen"),
    [(2, 4, [1, 3]), (3, 3, [0, 1, 2]), (4, 2, [0, 0, 1, 1]), (3, 7, [2, 4, 6]), (1, 6, [5])],
)
def test_layers_are_as_deep(student, teacher, chosen):
    assert terms.as_deep(student, teacher) == chosen


def test_layers_are_weighed_by_learned_shares():
    weights, _ = weights_and_segments()
    ys, targets = normal(3, B, T, E), normal(3, B, T, E, seed=1)
    share = np.array([0.5, -1.0, 2.0], np.float32)
    total = terms.layers(ys, targets, jnp.asarray(share), weights)
    each = [terms.squared_error(y, t, weights) for y, t in zip(ys, targets, strict=True)]
    np.testing.assert_allclose(total, softmax(share) @ np.array(each), rtol=1e-5)


def maps(q, k, segments, window=T):
    """Mean over heads of causal attention inside segments, position by position."""
    H, C = q.shape[2:]
    out = np.zeros((B, T, T))
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] and t - s < window]
        scores = [q[b, t, h] @ k[b, s, h * k.shape[2] // H] / np.sqrt(C) for s in seen]
        out[b, t, seen] += softmax(scores) / H
    return out


def test_attention_maps_and_their_divergence():
    weights, segments = weights_and_segments()
    mine = normal(B, T, 4, 6), normal(B, T, 2, 6)
    theirs = normal(B, T, 2, 8, seed=1), normal(B, T, 2, 8, seed=1)
    log_map, divergence = jax.jit(terms.log_map), jax.jit(terms.attention)
    logs = [log_map(*pair, segments) for pair in (mine, theirs)]
    q, p = (maps(*pair, segments) for pair in (mine, theirs))
    np.testing.assert_allclose(np.exp(logs[0]), q, atol=1e-6)
    narrow = np.exp(terms.log_map(*mine, segments, 2))
    np.testing.assert_allclose(narrow, maps(*mine, segments, 2), atol=1e-6)
    total = divergence(*logs, weights)
    there = p > 0
    kl = np.where(there, p * np.log(np.where(there, p, 1) / np.where(there, q, 1)), 0).sum(-1)
    np.testing.assert_allclose(total, (weights * kl).sum(), rtol=1e-5)
    assert divergence(logs[0], logs[0], weights) == 0
    grads = jax.grad(divergence, (0, 1))(*logs, weights)
    assert np.isfinite(grads[0]).all() and grads[0].any() and not grads[1].any()


def test_contrastive_finds_rows():
    weights, _ = weights_and_segments()
    weights[1] = 0  # a row without a token is no candidate
    y, target = normal(B, T, E), normal(B, T, E, seed=1)
    u, v = ((weights[..., None] * a).sum(1) for a in (y, target))
    u, v = (a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-9) for a in (u, v))
    scores = (u @ v.T / CONTRAST_TEMPERATURE)[[0, 2]][:, [0, 2]]
    contrastive = jax.jit(terms.contrastive)
    nats, hits = contrastive(y, target, weights)
    np.testing.assert_allclose(nats, -np.diagonal(log_softmax(scores, -1)).sum(), rtol=1e-4)
    assert hits == (scores.argmax(-1) == np.arange(2)).sum()
    nats, hits = contrastive(y, y, weights)
    assert hits == 2 and nats < 0.1
    same = jnp.ones((B, T, E))
    nats, _ = contrastive(same, same, jnp.ones((B, T)))
    np.testing.assert_allclose(nats / B, np.log(B), rtol=1e-5)  # chance


def test_choices_grow_and_are_renormalised():
    scores = jnp.asarray(normal(B, T, X))
    for k in (1, 2, X):
        whole, chosen = jax.jit(router.choices)(scores, jnp.asarray(0.5), jnp.asarray(k))
        np.testing.assert_allclose(whole, softmax(2 * scores, -1), rtol=1e-5)
        np.testing.assert_allclose(chosen.sum(-1), 1, rtol=1e-5)
        assert ((chosen > 0).sum(-1) == k).all()
        best = np.sort(whole, -1)[..., ::-1][..., :k].sum(-1)
        np.testing.assert_allclose(chosen.max(-1), whole.max(-1) / best, rtol=1e-5)


def test_balance():
    weights, _ = weights_and_segments()
    even = jnp.full((B, T, X), 1 / X)
    assert abs(router.balance_experts(even, jnp.asarray(weights))) < 1e-5
    uneven = jnp.asarray(softmax(normal(B, T, X), -1))
    mean = (weights[..., None] * uneven).sum((0, 1)) / weights.sum()
    total = router.balance_experts(uneven, jnp.asarray(weights))
    expected = -np.log(X) - np.log(mean).mean()
    np.testing.assert_allclose(total / weights.sum(), expected, rtol=1e-4)
    assert router.balance_experts(uneven, jnp.zeros((B, T))) == 0


def routed(module, x, teacher, experts, segments, weights, k=2.0):
    call = jax.jit(functools.partial(module, temperature=jnp.asarray(0.7), k=jnp.asarray(k)))
    return call(*(jnp.asarray(a) for a in (x, teacher, experts, segments, weights)))


def test_router_against_its_equations():
    weights, segments = weights_and_segments()
    module = router.Router(D, E, E, X, nnx.Rngs(params=0))
    x, teacher, experts = normal(B, T, D), 3 * normal(B, T, E), 5 * normal(X, B, T, E)
    found = routed(module, x, teacher, experts, segments, weights)

    def m(layer):
        return np.asarray(getattr(module, layer).kernel[...], np.float64)

    t = rms(teacher)
    gap = np.concatenate([x, t @ m("narrow")], -1) @ m("gap")
    scores = 0.4 * (x @ m("capacity")) + 0.3 * gap + 0.3 * (t @ m("expert"))
    whole = softmax(scores / 0.7, -1)
    kept = np.where(whole >= np.sort(whole, -1)[..., -2:-1], whole, 0)
    kept /= kept.sum(-1, keepdims=True)
    target = np.einsum("btx,xbte->bte", kept, rms(experts))
    feature = (weights * ((x @ m("project") - target) ** 2).mean(-1)).sum()
    np.testing.assert_allclose(found["routed_feature"], feature, rtol=1e-4)

    c = target @ (E**-0.5 * np.float64(jax.random.normal(jax.random.key(0), (E, D))))
    q, H = x @ m("query"), router.HEADS
    F = c.shape[-1] // H
    total = 0.0
    for b, t in np.ndindex(B, T):
        before = [s for s in range(t) if segments[b, s] == segments[b, t]]
        if not before:
            continue
        heads = []
        for h in range(H):
            part = slice(h * F, (h + 1) * F)
            p = softmax([q[b, t, part] @ c[b, s, part] / np.sqrt(F) for s in before])
            heads.append(p @ c[b, before, part])
        y = np.concatenate(heads) @ m("out")
        total += weights[b, t] * ((y - rms(c[b, t])) ** 2).mean()
    np.testing.assert_allclose(found["routed_attention"], total, rtol=1e-4)


def test_router_gives_teacher_arrays_no_gradient_and_does_not_look_ahead():
    weights, segments = weights_and_segments()
    module = router.Router(D, E, E, X, nnx.Rngs(params=0))
    x, teacher, experts = (
        jnp.asarray(a) for a in (normal(B, T, D), normal(B, T, E), normal(X, B, T, E))
    )

    def total(x, teacher, experts):
        return sum(routed(module, x, teacher, experts, segments, weights).values())

    grads = jax.jit(jax.grad(total, (0, 1, 2)))(x, teacher, experts)
    assert grads[0].any() and not grads[1].any() and not grads[2].any()
    # The error at a position depends on nothing behind it.
    first = np.zeros_like(weights)
    first[:, :4] = 1
    cut = (slice(None), slice(4, None))
    other = [np.array(a) for a in (x, teacher, experts)]
    for array, where in zip(other, (cut, cut, (slice(None), *cut)), strict=True):
        array[where] = 9.0
    before, after = (routed(module, *a, segments, first) for a in ((x, teacher, experts), other))
    for name in ("routed_feature", "routed_attention"):
        np.testing.assert_array_equal(before[name], after[name])
