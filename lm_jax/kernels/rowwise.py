"""Norms, gates and sums along rows, with backward passes laid out for speed."""

import functools

import jax
import jax.numpy as jnp


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """The vector with leading axes of size 1, to be broadcast against `x`."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, centred: bool, eps: float
) -> jax.Array:
    """The scaled and shifted norm of the last axis, in float32 or wider inside.

    x less its mean, if `centred`. With a gradient of its own (reverse mode only), which keeps x and
    one or two numbers a row.
    """
    return _normalise_forward(x, scale, bias, centred, eps)[0]


def _normalise_forward(x, scale, bias, centred: bool, eps: float):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(-1) if centred else None
    wide = wide if mean is None else wide - mean[..., None]
    # The axis comes back only here: XLA then makes sum and root in one kernel.
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1) + eps)
    y = wide * inverse[..., None] * along_last(scale, wide)
    y = y if bias is None else y + along_last(bias, y)
    # Kept as they are: XLA would sum x again in the backward pass, and write what it makes of it.
    mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _normalise_backward(centred: bool, eps: float, residuals, g: jax.Array):
    x, scale, bias, mean, inverse = residuals
    wide, g = x.astype(inverse.dtype), g.astype(inverse.dtype)
    unit = (wide if mean is None else wide - mean[..., None]) * inverse[..., None]
    dunit = g * along_last(scale, g)
    # The part of the gradient along `unit`, which no scaling of x can change, is taken out.
    dx = dunit - unit * (dunit * unit).mean(-1)[..., None]
    dx = dx - dunit.mean(-1)[..., None] if centred else dx
    rows = tuple(range(x.ndim - 1))
    dscale = (g * unit).sum(rows).astype(scale.dtype)
    dbias = None if bias is None else g.sum(rows).astype(bias.dtype)
    return (dx * inverse[..., None]).astype(x.dtype), dscale, dbias


normalise.defvjp(_normalise_forward, _normalise_backward)


@jax.custom_vjp
def swiglu(y: jax.Array) -> jax.Array:
    """silu(gate) value for y = [gate, value] along the last axis (Shazeer 2020).

    With a gradient of its own (reverse mode only): one pass over y where autodiff takes three.
    """
    gate, value = jnp.split(y, 2, axis=-1)
    return jax.nn.silu(gate) * value


def _swiglu_forward(y: jax.Array):
    return swiglu(y), y


def _swiglu_backward(y: jax.Array, g: jax.Array):
    # Both halves in one expression: XLA would write two arrays and then join them.
    y_2F = y.reshape(*y.shape[:-1], 2, -1)
    other_2F = jnp.flip(y_2F, -2)
    first_21 = jnp.arange(2)[:, None] == 0
    gate_2F = jnp.where(first_21, y_2F, other_2F)
    sigmoid_2F = jax.nn.sigmoid(gate_2F)
    silu_2F = gate_2F * sigmoid_2F
    by_gate_2F = other_2F * (sigmoid_2F + silu_2F * (1 - sigmoid_2F))
    slope_2F = jnp.where(first_21, by_gate_2F, silu_2F)
    return ((g[..., None, :] * slope_2F).reshape(y.shape),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
