"""Step time of a distillation over that of its parts: teacher forward and student step.

    python scripts/bench_distill.py [--json=scripts/results/bench_distill_cpu.json]

The models and rows of `configs/distill.py`, random tokens, float32. The parts are the evaluation
step of the teacher (forward pass and head, each token's nats) and the plain train step of the
student; all take turns in one process. The temporary memory of the compiled distillation is told
beside the size of one array of logits, of which the step holds none.
"""

import functools
import json
import pathlib
import statistics
from typing import Any

import jax
from benchmark import Steps, machine, random_batch, take_turns

from lm_jax import config, step
from lm_jax.config import Config
from lm_jax.config.flags import load_module
from lm_jax.config.manual import script_parser
from lm_jax.config.resolve import resolve
from lm_jax.distill.objective import distilled
from lm_jax.distill.teachers import Teacher
from lm_jax.main import keep_freed_memory
from lm_jax.models.families import choose_attention, create_model
from lm_jax.objective import NextToken, Objective

ROOT = pathlib.Path(__file__).parents[1]
V = 8192
CASES: dict[str, dict[str, Any]] = {
    "divergence and cross-entropy": {},
    "temperature 1": {"distill__temperature": "1"},
    "reverse": {"distill__kind": "reverse"},
    "union of 64": {"distill__support": "union", "distill__top_k": 64},
    "final states too": {"distill__feature": "0.1"},
    "attention maps of the last layer too": {"distill__attention": "0.1"},
}


def resolved(arm: str, **changes: Any) -> Config:
    """An arm of the study."""
    cfg = load_module(ROOT / "configs" / "distill.py").get_config(arm)
    return resolve(config.replace(cfg, **changes), windows=10_000)


def main() -> None:
    """Time all cases and print a table."""
    parser = script_parser(__doc__)
    parser.add_argument("--turns", type=int, default=9, help="of each peer")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all numbers")
    args = parser.parse_args()
    keep_freed_memory()
    results: dict[str, Any] = machine()

    large, small = resolved("teacher"), resolved("alone")
    B, T = small.data.batch_size, small.data.seq_len
    batch = random_batch(B, T, V)
    stacked = jax.tree.map(lambda x: x[None], batch)
    impl, _ = choose_attention(small)
    graphdef, init = create_model(large, V, impl)
    params = jax.jit(init)(jax.random.key(1))
    teacher = Teacher(("teacher",), (graphdef,), (params,))
    evaluate = step.make_eval_step(large, graphdef)
    graphdef, init = create_model(small, V, impl)
    key = jax.random.key(0)
    plain = step.make_train_step(small, NextToken.of(small, graphdef))

    def fresh(cfg: Config, objective: Objective) -> step.TrainState:
        return jax.jit(lambda key: step.init_state(cfg, init(key), objective.beside(key)))(key)

    peers = {
        "teacher forward": Steps(
            lambda params, batch: (params, evaluate(params, batch)), params, batch
        ),
        "student step": Steps(plain, fresh(small, NextToken(graphdef)), stacked),
    }
    for name, changes in CASES.items():
        cfg = resolved("distilled", **changes)
        objective = distilled(cfg, graphdef, init, teacher)
        jitted, state = step.make_train_step(cfg, objective), fresh(cfg, objective)
        compiled = jitted.lower(state, stacked, objective.reads).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]
        results[name] = {"temporary_mib": memory / 2**20}
        peers[name] = Steps(functools.partial(jitted, reads=objective.reads), state, stacked)
    for name, ms in take_turns(peers, args.turns).items():
        results.setdefault(name, {})["step_ms"] = ms
    parts = [statistics.median(results[n]["step_ms"]) for n in ("teacher forward", "student step")]
    logits = 4 * B * T * V / 2**20
    print(f"teacher forward {parts[0]:.0f} ms, student step {parts[1]:.0f} ms")
    print(f"one array of logits: {logits:.0f} MiB")
    for name in CASES:
        ratio = statistics.median(results[name]["step_ms"]) / sum(parts)
        results[name]["over_parts"] = ratio
        print(f"{name:38} {ratio:.2f}x; {results[name]['temporary_mib']:.0f} MiB temporary")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
