import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import loss
from tests.helpers import random_batch

V = 11


def test_shift_pairs_each_token_with_the_next():
    batch = {
        "tokens": np.array([[0, 5, 6, 0, 7, 0]]),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0]]),
        "weights": np.array([[0, 1, 1, 0, 1, 0]], np.float32),
    }
    b = loss.shift(batch)
    np.testing.assert_array_equal(b.inputs, [[0, 5, 6, 0, 7]])
    np.testing.assert_array_equal(b.targets, [[5, 6, 0, 7, 0]])
    np.testing.assert_array_equal(b.weights, [[1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(b.segment_ids, [[1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(b.positions, [[0, 1, 2, 0, 1]])


def scored(logits, batch):
    b = loss.shift(batch)
    return loss.cross_entropy(logits, b.targets, b.weights)


def test_oracle_logits():
    batch = random_batch(np.random.default_rng(0), (4, 9), V, padded=2)
    tokens = batch["tokens"]
    next_one = 50.0 * jax.nn.one_hot(tokens[:, 1:], V)
    nats, count = scored(next_one, batch)
    assert count == batch["weights"][:, 1:].sum() and nats / count < 1e-6
    for wrong in (tokens[:, :-1], np.roll(tokens, -2, axis=1)[:, :-1]):
        nats, count = scored(50.0 * jax.nn.one_hot(wrong, V), batch)
        assert nats / count > 10
    nats, count = scored(jnp.zeros((4, 8, V)), batch)
    np.testing.assert_allclose(nats / count, np.log(V), rtol=1e-6)


def test_against_the_definition():
    rng = np.random.default_rng(1)
    batch = random_batch(rng, (3, 7), V)
    logits = rng.normal(size=(3, 6, V)) * 3
    nats, count = scored(logits.astype(np.float32), batch)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = 0.0
    for b, t in np.ndindex(3, 6):
        if batch["weights"][b, t + 1]:
            expected -= np.log(p[b, t, batch["tokens"][b, t + 1]])
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


def test_padding_batch_and_rows_are_invariant():
    rng = np.random.default_rng(2)
    batch = random_batch(rng, (4, 9), V)
    logits = rng.normal(size=(4, 8, V)).astype(np.float32)
    nats, count = scored(logits, batch)
    parts = [
        scored(logits[i : i + 1], {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)
    ]
    np.testing.assert_allclose(sum(p[0] for p in parts), nats, rtol=1e-6)
    assert sum(p[1] for p in parts) == count
    padded = {k: np.pad(v, ((0, 0), (0, 3))) for k, v in batch.items()}
    garbage = np.full((4, 3, V), np.nan, np.float32)
    np.testing.assert_allclose(
        scored(np.concatenate([logits, garbage], axis=1), padded), (nats, count), rtol=1e-6
    )


def test_nothing_scored_is_zero_not_nan():
    batch = random_batch(np.random.default_rng(3), (2, 5), V)
    batch["weights"][:] = 0
    logits = jnp.full((2, 4, V), jnp.nan)
    (nats, count), grad = jax.value_and_grad(scored, has_aux=True)(jnp.zeros((2, 4, V)), batch)
    assert nats == count == 0 and not grad.any()
    assert scored(logits, batch)[0] == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_are_float32(dtype):
    batch = random_batch(np.random.default_rng(4), (64, 65), V)
    logits = jnp.zeros((64, 64, V), dtype)
    nats, count = scored(logits, batch)
    assert nats.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(nats / count, np.log(V), rtol=1e-6)


def test_extreme_logits_stay_finite():
    batch = random_batch(np.random.default_rng(5), (2, 5), V)
    logits = jnp.full((2, 4, V), -1e4).at[..., 0].set(1e4)
    value, grad = jax.value_and_grad(lambda x: scored(x, batch)[0])(logits)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_correct_counts_scored_positions_only():
    batch = random_batch(np.random.default_rng(6), (4, 9), V)
    b = loss.shift(batch)
    right = loss.correct(jax.nn.one_hot(b.targets, V), b.targets, b.weights).sum()
    assert right == b.weights.sum() < b.weights.size


@pytest.mark.parametrize("impl", ["materialised", "fused"])
def test_label_smoothing_is_in_the_objective_and_not_in_the_nats(impl):
    rng = np.random.default_rng(5)
    batch = random_batch(rng, (3, 9), V, padded=2)
    b = loss.shift(jax.tree.map(jnp.asarray, batch))
    x_BTD = jnp.asarray(rng.standard_normal((3, 8, 6)), jnp.float32)
    head_VD = jnp.asarray(rng.standard_normal((V, 6)), jnp.float32)
    plain, smooth = (
        loss.from_hidden(x_BTD, head_VD, b, softcap=0.0, impl=impl, label_smoothing=share)
        for share in (0.0, 0.2)
    )
    log_p = np.asarray(jax.nn.log_softmax(x_BTD @ head_VD.T), np.float64)
    wanted = 0.8 * np.eye(V)[np.asarray(b.targets)] + 0.2 / V
    expected = -(wanted * log_p).sum(-1) * np.asarray(b.weights)
    np.testing.assert_allclose(smooth.objective, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(smooth.nats, plain.nats, rtol=1e-6)
    np.testing.assert_allclose(plain.objective, plain.nats, rtol=1e-6)
