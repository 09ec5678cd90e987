"""A small GPT on Tiny Shakespeare, by words or by characters.

python -m lm_jax.main --config=configs/gpt_demo.py:word --config.data.source_dir=DIR
python -m lm_jax.main --config=configs/gpt_demo.py:char --config.data.source_dir=DIR
python scripts/gradient_table.py --config=configs/gpt_demo.py

DIR holds `input.txt` (1,115,394 characters); its last 10 % are the valid split. Words are cut at
white space; the 1,997 most frequent have an id, all others are <unk>. The third command compares
the backward pass of every layer of the model with differences in float64.

Measured on 2 CPU cores that other work shared, seed 0: by words valid perplexity 44.2, where <unk>
counts as a word (Kneser-Ney trigram: 44.7), after 2 min 54 s; by characters 1.717 nats, perplexity
5.57 (7.73), after 7 min 13 s.
"""

from lm_jax.config import Config, Duration

ARMS = ("word", "char")


def get_config(tokens: str = "word") -> Config:
    """GPT's parts: LayerNorm, biases, learned positions, tanh-GELU; 4 layers, 128 wide."""
    if tokens not in ARMS:
        raise ValueError(f"configs/gpt_demo.py:{tokens}: no such tokens; use word or char.")
    cfg = Config()
    cfg.data.corpus = "text"
    cfg.data.files = "input.txt"
    cfg.data.seq_len = 64
    cfg.data.batch_size = 8
    cfg.tokenizer.kind = tokens
    if tokens == "word":
        cfg.tokenizer.vocab_size = 2000
    cfg.model.layers = 4
    cfg.model.d_model = 128
    cfg.model.heads = 4
    cfg.model.norm = "layernorm"
    cfg.model.positions = "learned"
    cfg.model.mlp = "gelu_tanh"
    cfg.model.bias = True
    cfg.model.tied = False
    cfg.optim.peak_lr = 1e-3
    cfg.optim.warmup = Duration("200")
    cfg.optim.end_lr = 0.0
    cfg.train.steps = Duration("3 epochs")
    cfg.train.eval_every = Duration("1 epoch")
    cfg.train.checkpoint_every = Duration("1 epoch")
    cfg.train.steps_per_call = 10
    return cfg
