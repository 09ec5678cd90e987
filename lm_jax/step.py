"""Pure train and eval steps, for every objective and every family of models."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm_jax import collectives, optim, sharding
from lm_jax import loss as losses
from lm_jax.config import Config
from lm_jax.kernels.dropout import Draw
from lm_jax.models.families import family
from lm_jax.objective import Metrics, Objective, Summary
from lm_jax.optim import Params


class TrainState(NamedTuple):
    """All that training carries from one update to the next."""

    step: jax.Array  # int32, updates tried
    params: Params
    opt_state: Any
    ema: Params  # running average of params; None if off
    loss_scale: jax.Array  # float32; 1 unless the compute dtype is float16
    good_steps: jax.Array  # int32, finite updates since the loss scale last changed
    beside: Params | None = None  # what the objective trains with the model; None if nothing

    def saved(self) -> dict[str, Any]:
        """The fields for a checkpoint; `beside` only if it is used."""
        return {n: x for n, x in self._asdict().items() if n != "beside" or x is not None}

    @property
    def trained(self) -> Any:
        """The differentiated parameters: the model's, or the pair of those and `beside`."""
        return self.params if self.beside is None else (self.params, self.beside)

    def with_trained(self, trained: Any) -> "TrainState":
        """The state with other values of `trained`."""
        if self.beside is None:
            return self._replace(params=trained)
        return self._replace(params=trained[0], beside=trained[1])


def choose_loss(cfg: Config, vocab_size: int) -> tuple[str, str]:
    """The loss that a resolved config gets, by a device's micro-batch, and the reason."""
    rows = cfg.data.batch_size // sharding.row_shares() // sharding.accumulation(cfg)
    return losses.choose_impl(cfg.loss.impl, tokens=rows * cfg.data.seq_len, vocab_size=vocab_size)


def init_state(cfg: Config, params: Params, beside: Params | None = None) -> TrainState:
    """The state before the first update; `beside` is what the objective trains with the model."""
    scale = 2.0**10 if cfg.train.compute_dtype == "float16" else 1.0
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=None,
        ema=jax.tree.map(jnp.copy, params) if cfg.optim.ema_decay else None,
        loss_scale=jnp.full((), scale, jnp.float32),
        good_steps=jnp.zeros((), jnp.int32),
        beside=beside,
    )
    # The first state of the optimiser is the same at every learning rate.
    tx = optim.make_optimizer(cfg.optim, 0.0 if beside is None else cfg.optim.peak_lr)
    return state._replace(opt_state=tx.init(state.trained))


def gradients(
    objective: Objective,
    trained: Any,
    batch: losses.Batch,
    *,
    accumulation: int,
    key: jax.Array | None,
    update: jax.typing.ArrayLike = 0,
    scale: jax.typing.ArrayLike = 1.0,
    reads: Any = (),
) -> tuple[Any, Summary]:
    """The gradient of the mean objective over all micro-batches, and what came of the batch.

    Micro-batches add objectives and sums and are divided once, so their token counts may differ.
    Each device of the mesh that is set adds those of its rows; the sums over devices come last, and
    once an update but for parameters that are split, whose gradients no device holds whole.

    Args:
        objective: what is minimised.
        trained: `TrainState.trained`; the gradient has its structure.
        batch: all rows.
        accumulation: number of micro-batches.
        key: of dropout; None for none.
        update: number of the update, from 0.
        scale: multiplies the objective before differentiation and divides the gradient after it.
        reads: `objective.reads`, as an argument of the jitted function around this.
    """
    plan = objective.plan(batch, update)

    def of_rows(trained: Any, rows: losses.Batch, plan: Any, key: Any, scale: Any, reads: Any):
        def scaled(trained: Any, rows: losses.Batch, draw: Draw | None):
            total, sums = objective.sums(trained, rows, plan, draw, reads)
            return total * scale, sums

        return _accumulated(scaled, trained, rows, key, accumulation)

    mapped = sharding.over_rows(of_rows, rows=[1], results=[0, "sum"])
    grads, sums = mapped(trained, batch, plan, key, jnp.asarray(scale, jnp.float32), reads)
    found = objective.summary(sums, plan)
    divisor = jnp.asarray(found.divisor * scale)
    return jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads), found


