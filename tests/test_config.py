import pathlib
import subprocess
import sys
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm_jax import config
from lm_jax.config import Config, ConfigError, flags
from lm_jax.config.resolve import resolve, spans
from lm_jax.config.section import field_types, marks
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.data.tokenizers.load import KINDS, train_tokenizer
from lm_jax.doctor.distill import divergence
from lm_jax.kernels import attention, divergences
from lm_jax.kernels import device as devices
from lm_jax.kernels.dropout import Draw
from lm_jax.models.families import FAMILIES, create_model

CHOICES = {path: found["choices"] for path, found in marks(Config) if "choices" in found}
TYPES = field_types(config.ModelConfig)


def resolved(windows=1000, **changes):
    return resolve(config.replace(Config(), **changes), windows=windows)


def test_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match=r"config\.model\.layerz: .* config\.model\.layers\?"):
        Config().model.layerz = 3


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("model.laers", "config.model.layers"),
        ("modle.layers", "config.model"),
        ("sead", "config.seed"),
        ("seed.x", "config.seed.x"),
    ],
)
def test_unknown_override(path, said):
    with pytest.raises(ConfigError, match=said):
        flags.check_names([path])
    flags.check_names(["model.layers", "seed"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model__layers", "four"),
        ("model__layers", 2.5),
        ("model__layers", True),
        ("model__tied", 1),
        ("optim__peak_lr", "1e-3"),
        ("train__steps", "soon"),
        ("train__steps", "3 weeks"),
    ],
)
def test_wrong_type_names_the_field(path, value):
    with pytest.raises(ConfigError, match=path.replace("__", r"\.")):
        config.replace(Config(), **{path: value})


def test_numbers_of_numpy_and_paths_are_taken_as_what_they_say():
    cfg = config.replace(
        Config(),
        optim__peak_lr=np.float64(0.25),
        model__layers=np.int64(3),
        train__steps=np.int32(30),
        data__source_dir=pathlib.Path("here"),
    )
    assert repr(cfg.optim) == "OptimConfig(peak_lr=0.25)"
    assert (cfg.model.layers, cfg.train.steps, cfg.data.source_dir) == (3, "30", "here")


@pytest.mark.parametrize(
    ("path", "implemented"),
    [
        ("model.family", FAMILIES),
        ("attention.impl", ("auto", *attention.IMPLEMENTATIONS)),
        ("tokenizer.kind", (*KINDS, HfTokenizer.kind)),
        ("distill.kind", typing.get_args(divergences.Kind)),
        ("distill.kind", divergence.KINDS),
        ("distill.support", typing.get_args(divergences.Support)),
    ],
)
def test_the_choices_are_what_is_implemented(path, implemented):
    assert sorted(CHOICES[path]) == sorted(implemented)


def test_jax_knows_the_dtypes():
    for name in CHOICES["train.compute_dtype"][1:]:
        assert jnp.issubdtype(jnp.dtype(name), jnp.floating)
    for name in CHOICES["train.matmul_precision"]:
        with jax.default_matmul_precision(name):
            assert jnp.ones(2) @ jnp.ones(2) == 2


def test_a_family_reads_the_fields_that_are_listed():
    """Neither fewer, which would refuse what works, nor more, which would ignore what is asked."""

    class Noted(config.ModelConfig):
        def __getattribute__(self, name):
            if name in TYPES and recording:
                seen.add(name)
            return super().__getattribute__(name)

    recording, seen = False, set()
    cfg = resolved(model__family="musota", data__seq_len=8)
    model = Noted(**config.to_dict(cfg)["model"])
    object.__setattr__(cfg, "model", model)
    recording = True
    graphdef, init = create_model(cfg, 11, "reference")
    ids = jnp.ones((1, 8), jnp.int32)

    def losses(key):
        model = nnx.merge(graphdef, init(key))
        return model.logits(model(ids, ids, ids, draw=Draw(key)))

    jax.eval_shape(losses, jax.random.key(0))
    recording = False
    listed = {name for name in TYPES if cfg.model.reads(name)}
    assert seen | {"family"} == listed


