"""MU-SOTA on WikiText-2 against dense models of its size, by three meanings of size.

python -m lm_jax.main --config=configs/musota.py:ARM [--config.data.source_dir=DIR]

Arms: musota; and dense models (GPT's: LayerNorm, biases, GELU, learned positions, tied head) with
as many parameters in all (total), as many outside the tables (blocks), as many FLOPs of a token
(flops). They are matched to the sizes written here: change those in this file and not by flags.
All arms and seeds, and their comparison:

python scripts/sweep.py 'configs/musota.py:*' --seeds=0,1,2 --root=runs/musota --jobs=2
python -m lm_jax.compare runs/musota/*

Measured on 2 CPU cores that other work shared, two runs at a time, seeds 0 to 2: test word
perplexity 452 (musota), 493 (total), 543 (flops), 561 (blocks); 3 to 10 minutes a run.
"""

from lm_jax.config import Config, ConfigError, Duration
from lm_jax.models.families import size
from lm_jax.models.sizing import Quantity, matched

BASELINES: tuple[Quantity, ...] = ("total", "blocks", "flops")
ARMS = ("musota", *BASELINES)
# The best of 3e-3, 1e-2, 2e-2 and (musota alone) 4e-2 after 300 updates, by valid loss, one seed;
# that of musota is at the edge of what was tried.
PEAK_LR = {"musota": 4e-2, "total": 1e-2, "blocks": 2e-2, "flops": 2e-2}


def get_config(
    arm: str = "musota", layers: int = 4, seq_len: int = 128, vocab_size: int = 8192
) -> Config:
    """One arm of the comparison."""
    if arm not in ARMS:
        raise ConfigError(f"configs/musota.py:{arm}: no such arm; use one of {', '.join(ARMS)}.")
    cfg = Config()
    cfg.data.corpus = "wikitext2"
    cfg.data.seq_len = seq_len
    cfg.data.batch_size = 16
    cfg.tokenizer.kind = "bpe"
    cfg.tokenizer.vocab_size = vocab_size
    cfg.model.family = "musota"
    cfg.model.layers = layers
    cfg.model.dropout = 0.1
    if arm != "musota":
        quantity = next(name for name in BASELINES if name == arm)
        sizes = cfg.tokenizer.vocab_size, cfg.data.seq_len
        wanted = size(cfg.model, *sizes)
        cfg.model.family = "dense"
        cfg.model.heads = cfg.model.kv_heads = 4
        cfg.model.d_model, cfg.model.d_ff = 64, 256
        cfg.model.norm, cfg.model.positions, cfg.model.mlp = "layernorm", "learned", "gelu"
        cfg.model.bias = True
        cfg.model = matched(cfg.model, *sizes, on=quantity, wanted=getattr(wanted, quantity))
    cfg.optim.peak_lr = PEAK_LR[arm]
    cfg.optim.warmup = Duration("100")
    cfg.optim.end_lr = 0.05
    cfg.optim.weight_decay = 0.1
    cfg.train.steps = Duration("800")
    cfg.train.eval_every = Duration("200")
    cfg.train.checkpoint_every = Duration("400")
    return cfg
