"""The arms of an experiment: do they differ, are they what they claim, can they be ranked?"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor.arms.noise import Noise, as_noise, noise_of_gap
from lm_jax.doctor.numbers import products
from lm_jax.doctor.old import Report, Skip, Status, Verdict, call, check, run_all, verdict

_MATCH = 0.005  # parameter counts within this share are the same
_KEYS = (
    "config resolved tree tables parameters table_parameters claimed_parameters tied losses "
    "run_dir budget"
).split()


@dataclasses.dataclass(frozen=True)
class Arms:
    """Arms by name, and what is declared about them; see `examine_arms`."""

    arms: Mapping[str, Mapping[str, Any]]
    resolve: Callable[[Any], Any] | None = None
    vocab_size: int | None = None
    matched: bool = False
    winner: str | None = None
    ignore: Sequence[str] = ()

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Names and arms."""
        return iter(self.arms.items())

    def having(self, key: str) -> dict[str, Any]:
        """The value of a key by name of the arm; Skip if no arm has it."""
        found = {name: arm[key] for name, arm in self if arm.get(key) is not None}
        if not found:
            raise Skip(f"no arm has {key!r}.")
        return found

    def identities(self) -> tuple[str, dict[str, str]]:
        """The fact that tells the arms apart, in words, and its fingerprint for each arm."""
        if all("resolved" in arm for _, arm in self):
            return "resolved config", {n: self.fingerprint(a["resolved"]) for n, a in self}
        if self.resolve is not None and all("config" in arm for _, arm in self):
            resolved = {n: call("resolve", self.resolve, arm["config"]) for n, arm in self}
            return "resolved config", {n: self.fingerprint(r) for n, r in resolved.items()}
        if all("tree" in arm for _, arm in self):
            return "parameter tree", {n: self.fingerprint(shapes(a["tree"])) for n, a in self}
        if all("parameters" in arm for _, arm in self):
            return "parameter count", {n: str(arm["parameters"]) for n, arm in self}
        raise Skip("needs resolved, config and resolve, tree or parameters in every arm.")

    def fingerprint(self, value: Any) -> str:
        """Text that is equal for equal values, without the ignored keys at any depth."""
        return json.dumps(_plain(value, self.ignore), sort_keys=True)


def examine_arms(
    arms: Mapping[str, Mapping[str, Any]],
    *,
    resolve: Callable[[Any], Any] | None = None,
    vocab_size: int | None = None,
    matched: bool = False,
    winner: str | None = None,
    ignore: Sequence[str] = ("name", "description", "run_dir", "workdir"),
) -> Report:
    """Examine the arms of a comparison before or after it is run.

    Args:
        arms: name -> what is known of it, all optional: `config`, the nested dict as written;
            `resolved`, what the run really used; `tree`, the parameters as nested dicts of arrays
            or shapes; `tables`, the paths in it with a row for each id (else every matrix with a
            side of `vocab_size`); `parameters`, `table_parameters` and `claimed_parameters`,
            counts; `tied`, whether head and token table are one; `losses`, the final loss of each
            seed in nats; `run_dir`; `budget`, as in `examine_log`.
        resolve: config -> what is built from it (dicts, dataclasses, arrays, shapes), to find keys
            that do nothing. It is called a few times for each key.
        vocab_size: rows of the tables, to tell tables from other parameters.
        matched: the arms are meant to have equally many parameters.
        winner: the arm that is said to be best.
        ignore: keys of a config that do not tell arms apart.

    Raises:
        ValueError: for an unknown key or arm, or fewer than one arm.
    """
    if not isinstance(arms, Mapping) or not arms:
        raise ValueError('arms: give a mapping like {"small": {"parameters": 10_000_000}}.')
    for name, arm in arms.items():
        if not isinstance(arm, Mapping):
            raise ValueError(f"arms[{name!r}]: {arm!r} is no mapping of facts; give one.")
        for key in arm:
            if key not in _KEYS:
                raise ValueError(f"arms[{name!r}]: unknown key {key!r}; use {', '.join(_KEYS)}.")
        losses = arm.get("losses", (0.0,))
        if not _numbers(losses):
            raise ValueError(f"arms[{name!r}]: losses must be a list of finite numbers.")
        budget = arm.get("budget", {"stated": 0})
        if not isinstance(budget, Mapping) or "stated" not in budget:
            raise ValueError(f'arms[{name!r}]: give "stated" and its factors in budget.')
    if winner is not None and winner not in arms:
        raise ValueError(f"winner: {winner!r} is none of {', '.join(arms)}.")
    return run_all(CHECKS, Arms(arms, resolve, vocab_size, matched, winner, ignore))


