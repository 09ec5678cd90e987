"""Dense models of a wanted size; symbols as in `models.transformer`, T the positions of a row."""

import dataclasses
import math
from typing import Any, Literal, get_args

from lm_jax.config import ModelConfig
from lm_jax.models.families import size

Quantity = Literal["total", "blocks", "flops"]


def matched(
    cfg: ModelConfig,
    vocab_size: int,
    seq_len: int,
    *,
    on: Quantity,
    wanted: float,
    tolerance: float = 0.005,
) -> ModelConfig:
    """The model of this depth and kind whose `on` is `wanted`; only its widths are changed.

    Of all widths D that the heads divide, the one is taken whose MLP is nearest to the proportion
    F / D of `cfg`; F moves away from it only where D alone does not come within the tolerance.

    Args:
        cfg: a resolved model config.
        vocab_size: V.
        seq_len: T.
        on: total (parameters), blocks (parameters that are in no table) or flops (of a token).
        wanted: the value to match.
        tolerance: largest relative difference.

    Raises:
        ValueError: if there is no such model, with the nearest one, or the request has no meaning.
    """
    _check(cfg, d_ff=cfg.d_ff, wanted=wanted)
    if on not in get_args(Quantity):
        raise ValueError(f"on={on!r}: give one of {', '.join(get_args(Quantity))}.")
    proportion = cfg.d_ff / cfg.d_model
    tried: list[tuple[float, float, float, ModelConfig]] = []
    step = _width_step(cfg)
    for D in range((cfg.embedding_rank // step + 1) * step, 1 << 16, step):
        usual = max(1, round(proportion * D))
        widths = [_of_width(cfg, D, d_ff=F) for F in (usual, usual + 1)]
        have, more = (getattr(size(c, vocab_size, seq_len), on) for c in widths)
        F = max(1, usual + round((wanted - have) / (more - have)))
        for candidate in (widths[0], _of_width(cfg, D, d_ff=F)):
            got = getattr(size(candidate, vocab_size, seq_len), on)
            bend = abs(math.log(candidate.d_ff / (proportion * D)))
            tried.append((abs(got / wanted - 1), bend, got, candidate))
        if have > 4 * wanted:
            break
    if near := [row for row in tried if row[0] <= tolerance]:
        return min(near, key=lambda row: (row[1], row[0]))[3]
    _, _, got, best = min(tried, key=lambda row: row[0])
    raise ValueError(
        f"No {cfg.layers}-layer model has {on} of {wanted:,.0f} within {tolerance:.1%}; the "
        f"nearest has {got:,.0f} at d_model={best.d_model}, d_ff={best.d_ff}: change layers or "
        "the wanted value."
    )


def allocated(
    cfg: ModelConfig,
    vocab_size: int,
    seq_len: int,
    *,
    budget: float,
    table_share: float,
    expansion: float,
    tolerance: float = 0.05,
) -> ModelConfig:
    """The model that spends a budget of parameters with a given share on the token table.

    D is the largest multiple of the heads whose table stays within the share, F = floor(expansion
    D), and the layers are as many as come nearest to the budget, positions and norms counted.

    Args:
        cfg: what is kept: heads, norm, positions, MLP, tying.
        vocab_size: V.
        seq_len: T.
        budget: parameters in all.
        table_share: part of the budget for the token table (and the head, if untied).
        expansion: F / D.
        tolerance: largest relative difference from the budget.

    Raises:
        ValueError: if no number of layers comes within the tolerance, with what is possible nearby,
            or the request has no meaning.
    """
    _check(cfg, budget=budget, expansion=expansion)
    if not 0 < table_share < 1:
        raise ValueError(f"table_share={table_share}: give a share between 0 and 1.")
    if cfg.embedding_rank:
        raise ValueError("embedding_rank: D does not follow from a factorised table; give 0.")
    step = _width_step(cfg)
    tables = vocab_size * (1 if cfg.tied else 2)
    D = int(table_share * budget / tables) // step * step
    if D < step:
        raise ValueError(
            f"A table of {vocab_size:,} rows of {step} takes {tables * step / budget:.0%} of a "
            f"budget of {budget:,.0f}, more than table_share={table_share:.0%}; raise one of them."
        )

    def deep(layers: int) -> ModelConfig:
        F = max(1, int(expansion * D))
        return _of_width(cfg, D, d_ff=F, layers=layers)

    def total(layers: int) -> int:
        return size(deep(layers), vocab_size, seq_len).total

    layers = max(1, round(1 + (budget - total(1)) / (total(2) - total(1))))
    if abs(total(layers) / budget - 1) > tolerance:
        other = layers + (1 if total(layers) < budget else -1)
        sizes = (f"{total(n):,} with layers={n}" for n in (layers, other) if n)
        raise ValueError(
            f"d_model={D} with d_ff={deep(1).d_ff} has {' and '.join(sizes)} parameters, not "
            f"{budget:,.0f} within {tolerance:.1%}: change the budget, table_share or expansion."
        )
    return deep(layers)


def _check(cfg: ModelConfig, **positive: float) -> None:
    if cfg.family != "dense":
        raise ValueError(f"family={cfg.family!r}: only dense models are solved for; give one.")
    for name, value in {"kv_heads": cfg.kv_heads, **positive}.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: give a positive number.")


def _has_own_heads(cfg: ModelConfig) -> bool:
    """Whether the heads have another width than D / H, which they then keep."""
    return cfg.head_dim not in (0, cfg.d_model // cfg.heads)


def _of_width(cfg: ModelConfig, D: int, **changes: Any) -> ModelConfig:
    """The model with D as its width."""
    C = cfg.head_dim if _has_own_heads(cfg) else D // cfg.heads
    return dataclasses.replace(cfg, d_model=D, head_dim=C, **changes)


def _width_step(cfg: ModelConfig) -> int:
    """D must be a multiple of this: heads have equal width, and rotary positions turn pairs."""
    if _has_own_heads(cfg):
        return 8
    return cfg.heads * (2 if cfg.positions == "rotary" else 1)
