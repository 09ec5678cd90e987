"""A third objective is one class: masked tokens, with a bias that is trained beside the model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm_jax import loss as losses
from lm_jax import step
from lm_jax.models.families import create_model
from lm_jax.objective import Objective, Summary
from tests.helpers import random_batch, tiny_config

V = 29
MASK = V - 1  # an id that the text does not have


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedTokens:
    """Every third input is hidden and must be named from what stands before it."""

    graphdef: Any
    reads: Any = ()
    beside_lr: float = 1e-2

    def extend(self, batch):
        hidden = np.arange(batch["tokens"].shape[-1]) % 3 == 1
        return batch | {"hidden": np.broadcast_to(np.float32(hidden), batch["tokens"].shape)}

    def beside(self, key):
        return {"bias": jnp.zeros((V,))}

    def plan(self, batch, update):
        return jnp.maximum((batch["hidden"] * batch["weights"]).sum(), 1)

    def sums(self, trained, rows, plan, draw, reads):
        params, beside = trained
        model, b = nnx.merge(self.graphdef, params), losses.shift(rows)
        hidden_BT = rows["hidden"][:, :-1]
        inputs_BT = jnp.where(hidden_BT > 0, MASK, b.inputs)
        x_BTD = model(inputs_BT, b.segment_ids, b.positions, draw=draw)
        logits_BTV = model.logits(x_BTD) + beside["bias"][None, None]
        weights_BT = hidden_BT * rows["weights"][:, :-1]
        nats, count = losses.cross_entropy(logits_BTV, b.inputs, weights_BT)
        return nats / plan, {"nats": nats, "count": count}

    def summary(self, sums, plan):
        return Summary(1.0, sums["nats"], sums["count"], {"masked/share": sums["count"] / plan})


def made(**changes):
    cfg = tiny_config(train__steps="60", optim__peak_lr=1e-2, **changes)
    graphdef, init = create_model(cfg, V, "reference")
    objective: Objective = MaskedTokens(graphdef)
    key = jax.random.key(0)
    batch = objective.extend(random_batch(np.random.default_rng(0), (6, 12), MASK))
    state = jax.jit(lambda key: step.init_state(cfg, init(key), objective.beside(key)))(key)
    return cfg, objective, state, jax.tree.map(jnp.asarray, batch)


def test_micro_batches_add_up():
    whole, parts = (
        jax.jit(step.make_gradients(cfg, objective))(state.trained, 0, jnp.float32(1), batch)
        for cfg, objective, state, batch in (made(), made(data__micro_batch=2))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), whole, parts)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_is_learned_and_so_is_what_stands_beside(name):
    cfg, objective, state, batch = made(optim__name=name)
    batches = jax.tree.map(lambda x: jnp.repeat(x[None], 60, axis=0), batch)
    state, metrics = step.make_train_step(cfg, objective)(state, batches, objective.reads)
    assert metrics["train/loss"][-1] < 0.5 * metrics["train/loss"][0]
    assert (np.asarray(metrics["masked/share"]) == 1).all()
    seen = np.unique(np.asarray(batch["tokens"])[:, :-1][np.asarray(batch["hidden"])[:, :-1] > 0])
    bias = np.asarray(state.beside["bias"])
    assert bias[seen].mean() > bias[MASK] + 0.01


def test_the_first_step_beside_is_its_rate():
    cfg, objective, state, batch = made(optim__warmup="4")
    before = np.asarray(state.beside["bias"])
    one = jax.tree.map(lambda x: x[None], batch)
    state, metrics = step.make_train_step(cfg, objective)(state, one)
    moved = np.abs(np.asarray(state.beside["bias"]) - before).max()
    share = float(metrics["optim/lr"][0]) / cfg.optim.peak_lr
    assert share == pytest.approx(1 / 4)
    assert moved == pytest.approx(objective.beside_lr * share, rel=1e-2)  # Adam's first step
