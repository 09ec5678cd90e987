"""Several runs as one: the mean of their next-token probabilities, each with equal weight."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lm_jax import config, sharding
from lm_jax import loss as losses
from lm_jax.config import ConfigError, MeshConfig, rules
from lm_jax.config.section import get
from lm_jax.data.store import same_data
from lm_jax.files import is_url, read_json, user_path, write_json
from lm_jax.kernels import chunks, divergences
from lm_jax.kernels.linear_divergence import Member
from lm_jax.kernels.linear_loss import pick
from lm_jax.models import huggingface
from lm_jax.places import pulled
from lm_jax.pretrained import open_model
from lm_jax.rundir import RECORD
from lm_jax.step import Metrics
from lm_jax.workdir import Trained, open_trained, read_record

ENSEMBLE = "ensemble.json"
MODELS = (
    "Folder of a run, of an ensemble or of a Hugging Face checkpoint; or several runs with commas, "
    "whose probabilities are averaged."
)


class Named(NamedTuple):
    """A run that is named beside others."""

    folder: str
    checkpoint: str
    fingerprint: str = ""  # of its parameters, if they are on record


@dataclasses.dataclass(frozen=True)
class Ensemble(Trained):
    """Runs that are used as one; `params` and `graphdef` are tuples, all else is of the first.

    `step` is the sum of theirs.
    """

    names: tuple[str, ...]
    members: tuple[Trained, ...]

    def require_one_stride(self) -> None:
        """Raise ConfigError if the configs of the runs have several."""
        strides = {
            name: run.cfg.eval.stride for name, run in zip(self.names, self.members, strict=True)
        }
        if len({*strides.values()}) > 1:
            told = ", ".join(f"{stride} of {name}" for name, stride in strides.items())
            raise ConfigError(f"--stride: the runs have different ones ({told}); give one.")


def is_ensemble(folder: str | os.PathLike) -> bool:
    """Whether a folder is one that `record_members` has written."""
    return not is_url(folder) and os.path.isfile(user_path(folder) / ENSEMBLE)


def recorded_members(folder: str | os.PathLike) -> list[Named]:
    """The runs of an ensemble, with their checkpoints.

    Raises:
        ValueError: if its `ensemble.json` is damaged.
    """
    path = user_path(folder) / ENSEMBLE
    try:
        members = [
            Named(one["folder"], str(one["step"]), one["fingerprint"])
            for one in read_json(path)["members"]
        ]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: does not name the runs of an ensemble; restore it.") from error
    return [
        one if is_url(one.folder) else one._replace(folder=_from(path.parent, one.folder))
        for one in members
    ]


def _from(folder: pathlib.Path, relative: str) -> str:
    """A path as the folder is named, if no link stands in between."""
    there = (folder.resolve() / relative).resolve()
    short = pathlib.Path(os.path.normpath(folder / relative))
    return str(short if short.resolve() == there else there)


def each_run(given: str) -> list[Named]:
    """The runs that stand between commas, with the best checkpoint of each, and those of ensembles.

    Raises:
        ValueError: as `recorded_members`.
    """
    found: list[Named] = []
    for name in map(str.strip, given.split(",")):
        found += recorded_members(name) if name and is_ensemble(name) else [Named(name, "best")]
    return found


def named_together(given: str, checkpoint: str = "best") -> list[Named]:
    """The runs that `--workdir` names as one; none if it names a run or another folder.

    Args:
        given: runs with commas, or the folder of an ensemble.
        checkpoint: which of each; those of an ensemble are on record.

    Raises:
        ConfigError: if a run is named twice, or nothing between two commas; if another checkpoint
            than that on record is asked for.
    """
    if is_ensemble(given):
        if checkpoint != "best":
            raise ConfigError(
                f"--checkpoint={checkpoint}: {given} names a checkpoint of each of its runs; leave "
                "it out, or name the runs with commas."
            )
        return recorded_members(given)
    if "," not in given or (not is_url(given) and os.path.exists(user_path(given))):
        return []
    names = [name.strip() for name in given.split(",")]
    if len({*map(os.path.normpath, names)}) < len(names) or not all(names):
        raise ConfigError(
            f"--workdir={given}: names a run twice, or nothing between two commas; name each once."
        )
    return [Named(name, checkpoint) for name in names]


def open_models(
    given: str, checkpoint: str = "best", **changes: Any
) -> tuple[Trained, pathlib.Path | None]:
    """What `--workdir` names, and its folder; runs with commas have none together.

    The arguments are those of `named_together` and `open_ensemble`; see `open_model` for a single
    run or checkpoint.
    """
    if named := named_together(given, checkpoint):
        folder = user_path(given) if is_ensemble(given) else None
        return open_ensemble(named, **changes), folder
    folder = pulled(given, checkpoint)
    return open_model(folder, checkpoint=checkpoint, **changes), folder


def open_ensemble(named: Sequence[Named], **changes: Any) -> Ensemble:
    """Open runs to use them as one.

    Args:
        named: of `named_together`.
        changes: fields of the config, as `config.replace` takes them.

    Raises:
        ValueError: if one cannot be opened, is not what is on record, or as `as_one`.
    """
    runs: list[Trained] = []
    mesh = None
    for one in named:
        folder = pulled(one.folder, one.checkpoint)
        if huggingface.is_checkpoint(folder):
            raise ConfigError(
                f"--workdir: {one.folder} is a Hugging Face checkpoint, and only runs are "
                "averaged; leave it out."
            )
        if mesh is None:
            own = read_record(folder).cfg.mesh
            # Parameters in parts, but no heads, whose number need not be the same.
            mesh = sharding.mesh_that_fits(MeshConfig(fsdp=own.fsdp * own.tensor))
        run = open_trained(folder, checkpoint=one.checkpoint, mesh=mesh)
        if one.fingerprint not in ("", fingerprint(run.params)):
            raise ConfigError(
                f"{one.folder}: its parameters are not those that {ENSEMBLE} tells of; restore the "
                "run, or score the runs anew, named with commas."
            )
        cfg = rules.validate(config.replace(run.cfg, **changes))
        runs.append(dataclasses.replace(run, cfg=cfg))
    return as_one([one.folder for one in named], runs)


def as_one(names: Sequence[str], runs: Sequence[Trained]) -> Ensemble:
    """Opened runs on one mesh as one.

    Raises:
        ConfigError: if one cannot be averaged with the first, since it has other data, another
            tokenizer or other windows.
    """
    first = runs[0]
    for name, run in zip(names, runs, strict=True):
        _require_alike(names[0], first, name, run)
    return Ensemble(
        cfg=first.cfg,
        tokenizer=first.tokenizer,
        mesh=first.mesh,
        graphdef=tuple(run.graphdef for run in runs),
        params=tuple(run.params for run in runs),
        step=sum(run.step for run in runs),
        data=first.data,
        names=tuple(names),
        members=tuple(runs),
    )


def _require_alike(first: str, one: Trained, name: str, other: Trained) -> None:
    """Raise ConfigError if the probabilities of two runs are not of the same tokens."""
    sizes = (one.tokenizer.vocab_size, other.tokenizer.vocab_size)
    if sizes[0] != sizes[1] or one.tokenizer.identity != other.tokenizer.identity:
        raise ConfigError(
            f"--workdir: {name} has another tokenizer than {first}, so that their probabilities "
            "are not of the same tokens; leave one of them out."
        )
    if not same_data(one.data, other.data):
        raise ConfigError(
            f"--workdir: {name} was trained on other data than {first}; leave one of them out."
        )
    for path in ("data.seq_len", "data.document_mask"):
        mine, theirs = get(one.cfg, path), get(other.cfg, path)
        if mine != theirs:
            raise ConfigError(
                f"--workdir: {name} has config.{path}={theirs} and {first} {mine}, so that they "
                "read other windows; leave one of them out."
            )


def record_members(folder: pathlib.Path, run: Ensemble) -> None:
    """Write `ensemble.json`, by which the folder stands for the runs.

    Raises:
        ConfigError: if it is that of a run or stands for others, whose results are there.
    """
    members = [
        {
            "folder": name if is_url(name) else _to(folder, name),
            "step": member.step,
            "fingerprint": fingerprint(member.params),
        }
        for name, member in zip(run.names, run.members, strict=True)
    ]
    path = folder / ENSEMBLE
    if path.is_file() and read_json(path) != {"members": members}:
        raise ConfigError(f"{path}: is of other runs or checkpoints; give another --out.")
    if (folder / RECORD).exists():
        raise ConfigError(f"--out={folder}: is the folder of a run; give another one.")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"members": members})


def _to(folder: pathlib.Path, name: str) -> str:
    return os.path.relpath(user_path(name).resolve(), folder.resolve())


def fingerprint(params: Any) -> str:
    """A short hash of all parameters, independent of sharding."""
    checksums = [int(_checksum(leaf)) for leaf in jax.tree.leaves(params)]
    return hashlib.sha256(repr(checksums).encode()).hexdigest()[:16]


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).ravel()
    return (bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)


def make_mean_step(run: Ensemble) -> Callable[..., Metrics]:
    """As `step.make_eval_step` for the mean of runs; `observed` [M] are the nats of each."""

    def mean_step(params: tuple[Any, ...], batch: losses.Batch) -> tuple[Metrics, Metrics]:
        b, members = losses.shift(batch), []
        for member, own in zip(run.members, params, strict=True):
            model, train = nnx.merge(member.graphdef, own), member.cfg.train
            dtype = jnp.dtype(train.compute_dtype)
            with jax.default_matmul_precision(train.matmul_precision):
                x_BTD = model(b.inputs, b.segment_ids, b.positions, dtype=dtype)
            members.append(Member(x_BTD, model.head_VD(), model.cfg.logit_softcap))
        with jax.default_matmul_precision(run.cfg.train.matmul_precision):
            nats_BT, correct_BT, *each = mean_nats(members, b.targets, b.weights)
        sums = {"nats": nats_BT.sum(), "count": b.weights.sum(), "correct": correct_BT.sum()}
        sums["observed"] = jnp.stack([own_BT.sum() for own_BT in each])
        by_token = {"token_nats": nats_BT, "token_weights": b.weights, "token_correct": correct_BT}
        return sums, by_token

    mapped = sharding.over_rows(mean_step, rows=[1], results=["sum", "rows"], mesh=run.mesh)

    def joined(params: tuple[Any, ...], batch: losses.Batch) -> Metrics:
        sums, by_token = mapped(params, batch)
        return sums | by_token

    return jax.jit(joined, out_shardings=NamedSharding(run.mesh, PartitionSpec()))


def mean_nats(
    members: Sequence[Member], targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, ...]:
    """Nats of the targets under the mean of the members' probabilities, without all logits at once.

    Returns:
        The nats, the weight where no token is more likely than the target, and the nats under each
        member, all [B, T]. Of one member the first and the last are the same.
    """
    first, *others = members
    heads = [chunks.head_operand(m.head_UE, m.x_BTE.dtype) for m in others]

    def score(z_NV: jax.Array, weights_N: jax.Array, rows, heads) -> tuple[Any, jax.Array]:
        targets_N, *states = rows
        logits_each = [z_NV]
        for x_NE, head, m in zip(states, heads, others, strict=True):
            x_NE = chunks.scored(x_NE, weights_N)
            logits_each.append(chunks.logits(x_NE, head, m.head_UE.shape[0], m.softcap)[0])
        scores = [divergences.mean_log_p(logits_each, 1.0), *logits_each]
        picked = [pick(scores_NV, targets_N, weights_N) for scores_NV in scores]
        nats_N, *each = (lse_N - picked_N for _, picked_N, _, lse_N in picked)
        _, picked_N, top_N, _ = picked[0]
        values = (nats_N, picked_N >= top_N, *each)
        return tuple(weights_N * value_N for value_N in values), z_NV  # no gradient is asked for

    how = chunks.How(score, first.softcap, None)
    rows = (targets_BT, *(m.x_BTE for m in others))
    return chunks.terms(how, first.x_BTE, first.head_UE, weights_BT, rows, heads)
