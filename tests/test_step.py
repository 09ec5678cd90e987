import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import optim, step
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken, Summary
from tests.helpers import random_batch, thirds, tiny_config

V = 29


def make(**changes):
    cfg = tiny_config(**changes)
    graphdef, init = create_model(cfg, V, "reference")
    state = jax.jit(lambda key: step.init_state(cfg, init(key)))(jax.random.key(0))
    return cfg, graphdef, state


def ragged(rng, rows=6, width=12):
    """Rows with very unequal numbers of scored tokens, one of them with none."""
    batch = random_batch(rng, (rows, width), V)
    for row in range(rows):
        batch["weights"][row, 1 + 2 * row :] = 0
    return batch


def gradients(graphdef, params, batch, accumulation):
    f = functools.partial(step.gradients, NextToken(graphdef), accumulation=accumulation, key=None)
    grads, found = jax.jit(f)(params, batch)
    return found.nats, found.count, grads


@pytest.mark.parametrize("accumulation", thirds([3, 2, 6]))
def test_ragged_micro_batches_are_one_batch(accumulation):
    _, graphdef, state = make()
    batch = ragged(np.random.default_rng(0))
    nats, count, grads = gradients(graphdef, state.params, batch, 1)
    nats_a, count_a, grads_a = gradients(graphdef, state.params, batch, accumulation)
    assert count == count_a == batch["weights"][:, 1:].sum()
    np.testing.assert_allclose(nats, nats_a, rtol=1e-6)
    scale = optim.global_norm(grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / scale, b / scale, atol=1e-6), grads, grads_a
    )


def test_repeating_or_padding_the_batch_changes_no_gradient():
    _, graphdef, state = make()
    batch = random_batch(np.random.default_rng(1), (4, 12), V)
    _, _, grads = gradients(graphdef, state.params, batch, 1)
    twice = {k: np.concatenate([v, v]) for k, v in batch.items()}
    padded = {k: np.pad(v, ((0, 2), (0, 5))) for k, v in batch.items()}
    for other in (twice, padded):
        _, _, same = gradients(graphdef, state.params, other, 1)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, same
        )


def test_nothing_scored_gives_zero_gradient():
    _, graphdef, state = make()
    batch = random_batch(np.random.default_rng(2), (4, 12), V)
    batch["weights"][:] = 0
    nats, count, grads = gradients(graphdef, state.params, batch, 1)
    assert nats == count == optim.global_norm(grads) == 0


def stacked(rng, steps):
    return random_batch(rng, (steps, 6, 12), V)


def run(batches, **changes):
    cfg, graphdef, state = make(**changes)
    return state, *step.make_train_step(cfg, NextToken.of(cfg, graphdef))(
        jax.tree.map(jnp.copy, state), jax.tree.map(jnp.asarray, batches)
    )


def test_every_leaf_moves_and_loss_falls_on_one_batch():
    batch = stacked(np.random.default_rng(3), 1)
    batches = {k: np.repeat(v, 100, axis=0) for k, v in batch.items()}
    before, after, metrics = run(batches, optim__peak_lr=1e-2, train__steps="100")
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert (old != new).mean() > 0.9
    assert metrics["train/loss"][-1] < 0.1 * metrics["train/loss"][0]
    assert after.step == 100 and metrics["data/scored"][0] == batch["weights"][0, :, 1:].sum()