def test_only_incidental_fields_are_called_so():
    """Paths, threads, devices and logging of a run; nothing that the model is trained with."""
    found = config.incidental_fields()
    assert found < {path for path, _ in config.named_fields(Config())}
    assert {"data.cache_dir", "data.threads", "train.keep", "mesh.fsdp", "data.micro_batch"} < found
    assert not {path for path in found if path.split(".")[0] in ("model", "optim", "loss")}


def test_the_import_is_light():
    code = (
        "import sys, lm_jax.config; assert not {'jax', 'absl', 'ml_collections'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_int_becomes_float():
    assert isinstance(config.replace(Config(), optim__peak_lr=1).optim.peak_lr, float)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model__norm": "rmsnorn"}, "model.norm"),
        ({"model__layers": 0}, "model.layers"),
        ({"model__dropout": 1.0}, "model.dropout"),
        ({"model__heads": 3}, "model.heads"),
        ({"model__kv_heads": 3}, "model.kv_heads"),
        ({"model__d_model": 12, "model__heads": 4}, "model.heads"),
        ({"data__micro_batch": -1}, "data.micro_batch"),
        ({"optim__weight_decay": -0.1}, "optim.weight_decay"),
        ({"optim__schedule": "wsd"}, "optim.decay"),
        ({"optim__decay": "10"}, "optim.decay"),
        ({"tokenizer__kind": "bpe"}, "tokenizer.vocab_size"),
        ({"tokenizer__kind": "bpe", "tokenizer__vocab_size": 256}, "tokenizer.vocab_size"),
        ({"tokenizer__kind": "bpe", "tokenizer__vocab_size": 10**9}, "tokenizer.vocab_size"),
        ({"tokenizer__vocab_size": 300}, "tokenizer.vocab_size"),
        ({"data__corpus": "text"}, "data.files"),
        ({"data__files": "a.txt"}, "data.files"),
        (
            {"data__corpus": "text", "data__files": "a", "data__valid_fraction": 0.0},
            "data.valid_fraction",
        ),
        (
            {"data__corpus": "text", "data__files": "a", "eval__splits": "test"},
            "data.test_fraction",
        ),
        ({"data__valid_fraction": 0.6, "data__test_fraction": 0.5}, "data.valid_fraction"),
        ({"eval__stride": 300}, "eval.stride"),
        ({"eval__splits": "valid,dev"}, "eval.splits"),
        ({"attention__impl": "flash"}, "attention.impl"),
        ({"train__steps": "0"}, "train.steps"),
        ({"train__compute_dtype": "half"}, "train.compute_dtype"),
        ({"train__steps": "3B"}, "train.steps"),
        ({"train__steps": "1e999"}, "train.steps"),
        ({"seed": 1 << 32}, "seed"),
        ({"seed": -1}, "seed"),
        ({"data__threads": 1_000_000}, "data.threads"),
        ({"data__workers": 1_000_000}, "data.workers"),
        ({"data__batch_size": 100_000_000}, "data.batch_size"),
        ({"data__seq_len": 1 << 31}, "data.batch_size"),
        ({"data__growth": "5", "data__seq_len": 100}, "data.growth"),
        ({"train__steps_per_call": 1_000_000_000}, "train.steps_per_call"),
        ({"eval__batch_size": 100_000_000}, "eval.batch_size"),
        ({"model__layers": 100_000}, "model.layers"),
        ({"data__cache_dir": "gs://bucket/cache"}, "data.cache_dir"),
        ({"train__start_from": "s3://bucket/run@100"}, "train.start_from"),
        ({"tokenizer__folder": "gs://b/t", "tokenizer__kind": "hf"}, "tokenizer.folder"),
        ({"distill__teachers": "runs/one, gs://b/two"}, "distill.teachers"),
        ({"distill__cache": "gs://b/cache"}, "distill.cache"),
    ],
)
def test_impossible_values_name_the_field(changes, field):
    with pytest.raises(ConfigError, match=rf"config\.{field}: .*[.?]$") as error:
        resolved(**changes)
    assert str(error.value).count("\n") == 0


def test_the_size_that_a_text_without_pairs_is_told_to_take_is_taken():
    with pytest.raises(ValueError, match=r"set --config\.tokenizer\.vocab_size=257\.$"):
        train_tokenizer("bpe", ["a b c"], 300)
    assert train_tokenizer("bpe", ["a b c"], 257).vocab_size == 257
    assert resolved(tokenizer__kind="bpe", tokenizer__vocab_size=257)


