import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax import optim
from lm_jax.config import Duration, OptimConfig
from lm_jax.models.families import create_model
from tests.helpers import randomise, tiny_config


def rates(steps, end_lr=0.1, **fields):
    cfg = OptimConfig(peak_lr=2.0, end_lr=end_lr, **fields)
    schedule = optim.learning_rate(cfg, steps)
    return np.array([schedule(i) for i in range(steps)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (5, 0), (3, 1), (2, 1)])
def test_schedule_ends(kind, steps, warmup):
    decay = Duration("1") if kind == "wsd" else Duration("0")
    lr = rates(steps, schedule=kind, warmup=Duration(str(warmup)), decay=decay)
    assert lr[0] > 0 and lr.max() <= 2.0
    np.testing.assert_allclose(lr[:warmup], 2.0 * np.arange(1, warmup + 1) / max(1, warmup))
    np.testing.assert_allclose(lr[-1], 2.0 if kind == "constant" else 0.2, rtol=1e-6)
    tiny = rates(steps, 1e-5, schedule=kind, warmup=Duration(str(warmup)), decay=decay)
    np.testing.assert_allclose(tiny[-1], 2.0 if kind == "constant" else 2e-5, rtol=1e-6)
    assert (np.diff(lr[max(0, warmup - 1) :]) <= 1e-6).all()


def test_schedule_shapes():
    cosine = rates(101, schedule="cosine", warmup=Duration("1"))
    np.testing.assert_allclose(cosine[50], 1.1, atol=1e-6)
    linear = rates(101, schedule="linear", warmup=Duration("1"))
    np.testing.assert_allclose(np.diff(linear[1:]), -1.8 / 100, atol=1e-6)
    wsd = rates(100, schedule="wsd", warmup=Duration("10"), decay=Duration("20"))
    np.testing.assert_allclose(wsd[9:80], 2.0)
    np.testing.assert_allclose(np.diff(wsd[79:]), -1.8 / 20, atol=1e-6)


def params_of(**changes):
    cfg = tiny_config(model__norm="layernorm", model__bias=True, **changes)
    _, init = create_model(cfg, 29, "reference")
    return cfg, jax.jit(init)(jax.random.key(0))


def test_decay_takes_matrices_only():
    cfg, params = params_of(model__tied=False, model__positions="learned")
    decays = {
        optim.path_name(path): decay
        for path, decay in jax.tree.leaves_with_path(optim.decayed(cfg.optim, params))
    }
    for name, decay in decays.items():
        assert decay == name.endswith("kernel")
    names = {name for name, decay in decays.items() if not decay}
    assert {"embedding", "position_embedding", "final_norm/scale", "final_norm/bias"} <= names


@pytest.mark.parametrize("name", ["adamw", "muon", "normuon"])
def test_zero_gradients_only_decay(name):
    cfg, params = params_of(optim__name=name, optim__weight_decay=0.5, model__tied=False)
    tx = optim.make_optimizer(cfg.optim)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, current = tx.init(params), params
    update = jax.jit(tx.update)
    for _ in range(3):
        direction, state = update(zeros, state, current)
        current = jax.tree.map(lambda p, u: p - 0.1 * np.asarray(u), current, direction)
    decays = optim.decayed(cfg.optim, params)
    jax.tree.map(
        lambda new, old, d: np.testing.assert_allclose(
            new, old * (0.95**3 if d else 1.0), rtol=1e-6, atol=1e-7
        ),
        current,
        params,
        decays,
    )


@pytest.mark.parametrize("name", ["adamw", "muon", "normuon"])
def test_updates_have_the_size_of_adam(name):
    """Both optimisers move an entry by about the learning rate, whatever the gradient's scale."""
    cfg, params = params_of(optim__name=name, optim__weight_decay=0.0)
    tx = optim.make_optimizer(cfg.optim)
    grads = randomise(params, 0, 1e-3)
    direction, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for path, u in jax.tree.leaves_with_path(direction):
        rms = np.sqrt((np.asarray(u) ** 2).mean())
        assert 0.1 < rms < 2.1, (optim.path_name(path), rms)
        grad = dict(jax.tree.leaves_with_path(grads))[path]
        assert (u * grad).sum() > 0, "must point along the gradient, to be subtracted"


