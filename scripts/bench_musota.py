"""Train-step speed of MU-SOTA against the dense models matched to it, in turns in one process.

    python scripts/bench_musota.py [--json=scripts/results/bench_musota_cpu.json]

12 layers, rows of 192, a vocabulary of 16,000, 8 sequences an update, AdamW, float32; the dense
models are those of `configs/musota.py` at this size.
"""

import json
import pathlib
import statistics
from typing import Any

import jax
from benchmark import Steps, machine, random_batch, take_turns

from lm_jax import step
from lm_jax.config import Config
from lm_jax.config.flags import load_module
from lm_jax.config.manual import script_parser
from lm_jax.config.resolve import resolve
from lm_jax.main import keep_freed_memory
from lm_jax.models.families import choose_attention, create_model, size
from lm_jax.objective import NextToken

ROOT = pathlib.Path(__file__).parents[1]
LAYERS, T, V, B = 12, 192, 16_000, 8


def train_steps(cfg: Config) -> Steps:
    """The train step of one arm."""
    graphdef, init = create_model(cfg, V, choose_attention(cfg)[0])
    state = jax.jit(lambda key: step.init_state(cfg, init(key)))(jax.random.key(0))
    batch = jax.tree.map(lambda x: x[None], random_batch(B, T, V))
    return Steps(step.make_train_step(cfg, NextToken.of(cfg, graphdef)), state, batch)


def main() -> None:
    """Time all arms and print a table."""
    parser = script_parser(__doc__)
    parser.add_argument("--turns", type=int, default=9, help="of each peer")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all numbers")
    args = parser.parse_args()
    keep_freed_memory()
    module = load_module(ROOT / "configs" / "musota.py")
    results: dict[str, Any] = machine()
    peers = {}
    for arm in module.ARMS:
        cfg = module.get_config(arm, layers=LAYERS, seq_len=T, vocab_size=V)
        cfg.data.batch_size = B
        cfg = resolve(cfg, windows=10_000)
        found = size(cfg.model, V, T)
        results[arm] = {"parameters": found.total, "flops_per_token": found.flops}
        peers[arm] = train_steps(cfg)
    for arm, ms in take_turns(peers, args.turns).items():
        results[arm]["step_ms"] = ms
    base = statistics.median(results["musota"]["step_ms"])
    for arm in module.ARMS:
        ms = statistics.median(results[arm]["step_ms"])
        results[arm]["musota_takes"] = base / ms
        print(
            f"{arm:7} {results[arm]['parameters']:11,} parameters {ms:8.1f} ms a step; "
            f"musota takes {base / ms:.2f}x"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
