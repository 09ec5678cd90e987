"""A source of known entropy, learned in a minute on two CPU cores.

python -m lm_jax.main --config=configs/quickstart.py
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """The quickstart run."""
    cfg = Config()
    cfg.data.corpus = "synthetic"
    cfg.data.seq_len = 64
    cfg.data.batch_size = 32
    cfg.tokenizer.kind = "char"
    cfg.model.layers = 2
    cfg.model.d_model = 64
    cfg.model.heads = 2
    cfg.model.init = "fan_in"
    cfg.optim.peak_lr = 3e-3
    cfg.optim.warmup = Duration("50")
    cfg.train.steps = Duration("2000")
    cfg.train.eval_every = Duration("1000")
    cfg.train.checkpoint_every = Duration("1000")
    cfg.train.log_every = Duration("200")
    cfg.train.steps_per_call = 10
    return cfg