def test_a_seed_has_the_bits_that_a_key_reads():
    last = jax.random.key((1 << 32) - 1)
    assert jax.random.key_data(last).tolist() == [0, (1 << 32) - 1]
    assert resolved(seed=(1 << 32) - 1).seed == (1 << 32) - 1
    assert jax.random.key(1 << 32) == jax.random.key(0)  # and so it is refused


def test_the_most_that_indices_reach_is_named():
    row = 8 * 257
    most = (1 << 31) // row
    with pytest.raises(ConfigError, match=f"at most {most:,}"):
        resolved(data__batch_size=8, train__steps_per_call=1_100_000)
    resolved(data__batch_size=8, train__steps_per_call=most)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("2000", 2000),
        ("2000 steps", 2000),
        ("1 step", 1),
        ("2M tokens", 245),  # 2e6 / (32 * 256) = 244.1
        ("8192 tokens", 1),
        ("20k tokens", 3),
        ("3 epochs", 94),  # 3 * 1000 / 32 = 93.75
        ("0.5 epochs", 16),
    ],
)
def test_durations(text, steps):
    assert resolved(train__steps=text, optim__warmup="0").train.steps == str(steps)


def test_spans_are_whole_calls():
    """In tokens or epochs a span is a number of calls; in steps it is what was written."""
    cfg = config.replace(
        config.Config(),
        train__steps_per_call=8,
        train__steps="3 epochs",  # 93.75 updates
        train__eval_every="1 epoch",  # 31.25
        train__checkpoint_every="50",
        optim__warmup="1 epoch",
    )
    found = {path: span[:2] for path, span in spans(cfg, windows=1000).items() if span.why}
    assert found == {"train.steps": (94, 96)}
    cfg = resolve(cfg, windows=1000)
    taken = cfg.train.steps, cfg.train.eval_every, cfg.train.checkpoint_every, cfg.optim.warmup
    assert taken == ("96", "32", "50", "32")
    tiny = config.replace(cfg, train__eval_every="100 tokens")
    assert resolve(tiny, windows=1000).train.eval_every == "8"


@pytest.mark.parametrize(
    ("changes", "warmup", "decay"),
    [
        ({"optim__warmup": "59"}, (59, 59), (0, 0)),  # short, and what was asked for
        ({"optim__warmup": "60"}, (60, 12), (0, 0)),
        ({"optim__warmup": "3 epochs"}, (94, 12), (0, 0)),
        ({"train__steps": "3"}, (100, 0), (0, 0)),
        ({"optim__schedule": "wsd", "optim__decay": "20"}, (100, 12), (20, 20)),
        ({"optim__schedule": "wsd", "optim__decay": "50"}, (100, 12), (50, 48)),
    ],
)
def test_a_warmup_that_does_not_fit_is_shortened_and_the_reason_told(changes, warmup, decay):
    cfg = config.replace(Config(), **{"train__steps": "60"} | changes)
    found, taken = spans(cfg, windows=1000), resolve(cfg, windows=1000)
    for field, expected in (("warmup", warmup), ("decay", decay)):
        span = found[f"optim.{field}"]
        assert span[:2] == expected and bool(span.why) == (expected[0] != expected[1])
        assert getattr(taken.optim, field) == str(expected[1])
    assert resolve(taken, windows=1000) == taken


@pytest.mark.parametrize(("count", "devices", "rows"), [(1, 1, 0), (4, 1, 8), (4, 2, 4)])
def test_a_record_of_version_0_1_counts_micro_batches(count, devices, rows):
    tree = config.to_dict(Config())
    del tree["data"]["micro_batch"]
    tree["optim"]["accumulation"] = count
    cfg = config.from_record({"config": tree, "devices": ["cpu"] * devices})
    assert cfg == config.replace(Config(), data__micro_batch=rows)
    assert tree["optim"]["accumulation"] == count  # the record stays as it was


