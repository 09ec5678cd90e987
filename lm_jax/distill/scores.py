"""Student alone, distilled student, teachers and their mean, side by side on one split."""

import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from lm_jax import loss as losses
from lm_jax import metrics, sharding
from lm_jax.config import Config, rules
from lm_jax.data import windows
from lm_jax.data.store import Store
from lm_jax.distill import alignment, opening, teachers
from lm_jax.distill.alignment import Aligner
from lm_jax.distill.opening import students_text
from lm_jax.distill.teachers import Teacher
from lm_jax.files import write_json
from lm_jax.kernels import divergences
from lm_jax.kernels.linear_divergence import Member
from lm_jax.workdir import Trained, open_trained

TIMED_BATCHES = 5
SHOWN = (  # heading, value and how it is written
    ("bits/byte", "bits_per_byte", ".4f"),
    ("word ppl", "word_ppl", ",.2f"),
    ("same top", "agreement", ".1%"),
    ("KL", "kl", ".4f"),
    ("parameters", "parameters", ","),
    ("tokens/s", "tokens_per_second", ",.0f"),
)


class Scored(NamedTuple):
    """A model, or several that predict by their mean probability."""

    name: str
    models: Sequence[tuple[nnx.GraphDef, Any]]  # structure and parameters


def write(
    cfg: Config, workdir: pathlib.Path, run: Trained, teacher: Teacher
) -> dict[str, Any] | None:
    """Score everything on the last configured split; write `distillation.json` and print it.

    Nothing is written for a cache, whose teacher is not at hand.

    Args:
        cfg: resolved config of the student.
        workdir: its folder.
        run: its best checkpoint.
        teacher: what taught it.
    """
    if not teacher.models:
        return None
    split = rules.eval_splits(cfg, run.store.manifest["splits"])[-1]
    members = list(zip(teacher.models, teacher.params, strict=True))
    scored = [Scored("distilled", [(run.graphdef, run.params)])]
    if cfg.distill.alone:
        alone = open_trained(pathlib.Path(cfg.distill.alone), mesh=run.mesh)
        scored.append(Scored("alone", [(alone.graphdef, alone.params)]))
    taught_by = f"teacher {teacher.names[0]}" if len(members) == 1 else "mean of the teachers"
    with jax.default_matmul_precision(cfg.train.matmul_precision):
        if teacher.first_bytes is None:
            names = [f"teacher {name}" for name in teacher.names]
            scored += [Scored(name, [m]) for name, m in zip(names, members, strict=True)]
            if len(members) > 1:
                scored.append(Scored(taught_by, members))
            rows = score(cfg, run.store, split, scored, taught_by)
        else:
            rows = score(cfg, run.store, split, scored, None)
            rows[taught_by] = _in_its_own_tokens(teacher, run.store, split)
    result: dict[str, Any] = {"split": split, "taught_by": taught_by, "models": rows}
    if isinstance(teacher.extend, Aligner):
        result["aligned_share"] = alignment.share(teacher.extend, cfg, run.store)
    write_json(workdir / "distillation.json", result)
    table = Table(title=f"{split}: agreement with and divergence from {taught_by}")
    table.add_column("", overflow="fold")
    for heading, _, _ in SHOWN:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(_cell(row[value], form) for _, value, form in SHOWN))
    Console().print(table)
    return result


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _in_its_own_tokens(teacher: Teacher, store: Store, split: str) -> dict[str, Any]:
    """The row of a teacher with another tokenizer, of which tokens cannot be compared."""
    run = teacher.runs[0]
    found = opening.score(run, students_text(run, store), split)
    row = {name: found[name] for name in ("bits_per_byte", "word_ppl", "loss")}
    size = sum(x.size for x in jax.tree.leaves(run.params))
    return row | {"agreement": None, "kl": None, "parameters": size, "tokens_per_second": None}


