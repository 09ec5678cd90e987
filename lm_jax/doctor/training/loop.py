"""What every examined loop has: a state that a step takes and returns, and leaves that move."""

import numbers
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.facts import Broken


def kind(state: Any) -> Any:
    """What a step leaves as it is: the structure of the state, and the types of its objects."""
    leaves, structure = jax.tree.flatten(state, is_leaf=lambda x: x is None)
    plain = (numbers.Number, type(None))
    objects = [not (isinstance(x, plain) or hasattr(x, "dtype")) and type(x) for x in leaves]
    return structure, objects


def stepped(before: Any, out: Any) -> tuple[Any, Any]:
    """State and metrics, or None, from what `step_fn` returned.

    `before` is the `kind` of the state that it was given.
    """
    if kind(out) == before:
        return out, None
    if isinstance(out, tuple) and len(out) == 2 and kind(out[0]) == before:
        return out
    raise Broken(
        "step_fn returned neither a state like the one it got nor (state, metrics); let it return "
        "the state even if it changes in place"
    )


def opened(tree: Any) -> Any:
    """PyTorch's modules and optimisers, and generators, replaced by the arrays in them."""

    def arrays(leaf: Any) -> Any:
        if hasattr(leaf, "named_parameters"):
            return dict(leaf.named_parameters())
        if hasattr(leaf, "param_groups"):
            return {str(name): x for name, x in leaf.state_dict()["state"].items()}
        return leaf

    return jax.tree.map(arrays, list(tree) if isinstance(tree, Iterator) else tree)


def unmoved(before: trees.Arrays, after: trees.Arrays) -> list[str]:
    """Names of the leaves whose values are exactly the same."""
    return [n for n, x in before.items() if np.array_equal(x, after.get(n), equal_nan=True)]
