"""Where a number that is not finite came from: a computation replayed one operation at a time."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from lm_jax.doctor.trees import is_floating, path_name

_LIBRARIES = ("jax", "jaxlib", "flax", "optax")
_VIEWS = ("split", "squeeze", "reshape")  # a part of a leaf is as good as the leaf


class Origin(NamedTuple):
    """The operation that made the first NaN or infinity of those that reach the result."""

    operation: str  # primitive, as in a jaxpr
    where: str  # file:line of the code that called it, and the function
    made: str  # nan or inf
    inputs: str  # ranges of its inputs
    parameter: str  # the argument leaf that entered the computation last on the way there
    infinity: "Origin | None"  # for a NaN made of infinities, where those came from


class _Value(NamedTuple):
    """A value on its way through the replay."""

    array: Any
    nan: Origin | None = None
    inf: Origin | None = None
    leaf: str = ""  # name, if it is a leaf of the arguments
    entered: tuple[int, str] = (-1, "none")  # when the last such leaf came in, and its name


def trace(function: Callable[..., Any], **arguments: Any) -> Origin | None:
    """Find the operation that made the first NaN or infinity that reaches the outputs.

    None if all outputs of the pure JAX `function`, called with the pytrees by name, are finite.
    Infinities that it makes on purpose and removes again (masks) are passed over. A leaf that is
    not finite itself, named `argument/key/...`, is reported as operation "input".
    """
    closed = jax.make_jaxpr(lambda arguments: function(**arguments))(arguments)
    inputs = []
    for path, leaf in jax.tree.leaves_with_path(arguments):
        (nan, inf), name = _state(leaf), path_name(path)
        origin = Origin("input", name, "nan" if nan else "inf", _range(leaf), name, None)
        inputs.append(_Value(leaf, origin if nan else None, origin if inf else None, name))
    outputs = _Replay().run(closed, inputs)
    return next((found for v in outputs if (found := v.nan or v.inf)), None)


def describe(origin: Origin | None) -> str:
    """One line about the outcome of a replay."""
    if origin is None:
        return "replayed with the present parameters, everything is finite"
    text = f"first {origin.made} in `{origin.operation}` at {origin.where}, "
    text += f"inputs {origin.inputs}, last parameter before it {origin.parameter}"
    return text + (f"; made of infinity: {describe(origin.infinity)}" if origin.infinity else "")


class _Replay:
    """Runs a jaxpr equation by equation; enters calls and loops only if their result is bad."""

    def __init__(self) -> None:
        self.now = 0  # equations begun
        self.where = "unknown"  # line of the innermost call that was entered

    def run(self, body: core.Jaxpr | core.ClosedJaxpr, args: Sequence[_Value]) -> list[_Value]:
        closed = isinstance(body, core.ClosedJaxpr)
        jaxpr, consts = (body.jaxpr, body.consts) if closed else (body, [])
        names = [*jaxpr.constvars, *jaxpr.invars]
        env: dict[Any, _Value] = dict(zip(names, [*map(_Value, consts), *args], strict=True))

        def read(atom: Any) -> _Value:
            return _Value(atom.val) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            self.now += 1
            outputs = self.apply(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, eqn: core.JaxprEqn, inputs: list[_Value]) -> list[_Value]:
        params = eqn.primitive.get_bind_params(eqn.params)
        arrays = eqn.primitive.bind(*[v.array for v in inputs], **params)
        arrays = arrays if eqn.primitive.multiple_results else [arrays]
        states = [_state(array) for array in arrays]
        came = ((self.now, v.leaf) if v.leaf else v.entered for v in inputs)
        entered = max(came, default=(-1, "none"))
        if not any(nan or inf for nan, inf in states):
            if eqn.primitive.name in _VIEWS and inputs[0].leaf:  # not in use yet
                leaf = inputs[0].leaf
                layers = len(arrays) == len(inputs[0].array) > 1 and params.get("axis") == 0
                names = [f"{leaf}[{i}]" if layers else leaf for i in range(len(arrays))]
                return [_Value(a, leaf=name) for a, name in zip(arrays, names, strict=True)]
            return [_Value(array, entered=entered) for array in arrays]
        outside = self.where
        where = self.where = _where(eqn) or outside
        inside = self.enter(eqn, inputs)
        self.where = outside
        if inside is not None:
            return inside
        old_nan, old_inf = _first("nan", inputs), _first("inf", inputs)
        ranges = ", ".join(_range(v.array) for v in inputs)
        new = Origin(eqn.primitive.name, where, "inf", ranges, entered[1], None)
        of_nan, of_inf = old_nan or new._replace(made="nan", infinity=old_inf), old_inf or new
        return [
            _Value(array, of_nan if nan else None, of_inf if inf else None, entered=entered)
            for array, (nan, inf) in zip(arrays, states, strict=True)
        ]

    def enter(self, eqn: core.JaxprEqn, inputs: list[_Value]) -> list[_Value] | None:
        """The same equation, run from the inside; None if it has no inside."""
        name, params = eqn.primitive.name, eqn.params
        if name in ("scan", "while"):
            return (self.scan if name == "scan" else self.loop)(params, inputs)
        if name == "cond":
            return self.run(params["branches"][int(inputs[0].array)], inputs[1:])
        bodies = (params.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
        return next((self.run(body, inputs) for body in bodies if body is not None), None)

    def scan(self, params: dict[str, Any], inputs: list[_Value]) -> list[_Value]:
        body = params["jaxpr"]
        if "ft_in" in params:  # jax >= 0.11
            parts = params["ft_in"].update(range(len(inputs))).unpack()
            fixed, carry, stacked = ([inputs[i] for i in part] for part in parts)
        else:
            consts, begin = params["num_consts"], params["num_consts"] + params["num_carry"]
            fixed, carry, stacked = inputs[:consts], inputs[consts:begin], inputs[begin:]
        order = range(params["length"])
        rows: list[list[_Value]] = [[] for _ in order]
        for i in reversed(order) if params["reverse"] else order:
            step = [v._replace(array=v.array[i]) for v in stacked]
            outputs = self.run(body, [*fixed, *carry, *step])
            carry, rows[i] = outputs[: len(carry)], outputs[len(carry) :]
        return [*carry, *(_stack(column) for column in zip(*rows, strict=True))]

    def loop(self, params: dict[str, Any], inputs: list[_Value]) -> list[_Value]:
        first, begin = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        for_test, for_body, carry = inputs[:first], inputs[first:begin], inputs[begin:]
        while bool(self.run(params["cond_jaxpr"], [*for_test, *carry])[0].array):
            carry = self.run(params["body_jaxpr"], [*for_body, *carry])
        return carry


def _first(kind: str, values: Sequence[_Value]) -> Origin | None:
    return next((found for v in values if (found := getattr(v, kind))), None)


def _stack(values: tuple[_Value, ...]) -> _Value:
    arrays, entered = [v.array for v in values], max(v.entered for v in values)
    nan, inf = _first("nan", values), _first("inf", values)
    return _Value(jax.numpy.stack(arrays), nan, inf, entered=entered)


def _state(array: Any) -> tuple[bool, bool]:
    """Whether there is a NaN and whether there is an infinity."""
    if not is_floating(getattr(array, "dtype", type(array))):
        return False, False
    wide = np.asarray(array).astype(np.float64)
    return bool(np.isnan(wide).any()), bool(np.isinf(wide).any())


def _range(array: Any) -> str:
    wide = np.asarray(array)
    if not wide.size or not jax.numpy.issubdtype(wide.dtype, jax.numpy.number):
        return f"{wide.dtype}{list(wide.shape)}"
    wide, kind = wide.astype(np.float64), getattr(array, "dtype", "")
    return f"{kind}{list(wide.shape)} in [{wide.min():.3g}, {wide.max():.3g}]"


def _where(eqn: core.JaxprEqn) -> str | None:
    """The innermost line outside the libraries that led to an equation, if it is known."""
    traceback: Any = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        parts = pathlib.Path(frame.file_name).parts
        if "site-packages" not in parts or not any(name in parts for name in _LIBRARIES):
            return f"{pathlib.Path(*parts[-2:])}:{frame.line_num} ({frame.function_name})"
    return None
