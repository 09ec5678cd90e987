"""What helps on a small corpus: options against overfitting, one at a time, on WikiText-2.

python -m lm_jax.main --config=configs/small_corpus.py:ARM [--config.data.source_dir=DIR]

Arms: base, four plain layers for 800 updates (1.2 epochs); every other arm changes one thing. All
arms:

python scripts/sweep.py 'configs/small_corpus.py:*' --root=runs/small_corpus --jobs=2

Measured on one CPU core each, one seed, 10 to 13 minutes an arm: test word perplexity 199.4 of
base, 184.8 of decay1, 200 to 233 of the others (README).
"""

from typing import Any

from lm_jax import config
from lm_jax.config import Config, ConfigError, Duration

ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "dropout": {"model__dropout": 0.1},
    "attention_dropout": {"model__attention_dropout": 0.1},
    "embedding_dropout": {"model__embedding_dropout": 0.1},
    "decay1": {"optim__weight_decay": 1.0},
    "decay3": {"optim__weight_decay": 3.0},
    "ema": {"optim__ema_decay": 0.99},
    "window_offset": {"data__window_offset": True},
    "label_smoothing": {"loss__label_smoothing": 0.1},
    "untied": {"model__tied": False},
    "factorised": {"model__embedding_rank": 64},
}


def plain() -> Config:
    """Four layers with nothing added, for 1,600 updates of WikiText-2."""
    cfg = Config()
    cfg.data.corpus = "wikitext2"
    cfg.data.batch_size = 16
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = 8192
    cfg.model.d_model = 192
    cfg.model.heads = 6
    cfg.model.init = "fan_in"
    cfg.model.mlp = "relu2"
    cfg.optim.name = "muon"
    cfg.optim.peak_lr = 8e-3
    cfg.optim.end_lr = 0.02
    cfg.train.steps = Duration("1600")
    cfg.train.eval_every = Duration("0")
    cfg.train.checkpoint_every = Duration("400")
    return cfg


def get_config(arm: str = "base") -> Config:
    """One arm of the study."""
    if arm not in ARMS:
        raise ConfigError(
            f"configs/small_corpus.py:{arm}: no such arm; use one of {', '.join(ARMS)}."
        )
    cfg = plain()
    cfg.train.steps = Duration("800")
    cfg.train.eval_every = cfg.train.checkpoint_every = Duration("200")
    return config.replace(cfg, **ARMS[arm])
