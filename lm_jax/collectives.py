"""What a device computes together with others inside `jax.shard_map`; nothing where it is alone.

The mesh has three axes. The rows of a batch are split over `data` and `fsdp`. Parameters are split
over `tensor` and `fsdp`, and gathered where they are used (ZeRO stage 3, Rajbhandari et al. 2020).
The devices of `tensor` read the same rows: each computes some of the heads and of the MLP's hidden
numbers (Megatron, Shoeybi et al. 2019, section 3) and takes some positions of the loss. Between
these places they hold the same activations and the same gradients of them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
Move = Callable[[jax.Array], jax.Array]
ROWS = (DATA, FSDP)  # share the rows of a batch
PARTS = (TENSOR, FSDP)  # share the parameters
# What `_sent` is made of.
_SENT = set("all_gather all_to_all convert_element_type reshape split concatenate".split())


def axis_size(*axes: str) -> int:
    """The number of devices along these axes; 1 outside of shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.manual_axes)


def axis_index(*axes: str) -> Any:
    """The number of this device along these axes, from 0."""
    return jax.lax.axis_index(axes) if axis_size(*axes) > 1 else 0


def total(tree: Any, axes: Sequence[str] = ROWS) -> Any:
    """Sums over devices; their gradient is the sum of what the devices make of them."""
    return jax.lax.psum(tree, tuple(axes)) if axis_size(*axes) > 1 else tree


def all_rows(x: jax.Array) -> jax.Array:
    """What the rows of all devices have, [B, ...] of the whole micro-batch."""
    return jax.lax.all_gather(x, ROWS, axis=0, tiled=True) if axis_size(*ROWS) > 1 else x


def enter_parts(x: jax.Array) -> jax.Array:
    """What the devices of `tensor` go apart from; its gradient is the sum of theirs."""
    return _enter(x) if axis_size(TENSOR) > 1 else x


def leave_parts(tree: Any) -> Any:
    """The sum of what the devices of `tensor` have apart; each gets the gradient of the sum."""
    return jax.tree.map(_leave, tree) if axis_size(TENSOR) > 1 else tree


@jax.custom_vjp
def _enter(x: jax.Array) -> jax.Array:
    return x


@jax.custom_vjp
def _leave(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, TENSOR)


_enter.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, TENSOR),))
_leave.defvjp(lambda x: (_leave(x), None), lambda _, g: (g,))


def own(x: jax.Array, axis: int) -> jax.Array:
    """This device's part of an axis of what all devices of `tensor` hold."""
    parts = axis_size(TENSOR)
    if parts == 1:
        return x
    length = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(x, axis_index(TENSOR) * length, length, axis)


def own_of_each(x: jax.Array, lengths: Sequence[int]) -> jax.Array:
    """As `own`, of each of the arrays that lie side by side along the last axis."""
    if axis_size(TENSOR) == 1:
        return x
    return jnp.concatenate([own(part, -1) for part in _cut(x, lengths)], axis=-1)


def gathered(x: jax.Array, axis: int, length: int, dtype: Any) -> jax.Array:
    """A parameter of which this device holds a part along one axis, or all.

    It is sent in the dtype in which it is used; its gradient is summed in its own.

    Args:
        x: the part.
        axis: that is split.
        length: of the whole along it.
        dtype: of the activations.
    """
    if x.shape[axis] == length:
        return x

    def back(g: jax.Array) -> jax.Array:
        return _scatter(own(g, axis), axis)  # the same on all devices of `tensor`

    return _sent(functools.partial(_gather, axis=axis, axes=PARTS), back, dtype, x)


def rows(w_IO: jax.Array, inputs: int, dtype: Any) -> jax.Array:
    """The rows of a matrix that this device computes with, [I / tensor, O]; see `gathered`."""
    if w_IO.shape[0] == inputs:
        return own(enter_parts(w_IO), 0)
    return _sent(_gather, _scatter, dtype, w_IO)


def columns(w_IO: jax.Array, inputs: int, lengths: Sequence[int], dtype: Any) -> jax.Array:
    """The columns of a matrix that this device computes with, [I, O / tensor]; see `gathered`.

    Args:
        w_IO: the rows that it holds.
        inputs: I, rows of the whole.
        lengths: columns of the matrices that lie side by side; it gets a part of each.
        dtype: of the activations.
    """
    parts = axis_size(TENSOR)
    if w_IO.shape[0] == inputs:
        return own_of_each(enter_parts(w_IO), lengths)
    if parts == 1:
        return rows(w_IO, inputs, dtype)

    def there(w_IO: jax.Array) -> jax.Array:
        w_IO = _gather(w_IO)
        dealt = [x.reshape(len(x), parts, -1) for x in _cut(w_IO, lengths)]
        w_IO = jnp.concatenate(dealt, axis=2).reshape(w_IO.shape)
        return jax.lax.all_to_all(w_IO, TENSOR, 1, 0, tiled=True)

    def back(g_IO: jax.Array) -> jax.Array:
        g_IO = jax.lax.all_to_all(g_IO, TENSOR, 0, 1, tiled=True)
        dealt = _cut(g_IO.reshape(len(g_IO), parts, -1), [n // parts for n in lengths])
        g_IO = jnp.concatenate([x.reshape(len(x), -1) for x in dealt], axis=1)
        return _scatter(g_IO)

    return _sent(there, back, dtype, w_IO)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sent(there: Move, back: Move, dtype: Any, x: jax.Array) -> jax.Array:
    return there(x.astype(dtype)).astype(x.dtype)


def _sent_forward(there: Move, back: Move, dtype: Any, x: jax.Array) -> tuple[jax.Array, None]:
    return _sent(there, back, dtype, x), None


def _sent_backward(there: Move, back: Move, dtype: Any, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (back(g),)


_sent.defvjp(_sent_forward, _sent_backward)


def _gather(x: jax.Array, axis: int = 0, axes: Sequence[str] = (FSDP,)) -> jax.Array:
    return jax.lax.all_gather(x, tuple(axes), axis=axis, tiled=True)


def _scatter(g: jax.Array, axis: int = 0) -> jax.Array:
    return jax.lax.psum_scatter(g, FSDP, scatter_dimension=axis, tiled=True)


def _cut(x: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
    return jnp.split(x, [sum(lengths[:i]) for i in range(1, len(lengths))], axis=-1)


def kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a layer without remat keeps what a primitive makes, for its backward pass.

    What is sent is not: the weights of all layers would be there at once.
    """
    return primitive.name not in _SENT