def _numbers(values: Any) -> bool:
    """True for one or more finite numbers."""
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str) or not len(values):
        return False
    return all(isinstance(x, int | float | np.number) and math.isfinite(x) for x in values)


@check(
    "config.same_arms",
    "Compare what was built, not what was written: look for keys read at another nesting level "
    "or under another name (config.dead_keys), and print the resolved config of every run.",
)
def same_arms(arms: Arms) -> Verdict:
    """No two arms are the same run."""
    if len(arms.arms) < 2:
        raise Skip("one arm has nothing to be compared with.")
    by, marks = arms.identities()
    groups: dict[str, list[str]] = {}
    for name, mark in marks.items():
        groups.setdefault(mark, []).append(name)
    same = [names for names in groups.values() if len(names) > 1]
    text = "; ".join(f"{', '.join(names)} have one {by}" for names in same)
    counts = {n: arm["parameters"] for n, arm in arms if "parameters" in arm}
    if same and counts and len(set(counts.values())) == 1:
        text += f", {next(iter(counts.values())):,} parameters each"
    if same and by != "resolved config":
        text += "; arms may still differ in what has no parameters"
    return verdict(
        not same,
        f"{text or f'{len(groups)} arms differ by {by}'}.",
        otherwise="fail" if by == "resolved config" else "warn",
        same=same,
        by=by,
    )


@check(
    "config.dead_keys",
    "Read the key where it is written, or delete it; better, refuse every key that nothing reads.",
)
def dead_keys(arms: Arms) -> Verdict:
    """Changing any key of a config changes what is built from it."""
    resolve = _resolver(arms)
    dead: dict[str, list[str]] = {}
    seen = 0
    for name, config in arms.having("config").items():
        before = arms.fingerprint(call("resolve", resolve, config))
        if before != arms.fingerprint(call("resolve", resolve, config)):
            raise Skip("resolve gives another result each time; name what changes in ignore.")
        for path, value in _leaves(config):
            if path[-1] in arms.ignore:
                continue
            seen += 1
            others = [_get(c, path) for c in arms.having("config").values()]
            changes = [x for x in [*others, *_changed(value)] if x is not None and x != value]
            if all(_same(arms, resolve, _with(config, path, x), before) for x in changes):
                dead.setdefault(".".join(path), []).append(name)
    text = "; ".join(f"{key} does nothing in {', '.join(names)}" for key, names in dead.items())
    return verdict(not dead, f"{text or f'All {seen} keys have an effect'}.", dead=dead)


@check("config.unknown_keys", "Raise an error that names the key and the nearest valid one.")
def unknown_keys(arms: Arms) -> Verdict:
    """A key that does not exist is refused, at every level."""
    resolve = _resolver(arms)
    config = next(iter(arms.having("config").values()))
    call("resolve", resolve, config)
    levels = {path[:-1] for path, _ in _leaves(config)}
    taken = []
    for level in sorted(levels):
        try:
            resolve(_with(config, (*level, "no_such_key"), 1))
        except Exception:  # any refusal will do: it is the silence that is looked for
            continue
        taken.append(".".join(level) or "the top level")
    text = f"An unknown key is accepted at {', '.join(taken)}" if taken else "Unknown keys raise"
    return verdict(not taken, f"{text}.", otherwise="warn", levels=taken)


