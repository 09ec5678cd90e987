"""1.14B parameters on a corpus of any size, read from shards, for eight GPUs or one of 80 GB.

python -m lm_jax.main --config=configs/llama_1b.py --config.data.source_dir=DIR \\
    --config.mesh.fsdp=8

DIR holds shards `*.jsonl` with one document a line in the field "text"; for others give
--config.data.files='*.parquet' --config.data.document=parquet:text. One document in 2,000 is held
out, by the hash of its content. The corpus must give 50,304 ids; the 10.8 MB of
WikiText-2 give 47,608.

40,000 updates of 524,288 tokens: 21.0B tokens. Expected time and numbers: not measured.
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """22 layers, 2048 wide, 16 query and 8 key/value heads, byte-level BPE of 50,304, T 2048."""
    cfg = Config()
    cfg.data.corpus = "text"
    cfg.data.files = "*.jsonl"
    cfg.data.document = "jsonl:text"
    cfg.data.valid_fraction = 0.0005
    cfg.data.seq_len = 2048
    cfg.data.batch_size = 256
    cfg.data.micro_batch = 4
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = 50_304
    cfg.tokenizer.sample = 100_000_000
    cfg.model.layers = 22
    cfg.model.d_model = 2048
    cfg.model.heads = 16
    cfg.model.kv_heads = 8
    cfg.model.d_ff = 5632
    cfg.model.scan_layers = True
    cfg.model.remat = True
    cfg.optim.peak_lr = 4e-4
    cfg.optim.warmup = Duration("2000")
    cfg.train.steps = Duration("40000")
    cfg.train.eval_every = Duration("1000")
    cfg.train.checkpoint_every = Duration("1000")
    cfg.train.compute_dtype = "auto"
    cfg.train.matmul_precision = "tensorfloat32"
    return cfg
