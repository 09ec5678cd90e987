"""Planted faults of gradients and kernels, and healthy ones that must pass every check."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lm_jax.doctor.gradient import examine_gradients, examine_kernel
from lm_jax.doctor.gradient.differences import STEPS, rounding, slope
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken
from tests.helpers import random_batch, randomise, tiny_config

V, D = 11, 6
TOKENS = np.random.default_rng(0).integers(0, V - 2, (3, 8))  # the last two ids never occur


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embed": (V, D), "scale": (D,), "up": (D, 2 * D), "down": (2 * D, D), "head": (D, V)}
    return {k: 0.5 * rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def rms_norm(x):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def language_model(params, *, norm=rms_norm, tokens=TOKENS, act=jnp.tanh, dtype=None):
    """Mean nats of a one-layer model that reads one token."""
    p = params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params)
    x = p["embed"][tokens[:, :-1]]
    x = x + act((norm(x) * p["scale"][None, None]) @ p["up"]) @ p["down"]
    logits = (x @ p["head"]).astype(jnp.promote_types(x.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def wrong_leaves(report):
    return {name.split(",")[0] for name in report["gradient.leaves"].values["wrong"]}


def quiet(report):
    return not report.failed and not report.warned


# Healthy gradients.


@pytest.mark.parametrize("seed", range(3))
def test_a_jax_model_is_silent(seed):
    report = examine_gradients(language_model, parameters(seed), seed=seed)
    assert quiet(report), report.to_json()
    assert all(f.status == "pass" for f in report)
    values = report["gradient.precision"].values
    errors = values["errors"]
    assert errors[0] > 100 * min(errors) < errors[-1], f"no V over the steps: {errors}"
    assert values["attainable"] < 1e-6 and values["relative_noise"] < 1e-14


def own_model(dtype):
    cfg = tiny_config(data__seq_len=5)
    graphdef, init = create_model(cfg, 7, "reference")
    params = randomise(jax.eval_shape(init, jax.random.key(0)), 3)
    batch = random_batch(np.random.default_rng(1), (2, 6), 7)

    @jax.jit
    def loss(params):
        sums = NextToken(graphdef, dtype).scored(params, batch)
        return sums.nats / sums.count

    return loss, params


def test_own_model_is_silent():
    report = examine_gradients(*own_model(jnp.float64))
    assert quiet(report), report.to_json()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_short_types_are_never_called_wrong(dtype, seed):
    """Exact gradients of a function whose rounding no difference can see through."""
    report = examine_gradients(functools.partial(language_model, dtype=dtype), parameters(seed))
    assert not report.failed, report.to_json()
    assert report.warned == ["gradient.precision"]


@pytest.mark.parametrize(
    "act", [jax.nn.relu, jnp.abs, lambda x: jnp.maximum(x, 0.1 * x)], ids=["relu", "abs", "leaky"]
)
def test_kinks_are_never_called_wrong(act):
    """All pre-activations are exactly zero: each is at a kink, where slopes differ by side."""
    params = parameters() | {"up": np.zeros((D, 2 * D), np.float32)}
    report = examine_gradients(functools.partial(language_model, act=act), params)
    assert not report.failed, report.to_json()


@pytest.mark.parametrize("seed", range(3))
def test_kinks_elsewhere_are_silent(seed):
    loss = functools.partial(language_model, act=jax.nn.relu)
    report = examine_gradients(loss, parameters(seed), seed=seed)
    assert quiet(report), report.to_json()


def test_flat_and_straight_functions_are_silent():
    """No truncation error at all: no V, and nothing wrong."""
    x = {"a": np.arange(1.0, 5.0), "b": np.float64(2.0), "steps": np.int32(3)}
    report = examine_gradients(lambda p: (p["a"] * 3).sum() + p["b"] ** 2 * p["steps"], x)
    assert quiet(report), report.to_json()


class HandWritten:
    """A bigram model in NumPy with its backward pass by hand, as a kernel library has it."""

    def __init__(self, fault=""):
        self.fault = fault
        self.workspace = {"embed": np.zeros((V, D)), "head": np.zeros((D, V))}

    def forward(self, p):
        x, y = TOKENS[:, :-1].ravel(), TOKENS[:, 1:].ravel()
        hidden = np.tanh(p["embed"][x])
        logits = hidden @ p["head"]
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return x, y, hidden, log_p

    def loss(self, p):
        _, y, _, log_p = self.forward(p)
        return -log_p[np.arange(len(y)), y].mean()

    def gradient(self, p):
        x, y, hidden, log_p = self.forward(p)
        g = np.exp(log_p)
        g[np.arange(len(y)), y] -= 1
        g /= len(y)
        g_hidden = g @ p["head"].T
        # The buffer of the activations, or that of the values before them.
        before = np.tanh(hidden) if self.fault == "buffer" else hidden
        rows = g_hidden * (1 - before**2)
        out = {k: np.zeros_like(v) for k, v in self.workspace.items()}
        if self.fault == "not zeroed":
            out = self.workspace
        elif self.fault == "uninitialised":
            out["embed"] = np.empty((V, D))
            out["embed"][np.unique(x)] = 0
        np.add.at(out["embed"], x, rows)
        width = V // 4 * 4 if self.fault == "last block" else V
        out["head"][:, :width] += (hidden.T @ g)[:, :width]
        return {k: v.copy() for k, v in out.items()}


def examine_hand_written(fault="", **changes):
    model = HandWritten(fault)
    params = {k: v for k, v in parameters().items() if k in ("embed", "head")}
    return examine_gradients(model.loss, params, grad_fn=model.gradient, **changes)


@pytest.mark.parametrize("seed", range(3))
def test_a_hand_written_backward_is_silent(seed):
    report = examine_hand_written(seed=seed)
    assert quiet(report), report.to_json()


def test_torch_is_silent():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, y = (torch.from_numpy(t.ravel()) for t in (TOKENS[:, :-1].copy(), TOKENS[:, 1:].copy()))

    def scored(p):
        return torch.nn.functional.cross_entropy(torch.tanh(p["embed"][x]) @ p["head"], y)

    def tensors(p):
        return {k: torch.from_numpy(v).requires_grad_() for k, v in p.items()}

    def loss(p):
        return scored(tensors(p)).item()

    def gradient(p):
        leaves = tensors(p)
        scored(leaves).backward()
        return {k: v.grad.numpy() for k, v in leaves.items()}

    params = {k: v for k, v in parameters().items() if k in ("embed", "head")}
    report = examine_gradients(loss, params, grad_fn=gradient)
    assert quiet(report), report.to_json()


# Planted faults.


@pytest.mark.fault(65, "gradient.directional")
@pytest.mark.fault(65, "gradient.leaves")
def test_backward_recomputes_from_an_overwritten_buffer():
    """The norm's backward pass finds its output where its input was."""

    @jax.custom_vjp
    def norm(x):
        return rms_norm(x)

    def backward(saved, g):
        return jax.vjp(rms_norm, saved)[1](g)

    norm.defvjp(lambda x: (rms_norm(x), rms_norm(x)), backward)
    report = examine_gradients(functools.partial(language_model, norm=norm), parameters())
    assert {"gradient.directional", "gradient.leaves", "gradient.coordinates"} <= set(report.failed)
    assert wrong_leaves(report) == {"embed"}
    assert report["gradient.coordinates"].values["wrong"][0].startswith("embed[")


