"""Which architecture computes a model, and the config.json that says so."""

from typing import Any

from lm_jax.config import ConfigError, ModelConfig
from lm_jax.models.huggingface.names import ARCHITECTURES


def architecture(cfg: ModelConfig) -> str:
    """The architecture of transformers that computes a resolved model.

    Returns:
        "llama", "qwen3" (with norms of queries and keys), "gpt2" (with LayerNorm), "mistral" (a
        Llama with a window) or "qwen2" (a Llama with biases of queries, keys and values alone).

    Raises:
        ConfigError: if there is none, naming a field and what it must be.
    """
    if cfg.family != "dense":
        raise ConfigError(
            f"config.model.family: {cfg.family!r} is computed by no architecture of Hugging Face; "
            "train a model of family 'dense' to export it."
        )
    kind = _nearest(cfg)
    needed: dict[str, tuple] = {"logit_softcap": (0.0,)}
    for name in ("key_offset", "embedding_values", "embedding_skip", "head_gate"):
        needed[name] = (False,)
    if kind == "gpt2":
        needed |= {"positions": ("learned",), "mlp": ("gelu_tanh", "gelu"), "qk_norm": (False,)}
        needed |= {"bias": (True,), "bias_in": ("all",), "kv_heads": (cfg.heads,)}
        needed |= {"window": (0,), "head_dim": (cfg.d_model // cfg.heads,)}
    else:
        needed |= {"positions": ("rotary",), "mlp": ("swiglu",)}
    if kind == "llama":
        needed["window"] = (0,)
    if kind == "qwen3" and cfg.bias:
        needed["bias_in"] = ("attention",)
    if kind in ("gpt2", "llama"):
        needed["heads"] = (cfg.heads,) if cfg.d_model % cfg.heads == 0 else ()
    for name, allowed in needed.items():
        if getattr(cfg, name) not in allowed:
            wanted = " or ".join(map(repr, allowed)) or f"a divisor of d_model={cfg.d_model}"
            raise ConfigError(
                f"config.model.{name}: {getattr(cfg, name)!r} is computed by no architecture of "
                f"Hugging Face; the nearest, {kind}, has {wanted}: train with that to export it."
            )
    return kind


def _nearest(cfg: ModelConfig) -> str:
    if cfg.norm == "layernorm":
        return "gpt2"
    if cfg.qk_norm:
        return "qwen3"
    if cfg.bias and cfg.bias_in == "qkv":
        return "qwen2"
    return "mistral" if cfg.window and not cfg.bias else "llama"


def written_fields(cfg: ModelConfig, vocab_size: int, max_len: int) -> dict[str, Any]:
    """The config.json of a resolved model, which versions 4 and 5 of transformers read alike.

    Raises:
        ConfigError: as `architecture`.
    """
    kind = architecture(cfg)
    own = ARCHITECTURES[kind]
    fields: dict[str, Any] = {
        "architectures": [own.model],
        "model_type": kind,
        "vocab_size": vocab_size,
        **{name: getattr(cfg, field) for name, field in own.counts.items()},
        own.max_len: max_len,
        own.norm_eps: cfg.norm_eps,
        own.activation: next(name for name, mlp in own.mlps.items() if mlp == cfg.mlp),
        "tie_word_embeddings": cfg.tied,
        "initializer_range": cfg.init_std,
        "torch_dtype": "float32",
        "bos_token_id": None,  # else those of the first models of the kind
        "eos_token_id": None,
    }
    if kind == "gpt2":
        return fields | {
            "n_ctx": max_len,  # as in the first GPT-2; llama.cpp reads it
            "resid_pdrop": cfg.dropout,
            "attn_pdrop": cfg.attention_dropout,
            "embd_pdrop": cfg.embedding_dropout,
        }
    fields |= {"attention_dropout": cfg.attention_dropout, "rope_theta": cfg.rope_theta}
    fields["rope_scaling"] = _rope_scaling(cfg)
    if kind == "mistral":
        fields["sliding_window"] = cfg.window
    elif kind == "llama":
        fields |= {"attention_bias": cfg.bias, "mlp_bias": cfg.bias and cfg.bias_in == "all"}
    else:
        fields |= {"sliding_window": cfg.window or None, "use_sliding_window": cfg.window > 0}
        fields |= {"max_window_layers": 0, "attention_bias": cfg.bias}
    if fields["rope_scaling"] and fields["rope_scaling"]["rope_type"] == "yarn":
        # Version 4 takes the factor to be this by the length that was learned.
        yarn = fields["rope_scaling"]
        fields[own.max_len] = round(yarn["factor"] * yarn["original_max_position_embeddings"])
    return fields


def _rope_scaling(cfg: ModelConfig) -> dict[str, Any] | None:
    kind, numbers = cfg.rope_scaling.parts()
    kinds = {"original_max_position_embeddings": int, "truncate": bool}
    typed = {name: kinds.get(name, float)(value) for name, value in numbers.items()}
    return {"rope_type": kind, **typed} if kind else None
