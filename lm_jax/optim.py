"""Learning-rate schedule, clipping and optimiser; which leaves decay is listed by name."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm_jax.config import OptimConfig
from lm_jax.kernels import device
from lm_jax.kernels.linear import by_rows, slow_by_columns

Params = Any
_MOMENTUM = 0.95  # decay of the momentum of matrices per update


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
    """`blocks/attention/qkv/kernel` for a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_layer(tree: Params) -> dict[str, jax.Array]:
    """All leaves by name, those of the blocks layer by layer: `blocks/0/mlp/up/kernel`."""
    found: dict[str, jax.Array] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if _in_block(path):
            rest = path_name(path[1:])
            found |= {f"blocks/{i}/{rest}": layer for i, layer in enumerate(leaf)}
        else:
            found[path_name(path)] = leaf
    return found


def stacked(leaves: dict[str, jax.Array]) -> Params:
    """The tree of which `by_layer` made these leaves."""
    layers: dict[str, dict[int, jax.Array]] = {}
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if match := re.fullmatch(r"blocks/(\d+)/(.+)", name):
            layers.setdefault(f"blocks/{match[2]}", {})[int(match[1])] = leaf
    whole = {name: leaf for name, leaf in leaves.items() if not name.startswith("blocks/")}
    whole |= {name: jnp.stack([x[i] for i in sorted(x)]) for name, x in layers.items()}
    for name, leaf in whole.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return tree


def decayed(cfg: OptimConfig, params: Params) -> Params:
    """True for every leaf that decays: the matrices of the blocks and, under adamw, of the head.

    Tables, norm scales and biases do not.
    """
    blocks_only = cfg.name != "adamw"
    return jax.tree.map_with_path(
        lambda path, _: path_name(path).endswith("kernel") and (_in_block(path) or not blocks_only),
        params,
    )


def make_optimizer(
    cfg: OptimConfig, beside_lr: float = 0.0, short: bool = False
) -> optax.GradientTransformation:
    """The update direction before the learning rate: u in params -= lr u.

    adamw: Adam (Kingma and Ba 2015) with decoupled decay (Loshchilov and Hutter 2019).
    muon: the matrices of the blocks take orthogonalised momentum (Jordan et al. 2024), scaled to
    the root mean square of an Adam update (Liu et al. 2025, arXiv 2502.16982, section 2.2), and
    decay; all other leaves take Adam with Nesterov momentum and do not decay. `b1` and `b2` are
    Adam's.
    normuon: the same with `scale_by_outputs` (Li et al. 2025, arXiv 2510.05491), `b2` also there.

    Args:
        cfg: optimiser, decay and peak learning rate.
        beside_lr: peak learning rate of what is trained beside the model, on the same schedule, by
            Adam without decay; parameters are then the pair of the model's and the others.
        short: see `orthogonalise`.
    """
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    decay = cfg.weight_decay
    if cfg.name == "adamw":
        mask = functools.partial(decayed, cfg)
        model = optax.chain(adam, optax.add_decayed_weights(decay, mask))
    else:
        steps = [scale_by_muon(cfg.eps, short)]
        if cfg.name == "normuon":
            steps.append(scale_by_outputs(cfg.b2, cfg.eps))
        matrices = optax.chain(*steps, optax.add_decayed_weights(decay))
        rest = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, nesterov=True)

        def labels(params: Params) -> Params:
            return jax.tree.map(lambda d: "muon" if d else "adam", decayed(cfg, params))

        model = optax.partition({"muon": matrices, "adam": rest}, labels)
    if not beside_lr:
        return model
    return _for_pair(model, optax.chain(adam, optax.scale(beside_lr / cfg.peak_lr)))


def _for_pair(*both: optax.GradientTransformation) -> optax.GradientTransformation:
    """Two trees, each with a transformation of its own."""

    def init(params: Params) -> Params:
        return tuple(tx.init(p) for tx, p in zip(both, params, strict=True))

    def update(grads: Params, state: Params, params: Params = None) -> tuple[Params, Params]:
        found = [tx.update(*x) for tx, *x in zip(both, grads, state, params, strict=True)]
        return tuple(u for u, _ in found), tuple(s for _, s in found)

    return optax.GradientTransformation(init, update)


