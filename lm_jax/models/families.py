"""The families of models, and what the rest of the trainer asks of each.

A new family is one file with a subclass of `Decoder`, an entry here, and its name and fields
beside `config.model.family`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from lm_jax.config import Config, ConfigError, ModelConfig
from lm_jax.kernels import attention
from lm_jax.models import musota
from lm_jax.models.layers import Decoder
from lm_jax.models.musota import MuSota, musota_size
from lm_jax.models.size import Size
from lm_jax.models.transformer import Transformer, dense_size


class Observed(NamedTuple):
    """Means over the scored tokens that evaluation logs beside the loss."""

    name: str
    columns: Sequence[str]  # of the values of a layer
    # of model, (tokens, segment ids, positions), weights and dtype: states and sums [L, columns]
    sums: Callable[[Any, Sequence[jax.Array], jax.Array, Any], tuple[jax.Array, jax.Array]]


class Family(NamedTuple):
    """One kind of model."""

    model: Callable[..., Decoder]  # arguments as for `Transformer`
    size: Callable[[ModelConfig, int, int], Size]
    # of the attention that `config.attention.impl` names: query heads, key/value heads, head width
    heads: Callable[[ModelConfig], tuple[int, int, int]]
    attention_note: str = ""  # said with the reason for its implementation
    tied: Callable[[ModelConfig], bool] = lambda cfg: cfg.tied  # whether the head is the table
    unused: tuple[str, ...] = ()  # ends of the names of parameters that nothing reads
    observed: Observed | None = None


FAMILIES = {
    "dense": Family(
        Transformer,
        dense_size,
        heads=lambda cfg: (cfg.heads, cfg.kv_heads, cfg.head_dim),
    ),
    "musota": Family(
        MuSota,
        musota_size,
        heads=lambda cfg: (musota.HEADS, musota.HEADS, musota.D // musota.HEADS),
        attention_note="; inside blocks alone, across blocks all scores are kept for their entropy",
        tied=lambda cfg: False,
        unused=(musota.UNUSED,),
        observed=Observed("sensitivity", musota.BLOCKS, MuSota.sensitivities),
    ),
}


def family(cfg: ModelConfig) -> Family:
    """The family of a model config."""
    return FAMILIES[cfg.family]


def size(cfg: ModelConfig, vocab_size: int, seq_len: int) -> Size:
    """The size of a model.

    Args:
        cfg: a resolved model config.
        vocab_size: V.
        seq_len: T, also the rows of a position table.
    """
    return family(cfg).size(cfg, vocab_size, seq_len)


def choose_attention(cfg: Config) -> tuple[str, str]:
    """The attention that a resolved config gets on this device, and the reason."""
    own = family(cfg.model)
    _, _, head_dim = own.heads(cfg.model)
    impl, reason = attention.choose(
        cfg.attention.impl,
        seq_len=cfg.data.seq_len,
        head_dim=head_dim,
        dtype=cfg.train.compute_dtype,
        segments=cfg.data.document_mask or cfg.data.window_offset,
        attention_dropout=cfg.model.attention_dropout,
    )
    return impl, reason + own.attention_note


def require_attention(cfg: Config, dtype: str) -> None:
    """Raise ConfigError if the attention that a config names cannot compute in `dtype` here."""
    if cfg.attention.impl == "auto":
        return
    model, head_dim = cfg.model, family(cfg.model).heads(cfg.model)[2]
    sizes = cfg.data.seq_len, head_dim, dtype, model.attention_dropout
    reason = attention.refusal(cfg.attention.impl, *sizes)
    if reason:
        raise ConfigError(f"config.attention.impl: {cfg.attention.impl} {reason}.")


def create_model(cfg: Config, vocab_size: int, impl: str) -> tuple[nnx.GraphDef, Callable]:
    """The structure of the model, and a function from a random key to its parameters."""

    def build(key: jax.Array) -> Decoder:
        return family(cfg.model).model(
            cfg.model,
            vocab_size,
            cfg.data.seq_len,
            impl,
            nnx.Rngs(params=key),
            segmented=cfg.data.document_mask or cfg.data.window_offset,
        )

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0))))
    return graphdef, init
