"""110M parameters on a corpus of any size, read from shards, for one GPU or several.

python -m lm_jax.main --config=configs/llama_110m.py --config.data.source_dir=DIR

DIR holds shards `*.jsonl` with one document a line in the field "text"; for others give
--config.data.files='*.parquet' --config.data.document=parquet:text. One document in 2,000 is held
out, by the hash of its content. The corpus must give 32,768 ids, as the 10.8 MB of WikiText-2 do.

20,000 updates of 131,072 tokens: 2.62B tokens. Expected time and numbers: not measured.
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """12 layers, 12 heads, 768 wide, byte-level BPE of 32,768, T 2048."""
    cfg = Config()
    cfg.data.corpus = "text"
    cfg.data.files = "*.jsonl"
    cfg.data.document = "jsonl:text"
    cfg.data.valid_fraction = 0.0005
    cfg.data.seq_len = 2048
    cfg.data.batch_size = 64
    cfg.data.micro_batch = 8
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = 32_768
    cfg.tokenizer.sample = 100_000_000
    cfg.model.layers = 12
    cfg.model.d_model = 768
    cfg.model.heads = 12
    cfg.model.scan_layers = True
    cfg.model.remat = True
    cfg.optim.peak_lr = 1e-3
    cfg.optim.warmup = Duration("2000")
    cfg.train.steps = Duration("20000")
    cfg.train.eval_every = Duration("500")
    cfg.train.checkpoint_every = Duration("500")
    cfg.train.compute_dtype = "auto"
    cfg.train.matmul_precision = "tensorfloat32"
    return cfg
