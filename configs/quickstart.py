"""A source of known entropy, learned in minutes on two CPU cores.

python -m lm_jax.main --config=configs/quickstart.py

Measured on 2 CPU cores, seed 0, with an empty cache: valid loss 1.834 after 161 s; the entropy rate
is 1.8036 nats.
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """The quickstart run."""
    cfg = Config()
    cfg.data.corpus = "synthetic"
    cfg.data.seq_len = 64
    cfg.data.batch_size = 16
    cfg.tokenizer.kind = "char"
    cfg.model.layers = 2
    cfg.model.d_model = 192
    cfg.model.heads = 4
    cfg.model.mlp = "relu2"
    cfg.model.init = "fan_in"
    cfg.optim.peak_lr = 6e-3
    cfg.optim.warmup = Duration("100")
    cfg.optim.end_lr = 0.0
    cfg.optim.weight_decay = 0.0
    cfg.train.steps = Duration("3700")
    cfg.train.eval_every = Duration("0")
    cfg.train.checkpoint_every = Duration("1850")
    cfg.train.steps_per_call = 10
    return cfg
