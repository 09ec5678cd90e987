"""Parameters of a checkpoint, read and written."""

import contextlib
import dataclasses
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lm_jax.config import ModelConfig
from lm_jax.files import read_json, whole, write_json
from lm_jax.models.huggingface.names import ARCHITECTURES, WEIGHTS, Parameter, parameters
from lm_jax.models.huggingface.reading import read_model
from lm_jax.models.huggingface.tensors import Tensors, require_safetensors
from lm_jax.models.huggingface.writing import architecture, written_fields


def load(folder: Path) -> tuple[ModelConfig, int, int, dict]:
    """The model of a checkpoint.

    Args:
        folder: holds config.json and the weights.

    Returns:
        The resolved model config, the vocabulary size V, the longest sequence that the model is
        made for (rows of its position table, if it has one), and the parameters in float32 as
        `families.create_model` arranges them.

    Raises:
        ValueError: if a file, field or tensor is missing, damaged, or stands for something that
            the dense family does not compute.
    """
    cfg, vocab_size, max_len = read_model(folder)
    kind = read_json(folder / "config.json")["model_type"]
    with contextlib.ExitStack() as stack:
        tensors = Tensors(folder, stack)
        flat = {
            parameter.path: _read(parameter, tensors)
            for parameter in parameters(kind, cfg, vocab_size, max_len)
        }
        if cfg.tied and "lm_head.weight" in tensors.unused:
            head_VD = tensors.take("lm_head.weight", vocab_size, cfg.d_model)
            if not np.array_equal(head_VD, flat["embedding",]):
                raise ValueError(
                    f"{folder}: tensor lm_head.weight is not the token table; "
                    "set tie_word_embeddings in config.json to false."
                )
        tensors.check_all_used()
    return cfg, vocab_size, max_len, jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat))


def _read(parameter: Parameter, tensors: Tensors) -> np.ndarray:
    *rows, _ = parameter.shape

    def of_layer(i: int) -> np.ndarray:
        parts = []
        for name, width in zip(parameter.names, parameter.widths, strict=True):
            shape = (*rows, width)
            if parameter.transposed:
                parts.append(tensors.take(name.format(i), *shape[::-1]).T)
            else:
                parts.append(tensors.take(name.format(i), *shape))
        return np.concatenate(parts, axis=-1)

    if parameter.layers is None:
        return of_layer(0)
    return np.stack([of_layer(i) for i in range(parameter.layers)])


def write_model(
    folder: Path,
    cfg: ModelConfig,
    vocab_size: int,
    max_len: int,
    params: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors, in float32, as transformers loads them.

    A factorised token table is multiplied out.

    Args:
        folder: where they go; made if it is not there.
        cfg: a resolved model config.
        vocab_size: V.
        max_len: T, the longest sequence that the model is made for.
        params: the parameters as `families.create_model` arranges them.
        extra: more fields of config.json, such as `eos_token_id`.

    Raises:
        ConfigError: if no architecture of transformers computes the model, see `architecture`.
        ValueError: if the package safetensors is missing.
    """
    safetensors = require_safetensors(folder)
    fields = written_fields(cfg, vocab_size, max_len) | dict(extra or {})
    kind = architecture(cfg)
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(params)))
    if cfg.embedding_rank:
        flat["embedding",] = flat["embedding",] @ flat.pop(("projection",))
        cfg = dataclasses.replace(cfg, embedding_rank=0)
    prefix = ARCHITECTURES[kind].prefix
    tensors = {
        (name if name.startswith("lm_head.") else prefix + name): tensor
        for parameter in parameters(kind, cfg, vocab_size, max_len)
        for name, tensor in _written(parameter, flat[parameter.path])
    }
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / WEIGHTS) as file:
        # By the name, for a file of some gigabytes that is built in memory would double them.
        safetensors.numpy.save_file(tensors, file.name, metadata={"format": "pt"})
        # It puts a file in the place of this one that none but its owner may read.
        os.chmod(file.name, stat.S_IMODE(os.fstat(file.fileno()).st_mode))
    write_json(folder / "config.json", fields)


def _written(parameter: Parameter, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of a parameter."""
    ends = np.cumsum(parameter.widths)[:-1]
    for i, of_layer in enumerate([value] if parameter.layers is None else value):
        for name, part in zip(parameter.names, np.split(of_layer, ends, axis=-1), strict=True):
            # safetensors writes the memory of an array, whatever its strides.
            yield name.format(i), np.ascontiguousarray(part.T if parameter.transposed else part)
