"""Linear layer and loss in one operation: equal to the plain form, without its array."""

import math
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.kernels import linear_loss
from lm_jax.kernels.chunks import rows_per_chunk
from lm_jax.kernels.linear_divergence import Member, linear_divergence
from lm_jax.kernels.linear_loss import linear_cross_entropy
from lm_jax.models.layers import head_logits
from tests.differences import check_gradient
from tests.helpers import equations, thirds

B, T, D, V = 3, 11, 8, 97
EPS = float(np.finfo(np.float32).eps)
PLAIN = dict(softcap=0.0, z_loss=0.0, label_smoothing=0.0)
OPTIONS = dict(softcap=5.0, z_loss=1e-2, label_smoothing=0.1)
KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.2)]


def inputs(seed=0, B=B, T=T, D=D, V=V, dtype=np.float32, std=1.0):
    """Hidden states in `dtype`, a float32 head, ids, and weights of which some are 0."""
    rng = np.random.default_rng(seed)
    x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head_VD = jnp.asarray(std * rng.normal(size=(V, D)), np.float32)
    targets_BT = jnp.asarray(rng.integers(0, V, (B, T)), np.int32)
    weights_BT = rng.random((B, T)) * (rng.random((B, T)) < 0.8)
    return x_BTD, head_VD, targets_BT, jnp.asarray(weights_BT, np.float32)


def plain_cross_entropy(
    x_BTD, head_VD, targets_BT, weights_BT, *, softcap, z_loss, label_smoothing
):
    """The definition, from all logits at once, for JAX to differentiate."""
    z_BTV = head_logits(x_BTD, head_VD, softcap)
    lse_BT = jax.nn.logsumexp(z_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(z_BTV, targets_BT[..., None], axis=-1)[..., 0]
    loss_BT = (1 - label_smoothing) * (lse_BT - picked_BT)
    loss_BT += label_smoothing * (lse_BT - z_BTV.mean(-1)) + z_loss * lse_BT**2
    return (weights_BT * loss_BT).sum()


def plain_divergence(x_BTD, head_VD, y_BTE, other_VE, weights_BT, *, kind, beta, temperature):
    """The definition in probabilities and not in logarithms."""
    q_BTV = jax.nn.softmax(head_logits(x_BTD, head_VD, 0.0) / temperature)
    p_BTV = jax.nn.softmax(head_logits(y_BTE, other_VE, 0.0) / temperature)

    def kl(a_BTV, b_BTV):
        return (a_BTV * jnp.log(a_BTV / b_BTV)).sum(-1)

    if kind == "jsd":
        m_BTV = beta * p_BTV + (1 - beta) * q_BTV
        value_BT = beta * kl(p_BTV, m_BTV) + (1 - beta) * kl(q_BTV, m_BTV)
    else:
        value_BT = kl(p_BTV, q_BTV) if kind == "forward" else kl(q_BTV, p_BTV)
    return (weights_BT * value_BT).sum()


run = jax.jit(linear_cross_entropy, static_argnames=(*PLAIN, "chunk_rows", "summed"))


def objective(x_BTD, head_VD, targets_BT, weights_BT, **options):
    return linear_cross_entropy(x_BTD, head_VD, targets_BT, weights_BT, **options).objective


def value_and_grads(f, *args, **options):
    """Value and gradients by the first two arguments, as float64 numpy arrays."""
    f = jax.value_and_grad(partial(f, **options), (0, 1))
    value, grads = jax.jit(f)(*args)
    assert [g.dtype for g in grads] == [a.dtype for a in args[:2]]
    return [np.asarray(a, np.float64) for a in (value, *grads)]


def in_float64(f, *args, **options):
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a
                for a in args]  # fmt: skip
        return value_and_grads(f, *map(jnp.asarray, wide), **options)


def assert_as_good(ours, plain, exact):
    """Our error is at most twice that of the plain form in the same dtype.

    Where the plain form is exact by chance, two units in the last place of a float32 are allowed.
    """
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        error, theirs = np.linalg.norm(a - c), np.linalg.norm(b - c)
        assert error <= 2 * theirs + 2 * EPS * np.linalg.norm(c), (i, error, theirs)


# Correctness of cross-entropy


