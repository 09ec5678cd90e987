"""Rotary positions (Su et al. 2021), and their wavelengths for texts longer than those learned."""

import math

import jax
import jax.numpy as jnp

from lm_jax.config import RopeScaling
from lm_jax.kernels.rowwise import along_last

NONE = RopeScaling("")


def rotary(
    x_BTHC: jax.Array, positions_BT: jax.Array, theta: float, scaling: RopeScaling = NONE
) -> jax.Array:
    """Rotate pairs (i, i + C/2) by position * frequency_i; half-split, section 3.4.2."""
    half = x_BTHC.shape[-1] // 2
    wide = jnp.promote_types(x_BTHC.dtype, jnp.float32)
    per_position, factor = frequencies(2 * half, theta, scaling, wide)
    angles_BT1C = positions_BT[:, :, None, None].astype(wide) * along_last(per_position, x_BTHC)
    waves = (f(angles_BT1C) for f in (jnp.cos, jnp.sin))
    cos, sin = (x if factor is None else factor * x for x in waves)
    return _turned(x_BTHC, *jax.lax.optimization_barrier((cos, sin)))


@jax.custom_vjp
def _turned(x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Each pair turned by an angle, in float32 or wider inside.

    With a gradient of its own, the turn back: autodiff's would pad both halves and add them up.
    """
    a, b = jnp.split(x_BTHC.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHC.dtype)


def _turned_forward(x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array):
    return _turned(x_BTHC, cos, sin), (cos, sin)


def _turned_backward(residuals: tuple[jax.Array, jax.Array], g_BTHC: jax.Array):
    cos, sin = residuals
    return _turned(g_BTHC, cos, -sin), None, None


_turned.defvjp(_turned_forward, _turned_backward)


def frequencies(
    width: int,
    theta: float,
    scaling: RopeScaling = NONE,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, float | None]:
    """Angles per position [C/2] in radians, and the factor on cosine and sine, if there is one.

    Without scaling the angles are theta^(-2i/C). `linear` divides them by its factor (Chen et al.
    2023, Position Interpolation, section 3.2). `llama3` divides those alone whose wavelength is
    long beside the text learned from, with a ramp in between (Grattafiori et al. 2024, Llama 3,
    section 3.4.1 and the code of Llama 3.1). `yarn` has that ramp over the coordinates, and the
    factor (Peng et al. 2023, YaRN, sections 3.2 to 3.4).

    Args:
        width: C, of a head.
        theta: base of the wavelengths.
        scaling: as in `config.model.rope_scaling`.
        dtype: of the angles.
    """
    half = width // 2
    plain = theta ** (-jnp.arange(half, dtype=dtype) / half)
    kind, numbers = scaling.parts()
    if not kind:
        return plain, None
    divided = plain / numbers["factor"]
    if kind == "linear":
        return divided, None
    learned = numbers["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        turns = learned * plain / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return kept * plain + (1 - kept) * divided, None
    fast, slow = (
        width * math.log(learned / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (numbers.get("beta_fast", 32), numbers.get("beta_slow", 1))
    )
    if numbers.get("truncate", 1):
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, width - 1)
    ramp = (jnp.arange(half, dtype=dtype) - fast) / (slow - fast or 0.001)
    kept = 1 - jnp.clip(ramp, 0, 1)
    return kept * plain + (1 - kept) * divided, _yarn_factor(numbers)


def _yarn_factor(numbers: dict[str, float]) -> float:
    """The factor on cosine and sine, whose square sharpens the scores: section 3.4."""

    def sharpened(scale: float) -> float:
        return max(0.0, 0.1 * scale * math.log(numbers["factor"])) + 1

    if "attention_factor" in numbers:
        return numbers["attention_factor"]
    if "mscale" in numbers and "mscale_all_dim" in numbers:
        return sharpened(numbers["mscale"]) / sharpened(numbers["mscale_all_dim"])
    return sharpened(1)
