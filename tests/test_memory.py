"""What a run needs of a device, seen before anything is compiled, and what to lower first."""

import re

import jax
import pytest

from lm_jax import config, loop, memory, sharding, step
from lm_jax.config import Config, ConfigError, MeshConfig
from lm_jax.config.resolve import resolve
from lm_jax.config.section import get
from lm_jax.models.families import create_model
from tests.helpers import small

SMALL = dict(model__layers=2, model__d_model=16, model__heads=2, data__seq_len=16)

FEW = {"eval__batch_size": 10}


def parts(**changes):
    """A resolved config, one device, and the state of its run as shapes and as arrays."""
    base = SMALL | dict(data__batch_size=12, train__compute_dtype="float32", train__steps="50")
    cfg = resolve(config.replace(Config(), **base | changes), windows=1000)
    _, init = create_model(cfg, 50, "reference")

    def begin(key):
        return step.init_state(cfg, init(key))

    return cfg, sharding.make_mesh(MeshConfig()), begin


def refused(there, monkeypatch, **changes):
    cfg, mesh, begin = parts(**changes)
    monkeypatch.setattr(memory, "device_bytes", lambda: there)
    memory.require_memory(cfg, mesh, jax.eval_shape(begin, jax.random.key(0)))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_state_is_counted_as_it_is(ema):
    cfg, mesh, begin = parts(optim__ema_decay=ema, train__steps_per_call=5)
    state = jax.jit(begin)(jax.random.key(0))
    found = memory.need(cfg, mesh, jax.eval_shape(begin, jax.random.key(0)))
    held = sum(x.nbytes for x in jax.tree.leaves((state, state.params)))
    assert found.state == held
    assert found.batches == 5 * 12 * 17 * 12
    assert found.between == 2 * 12 * 16 * 16 * 4


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model.layers", {"model__layers": 400}),
        ("model.d_model", {"model__layers": 2, "model__d_model": 2048}),
        ("train.steps_per_call", {"train__steps_per_call": 5000, "train__steps": "5000"}),
        ("data.batch_size", {"data__batch_size": 50_000, "data__micro_batch": 10, **FEW}),
        ("data.micro_batch", {"data__batch_size": 7200, "model__layers": 10, **FEW}),
        ("data.seq_len", {"data__batch_size": 1, "data__seq_len": 80_000, "model__layers": 5}),
        ("eval.batch_size", {"eval__batch_size": 60_000}),
    ],
)
def test_what_does_not_fit_names_what_to_lower(field, changes, monkeypatch):
    there = 8_000_000
    refused(there, monkeypatch)
    for _ in range(8):
        with pytest.raises(ConfigError, match=rf"^config\.{field}: .*0\.0 GB are there") as error:
            refused(there, monkeypatch, **changes)
        said = re.search(r"lower it to about ([\d,]+)\.$", str(error.value))
        lower = int(said[1].replace(",", ""))
        cfg = parts(**changes)[0]
        assert lower < (get(cfg, field) or cfg.data.batch_size)
        if field == "model.d_model":
            return  # of a width that heads divide
        changes = changes | {field.replace(".", "__"): lower}
        try:
            return refused(there, monkeypatch, **changes)
        except ConfigError:
            continue
    pytest.fail("what is advised does not end")


def test_it_is_refused_before_there_is_a_folder(text, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^config\.model\..* lower it to about"):
        loop.train_and_evaluate(small(text), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert memory.host_bytes() > 1 << 20


@pytest.mark.parametrize(
    ("changes", "scoring", "remedy"),
    [
        ({}, False, "lower config.data.micro_batch from 12 to 6"),
        ({"data__micro_batch": 3}, False, "lower config.data.micro_batch from 3 to 1"),
        ({"data__micro_batch": 1}, False, "set config.model.remat=True"),
        (
            {"data__micro_batch": 1, "model__remat": True},
            False,
            "lower config.data.seq_len from 16 to 8",
        ),
        ({"eval__batch_size": 9}, True, "lower config.eval.batch_size from 9 to 4"),
    ],
)
def test_exhausted_memory_says_what_to_lower(changes, scoring, remedy):
    cfg, mesh, _ = parts(**changes)
    for error in (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), MemoryError()):
        with pytest.raises(RuntimeError, match=f": {remedy}; --debug shows where.$"):
            with memory.exhausted(cfg, mesh, scoring=scoring):
                raise error
    with pytest.raises(RuntimeError, match="^else$"), memory.exhausted(cfg, mesh):
        raise RuntimeError("else")
