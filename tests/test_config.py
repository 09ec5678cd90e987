import pytest

from lm_jax import config, resolution
from lm_jax.config import Config, ConfigError


def resolved(windows=1000, **changes):
    return resolution.resolve(config.replace(Config(), **changes), windows=windows)


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
        config.check_names([path])
    config.check_names(["model.layers", "seed"])


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
        ({"optim__accumulation": 5}, "optim.accumulation"),
        ({"optim__weight_decay": -0.1}, "optim.weight_decay"),
        ({"optim__schedule": "wsd"}, "optim.decay"),
        ({"optim__decay": "10"}, "optim.decay"),
        ({"optim__warmup": "2000"}, "optim.warmup"),
        ({"tokenizer__kind": "bpe"}, "tokenizer.vocab_size"),
        ({"tokenizer__vocab_size": 300}, "tokenizer.vocab_size"),
        ({"data__corpus": "text"}, "data.files"),
        ({"data__files": "a.txt"}, "data.files"),
        ({"data__valid_fraction": 0.6, "data__test_fraction": 0.5}, "data.valid_fraction"),
        ({"eval__stride": 300}, "eval.stride"),
        ({"eval__splits": "valid,dev"}, "eval.splits"),
        ({"attention__impl": "flash"}, "attention.impl"),
        ({"train__steps": "0"}, "train.steps"),
        ({"train__log_every": "0"}, "train.log_every"),
    ],
)
def test_impossible_values_name_the_field(changes, field):
    with pytest.raises(ConfigError, match=rf"config\.{field}: .*[.?]$") as error:
        resolved(**changes)
    assert str(error.value).count("\n") == 0


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


def test_everything_is_resolved_once():
    cfg = resolved(model__d_model=96)
    assert (cfg.model.kv_heads, cfg.model.d_ff) == (4, 256)
    assert (cfg.eval.batch_size, cfg.eval.stride) == (32, 256)
    assert config.to_dict(resolution.resolve(cfg, windows=7)) == config.to_dict(cfg)


def test_dict_round_trip_and_hash():
    cfg = resolved(optim__peak_lr=0.5, seed=3)
    again = config.from_dict(config.to_dict(cfg))
    assert config.to_dict(again) == config.to_dict(cfg)
    assert config.config_hash(again) == config.config_hash(cfg)
    again.seed = 4
    assert config.config_hash(again) != config.config_hash(cfg)


def test_difference_lists_the_keys():
    old, new = config.to_dict(Config()), config.to_dict(Config())
    new["optim"]["peak_lr"] = 0.5
    new["seed"] = 1
    assert config.difference(old, new) == [
        "config.optim.peak_lr: 0.001 -> 0.5",
        "config.seed: 0 -> 1",
    ]
    assert config.difference(old, old) == []
