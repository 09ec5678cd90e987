"""Your own text: every .txt file of a folder, a model that exports as Llama.

python -m lm_jax.main --config=configs/text.py --config.data.source_dir=DIR
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """4 layers, 128 wide, 128 tokens a window, 1,024 ids: for a CPU and a megabyte of text."""
    cfg = Config()
    cfg.data.corpus = "text"
    cfg.data.files = "*.txt"
    cfg.data.valid_fraction = 0.05
    cfg.data.test_fraction = 0.05
    cfg.data.seq_len = 128
    cfg.data.batch_size = 16
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = 1024
    cfg.model.layers = 4
    cfg.model.d_model = 128
    cfg.model.heads = 4
    cfg.model.init = "fan_in"
    cfg.model.dropout = 0.1
    cfg.optim.name = "muon"
    cfg.optim.peak_lr = 8e-3
    cfg.optim.warmup = Duration("50")
    cfg.optim.end_lr = 0.0
    cfg.train.steps = Duration("1000")
    cfg.train.eval_every = Duration("500")
    cfg.train.checkpoint_every = Duration("500")
    cfg.train.steps_per_call = 10
    return cfg
