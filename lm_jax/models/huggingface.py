"""Checkpoints in the layout of Hugging Face transformers, opened as models of the dense family.

Read are folders of Llama (Touvron et al. 2023), of Qwen3 without experts (Yang et al. 2025) and of
GPT-2 (Radford et al. 2019): config.json, and the weights in model.safetensors or in the shards that
model.safetensors.index.json lists. Nothing is downloaded. A checkpoint that would compute something
else than its model here is refused.
"""

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import ModelConfig
from lm_jax.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What old checkpoints hold beside parameters: causal masks and rotary frequencies.
_CONSTANT = re.compile(r"h\.\d+\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in this layout, and no run: by its config.json."""
    path = folder / "config.json"
    return path.is_file() and "model_type" in json.loads(path.read_text())


def read_model(folder: Path) -> tuple[ModelConfig, int, int]:
    """What `load` returns and raises, without the parameters."""
    fields = _Fields(folder / "config.json")
    kind = fields.choice("model_type", ("llama", "qwen3", "gpt2"))
    return (_gpt2 if kind == "gpt2" else _llama)(fields)


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
    blocks = _gpt2_params if cfg.positions == "learned" else _llama_params
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(folder, stack, prefix="transformer." if blocks is _gpt2_params else "")
        params = blocks(cfg, tensors, vocab_size, max_len)
        if not cfg.tied or "lm_head.weight" in tensors.unused:
            head_VD = tensors.take("lm_head.weight", vocab_size, cfg.d_model)
            if not cfg.tied:
                params["head"] = {"kernel": head_VD.T}
            elif not np.array_equal(head_VD, params["embedding"]):
                raise ValueError(
                    f"{folder}: tensor lm_head.weight is not the token table; "
                    "set tie_word_embeddings in config.json to false."
                )
        tensors.check_all_used()
    return cfg, vocab_size, max_len, jax.tree.map(jnp.asarray, params)


class _Fields:
    """The fields of config.json; null counts as absent. A wrong one is an error that names it."""

    def __init__(self, path: Path):
        self.path, self.values = path, read_json(path)

    def refuse(self, name: str, supported: str) -> NoReturn:
        """Raise ValueError for a field whose value is not among those supported."""
        raise ValueError(
            f"{self.path}: {name} is {self.values.get(name)!r}; supported is {supported}."
        )

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(name, "a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            self.refuse(name, "a number above 0")
        return float(value)

    def choice(self, name: str, choices: tuple, default: Any = None) -> Any:
        """One of several values."""
        value = self._get(name, default)
        if value not in choices:
            self.refuse(name, " or ".join(map(repr, choices)))
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Either true or false."""
        return bool(self.choice(name, (False, True), default))

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


class _Tensors:
    """The named tensors of a checkpoint, each to be taken once."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, prefix: str):
        """Open the files until `stack` closes; `prefix` is left out of the tensors' names."""
        try:
            import safetensors
        except ImportError as error:
            raise ValueError(
                f"{folder} needs the package safetensors: pip install 'lm_jax[hf]'."
            ) from error
        self.folder = folder
        self.unused: dict[str, tuple[Any, str]] = {}
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safetensors.safe_open(path, "np"))
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}); copy the checkpoint again."
                ) from error
            for name in file.keys():
                self.unused[name.removeprefix(prefix)] = file, name

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The tensor in float32, which must have this shape."""
        if name not in self.unused:
            raise ValueError(f"{self.folder}: tensor {name} is missing; copy the checkpoint again.")
        file, stored = self.unused.pop(name)
        header = file.get_slice(stored)
        if header.get_dtype() not in ("F32", "F16", "BF16"):
            raise ValueError(
                f"{self.folder}: tensor {name} is of type {header.get_dtype()}; "
                "save it as float32, float16 or bfloat16."
            )
        if tuple(header.get_shape()) != shape:
            raise ValueError(
                f"{self.folder}: tensor {name} has shape {header.get_shape()}; "
                f"config.json asks for {list(shape)}."
            )
        # NumPy knows bfloat16 once ml_dtypes is imported, as it is by JAX.
        return file.get_tensor(stored).astype(np.float32)

    def check_all_used(self) -> None:
        """Raise ValueError if a parameter is left over."""
        rest = sorted(name for name in self.unused if not _CONSTANT.fullmatch(name))
        if rest:
            more = f" and {len(rest) - 1} more are" if rest[1:] else " is"
            raise ValueError(
                f"{self.folder}: tensor {rest[0]}{more} no part of the model that config.json "
                "describes; save the plain language model."
            )


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, all of them there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; save the model with safetensors."
        )
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(
            f"{folder / INDEX}: weight_map does not name a file for each tensor; "
            "copy the checkpoint again."
        )
    files = [folder / name for name in sorted(set(shards.values()))]
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}, which {INDEX} names, is missing; copy it into the folder.")
    return files


def _head_width(fields: _Fields, width: str, heads: str) -> tuple[int, int]:
    """D and H of a model whose heads divide its width."""
    D, H = fields.count(width), fields.count(heads)
    if D % H:
        fields.refuse(heads, f"a divisor of {width}, {D}")
    return D, H


# --- Llama and Qwen3 -----------------------------------------------------------------------------


def _llama(fields: _Fields) -> tuple[ModelConfig, int, int]:
    """Model config, vocabulary size and longest sequence."""
    D, H = _head_width(fields, "hidden_size", "num_attention_heads")
    qwen3 = fields.values["model_type"] == "qwen3"
    if fields.count("head_dim", 128 if qwen3 else D // H) != D // H:
        fields.refuse("head_dim", f"hidden_size / num_attention_heads, {D // H}")
    if D // H % 2:
        fields.refuse("num_attention_heads", "one that gives heads of even width")
    K = fields.count("num_key_value_heads", H)
    if H % K:
        fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {H}")
    fields.choice("hidden_act", ("silu", "swish"))
    bias = fields.flag("attention_bias", False)
    if fields.flag("mlp_bias", False) != bias:
        fields.refuse("mlp_bias", f"the same as attention_bias, {bias}")
    max_len = fields.count("max_position_embeddings")
    windowed = fields.flag("use_sliding_window", "sliding_window" in fields.values)
    if windowed and fields.count("sliding_window", max_len) < max_len:
        fields.refuse("sliding_window", f"null, or max_position_embeddings, {max_len}, and more")
    cfg = ModelConfig(
        layers=fields.count("num_hidden_layers"),
        d_model=D,
        heads=H,
        kv_heads=K,
        d_ff=fields.count("intermediate_size"),
        norm="rmsnorm",
        norm_eps=fields.number("rms_norm_eps"),
        positions="rotary",
        rope_theta=_rope_theta(fields),
        mlp="swiglu",
        qk_norm=qwen3,
        bias=bias,
        tied=fields.flag("tie_word_embeddings", False),
    )
    return cfg, fields.count("vocab_size"), max_len


def _stacked(blocks: Iterable[dict]) -> dict:
    """One tree of arrays with a leading axis of layers."""
    return jax.tree.map(lambda *layers: np.stack(layers), *blocks)


def _rope_theta(fields: _Fields) -> float:
    """The base of plain rotary positions, which newer checkpoints write into `rope_parameters`."""
    fields.choice("partial_rotary_factor", (1,), 1)
    for name in ("rope_scaling", "rope_parameters"):
        rope = dict(fields.values.get(name) or {})
        if "rope_theta" in rope:
            fields.values["rope_theta"] = rope.pop("rope_theta")
        if not rope.keys() <= {"type", "rope_type"} or set(map(str, rope.values())) - {"default"}:
            fields.refuse(name, "null or one of type 'default'")
    return fields.number("rope_theta", 10_000.0)


def _llama_params(cfg: ModelConfig, tensors: _Tensors, vocab_size: int, max_len: int) -> dict:
    """The parameters but the head; matrices are stored as [out, in]."""
    del max_len
    D, F, C = cfg.d_model, cfg.d_ff, cfg.d_model // cfg.heads

    def linear(where: str, inputs: int, **outputs: int) -> dict:
        """One matrix from several, which stand one after another on the output axis."""
        names = {f"{where}.{name}_proj": size for name, size in outputs.items()}
        kernels = [tensors.take(f"{name}.weight", size, inputs) for name, size in names.items()]
        made = {"kernel": np.concatenate(kernels).T}
        if cfg.bias:
            biases = [tensors.take(f"{name}.bias", size) for name, size in names.items()]
            made["bias"] = np.concatenate(biases)
        return made

    def norm(name: str, size: int) -> dict:
        return {"scale": tensors.take(f"{name}.weight", size)}

    def block(where: str) -> dict:
        own, kv = f"{where}.self_attn", cfg.kv_heads * C
        attention = {"qkv": linear(own, D, q=D, k=kv, v=kv), "out": linear(own, D, o=D)}
        if cfg.qk_norm:
            attention |= {name: norm(f"{own}.{name}", C) for name in ("q_norm", "k_norm")}
        mlp = f"{where}.mlp"
        return {
            "attention_norm": norm(f"{where}.input_layernorm", D),
            "attention": attention,
            "mlp_norm": norm(f"{where}.post_attention_layernorm", D),
            "mlp": {"up": linear(mlp, D, gate=F, up=F), "down": linear(mlp, F, down=D)},
        }

    return {
        "embedding": tensors.take("model.embed_tokens.weight", vocab_size, D),
        "blocks": _stacked(block(f"model.layers.{i}") for i in range(cfg.layers)),
        "final_norm": norm("model.norm", D),
    }


# --- GPT-2 ---------------------------------------------------------------------------------------


def _gpt2(fields: _Fields) -> tuple[ModelConfig, int, int]:
    """Model config, vocabulary size and rows of the position table."""
    D, H = _head_width(fields, "n_embd", "n_head")
    fields.choice("scale_attn_weights", (True,), True)
    fields.choice("scale_attn_by_inverse_layer_idx", (False,), False)
    fields.choice("add_cross_attention", (False,), False)
    mlps = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    cfg = ModelConfig(
        layers=fields.count("n_layer"),
        d_model=D,
        heads=H,
        kv_heads=H,
        d_ff=fields.count("n_inner", 4 * D),
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon"),
        positions="learned",
        mlp=mlps[fields.choice("activation_function", tuple(mlps))],
        bias=True,
        tied=fields.flag("tie_word_embeddings", True),
    )
    return cfg, fields.count("vocab_size"), fields.count("n_positions")


def _gpt2_params(cfg: ModelConfig, tensors: _Tensors, vocab_size: int, max_len: int) -> dict:
    """The parameters but the head; matrices are stored as [in, out], queries, keys, values."""
    D, F = cfg.d_model, cfg.d_ff

    def linear(name: str, inputs: int, outputs: int) -> dict:
        kernel = tensors.take(f"{name}.weight", inputs, outputs)
        return {"kernel": kernel, "bias": tensors.take(f"{name}.bias", outputs)}

    def norm(name: str) -> dict:
        scale = tensors.take(f"{name}.weight", D)
        return {"scale": scale, "bias": tensors.take(f"{name}.bias", D)}

    def block(where: str) -> dict:
        return {
            "attention_norm": norm(f"{where}.ln_1"),
            "attention": {
                "qkv": linear(f"{where}.attn.c_attn", D, 3 * D),
                "out": linear(f"{where}.attn.c_proj", D, D),
            },
            "mlp_norm": norm(f"{where}.ln_2"),
            "mlp": {
                "up": linear(f"{where}.mlp.c_fc", D, F),
                "down": linear(f"{where}.mlp.c_proj", F, D),
            },
        }

    return {
        "embedding": tensors.take("wte.weight", vocab_size, D),
        "position_embedding": tensors.take("wpe.weight", max_len, D),
        "blocks": _stacked(block(f"h.{i}") for i in range(cfg.layers)),
        "final_norm": norm("ln_f"),
    }
