"""The train step of a distillation: that of `lm_jax.step` with a teacher beside the student."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lm_jax import loss as losses
from lm_jax import optim, sharding, step
from lm_jax.config import INSIDE, Config
from lm_jax.distill import objective
from lm_jax.distill.objective import Auxiliary
from lm_jax.distill.teachers import Teacher
from lm_jax.kernels.linear_divergence import linear_distillation
from lm_jax.step import Metrics, Params, TrainState


def create_auxiliary(
    cfg: Config, graphdef: nnx.GraphDef, init: Callable[[jax.Array], Params], teacher: Teacher
) -> tuple[nnx.GraphDef | None, Callable[[jax.Array], Any]]:
    """Structure of what is trained beside the student, and a function from a key to its state.

    Structure and state are None where only divergence and cross-entropy are used.

    Args:
        cfg: resolved config of the student.
        graphdef: its structure.
        init: from a key to its parameters.
        teacher: what it learns from.

    Raises:
        ConfigError: for more experts than the teacher has layers.
    """
    if set(objective.used(cfg)) <= {"kd", "lm"}:
        return None, lambda key: None

    def width(graphdef: nnx.GraphDef, params: Params) -> int:
        head = jax.eval_shape(lambda params: nnx.merge(graphdef, params).head_VD(), params)
        return head.shape[1]

    mine = width(graphdef, jax.eval_shape(init, jax.random.key(0)))
    theirs = width(teacher.models[0], teacher.params[0])
    model = nnx.merge(teacher.models[0], teacher.params[0]).cfg

    def build(key: jax.Array) -> Auxiliary:
        return Auxiliary(cfg, mine, theirs, model, nnx.Rngs(params=key))

    def init_aux(key: jax.Array) -> Any:
        params = nnx.to_pure_dict(nnx.state(build(jax.random.fold_in(key, 1)), nnx.Param))
        return {"params": params, "opt_state": _optimiser(cfg).init(params)}

    return nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0)))), init_aux


def make_objective(
    cfg: Config, graphdef: nnx.GraphDef, auxiliary: nnx.GraphDef | None, teacher: Teacher
) -> Callable:
    """`(params, rows, now, counts, key, teacher_params) -> (objective, sums)` of a micro-batch.

    `params` is `TrainState.trained`, `now` a value of `objective.schedule`, and `counts` what each
    term is divided by, so that the objectives of micro-batches add up to that of their batch.
    `sums` holds the terms before weight and division, the divergence with T^2.
    """
    d = cfg.distill
    inside = bool(set(INSIDE) & set(objective.used(cfg)))
    dtype = jnp.dtype(cfg.train.compute_dtype)

    def of_rows(
        params: Any,
        rows: losses.Batch,
        now: dict[str, jax.Array],
        counts: dict[str, jax.Array],
        key: jax.Array | None,
        teacher_params: Any,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        student, aux = params if auxiliary is not None else (params, None)
        model, b = nnx.merge(graphdef, student), losses.shift(rows)
        read = (b.inputs, b.segment_ids, b.positions)
        seen = None
        if inside:
            x_BTD, seen = model.observed(*read, dtype=dtype, key=key)
        else:
            x_BTD = model(*read, dtype=dtype, key=key)
        reading = teacher.read(teacher_params, rows, b, dtype, inside=inside)
        found = linear_distillation(
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
        if auxiliary is None:
            return total, sums
        terms, extra = nnx.merge(auxiliary, aux)(x_BTD, seen, reading, b, now)
        for name, term in terms.items():
            total += now[name] * term / counts[name]
        return total, sums | terms | extra

    return of_rows


def make_gradients(
    cfg: Config, graphdef: nnx.GraphDef, auxiliary: nnx.GraphDef | None, teacher: Teacher
) -> Callable:
    """`(params, step, loss_scale, batch[, teacher_params]) -> (nats, count, gradient, metrics)`.

    `params` is `TrainState.trained`, and the gradient has its structure.
    """
    names = objective.used(cfg)
    of_rows = make_objective(cfg, graphdef, auxiliary, teacher)

    def of_update(
        params: Any,
        update: jax.Array,
        loss_scale: jax.Array,
        batch: losses.Batch,
        teacher_params: Any = teacher.params,
    ) -> tuple[jax.Array, jax.Array, Any, Metrics]:
        now = objective.schedule(cfg, update)
        counts = objective.counts(batch, names)

        def scaled(params: Any, rows: losses.Batch, key: jax.Array | None):
            total, sums = of_rows(params, rows, now, counts, key, teacher_params)
            return total * loss_scale, sums | {"objective": total}

        key = step.dropout_key(cfg, update)
        grads, sums = step.accumulated(scaled, params, batch, key, sharding.accumulation(cfg))
        grads = jax.tree.map(lambda g: g / loss_scale.astype(g.dtype), grads)
        logged = objective.log(cfg, sums, counts, now)
        if "aligned" in batch:
            logged["distill/aligned_fraction"] = counts["kd"] / counts["lm"]
        return sums["lm"], losses.shift(batch).weights.sum(), grads, logged

    return of_update


def make_train_step(
    cfg: Config, graphdef: nnx.GraphDef, auxiliary: nnx.GraphDef | None, teacher: Teacher
) -> Callable:
    """`(state, batches) -> (state, metrics)`, as `lm_jax.step.make_train_step`, with a teacher.

    `state.aux` is what `create_auxiliary` gave; it takes Adam at `distill.lr` on the schedule of
    the student, without decay and clipping.
    """
    gradients_of = make_gradients(cfg, graphdef, auxiliary, teacher)
    update, tx = step.make_update(cfg), _optimiser(cfg)

    def train_step(state: TrainState, batch: losses.Batch, teacher_params: Any):
        nats, count, grads, logged = gradients_of(
            state.trained, state.step, state.loss_scale, batch, teacher_params
        )
        if auxiliary is None:
            new, metrics = update(state, nats, count, grads)
            return new, metrics | logged
        grads, aux_grads = grads
        finite = jnp.isfinite(optim.global_norm(aux_grads))
        new, metrics = update(state, nats, count, grads, finite)
        params = state.aux["params"]
        direction, opt_state = tx.update(aux_grads, state.aux["opt_state"], params)
        lr = metrics["optim/lr"] / cfg.optim.peak_lr * cfg.distill.lr
        moved = optax.apply_updates(params, jax.tree.map(lambda u: -lr * u, direction))
        done = metrics["optim/skipped_updates"] == 0
        aux = {"params": moved, "opt_state": opt_state}
        aux = jax.tree.map(lambda a, old: jnp.where(done, a, old), aux, state.aux)
        return new._replace(aux=aux), metrics | logged

    def train_steps(
        state: TrainState, batches: losses.Batch, teacher_params: Any
    ) -> tuple[TrainState, Metrics]:
        with jax.default_matmul_precision(cfg.train.matmul_precision):
            return jax.lax.scan(lambda s, b: train_step(s, b, teacher_params), state, batches)

    jitted = jax.jit(train_steps, donate_argnums=0)
    return lambda state, batches: jitted(state, batches, teacher.params)


def _optimiser(cfg: Config) -> optax.GradientTransformation:
    return optax.scale_by_adam(cfg.optim.b1, cfg.optim.b2, cfg.optim.eps)