@check(
    "config.ranking",
    "Do not rank: run at least 3 seeds of each arm that is left, or score all arms on the same "
    "tokens and compare token by token.",
)
def ranking(arms: Arms) -> Verdict:
    """The best arm is ahead of every other one by more than the noise between seeds."""
    losses = {n: np.asarray(x, float) for n, x in arms.having("losses").items()}
    if len(losses) < 2:
        raise Skip("one arm has nothing to be compared with.")
    best = arms.winner or min(losses, key=lambda name: losses[name].mean())
    if best not in losses:
        raise Skip(f"the losses of {best} are not given.")
    gaps = {n: float(x.mean() - losses[best].mean()) for n, x in losses.items() if n != best}
    repeats = _noise_of_repeats(arms, losses)
    noises = {name: repeats or noise_of_gap(losses[best], losses[name]) for name in gaps}
    # The rival that is hardest to tell from the best: one without an estimate, else the one whose
    # gap exceeds the needed one by least.
    margins = {n: gaps[n] - x.needed * x.error if x else -math.inf for n, x in noises.items()}
    rival = min(margins, key=lambda name: (margins[name], gaps[name]))
    gap, noise = gaps[rival], noises[rival]
    text = f"{best} is {gap:.4g} nats ahead of {rival}; "
    otherwise: Status = "fail" if arms.winner else "warn"
    if noise is None:
        text += "with one seed in either there is no estimate of the noise to hold that against."
        return verdict(False, text, otherwise=otherwise, gap=gap)
    text += (
        f"SE {noise.error:.3g} between {'arms that are the same run' if repeats else 'seeds'} "
        f"({noise.freedom:.3g} degrees of freedom), {noise.needed:.3g} SE are needed."
    )
    ok = margins[rival] > 0
    return verdict(ok, text, otherwise=otherwise, gap=gap, error=noise.error, winner=best)


@check("config.run_dirs", "Give every run a folder of its own, named by the hash of its config.")
def run_dirs(arms: Arms) -> Verdict:
    """No two arms write into the same folder."""
    folders: dict[str, list[str]] = {}
    for name, folder in arms.having("run_dir").items():
        folders.setdefault(os.path.realpath(folder), []).append(name)
    shared = {folder: names for folder, names in folders.items() if len(names) > 1}
    text = "; ".join(f"{', '.join(names)} write into {f}" for f, names in shared.items())
    return verdict(not shared, f"{text or f'{len(folders)} folders'}.", shared=shared)


@check(
    "config.parameters",
    "State the count of the parameter tree, tables and the rest apart.",
)
def parameters(arms: Arms) -> Verdict:
    """Claimed counts are those of the parameter tree, to 0.5 %."""
    wrong, rows = [], []
    for name, claim in arms.having("claimed_parameters").items():
        total, table = _counts(arms, arms.arms[name])
        if total is None:
            continue
        text = f"{name}: {claim:,} claimed, {total:,} counted"
        if table is not None:
            text += f" ({table:,} in tables, {total - table:,} elsewhere)"
            gap = abs(abs(claim - total) - table)
            if table and claim != total and gap < 0.01 * table:
                text += "; the difference is the tables once more, as if a tied one counted twice"
        rows.append(text)
        if abs(claim / total - 1) > _MATCH:
            wrong.append(text)
    if not rows:
        raise Skip("no arm has a claimed and a counted number of parameters.")
    return verdict(not wrong, f"{'; '.join(wrong or rows)}.", wrong=wrong)


@check(
    "config.matched",
    "Match what the question is about, non-table parameters and FLOPs per token as well as the "
    "total, and say which.",
)
def matched(arms: Arms) -> Verdict:
    """Arms that are meant to have equally many parameters have, in tables and elsewhere."""
    if not arms.matched or len(arms.arms) < 2:
        raise Skip("the arms are not declared to be matched.")
    counts = {name: _counts(arms, arm) for name, arm in arms}
    totals = {name: total for name, (total, _) in counts.items() if total}
    if len(totals) < 2:
        raise Skip("fewer than two arms have a count of parameters.")
    ratio = max(totals.values()) / min(totals.values())
    text = f"Totals from {min(totals.values()):,} to {max(totals.values()):,} ({ratio - 1:.2%})"
    rests = {n: total - table for n, (total, table) in counts.items() if total and table}
    rest_ratio = 1.0
    if len(rests) > 1 and min(rests.values()) > 0:
        rest_ratio = max(rests.values()) / min(rests.values())
        text += f"; without tables from {min(rests.values()):,} to {max(rests.values()):,}"
        text += f" ({rest_ratio:.3g} times)"
    return verdict(
        ratio - 1 <= _MATCH and rest_ratio <= 1.1,
        f"{text}; 0.5 % of the total and 10 % of the rest are allowed.",
        otherwise="fail" if ratio - 1 > _MATCH else "warn",
        ratio=ratio,
        rest_ratio=rest_ratio,
    )