def test_against_the_definition():
    x, head, targets, weights = inputs()
    z = np.float64(x) @ np.float64(head).T
    expected = dict(nats=0.0, smooth=0.0, lse2=0.0, count=0.0, correct=0.0)
    for b, t in np.ndindex(B, T):
        w, y = float(weights[b, t]), int(targets[b, t])
        log_p = z[b, t] - np.log(np.exp(z[b, t]).sum())
        expected["nats"] -= w * log_p[y]
        expected["smooth"] -= w * np.mean(log_p)
        expected["lse2"] += w * np.log(np.exp(z[b, t]).sum()) ** 2
        expected["count"] += w
        expected["correct"] += w * (z[b, t].argmax() == y)
    targets = targets.at[0, 0].set(z[0, 0].argmax())
    out = linear_cross_entropy(x, head, targets, weights, chunk_rows=7)
    assert out.correct >= weights[0, 0] > 0
    options = dict(z_loss=0.02, label_smoothing=0.3)
    x, head, targets, weights = inputs()
    out = linear_cross_entropy(x, head, targets, weights, chunk_rows=7, **options)
    whole = 0.7 * expected["nats"] + 0.3 * expected["smooth"] + 0.02 * expected["lse2"]
    np.testing.assert_allclose(out.objective, whole, rtol=1e-6)
    for name in ("nats", "count", "correct"):
        np.testing.assert_allclose(getattr(out, name), expected[name], rtol=1e-6)