class MuonState(NamedTuple):
    """Muon's state between updates."""

    updates: jax.Array  # int32, those made
    momentum: Params


def scale_by_muon(eps: float, short: bool = False) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, with the root mean square of an Adam update.

    `optax.contrib.scale_by_muon` with its defaults, but for the dtype of the products (see
    `orthogonalise`) and for the scale 0.2 sqrt(max(inputs, outputs)).
    """

    def init(params: Params) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(grads: Params, state: MuonState, params: Params = None) -> tuple[Params, MuonState]:
        count = optax.safe_increment(state.updates)
        momentum = optax.tree.update_moment(grads, state.momentum, _MOMENTUM, 1)
        next_momentum = optax.tree.bias_correction(momentum, _MOMENTUM, count + 1)
        now = optax.tree.bias_correction(grads, _MOMENTUM, count)

        def direction(m: jax.Array, g: jax.Array) -> jax.Array:
            ahead = _MOMENTUM * m + (1 - _MOMENTUM) * g
            return 0.2 * max(g.shape[-2:]) ** 0.5 * orthogonalise(ahead, eps, short)

        return jax.tree.map(direction, next_momentum, now), MuonState(count, momentum)

    return optax.GradientTransformation(init, update)


class OutputsState(NamedTuple):
    """What `scale_by_outputs` keeps between updates."""

    updates: jax.Array  # int32, those made
    squares: Params  # running means [..., 1, O]


def scale_by_outputs(b2: float, eps: float) -> optax.GradientTransformation:
    """Divide the update of each output of a matrix [..., I, O] by a running root mean square.

    The whole matrix keeps its root mean square. Rotations of the inputs do not matter to it, as
    they do not to Muon (Li et al. 2025, NorMuon, algorithm 1).
    """

    def init(params: Params) -> OutputsState:
        squares = jax.tree.map(lambda p: jnp.zeros_like(p[..., :1, :]), params)
        return OutputsState(jnp.zeros((), jnp.int32), squares)

    def update(
        updates: Params, state: OutputsState, params: Params = None
    ) -> tuple[Params, OutputsState]:
        count = optax.safe_increment(state.updates)
        now = jax.tree.map(lambda u: jnp.square(u).mean(-2, keepdims=True), updates)
        squares = optax.tree.update_moment(now, state.squares, b2, 1)

        def divided(u: jax.Array, square: jax.Array) -> jax.Array:
            y = u / (jnp.sqrt(square) + eps)
            return y * (_mean_root(u) / (_mean_root(y) + eps))

        corrected = optax.tree.bias_correction(squares, b2, count)
        return jax.tree.map(divided, updates, corrected), OutputsState(count, squares)

    return optax.GradientTransformation(init, update)


def _mean_root(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).mean((-2, -1), keepdims=True))


def orthogonalise(x: jax.Array, eps: float, short: bool = False) -> jax.Array:
    """Singular values moved towards 1 by five Newton-Schulz iterations (Jordan et al. 2024).

    Args:
        x: matrices [..., I, O], all iterated together; float32 or wider.
        eps: added to their Frobenius norms.
        short: products in bfloat16, as its authors have them, which a GPU that knows it does in any
            case: the iteration ends at singular values between 0.7 and 1.2 anyway.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + eps)
    short = short or device.choose_dtype("auto")[0] == "bfloat16"
    y = y.astype(jnp.bfloat16 if short else x.dtype)
    rows = y.shape[-2]
    one = jnp.broadcast_to(jnp.eye(rows, dtype=y.dtype), (*y.shape[:-1], rows))
    for _ in range(5):
        gram = y @ y.mT
        # 3.4445 y - 4.7750 (y y') y + 2.0315 (y y')^2 y, with nothing to be added up afterwards
        y = (3.4445 * one + gram @ (2.0315 * gram - 4.7750 * one)) @ y
    y = by_rows(y) if tall and slow_by_columns(y.dtype) else y
    return (y.mT if tall else y).astype(x.dtype)


def _in_block(path: tuple[Any, ...]) -> bool:
    return path_name(path).startswith("blocks/")


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