@check(
    "config.tied",
    "Use one leaf in both places: a copy made at initialisation is another parameter after the "
    "first update.",
)
def tied(arms: Arms) -> Verdict:
    """A tied model has one leaf of table size, an untied one two."""
    if arms.vocab_size is None:
        arms.having("tables")
    wrong, rows = [], []
    for name, is_tied in arms.having("tied").items():
        if "tree" not in arms.arms[name]:
            continue
        tables = _tables(arms, arms.arms[name])
        if len(tables) > 2 and "tables" not in arms.arms[name]:
            continue  # other matrices have a side of that length too
        text = f"{name} ({'tied' if is_tied else 'untied'}) has {', '.join(tables) or 'none'}"
        rows.append(text)
        if len(tables) != (1 if is_tied else 2):
            wrong.append(text)
    if not rows:
        raise Skip("no arm has tied, tree and at most two matrices that can be tables.")
    text = "; ".join(wrong or rows)
    return verdict(not wrong, f"Leaves of vocabulary size: {text}.", wrong=wrong)


@check("config.budget", "Work the budget out from the config as executed, and state that.")
def budget(arms: Arms) -> Verdict:
    """Stated budgets are the products of their factors."""
    budgets = arms.having("budget")
    wrong = [f"{name}: {text}" for name, b in budgets.items() for text in products([b])]
    return verdict(not wrong, f"{'; '.join(wrong) or f'{len(budgets)} products agree'}.")


def shapes(tree: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shape of every leaf by path; leaves are arrays or shapes."""
    if isinstance(tree, Mapping):
        parts = (shapes(x, f"{prefix}{key}/") for key, x in tree.items())
        return {path: shape for part in parts for path, shape in part.items()}
    shape = tree if isinstance(tree, tuple | list) else tree.shape
    return {prefix.rstrip("/"): tuple(int(n) for n in shape)}


def _counts(arms: Arms, arm: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Parameters in all and in tables; None where it is not known."""
    if "tree" not in arm:
        return arm.get("parameters"), arm.get("table_parameters")
    found = shapes(arm["tree"])
    total = sum(math.prod(shape) for shape in found.values())
    if arms.vocab_size is None and "tables" not in arm:
        return total, arm.get("table_parameters")
    return total, sum(math.prod(found[path]) for path in _tables(arms, arm))


def _tables(arms: Arms, arm: Mapping[str, Any]) -> list[str]:
    """Paths of the leaves with a row for each id."""
    found = shapes(arm["tree"])
    if "tables" in arm:
        return [path for path in arm["tables"] if path in found]
    return [path for path, shape in found.items() if len(shape) > 1 and arms.vocab_size in shape]


def _noise_of_repeats(arms: Arms, losses: Mapping[str, np.ndarray]) -> Noise | None:
    """The noise where each arm has one loss, from arms that are the same run.

    None if an arm has several losses, or no two arms are the same run.
    """
    if any(len(x) > 1 for x in losses.values()):
        return None
    try:
        _, marks = arms.identities()
    except Skip:
        return None
    groups: dict[str, list[float]] = {}
    for name, x in losses.items():
        groups.setdefault(marks[name], []).append(float(x[0]))
    freedom = sum(len(x) - 1 for x in groups.values())
    if not freedom:
        return None
    variance = sum(np.var(x) * len(x) for x in groups.values()) / freedom
    return as_noise(math.sqrt(2 * variance), freedom)


def _resolver(arms: Arms) -> Callable[[Any], Any]:
    if arms.resolve is None:
        raise Skip("resolve is not given.")
    return arms.resolve


def _same(arms: Arms, resolve: Callable[[Any], Any], config: Any, before: str) -> bool:
    """True if a config gives the result `before`; one that raises was read."""
    try:
        return arms.fingerprint(resolve(config)) == before
    except Exception:  # the changed value may be an impossible one: then something reads it
        return False


def _changed(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2 + 2]
    if isinstance(value, float):
        return [value * 1.5 + 0.125, value / 2 + 0.0625]
    return [f"{value}_changed"] if isinstance(value, str) else [1]


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _with(tree: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy with one value replaced."""
    key, *rest = path
    return {**tree, key: _with(tree.get(key, {}), tuple(rest), value) if rest else value}


def _plain(value: Any, ignore: Sequence[str]) -> Any:
    """The value as JSON types; arrays by shape, type and content, others by their repr."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(x, ignore) for k, x in value.items() if k not in ignore}
    if isinstance(value, list | tuple):
        return [_plain(x, ignore) for x in value]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        content = np.asarray(value).tobytes().hex() if hasattr(value, "__array__") else ""
        return [list(value.shape), str(value.dtype), content]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


CHECKS = (
    same_arms,
    dead_keys,
    unknown_keys,
    ranking,
    run_dirs,
    parameters,
    matched,
    tied,
    budget,
)
