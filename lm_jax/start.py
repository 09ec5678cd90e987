"""Where a run takes its first state from: a checkpoint of another run, or one of Hugging Face."""

import dataclasses
import pathlib
import re
import shlex
from typing import Any

import jax

from lm_jax import checkpoint, config
from lm_jax.checkpoint import Kept, Manifest
from lm_jax.config import Config, ConfigError, ModelConfig
from lm_jax.config.section import errors_of
from lm_jax.data.store import Store, same_data
from lm_jax.data.tokenizers.base import Tokenizer
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.data.tokenizers.load import load_tokenizer
from lm_jax.models import huggingface
from lm_jax.workdir import TOKENIZER, Record, read_record, weights_field

WHERE = "config.train.start_from"
# Fields of the model that may differ: its parameters stand for the same function.
_FREE = {"init", "init_std", "scan_layers", "remat"}
_FREE |= {"dropout", "attention_dropout", "embedding_dropout"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run starts from."""

    folder: pathlib.Path
    update: int  # of the checkpoint; 0 for one of Hugging Face
    config_hash: str  # of that run; empty for Hugging Face
    line: str  # what is taken, in words
    whole: bool  # the whole state rather than the weights
    kept: Kept | None  # None: Hugging Face
    weights_in: str = "params"  # the part of the state that is evaluated, or "ema"

    @property
    def record(self) -> dict[str, Any]:
        """What the new run's `config.json` keeps of it."""
        return {
            "folder": str(self.folder.absolute()),
            "update": self.update,
            "config_hash": self.config_hash,
            "state": self.whole,
        }

    def weights(self, like: Any) -> Any:
        """The parameters, those that are evaluated, with the shapes and shardings of `like`.

        Raises:
            ConfigError: if a file of Hugging Face is missing, damaged or not supported.
        """
        if self.kept is None:
            with errors_of(WHERE):
                *_, params = huggingface.load(self.folder)
            return jax.tree.map(lambda x, wanted: jax.device_put(x, wanted.sharding), params, like)
        return self.kept.restore({self.weights_in: like})[self.weights_in]

    def state(self, like: dict[str, Any]) -> tuple[dict[str, Any], Manifest]:
        """The whole state, with the shapes and shardings of `like`, and its manifest.

        Raises:
            ConfigError: if the state there has other leaves.
        """
        assert self.kept is not None
        there, here = self.kept.shapes(), checkpoint.leaf_shapes(like)
        if there != here:
            names = sorted({name for name, _ in there.items() ^ here.items()})
            raise ConfigError(
                f"config.train.start_state: the state in {self.kept.path} has other leaves than "
                f"that of this run ({', '.join(names[:3])}{', ...' * (len(names) > 3)}); "
                "leave it at False to take the weights alone."
            )
        return self.kept.restore(like), self.kept.manifest()


def find_origin(cfg: Config, store: Store) -> Origin | None:
    """What a resolved config starts from; None if its parameters are drawn.

    Raises:
        ConfigError: if it is not there, or does not fit, naming the fields.
    """
    given, whole = cfg.train.start_from, cfg.train.start_state
    if not given:
        return None
    match = re.fullmatch(r"(.+?)(?:@(\d+))?", given, re.DOTALL)
    assert match is not None
    folder = pathlib.Path(match[1])
    if huggingface.is_checkpoint(folder):
        if whole or match[2]:
            raise ConfigError(
                f"{WHERE}: {given} is a checkpoint of Hugging Face, which holds weights alone; "
                "give its folder, and config.train.start_state=False."
            )
        return _hugging_face(folder, cfg, store)
    with errors_of(WHERE):
        record = read_record(folder, checkpoints=True)
    kept = checkpoint.find_kept(folder)
    wanted = [one for one in kept if int(match[2] or one.update) == one.update]
    if not wanted:
        there = ", ".join(map(str, sorted({one.update for one in kept}))) or "none"
        raise ConfigError(f"{WHERE}: {given} is not kept; {folder} holds the updates: {there}.")
    _give(cfg, _architecture_flags(cfg, record.cfg.model, record.cfg.data.seq_len))
    if not _reads_same_ids(folder, record, store):
        raise ConfigError(
            f"config.tokenizer.kind: {given} reads other ids ({_ids(record.data)}) than this run "
            f"({_ids(store.manifest)}); give the tokenizer and the corpus that it learned from."
        )
    weights_in = weights_field(record.cfg)
    names = () if whole else (weights_in,)
    with errors_of(WHERE):
        good, _ = checkpoint.first_good(wanted, lambda one: one.verify(*names))
    update = good.update
    if whole:
        _require_optimiser(cfg, record, update)
    return Origin(
        folder=folder,
        update=update,
        config_hash=config.config_hash(record.cfg),
        line=_line(folder, update, cfg, store, record),
        whole=whole,
        kept=good,
        weights_in=weights_in,
    )


def _line(folder: pathlib.Path, update: int, cfg: Config, store: Store, record: Record) -> str:
    if not cfg.train.start_state:
        return f"starts with the weights of {folder} at update {update:,}"
    own = {"train.start_from", "train.start_state", *config.incidental_fields()}
    lines = config.difference(record.cfg, cfg, own)
    if not same_data(record.data, store.manifest):
        lines.append("another corpus")
    what = f"goes on from the state of {folder} at update {update:,}"
    return f"{what}; changed from there: {'; '.join(lines) or 'nothing'}"


def _hugging_face(folder: pathlib.Path, cfg: Config, store: Store) -> Origin:
    with errors_of(WHERE):
        model, _, max_len = huggingface.read_model(folder)
        tokenizer = HfTokenizer.from_folder(folder)
    flags = _architecture_flags(cfg, model, max_len)
    if not _same_table(tokenizer, store.tokenizer):
        own = {"kind": "hf", "folder": folder, "vocab_size": 0}
        flags += [f"--config.tokenizer.{name}={value}" for name, value in own.items()]
    _give(cfg, flags)
    return Origin(folder, 0, "", f"starts with the weights of {folder}", whole=False, kept=None)


def _reads_same_ids(folder: pathlib.Path, record: Record, store: Store) -> bool:
    if record.data["tokenizer_hash"] == store.manifest["tokenizer_hash"]:
        return True
    with errors_of(WHERE):
        return _same_table(load_tokenizer(folder / TOKENIZER), store.tokenizer)


def _same_table(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers have the same ids and as many rows, whatever file they came in."""
    return one.identity == other.identity and one.vocab_size == other.vocab_size


def _ids(data: Any) -> str:
    return f"{data['tokenizer_kind']}, {data['vocab_size']:,}"


def _architecture_flags(cfg: Config, model: ModelConfig, seq_len: int) -> list[str]:
    """Those without which the same parameters would compute something else."""
    wanted = {name: value for name, value in config.named_fields(model) if name not in _FREE}
    other = {name for name, value in wanted.items() if value != getattr(cfg.model, name)}
    if other & {"d_model", "heads", "mlp"}:
        other |= {"kv_heads", "head_dim", "d_ff"}  # 0 would stand for something else now
    flags = [f"--config.model.{name}={wanted[name]}" for name in wanted if name in other]
    if model.positions == "learned" and seq_len != cfg.data.seq_len:
        flags.append(f"--config.data.seq_len={seq_len}")
    return flags


def _give(cfg: Config, flags: list[str]) -> None:
    """Raise ConfigError if there are any."""
    if flags:
        tokenizer = " or tokenizer" * any("tokenizer" in flag for flag in flags)
        raise ConfigError(
            f"{WHERE}: {cfg.train.start_from} has another architecture{tokenizer}; "
            f"give {shlex.join(flags)} to start from it."
        )


def _require_optimiser(cfg: Config, record: Record, update: int) -> None:
    """Refuse what the state of the other run cannot go on with."""
    ours, others = cfg.optim, record.cfg.optim
    fits = {
        "name": ours.name == others.name,
        "ema_decay": (ours.ema_decay > 0) == (others.ema_decay > 0),
    }
    if unfit := next((name for name, fit in fits.items() if not fit), None):
        raise ConfigError(
            f"config.optim.{unfit}: {getattr(ours, unfit)} cannot go on from the state of "
            f"{cfg.train.start_from}, where it is {getattr(others, unfit)}; give that, or leave "
            "config.train.start_state at False."
        )
    if int(cfg.train.steps) <= update:
        raise ConfigError(
            f"config.train.steps: {int(cfg.train.steps):,} is not beyond update {update:,}, at "
            f"which the run begins; give more, for updates are counted from those of "
            f"{cfg.train.start_from}."
        )
