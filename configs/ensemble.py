"""An ensemble of WikiText-2, members taught by those before them, and one student of it.

python -m lm_jax.main --config=configs/ensemble.py:ARM [--config.data.source_dir=DIR]

Arms: member0 to member3, the model of `configs/wikitext2_cpu.py` with four seeds; chain1 to chain3,
the same model with the seeds of the members 1 to 3, each also taught by the mean of member0 and the
chain before it (Kim et al. 2025, arXiv:2509.14786; Furlanello et al. 2018); student, the same model
taught by the mean of the members, and chain_student, by that of the chain. Teachers are looked for
in `runs/`, so the arms are trained in this order:

for arm in member0 member1 member2 member3 chain1 chain2 chain3 student chain_student; do
    python -m lm_jax.main --config=configs/ensemble.py:$arm
done

`scripts/sweep.py` gives all arms one seed, with which the members would be one model.
"""

import pathlib

from lm_jax.config import Config, ConfigError, Curve
from lm_jax.config.flags import load_module

NUMBER = 4
MEMBERS = [f"member{n}" for n in range(NUMBER)]
CHAIN = ["member0", *(f"chain{n}" for n in range(1, NUMBER))]
TAUGHT = {arm: CHAIN[:n] for n, arm in enumerate(CHAIN) if n}
TAUGHT |= {"student": MEMBERS, "chain_student": CHAIN}
ARMS = (*MEMBERS, *TAUGHT)


def get_config(arm: str = "member0") -> Config:
    """One arm of the study."""
    if arm not in ARMS:
        raise ConfigError(f"configs/ensemble.py:{arm}: no such arm; use one of {', '.join(ARMS)}.")
    cfg = load_module(pathlib.Path(__file__).with_name("wikitext2_cpu.py")).get_config()
    cfg.seed = seed(arm)
    if arm in TAUGHT:
        teachers = (f"runs/ensemble-{teacher}-{seed(teacher)}" for teacher in TAUGHT[arm])
        cfg.distill.teachers = ",".join(teachers)
        cfg.distill.temperature = Curve("1")
    return cfg


def seed(arm: str) -> int:
    """That of an arm; students have one that no member has."""
    return int(arm[-1]) if arm[-1].isdigit() else NUMBER
