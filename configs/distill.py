"""A small student of WikiText-2, alone and taught by a model eight times its size.

python -m lm_jax.main --config=configs/distill.py:ARM [--config.data.source_dir=DIR]

Arms: teacher, the plain model of `configs/small_corpus.py`; alone, the student; distilled, the same
student that learns from `runs/distill-teacher-0` as well; cached, the same from what
`scripts/cache_teacher.py` kept of it. Student and teacher see equally many tokens in every arm but
the teacher's.

Measured on one CPU core each: test word perplexity 144.4 of the teacher (one seed, 17 minutes),
260.2 of the student alone and 191.4 of the distilled one (three seeds, 3 and 6 minutes; README).
"""

import pathlib

from lm_jax.config import Config, ConfigError, Curve, Duration
from lm_jax.config.flags import load_module

ARMS = ("teacher", "alone", "distilled", "cached")


def get_config(arm: str = "distilled") -> Config:
    """One arm of the study."""
    if arm not in ARMS:
        raise ConfigError(f"configs/distill.py:{arm}: no such arm; use one of {', '.join(ARMS)}.")
    cfg = load_module(pathlib.Path(__file__).with_name("small_corpus.py")).plain()
    if arm == "teacher":
        return cfg
    cfg.model.layers = 2
    cfg.model.d_model = 96
    cfg.model.heads = 3
    cfg.train.steps = Duration("800")
    cfg.train.checkpoint_every = Duration("400")
    if arm != "alone":
        cfg.distill.teachers = "runs/distill-teacher-0"
        cfg.distill.temperature = Curve("2")
    if arm == "cached":
        cfg.distill.support = "top_k"
        cfg.distill.top_k = 32
    return cfg
