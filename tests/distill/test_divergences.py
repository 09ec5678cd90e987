"""Divergences over a support: against float64 definitions, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from lm_jax.kernels import divergences
from lm_jax.kernels.linear_divergence import Groups, Member, linear_divergence
from lm_jax.kernels.linear_loss import linear_cross_entropy
from tests.helpers import thirds

B, T, D, E, V = 2, 5, 6, 4, 23
KINDS = ("forward", "reverse", "jsd", "skew")


def inputs(seed=0, V=V, std=1.0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(B, T, D)), rng.normal(size=(B, T, E))
    head, other = std * rng.normal(size=(V, D)), std * rng.normal(size=(V, E))
    weights = rng.random((B, T)) * (rng.random((B, T)) < 0.8)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return [jnp.asarray(a, np.float32) for a in (x, head, y, other, weights)] + [targets]


def exact(log_p, log_q, kind, beta=0.3):
    """The definition, in float64 probabilities."""
    p, q = np.exp(np.float64(log_p)), np.exp(np.float64(log_q))
    m = beta * p + (1 - beta) * q

    def kl(a, b):
        return np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / b), 0).sum(-1)

    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "skew": lambda: kl(p, m),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
    }[kind]()


def logits(x, head):
    return np.float64(x) @ np.float64(head).T


def run(teacher, x, head, weights, targets=None, **options):
    options = {"kind": "forward", "beta": 0.3, "chunk_rows": 4, **options}
    return linear_divergence(x, head, teacher, weights, targets, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_full_vocabulary(kind, temperature=3.0):
    x, head, y, other, weights, _ = inputs()
    log_p, log_q = (log_softmax(logits(*a) / temperature, -1) for a in ((y, other), (x, head)))
    expected = (np.float64(weights) * exact(log_p, log_q, kind)).sum()
    found = run([Member(y, other)], x, head, weights, kind=kind, temperature=temperature)
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-5)
    np.testing.assert_allclose(found.objective, temperature**2 * expected, rtol=1e-5)
    np.testing.assert_allclose(found.count, weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_kept_ids_and_the_rest(kind):
    x, head, y, other, weights, _ = inputs(1)
    log_p, log_q = (log_softmax(logits(*a) / 2, -1) for a in ((y, other), (x, head)))
    k = 5
    ids = np.argsort(-log_p, -1)[..., :k]

    def classes(log_a):
        rest = np.ones(log_a.shape, bool)
        np.put_along_axis(rest, ids, False, -1)
        others = logsumexp(np.where(rest, log_a, -np.inf), -1, keepdims=True)
        return np.concatenate([np.take_along_axis(log_a, ids, -1), others], -1)

    expected = (np.float64(weights) * exact(classes(log_p), classes(log_q), kind)).sum()
    options = dict(kind=kind, temperature=2.0, top_k=k, support="top_k")
    live = run([Member(y, other)], x, head, weights, **options)
    np.testing.assert_allclose(live.divergence, expected, rtol=1e-5)
    kept = divergences.Kept(jnp.asarray(ids), jnp.asarray(classes(log_p), np.float32))
    from_disk = run(kept, x, head, weights, kind=kind, temperature=2.0)
    np.testing.assert_allclose(from_disk.divergence, expected, rtol=1e-5)


def test_the_remainder_is_exact_where_it_is_tiny():
    z = jnp.asarray([[40.0, 39.0, 1.0, 0.0, -2.0]])
    log_p = jax.nn.log_softmax(z)
    kept = divergences.most_likely(log_p, 2)
    expected = logsumexp(np.float64(z)[0, 2:]) - logsumexp(np.float64(z)[0])
    np.testing.assert_allclose(kept.log_p_BTj[0, 2], expected, rtol=1e-6)  # 1 - p would be 0
    np.testing.assert_array_equal(kept.ids_BTk, [[0, 1]])


@pytest.mark.parametrize("kind", ["forward", "skew"])
@pytest.mark.parametrize("support", ["top_k", "union"])
def test_all_ids_are_the_full_vocabulary(kind, support):
    x, head, y, other, weights, _ = inputs(2)
    teacher = [Member(y, other)]

    def value(x, head, **options):
        return run(teacher, x, head, weights, kind=kind, **options).objective

    whole = jax.value_and_grad(value, (0, 1))(x, head)
    cut = jax.value_and_grad(lambda *a: value(*a, support=support, top_k=V), (0, 1))(x, head)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_a_union_counts_each_id_once():
    x, head, y, other, weights, _ = inputs(3)
    log_p, log_q = (log_softmax(logits(*a), -1) for a in ((y, other), (x, head)))
    k, expected = 4, 0.0
    for b, t in np.ndindex(B, T):
        ids = sorted({*np.argsort(-log_p[b, t])[:k], *np.argsort(-log_q[b, t])[:k]})
        mine = [log_softmax(a[b, t, ids]) for a in (log_p, log_q)]
        expected += float(weights[b, t]) * exact(*mine, "forward")
    found = run([Member(y, other)], x, head, weights, support="union", top_k=k)
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    thirds(
        [(kind, {}) for kind in KINDS]
        + [("reverse", {"support": support, "top_k": 3}) for support in ("top_k", "union")]
    ),
)
def test_gradient_against_central_differences(kind, options):
    with jax.enable_x64(True):
        x, head, y, other, weights, targets = (jnp.asarray(np.asarray(a)) for a in inputs(4))
        x, head, y, other, weights = (a.astype(jnp.float64) for a in (x, head, y, other, weights))

        def f(x, head):
            return run(
                [Member(y, other, 5.0)], x, head, weights, targets,
                kind=kind, temperature=1.5, kd=0.7, lm=0.3, softcap=4.0, **options,
            ).objective  # fmt: skip

        grads = jax.grad(f, (0, 1))(x, head)
        rng = np.random.default_rng(0)
        for _ in range(3):
            direction = [jnp.asarray(rng.normal(size=a.shape)) for a in (x, head)]
            slope = sum(jnp.vdot(g, u) for g, u in zip(grads, direction, strict=True))
            ends = [f(x + s * direction[0], head + s * direction[1]) for s in (1e-6, -1e-6)]
            np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-6)


def test_the_two_parts_are_those_of_the_pure_losses():
    x, head, y, other, weights, targets = inputs(5)
    both = run([Member(y, other)], x, head, weights, targets, temperature=2.0, kd=0.25, lm=0.5)
    plain = linear_cross_entropy(x, head, targets, weights)
    alone = run([Member(y, other)], x, head, weights, temperature=2.0)
    np.testing.assert_allclose(both.nats, plain.nats, rtol=1e-6)
    np.testing.assert_allclose(both.correct, plain.correct, rtol=1e-6)
    np.testing.assert_allclose(both.divergence, alone.divergence, rtol=1e-6)
    expected = 0.25 * 4 * alone.divergence + 0.5 * plain.nats
    np.testing.assert_allclose(both.objective, expected, rtol=1e-6)


def test_members_teach_by_their_mean_probability():
    x, head, y, other, weights, _ = inputs(6)
    _, _, y2, other2, _, _ = inputs(7)
    log_ps = [log_softmax(logits(*a), -1) for a in ((y, other), (y2, other2))]
    log_p = np.log(np.mean(np.exp(log_ps), 0))
    expected = (
        np.float64(weights) * exact(log_p, log_softmax(logits(x, head), -1), "forward")
    ).sum()
    found = run([Member(y, other), Member(y2, other2)], x, head, weights)
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_groups_of_ids(temperature):
    """The temperature is that of the groups: equal groups have no divergence at any."""
    x, head, y, other, weights, _ = inputs(8)
    other = other[:17]  # another vocabulary
    groups = 4
    mine = np.array([*range(groups), groups, *np.random.default_rng(0).integers(0, 5, V - 5)])
    theirs = np.array([*range(groups), groups, *np.random.default_rng(1).integers(0, 5, 12)])
    aligned = np.random.default_rng(2).integers(0, 2, (B, T)).astype(np.float32)

    def by_group(log_a, of):
        sums = np.stack([np.exp(log_a[..., of == g]).sum(-1) for g in range(groups)], -1)
        return log_softmax(np.log(sums) / temperature, -1)

    log_p = by_group(log_softmax(logits(y, other), -1), theirs)
    log_q = by_group(log_softmax(logits(x, head), -1), mine)
    expected = (np.float64(weights) * aligned * exact(log_p, log_q, "forward")).sum()
    given = Groups(jnp.asarray(mine), jnp.asarray(theirs), groups, jnp.asarray(aligned))
    found = run([Member(y, other)], x, head, weights, groups=given, temperature=temperature)
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-5)


@pytest.mark.parametrize("k", [0, V + 1])
def test_more_ids_than_there_are(k):
    x, head, y, other, weights, _ = inputs()
    with pytest.raises(ValueError, match=f"top_k: {k} is not between 1 and the {V} ids"):
        run([Member(y, other)], x, head, weights, support="top_k", top_k=k)


def test_the_temperature_keeps_the_size_of_the_gradient():
    """Between T = 2 and T = 8 the T^2-scaled gradient changes by less than 30 % in norm."""
    x, head, y, other, weights, _ = inputs(9, V=257, std=0.5)
    norms = {}
    for temperature in (2.0, 8.0):
        grad = jax.grad(
            lambda x, t=temperature: (
                run([Member(y, other)], x, head, weights, temperature=t).objective
            )
        )(x)
        norms[temperature] = float(jnp.linalg.norm(grad))
    assert abs(norms[8.0] / norms[2.0] - 1) <= 0.3
