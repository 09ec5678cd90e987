"""Student alone, distilled student, teachers and their mean, side by side on one split."""

import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from lm_jax import loss as losses
from lm_jax import metrics, sharding
from lm_jax.config import Config, rules
from lm_jax.console import sheet
from lm_jax.data import windows
from lm_jax.data.store import Store
from lm_jax.distill import alignment, opening
from lm_jax.distill.alignment import Aligner
from lm_jax.distill.teachers import Teacher, members_log_p
from lm_jax.files import write_json
from lm_jax.kernels import divergences
from lm_jax.workdir import AGREEMENT, Trained, open_trained

TIMED_BATCHES = 5
SHOWN = (  # heading, value and its format
    ("bits/byte", "bits_per_byte", ".4f"),
    ("word ppl", "word_ppl", ",.2f"),
    ("same top", "agreement", ".1%"),
    ("KL", "kl", ".4f"),
    ("parameters", "parameters", ","),
    ("tokens/s", "tokens_per_second", ",.0f"),
)


def report_distillation(
    cfg: Config, workdir: pathlib.Path, run: Trained, store: Store, teacher: Teacher
) -> None:
    """Score all models on the last configured split; write `distillation.json` and print it.

    Nothing is written for a cache, whose teacher is not at hand. `run` is the best checkpoint in
    the student's workdir.
    """
    if not teacher.models:
        return
    split = rules.eval_splits(cfg, store.manifest["splits"])[-1]
    models = {"distilled": _single("distilled", run.graphdef, run.params)}
    if cfg.distill.alone:
        alone = open_trained(pathlib.Path(cfg.distill.alone), mesh=run.mesh)
        models["alone"] = _single("alone", alone.graphdef, alone.params)
    one = len(teacher.models) == 1
    taught_by = f"teacher {teacher.names[0]}" if one else "mean of the teachers"
    with jax.default_matmul_precision(cfg.train.matmul_precision):
        if teacher.first_bytes is None:
            for member in zip(teacher.names, teacher.models, teacher.params, strict=True):
                models[f"teacher {member[0]}"] = _single(*member)
            models |= {taught_by: teacher}
            rows = score_models(cfg, store, split, models, taught_by)
        else:  # its own tokens cannot be compared
            rows = score_models(cfg, store, split, models, None)
            found = opening.score_teacher(teacher.runs[0], store, split)
            left_out = {"documents_left_out": found["documents_left_out"]}
            rows[taught_by] = _row(found, teacher) | left_out
    result: dict[str, Any] = {"split": split, "taught_by": taught_by, "models": rows}
    if isinstance(teacher.extend, Aligner):
        result["aligned_share"] = alignment.aligned_shares(teacher.extend, cfg, store)[0]
    if jax.process_index() == 0:
        write_json(workdir / AGREEMENT, result)
        _print(rows, f"{split}: agreement with and divergence from {taught_by}")


def _print(rows: Mapping[str, Mapping[str, Any]], title: str) -> None:
    table = Table(title=title)
    table.add_column("", overflow="fold")
    for heading, _, _ in SHOWN:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(_cell(row[value], form) for _, value, form in SHOWN))
    sheet().print(table)


def _single(name: str, graphdef: Any, params: Any) -> Teacher:
    """A model, to be read in the way in which a teacher is read."""
    return Teacher((name,), (graphdef,), (params,))


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _row(found: Mapping[str, float], model: Teacher) -> dict[str, Any]:
    """Scores and size, with the values of a comparison still to come."""
    row = {name: found[name] for name in ("bits_per_byte", "word_ppl", "loss")}
    size = sum(x.size for x in jax.tree.leaves(model.params))
    return row | {"parameters": size, "agreement": None, "kl": None, "tokens_per_second": None}


