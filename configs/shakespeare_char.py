"""Tiny Shakespeare by characters, at nanoGPT's CPU size.

python -m lm_jax.main --config=configs/shakespeare_char.py --config.data.source_dir=DIR

DIR holds `input.txt` (1,115,394 characters); its last 10 % are the valid split.

Measured on 2 CPU cores, seed 0: valid loss 1.745 nats per character (111,540, each scored once),
46 s from start to report. nanoGPT at the same size and number of updates: 1.898 after 66 s.
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """4 layers, 4 heads, 128 wide, windows of 64, batches of 12, 2000 updates, no dropout."""
    cfg = Config()
    cfg.data.corpus = "text"
    cfg.data.files = "input.txt"
    cfg.data.seq_len = 64
    cfg.data.batch_size = 12
    cfg.tokenizer.kind = "char"
    cfg.model.layers = 4
    cfg.model.d_model = 128
    cfg.model.heads = 4
    cfg.model.mlp = "relu2"
    cfg.model.init = "fan_in"
    cfg.optim.peak_lr = 5e-3
    cfg.optim.warmup = Duration("50")
    cfg.optim.end_lr = 0.0
    cfg.train.steps = Duration("2000")
    cfg.train.eval_every = Duration("1000")
    cfg.train.checkpoint_every = Duration("1000")
    cfg.train.steps_per_call = 10
    return cfg
