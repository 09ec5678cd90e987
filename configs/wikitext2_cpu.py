"""WikiText-2 in half an hour or a little more on two CPU cores.

python -m lm_jax.main --config=configs/wikitext2_cpu.py --config.data.source_dir=DIR

DIR holds `wiki.{train,valid,test}.tokens`. Measured on 2 CPU cores with AMX, seed 0: test word
perplexity 95.2 (valid 101.0) 38 minutes and 52 seconds after the start, tokenizer training
included, while the machine was slow; at another time the same updates, with another weight decay,
took 29 minutes and 18 seconds. Half of them (`--config.train.steps=3300`) reach 106.4 in 13 to 15
minutes (four seeds, standard error 0.6; docs/studies.md).

The options are those that gained most on little text (scripts/results/LOG.md). Products are in
bfloat16; whether `--config.train.compute_dtype=float32` is faster on a CPU without AMX was not
measured for this model.
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """The CPU-sized WikiText-2 run."""
    cfg = Config()
    cfg.data.corpus = "wikitext2"
    cfg.data.seq_len = 1024
    cfg.data.growth = Duration("5280")
    cfg.data.batch_size = 2
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = 8192
    cfg.model.layers = 4
    cfg.model.d_model = 160
    cfg.model.heads = 2
    cfg.model.init = "fan_in"
    cfg.model.mlp = "relu2"
    cfg.model.qk_norm = True
    cfg.model.key_offset = True
    cfg.model.embedding_values = True
    cfg.model.embedding_skip = True
    cfg.model.head_gate = True
    cfg.optim.name = "normuon"
    cfg.optim.peak_lr = 8e-3
    cfg.optim.warmup = Duration("100")
    cfg.optim.end_lr = 0.02
    cfg.optim.weight_decay = 0.15
    cfg.train.steps = Duration("6600")
    cfg.train.eval_every = Duration("0")
    cfg.train.checkpoint_every = Duration("2200")
    cfg.train.compute_dtype = "bfloat16"
    return cfg
