"""Teachers: models that are run beside the student, or what was kept of their distributions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax.distill import alignment
from lm_jax.ensemble import fingerprint
from lm_jax.kernels import divergences
from lm_jax.kernels.divergences import Kept
from lm_jax.kernels.dropout import Draw
from lm_jax.kernels.linear_divergence import Groups, Member
from lm_jax.loss import Batch, Shifted
from lm_jax.models.layers import head_logits
from lm_jax.models.transformer import Observed
from lm_jax.workdir import Trained


def members_log_p(members: Sequence[Member], temperature: float = 1.0) -> jax.Array:
    """Log-probabilities [..., U] of one model or of the mean of several, all logits at once."""
    logits = [head_logits(m.x_BTE, m.head_UE, m.softcap) for m in members]
    return divergences.mean_log_p(logits, temperature)


def hidden_states(
    model: Any, inputs: Any, dtype: Any, draw: Draw | None = None, *, inside: bool
) -> tuple[jax.Array, Observed | None]:
    """Final states and, if what is inside is wanted, what the layers compute."""
    if inside:
        return model.observed(*inputs, dtype=dtype, draw=draw)  # type: ignore[no-any-return]
    return model(*inputs, dtype=dtype, draw=draw), None


class Reading(NamedTuple):
    """The states or kept probabilities of a teacher for a batch; they get no gradient."""

    members: list[Member]
    kept: Kept | None = None  # in place of members
    inside: Any = None  # what its layers compute, `Observed`
    groups: Groups | None = None  # of ids, where the tokenizers differ
    there_BT: Any = None  # 1 where a teacher with another tokenizer has a state


@dataclasses.dataclass(frozen=True)
class Teacher:
    """One or several models, or a cache, as `config.distill` names them.

    `params` goes through `jax.jit` as an argument; the rest is static.
    """

    names: tuple[str, ...]  # of the models; none for a cache
    models: tuple[nnx.GraphDef, ...]
    params: tuple[Any, ...]
    extend: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict  # of batches
    cached: str = ""  # sha256 of a cache's manifest
    runs: tuple[Trained, ...] = ()  # where the models came from
    # Of the ids of student and teacher, where their tokenizers differ.
    first_bytes: tuple[np.ndarray, ...] | None = None

    def read(
        self, params: tuple[Any, ...], batch: Batch, b: Shifted, dtype: Any, *, inside: bool
    ) -> Reading:
        """Run the models in eval mode on the student's inputs.

        `batch` holds what `extend` adds to it, and `b` is the same shifted; `inside` asks for what
        the layers compute.
        """
        params = jax.lax.stop_gradient(params)
        if not self.models:
            return Reading([], Kept(batch["kept_ids"], batch["kept_log_p"]))
        inputs = [b.inputs, b.segment_ids, b.positions]
        if self.first_bytes is not None:
            inputs = [batch[f"teacher_{name}"] for name in ("tokens", "segment_ids", "positions")]
        members = []
        for graphdef, leaves in zip(self.models, params, strict=True):
            model = nnx.merge(graphdef, leaves)
            x_BTE, seen = hidden_states(model, inputs, dtype, inside=inside)
            members.append(Member(x_BTE, model.head_VD(), model.cfg.logit_softcap))
        if self.first_bytes is None:
            return Reading(members, inside=seen)
        place_BT1 = jnp.maximum(batch["teacher_place"], 0)[..., None]
        x_BTE = jnp.take_along_axis(x_BTE, place_BT1, axis=1)
        if seen is not None:
            seen = seen._replace(x_LBTD=jnp.take_along_axis(seen.x_LBTD, place_BT1[None], axis=2))
        mine, own = map(jnp.asarray, self.first_bytes)
        groups = Groups(mine, own, alignment.BYTES, batch["aligned"])
        there_BT = (batch["teacher_place"] >= 0).astype(jnp.float32)
        member = members[0]._replace(x_BTE=x_BTE)
        return Reading([member], None, seen, groups, there_BT)

    @property
    def identity(self) -> dict[str, Any]:
        """Steps and fingerprints of the models' parameters, or the sha256 of a cache."""
        if not self.runs:
            return {"cache": self.cached}
        return {
            "teachers": list(self.names),
            "steps": [run.step for run in self.runs],
            "fingerprints": [fingerprint(leaves) for leaves in self.params],
        }