def score_models(
    cfg: Config,
    store: Store,
    split_name: str,
    models: Mapping[str, Teacher],
    taught_by: str | None,
) -> dict[str, dict[str, Any]]:
    """Score each model over a whole split, and compare it with the one that taught.

    Args:
        cfg: resolved config of the student, whose windows are read.
        store: its data.
        split_name: split to score.
        models: models over the vocabulary of the store; several in one predict by their mean
            probability.
        taught_by: name of the model that the others are compared with; None for no comparison.

    Returns:
        For each name `bits_per_byte`, `word_ppl`, `loss` (nats per token), `agreement` (share of
        positions at which the likeliest id is the teacher's), `kl` (from the teacher to the model,
        nats per token, temperature 1), `parameters` and `tokens_per_second` (forward pass with
        head, median of a few batches).
    """
    split = store.split(split_name)
    sums_of, params = _sums_of(cfg, models, taught_by), {n: m.params for n, m in models.items()}
    totals = dict.fromkeys(models, np.zeros(3))
    batch: dict[str, np.ndarray] = {}
    for batch in windows.eval_batches(
        split,
        seq_len=cfg.data.seq_len,
        batch_size=sharding.round_up(cfg.eval.batch_size),
        document_mask=cfg.data.document_mask,
        stride=cfg.eval.stride,
    ):
        found = jax.device_get(sums_of(params, batch))
        totals = {name: total + found[name] for name, total in totals.items()}
    count, rows = len(split.tokens), {}
    for name, (nats, same, kl) in totals.items():
        sums = metrics.Sums(nats, count, math.nan)
        found = metrics.summarise(sums, split_bytes=split.bytes, split_words=split.words)
        rows[name] = _row(found, models[name])
        rows[name]["tokens_per_second"] = _speed(cfg, models[name], batch)
        if taught_by is not None:
            rows[name] |= {"agreement": same / count, "kl": kl / count}
    return rows


def _log_p(
    cfg: Config, model: Teacher, params: Any, batch: losses.Batch
) -> Callable[[jax.Array], jax.Array]:
    """A function from a row's number to its log-probabilities [T, V]: all rows would not fit."""
    dtype = jnp.dtype(cfg.train.compute_dtype)
    members = model.read(params, batch, losses.shift(batch), dtype, inside=False).members
    return lambda row: members_log_p([m._replace(x_BTE=m.x_BTE[row]) for m in members])


def _sums_of(
    cfg: Config, models: Mapping[str, Teacher], taught_by: str | None
) -> Callable[..., dict[str, jax.Array]]:
    """`(params by name, batch) -> sums by name`: of nats, likeliest ids that agree, and KL."""

    def sums_of(params: Mapping[str, Any], batch: losses.Batch) -> tuple[dict[str, jax.Array]]:
        b = losses.shift(batch)
        log_p = {name: _log_p(cfg, model, params[name], batch) for name, model in models.items()}

        def of_row(row: jax.Array) -> dict[str, jax.Array]:
            weights_T, target_T1 = b.weights[row], b.targets[row][:, None]
            all_TV = {name: of_model(row) for name, of_model in log_p.items()}
            sums = {}
            for name, mine_TV in all_TV.items():
                teacher_TV = mine_TV if taught_by is None else all_TV[taught_by]
                same_T = mine_TV.argmax(-1) == teacher_TV.argmax(-1)
                kl_T = divergences.between(teacher_TV, mine_TV, "forward", 0.5)
                nats_T = -jnp.take_along_axis(mine_TV, target_T1, axis=1)[:, 0]
                sums[name] = jnp.stack([weights_T @ x for x in (nats_T, 1.0 * same_T, kl_T)])
            return sums

        by_row = jax.lax.map(of_row, jnp.arange(len(b.inputs)))
        return (jax.tree.map(lambda x: x.sum(0), by_row),)

    mapped = sharding.over_rows(sums_of, rows=[1], results=["sum"])
    return jax.jit(lambda params, batch: mapped(params, batch)[0])


def _speed(cfg: Config, model: Teacher, batch: dict[str, np.ndarray]) -> float:
    """Median positions of a batch per second, forward with head."""

    def of_rows(params: Any, batch: losses.Batch) -> tuple[jax.Array]:
        log_p = _log_p(cfg, model, params, batch)
        return (jax.lax.map(lambda row: log_p(row).sum(), jnp.arange(len(batch["tokens"]))),)

    forward = jax.jit(sharding.over_rows(of_rows, rows=[1], results=["rows"]))
    seconds = []
    for _ in range(1 + TIMED_BATCHES):  # the first call compiles
        began = time.perf_counter()
        jax.block_until_ready(forward(model.params, batch))
        seconds.append(time.perf_counter() - began)
    return batch["weights"][:, 1:].size / float(np.median(seconds[1:]))