@pytest.mark.fault(65, "gradient.leaves")
def test_backward_takes_the_wrong_buffer():
    report = examine_hand_written("buffer")
    assert wrong_leaves(report) == {"embed"}


@pytest.mark.fault(66, "gradient.precision", "warn")
def test_differences_too_fine_for_float32():
    """An exact gradient: at 1e-5 differences are off by per cents, and that is said."""
    report = examine_gradients(functools.partial(language_model, dtype="float32"), parameters())
    finding = report["gradient.precision"]
    assert finding.status == "warn" and not report.failed
    errors = finding.values["errors"]
    at = int(np.argmin(np.abs(np.log10(STEPS) + 5)))
    assert errors[at] > 0.01 > 10 * min(errors)
    assert finding.values["best_step"] >= 1e-3
    assert 1e-9 < finding.values["relative_noise"] < 1e-6


@pytest.mark.fault(67, "gradient.repeated")
def test_buffers_are_not_zeroed():
    report = examine_hand_written("not zeroed")
    assert "gradient.repeated" in report.failed
    assert set(report["gradient.repeated"].values["changed"]) == {"embed", "head"}


@pytest.mark.fault(67, "gradient.coordinates")
def test_the_last_block_is_not_written():
    report = examine_hand_written("last block")
    assert {"gradient.coordinates", "gradient.leaves"} <= set(report.failed)
    wrong = report["gradient.coordinates"].values["wrong"]
    assert any("zeros of head" in name for name in wrong)
    assert any(name.startswith("head[") for name in wrong)
    assert not any("embed" in name for name in wrong)


