"""Teachers: models that are run beside the student, or what was kept of their distributions."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from lm_jax import config, evaluate, step
from lm_jax.config import Config, ConfigError
from lm_jax.data.store import Store
from lm_jax.distill import cache
from lm_jax.kernels.divergences import Kept
from lm_jax.kernels.linear_distillation import Member
from lm_jax.loss import Batch, Shifted

TOLERANCE = 1e-3  # of a teacher's loss on another device or in another precision


class Reading(NamedTuple):
    """What a teacher says of a batch; no gradient goes into it."""

    members: list[Member]
    kept: Kept | None = None  # in place of members
    x_BTE: Any = None  # final states of a single teacher
    inside: Any = None  # what its layers compute, `Observed`


@dataclasses.dataclass(frozen=True)
class Teacher:
    """One or several models, or a cache, as `config.distill` names them.

    `params` goes through `jax.jit` as an argument; the rest is static.
    """

    names: tuple[str, ...]  # of the models; none for a cache
    models: tuple[nnx.GraphDef, ...]
    params: tuple[Any, ...]
    extend: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict  # of batches
    runs: tuple[evaluate.Run, ...] = ()  # where the models came from

    def read(
        self, params: tuple[Any, ...], batch: Batch, b: Shifted, dtype: Any, *, inside: bool
    ) -> Reading:
        """Run the models in eval mode on the student's inputs.

        Args:
            params: those of the models.
            batch: of the student, with what `extend` adds to it.
            b: the same, shifted.
            dtype: compute dtype.
            inside: whether the states of each layer are wanted.
        """
        params = jax.lax.stop_gradient(params)
        if not self.models:
            return Reading([], Kept(batch["kept_ids"], batch["kept_log_p"]))
        members, seen, x_BTE = [], None, None
        for graphdef, leaves in zip(self.models, params, strict=True):
            model = nnx.merge(graphdef, leaves)
            inputs = (b.inputs, b.segment_ids, b.positions)
            if inside:
                x_BTE, seen = model.observed(*inputs, dtype=dtype)
            else:
                x_BTE = model(*inputs, dtype=dtype)
            members.append(Member(x_BTE, model.head_VD(), model.cfg.logit_softcap))
        return Reading(members, x_BTE=x_BTE, inside=seen)


def open_teacher(cfg: Config, store: Store) -> Teacher:
    """The teacher of a resolved config.

    Raises:
        ConfigError: if a teacher cannot teach this student: another tokenizer or corpus, fewer
            positions, a cache of other windows.
    """
    if cfg.distill.cache:
        return Teacher((), (), (), cache.open_cache(cfg, store))
    names = tuple(name.strip() for name in cfg.distill.teachers.split(","))
    runs = tuple(_open_run("teachers", name, cfg, store) for name in names)
    if cfg.distill.alone:  # needed at the end only
        _open_run("alone", cfg.distill.alone, cfg, store)
    params = tuple(run.params for run in runs)
    return Teacher(names, tuple(_as_read(run, cfg) for run in runs), params, runs=runs)


def verify(teacher: Teacher) -> list[str]:
    """Score each run that teaches on the valid split, once; lines to print.

    Raises:
        ConfigError: if a teacher's loss is not the one on its own record, or no better than that
            of the frequencies of tokens.
    """
    lines = []
    for name, run in zip(teacher.names, teacher.runs, strict=True):
        eval_step = step.make_eval_step(run.cfg, run.graphdef, run.mesh)
        result = evaluate.Evaluator(run.cfg, run.store, run.mesh, eval_step)(run.params, "valid")
        loss, unigram = result["loss"], math.log(evaluate.references(run.store, "valid")["unigram"])
        said, record = "has no record of it", pathlib.Path(name) / "eval_valid.json"
        if record.exists():
            recorded = json.loads(record.read_text())["loss"]
            said = f"its record says {recorded:.4f}"
            if not abs(loss - recorded) <= TOLERANCE * recorded:
                raise ConfigError(
                    f"config.distill.teachers: {name} has a valid loss of {loss:.4f}, but {record} "
                    f"says {recorded:.4f}; restore the run."
                )
        if not loss < unigram:
            raise ConfigError(
                f"config.distill.teachers: {name} has a valid loss of {loss:.4f}, no better than "
                f"the {unigram:.4f} of the frequencies of tokens; train it first."
            )
        lines.append(
            f"teacher {name}: valid loss {loss:.4f} ({said}), word ppl {result['word_ppl']:.2f}, "
            f"bits per byte {result['bits_per_byte']:.4f}"
        )
    return lines


def _open_run(field: str, workdir: str, cfg: Config, store: Store) -> evaluate.Run:
    """A run with the student's tokenizer, named in a field of `config.distill`."""
    where = f"config.distill.{field}"
    try:
        run = evaluate.open_run(pathlib.Path(workdir))
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: {error}") from error
    if run.store.tokenizer.content_hash != store.tokenizer.content_hash:
        raise ConfigError(
            f"{where}: {workdir} has another tokenizer ({run.cfg.tokenizer.kind} of "
            f"{run.store.tokenizer.vocab_size} ids) than the student ({cfg.tokenizer.kind} of "
            f"{store.tokenizer.vocab_size}); give a run of the same tokenizer."
        )
    if run.cfg.model.positions == "learned" and run.cfg.data.seq_len < cfg.data.seq_len:
        raise ConfigError(
            f"{where}: {workdir} has {run.cfg.data.seq_len} positions, fewer than "
            f"config.data.seq_len={cfg.data.seq_len}; shorten the student's rows."
        )
    return run


def _as_read(run: evaluate.Run, cfg: Config) -> nnx.GraphDef:
    """The model of a run for rows that are cut the student's way."""
    how = config.replace(
        run.cfg,
        data__document_mask=cfg.data.document_mask,
        data__window_offset=cfg.data.window_offset,
    )
    impl, _ = step.choose_attention(cfg)
    graphdef, _ = step.create_model(how, run.store.tokenizer.vocab_size, impl)
    return graphdef
