"""WikiText-2 with 17M parameters, for one GPU.

python -m lm_jax.main --config=configs/wikitext2.py [--config.data.source_dir=DIR]

As it is on an H100, a Colab T4 or a CPU: the dtype and the attention are those that the device is
fast in (bfloat16 and cudnn, float16 and xla, float32 and blockwise).
"""

from lm_jax.config import Config, Duration


def get_config() -> Config:
    """6 layers, 384 wide, byte-level BPE of 16,384, regularised for many epochs."""
    cfg = Config()
    cfg.data.corpus = "wikitext2"
    cfg.data.seq_len = 512
    cfg.data.batch_size = 32
    cfg.data.window_offset = True
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = 16_384
    cfg.model.layers = 6
    cfg.model.d_model = 384
    cfg.model.heads = 6
    cfg.model.qk_norm = True
    cfg.model.init = "fan_in"
    cfg.model.dropout = 0.5
    cfg.model.embedding_dropout = 0.5
    cfg.optim.name = "muon"
    cfg.optim.peak_lr = 3e-3
    cfg.optim.warmup = Duration("1 epoch")
    cfg.optim.end_lr = 0.02
    cfg.optim.weight_decay = 1.0
    cfg.optim.ema_decay = 0.999
    cfg.train.steps = Duration("40 epochs")
    cfg.train.eval_every = Duration("5 epochs")
    cfg.train.checkpoint_every = Duration("10 epochs")
    cfg.train.log_every = Duration("200")
    cfg.train.compute_dtype = "auto"
    cfg.train.matmul_precision = "tensorfloat32"
    cfg.train.steps_per_call = 8
    cfg.eval.stride = 128
    return cfg
