"""The objective of a distillation: terms, their weights over the run, and their sum."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import sharding
from lm_jax.config import INSIDE, ROUTED, STATES, Config, ConfigError, Curve, ModelConfig
from lm_jax.distill import terms
from lm_jax.distill.router import Router, projection
from lm_jax.distill.teachers import Reading, Teacher, hidden_states
from lm_jax.kernels.dropout import Draw
from lm_jax.kernels.linear_divergence import linear_divergence
from lm_jax.loss import Batch, Shifted, shift
from lm_jax.models.transformer import Observed
from lm_jax.objective import Summary

# Field of config.distill to the name under which the raw term is logged.
LOGGED_AS = {"kd": "kd_kl_t2", "lm": "lm_ce"}


def used(cfg: Config) -> list[str]:
    """The terms whose weight is not 0 throughout the run; divergence and cross-entropy always."""
    return ["kd", "lm", *(t for t in STATES if not getattr(cfg.distill, t).zero)]


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


class Plan(NamedTuple):
    """Facts of the whole batch and of the run that every micro-batch needs."""

    now: dict[str, jax.Array]  # see `schedule`
    counts: dict[str, jax.Array]  # the divisor of each term: its tokens or rows, at least 1
    scored: jax.Array  # tokens of the batch
    there: jax.Array  # of these, for which a teacher has a state


@dataclasses.dataclass(frozen=True, eq=False)
class Distilled:
    """The weighted sum of all terms, each divided by its count, as a `lm_jax.objective.Objective`.

    What is trained beside the student takes `distill.lr` on the student's schedule.
    """

    cfg: Config
    graphdef: nnx.GraphDef
    teacher: Teacher
    auxiliary: nnx.GraphDef | None  # of what is trained beside the student
    beside: Callable[[jax.Array], Any]

    @property
    def reads(self) -> Any:
        """The parameters of the teachers."""
        return self.teacher.params

    @property
    def beside_lr(self) -> float:
        """Peak learning rate of projections and router; 0 without."""
        return 0.0 if self.auxiliary is None else self.cfg.distill.lr

    def extend(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add what the teacher reads or has kept."""
        return self.teacher.extend(batch)

    def plan(self, batch: Batch, update: jax.typing.ArrayLike) -> Plan:
        """Weights of this update, and the divisors of its terms.

        With another tokenizer the divergence counts aligned tokens, and terms on states those for
        which the teacher has one.
        """
        b = shift(batch)
        weights = taught = b.weights
        if self.teacher.first_bytes is not None:
            weights, taught = weights * (batch["teacher_place"] >= 0), weights * batch["aligned"]
        same_BT = b.segment_ids[:, 1:] == b.segment_ids[:, :-1]
        scored = b.weights.sum()
        special = {
            "kd": taught.sum(),
            "lm": scored,
            "contrastive": (weights.sum(1) > 0).sum(),
            "routed_attention": (weights[:, 1:] * same_BT).sum(),
        }
        counts = {n: jnp.maximum(special.get(n, weights.sum()), 1) for n in used(self.cfg)}
        return Plan(schedule(self.cfg, update), counts, scored, weights.sum())

    def sums(
        self, trained: Any, rows: Batch, plan: Plan, draw: Draw | None, reads: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The share of some rows in the objective of their batch, and the terms before weights.

        The divergence is with T^2.
        """
        d, now, counts = self.cfg.distill, plan.now, plan.counts
        inside = bool(set(INSIDE) & set(now))
        dtype = jnp.dtype(self.cfg.train.compute_dtype)
        student, aux = (trained, None) if self.auxiliary is None else trained
        model, b = nnx.merge(self.graphdef, student), shift(rows)
        read = (b.inputs, b.segment_ids, b.positions)
        x_BTD, seen = hidden_states(model, read, dtype, draw, inside=inside)
        reading = self.teacher.read(reads, rows, b, dtype, inside=inside)
        found = linear_divergence(
            x_BTD,
            model.head_VD(),
            reading.kept or reading.members,
            b.weights,
            b.targets,
            kind=d.kind,  # type: ignore[arg-type]
            temperature=now["temperature"],
            beta=d.beta,
            # Not divided yet: in float16 the gradient of a logit would underflow.
            kd=now["kd"] * (counts["lm"] / counts["kd"]),
            lm=now["lm"],
            support=d.support,  # type: ignore[arg-type]
            top_k=d.top_k,
            groups=reading.groups,
            softcap=model.cfg.logit_softcap,
        )
        total = found.objective / counts["lm"]
        sums = {"kd": now["temperature"] ** 2 * found.divergence, "lm": found.nats}
        if self.auxiliary is not None:
            sums |= nnx.merge(self.auxiliary, aux)(x_BTD, seen, reading, b, now)
            for name in [name for name in sums if name in STATES]:
                total += now[name] * sums[name] / counts[name]
        return total, sums | {"objective": total}

    def summary(self, sums: dict[str, jax.Array], plan: Plan) -> Summary:
        """Every term is divided already.

        Logged are the raw and the weighted terms, and their sum as it was differentiated.
        """
        now, counts = plan.now, plan.counts
        row = {"objective": sums["objective"], "temperature": now["temperature"]}
        for name, count in counts.items():
            raw, logged_as = sums[name] / count, LOGGED_AS.get(name, name)
            row |= {logged_as: raw, f"weighted/{logged_as}": now[name] * raw}
        row["kd_kl"] = row["kd_kl_t2"] / now["temperature"] ** 2
        if "contrastive" in counts:
            candidates = self.cfg.data.batch_size // sharding.accumulation(self.cfg)
            row["contrastive_accuracy"] = sums["contrastive_accuracy"] / counts["contrastive"]
            row["contrastive_chance"] = jnp.log(candidates)
        if self.teacher.first_bytes is not None:
            row["aligned_fraction"] = counts["kd"] / counts["lm"]
            row["untaught_fraction"] = 1 - plan.there / counts["lm"]
        metrics = {f"distill/{name}": value for name, value in row.items()}
        return Summary(1.0, sums["lm"], plan.scored, metrics)


def distilled(
    cfg: Config, graphdef: nnx.GraphDef, init: Callable[[jax.Array], Any], teacher: Teacher
) -> Distilled:
    """The objective of a student's resolved config; `init` makes its parameters from a key.

    Raises:
        ConfigError: for more experts than the teacher has layers.
    """
    if set(used(cfg)) <= {"kd", "lm"}:
        return Distilled(cfg, graphdef, teacher, None, lambda key: None)

    def width(graphdef: nnx.GraphDef, params: Any) -> int:
        return jax.eval_shape(lambda p: nnx.merge(graphdef, p).head_VD(), params).shape[1]

    mine = width(graphdef, jax.eval_shape(init, jax.random.key(0)))
    theirs = width(teacher.models[0], teacher.params[0])
    model = nnx.merge(teacher.models[0], teacher.params[0]).cfg

    def build(key: jax.Array) -> Auxiliary:
        return Auxiliary(cfg, mine, theirs, model, nnx.Rngs(params=key))

    def beside(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(jax.random.fold_in(key, 1)), nnx.Param))

    auxiliary = nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0))))
    return Distilled(cfg, graphdef, teacher, auxiliary, beside)


class Auxiliary(nnx.Module):
    """Projections and router: trained beside the student, needed only while it is distilled."""

    def __init__(
        self, cfg: Config, width: int, teacher_width: int, teacher: ModelConfig, rngs: nnx.Rngs
    ):
        """Draw what the used terms need from the stream "params"; widths are of final states.

        Raises:
            ConfigError: for more experts than the teacher has layers.
        """
        self.cfg, self.teacher_layers = cfg, teacher.layers
        self.windows = cfg.model.window, teacher.window
        names, L, experts = set(used(cfg)), cfg.model.layers, cfg.distill.experts
        if "feature" in names:
            self.feature = projection(width, teacher_width, rngs)
        if "contrastive" in names:
            self.contrastive = projection(width, teacher_width, rngs)
        if "layer" in names:
            layers = [projection(cfg.model.d_model, teacher.d_model, rngs) for _ in range(L)]
            self.layers = nnx.List(layers)
            self.layer_share = nnx.Param(jnp.zeros((L,)))
        if names.intersection(ROUTED):
            if experts > teacher.layers:
                raise ConfigError(
                    f"config.distill.experts: {experts} is above the {teacher.layers} layers of "
                    "the teacher; lower it."
                )
            self.router = Router(width, teacher_width, teacher.d_model, experts, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        seen: Any,
        reading: Reading,
        b: Shifted,
        now: dict[str, jax.Array],
    ) -> dict[str, jax.Array]:
        """The sum of each used term, and `contrastive_accuracy`, the rows that it finds.

        Of the student there are its final states and, if a term needs them, what its layers compute
        (`seen`, an `Observed`); `now` holds the values of `schedule`.
        """
        found: dict[str, jax.Array] = {}
        x_BTE, inside, weights = reading.members[0].x_BTE, reading.inside, b.weights
        if reading.there_BT is not None:
            weights = weights * reading.there_BT
        x_BTD = x_BTD.astype(jnp.float32)
        if "contrastive" in now:
            found["contrastive"], found["contrastive_accuracy"] = terms.contrastive(
                self.contrastive(x_BTD), x_BTE, weights
            )
        if "feature" in now:
            target_BTE = terms.normalised(x_BTE)
            found["feature"] = terms.squared_error(self.feature(x_BTD), target_BTE, weights)
        if "layer" in now:
            x_LBTD = seen.x_LBTD.astype(jnp.float32)
            states = [project(x) for project, x in zip(self.layers, x_LBTD, strict=True)]
            chosen = terms.as_deep(len(states), self.teacher_layers)
            targets = [terms.normalised(inside.x_LBTD[i]) for i in chosen]
            found["layer"] = terms.layers(states, targets, self.layer_share[...], weights)
        if "attention" in now:
            found["attention"] = self._maps(seen, inside, b)
        if "router_k" in now:
            experts = terms.as_deep(self.cfg.distill.experts, self.teacher_layers)
            routed = self.router(
                x_BTD,
                x_BTE,
                inside.x_LBTD[jnp.array(experts)],
                b.segment_ids,
                weights,
                temperature=now["router_temperature"],
                k=now["router_k"],
            )
            found |= {name: total for name, total in routed.items() if name in now}
        return found

    def _maps(self, seen: Observed, inside: Observed, b: Shifted) -> jax.Array:
        """Mean over the chosen layers, each against the teacher's layer as deep."""
        L, total = self.cfg.model.layers, jnp.zeros(())
        as_deep = terms.as_deep(L, self.teacher_layers)
        layers = [int(number) % L for number in self.cfg.distill.attention_layers.split(",")]
        for i in layers:
            mine, theirs = (
                terms.log_map(o.q_LBTHC[at], o.k_LBTKC[at], b.segment_ids, window)
                for o, at, window in zip((seen, inside), (i, as_deep[i]), self.windows, strict=True)
            )
            total += terms.attention(mine, theirs, b.weights) / len(layers)
        return total
