import math
import sys

import jax
import numpy as np
import pytest

from lm_jax import metrics
from lm_jax.metrics import Sums
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken
from tests.helpers import random_batch, tiny_config

V = 29


def test_summary_by_hand():
    sums = Sums(nats=60.0, count=20.0, correct=5.0)
    result = metrics.summarise(sums, split_bytes=48, split_words=12)
    assert result["loss"] == 3.0 and result["accuracy"] == 0.25
    assert result["token_count"] == 20 and isinstance(result["token_count"], int)
    np.testing.assert_allclose(result["token_ppl"], 20.085536923187668, rtol=1e-15)  # e^3
    np.testing.assert_allclose(result["word_ppl"], 148.4131591025766, rtol=1e-15)  # e^5
    np.testing.assert_allclose(result["bits_per_byte"], 1.25 * 1.4426950408889634, rtol=1e-15)
    assert len(result) == 6


def test_uniform_guessing_gives_the_vocabulary():
    result = metrics.summarise(Sums(50 * math.log(256), 50, 0), split_bytes=50, split_words=50)
    np.testing.assert_allclose(result["token_ppl"], 256, rtol=1e-12)
    np.testing.assert_allclose(result["bits_per_byte"], 8, rtol=1e-12)


@pytest.mark.parametrize(
    ("loss", "perplexity"),
    [
        (0.0, 1.0),
        (20.1, 536190464.4294026),  # e^20.1, above caps like e^20
        (700.0, 1.0142320547350045e304),
        (709.5, 1.3549863193146328e308),  # float64 ends at e^709.78
        (709.8, math.inf),
        (800.0, math.inf),
        (math.inf, math.inf),
    ],
)
def test_perplexity_is_never_capped(loss, perplexity):
    result = metrics.summarise(Sums(loss * 4, 4, 0), split_bytes=9, split_words=4)
    assert result["loss"] == loss
    np.testing.assert_allclose(result["token_ppl"], perplexity, rtol=1e-12)
    np.testing.assert_allclose(result["word_ppl"], perplexity, rtol=1e-12)


def test_the_largest_perplexity_of_float64():
    assert 1.7976931e308 < metrics.exp(math.log(sys.float_info.max)) < math.inf


def test_nan_stays_nan():
    result = metrics.summarise(Sums(math.nan, 4, 0), split_bytes=9, split_words=4)
    assert all(math.isnan(result[k]) for k in ("loss", "token_ppl", "word_ppl", "bits_per_byte"))


def test_sums_merge():
    parts = [Sums(1.5, 2.0, 1.0), Sums(0.25, 5.0, 3.0), Sums(), Sums(4.0, 1.0, 0.0)]
    total = Sums()
    for part in parts:
        total += part
    assert total == sum(parts[::-1], Sums()) == Sums(nats=5.75, count=8.0, correct=4.0)


SHAPES = [
    dict(model__mlp="swiglu", model__kv_heads=2, model__d_ff=24),
    dict(model__mlp="gelu", model__kv_heads=1, model__d_ff=40, model__tied=False),
    dict(model__mlp="relu2", model__layers=3),
]


@pytest.mark.parametrize("changes", SHAPES)
def test_flops_are_six_a_weight_and_attention(changes):
    cfg = tiny_config(**changes)
    _, init = create_model(cfg, V, "reference")
    params = jax.eval_shape(init, jax.random.key(0))
    weights = sum(
        leaf.size for p, leaf in jax.tree.leaves_with_path(params) if "kernel" in str(p[-1])
    )
    if cfg.model.tied:
        weights += params["embedding"].size
    T, D, L = 11, 16, cfg.model.layers
    # A query sees T / 2 keys on average: 2 D (T / 2) for scores, as many for mixing, three times.
    assert metrics.flops_per_token(cfg, V, T) == 6 * weights + 3 * L * 2 * (2 * D * T / 2)


def products(jaxpr):
    """FLOPs of all matrix products of a jaxpr; a multiply-add counts two."""
    total = 0
    if hasattr(jaxpr, "jaxpr"):
        jaxpr = jaxpr.jaxpr
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * terms * math.prod(eqn.outvars[0].aval.shape)
        inner = [v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
        total += sum(map(products, inner))
    return total


FACTORISED: list[dict] = [dict(model__embedding_rank=5, model__tied=tied) for tied in (True, False)]


@pytest.mark.parametrize("changes", [*SHAPES, *FACTORISED])
def test_flops_are_those_of_the_traced_gradient(changes):
    cfg = tiny_config(**changes)
    graphdef, init = create_model(cfg, V, "reference")
    params = jax.eval_shape(init, jax.random.key(0))
    batch = random_batch(np.random.default_rng(0), (3, 12), V)

    def loss(params):
        return NextToken(graphdef).scored(params, batch).objective

    tokens = 3 * 11
    counted = products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) / tokens
    # The reference computes the whole square of scores, of which the causal half is counted.
    causal_half = 6 * cfg.model.layers * cfg.data.seq_len * cfg.model.d_model
    assert counted == metrics.flops_per_token(cfg, V, cfg.data.seq_len) + causal_half


@pytest.mark.parametrize(
    ("kind", "dtype", "devices", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 1, 989e12),
        ("NVIDIA H200", "float16", 8, 8 * 989e12),
        ("NVIDIA H200", "float32", 1, None),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 1, 989e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 2, 624e12),
        ("Tesla V100-SXM2-16GB", "float16", 1, 125e12),
        ("Tesla T4", "float16", 1, 65e12),
        ("NVIDIA L4", "bfloat16", 1, 121e12),
        ("NVIDIA L40S", "bfloat16", 1, None),  # another chip
        ("NVIDIA T400 4GB", "float16", 1, None),
        ("cpu", "bfloat16", 1, None),
        ("NVIDIA H100 PCIe", "bfloat16", 2, 2 * 756e12),
        ("NVIDIA H100 NVL", "bfloat16", 1, 835e12),
        ("NVIDIA H200 NVL", "bfloat16", 1, 835e12),
        ("Tesla V100-PCIE-16GB", "float16", 1, 112e12),
    ],
)
def test_peak_flops(kind, dtype, devices, peak):
    assert metrics.peak_flops(kind, dtype, devices) == peak


def test_throughput_by_hand():
    row = metrics.throughput(
        tokens=6000, seconds=3.0, steps=4, input_wait=0.75, flops=5e8, peak=4e12
    )
    assert row == {
        "perf/tokens_per_second": 2000.0,
        "perf/step_ms": 750.0,
        "perf/input_wait": 0.25,
        "perf/mfu": 0.25,
    }
    unknown = metrics.throughput(
        tokens=6000, seconds=3.0, steps=4, input_wait=0.75, flops=5e8, peak=None
    )
    assert "perf/mfu" not in unknown and len(unknown) == 3


@pytest.mark.parametrize(("words", "expected"), [(100, True), (20, False), (0, False)])
def test_a_word_of_many_bytes_is_no_unit(words, expected):
    result = metrics.summarise(Sums(900.0, 600, 1), split_bytes=600, split_words=words)
    assert metrics.has_words(result) is expected
