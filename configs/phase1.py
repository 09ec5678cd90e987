"""Where 10M parameters go: into the token table or the blocks, into wide or many layers.

python -m lm_jax.main --config=configs/phase1.py:ARM [--config.data.source_dir=DIR]

Arms: emb25, emb35, emb45 put 25, 35, 45 % of the parameters into the token table, with an MLP 2.66
times as wide as the model; glu2x, glu266x, glu3x, glu4x put 35 % there and make the MLP 2 to 4
times as wide. emb35 and glu266x, where both axes meet, are the same model. 5M tokens of WikiText-2
each.

Measured on 2 CPU cores with 200 updates of 4 rows, three seeds (README, Studies): test bits per
byte emb45 1.943, glu4x to glu2x 1.968 to 1.976, emb25 2.005. The full 5M tokens: not measured.
"""

from lm_jax.config import Config, ConfigError, Duration
from lm_jax.models.sizing import allocated

ARMS = {  # share of the token table, width of the MLP over that of the model
    "emb25": (0.25, 2.66),
    "emb35": (0.35, 2.66),
    "emb45": (0.45, 2.66),
    "glu2x": (0.35, 2.0),
    "glu266x": (0.35, 2.66),
    "glu3x": (0.35, 3.0),
    "glu4x": (0.35, 4.0),
}


def get_config(arm: str = "emb35") -> Config:
    """One arm of the study."""
    if arm not in ARMS:
        raise ConfigError(f"configs/phase1.py:{arm}: no such arm; use one of {', '.join(ARMS)}.")
    cfg = Config()
    cfg.data.corpus = "wikitext2"
    cfg.data.seq_len = 512
    cfg.data.batch_size = 16
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = 16_000
    cfg.model.heads = cfg.model.kv_heads = 8
    cfg.model.norm = "layernorm"
    cfg.model.positions = "learned"
    cfg.model.dropout = 0.1
    cfg.model.embedding_dropout = 0.1
    table_share, expansion = ARMS[arm]
    cfg.model = allocated(
        cfg.model,
        cfg.tokenizer.vocab_size,
        cfg.data.seq_len,
        budget=10e6,
        table_share=table_share,
        expansion=expansion,
    )
    cfg.optim.peak_lr = 3e-4
    cfg.optim.warmup = Duration("250k tokens")
    cfg.optim.end_lr = 0.0
    cfg.optim.weight_decay = 0.01
    cfg.optim.b2 = 0.999
    cfg.train.steps = Duration("5M tokens")
    cfg.train.eval_every = Duration("1M tokens")
    cfg.train.checkpoint_every = Duration("1M tokens")
    return cfg
