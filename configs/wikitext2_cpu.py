"""WikiText-2 in under half an hour on two CPU cores.

python -m lm_jax.main --config=configs/wikitext2_cpu.py --config.data.source_dir=DIR

DIR holds `wiki.{train,valid,test}.tokens`. Measured on 2 CPU cores that other work shared, seed 0:
test word perplexity 144.3 (valid 155.6) 16 minutes after the start, tokenizer training included;
with --config.train.steps=3000, 125.8 (valid 134.1) after 28 minutes and 9 seconds.
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """The CPU-sized WikiText-2 run."""
    cfg = Config()
    cfg.data.corpus = "wikitext2"
    cfg.data.seq_len = 256
    cfg.data.batch_size = 16
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = 8192
    cfg.model.layers = 4
    cfg.model.d_model = 192
    cfg.model.heads = 6
    cfg.model.init = "fan_in"
    cfg.model.mlp = "relu2"
    cfg.optim.name = "muon"
    cfg.optim.peak_lr = 8e-3
    cfg.optim.warmup = Duration("100")
    cfg.optim.end_lr = 0.02
    cfg.train.steps = Duration("1600")
    cfg.train.eval_every = Duration("0")
    cfg.train.checkpoint_every = Duration("400")
    return cfg
