"""The named tensors of a checkpoint."""

import contextlib
import difflib
import re
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.files import read_json
from lm_jax.models.huggingface.names import WEIGHTS
from lm_jax.models.huggingface.reading import other_format

INDEX = f"{WEIGHTS}.index.json"
# What old checkpoints hold beside parameters: causal masks and rotary frequencies.
_CONSTANT = re.compile(r"h\.\d+\.attn\.(masked_)?bias|.*\.?rotary_emb\.inv_freq")
# What stands before a name, by the module that was saved and by what was wrapped around it.
_PREFIX = re.compile(r"^((_orig_mod|module|model|transformer)\.)+")


class Tensors:
    """The named tensors of a checkpoint, each to be taken once."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        """Open the files until `stack` closes.

        Raises:
            ValueError: if one is missing or damaged, two tensors are the same parameter, or the
                package safetensors is missing.
        """
        try:
            import safetensors
        except ImportError as error:
            raise ValueError(
                f"{folder} needs the package safetensors: pip install 'lm_jax[hf]'."
            ) from error
        self.folder = folder
        self.unused: dict[str, tuple[Any, str]] = {}  # file and name there, by name without prefix
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safetensors.safe_open(path, "np"))
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}); copy the checkpoint again."
                ) from error
            for stored in file.keys():
                name = _PREFIX.sub("", stored)
                if name in self.unused:
                    raise ValueError(
                        f"{folder}: tensors {self.unused[name][1]} and {stored} are the same "
                        "parameter; save the plain language model."
                    )
                self.unused[name] = file, stored

    def require(self, name: str, *shape: int) -> None:
        """Look whether a tensor is there, of this shape; nothing of it is read.

        Raises:
            ValueError: if it is missing, or of another shape or type.
        """
        if name not in self.unused:
            near = difflib.get_close_matches(name, self.unused, cutoff=0)
            there = ", ".join(self.unused[other][1] for other in near)
            remedy = "copy the checkpoint again, or correct config.json"
            if name == "lm_head.weight":
                remedy = "save it with its head, or, if that is the token table, set "
                remedy += "tie_word_embeddings in config.json to true"
            raise ValueError(
                f"{self.folder}: tensor {name} is missing"
                f"{there and f', the nearest of the others are {there}'}; {remedy}."
            )
        file, stored = self.unused[name]
        header = file.get_slice(stored)
        if header.get_dtype() not in ("F32", "F16", "BF16"):
            raise ValueError(
                f"{self.folder}: tensor {stored} is of type {header.get_dtype()}; "
                "save it as float32, float16 or bfloat16."
            )
        if tuple(header.get_shape()) != shape:
            raise ValueError(
                f"{self.folder}: tensor {stored} has shape {header.get_shape()}, and config.json "
                f"asks for {list(shape)}; correct it, or copy the checkpoint again."
            )

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The tensor as it is stored, which must have this shape; raises as `require`."""
        self.require(name, *shape)
        file, stored = self.unused.pop(name)
        # NumPy knows bfloat16 once ml_dtypes is imported, as it is by JAX.
        return file.get_tensor(stored)

    def check_all_used(self) -> None:
        """Raise ValueError if a parameter is left over."""
        rest = sorted(name for name in self.unused if not _CONSTANT.fullmatch(name))
        if rest:
            more = f" and {len(rest) - 1} more are" if rest[1:] else " is"
            raise ValueError(
                f"{self.folder}: tensor {self.unused[rest[0]][1]}{more} no part of the model that "
                "config.json describes; save the plain language model."
            )


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, all of them there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise other_format(folder) or ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; save the model with safetensors."
        )
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(
            f"{folder / INDEX}: weight_map does not name a file for each tensor; "
            "copy the checkpoint again."
        )
    names = sorted(set(shards.values()))
    for name in names:
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"{folder / INDEX}: weight_map names {name!r}, which is outside the folder; "
                "copy the checkpoint again."
            )
        if not path.is_file():
            raise ValueError(f"{path}, which {INDEX} names, is missing; copy it into the folder.")
    return [folder / name for name in names]
