"""WikiText-2 with 17M parameters, for one GPU.

H100:      python -m lm_jax.main --config=configs/wikitext2.py
Colab T4:  python -m lm_jax.main --config=configs/wikitext2.py
CPU:       python -m lm_jax.main --config=configs/wikitext2.py --config.train.steps=8

The same config everywhere: it computes in what the device is fast in, bfloat16 with cuDNN's
attention on an H100, float16 with loss scaling on a T4, float32 on a CPU. A CPU is too slow for the
whole run; `configs/wikitext2_cpu.py` is made for it. The corpus is downloaded;
--config.data.source_dir=DIR names a folder with `wiki.{train,valid,test}.tokens`.

Measured on one H200, one seed each: test word perplexity 79.7 as it is, 54 s from start to report;
78.3 with batches of 16 rows, weight decay 1 and 20 epochs, 73.9 when scored with --stride=128,
which gives every scored token 384 tokens of context or more; with dropout 0.4 and more it was worse
after as many epochs. README, "On a GPU", has the other runs. A T4 and an H100 are not measured.
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
    cfg.model.dropout = 0.3
    cfg.model.embedding_dropout = 0.3
    cfg.optim.name = "muon"
    cfg.optim.peak_lr = 3e-3
    cfg.optim.warmup = Duration("1 epoch")
    cfg.optim.end_lr = 0.02
    cfg.optim.weight_decay = 2.0
    cfg.optim.ema_decay = 0.999
    cfg.train.steps = Duration("24 epochs")
    cfg.train.eval_every = Duration("3 epochs")
    cfg.train.checkpoint_every = Duration("6 epochs")
    cfg.train.compute_dtype = "auto"
    cfg.train.matmul_precision = "tensorfloat32"
    cfg.train.steps_per_call = 8
    return cfg