def test_one_dispatch_of_many_is_many_of_one():
    batches = stacked(np.random.default_rng(4), 4)
    changes = dict(model__dropout=0.2, optim__ema_decay=0.9, data__micro_batch=3)
    _, together, metrics = run(batches, **changes)
    cfg, graphdef, state = make(**changes)
    train_step = step.make_train_step(cfg, NextToken.of(cfg, graphdef))
    losses = []
    for i in range(4):
        one = {name: jnp.asarray(x[i : i + 1]) for name, x in batches.items()}
        state, row = train_step(state, one)
        losses.append(row["train/loss"][0])
    np.testing.assert_allclose(losses, metrics["train/loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(together.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_differs_from_step_to_step():
    batch = stacked(np.random.default_rng(5), 1)
    batches = {k: np.repeat(v, 3, axis=0) for k, v in batch.items()}
    _, _, noisy = run(batches, model__dropout=0.3, optim__peak_lr=1e-12)
    _, _, plain = run(batches, optim__peak_lr=1e-12)
    assert len(set(np.asarray(noisy["train/loss"]).tolist())) == 3
    np.testing.assert_allclose(plain["train/loss"], plain["train/loss"][0], rtol=1e-6)


def test_non_finite_update_is_skipped_whole():
    batches = stacked(np.random.default_rng(6), 3)
    batches["weights"][1, 0, 4] = np.nan
    before, after, metrics = run(batches, optim__ema_decay=0.9)
    np.testing.assert_array_equal(metrics["optim/skipped_updates"], [0, 1, 0])
    assert after.step == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    # With a small eps the first update is the sign of the gradient, rounding included.
    how = dict(optim__ema_decay=0.9, optim__eps=1e-2)
    before, untouched, _ = run({k: v[1:2] for k, v in batches.items()}, **how)
    _, good, _ = run({k: v[:1] for k, v in batches.items()}, **how)
    _, skipped, _ = run({k: v[:2] for k, v in batches.items()}, **how)
    for name in ("params", "opt_state", "ema"):
        states = [getattr(state, name) for state in (before, untouched, good, skipped)]
        jax.tree.map(np.testing.assert_array_equal, *states[:2])
        # Compiled for one update and for two, they may round otherwise.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), *states[2:]
        )


def test_logged_norms_and_rates():
    batches = stacked(np.random.default_rng(7), 5)
    before, after, metrics = run(
        {k: v[:1] for k, v in batches.items()}, optim__clip_norm=0.1, train__layer_norms=True
    )
    np.testing.assert_allclose(metrics["optim/grad_norm_clipped"], 0.1, rtol=1e-5)
    assert metrics["optim/clip_rate"] == 1 and metrics["optim/grad_norm"] > 0.1
    moved = jax.tree.map(jnp.subtract, after.params, before.params)
    np.testing.assert_allclose(metrics["optim/update_norm"], optim.global_norm(moved), rtol=1e-3)
    np.testing.assert_allclose(
        metrics["optim/param_norm"], optim.global_norm(after.params), rtol=1e-5
    )
    layers = np.array([v[0] for k, v in metrics.items() if k.startswith("grad_norm/")])
    assert len(layers) == len(optim.by_layer(after.params))
    assert metrics["grad_norm/blocks/1/mlp/up/kernel"] > 0
    np.testing.assert_allclose(np.sqrt((layers**2).sum()), metrics["optim/grad_norm"][0], rtol=1e-5)
    _, _, metrics = run(batches)
    np.testing.assert_allclose(metrics["optim/lr"][:3], [1e-3 / 3, 2e-3 / 3, 1e-3], rtol=1e-6)


def test_ema_follows_the_parameters():
    batches = stacked(np.random.default_rng(8), 2)
    before, after, _ = run(batches, optim__ema_decay=0.5, optim__peak_lr=1e-2)
    for start, end, ema in zip(
        *(jax.tree.leaves(x) for x in (before.params, after.params, after.ema)), strict=True
    ):
        assert np.abs(ema - end).max() <= np.abs(start - end).max() + 1e-6
        assert (ema != end).any() and (ema != start).any()


def test_float16_scales_the_loss_up_and_down():
    batches = stacked(np.random.default_rng(9), 20)
    _, _, wide = run(batches)
    _, state, low = run(batches, train__compute_dtype="float16")
    ok = low["optim/skipped_updates"] == 0
    assert ok[-1] and state.loss_scale >= 2.0**-16
    np.testing.assert_allclose(low["train/loss"][0], wide["train/loss"][0], rtol=1e-2)
    np.testing.assert_allclose(low["optim/grad_norm"][ok][0], wide["optim/grad_norm"][0], rtol=3e-2)
    cfg, graphdef, start = make(train__compute_dtype="float16")
    start = start._replace(loss_scale=jnp.float32(2.0**24))
    state, low = step.make_train_step(cfg, NextToken.of(cfg, graphdef))(
        start, jax.tree.map(jnp.asarray, batches)
    )
    scales = np.asarray(low["optim/loss_scale"])
    assert low["optim/skipped_updates"][0] == 1 and scales[1] == scales[0] / 2
    assert low["optim/skipped_updates"][-1] == 0


def test_eval_is_exact_and_repeatable():
    cfg, graphdef, state = make(model__dropout=0.5)
    batch = random_batch(np.random.default_rng(10), (4, 12), V)
    eval_step = step.make_eval_step(cfg, graphdef)
    a, b = eval_step(state.params, batch), eval_step(state.params, batch)
    sums = NextToken(graphdef).scored(state.params, batch)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert a["count"] == sums.count
    np.testing.assert_allclose(a["nats"], sums.nats, rtol=1e-6)
    np.testing.assert_allclose(a["token_nats"].sum(), sums.nats, rtol=1e-6)


@pytest.mark.parametrize("peak_lr", thirds([1e25, 1e38]))
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_to_infinite_parameters_has_no_norm(name, peak_lr):
    batches = stacked(np.random.default_rng(11), 3)
    changes = dict(optim__name=name, optim__peak_lr=peak_lr, optim__ema_decay=0.9)
    _, after, metrics = run(batches, **changes)
    assert np.isfinite(metrics["optim/grad_norm"][0]) and not metrics["optim/skipped_updates"][0]
    assert np.isnan(metrics["optim/param_norm"]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.opt_state))


def updated(own, beside=None, clip_norm=0.0):
    """The state after an update by a gradient, and its metrics."""
    cfg = tiny_config(optim__clip_norm=clip_norm, optim__ema_decay=0.9)
    like = {"w": jnp.ones(3)}
    state = step.init_state(cfg, like, None if beside is None else like)
    update = step.make_update(cfg, 0.0 if beside is None else 1e-3)
    grads = {"w": jnp.float32(own)}
    pair = grads if beside is None else (grads, {"w": jnp.float32(beside)})
    return state, *update(state, pair, Summary(1.0, jnp.float32(1.0), jnp.float32(1.0)))


def test_optimiser_and_what_is_beside_the_model_stay_finite():
    healthy = [1.0, 2.0, 3.0]
    assert updated(healthy, beside=healthy)[2]["optim/skipped_updates"] == 0
    for own, beside in (
        (healthy, [1.0, 1e20, 1.0]),  # its square, in Adam's second moment, is infinite
        (healthy, [1.0, np.nan, 1.0]),
        ([1.0, np.inf, 1.0], healthy),
        ([1.0, 1e20, 1.0], None),
    ):
        before, after, metrics = updated(own, beside)
        assert metrics["optim/skipped_updates"] == 1
        jax.tree.map(np.testing.assert_array_equal, before, after._replace(step=before.step))
