"""Names on both sides: fields of config.json and of the model, tensors and parameters."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from flax import traverse_util

from lm_jax import config
from lm_jax.config import Config, ModelConfig
from lm_jax.models.families import create_model

WEIGHTS = "model.safetensors"


class Architecture(NamedTuple):
    """What a checkpoint calls the parts of a model."""

    model: str  # class in transformers
    counts: Mapping[str, str]  # whole numbers in config.json, and the fields of the model
    max_len: str
    norm_eps: str
    activation: str
    mlps: Mapping[str, str]  # values of `activation`; of two names for one the first is written
    prefix: str  # of the names of all tensors but the head
    modules: Mapping[str, tuple[str, ...]]  # `{}` stands for the layer
    transposed: bool  # whether matrices are stored as [out, in]


_LLAMA = Architecture(
    model="LlamaForCausalLM",
    counts={
        "num_hidden_layers": "layers",
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_dim",
        "intermediate_size": "d_ff",
    },
    max_len="max_position_embeddings",
    norm_eps="rms_norm_eps",
    activation="hidden_act",
    mlps={"silu": "swiglu", "swish": "swiglu"},
    prefix="model.",
    modules={
        "embedding": ("embed_tokens",),
        "blocks.attention_norm": ("layers.{}.input_layernorm",),
        "blocks.attention.qkv": tuple(f"layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
        "blocks.attention.q_norm": ("layers.{}.self_attn.q_norm",),
        "blocks.attention.k_norm": ("layers.{}.self_attn.k_norm",),
        "blocks.attention.out": ("layers.{}.self_attn.o_proj",),
        "blocks.mlp_norm": ("layers.{}.post_attention_layernorm",),
        "blocks.mlp.up": ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
        "blocks.mlp.down": ("layers.{}.mlp.down_proj",),
        "final_norm": ("norm",),
        "head": ("lm_head",),
    },
    transposed=True,
)
_GPT2 = Architecture(
    model="GPT2LMHeadModel",
    counts={"n_layer": "layers", "n_embd": "d_model", "n_head": "heads", "n_inner": "d_ff"},
    max_len="n_positions",
    norm_eps="layer_norm_epsilon",
    activation="activation_function",
    mlps={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
    prefix="transformer.",
    modules={
        "embedding": ("wte",),
        "position_embedding": ("wpe",),
        "blocks.attention_norm": ("h.{}.ln_1",),
        "blocks.attention.qkv": ("h.{}.attn.c_attn",),
        "blocks.attention.out": ("h.{}.attn.c_proj",),
        "blocks.mlp_norm": ("h.{}.ln_2",),
        "blocks.mlp.up": ("h.{}.mlp.c_fc",),
        "blocks.mlp.down": ("h.{}.mlp.c_proj",),
        "final_norm": ("ln_f",),
        "head": ("lm_head",),
    },
    transposed=False,
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA._replace(model="MistralForCausalLM"),
    "qwen2": _LLAMA._replace(model="Qwen2ForCausalLM"),
    "qwen3": _LLAMA._replace(model="Qwen3ForCausalLM"),
    "gpt2": _GPT2,
}


class Parameter(NamedTuple):
    """A parameter of the model, and the tensors that stand side by side on its last axis."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # without the axis of layers
    layers: int | None  # length of that axis, the first; None: there is none
    names: tuple[str, ...]  # `{}` stands for the layer
    widths: tuple[int, ...]  # of each tensor on the last axis
    transposed: bool


def parameters(kind: str, cfg: ModelConfig, vocab_size: int, max_len: int) -> Iterator[Parameter]:
    """The parameters of a model, with the tensors of an architecture without its prefix.

    Args:
        kind: key of `ARCHITECTURES`.
        cfg: a resolved model config.
        vocab_size: V.
        max_len: rows of the position table, if there is one.
    """
    own = ARCHITECTURES[kind]
    run = config.replace(Config(model=cfg), data__seq_len=max_len)
    _, init = create_model(run, vocab_size, "reference")
    C, kv = cfg.head_dim, cfg.kv_heads * cfg.head_dim
    side_by_side = {"qkv": (cfg.heads * C, kv, kv), "up": (cfg.d_ff, cfg.d_ff)}
    tree = jax.eval_shape(init, jax.random.key(0))
    for path, leaf in traverse_util.flatten_dict(tree).items():
        module, part = (path[:-1], path[-1]) if path[1:] else (path, "table")
        names = own.modules[".".join(module)]
        shape, layers = leaf.shape, None
        if path[0] == "blocks":
            layers, *shape = leaf.shape
        end = "bias" if part == "bias" else "weight"
        yield Parameter(
            path,
            tuple(shape),
            layers,
            tuple(f"{name}.{end}" for name in names),
            side_by_side[module[-1]] if names[1:] else (shape[-1],),
            part == "kernel" and (own.transposed or module == ("head",)),
        )