def test_a_record_without_the_width_of_heads_is_that_of_the_same_run():
    """Versions before head_dim resolved to what it is today; the other new fields are off."""
    for family in ({}, {"model__family": "musota", "model__d_model": 128}):
        cfg = resolved(**family)
        tree = config.to_dict(cfg)
        for name in ("head_dim", "rope_scaling", "window", "bias_in"):
            del tree["model"][name]
        found = config.from_record({"config": tree, "devices": ["cpu"]})
        assert found == cfg and config.config_hash(found) == config.config_hash(cfg)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("", {})),
        (" linear:factor=2 ", ("linear", {"factor": 2.0})),
        (
            "yarn:factor=4, original_max_position_embeddings=64,truncate=0",
            ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64.0, "truncate": 0.0}),
        ),
    ],
)
def test_rope_scaling(text, parts):
    cfg = Config()
    cfg.model.rope_scaling = text
    assert cfg.model.rope_scaling.parts() == parts and cfg.model.rope_scaling == text.strip()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ntk:factor=2", "is of no kind that there is; begin with linear, llama3, yarn"),
        ("linear", "does not give linear its numbers; they are factor"),
        ("linear:factor=2,factor=2", "does not give linear its numbers"),
        ("llama3:factor=8", "does not give llama3 its numbers; they are factor, low_freq_factor"),
        ("linear:factor=two", "has factor='two'; give a number"),
        ("linear:factor=-1", "has factor=-1; give a number above 0"),
        ("yarn:factor=2,truncate=3", "has truncate=3; give 0 or 1"),
    ],
)
def test_other_scalings_are_refused(text, message):
    with pytest.raises(ConfigError, match=rf"config\.model\.rope_scaling: '{text}' {message}.*\.$"):
        Config().model.rope_scaling = text


def fake(platform, kind, **attributes):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [
        (fake("cpu", "cpu"), "float32", "not known to be faster on a cpu"),
        (fake("gpu", "Tesla P100-PCIE-16GB"), "float32", "compute capability 6.0"),
        (fake("gpu", "Tesla K80"), "float32", "on Tesla K80"),
        (fake("gpu", "some new GPU", compute_capability="6.9"), "float32", "capability 6.9"),
        (fake("gpu", "some new GPU", compute_capability="7.0"), "float16", "no fast bfloat16"),
        (fake("gpu", "Tesla V100-SXM2-16GB"), "float16", "compute capability 7.0"),
        (fake("gpu", "Tesla T4", compute_capability="7.5"), "float16", "compute capability 7.5"),
        (fake("gpu", "NVIDIA A100-SXM4-40GB"), "bfloat16", "compute capability 8.0"),
        (fake("gpu", "NVIDIA H200", compute_capability="9.0"), "bfloat16", "capability 9.0"),
        (fake("gpu", "some new GPU", compute_capability="13.1"), "bfloat16", "capability 13.1"),
        (fake("tpu", "TPU v4"), "bfloat16", "on TPU v4"),
    ],
)
def test_the_dtype_is_that_of_the_device(device, dtype, said, monkeypatch):
    monkeypatch.setattr(devices, "target", lambda: device)
    assert resolved().train.compute_dtype == dtype
    assert devices.choose_dtype("auto")[0] == dtype and said in devices.choose_dtype("auto")[1]
    for name in ("float32", "bfloat16", "float16"):
        assert resolved(train__compute_dtype=name).train.compute_dtype == name
        assert devices.choose_dtype(name) == (name, "named in the config")


def test_everything_is_resolved_once():
    cfg = resolved(model__d_model=96)
    assert (cfg.model.kv_heads, cfg.model.d_ff) == (4, 256)
    assert (cfg.eval.batch_size, cfg.eval.stride) == (32, 256)
    assert config.to_dict(resolve(cfg, windows=7)) == config.to_dict(cfg)


def test_dict_round_trip_and_hash():
    cfg = resolved(optim__peak_lr=0.5, seed=3)
    again = config.from_dict(config.to_dict(cfg))
    assert config.to_dict(again) == config.to_dict(cfg)
    assert config.config_hash(again) == config.config_hash(cfg)
    again.seed = 4
    assert config.config_hash(again) != config.config_hash(cfg)


def test_difference_lists_the_keys():
    old, new = Config(), config.replace(Config(), optim__peak_lr=0.5, seed=1)
    assert config.difference(old, new) == [
        "config.seed: 0 -> 1",
        "config.optim.peak_lr: 0.001 -> 0.5",
    ]
    assert config.difference(old, old) == []
