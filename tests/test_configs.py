"""Every shipped config resolves, and its model has the size its docstring says."""

import pathlib

import jax
import pytest

from lm_jax import config, resolution, step, train
from lm_jax.flags import load_module
from lm_jax.models.sizing import size

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
# Name: (vocabulary with the separator, millions of parameters).
SIZES = {
    "distill": (8192, None),
    "gpt_demo": (2000, None),
    "gpt2_124m": (50_257, 124.439808),
    "musota": (8192, 1.8),
    "phase1": (16_000, 10.3),
    "quickstart": (257, None),
    "shakespeare_char": (66, None),
    "small_corpus": (8192, None),
    "stream_226m": (32_768, 226.546432),
    "wikitext2": (16_384, 17.0),
    "wikitext2_cpu": (8192, None),
}


def load(name):
    return load_module(ROOT / "configs" / f"{name}.py")


def test_every_config_is_listed():
    assert sorted(SIZES) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_config_resolves(name):
    module = load(name)
    assert f"python -m lm_jax.main --config=configs/{name}.py" in module.__doc__
    cfg = resolution.resolve(module.get_config(), windows=5000)
    vocab_size, millions = SIZES[name]
    _, init = step.create_model(cfg, vocab_size, "reference")
    count = train.parameter_count(jax.eval_shape(init, jax.random.key(0)))
    if millions:
        assert abs(count / 1e6 - millions) < 0.2, count


@pytest.mark.parametrize("name", ["gpt2_124m", "stream_226m"])
def test_published_sizes_are_exact(name):
    cfg = resolution.resolve(load(name).get_config(), windows=5000)
    vocab_size, millions = SIZES[name]
    assert cfg.tokenizer.vocab_size == vocab_size
    _, init = step.create_model(cfg, vocab_size, "reference")
    count = train.parameter_count(jax.eval_shape(init, jax.random.key(0)))
    assert count == round(1e6 * millions)


def test_arms_of_the_allocation_study_differ():
    """All but the two that are the same by definition, where both axes meet."""
    module = load("phase1")
    models = {}
    for arm in module.ARMS:
        model = resolution.resolve(module.get_config(arm), windows=5000).model
        models.setdefault((model.d_model, model.d_ff, model.layers), []).append(arm)
    assert ["emb35", "glu266x"] in models.values() and len(models) == 6
    with pytest.raises(ValueError, match="phase1.py:glu9x: no such arm; use one of emb25, emb35"):
        module.get_config("glu9x")


def test_arms_against_overfitting_change_one_thing_each():
    module = load("small_corpus")
    base = dict(config.fields(module.get_config("base")))
    for arm, changes in module.ARMS.items():
        changed = dict(config.fields(module.get_config(arm)))
        different = [path for path in base if changed[path] != base[path]]
        assert different == [path.replace("__", ".") for path in changes]
        assert len(different) == (arm != "base")


def test_baselines_of_mu_sota_are_matched():
    module = load("musota")
    sizes = {}
    for arm in module.ARMS:
        cfg = resolution.resolve(module.get_config(arm), windows=5000)
        sizes[arm] = size(cfg.model, cfg.tokenizer.vocab_size, cfg.data.seq_len)
    for arm in ("total", "blocks", "flops"):
        ratio = getattr(sizes[arm], arm) / getattr(sizes["musota"], arm)
        assert abs(ratio - 1) <= 0.005
    assert len({found.total for found in sizes.values()}) == 4
    with pytest.raises(ValueError, match="musota.py:dense: no such arm; use one of musota, total"):
        module.get_config("dense")


def test_the_character_config_trains_from_one_text_file(tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to be: that is the question.\n" * 200)
    cfg = load("shakespeare_char").get_config()
    cfg.doctor = "off"
    cfg.data.source_dir, cfg.data.cache_dir = str(tmp_path), str(tmp_path / "cache")
    cfg.train.steps, cfg.optim.warmup = config.Duration("2"), config.Duration("1")
    assert list(train.train_and_evaluate(cfg, tmp_path / "run")) == ["valid"]
