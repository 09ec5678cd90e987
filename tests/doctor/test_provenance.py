"""The first operation and parameter that went non-finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import step
from lm_jax.doctor import provenance
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken
from tests.helpers import random_batch, thirds, tiny_config


def test_a_finite_computation_has_no_origin():
    assert provenance.trace(lambda x: jnp.where(x > 0, x, -jnp.inf).max(), x=jnp.ones(3)) is None


def test_a_gradient_of_zero_over_zero_is_found_behind_a_finite_loss():
    def loss(x):
        return jnp.where(x > 0, jnp.log(x), 0.0).sum()

    x = jnp.array([0.0, 1.0])
    assert provenance.trace(loss, x=x) is None
    origin = provenance.trace(lambda x: jax.grad(loss)(x), x=x)
    assert (origin.operation, origin.made) == ("div", "nan")
    assert "test_provenance.py" in origin.where and "loss)" in origin.where


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_the_overflow_in_a_loop_is_named_and_not_the_subtraction_that_it_spoils(wrap):
    @wrap
    def f(weights, x):
        x = jax.lax.scan(lambda x, w: (jnp.exp(x * w), None), x, weights["late"])[0]
        x = jax.lax.fori_loop(0, 2, lambda i, x: x + weights["early"], x)
        return jax.lax.cond(x.sum() > 0, lambda x: x - x, lambda x: x, x)

    weights = {"late": jnp.ones((4, 3)), "early": jnp.ones(3)}
    origin = provenance.trace(f, weights=weights, x=jnp.ones(3) * 5)
    assert (origin.operation, origin.made) == ("sub", "nan")
    cause = origin.infinity
    assert (cause.operation, cause.made, cause.parameter) == ("exp", "inf", "weights/late")
    assert "5" in cause.inputs or "148" in cause.inputs


def test_an_input_that_is_not_finite_is_named_itself():
    origin = provenance.trace(lambda p: p["w"] * 2, p={"w": jnp.array([1.0, jnp.nan])})
    assert (origin.operation, origin.where, origin.made) == ("input", "p/w", "nan")


def test_a_mask_of_infinities_is_passed_over_on_the_way_to_the_cause():
    def f(scores, scale):
        masked = jnp.where(jnp.arange(3) < 2, scores, -jnp.inf)
        return jax.nn.softmax(masked).sum() + jnp.sqrt(scale).sum()

    origin = provenance.trace(f, scores=jnp.ones(3), scale=-jnp.ones(2))
    assert (origin.operation, origin.parameter) == ("sqrt", "scale")


@pytest.mark.slow
@pytest.mark.parametrize("scan", thirds([False, True]))
def test_the_parameter_of_a_real_model_is_named(scan):
    cfg = tiny_config(model__scan_layers=scan)
    graphdef, init = create_model(cfg, 50, "reference")
    params = jax.jit(init)(jax.random.key(0))
    up = params["blocks"]["mlp"]["up"]
    up["kernel"] = up["kernel"].at[1, 0, 0].set(3e38)
    batch = random_batch(np.random.default_rng(0), (6, 12), 50)

    def gradients(params, batch):
        return step.gradients(NextToken(graphdef), params, batch, accumulation=1, key=None)

    origin = provenance.trace(gradients, params=params, batch=batch)
    cause = origin.infinity or origin
    assert (cause.operation, cause.made) == ("dot_general", "inf")
    assert "mlp/up/kernel" in cause.parameter
    assert scan or cause.parameter.endswith("[1]")  # of the second layer
    assert "linear" in cause.where.lower()
