"""Learning-rate schedule, clipping and optimiser; which leaves decay is listed by name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm_jax.config import OptimConfig

Params = Any


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """LR of update 0, 1, ..., steps - 1.

    Warm-up over w updates gives peak (i + 1) / w to update i, so that the first is not 0; the
    rest falls from the peak to exactly `end_lr * peak_lr` at update steps - 1 (cosine, linear;
    wsd only over its last `decay` updates), or stays (constant).
    """
    warmup, last = int(cfg.warmup), steps - 1
    peak, end = cfg.peak_lr, cfg.end_lr * cfg.peak_lr
    start = steps - int(cfg.decay) if cfg.schedule == "wsd" else warmup

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        # The first update after warm-up (or the plateau) already counts as part of the fall,
        # except that a run whose fall has one update must end on `end`.
        progress = jnp.clip((count - start + 1) / max(1, last - start + 1), 0, 1)
        if cfg.schedule == "cosine":
            lr = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif cfg.schedule == "constant":
            lr = jnp.full_like(progress, peak)
        else:
            lr = peak * (1 - progress) + end * progress
        return jnp.where(count < warmup, peak * (count + 1) / max(1, warmup), lr)

    return schedule


def path_name(path: tuple[Any, ...]) -> str:
    """`blocks/0/attention/qkv/kernel` for a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decayed(cfg: OptimConfig, params: Params) -> Params:
    """True for every leaf that decays: the matrices of the blocks and, under adamw, of the head.

    Tables, norm scales and biases do not.
    """
    blocks_only = cfg.name == "muon"
    return jax.tree.map_with_path(
        lambda path, _: path_name(path).endswith("kernel") and (_in_block(path) or not blocks_only),
        params,
    )


def make_optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
    """The update direction before the learning rate: u in params -= lr u.

    adamw: Adam (Kingma and Ba 2015) with decoupled decay (Loshchilov and Hutter 2019).
    muon: the matrices of the blocks take orthogonalised momentum (Jordan et al. 2024), scaled to
    the root mean square of an Adam update (Liu et al. 2025, arXiv 2502.16982, section 2.2), and
    decay; all other leaves take Adam and do not decay. `b1` and `b2` are Adam's; the momentum of
    the matrices decays by 0.95.
    """
    if cfg.name == "adamw":
        return optax.chain(
            optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
            optax.add_decayed_weights(cfg.weight_decay, functools.partial(decayed, cfg)),
        )
    return optax.contrib.muon(
        -1.0,  # optax would descend; the caller multiplies by -lr
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_block_matrices,
    )


def _in_block(path: tuple[Any, ...]) -> bool:
    return path_name(path).startswith("blocks/")


def _block_matrices(params: Params) -> Params:
    def dimensions(path: tuple[Any, ...], leaf: jax.Array):
        if not (_in_block(path) and path_name(path).endswith("kernel")):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree.map_with_path(dimensions, params)


def global_norm(tree: Params) -> jax.Array:
    """Root of the summed squares of all leaves, in float32 or wider."""
    return optax.tree.norm(tree)


def clip(grads: Params, max_norm: float) -> tuple[Params, jax.Array, jax.Array]:
    """Scale gradients to a global norm of at most `max_norm` (0: never).

    Returns the gradients and the norm before and after.
    """
    norm = global_norm(grads)
    if not max_norm:
        return grads, norm, norm
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), norm, norm * scale