@pytest.mark.fault(67, "gradient.leaves")
def test_rows_of_absent_tokens_are_never_written():
    """What the memory held before: seen as a change from call to call or as a wrong leaf."""
    report = examine_hand_written("uninitialised")
    assert {"gradient.repeated", "gradient.leaves", "gradient.finite"} & set(report.failed)


@pytest.mark.fault(55, "gradient.finite")
def test_where_hides_a_square_root_of_zero():
    def norm(x):
        squares = (x**2).mean(-1, keepdims=True)
        return jnp.where(squares > 0, x / jnp.sqrt(squares), 0)

    params = parameters()
    params["embed"][TOKENS[0, 0]] = 0
    report = examine_gradients(functools.partial(language_model, norm=norm), params)
    assert report.failed == ["gradient.finite"]
    assert list(report["gradient.finite"].values["not_finite"]) == ["embed"]
    assert f"embed[{TOKENS[0, 0]}, 0]" in report["gradient.finite"].evidence
    assert np.isfinite(report["gradient.finite"].values["loss"])


@pytest.mark.fault(10, "gradient.finite")
def test_an_input_id_outside_the_table():
    """Flax answers an id >= V with NaN."""
    graphdef, table = nnx.split(nnx.Embed(V, D, rngs=nnx.Rngs(0)))
    params = {"table": nnx.to_pure_dict(table), "head": parameters()["head"]}

    def loss(params, tokens):
        x = nnx.merge(graphdef, params["table"])(jnp.asarray(tokens))
        logits = x @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.abs(tokens) % V).mean()

    assert not examine_gradients(functools.partial(loss, tokens=TOKENS), params).failed
    tokens = TOKENS.copy()
    tokens[0, 0] = V
    report = examine_gradients(functools.partial(loss, tokens=tokens), params)
    assert report.failed == ["gradient.finite"]
    assert "Loss: nan" in report["gradient.finite"].evidence


def test_a_leaf_cut_off():
    """stop_gradient: the loss changes with the leaf, the gradient does not say so."""

    def loss(p):
        return language_model(p | {"scale": jax.lax.stop_gradient(p["scale"])})

    report = examine_gradients(loss, parameters())
    assert {"gradient.leaves", "gradient.directional"} <= set(report.failed)
    assert wrong_leaves(report) == {"scale"}
    assert report["gradient.zero_leaves"].values["zero"] == ["scale"]


def test_a_leaf_without_use():
    params = parameters() | {"spare": {"gate": np.ones(3), "bias": np.ones(2)}}
    report = examine_gradients(language_model, params)
    assert report.warned == ["gradient.zero_leaves"] and not report.failed
    assert report["gradient.zero_leaves"].values["zero"] == ["spare/bias", "spare/gate"]
    assert quiet(examine_gradients(language_model, params, unused=("spare",)))


def test_chance_in_the_loss():
    rng = np.random.default_rng(0)

    def loss(p):
        return language_model(p) * (1 + 0.01 * rng.normal())

    assert "gradient.repeated" in examine_gradients(loss, parameters()).failed


# Thresholds: the weakest fault that must be seen.