def score(
    cfg: Config,
    store: Store,
    split_name: str,
    all_scored: Sequence[Scored],
    taught_by: str | None,
) -> dict[str, dict[str, Any]]:
    """Each model over a whole split, and against the one that taught.

    Args:
        cfg: resolved config of the student, whose windows are read.
        store: its data.
        split_name: split to score.
        all_scored: models over the vocabulary of the store.
        taught_by: name of the one that the others are compared with, if there is one.

    Returns:
        For each name `bits_per_byte`, `word_ppl`, `loss` (nats per token), `agreement` (share of
        positions at which the likeliest id is the teacher's), `kl` (of the model from the teacher,
        nats per token, temperature 1), `parameters` and `tokens_per_second` (forward pass with
        head, median of a few batches).
    """
    split = store.split(split_name)
    dtype = jnp.dtype(cfg.train.compute_dtype)
    params = {s.name: [p for _, p in s.models] for s in all_scored}

    def hidden(b: losses.Shifted, scored: Scored, params: list[Any]) -> list[Member]:
        made = []
        for (graphdef, _), leaves in zip(scored.models, params, strict=True):
            model = nnx.merge(graphdef, leaves)
            x_BTD = model(b.inputs, b.segment_ids, b.positions, dtype=dtype)
            made.append(Member(x_BTD, model.head_VD(), model.cfg.logit_softcap))
        return made

    def log_p(parts: list[Member], row: jax.Array) -> jax.Array:
        """Log-probabilities [T, V] of one row: those of all rows would not fit."""
        return teachers.mean_log_p([m._replace(x_BTE=m.x_BTE[row]) for m in parts])

    @jax.jit
    def compare(params, batch):
        b = losses.shift(batch)
        parts = {s.name: hidden(b, s, params[s.name]) for s in all_scored}

        def of_row(row: jax.Array) -> dict[str, jax.Array]:
            weights_T, target_T1 = b.weights[row], b.targets[row][:, None]
            log_ps = {name: log_p(of_model, row) for name, of_model in parts.items()}
            sums = {}
            for name, mine_TV in log_ps.items():
                teacher_TV = mine_TV if taught_by is None else log_ps[taught_by]
                same_T = mine_TV.argmax(-1) == teacher_TV.argmax(-1)
                kl_T = divergences.between(teacher_TV, mine_TV, "forward", 0.5)
                nats_T = -jnp.take_along_axis(mine_TV, target_T1, axis=1)[:, 0]
                sums[name] = jnp.stack([weights_T @ x for x in (nats_T, 1.0 * same_T, kl_T)])
            return sums

        by_row = jax.lax.map(of_row, jnp.arange(len(b.inputs)))
        return jax.tree.map(lambda x: x.sum(0), by_row)

    totals = {s.name: np.zeros(3) for s in all_scored}
    batch: dict[str, np.ndarray] = {}
    for batch in windows.eval_batches(
        split,
        seq_len=cfg.data.seq_len,
        batch_size=sharding.round_up(cfg.eval.batch_size),
        document_mask=cfg.data.document_mask,
        stride=cfg.eval.stride,
    ):
        for name, sums in jax.device_get(compare(params, batch)).items():
            totals[name] += sums
    count = len(split.tokens)
    rows = {}
    for s in all_scored:
        nats, same, kl = totals[s.name]
        sums = metrics.Sums(nats, count, math.nan)
        found = metrics.summarise(sums, split_bytes=split.bytes, split_words=split.words)

        def forward(params, batch, s=s):
            b = losses.shift(batch)
            parts = hidden(b, s, params)
            return jax.lax.map(lambda row: log_p(parts, row).sum(), jnp.arange(len(b.inputs)))

        rows[s.name] = {
            **{name: found[name] for name in ("bits_per_byte", "word_ppl", "loss")},
            "agreement": None if taught_by is None else same / count,
            "kl": None if taught_by is None else kl / count,
            "parameters": sum(x.size for x in jax.tree.leaves(params[s.name])),
            "tokens_per_second": _speed(jax.jit(forward), params[s.name], batch),
        }
    return rows


def _speed(forward: Any, params: Any, batch: dict[str, np.ndarray]) -> float:
    """Positions of a batch a second, median."""
    jax.block_until_ready(forward(params, batch))
    seconds = []
    for _ in range(TIMED_BATCHES):
        began = time.perf_counter()
        jax.block_until_ready(forward(params, batch))
        seconds.append(time.perf_counter() - began)
    return batch["weights"][:, 1:].size / float(np.median(seconds))
