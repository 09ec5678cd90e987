"""The objective of a distillation: terms, their weights over the run, and their sum."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import sharding
from lm_jax.config import ROUTED, STATES, Config, ConfigError, Curve, ModelConfig
from lm_jax.distill import terms
from lm_jax.distill.router import Router
from lm_jax.distill.teachers import Reading
from lm_jax.loss import Batch, Shifted, shift
from lm_jax.models.transformer import Linear, Observed

# Field of config.distill to the name under which the raw term is logged.
LOGGED_AS = {"kd": "kd_kl_t2", "lm": "lm_ce"}
TERMS = ("kd", "lm", *STATES)


def used(cfg: Config) -> list[str]:
    """The terms whose weight is not 0 throughout the run; divergence and cross-entropy always."""
    return [t for t in TERMS if t in ("kd", "lm") or not getattr(cfg.distill, t).zero]


def at(curve: Curve, progress: jax.Array) -> jax.Array:
    """Value of a curve after a share of the run."""
    shares, values = zip(*curve.points(), strict=True)
    if len(values) == 1:
        return jnp.asarray(values[0], jnp.float32)
    return jnp.interp(progress, jnp.array(shares), jnp.array(values))


def schedule(cfg: Config, update: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Weights of the used terms, and both temperatures, of update 0, 1, ..., steps - 1.

    `router_k`, the number of experts of a token, rises from 1 as a quarter of a sine.
    """
    d = cfg.distill
    progress = jnp.asarray(update, jnp.float32) / max(1, int(cfg.train.steps) - 1)
    values = {name: at(getattr(d, name), progress) for name in used(cfg)}
    values["temperature"] = at(d.temperature, progress)
    if set(ROUTED) & set(values):
        values["router_temperature"] = at(d.router_temperature, progress)
        risen = jnp.ceil(d.router_top_k * jnp.sin(0.5 * jnp.pi * progress))
        values["router_k"] = jnp.maximum(1, risen)
    return values


def counts(batch: Batch, names: list[str]) -> dict[str, jax.Array]:
    """What each term of a whole batch is divided by: tokens, or rows; at least 1.

    With another tokenizer the divergence counts aligned tokens, and terms on states those for which
    the teacher has one.
    """
    b = shift(batch)
    weights = taught = b.weights
    if "aligned" in batch:
        weights, taught = weights * (batch["teacher_place"] >= 0), weights * batch["aligned"]
    same_BT = b.segment_ids[:, 1:] == b.segment_ids[:, :-1]
    special = {
        "kd": taught.sum(),
        "lm": b.weights.sum(),
        "contrastive": (weights.sum(1) > 0).sum(),
        "routed_attention": (weights[:, 1:] * same_BT).sum(),
    }
    return {name: jnp.maximum(special.get(name, weights.sum()), 1) for name in names}