def scaled_backward(leaf, factor, dtype=None):
    """A model whose gradient of one leaf is too large by a factor."""

    @jax.custom_vjp
    def through(x):
        return x

    through.defvjp(lambda x: (x, None), lambda _, g: (g * factor,))
    return lambda p: language_model(p | {leaf: through(p[leaf])}, dtype=dtype)


@pytest.mark.parametrize("leaf", ["embed", "scale", "head"])
@pytest.mark.parametrize(("factor", "dtype"), [(1 + 1e-5, None), (1.05, "float32")])
def test_small_errors_are_seen(leaf, factor, dtype):
    report = examine_gradients(scaled_backward(leaf, factor, dtype), parameters())
    assert wrong_leaves(report) == {leaf}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_rounding_is_measured(dtype):
    def along(t):
        return float(dtype(3.0 + np.sin(1 + t)))

    noise = rounding(along, along(0.0)) / along(0.0)
    assert 0.02 < noise / np.finfo(dtype).eps < 2


def test_a_kink_is_no_rounding():
    def along(t):
        return np.sin(1 + t) + abs(t - 0.002)

    assert rounding(along, along(0.0)) < 1e-15


def test_the_bound_covers_the_error():
    for seed in range(20):
        a, b = np.random.default_rng(seed).normal(size=2)

        def along(t, a=a, b=b):
            return float(np.float32(np.exp(a + b * t)))

        found = slope(along, along(0.0), rounding(along, along(0.0)))
        assert abs(found.value - b * np.exp(a)) <= found.bound < 0.05 * abs(b) * np.exp(a)


# Bad input.


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda p: 1 / 0, "ZeroDivisionError"),
        (lambda p: p["head"].sum(0), "not a scalar"),
        (lambda p: None, "returned None, not a scalar"),
        (lambda p: "text", "raised"),
        (lambda p: language_model(p) * jnp.nan, "nan"),
    ],
    ids=["raises", "vector", "none", "text", "nan"],
)
def test_bad_functions_are_reported(loss, reason):
    report = examine_gradients(loss, parameters())
    assert report.failed == ["gradient.finite"]
    assert report["gradient.finite"].status == ("fail" if reason == "nan" else "error")
    assert reason in report["gradient.finite"].evidence
    assert not any(f.status == "pass" for f in report)


def test_gradients_of_other_shapes_are_reported():
    model = HandWritten()
    params = {k: v for k, v in parameters().items() if k in ("embed", "head")}
    for wrong in (lambda p: {"embed": p["embed"]}, lambda p: {k: v.T for k, v in p.items()}):
        report = examine_gradients(model.loss, params, grad_fn=wrong)
        assert report.failed == ["gradient.finite"]


def test_misuse_names_the_argument():
    with pytest.raises(ValueError, match="params"):
        examine_gradients(language_model, {"steps": np.int32(3)})
    with pytest.raises(ValueError, match="loss_fn"):
        examine_gradients(None, parameters())
    with pytest.raises(ValueError, match="sizes"):
        examine_kernel(rms_norm, rms_norm, lambda size, rng: rng.normal(size=size), sizes=(0,))


# Kernels over sizes.


def attention_reference(q, k, v):
    n = q.shape[0]
    scores = jnp.where(jnp.tri(n, dtype=bool), q @ k.T / np.sqrt(q.shape[-1]), -jnp.inf)
    return jax.nn.softmax(scores) @ v


def block_attention(q, k, v, *, block=128, masked=True):
    """Online softmax over blocks of keys; `masked` keeps padded keys out of it."""
    n, width = q.shape
    pad = -n % block
    keys, values = (jnp.pad(x, ((0, pad), (0, 0))).reshape(-1, block, width) for x in (k, v))
    starts = jnp.arange(0, n + pad, block)
    row = jnp.arange(n)[:, None]

    def step(carry, now):
        top, total, out = carry
        key, value, start = now
        column = (start + jnp.arange(block))[None, :]
        # Forgotten: padded keys, whose scores are zero, are no keys.
        seen = column <= row if masked else (column <= row) | (column >= n)
        scores = jnp.where(seen, (q @ key.T).astype(jnp.float32) / np.sqrt(width), -1e30)
        new = jnp.maximum(top, scores.max(-1))
        p = jnp.exp(scores - new[:, None])
        shrink = jnp.exp(top - new)
        out = out * shrink[:, None] + p @ value.astype(jnp.float32)
        return (new, total * shrink + p.sum(-1), out), None

    start = jnp.full(n, -1e30), jnp.zeros(n), jnp.zeros((n, width))
    (_, total, out), _ = jax.lax.scan(step, start, (keys, values, starts))
    return (out / total[:, None]).astype(q.dtype)


