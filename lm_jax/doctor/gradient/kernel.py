"""A kernel against a reference, over sizes around its blocks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Bound, Broken, Facts, Skip, call, function, whole
from lm_jax.doctor.findings import Measure, at_most, none

SIZES = (1, 7, 127, 128, 129, 200, 1025)
COARSE = 0.25  # of the largest entry; a comparison that allows more is not made
_LIST = Bound(
    "give a list of whole numbers of 1 or more",
    lambda x: isinstance(x, Sequence) and bool(x) and all(map(whole(1).holds, x)),
)
Function = Annotated[Callable[..., Any], function]
Arguments = dict[int, tuple[Any, ...]]  # by size
Quantity = Callable[[str, Callable[..., Any], tuple[Any, ...]], trees.Arrays]


@dataclasses.dataclass
class Subject(Facts):
    """Compare a kernel and its gradients with a plain reference over many sizes."""

    fn: Annotated[Function, "the kernel, arrays -> arrays, which JAX can differentiate."]
    reference: Annotated[Function, "the same in plain JAX; it gets float64 for any other float."]
    make: Annotated[Function, "(size that is cut into blocks, NumPy generator) -> arguments."]
    _: dataclasses.KW_ONLY
    sizes: Annotated[Sequence[int], "one, around the blocks, and beyond all.", _LIST] = SIZES
    seed: Annotated[int, "of the generator.", whole()] = 0


def _kinds(arguments: Any) -> list[Any]:
    """Types of the floating-point arrays."""
    kinds = [jnp.result_type(x) for x in jax.tree.leaves(arguments)]
    return [kind for kind in kinds if trees.is_floating(kind)]


@fixture
def arguments(subject: Subject) -> Arguments:
    """Arguments of every size."""
    made = {}
    for size in subject.sizes:
        found = call(f"make at size {size}", subject.make, size, subject.rng(size))
        made[size] = tuple(found) if isinstance(found, tuple | list) else (found,)
        if not call("the types of what make returned", _kinds, made[size]):
            raise Broken(f"make returned no floating-point argument at size {size}")
    return made


def _values(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> trees.Arrays:
    """Outputs by name."""
    outputs = jax.tree.leaves(call(name, jax.jit(function), *arguments))
    return {f"output {i}": trees.as_array(x).astype(np.float64) for i, x in enumerate(outputs)}


def _gradients(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> trees.Arrays:
    """Gradients of a random combination of the outputs, by argument."""

    def combined(*given: Any) -> jax.Array:
        rng, total = np.random.default_rng(0), jnp.zeros(())
        for out in jax.tree.leaves(function(*given)):
            total += (out.astype(total.dtype) * rng.choice([-1, 1], np.shape(out))).sum()
        return total

    gradient = jax.jit(jax.grad(combined, tuple(range(len(arguments))), allow_int=True))
    grads = jax.tree.leaves_with_path(call(f"the gradient of {name}", gradient, *arguments))
    floats = {trees.path_name(path): x for path, x in grads if trees.is_floating(x.dtype)}
    return {f"gradient of argument {n}": np.array(x).astype(float) for n, x in floats.items()}


def _error(given: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest finite entry; equal infinities agree."""
    if given.shape != expected.shape:
        return np.inf
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    with np.errstate(invalid="ignore"):
        off = np.where(given == expected, 0.0, np.abs(given - expected))
    return float(off.max(initial=0.0) / (size or 1.0))


def _compared(subject: Subject, arguments: Arguments, quantity: Quantity) -> list[Measure]:
    """Kernel and reference at every size; the reference gets float64."""
    shares: dict[str, float] = {}  # errors relative to what is allowed
    wrong, refused = [], {}
    for size, given in arguments.items():
        # Four roundings of the inputs' type, and 64 of the float32 that accumulates.
        eps = max(float(jnp.finfo(kind).eps) for kind in _kinds(given))
        if (allowed := 4 * eps + 64 * min(eps, numbers.FLOAT32_EPS)) > COARSE:
            raise Skip(f"Not judged: rounding of {eps:.2g} in the arguments hides any error.")
        try:
            found = quantity("fn", subject.fn, given)
        except Broken as error:
            refused[size] = error
            continue
        with jax.enable_x64(True):
            expected = quantity("reference", subject.reference, jax.tree.map(_wide, given))
        if list(found) != list(expected):
            found, expected = ({"number of outputs": np.ones(len(x))} for x in (found, expected))
        here = {n: _error(x, expected[n]) / allowed for n, x in found.items()}
        wrong += [] if all(share <= 1 for share in here.values()) else [size]
        shares |= {f"{name} at size {size}": share for name, share in here.items()}
    if not shares:
        raise next(iter(refused.values()), Broken("fn returns no array"))
    worst = max(shares, key=lambda name: np.nan_to_num(shares[name], nan=np.inf))
    why = next(map(str, refused.values()), "")
    return [
        none("wrong sizes", wrong, of=len(arguments) - len(refused), key="wrong_sizes"),
        at_most(f"error of what rounding allows, {worst}", shares[worst], 1, key="error"),
        none("refused sizes", refused, where=why, otherwise="warn", key="refused"),
    ]


def _wide(x: Any) -> Any:
    return jnp.asarray(x, jnp.float64) if trees.is_floating(jnp.result_type(x)) else x


@check("Loop over all blocks, and mask what lies beyond the end of the last one first.")
def kernel_value(subject: Subject, arguments: Arguments) -> list[Measure]:
    """Outputs equal those of the reference at every size."""
    return _compared(subject, arguments, _values)


@check("Mask the last block as in the forward pass, and write all of every gradient.")
def kernel_gradient(subject: Subject, arguments: Arguments) -> list[Measure]:
    """Gradients equal those of the reference at every size."""
    return _compared(subject, arguments, _gradients)
