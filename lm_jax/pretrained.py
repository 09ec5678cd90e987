"""Hugging Face checkpoints, opened as if they were runs."""

import dataclasses
import pathlib
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from lm_jax import config, sharding
from lm_jax.compilations import keep_compilations
from lm_jax.config import Config, ConfigError, rules
from lm_jax.config.resolve import resolve
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.models import huggingface
from lm_jax.models.families import choose_attention, create_model
from lm_jax.workdir import Trained, open_trained

LONGEST = 2048  # tokens of a window, unless another length is asked for: memory is finite
ROWS = 8  # windows scored at a time, likewise


def define_model(
    given: flags.FlagValues, about: str = "Folder of the run, or of a Hugging Face checkpoint."
) -> None:
    """Define the flags `--workdir` and `--checkpoint`, which name what `open_model` opens."""
    flags.DEFINE_string("workdir", None, about, given)
    checkpoint = "best, last, or its number of updates."
    flags.DEFINE_string("checkpoint", "best", checkpoint, flag_values=given)


def open_model(folder: pathlib.Path, *, checkpoint: str | int = "best", **changes: Any) -> Trained:
    """A run as `open_trained` opens it, or a Hugging Face checkpoint with its own tokenizer.

    Args:
        folder: of the run or of the checkpoint.
        checkpoint: which of a run.
        changes: fields of the config, as `config.replace` takes them.

    Raises:
        ValueError: if a file is missing, damaged or not supported, or a change does not fit.
    """
    if not huggingface.is_checkpoint(folder):
        run = open_trained(folder, checkpoint=checkpoint)
        cfg = rules.validate(config.replace(run.cfg, **changes))
        return dataclasses.replace(run, cfg=cfg)
    if checkpoint != "best":
        raise ConfigError(
            f"--checkpoint={checkpoint}: {folder} is a Hugging Face checkpoint, which holds one "
            "state; leave it out."
        )
    cfg = _own_config(folder, changes)
    keep_compilations(cfg)
    return open_pretrained(folder, cfg)


def _own_config(folder: pathlib.Path, changes: dict[str, Any]) -> Config:
    """The resolved config of a checkpoint alone; its windows are as long as it was made for."""
    model, _, made_for = huggingface.read_model(folder)
    own: dict[str, Any] = dict(
        model=model,
        tokenizer__kind="hf",
        tokenizer__folder=str(folder),
        data__seq_len=min(made_for, LONGEST),
        eval__batch_size=ROWS,
    )
    cfg = resolve(config.replace(Config(), **own | changes), windows=1)
    if cfg.data.seq_len > made_for:
        raise ConfigError(
            f"config.data.seq_len: {cfg.data.seq_len} is above the {made_for} positions that "
            f"{folder} is made for; lower it."
        )
    return cfg


def open_pretrained(folder: pathlib.Path, cfg: Config, mesh: Mesh | None = None) -> Trained:
    """A Hugging Face checkpoint as a run that has made no update and remembers no data.

    Args:
        folder: holds config.json, the weights and tokenizer.json.
        cfg: resolved; how it computes and what windows it reads. Its model gives way.
        mesh: where the parameters go; if None, a mesh of all devices.

    Raises:
        ValueError: as `huggingface.load` and `HfTokenizer.from_folder`.
    """
    model, vocab_size, _, params = huggingface.load(folder)
    tokenizer = HfTokenizer.from_folder(folder)
    cfg = config.replace(cfg, model=model)
    mesh = mesh or sharding.mesh_that_fits(cfg.mesh)
    graphdef, _ = create_model(cfg, vocab_size, choose_attention(cfg)[0])
    params = jax.device_put(params, sharding.places(mesh, params))
    return Trained(cfg, tokenizer, mesh, graphdef, params, 0, {})