def _accumulated(
    function: Callable[[Params, losses.Batch, Draw | None], tuple[jax.Array, Any]],
    params: Params,
    batch: losses.Batch,
    key: jax.Array | None,
    accumulation: int,
) -> tuple[Params, Any]:
    """Gradient of `function(params, rows, draw) -> (objective, sums)`, and the sums.

    Both are added up over micro-batches.
    """
    differentiate = jax.grad(function, has_aux=True)
    number = len(jax.tree.leaves(batch)[0])
    first = collectives.axis_index(*collectives.ROWS) * number
    draw = None if key is None else Draw(key, first)
    if accumulation == 1:
        return differentiate(params, batch, draw)

    # Neighbouring rows go to different micro-batches, which are the same ones on any mesh.
    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)

    def one(micro):
        index, rows = micro
        here = draw and draw._replace(first=draw.first + index, step=accumulation)
        return differentiate(params, rows, here)

    def body(carry, micro):
        return jax.tree.map(jnp.add, carry, one(micro)), None

    micros = (jnp.arange(accumulation), jax.tree.map(split, batch))
    like = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(body, zeros, micros)[0]


def dropout_key(cfg: Config, step: jax.Array) -> jax.Array | None:
    """The key of an update's dropout; None without dropout."""
    rates = cfg.model.dropout, cfg.model.attention_dropout, cfg.model.embedding_dropout
    return jax.random.fold_in(jax.random.key(cfg.seed + 1), step) if any(rates) else None


def make_gradients(cfg: Config, objective: Objective) -> Callable[..., tuple[Any, Summary]]:
    """`(trained, update, loss_scale, batch, reads)` to the result of `gradients`, of a config."""

    def of_update(
        trained: Any,
        update: jax.Array,
        loss_scale: jax.Array,
        batch: losses.Batch,
        reads: Any = objective.reads,
    ) -> tuple[Any, Summary]:
        return gradients(
            objective,
            trained,
            batch,
            accumulation=sharding.accumulation(cfg),
            key=dropout_key(cfg, update),
            update=update,
            scale=loss_scale,
            reads=reads,
        )

    return of_update


def make_train_step(cfg: Config, objective: Objective) -> Any:
    """`(state, batches, objective.reads) -> (state, metrics)`, jitted.

    `batches` holds arrays [K, B, T + 1]; K updates run in one dispatch and every metric comes
    back with shape [K]. The state is donated.
    """
    gradients_of = make_gradients(cfg, objective)
    update = make_update(cfg, objective.beside_lr)

    def train_steps(
        state: TrainState, batches: losses.Batch, reads: Any = ()
    ) -> tuple[TrainState, Metrics]:
        def train_step(state: TrainState, batch: losses.Batch) -> tuple[TrainState, Metrics]:
            return update(
                state,
                *gradients_of(state.trained, state.step, state.loss_scale, batch, reads),
            )

        with jax.default_matmul_precision(cfg.train.matmul_precision):
            return jax.lax.scan(train_step, state, batches)

    return jax.jit(train_steps, donate_argnums=0)


