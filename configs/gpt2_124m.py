"""The 124M model of GPT-2 on a corpus of any size, with nanoGPT's schedule, for one GPU or 8.

python -m lm_jax.main --config=configs/gpt2_124m.py --config.data.source_dir=DIR

DIR holds shards `*.jsonl` with one document a line in the field "text"; for others give
--config.data.files='*.parquet' --config.data.document=parquet:text. One document in 2,000 is held
out, by the hash of its content. The tokenizer has as many ids as GPT-2's, 50,257, but learns them
from the corpus, which must be large enough: the 10.8 MB of WikiText-2 give 47,608.

600,000 updates of 491,520 tokens: 295B tokens. Expected time and numbers: not measured.
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """12 layers, 12 heads, 768 wide, learned positions, LayerNorm, tanh-GELU, biases, T 1024."""
    cfg = Config()
    cfg.data.corpus = "text"
    cfg.data.files = "*.jsonl"
    cfg.data.document = "jsonl:text"
    cfg.data.valid_fraction = 0.0005
    cfg.data.seq_len = 1024
    cfg.data.batch_size = 480
    cfg.data.micro_batch = 60
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = 50_257
    cfg.tokenizer.sample = 100_000_000
    cfg.model.layers = 12
    cfg.model.d_model = 768
    cfg.model.heads = 12
    cfg.model.norm = "layernorm"
    cfg.model.positions = "learned"
    cfg.model.mlp = "gelu_tanh"
    cfg.model.bias = True
    cfg.optim.peak_lr = 6e-4
    cfg.optim.warmup = Duration("2000")
    cfg.train.steps = Duration("600000")
    cfg.train.eval_every = Duration("2000")
    cfg.train.checkpoint_every = Duration("2000")
    cfg.train.compute_dtype = "auto"
    cfg.train.matmul_precision = "tensorfloat32"
    return cfg
