"""The arms of an experiment, and what tells them apart."""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from lm_jax.doctor import facts, trees
from lm_jax.doctor.facts import Bound, Broken, Facts, Skip, call, function, require, whole

NAMES = Bound("give a list of names", lambda x: not isinstance(x, str) and list(x) is not None)
ANY, COUNT = Bound("", lambda x: True), facts.above(0)
KEYS = {
    **dict.fromkeys(("config", "resolved", "tree"), ANY),
    "tables": NAMES,
    **dict.fromkeys(("parameters", "table_parameters", "claimed_parameters"), COUNT),
    "tied": facts.truth,
    "losses": Bound(
        "give a list of finite numbers",
        lambda x: np.ndim(x) == 1 and len(x) > 0 and all(map(facts.real, x)),
    ),
    "run_dir": facts.instance((str, os.PathLike), "give a path"),
    "budget": Bound(
        'give "stated" and its factors, all numbers above 0',
        lambda x: "stated" in x and len(x) > 1 and all(map(COUNT.holds, x.values())),
    ),
}
Resolve = Callable[[Any], Any]
# What a run is called and where it is written, as trainers name it.
IGNORED = tuple(
    "name run_name wandb_run_name description run_dir workdir out_dir output_dir save_dir "
    "logging_dir".split()
)


@dataclasses.dataclass
class Subject(Facts):
    """Examine the arms of a comparison before or after it is run."""

    arms: Annotated[
        Mapping[str, Mapping[str, Any]],
        "name -> what is known of it, all optional: 'config', the nested dict as written; "
        "'resolved', what the run really used; 'tree', the parameters as nested dicts of arrays or "
        "shapes; 'tables', the paths in it with a row for each id (else every matrix with a side "
        "of vocab_size); 'parameters', 'table_parameters' and 'claimed_parameters', counts; "
        "'tied', whether head and token table are one; 'losses', the final loss of each seed in "
        "nats; 'run_dir'; 'budget', a product and its factors: {'stated': 6e9, 'steps': 30000, "
        "'tokens': 200000}.",
    ]
    _: dataclasses.KW_ONLY
    resolve: Annotated[Resolve | None, "config -> what is built from it.", function] = None
    vocab_size: Annotated[int | None, "rows of the tables.", whole(1)] = None
    matched: Annotated[bool, "the arms are meant to have equally many parameters."] = False
    winner: Annotated[str | None, "the arm that is said to be best."] = None
    ignore: Annotated[Sequence[str], "keys of a config that do not tell arms apart.", NAMES] = (
        IGNORED
    )

    def __post_init__(self) -> None:
        """Refuse unknown keys and arms, and facts that are none."""
        example = 'give a mapping like {"small": {"parameters": 10_000_000}}'
        require(isinstance(self.arms, Mapping) and bool(self.arms), "arms", example)
        super().__post_init__()
        given = {}
        for name, arm in self.arms.items():
            what = f"arms[{name!r}]"
            require(isinstance(arm, Mapping), what, f"{arm!r} is no mapping of facts; give one")
            given[str(name)] = {key: value for key, value in arm.items() if value is not None}
            for key, value in given[str(name)].items():
                require(key in KEYS, what, f"unknown key {key!r}; use {', '.join(KEYS)}")
                require(KEYS[key].admits(value), f"{what}[{key!r}]", KEYS[key].remedy)
        self.arms = given
        known = self.winner is None or self.winner in self.arms
        require(known, "winner", f"{self.winner!r} is none of {', '.join(self.arms)}")

    def having(self, key: str) -> dict[str, Any]:
        """The value of a key by name of the arm; `Skip` if no arm has it."""
        found = {name: arm[key] for name, arm in self.arms.items() if key in arm}
        if not found:
            raise Skip(f"No arm has {key!r}.", key)
        return found

    def fingerprint(self, value: Any) -> str:
        """Text that is equal for equal values, without the ignored keys at any depth."""
        return json.dumps(_plain(value, self.ignore), sort_keys=True)

    def size(self, name: str) -> tuple[int | None, int | None, list[str]]:
        """Parameters of an arm in all and in tables, None if not known, and paths of the tables."""
        arm, V = self.arms[name], self.vocab_size
        found = shapes(arm.get("tree"))
        total = sum(map(math.prod, found.values())) if found else arm.get("parameters")
        if not found or (V is None and "tables" not in arm):
            return total, arm.get("table_parameters"), []
        with_ids = (path for path, shape in found.items() if len(shape) > 1 and V in shape)
        tables = [path for path in arm.get("tables", with_ids) if path in found]
        return total, sum(math.prod(found[path]) for path in tables), tables


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf by path; leaves are arrays or shapes."""

    def is_shape(x: Any) -> bool:
        return isinstance(x, tuple | list) and all(isinstance(n, int | np.integer) for n in x)

    found, seen = {}, set()
    for at, x in jax.tree.leaves_with_path(tree, is_leaf=is_shape):
        # A state_dict of PyTorch has a tied parameter twice; in JAX one array twice is a copy.
        where = x.data_ptr() if hasattr(x, "data_ptr") else 0
        if not (where and (where, x.shape) in seen):
            found[trees.path_name(at)] = tuple(x if is_shape(x) else np.shape(x))
        seen.add((where, getattr(x, "shape", None)))
    return found


def _plain(value: Any, ignore: Sequence[str]) -> Any:
    """The value as JSON types; arrays by shape, type and content, others by their repr."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    if hasattr(value, "items") and not isinstance(value, type):  # ConfigDict is no Mapping
        return {str(k): _plain(x, ignore) for k, x in value.items() if k not in ignore}
    if isinstance(value, list | tuple):
        return [_plain(x, ignore) for x in value]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        has_content = hasattr(value, "__array__")  # shapes of JAX have none
        content = trees.as_array(value).tobytes() if has_content else b""
        return [list(value.shape), str(value.dtype), hashlib.sha256(content).hexdigest()]
    if value is None or isinstance(value, str | int | float):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # where an object lies tells nothing


def identities(subject: Subject) -> tuple[str, dict[str, str]]:
    """What tells the arms apart, the best that is known of all, and its fingerprint by arm."""

    def resolved(config: Any) -> str:
        assert subject.resolve is not None
        made = [subject.fingerprint(call("resolve", subject.resolve, config)) for _ in range(2)]
        if made[0] != made[1]:
            raise Broken("resolve gives another result each time; name what changes in ignore")
        return made[0]

    ways: list[tuple[str, str, Callable[[Any], Any]]] = [
        ("resolved", "resolved config", lambda config: config),
        ("config", "resolved config", resolved),
        ("tree", "parameter tree", shapes),
        ("parameters", "parameter count", int),
    ]
    for key, by, value in ways:
        if key == "config" and subject.resolve is None:
            continue
        if all(key in arm for arm in subject.arms.values()):
            return by, {n: subject.fingerprint(value(x[key])) for n, x in subject.arms.items()}
    needs = "resolved, config and resolve, tree or parameters"
    raise Skip(f"Not given of every arm: {needs}.", needs)