def qkv(size, rng, dtype="float32"):
    return tuple(jnp.asarray(rng.normal(size=(size, 16)), dtype) for _ in range(3))


ODD = (1, 127, 128, 129, 200)


@pytest.mark.parametrize(
    ("dtype", "sizes", "seed"),
    [
        ("float32", ODD, 0),
        ("float32", (129,), 1),
        ("bfloat16", (1, 129), 2),
        ("float16", (129,), 3),
    ],
)
def test_a_block_kernel_is_silent(dtype, sizes, seed):
    make = functools.partial(qkv, dtype=dtype)
    report = examine_kernel(block_attention, attention_reference, make, sizes=sizes, seed=seed)
    assert quiet(report), report.to_json()


@pytest.mark.fault(69, "gradient.kernel_value")
@pytest.mark.fault(69, "gradient.kernel_gradient")
def test_padded_keys_enter_the_softmax():
    kernel = functools.partial(block_attention, masked=False)
    report = examine_kernel(kernel, attention_reference, qkv, sizes=ODD)
    assert report.failed == ["gradient.kernel_value", "gradient.kernel_gradient"]
    wrong = set(report["gradient.kernel_value"].values["wrong_sizes"])
    assert wrong == {n for n in ODD if n % 128}


def logsumexp_reference(z):
    return jax.nn.logsumexp(z, axis=-1)


def block_logsumexp(z, *, blocks=None, block=1024):
    """Over blocks of the vocabulary; a kernel written for one block stops after it."""
    starts = range(0, z.shape[-1], block)
    parts = [jax.nn.logsumexp(z[:, i : i + block], axis=-1) for i in starts]
    return functools.reduce(jnp.logaddexp, parts[:blocks])


def scores(size, rng):
    return (jnp.asarray(rng.normal(size=(3, size)), jnp.float32),)


@pytest.mark.fault(68, "gradient.kernel_value")
def test_a_kernel_of_one_block():
    """Right on every size that a toy test would use."""
    kernel = functools.partial(block_logsumexp, blocks=1)
    assert quiet(examine_kernel(kernel, logsumexp_reference, scores, sizes=(10, 1000)))
    report = examine_kernel(kernel, logsumexp_reference, scores, sizes=(1024, 1025, 2048))
    assert report.failed == ["gradient.kernel_value", "gradient.kernel_gradient"]
    assert report["gradient.kernel_value"].values["wrong_sizes"] == [1025, 2048]
    sizes = 1, 1024, 1025, 3000
    assert quiet(examine_kernel(block_logsumexp, logsumexp_reference, scores, sizes=sizes))


@pytest.mark.fault(68, "gradient.kernel_gradient")
def test_a_backward_that_leaves_out_the_tail():
    @jax.custom_vjp
    def kernel(z):
        return logsumexp_reference(z)

    def backward(z, g):
        whole = z.shape[-1] // 8 * 8
        return (jax.nn.softmax(z).at[:, whole:].set(0) * g[:, None],)

    kernel.defvjp(lambda z: (kernel(z), z), backward)
    report = examine_kernel(kernel, logsumexp_reference, scores, sizes=(7, 8, 9, 64))
    assert report.failed == ["gradient.kernel_gradient"]
    assert report["gradient.kernel_gradient"].values["wrong_sizes"] == [7, 9]


