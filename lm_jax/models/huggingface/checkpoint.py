"""Parameters of a checkpoint, read and written."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from lm_jax.config import ModelConfig
from lm_jax.files import read_json, whole, write_json
from lm_jax.models.huggingface.names import ARCHITECTURES, WEIGHTS, Parameter, parameters
from lm_jax.models.huggingface.reading import read_model
from lm_jax.models.huggingface.tensors import Tensors
from lm_jax.models.huggingface.writing import written_fields


def load(folder: Path) -> tuple[ModelConfig, int, int, dict]:
    """The model of a checkpoint.

    Args:
        folder: holds config.json and the weights.

    Returns:
        The resolved model config, the vocabulary size V, the longest sequence that the model is
        made for (rows of its position table, if it has one), and the parameters as arrays of NumPy
        in float32, as `families.create_model` arranges them.

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
    return cfg, vocab_size, max_len, traverse_util.unflatten_dict(flat)


def _read(parameter: Parameter, tensors: Tensors) -> np.ndarray:
    for i in range(parameter.layers or 1):  # before there is memory: config.json may claim any size
        for name, width in zip(parameter.names, parameter.widths, strict=True):
            shape = (*parameter.shape[:-1], width)
            tensors.require(name.format(i), *(shape[::-1] if parameter.transposed else shape))
    value = np.empty((parameter.layers or 1, *parameter.shape), np.float32)
    for name, part in _parts(parameter, value):
        part[:] = tensors.take(name, *part.shape)
    return value if parameter.layers else value[0]


def _parts(parameter: Parameter, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a parameter [layers or 1, ...] by name, as views into it."""
    ends = np.cumsum(parameter.widths)[:-1]
    for i, of_layer in enumerate(value):
        for name, part in zip(parameter.names, np.split(of_layer, ends, axis=-1), strict=True):
            yield name.format(i), part.T if parameter.transposed else part


def write_model(
    folder: Path,
    cfg: ModelConfig,
    vocab_size: int,
    max_len: int,
    params: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors, in float32, as transformers loads them.

    A factorised token table is multiplied out. No other copy of the weights is made than of one
    tensor at a time.

    Args:
        folder: where they go; made if it is not there.
        cfg: a resolved model config.
        vocab_size: V.
        max_len: T, the longest sequence that the model is made for.
        params: the parameters as `families.create_model` arranges them.
        extra: more fields of config.json, such as `eos_token_id`.

    Raises:
        ConfigError: if no architecture of transformers computes the model, see `architecture`.
    """
    fields = written_fields(cfg, vocab_size, max_len) | dict(extra or {})
    kind = fields["model_type"]
    flat = traverse_util.flatten_dict(dict(params))
    if cfg.embedding_rank:
        flat["embedding",] = np.asarray(flat["embedding",]) @ np.asarray(flat["projection",])
        cfg = dataclasses.replace(cfg, embedding_rank=0)
    prefix = ARCHITECTURES[kind].prefix
    tensors: dict[str, np.ndarray] = {}
    for parameter in parameters(kind, cfg, vocab_size, max_len):
        value = np.asarray(flat[parameter.path], np.float32)
        for name, part in _parts(parameter, value if parameter.layers else value[None]):
            tensors[name if name.startswith("lm_head.") else prefix + name] = part
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / WEIGHTS, tensors)
    write_json(folder / "config.json", fields)


def _save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors in float32 in the format of safetensors.

    The package would need all of them contiguous in memory, and makes a file that none but its
    owner may read. The format: https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4"))
