"""Teachers: models that are run beside the student, or what was kept of their distributions."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax import evaluate, step
from lm_jax.config import Config, ConfigError
from lm_jax.data.store import Store
from lm_jax.distill import cache
from lm_jax.kernels.divergences import Kept
from lm_jax.kernels.linear_distillation import Groups, Member
from lm_jax.loss import Batch, Shifted
from lm_jax.models.transformer import Observed


class Reading(NamedTuple):
    """What a teacher says of a batch; no gradient goes into it."""

    taught: list[Member] | Kept
    groups: Groups | None = None
    x_BTE: jax.Array | None = None  # final states of a single teacher
    inside: Observed | None = None


@dataclasses.dataclass(frozen=True)
class Teacher:
    """One or several models, or a cache, as `config.distill` names them.

    `params` goes through `jax.jit` as an argument; the rest is static.
    """

    names: tuple[str, ...]
    models: tuple[nnx.GraphDef, ...]  # none for a cache
    params: tuple[Any, ...]
    extend: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict  # of batches

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
            return Reading(Kept(batch["kept_ids"], batch["kept_log_p"]))
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
        return Teacher((cfg.distill.cache,), (), (), cache.open_cache(cfg, store))
    names = tuple(name.strip() for name in cfg.distill.teachers.split(","))
    opened = [_open_run(pathlib.Path(name), cfg, store) for name in names]
    graphdefs, params = zip(*opened, strict=True)
    return Teacher(names, graphdefs, params)


def _open_run(workdir: pathlib.Path, cfg: Config, store: Store) -> tuple[nnx.GraphDef, Any]:
    """Model and parameters of a run with the student's tokenizer."""
    where = "config.distill.teachers"
    try:
        run = evaluate.open_run(workdir)
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: {error}") from error
    if run.store.tokenizer.content_hash != store.tokenizer.content_hash:
        raise ConfigError(
            f"{where}: {workdir} has another tokenizer ({run.cfg.tokenizer.kind} of "
            f"{run.store.tokenizer.vocab_size} ids) than the student ({cfg.tokenizer.kind} of "
            f"{store.tokenizer.vocab_size}); give a teacher of the same tokenizer."
        )
    if run.cfg.model.positions == "learned" and run.cfg.data.seq_len < cfg.data.seq_len:
        raise ConfigError(
            f"{where}: {workdir} has {run.cfg.data.seq_len} positions, fewer than "
            f"config.data.seq_len={cfg.data.seq_len}; shorten the student's rows."
        )
    # The teacher reads rows cut the student's way.
    teacher = dataclasses.replace(run.cfg.data, seq_len=run.cfg.data.seq_len)
    teacher.document_mask = cfg.data.document_mask
    teacher.window_offset = cfg.data.window_offset
    read_as = dataclasses.replace(run.cfg, data=teacher)
    impl, _ = step.choose_attention(cfg)
    graphdef, _ = step.create_model(read_as, store.tokenizer.vocab_size, impl)
    return graphdef, jax.tree.map(jnp.asarray, run.params)