def test_kernels_that_refuse_a_size():
    def kernel(z):
        if z.shape[-1] == 1:
            raise ValueError("needs at least two entries")
        return logsumexp_reference(z)

    report = examine_kernel(kernel, logsumexp_reference, scores, sizes=(1, 2, 3))
    assert {f.status for f in report} == {"warn"}
    assert "needs at least two" in report["gradient.kernel_value"].evidence
    assert report["gradient.kernel_value"].values["refused"] == [1]
    report = examine_kernel(lambda z: z, logsumexp_reference, scores, sizes=(2, 3))
    assert "gradient.kernel_value" in report.failed
    report = examine_kernel(kernel, logsumexp_reference, lambda n, rng: np.arange(n), sizes=(2, 3))
    assert report.failed == ["gradient.kernel_value"] and not report.warned
    assert "no floating-point argument" in report["gradient.kernel_value"].evidence


def test_gradients_under_other_names_are_not_compared():
    params = {"a": np.ones(3) * 0.5, "b": np.ones(3) * 0.7}

    def loss(p):
        return (p["a"] ** 2 + p["b"] ** 3).sum()

    def gradient(p):
        return {"a": 2 * p["a"], "b": 3 * p["b"] ** 2}

    right = examine_gradients(loss, params, grad_fn=gradient)
    assert not right.failed and right["gradient.directional"].status == "pass"
    renamed = examine_gradients(
        loss, params, grad_fn=lambda p: dict(zip("xy", gradient(p).values(), strict=True))
    )
    assert renamed["gradient.directional"].status == "skip"
    assert renamed["gradient.finite"].status == "error"
    assert "not a tree of" in renamed["gradient.finite"].evidence


def test_parameters_of_pytorch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    params = {"a": torch.nn.Parameter(torch.full((3,), 0.5))}
    report = examine_gradients(lambda p: (p["a"] ** 2).sum(), params)
    assert not report.failed and report["gradient.directional"].status == "pass"


def test_parameters_of_pytorch_in_bfloat16():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    half = torch.full((3,), 0.5, dtype=torch.bfloat16)
    params = {"a": torch.nn.Parameter(half), "b": torch.nn.Parameter(half)}

    def gradient(p):
        return {"a": torch.tensor(2 * p["a"], dtype=torch.bfloat16, requires_grad=True), "b": None}

    def loss(p):
        return torch.tensor((p["a"] ** 2).sum(), requires_grad=True)

    report = examine_gradients(loss, params, grad_fn=gradient)
    assert not report.failed, report.to_json()
    assert report["gradient.zero_leaves"].values["zero"] == ["b"]  # None, as of a leaf without use


def test_names_with_a_slash_are_two_leaves():
    params = {"a/b": np.array([0.5, 2.0]), "a": {"b": np.array([0.7])}}
    report = examine_gradients(lambda p: (p["a/b"] ** 2).sum() + (p["a"]["b"] ** 3).sum(), params)
    assert quiet(report), report.to_json()
    assert len(report["gradient.leaves"].values["errors"]) == 3


def test_what_raises_on_every_call_is_an_error():
    def broken(*args):
        raise RuntimeError("this cannot run")

    report = examine_gradients(lambda p: (p["a"] ** 2).sum(), {"a": np.ones(2)}, grad_fn=broken)
    assert report.failed == ["gradient.finite"] and report["gradient.finite"].status == "error"
    kernel = examine_kernel(broken, logsumexp_reference, scores, sizes=(2, 3))
    reference = examine_kernel(logsumexp_reference, broken, scores, sizes=(2, 3))
    make = examine_kernel(logsumexp_reference, logsumexp_reference, broken, sizes=(2, 3))
    for report in (kernel, reference, make):
        assert report["gradient.kernel_value"].status == "error", report.to_json()
        assert "this cannot run" in report["gradient.kernel_value"].evidence


def test_a_type_that_hides_any_error_is_not_judged():
    def make(size, rng):
        return jnp.ones((3, size), jnp.float8_e5m2)

    report = examine_kernel(lambda z: 0 * z, lambda z: z, make, sizes=(2,))
    assert {f.status for f in report} == {"skip"}
    assert "Not judged" in report["gradient.kernel_value"].evidence
