"""A teacher without training, and a distillation with every term."""

import functools

import jax

from lm_jax.distill.teachers import Teacher
from lm_jax.models.families import create_model
from tests.helpers import randomise, tiny_config

V = 29
EVERYTHING = {
    f"distill__{name}": weight
    for name, weight in dict(
        feature="0.5", layer="0@0.2, 0.4@0.6", attention="0.3", contrastive="0.2",
        routed_feature="0.1", routed_attention="0.1", router_balance="0.05",
    ).items()
} | {
    "distill__experts": 3,
    "distill__router_top_k": 2,
    "distill__attention_layers": "0,-1",
}  # fmt: skip


@functools.cache
def toy_teacher(layers=3, d_model=24, seed=5, same=False):
    """A random teacher of another size; `same`: of the student's."""
    size = {} if same else dict(model__layers=layers, model__d_model=d_model)
    graphdef, init = create_model(tiny_config(**size), V, "reference")
    params = randomise(jax.eval_shape(init, jax.random.key(seed)), seed)
    return Teacher(("toy",), (graphdef,), (params,))
