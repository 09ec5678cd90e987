"""What the config.json of a checkpoint says of the model."""

import sys
from pathlib import Path
from typing import Any, NoReturn

from lm_jax.config import ModelConfig, RopeScaling
from lm_jax.files import read_json
from lm_jax.models.huggingface.names import ARCHITECTURES


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, and no run: by its config.json, or by its weights."""
    path = folder / "config.json"
    if not path.is_file():
        return other_format(folder) is not None
    # Not parsed: what is wrong with it is told by whoever reads it next.
    return '"model_type"' in path.read_text(errors="replace")


_SAVE = "open it with transformers and save it anew with save_pretrained"
_OTHERS = {  # what else checkpoints are made of, and what makes them readable here
    "adapter_config.json": (
        "an adapter without its model",
        "merge it with merge_and_unload of peft, and save that with save_pretrained",
    ),
    "pytorch_model*.bin*": ("pickles of PyTorch, which run code when they are opened", _SAVE),
    "*.gguf": ("weights of llama.cpp", f"{_SAVE} (from_pretrained has gguf_file)"),
    "*.pth": (
        "pickles of PyTorch in a layout of its maker",
        "take the checkpoint that its maker publishes for transformers",
    ),
    "flax_model*.msgpack": ("weights of Flax", f"{_SAVE} (version 4 has from_flax)"),
    "tf_model*.h5": ("weights of TensorFlow", f"{_SAVE} (version 4 has from_tf)"),
}


def other_format(folder: Path) -> ValueError | None:
    """What is said of weights in another format than safetensors; None if there are none."""
    for pattern, (what, remedy) in _OTHERS.items():
        for path in sorted(folder.glob(pattern)):
            return ValueError(f"{path}: these are {what}, and no safetensors; {remedy}.")
    return None


def read_model(folder: Path) -> tuple[ModelConfig, int, int]:
    """What `load` returns and raises, without the parameters."""
    if not (folder / "config.json").is_file() and (other := other_format(folder)):
        raise other
    fields = _Fields(folder / "config.json")
    kind = fields.choice("model_type", tuple(ARCHITECTURES))
    if (quantised := fields.values.get("quantization_config")) is not None:
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{fields.path}: quantization_config says that the weights are quantised ({how}); "
            "take the checkpoint from before, or save what transformers' dequantize gives."
        )
    own = ARCHITECTURES[kind]
    max_len = fields.count(own.max_len)
    special = _gpt2(fields) if kind == "gpt2" else _llama(fields, kind, max_len)
    counted: dict[str, Any] = {
        field: fields.count(name, special.pop(field, None)) for name, field in own.counts.items()
    }
    cfg = ModelConfig(
        **counted,
        norm_eps=fields.number(own.norm_eps),
        mlp=own.mlps[fields.choice(own.activation, tuple(own.mlps))],
        tied=fields.flag("tie_word_embeddings", kind == "gpt2"),
        **special,
    )
    if cfg.heads % cfg.kv_heads:
        fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {cfg.heads}")
    return cfg, fields.count("vocab_size"), max_len


_LARGEST = 10**9  # of anything that is counted: beyond it sizes overflow


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
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST:
            self.refuse(name, f"a whole number above 0, up to {_LARGEST:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._get(name, default)
        kind = isinstance(value, int | float) and not isinstance(value, bool)
        if not kind or not 0 < value <= sys.float_info.max:
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


def _head_dim(fields: _Fields, width: str, heads: str) -> int:
    """The width of heads that divide that of the model."""
    D, H = fields.count(width), fields.count(heads)
    if D % H:
        fields.refuse(heads, f"a divisor of {width}, {D}")
    return D // H


def _gpt2(fields: _Fields) -> dict[str, Any]:
    """Fields of the model, and defaults of those that are counted."""
    fields.choice("scale_attn_weights", (True,), True)
    fields.choice("scale_attn_by_inverse_layer_idx", (False,), False)
    fields.choice("add_cross_attention", (False,), False)
    return {
        "kv_heads": fields.count("n_head"),
        "head_dim": _head_dim(fields, "n_embd", "n_head"),
        "d_ff": 4 * fields.count("n_embd"),
        "norm": "layernorm",
        "positions": "learned",
        "bias": True,
    }


def _llama(fields: _Fields, kind: str, max_len: int) -> dict[str, Any]:
    """The same for Llama and those that follow it."""
    if fields.values.get("head_dim") is None and kind != "qwen3":
        C = _head_dim(fields, "hidden_size", "num_attention_heads")
    else:
        C = fields.count("head_dim", 128)
    if C % 2:
        fields.refuse("head_dim", f"an even width, not {C}")
    theta, scaling = _rope(fields, max_len)
    return {
        "kv_heads": fields.count("num_attention_heads"),
        "head_dim": C,
        "norm": "rmsnorm",
        "positions": "rotary",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "window": _window(fields, kind, max_len),
        "qk_norm": kind == "qwen3",
        **_biases(fields, kind),
    }


def _biases(fields: _Fields, kind: str) -> dict[str, Any]:
    """Which linear maps have biases; Qwen2 and Mistral say nothing of it."""
    if kind == "qwen2":
        return {"bias": True, "bias_in": "qkv"}
    attention = kind != "mistral" and fields.flag("attention_bias", False)
    if kind == "llama" and fields.flag("mlp_bias", False):
        if not attention:
            fields.refuse("mlp_bias", "false, or true with attention_bias true")
        return {"bias": True}
    return {"bias": True, "bias_in": "attention"} if attention else {}


def _window(fields: _Fields, kind: str, max_len: int) -> int:
    """Positions that attention sees in every layer; 0: all."""
    given = fields.values.get("sliding_window", None if kind == "llama" else 4096)
    windowed = given is not None
    if kind != "mistral":
        windowed &= fields.flag("use_sliding_window", kind == "llama")
    window = fields.count("sliding_window", 4096) if windowed else max_len
    if window >= max_len:
        return 0
    if kind == "llama":  # transformers would not read it
        fields.refuse("sliding_window", f"null, or max_position_embeddings, {max_len}, and more")
    return window if kind == "mistral" or _has_windows(fields) else 0


def _has_windows(fields: _Fields) -> bool:
    """Whether all layers of a Qwen have the window, or none."""
    layers, name = fields.count("num_hidden_layers"), "layer_types"
    types = fields.values.get(name)
    if types is None:
        name = "max_window_layers"
        full = fields.values.get(name, 28)
        every, none = full == 0, isinstance(full, int) and full >= layers
    else:
        every, none = (types == [f"{x}_attention"] * layers for x in ("sliding", "full"))
    if not (every or none):
        fields.refuse(name, "a window in all layers or in none")
    return every


def _rope(fields: _Fields, max_len: int) -> tuple[float, RopeScaling]:
    """Base and scaling of rotary positions, which version 5 writes into `rope_parameters`."""
    scaling = RopeScaling("")
    for name in ("rope_parameters", "rope_scaling"):
        given = fields.values.get(name) or {}
        if not isinstance(given, dict):
            fields.refuse(name, "an object or null")
        rope = {key: x for key, x in given.items() if x is not None}
        for moved in ("rope_theta", "partial_rotary_factor"):
            if moved in rope:
                fields.values[moved] = rope.pop(moved)
        kinds = [str(rope.pop(key)) for key in ("rope_type", "type") if key in rope]
        kinds = [kind for kind in dict.fromkeys(kinds) if kind != "default"]
        if not rope and not kinds:
            continue
        if kinds and set(kinds) <= {"llama3", "yarn"}:
            length = fields.values.get("original_max_position_embeddings")
            rope.setdefault("original_max_position_embeddings", max_len)
            if length is not None:
                rope["original_max_position_embeddings"] = length
        text = ",".join(f"{key}={_plain(value)}" for key, value in rope.items())
        scaling = RopeScaling(f"{' '.join(kinds)}:{text}")
        try:
            scaling.parts()
        except ValueError as error:
            raise ValueError(
                f"{fields.path}: {name} is {fields.values[name]!r}, which {error}."
            ) from error
    fields.choice("partial_rotary_factor", (1,), 1)
    return fields.number("rope_theta", 10_000.0), scaling


def _plain(value: Any) -> str:
    """A number as short as it can be written."""
    value = int(value) if isinstance(value, bool) else value
    return repr(value).removesuffix(".0")