def test_moments_are_float32():
    cfg, params = params_of()
    state = optim.make_optimizer(cfg.optim).init(params)
    dtypes = {x.dtype for x in jax.tree.leaves(state)}
    assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_clip():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped, before, after = optim.clip(grads, 1.0)
    np.testing.assert_allclose([before, after], [5.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(optim.global_norm(clipped), 1.0, rtol=1e-6)
    np.testing.assert_allclose(clipped["a"][0] / clipped["b"][0, 0], 0.75)
    for limit in (0.0, 7.0):
        same, before, after = optim.clip(grads, limit)
        assert before == after == 5.0 and same["a"][0] == 3.0


@pytest.mark.parametrize("tall", [False, True])
def test_muon_is_the_published_one(tall):
    """Three updates of stacked matrices as `optax.contrib.muon` makes them, one by one."""
    cfg = OptimConfig(name="muon", weight_decay=0.3)
    shape = (3, 12, 5) if tall else (3, 5, 12)
    keys = jax.random.split(jax.random.key(0), 4)
    start, *grads = ({"blocks": {"kernel": jax.random.normal(k, shape)}} for k in keys)
    ours = optim.make_optimizer(cfg)
    theirs = optax.contrib.muon(-1.0, eps=cfg.eps, weight_decay=0.3, consistent_rms=0.2)
    layers = {str(i): x for i, x in enumerate(start["blocks"]["kernel"])}
    state, other = ours.init(start), theirs.init(layers)
    update, update_theirs = jax.jit(ours.update), jax.jit(theirs.update)
    for grad in grads:
        found, state = update(grad, state, start)
        expected, other = update_theirs(
            {str(i): x for i, x in enumerate(grad["blocks"]["kernel"])}, other, layers
        )
        for i, layer in enumerate(found["blocks"]["kernel"]):
            np.testing.assert_allclose(layer, expected[str(i)], rtol=2e-4, atol=1e-5)


def test_normuon_divides_by_what_each_output_had():
    """Three updates after algorithm 1 of Li et al. 2025, with the root mean square that goes in."""
    scale, squares = optim.scale_by_outputs(0.9, 1e-8), np.zeros((2, 1, 7))
    updates = np.random.default_rng(3).normal(size=(3, 2, 5, 7)) * np.linspace(0.1, 3, 7)
    state = scale.init({"kernel": jnp.zeros((2, 5, 7))})
    for t, u in enumerate(updates, 1):
        found, state = scale.update({"kernel": jnp.asarray(u)}, state)
        squares = 0.9 * squares + 0.1 * np.square(u).mean(1, keepdims=True)
        expected = u / np.sqrt(squares / (1 - 0.9**t))
        expected *= np.sqrt(np.square(u).mean((1, 2)) / np.square(expected).mean((1, 2)))[
            :, None, None
        ]
        np.testing.assert_allclose(found["kernel"], expected, rtol=1e-4)
    still, _ = scale.update({"kernel": jnp.zeros((2, 5, 7))}, scale.init(found))
    assert not np.asarray(still["kernel"]).any()


def test_newton_schulz_runs_in_bfloat16_where_that_is_fast(monkeypatch):
    x = jax.random.normal(jax.random.key(1), (2, 8, 24))
    wide = optim.orthogonalise(x, 1e-8)
    assert 0.6 < np.linalg.svd(wide, compute_uv=False).min()
    monkeypatch.setattr(optim.device, "choose_dtype", lambda name: ("bfloat16", "as on a GPU"))
    jaxpr = str(jax.make_jaxpr(lambda x: optim.orthogonalise(x, 1e-8))(x))
    assert jaxpr.count("preferred_element_type=bfloat16") == jaxpr.count("dot_general") == 15
    short = optim.orthogonalise(x, 1e-8)
    monkeypatch.undo()
    np.testing.assert_array_equal(short, optim.orthogonalise(x, 1e-8, short=True))
    assert short.dtype == jnp.float32
    assert np.abs(short - wide).max() < 0.05


def test_layers_come_apart_and_together_again():
    _, params = params_of(model__layers=11)
    leaves = optim.by_layer(params)
    assert leaves["blocks/10/mlp/up/kernel"].ndim == 2
    jax.tree.map(np.testing.assert_array_equal, optim.stacked(leaves), params)
