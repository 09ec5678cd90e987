"""Sizes are those of the models, and models of a wanted size have it."""

import dataclasses

import jax
import pytest

from lm_jax.config import Config, ModelConfig
from lm_jax.config.resolve import resolve
from lm_jax.models.families import create_model, size
from lm_jax.models.sizing import allocated, matched

# 50,000 ids, rows of 128, 12 layers: MU-SOTA as published has 16,690,000 parameters, of which
# 631,808 are in no table.
V, T = 50_000, 128
GPT = ModelConfig(
    layers=12,
    d_model=64,
    heads=8,
    kv_heads=8,
    d_ff=256,
    norm="layernorm",
    positions="learned",
    mlp="gelu",
    bias=True,
)
STELLUX = dataclasses.replace(GPT, mlp="swiglu", bias=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tied=False, bias=True, norm="layernorm", positions="learned", mlp="gelu"),
        dict(kv_heads=1, qk_norm=True, bias=True, mlp="relu2"),
        dict(scan_layers=True, d_ff=50, positions="none"),
        dict(embedding_rank=20),
        dict(head_dim=10, bias=True, bias_in="attention", qk_norm=True),
        dict(head_dim=20, bias=True, bias_in="qkv", window=7),
        dict(embedding_rank=20, tied=False),
        dict(kv_heads=2, embedding_values=True, embedding_skip=True, head_gate=True),
    ],
)
def test_size_counts_the_parameters_of_the_model(changes):
    cfg = Config()
    cfg.model = dataclasses.replace(cfg.model, layers=3, d_model=48, **changes)
    cfg = resolve(cfg, windows=100)
    _, init = create_model(cfg, 101, "reference")
    params = jax.eval_shape(init, jax.random.key(0))
    found = size(cfg.model, 101, cfg.data.seq_len)
    assert found.total == sum(leaf.size for leaf in jax.tree.leaves(params))
    table = 101 * 20 + 20 * 48 if cfg.model.embedding_rank else 101 * 48
    assert found.table == table + (0 if cfg.model.tied else 101 * 48)
    assert found.positions == (cfg.data.seq_len * 48 if "position_embedding" in params else 0)
    assert found.flops == 3 * found.forward_flops


@pytest.mark.parametrize("window", [1, 7, 128, 500])
def test_pairs_outside_of_a_window_cost_nothing(window):
    """A query's products with a key and with a value take 2 C FLOPs each; its own counts half."""
    cfg = dataclasses.replace(GPT, head_dim=24)
    pairs = sum(t + 0.5 - min(t + 0.5, window) for t in range(T))
    saved = [size(dataclasses.replace(cfg, window=w), V, T).forward_flops for w in (0, window)]
    assert saved[0] - saved[1] == pytest.approx(12 * 8 * 4 * 24 * pairs / T)


def test_heads_of_their_own_width_keep_it():
    own = matched(dataclasses.replace(GPT, head_dim=24), V, T, on="total", wanted=5e6)
    assert own.head_dim == 24 and own.d_model % 8 == 0
    derived = matched(GPT, V, T, on="total", wanted=5e6)
    assert derived.head_dim == derived.d_model // 8


def test_the_published_baseline_of_mu_sota():
    model = matched(GPT, V, T, on="total", wanted=16_690_000)
    assert (model.d_model, model.d_ff, model.tied) == (208, 832, True)
    assert size(model, V, T).total == 16_689_504


@pytest.mark.parametrize(("on", "wanted"), [("blocks", 631_808), ("flops", 60e6), ("total", 5e6)])
def test_what_is_matched_is_matched(on, wanted):
    model = matched(GPT, V, T, on=on, wanted=wanted)
    assert abs(getattr(size(model, V, T), on) / wanted - 1) <= 0.005
    assert model.layers == 12 and model.d_model % 8 == 0


def test_an_impossible_match_says_what_is_near():
    with pytest.raises(
        ValueError, match=r"blocks of 100 within 0.5%; the nearest has [\d,]+ at d_"
    ):
        matched(GPT, V, T, on="blocks", wanted=100)


@pytest.mark.parametrize(
    ("table_share", "expansion", "expected"),
    [  # (d_model, d_ff, layers) as the equations give them, positions and norms counted
        (0.25, 2.66, (152, 404, 27)),
        (0.35, 2.66, (216, 574, 12)),
        (0.45, 2.66, (280, 744, 6)),
        (0.35, 2.0, (216, 432, 14)),
        (0.35, 3.0, (216, 648, 11)),
        (0.35, 4.0, (216, 864, 9)),
    ],
)
def test_the_arms_of_the_allocation_study(table_share, expansion, expected):
    model = allocated(
        STELLUX, 16_000, 512, budget=10e6, table_share=table_share, expansion=expansion
    )
    assert (model.d_model, model.d_ff, model.layers) == expected
    found = size(model, 16_000, 512)
    assert abs(found.total / 10e6 - 1) < 0.05 and found.table <= table_share * 10e6


def test_impossible_budgets_say_what_is_possible():
    with pytest.raises(ValueError, match="takes 640% of a budget of 20,000, more than"):
        allocated(STELLUX, 16_000, 512, budget=20_000, table_share=0.5, expansion=2.0)
    with pytest.raises(
        ValueError,
        match=r"has [\d,]+ with layers=1 parameters, not 1,000,000",
    ):
        allocated(STELLUX, 1000, 64, budget=1e6, table_share=0.5, expansion=4.0, tolerance=0.001)
    with pytest.raises(ValueError, match="table_share=1.5: give a share between 0 and 1"):
        allocated(STELLUX, 16_000, 512, budget=1e7, table_share=1.5, expansion=2.0)


@pytest.mark.parametrize(
    ("changes", "request_", "message"),
    [
        ({}, dict(wanted=0), "wanted=0: give a positive number"),
        ({}, dict(on="params"), "on='params': give one of total, blocks, flops"),
        (dict(family="musota"), {}, "only dense models are solved for"),
        (dict(d_ff=0), {}, "d_ff=0: give a positive number"),
    ],
)
def test_a_match_without_meaning_is_refused(changes, request_, message):
    with pytest.raises(ValueError, match=message):
        matched(
            dataclasses.replace(GPT, **changes), V, T, **{"on": "total", "wanted": 1e6} | request_
        )


def test_a_factorised_table_is_narrower_than_the_model():
    cfg = dataclasses.replace(STELLUX, embedding_rank=64)
    assert matched(cfg, V, T, on="total", wanted=4.5e6).d_model > 64


@pytest.mark.parametrize(
    ("changes", "request_", "message"),
    [
        ({}, dict(budget=-1), "budget=-1: give a positive number"),
        ({}, dict(expansion=0), "expansion=0: give a positive number"),
        (dict(embedding_rank=64), {}, "embedding_rank: .* factorised table; give 0"),
    ],
)
def test_an_allocation_without_meaning_is_refused(changes, request_, message):
    usual = dict(budget=1e7, table_share=0.35, expansion=2.66)
    with pytest.raises(ValueError, match=message):
        allocated(dataclasses.replace(STELLUX, **changes), 16_000, 512, **usual | request_)
