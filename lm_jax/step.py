"""Pure train and eval steps. The only place that divides a loss by its token count."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm_jax import loss as losses
from lm_jax import optim, sharding
from lm_jax.config import Config
from lm_jax.kernels import attention
from lm_jax.models import musota
from lm_jax.models.musota import MuSota
from lm_jax.models.transformer import Transformer

Params = Any
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that training carries from one update to the next."""

    step: jax.Array  # int32, updates tried
    params: Params
    opt_state: Any
    ema: Params  # running average of params; None if off
    loss_scale: jax.Array  # float32; 1 unless the compute dtype is float16
    good_steps: jax.Array  # int32, finite updates since the loss scale last changed
    aux: Any = None  # distillation: projections and router (`params`) with their `opt_state`

    def saved(self) -> dict[str, Any]:
        """The fields for a checkpoint: `aux`, which older ones do not have, only if it is used."""
        fields = self._asdict()
        return fields if self.aux is not None else {n: fields[n] for n in fields if n != "aux"}

    @property
    def trained(self) -> Any:
        """What the gradient is taken of: the parameters, or the pair of them and those of `aux`."""
        return self.params if self.aux is None else (self.params, self.aux["params"])


def choose_attention(cfg: Config) -> tuple[str, str]:
    """The attention that a resolved config gets on this device, and the reason."""
    head_dim = cfg.model.d_model // cfg.model.heads
    if cfg.model.family == "musota":
        head_dim = musota.D // (musota.K * musota.BLOCK_HEADS)
    impl, reason = attention.choose(
        cfg.attention.impl,
        seq_len=cfg.data.seq_len,
        head_dim=head_dim,
        dtype=cfg.train.compute_dtype,
        segments=cfg.data.document_mask or cfg.data.window_offset,
        attention_dropout=cfg.model.attention_dropout,
    )
    if cfg.model.family == "musota":
        reason += "; inside blocks alone, across blocks all scores are kept for their entropy"
    return impl, reason


def choose_loss(cfg: Config, vocab_size: int) -> tuple[str, str]:
    """The loss that a resolved config gets, by the size of a micro-batch, and the reason."""
    rows = cfg.data.batch_size // sharding.accumulation(cfg)
    return losses.choose(cfg.loss.impl, tokens=rows * cfg.data.seq_len, vocab_size=vocab_size)


def create_model(cfg: Config, vocab_size: int, impl: str) -> tuple[nnx.GraphDef, Callable]:
    """The structure of the model, and a function from a random key to its parameters."""

    family = {"dense": Transformer, "musota": MuSota}[cfg.model.family]

    def build(key: jax.Array) -> nnx.Module:
        return family(
            cfg.model,
            vocab_size,
            cfg.data.seq_len,
            impl,
            nnx.Rngs(params=key),
            segmented=cfg.data.document_mask or cfg.data.window_offset,
        )

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0))))
    return graphdef, init


def init_state(cfg: Config, params: Params) -> TrainState:
    """The state before the first update."""
    scale = 2.0**10 if cfg.train.compute_dtype == "float16" else 1.0
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optim.make_optimizer(cfg.optim).init(params),
        ema=jax.tree.map(jnp.copy, params) if cfg.optim.ema_decay else None,
        loss_scale=jnp.full((), scale, jnp.float32),
        good_steps=jnp.zeros((), jnp.int32),
    )


def loss_sums(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: losses.Batch,
    *,
    dtype: jnp.dtype,
    key: jax.Array | None,
    loss_impl: str = "auto",
    label_smoothing: float = 0.0,
) -> losses.Scored:
    """Sums of one micro-batch."""
    model = nnx.merge(graphdef, params)
    b = losses.shift(batch)
    x_BTD = model(b.inputs, b.segment_ids, b.positions, dtype=dtype, key=key)
    return losses.from_hidden(
        x_BTD,
        model.head_VD(),
        b,
        softcap=model.cfg.logit_softcap,
        impl=loss_impl,
        label_smoothing=label_smoothing,
    )


def gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: losses.Batch,
    *,
    accumulation: int,
    dtype: jnp.dtype,
    key: jax.Array | None,
    scale: jax.typing.ArrayLike = 1.0,
    loss_impl: str = "auto",
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array, Params]:
    """Summed nats, scored tokens and the gradient of the mean objective, over all micro-batches.

    Micro-batches add sums and counts and are divided once, so their token counts may differ.
    `scale` multiplies the loss before differentiation and divides the gradient after it.
    """

    def scaled(params: Params, batch: losses.Batch, key: jax.Array | None):
        sums = loss_sums(
            graphdef,
            params,
            batch,
            dtype=dtype,
            key=key,
            loss_impl=loss_impl,
            label_smoothing=label_smoothing,
        )
        return sums.objective * scale, (sums.nats, sums.count)

    grads, (nats, count) = accumulated(scaled, params, batch, key, accumulation)
    # A batch without a scored token has gradient 0, not 0 / 0.
    divisor = jnp.maximum(count, 1) * scale
    return nats, count, jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads)


def accumulated(
    function: Callable[[Params, losses.Batch, jax.Array | None], tuple[jax.Array, Any]],
    params: Params,
    batch: losses.Batch,
    key: jax.Array | None,
    accumulation: int,
) -> tuple[Params, Any]:
    """Gradient of `function(params, rows, key) -> (objective, sums)`, and the sums.

    Both are added up over micro-batches, each with a key of its own.
    """
    differentiate = jax.grad(function, has_aux=True)
    if accumulation == 1:
        return differentiate(params, batch, key)

    # Neighbouring rows go to different micro-batches: a device's rows stay on the device.
    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)

    def one(micro):
        index, rows = micro
        micro_key = None if key is None else jax.random.fold_in(key, index)
        return differentiate(params, rows, micro_key)

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