def log(
    cfg: Config,
    sums: dict[str, jax.Array],
    counts: dict[str, jax.Array],
    now: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Metrics of an update: raw terms, weighted terms, their sum as it was differentiated."""
    names = used(cfg)
    row = {"distill/objective": sums["objective"], "distill/temperature": now["temperature"]}
    for name in names:
        raw, logged_as = sums[name] / counts[name], LOGGED_AS.get(name, name)
        row[f"distill/{logged_as}"] = raw
        row[f"distill/weighted/{logged_as}"] = now[name] * raw
    row["distill/kd_kl"] = row["distill/kd_kl_t2"] / now["temperature"] ** 2
    if "contrastive" in names:
        rows = counts["contrastive"]
        row["distill/contrastive_accuracy"] = sums["contrastive_accuracy"] / rows
        row["distill/contrastive_chance"] = jnp.log(
            cfg.data.batch_size // sharding.accumulation(cfg)
        )
    return row


class Auxiliary(nnx.Module):
    """What is trained beside the student and thrown away with the teacher."""

    def __init__(
        self,
        cfg: Config,
        width: int,
        teacher_width: int,
        teacher: ModelConfig,
        rngs: nnx.Rngs,
    ):
        """Build what the used terms need.

        Args:
            cfg: resolved config of the student.
            width: of its final states.
            teacher_width: of the teacher's.
            teacher: its model.
            rngs: stream "params".

        Raises:
            ConfigError: for more experts than there are layers.
        """
        self.cfg, self.teacher_layers = cfg, teacher.layers
        names, L = used(cfg), cfg.model.layers
        if set(ROUTED) & set(names) and cfg.distill.experts > teacher.layers:
            raise ConfigError(
                f"config.distill.experts: {cfg.distill.experts} is above the {teacher.layers} "
                "layers of the teacher; lower it."
            )

        def project(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, inputs**-0.5, False, rngs)

        if "feature" in names:
            self.feature = project(width, teacher_width)
        if "contrastive" in names:
            self.contrastive = project(width, teacher_width)
        if "layer" in names:
            layers = [project(cfg.model.d_model, teacher.d_model) for _ in range(L)]
            self.layers = nnx.List(layers)
            self.layer_share = nnx.Param(jnp.zeros((L,)))
        if set(ROUTED) & set(names):
            self.router = Router(width, teacher_width, teacher.d_model, cfg.distill.experts, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        seen: Any,
        reading: Reading,
        b: Shifted,
        now: dict[str, jax.Array],
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Sum of each used term, by name, and what else is worth logging; see `counts`.

        Args:
            x_BTD: final states of the student.
            seen: what its layers compute, `Observed`, if a term needs it.
            reading: the teacher's.
            b: the batch.
            now: values of `schedule`.
        """
        found: dict[str, jax.Array] = {}
        extra: dict[str, jax.Array] = {}
        x_BTE, inside, weights = reading.x_BTE, reading.inside, b.weights
        if reading.there_BT is not None:
            weights = weights * reading.there_BT
        x_BTD = x_BTD.astype(jnp.float32)
        if "contrastive" in now:
            nats, _, hits = terms.contrastive(self.contrastive(x_BTD), x_BTE, weights)
            found["contrastive"] = nats
            extra["contrastive_accuracy"] = hits
        if "feature" in now:
            target_BTE = terms.normalised(x_BTE)
            found["feature"], _ = terms.squared_error(self.feature(x_BTD), target_BTE, weights)
        if "layer" in now:
            L = len(self.layers)
            chosen = [terms.layer_for(i, L, self.teacher_layers) for i in range(L)]
            x_LBTD = seen.x_LBTD.astype(jnp.float32)
            states = [project(x_BTD) for project, x_BTD in zip(self.layers, x_LBTD, strict=True)]
            targets = [terms.normalised(inside.x_LBTD[i]) for i in chosen]
            found["layer"], _ = terms.layers(states, targets, self.layer_share[...], weights)
        if "attention" in now:
            found["attention"] = self._maps(seen, inside, b)
        if set(ROUTED) & set(now):
            X = self.cfg.distill.experts
            experts = [terms.layer_for(i, X, self.teacher_layers) for i in range(X)]
            routed = self.router(
                x_BTD,
                x_BTE,
                inside.x_LBTD[jnp.array(experts)],
                b.segment_ids,
                weights,
                temperature=now["router_temperature"],
                k=now["router_k"],
            )
            parts = zip(ROUTED, routed, strict=True)
            found |= {name: total for name, (total, _) in parts if name in now}
        return found, extra

    def _maps(self, seen: Observed, inside: Observed, b: Shifted) -> jax.Array:
        """Mean over the chosen layers, each against the teacher's layer as deep."""
        L, total = self.cfg.model.layers, jnp.zeros(())
        layers = [int(number) % L for number in self.cfg.distill.attention_layers.split(",")]
        for i in layers:
            pairs = (seen, i), (inside, terms.layer_for(i, L, self.teacher_layers))
            mine, theirs = (
                terms.log_map(o.q_LBTHC[at], o.k_LBTKC[at], b.segment_ids) for o, at in pairs
            )
            total += terms.attention(mine, theirs, b.weights)[0] / len(layers)
        return total
