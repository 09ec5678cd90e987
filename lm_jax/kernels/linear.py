"""The product of activations and a weight matrix, with the backward pass laid out for speed."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from lm_jax.kernels import device


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w_IO: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x w for x [..., I] and w [I, O]: multiplied in the dtype of x, accumulated into `dtype`.

    The gradient of x has the dtype of x, that of w the dtype of w.

    Differentiating `x @ w` is the same product, but XLA on CPUs then fuses the element-wise work
    before it into a transposing loop and takes up to twice the time; and the gradient of a float32
    weight under 16-bit activations would be rounded to 16 bits. Here all leading axes are one, and
    the narrower operand of the weight gradient is the one that gets transposed.
    """
    return jnp.matmul(x, w_IO.astype(x.dtype), preferred_element_type=dtype)


def _forward(x: jax.Array, w_IO: jax.Array, dtype: jnp.dtype):
    return linear(x, w_IO, dtype), (x, w_IO)


def _backward(dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], g: jax.Array):
    x, w_IO = residuals
    x_NI = x.reshape(-1, x.shape[-1])
    g_NO = g.reshape(-1, g.shape[-1]).astype(x.dtype)
    w_OI = w_IO.astype(x.dtype).T
    dx_NI = product(g_NO, w_OI, 1, 0, x.dtype)
    if x_NI.shape[1] <= g_NO.shape[1]:
        dw_IO = product(x_NI, g_NO, 0, 0, w_IO.dtype)
    else:
        dw_IO = product(g_NO, x_NI, 0, 0, w_IO.dtype).T
    return dx_NI.reshape(x.shape), dw_IO


linear.defvjp(_forward, _backward)


def product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, dtype) -> jax.Array:
    """Matrix product over one axis of each, accumulated into `dtype`."""
    contract = (((axis_a,), (axis_b,)), ((), ()))
    if slow_by_columns(a.dtype):
        if axis_a == 0:
            a, contract = by_rows(a.T), (((1,), (axis_b,)), ((), ()))
        return by_rows(jax.lax.dot_general(a, by_rows(b), contract, preferred_element_type=dtype))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=dtype)


def slow_by_columns(dtype: jnp.dtype) -> bool:
    """Whether products want operands and result `by_rows`: XLA's of 16 bits on CPUs do."""
    return dtype.itemsize == 2 and device.target().platform == "cpu"


def by_rows(x: jax.Array) -> jax.Array:
    """The same array, laid out in memory row by row, whatever comes before and after it."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