@pytest.mark.parametrize("chunk_rows", [7, 9, 1024])  # 2, 3 or all of the positions at a time
def test_terms_of_the_sums(chunk_rows):
    x, head, targets, weights = inputs()
    terms = run(x, head, targets, weights, chunk_rows=chunk_rows, summed=False)
    log_p_BTV = jax.nn.log_softmax(head_logits(x, head, 0.0))
    nats_BT = -jnp.take_along_axis(log_p_BTV, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(terms.nats, weights * nats_BT, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(terms.count, weights)
    sums = run(x, head, targets, weights, chunk_rows=chunk_rows)
    for term_BT, total in zip(terms, sums, strict=True):
        np.testing.assert_allclose(term_BT.sum(), total, rtol=1e-6)


@pytest.mark.parametrize("options", [PLAIN, OPTIONS], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", thirds(["float64", "float32", "float16", "bfloat16"]))
def test_as_good_as_the_plain_form(dtype, options):
    args = inputs(V=203, D=16, dtype=dtype if dtype != "float64" else "float32")
    exact = in_float64(plain_cross_entropy, *args, **options)
    if dtype == "float64":
        ours = in_float64(objective, *args, chunk_rows=10, **options)
        for a, b in zip(ours, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        return
    ours = value_and_grads(objective, *args, chunk_rows=10, **options)
    plain = value_and_grads(plain_cross_entropy, *args, **options)
    assert_as_good(ours, plain, exact)


@pytest.mark.parametrize(
    ("V", "dtype"),
    thirds([(257, "float32"), (1, "float32")] + [(V, "bfloat16") for V in (1, 65, 63, 64, 257)]),
)
def test_any_vocabulary(V, dtype):
    args = inputs(V=V, dtype=dtype)
    exact = in_float64(plain_cross_entropy, *args, **OPTIONS)
    ours = value_and_grads(objective, *args, chunk_rows=15, **OPTIONS)
    plain = value_and_grads(plain_cross_entropy, *args, **OPTIONS)
    assert_as_good(ours, plain, exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_uniform_logits_cost_the_log_of_the_vocabulary(dtype):
    x, head, targets, weights = inputs(B=1, T=4, D=2, V=50_257, dtype=dtype)
    out = run(0 * x, head, targets, weights, chunk_rows=2)
    np.testing.assert_allclose(out.nats / out.count, math.log(50_257), rtol=1e-6)


@pytest.mark.parametrize(
    ("B", "T", "chunk_rows"),
    thirds(
        [(1, 1, 1), (1, 1, 8), (2, 7, 8), (2, 9, 8), (2, 8, 8), (2, 4, 8), (5, 3, 4), (1, 23, 1)]
        + [(3, 5, None)]
    ),
)
def test_any_length(B, T, chunk_rows):
    args = inputs(B=B, T=T)
    exact = in_float64(plain_cross_entropy, *args, **PLAIN)
    ours = value_and_grads(objective, *args, chunk_rows=chunk_rows)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_at_all(shape):
    x, head, targets, weights = inputs(B=shape[0], T=shape[1])
    value, dx, dhead = value_and_grads(objective, x, head, targets, weights)
    assert value == 0 and dx.shape == x.shape and not dhead.any()


@pytest.mark.parametrize("options", [PLAIN, OPTIONS], ids=["plain", "all"])
def test_against_central_differences(options):
    with jax.enable_x64(True):
        x, head, targets, weights = inputs(B=2, T=3, D=2, V=5)
        weights = weights.astype(jnp.float64).at[0, 0].set(0).at[1, 1].set(0.7)

        def f(arrays):
            return objective(*arrays, targets, weights, chunk_rows=4, **options)

        check_gradient(f, (x.astype(jnp.float64), head.astype(jnp.float64)))


def test_rows_of_weight_zero_may_hold_anything():
    x, head, targets, weights = inputs()
    off = weights == 0
    assert 3 < off.sum() < off.size - 3
    f = jax.jit(jax.value_and_grad(partial(objective, chunk_rows=9, **OPTIONS), (0, 1)))
    value, clean = f(x, head, targets, weights)
    for garbage, label in ((np.nan, -100), (np.inf, V), (1e30, 2**31 - 1)):
        x = jnp.where(off[..., None], garbage, x)
        targets = jnp.where(off, label, targets)
        again, dirty = f(x, head, targets, weights)
        assert again == value and not dirty[0][off].any()
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert np.isfinite(run(x, head, targets, weights)).all()


@pytest.mark.parametrize("label", [-100, -1, V, V + 3])
def test_a_scored_id_outside_the_vocabulary_is_loud(label):
    x, head, targets, weights = inputs()
    out = run(x, head, targets.at[1, 2].set(label), weights.at[1, 2].set(1))
    assert np.isnan(out.objective) and np.isnan(out.nats)


def test_weights_are_factors():
    x, head, targets, weights = inputs()
    a = value_and_grads(objective, x, head, targets, weights)
    b = value_and_grads(objective, x, head, targets, jnp.full_like(weights, 0.25))
    for w in (weights - 0.25, 3 * weights):  # some of the first are negative
        out = run(x, head, targets, w)
        np.testing.assert_allclose(out.count, w.sum(), rtol=1e-6)
    both = value_and_grads(objective, x, head, targets, weights - 0.25)
    for p, q, r in zip(a, b, both, strict=True):
        np.testing.assert_allclose(p - q, r, rtol=1e-5, atol=1e-5)


def test_nothing_scored_is_zero():
    x, head, targets, weights = inputs()
    x, weights = jnp.full_like(x, jnp.nan), jnp.zeros_like(weights)
    out = run(x, head, targets, weights, **OPTIONS)
    assert list(out) == [0, 0, 0, 0]
    assert not any(a.any() for a in value_and_grads(objective, x, head, targets, weights))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_extreme_logits(dtype):
    x = jnp.full((1, 2, 1), 100, dtype)
    head = jnp.asarray([[100.0], [-100.0], [0.0]])  # logits 1e4, -1e4, 0
    weights = jnp.ones((1, 2))
    out = run(x, head, jnp.asarray([[0, 1]]), weights)
    assert out.nats == 2e4 and out.correct == 1
    _, dx, dhead = value_and_grads(objective, x, head, jnp.asarray([[0, 1]]), weights)
    np.testing.assert_array_equal(dx[0, :, 0], [0, 200])
    np.testing.assert_array_equal(dhead[:, 0], [100, -100, 0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_and_the_head_gradient_are_float32(dtype):
    # A bfloat16 sum of 600 terms of ln V, or of as many gradients, is off by percents.
    x, head, targets, _ = inputs(B=1, T=600, V=5, dtype=dtype)
    x, weights = jnp.ones_like(x), jnp.ones((1, 600))
    out = run(x, 0 * head, 0 * targets, weights, chunk_rows=1)
    assert {a.dtype for a in out} == {jnp.dtype("float32")}
    np.testing.assert_allclose(out.nats, 600 * math.log(5), rtol=1e-6)
    _, _, dhead = value_and_grads(objective, x, 0 * head, 0 * targets, weights, chunk_rows=1)
    np.testing.assert_allclose(dhead[1:], 120, rtol=2e-3)
    np.testing.assert_allclose(dhead[0], -480, rtol=2e-3)


def test_small_probabilities_survive_float16():
    x, head, targets, weights = inputs(B=1, T=2, V=4096, std=0.01, dtype="float16")
    weights = jnp.full_like(weights, 1e-3)  # times 1/4096: 2.4e-7, the subnormals end at 6e-8
    exact = in_float64(plain_cross_entropy, x, head, targets, weights, **PLAIN)
    ours = value_and_grads(objective, x, head, targets, weights)
    others = np.setdiff1d(np.arange(4096), targets)
    error = np.linalg.norm((ours[2] - exact[2])[others]) / np.linalg.norm(exact[2][others])
    assert error < 1e-3


def test_only_the_objective_has_a_gradient():
    x, head, targets, weights = inputs()

    @jax.jit
    def gradients(x, head, weights):
        def reported(x, head):
            return tuple(linear_cross_entropy(x, head, targets, weights)[1:])

        by_weights = jax.grad(objective, 3)(x, head, targets, weights)
        return jax.jacrev(reported, (0, 1))(x, head), by_weights

    assert not any(g.any() for g in jax.tree.leaves(gradients(x, head, weights)))


def test_the_same_twice():
    args = inputs(T=40)
    f = jax.jit(jax.value_and_grad(partial(objective, chunk_rows=16), (0, 1)))
    jax.tree.map(np.testing.assert_array_equal, f(*args), f(*args))


# Transformations


def test_vmap_remat_and_scan():
    sets = [inputs(seed) for seed in range(3)]
    stacked = [jnp.stack(a) for a in zip(*sets, strict=True)]
    loss = partial(objective, chunk_rows=9, **OPTIONS)
    f, remat = (jax.value_and_grad(g, (0, 1)) for g in (loss, jax.checkpoint(loss)))

    @jax.jit
    def results(stacked):
        scanned = jax.lax.scan(lambda _, args: (None, f(*args)), None, stacked)[1]
        one_head = jax.vmap(f, (0, None, 0, 0))(stacked[0], stacked[1][0], *stacked[2:])
        return jax.vmap(f)(*stacked), jax.vmap(remat)(*stacked), scanned, one_head

    expected = [value_and_grads(loss, *args) for args in sets]
    for result in results(stacked)[:3]:
        for i, alone in enumerate(expected):
            for a, b in zip(jax.tree.leaves(result), alone, strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)
    value, (dx, dhead) = results(stacked)[3]
    alone = value_and_grads(loss, sets[2][0], sets[0][1], *sets[2][2:])
    for a, b in zip((value, dx, dhead), alone, strict=True):
        np.testing.assert_allclose(a[2], b, rtol=1e-5, atol=1e-6)


def traced(f, *args):
    return list(equations(jax.make_jaxpr(f)(*args).jaxpr))


def distil(x, head, y, other, weights, *, temperature=1.0, teacher_softcap=0.0, **options):
    """Without the factor temperature^2, unless given."""
    return linear_divergence(
        x,
        head,
        [Member(y, other, teacher_softcap)],
        weights,
        **{"kd": temperature**-2, "temperature": temperature, "chunk_rows": 12, **options},
    )


def divergence(*args, kind="jsd", **options):
    return distil(*args, kind=kind, **options).objective


def divergence_of(*args, **options):
    """The value alone, compiled as a whole."""
    return jax.jit(partial(divergence, **options))(*args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("f", "products"), [(partial(objective, chunk_rows=12), 1), (divergence, 2)]
)
def test_products_and_sizes(f, products, dtype):
    x, head, targets, weights = inputs(T=40, dtype=dtype)
    others = (x, head) if f is divergence else (targets,)
    for function, count in ((f, products), (jax.value_and_grad(f, (0, 1)), products + 2)):
        eqns = traced(function, x, head, *others, weights)
        dots = [path for path, eqn in eqns if eqn.primitive.name == "dot_general"]
        assert len(dots) == count and all("scan" in path for path in dots)
        # The head is cast once per call and not once per chunk.
        for path, eqn in eqns:
            if "scan" in path and eqn.primitive.name in ("convert_element_type", "pad"):
                assert eqn.outvars[0].aval.shape[:1] != head.shape[:1]
        largest = max(v.aval.size for _, eqn in eqns for v in eqn.outvars)
        assert largest < weights.size * V / 5


def test_temporary_memory():
    rows, D, V = 1024, 64, 5003
    shapes = [((8, rows // 8, D), "float32"), ((V, D), "float32"), ((8, rows // 8), "int32")]
    args = [jax.ShapeDtypeStruct(*s) for s in [*shapes, ((8, rows // 8), "float32")]]

    def temporary(f):
        compiled = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = temporary(partial(plain_cross_entropy, **PLAIN))
    assert temporary(partial(objective, chunk_rows=128)) < plain / 5


def test_rows_per_chunk():
    assert rows_per_chunk(100, 256) == rows_per_chunk(8192, 768) == 1024
    assert rows_per_chunk(65_536, 256) == 2048
    assert rows_per_chunk(65_536, 768) == 6144
    assert rows_per_chunk(10**6, 64) == 1024


# Divergences


def pair(dtype=np.float32, V=V, E=6, std=1.0, same=False):
    """Student, teacher of another width, and weights."""
    x, head, _, weights = inputs(1, V=V, dtype=dtype, std=std)
    y, other, _, _ = inputs(2, D=E, V=V, dtype=dtype, std=std)
    return (x, head, x, head, weights) if same else (x, head, y, other, weights)


@pytest.mark.parametrize(
    ("dtype", "kind", "beta"),
    thirds(
        [("float32", *k) for k in KINDS]
        + [(dtype, *KINDS[i]) for dtype, i in (("bfloat16", 1), ("float16", 0))]
        + [(dtype, *KINDS[3]) for dtype in ("bfloat16", "float16")]
    ),
)
def test_divergence_as_good_as_the_plain_form(kind, beta, dtype):
    args = pair(dtype)
    options = dict(kind=kind, beta=beta, temperature=2.0)
    exact = in_float64(plain_divergence, *args, **options)
    ours = value_and_grads(divergence, *args, **options)
    plain = value_and_grads(plain_divergence, *args, **options)
    assert_as_good(ours, plain, exact)
    count = distil(*args, **options).count
    np.testing.assert_allclose(count, args[-1].sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("V", "dtype"), [(1, "bfloat16"), (64, "bfloat16"), (65, "bfloat16"), (65, "float32")]
)
def test_divergence_of_any_vocabulary(V, dtype):
    x, head, y, other, weights = pair(dtype, V=V)
    y = y.astype(jnp.bfloat16)  # the teacher may have a dtype of its own
    options = dict(kind="jsd", beta=0.3, temperature=1.0)
    exact = in_float64(plain_divergence, x, head, y, other, weights, **options)
    ours = value_and_grads(divergence, x, head, y, other, weights, **options)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-2 * max(abs(b).max(), 1e-3))


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_divergence_against_central_differences(kind, beta):
    with jax.enable_x64(True):
        x, head, _, weights = inputs(B=2, T=3, D=2, V=5)
        y, other, _, _ = inputs(3, B=2, T=3, D=3, V=5)
        x, head, y, other, weights = (a.astype(jnp.float64) for a in (x, head, y, other, weights))
        caps = dict(softcap=3.0, teacher_softcap=2.0)

        def f(arrays):
            return divergence(
                *arrays, y, other, weights, kind=kind, beta=beta, temperature=1.5, **caps
            )

        check_gradient(f, (x, head))


@pytest.mark.parametrize("cap", [0.5, 3.0])
def test_divergence_caps_each_by_its_own(cap):
    x, head, y, other, weights = pair(same=True)
    args = (x, head, y, other, weights)
    both = divergence_of(*args, softcap=cap, teacher_softcap=cap)
    student = divergence_of(*args, softcap=cap)
    teacher = divergence_of(*args, teacher_softcap=cap)
    assert abs(both) < 1e-6 < 1e-2 < min(student, teacher)
    np.testing.assert_allclose(student, teacher, rtol=1e-5)  # JSD with beta 1/2 is symmetric


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_divergence_of_equals_is_zero(kind, beta):
    value, dx, dhead = value_and_grads(divergence, *pair(same=True), kind=kind, beta=beta)
    assert abs(value) < 1e-6 and max(abs(dx).max(), abs(dhead).max()) < 1e-6
    value, dx, dhead = value_and_grads(divergence, *pair(), kind=kind, beta=beta)
    assert value > 1 and abs(dx).max() > 0.01 and abs(dhead).max() > 0.01


def test_forward_and_reverse_are_each_other():
    x, head, y, other, weights = pair()
    forward = divergence_of(x, head, y, other, weights, kind="forward")
    np.testing.assert_allclose(
        divergence_of(y, other, x, head, weights, kind="reverse"), forward, rtol=1e-5
    )
    assert abs(divergence_of(x, head, y, other, weights, kind="reverse") / forward - 1) > 0.01


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_gradient_shrinks_with_the_temperature_squared(kind):
    args = pair(std=0.5)
    norms = []
    for temperature in (2.0, 4.0, 8.0):
        _, dx, dhead = value_and_grads(divergence, *args, kind=kind, temperature=temperature)
        norms.append(temperature**2 * np.hypot(np.linalg.norm(dx), np.linalg.norm(dhead)))
    assert max(norms) < 1.3 * min(norms)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_teacher_gets_no_gradient(kind, beta):
    grads = jax.grad(partial(divergence, kind=kind, beta=beta), (2, 3, 4))(*pair())
    assert not any(g.any() for g in grads)
    x, head, y, other, weights = pair()
    changed = divergence_of(x, head, y, other + 1 - head[:, :6], weights, kind=kind, beta=beta)
    assert abs(changed - divergence_of(*pair(), kind=kind, beta=beta)) > 0.1


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_divergence_ignores_rows_of_weight_zero(kind, beta):
    x, head, y, other, weights = pair()
    off = (weights == 0)[..., None]
    clean = value_and_grads(divergence, x, head, y, other, weights, kind=kind, beta=beta)
    x, y = jnp.where(off, jnp.nan, x), jnp.where(off, -jnp.inf, y)
    dirty = value_and_grads(divergence, x, head, y, other, weights, kind=kind, beta=beta)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_divergence_of_extreme_logits_is_finite(kind, beta):
    x, y = jnp.full((1, 1, 1), 100.0), jnp.full((1, 1, 1), -100.0)
    head = jnp.asarray([[100.0], [-100.0], [0.0]])
    result = value_and_grads(divergence, x, head, y, head, jnp.ones((1, 1)), kind=kind, beta=beta)
    assert all(np.isfinite(a).all() for a in result)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)  # disjoint: the entropy
    np.testing.assert_allclose(result[0], bound if kind == "jsd" else 2e4, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="backward"), "kind: 'backward'"),
        (dict(kind="forward", temperature=0.0), "temperature: 0.0"),
        (dict(kind="jsd", beta=1.0), "beta: 1.0"),
    ],
)
def test_divergence_names_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        x, head, y, other, weights = pair()
        linear_divergence(x, head, [Member(y, other)], weights, **options)


def test_divergence_needs_one_vocabulary():
    x, head, y, other, weights = pair()
    with pytest.raises(ValueError, match="teacher: 96 tokens, but the student has 97"):
        distil(x, head, y, other[:-1], weights, kind="forward")


@pytest.mark.parametrize(
    "options",
    [dict(kind="reverse", temperature=2.0), dict(kind="forward", support="top_k", top_k=5)],
)
def test_a_gpu_has_the_gradient_of_divergence_and_targets(options, monkeypatch):
    x, head, y, other, weights = pair()
    targets = jax.random.randint(jax.random.key(5), weights.shape, 0, V)

    def gradients():
        def objective(x, head):
            return distil(x, head, y, other, weights, targets_BT=targets, lm=0.5, **options)[0]

        return jax.jit(jax.grad(objective, (0, 1)))(x, head)

    expected = gradients()
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(linear_loss.device, "target", lambda: gpu)
    for a, b in zip(gradients(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e38])
def test_a_gpu_reads_logits_once_for_maximum_and_sum(size, monkeypatch):
    z_NV = size * jax.random.normal(jax.random.key(0), (7, 1003))
    z_NV = z_NV.at[3].set(-jnp.inf).at[3, 5].set(2.0).at[4, 9].set(jnp.nan)
    plain = jax.jit(linear_loss.top_and_lse)(z_NV)
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(linear_loss.device, "target", lambda: gpu)
    once = jax.jit(lambda z: linear_loss.top_and_lse(z))(z_NV)
    assert str(jax.make_jaxpr(lambda z: linear_loss.top_and_lse(z))(z_NV)).count(" reduce[") == 1
    np.testing.assert_allclose(once[1], plain[1], rtol=1e-6)
    assert np.isnan(once[1][4]) and once[1][3] == 2.0
    rest = np.arange(7) != 4  # the maximum of a row with NaN is NaN or not
    np.testing.assert_array_equal(once[0][rest], plain[0][rest])
