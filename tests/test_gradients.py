"""Every backward pass against central differences in float64 (DESIGN, decision 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from lm_jax import loss
from lm_jax.kernels.attention import attend
from lm_jax.models.families import create_model
from lm_jax.models.layers import Norm, Read, head_logits
from lm_jax.models.rotary import rotary
from lm_jax.models.transformer import MLP, Block
from lm_jax.objective import NextToken
from tests.differences import check_gradient, directional_error
from tests.helpers import FAMILIES, every, random_batch, randomise, tiny_config

V = 7


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def float64_batch(seed, shape):
    batch = random_batch(np.random.default_rng(seed), shape, V)
    return {k: jnp.asarray(v, jnp.float64 if k == "weights" else None) for k, v in batch.items()}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def test_cross_entropy():
    b = loss.shift(float64_batch(0, (2, 5)))
    check_gradient(lambda z: loss.cross_entropy(z, b.targets, b.weights)[0], normal(1, 2, 4, V))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_head(softcap):
    b = loss.shift(float64_batch(2, (2, 5)))

    def f(x):
        logits = head_logits(x["hidden"], x["head"], softcap)
        return loss.cross_entropy(logits, b.targets, b.weights)[0]

    check_gradient(f, {"hidden": normal(3, 2, 4, 6), "head": normal(4, V, 6)})


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm(kind):
    graphdef, params = nnx.split(Norm(6, kind, True))
    params = randomise(jax.tree.map(lambda x: x.astype(jnp.float64), nnx.to_pure_dict(params)), 0)
    w = normal(5, 3, 6)
    check_gradient(
        lambda x: (nnx.merge(graphdef, x["params"])(x["x"]) * w).sum(),
        {"params": params, "x": normal(6, 3, 6)},
    )


def test_rotary():
    w = normal(7, 1, 5, 2, 6)
    positions = jnp.arange(5)[None]
    check_gradient(
        lambda x: jnp.sin((rotary(x, positions, 100.0) * w).sum()), normal(8, 1, 5, 2, 6)
    )


def test_attention():
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0]])
    w = normal(9, 1, 6, 4, 3)

    def f(x):
        return (attend(x["q"], x["k"], x["v"], segment_ids_BT=ids, impl="reference") * w).sum()

    check_gradient(
        f, {"q": normal(10, 1, 6, 4, 3), "k": normal(11, 1, 6, 2, 3), "v": normal(12, 1, 6, 2, 3)}
    )


@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "gelu_tanh", "relu2"])
def test_mlp(mlp):
    cfg = tiny_config(model__mlp=mlp, model__d_ff=5, model__bias=True).model
    graphdef, params = nnx.split(MLP(cfg, nnx.Rngs(params=0)))
    params = randomise(jax.tree.map(lambda x: x.astype(jnp.float64), nnx.to_pure_dict(params)), 1)
    x = normal(13, 1, 3, 16)
    w = normal(14, 1, 3, 16)
    check_gradient(lambda p: (nnx.merge(graphdef, p)(x) * w).sum(), params)


@pytest.mark.parametrize("family", ["grouped", "added"])
def test_block(family):
    cfg = tiny_config(model__d_ff=8, **FAMILIES[family]).model
    graphdef, params = nnx.split(Block(cfg, "reference", nnx.Rngs(params=0)))
    params = randomise(jax.tree.map(lambda x: x.astype(jnp.float64), nnx.to_pure_dict(params)), 2)
    x, w = normal(15, 1, 4, 16), normal(16, 1, 4, 16)
    ids, positions = jnp.ones((1, 4), int), jnp.arange(4)[None]
    read = Read(ids, ids, positions, normal(17, 1, 4, 16))
    check_gradient(lambda p: (nnx.merge(graphdef, p)(x, read, None)[0] * w).sum(), params)


@pytest.mark.parametrize("family", every(FAMILIES))
def test_whole_model(family):
    cfg = tiny_config(data__seq_len=5, **FAMILIES[family])
    graphdef, init = create_model(cfg, V, "reference")
    like = jax.eval_shape(init, jax.random.key(0))
    params = randomise(jax.tree.map(lambda x: x.update(dtype=jnp.float64), like), 3)
    batch = float64_batch(17, (2, 6))

    def f(params):
        sums = NextToken(graphdef, jnp.float64).scored(params, batch)
        return sums.objective / sums.count

    f = jax.jit(f)
    assert ":f32[" not in str(jax.make_jaxpr(f)(params)), "computes in float32 somewhere"
    for seed in range(5):
        assert directional_error(f, params, seed, 1e-6) < 1e-6
    check_grads(f, (params,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-6)


def test_a_wrong_backward_is_seen():
    """The check itself must be able to fail: a gradient that is 0.1 % too large goes red."""

    @jax.custom_vjp
    def f(x):
        return jnp.sum(x**3)

    f.defvjp(lambda x: (f(x), x), lambda x, g: (g * 3.003 * x**2,))
    assert directional_error(f, normal(18, 5), 0, 1e-5) > 5e-4