def make_update(
    cfg: Config, beside_lr: float = 0.0
) -> Callable[[TrainState, Any, Summary], tuple[TrainState, Metrics]]:
    """`(state, gradient, summary) -> (state, metrics)`: the update that a gradient makes.

    Where the nats or the gradient are not finite, parameters and optimiser stay as they are. What
    the optimiser keeps is finite after any other gradient; where the parameters are not, or so
    large that their squares overflow, their norm is NaN.
    What is trained beside the model is neither clipped nor part of the logged norms.
    """
    short = cfg.train.compute_dtype == "bfloat16"
    tx = optim.make_optimizer(cfg.optim, beside_lr, short)
    schedule = optim.learning_rate(cfg.optim, int(cfg.train.steps))

    def update(state: TrainState, grads: Any, found: Summary) -> tuple[TrainState, Metrics]:
        own, *others = grads if beside_lr else (grads,)
        layer_norms = _layer_norms(own) if cfg.train.layer_norms else {}
        own, norm, clipped_norm = optim.clip(own, cfg.optim.clip_norm)
        lr = schedule(state.step)
        clipped = (own, *others) if beside_lr else own
        direction, opt_state = tx.update(clipped, state.opt_state, state.trained)
        updates = jax.tree.map(lambda u: -lr * u, direction)
        new = state.with_trained(optax.apply_updates(state.trained, updates))
        new = new._replace(opt_state=opt_state)
        if cfg.optim.ema_decay:
            # Warm-up: early averages must forget the random start.
            decay = jnp.minimum(cfg.optim.ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, new.params)
            new = new._replace(ema=ema)

        finite = jnp.isfinite(norm) & jnp.isfinite(found.nats)
        for other in others:
            finite &= jnp.isfinite(optim.global_norm(other))
        # Not by the new parameters, which would wait in memory for it beside the old ones.
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        sound = jnp.isfinite(optim.global_norm(new.trained))
        moved = optim.global_norm(updates[0] if beside_lr else updates)
        metrics = {
            "train/loss": found.nats / jnp.maximum(found.count, 1),
            "data/scored": found.count,
            "optim/lr": lr,
            "optim/grad_norm": norm,
            "optim/grad_norm_clipped": clipped_norm,
            "optim/clip_rate": (clipped_norm < norm).astype(jnp.float32),
            "optim/update_norm": jnp.where(finite, moved, 0.0),
            "optim/param_norm": jnp.where(sound, optim.global_norm(new.params), jnp.nan),
            "optim/skipped_updates": 1 - finite.astype(jnp.float32),
            **layer_norms,
            **found.metrics,
        }
        new = new._replace(step=state.step + 1)
        if cfg.train.compute_dtype == "float16":
            metrics["optim/loss_scale"] = state.loss_scale
            scale, good_steps = next_scale(state.loss_scale, state.good_steps, finite)
            new = new._replace(loss_scale=scale, good_steps=good_steps)
        return new, metrics

    return update


def _layer_norms(grads: Params) -> Metrics:
    leaves = optim.by_layer(grads).items()
    return {f"grad_norm/{name}": optim.global_norm(g) for name, g in leaves}


def next_scale(
    scale: jax.Array, good_steps: jax.Array, finite: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss scale and finite updates since it changed: halved now, or doubled after 1,000."""
    grow = finite & (good_steps >= 999)
    scale = jnp.where(finite, jnp.where(grow, scale * 2, scale), scale / 2)
    return jnp.clip(scale, 2.0**-16, 2.0**24), jnp.where(finite & ~grow, good_steps + 1, 0)


def make_eval_step(cfg: Config, graphdef: nnx.GraphDef, mesh: Mesh | None = None) -> Callable:
    """`(params, batch) -> metrics` of one batch, jitted; on a mesh, every process gets them whole.

    `nats`, `count` and `correct` are sums, whose terms are `token_nats`, `token_weights` and
    `token_correct` [B, T]. Where evaluation observes something of the family, `observed`
    [L, columns] are its sums over the scored tokens.
    """
    dtype = jnp.dtype(cfg.train.compute_dtype)
    observed = family(cfg.model).observed

    def eval_step(params: Params, batch: losses.Batch) -> tuple[Metrics, Metrics]:
        model = nnx.merge(graphdef, params)
        b, seen = losses.shift(batch), {}
        read = (b.inputs, b.segment_ids, b.positions)
        with jax.default_matmul_precision(cfg.train.matmul_precision):
            if observed:
                x_BTD, seen["observed"] = observed.sums(model, read, b.weights, dtype)
            else:
                x_BTD = model(*read, dtype=dtype)
            terms = losses.from_hidden(
                x_BTD,
                model.head_VD(),
                b,
                softcap=cfg.model.logit_softcap,
                impl=cfg.loss.impl,
                summed=False,
            )
        sums = {name: getattr(terms, name).sum() for name in ("nats", "count", "correct")}
        by_token = {
            "token_nats": terms.nats,
            "token_weights": terms.count,
            "token_correct": terms.correct,
        }
        return sums | seen, by_token

    def joined(found: tuple[Metrics, Metrics]) -> Metrics:
        return found[0] | found[1]

    if mesh is None:
        return jax.jit(lambda params, batch: joined(eval_step(params, batch)))
    mapped = sharding.over_rows(eval_step, rows=[1], results=["sum", "rows"], mesh=mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda params, batch: joined(mapped(params, batch)), out_shardings=whole)