def make_gradients(cfg: Config, graphdef: nnx.GraphDef) -> Callable:
    """`(params, step, loss_scale, batch) -> (nats, count, gradient)` of one update of a config."""

    def of_update(params: Params, step: jax.Array, loss_scale: jax.Array, batch: losses.Batch):
        return gradients(
            graphdef,
            params,
            batch,
            accumulation=sharding.accumulation(cfg),
            dtype=jnp.dtype(cfg.train.compute_dtype),
            key=dropout_key(cfg, step),
            scale=loss_scale,
            loss_impl=cfg.loss.impl,
            label_smoothing=cfg.loss.label_smoothing,
        )

    return of_update


def make_train_step(cfg: Config, graphdef: nnx.GraphDef) -> Callable:
    """`(state, batches) -> (state, metrics)` over the leading axis of `batches`, jitted.

    `batches` holds arrays [K, B, T + 1]; K updates run in one dispatch and every metric comes
    back with shape [K]. The state is donated.
    """
    gradients_of = make_gradients(cfg, graphdef)
    update = make_update(cfg)

    def train_step(state: TrainState, batch: losses.Batch) -> tuple[TrainState, Metrics]:
        return update(state, *gradients_of(state.params, state.step, state.loss_scale, batch))

    def train_steps(state: TrainState, batches: losses.Batch) -> tuple[TrainState, Metrics]:
        with jax.default_matmul_precision(cfg.train.matmul_precision):
            return jax.lax.scan(train_step, state, batches)

    return jax.jit(train_steps, donate_argnums=0)


def make_update(cfg: Config) -> Callable:
    """`(state, nats, count, gradient) -> (state, metrics)`: the update that a gradient makes.

    Where `nats`, the gradient or, by a further argument, something else is not finite, parameters
    and optimiser stay as they are.
    """
    tx = optim.make_optimizer(cfg.optim)
    schedule = optim.learning_rate(cfg.optim, int(cfg.train.steps))

    def update(
        state: TrainState,
        nats: jax.Array,
        count: jax.Array,
        grads: Params,
        finite: jax.typing.ArrayLike = True,
    ) -> tuple[TrainState, Metrics]:
        layer_norms = {}
        if cfg.train.layer_norms:
            for name, g in optim.by_layer(grads).items():
                layer_norms[f"grad_norm/{name}"] = optim.global_norm(g)
        grads, norm, clipped_norm = optim.clip(grads, cfg.optim.clip_norm)
        lr = schedule(state.step)
        direction, opt_state = tx.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: -lr * u, direction)
        params = optax.apply_updates(state.params, updates)

        ema = state.ema
        if cfg.optim.ema_decay:
            # Warm-up: early averages must forget the random start.
            decay = jnp.minimum(cfg.optim.ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)

        finite = jnp.isfinite(norm) & jnp.isfinite(nats) & finite
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        metrics = {
            "train/loss": nats / jnp.maximum(count, 1),
            "data/scored": count,
            "optim/lr": lr,
            "optim/grad_norm": norm,
            "optim/grad_norm_clipped": clipped_norm,
            "optim/clip_rate": (clipped_norm < norm).astype(jnp.float32),
            "optim/update_norm": jnp.where(finite, optim.global_norm(updates), 0.0),
            "optim/param_norm": optim.global_norm(params),
            "optim/skipped_updates": 1 - finite.astype(jnp.float32),
            **layer_norms,
        }
        scale, good_steps = state.loss_scale, state.good_steps
        if cfg.train.compute_dtype == "float16":
            metrics["optim/loss_scale"] = scale
            grow = finite & (good_steps >= 999)
            scale = jnp.where(finite, jnp.where(grow, scale * 2, scale), scale / 2)
            scale = jnp.clip(scale, 2.0**-16, 2.0**24)
            good_steps = jnp.where(finite & ~grow, good_steps + 1, 0)
        new_state = state._replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            loss_scale=scale,
            good_steps=good_steps,
        )
        return new_state, metrics

    return update


def make_eval_step(cfg: Config, graphdef: nnx.GraphDef, mesh: Mesh | None = None) -> Callable:
    """`(params, batch) -> metrics` of one batch, jitted; on a mesh, every process gets them whole.

    `nats`, `count` and `correct` are sums; `token_nats` and `token_weights` [B, T] hold the terms
    of the first two. Of family musota also `sensitivity` [L, 16], sums over the scored tokens.
    """
    dtype = jnp.dtype(cfg.train.compute_dtype)

    def eval_step(params: Params, batch: losses.Batch) -> Metrics:
        model = nnx.merge(graphdef, params)
        b, seen = losses.shift(batch), {}
        read = (b.inputs, b.segment_ids, b.positions)
        with jax.default_matmul_precision(cfg.train.matmul_precision):
            if cfg.model.family == "musota":
                x_BTD, s_LBTk = model.observed(*read, dtype=dtype)
                seen["sensitivity"] = jnp.einsum("bt,lbtk->lk", b.weights, s_LBTk)
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
        return sums | {"token_nats": terms.nats, "token_weights": terms.count} | seen

    if mesh is None:
        return jax.jit(eval_step)
    return jax.jit(eval_step, out_shardings=NamedSharding(mesh, PartitionSpec()))
