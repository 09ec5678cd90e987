"""The table of verified gradients covers every layer, and shows a wrong backward pass."""

import pathlib

import jax
import pytest

from lm_jax.config.flags import load_module
from tests.helpers import tiny_config

table = load_module(pathlib.Path(__file__).parents[1] / "scripts" / "gradient_table.py")
GPT = dict(
    model__norm="layernorm",
    model__positions="learned",
    model__mlp="gelu_tanh",
    model__bias=True,
    model__tied=False,
    model__layers=2,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_every_layer_is_in_the_table():
    parts = {part.name: part for part in table.parts(tiny_config(**GPT))}
    for i in range(2):
        for name in ("attention norm", "attention", "mlp norm", "mlp"):
            assert f"layer {i}, {name}" in parts
    assert {"head and loss, fused", "final norm", "embedding", "position embedding"} <= set(parts)
    assert "whole model, materialised" in parts


@pytest.mark.parametrize("tied", [True, False])
def test_factorised_embeddings_have_a_row(tied):
    cfg = tiny_config(model__embedding_rank=5, model__tied=tied, model__layers=1)
    parts = {part.name: part for part in table.parts(cfg)}
    assert parts["embedding projection"].params.shape == (5, 16)
    assert parts["head and loss, fused"].input.shape[-1] == (5 if tied else 16)
    rows, failed = table.examine(parts["head and loss, materialised"])
    assert not failed and len(rows) == 2


@pytest.mark.parametrize("name", ["layer 0, attention", "layer 1, mlp", "head and loss, fused"])
def test_a_backward_pass_is_verified_and_a_wrong_one_seen(name):
    part = next(part for part in table.parts(tiny_config(**GPT)) if part.name == name)
    rows, failed = table.examine(part)
    assert not failed
    assert any(row.leaf == "input" for row in rows) and len(rows) > 1
    assert all(row.directions < 1e-6 and row.coordinates < 1e-6 for row in rows)

    @jax.custom_vjp
    def wrong(x):
        return x

    wrong.defvjp(lambda x: (x, None), lambda _, g: (1.001 * g,))
    apply = lambda params, x: part.apply(params, wrong(x))  # noqa: E731
    rows, failed = table.examine(table.Part(name, part.params, part.input, apply))
    assert {finding.check for finding in failed} >= {"gradient.leaves"}
    assert next(row for row in rows if row.leaf == "input").directions > 5e-4
