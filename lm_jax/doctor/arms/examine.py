"""The checks of arms."""

import math
import os
from collections.abc import Mapping

import numpy as np

from lm_jax.doctor.arms.noise import Noise, as_noise, noise_of_gap
from lm_jax.doctor.arms.subject import Subject, identities
from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Broken, Skip
from lm_jax.doctor.findings import Measure, Status, at_most, holds, none, note
from lm_jax.doctor.numbers import products

MATCH = 0.005  # parameter counts within this share are the same


@check(
    "Print the resolved config of every run; look for keys read at another nesting level or "
    "under another name."
)
def same(subject: Subject) -> Measure:
    """No two arms are the same run."""
    if len(subject.arms) < 2:
        raise Skip("One arm has nothing to be compared with.")
    by, marks = identities(subject)
    unsure = "" if by == "resolved config" else "and may still differ in what has no parameters"
    what, otherwise = f"groups of arms with one {by}", "warn" if unsure else "fail"
    return none(what, _alike(marks), otherwise=otherwise, where=unsure, key="same")


@check("Give every run a folder of its own, named by the hash of its config.")
def run_dirs(subject: Subject) -> Measure:
    """No two arms write into the same folder."""
    folders = {name: os.path.realpath(x) for name, x in subject.having("run_dir").items()}
    return none("groups of arms with one folder", _alike(folders), of=len(folders), key="shared")


def _alike(marks: Mapping[str, str]) -> list[str]:
    """Names with the same mark, where there are several."""
    groups: dict[str, list[str]] = {}
    for name, mark in marks.items():
        groups.setdefault(mark, []).append(name)
    return [" = ".join(names) for names in groups.values() if len(names) > 1]


def _repeats(subject: Subject, losses: dict[str, np.ndarray]) -> Noise | None:
    """The noise where each arm has one loss, from arms that are the same run, if there are any."""
    if any(len(x) > 1 for x in losses.values()):
        return None
    try:
        _, marks = identities(subject)
    except (Skip, Broken):  # which `same` reports
        return None
    groups: dict[str, list[float]] = {}
    for name, x in losses.items():
        groups.setdefault(marks[name], []).append(float(x[0]))
    freedom = sum(len(x) - 1 for x in groups.values())
    variance = sum(np.var(x) * len(x) for x in groups.values()) / max(freedom, 1)
    return as_noise(math.sqrt(2 * variance), freedom) if freedom else None


@check(
    "Do not rank: run at least 3 seeds of each arm that is left, or score all arms on the same "
    "tokens and compare token by token."
)
def ranking(subject: Subject) -> list[Measure]:
    """The best arm is ahead of every other one by more than the noise between seeds."""
    losses = {n: np.array([float(x) for x in xs]) for n, xs in subject.having("losses").items()}
    if len(losses) < 2:
        raise Skip("One arm has nothing to be compared with.", "losses")
    best = subject.winner or min(losses, key=lambda name: losses[name].mean())
    if best not in losses:
        raise Skip(f"The losses of {best} are not given.", "losses")
    gaps = {n: float(x.mean() - losses[best].mean()) for n, x in losses.items() if n != best}
    repeats = _repeats(subject, losses)
    noises = {name: repeats or noise_of_gap(losses[best], losses[name]) for name in gaps}
    # The rival that is hardest to tell from the best: one without an estimate, else the one whose
    # gap exceeds the needed one by least.
    margins = {n: gaps[n] - x.needed * x.error if x else -math.inf for n, x in noises.items()}
    rival = min(margins, key=lambda name: (margins[name], gaps[name]))
    noise = noises[rival]
    what = f"nats by which {best} is ahead of {rival}"
    otherwise: Status = "fail" if subject.winner else "warn"
    if noise is None:
        where = "with one seed in either there is no estimate of the noise"
        return [holds(False, what, gaps[rival], otherwise=otherwise, where=where, key="gap")]
    limit = f"more than {noise.needed:.3g} SE of {noise.error:.3g}"
    ahead, between = margins[rival] > 0, "arms that are the same run" if repeats else "seeds"
    return [
        holds(ahead, what, gaps[rival], limit=limit, otherwise=otherwise, key="gap"),
        note(f"standard error, between {between}", noise.error, key="error"),
        note("its degrees of freedom", noise.freedom, key="freedom"),
    ]


@check("State the count of the parameter tree, tables and the rest apart.")
def parameters(subject: Subject) -> Measure:
    """Claimed counts are those of the parameter tree, to 0.5 %."""
    wrong, seen = [], 0
    for name, claim in subject.having("claimed_parameters").items():
        total, table, _ = subject.size(name)
        if total is None:
            continue
        seen += 1
        if abs(claim - total) > MATCH * total:
            text = f"{name}: {claim:,} claimed, {total:,} counted"
            text += f" ({table:,} in tables)" if table is not None else ""
            if table and abs(abs(claim - total) - table) < 0.01 * table:
                text += ", different by the tables, as if a tied one counted twice"
            wrong.append(text)
    if not seen:
        raise Skip("No arm has a claimed and a counted number of parameters.", "tree")
    return none("claims that are not the count", wrong, of=seen, key="wrong")


@check("Match non-table parameters and FLOPs per token as well as the total, and say which.")
def matched(subject: Subject) -> list[Measure]:
    """Arms that are meant to have equally many parameters have, in tables and elsewhere."""
    if not subject.matched:
        raise Skip("The arms are not declared to be matched.", "matched")
    sizes = [subject.size(name) for name in subject.arms]
    totals = [total for total, _, _ in sizes if total]
    rests = [total - table for total, table, _ in sizes if total and table]
    if len(totals) < 2:
        raise Skip("Fewer than two arms have a count of parameters.", "tree")
    excess = max(totals) / min(totals) - 1
    found = [
        at_most("excess of the largest total over the least", excess, MATCH, key="total"),
        note(f"totals from {min(totals):,} to {max(totals):,}"),
    ]
    if len(rests) > 1 and min(rests) > 0:
        what, ratio = "ratio of the most and the least outside tables", max(rests) / min(rests)
        found.append(at_most(what, ratio, 1.1, otherwise="warn", key="rest"))
    return found


@check("Use one leaf in both places: a copy is another parameter after the first update.")
def tied(subject: Subject) -> Measure:
    """A tied model has one leaf of table size, an untied one two."""
    if subject.vocab_size is None:
        subject.having("tables")
    wrong, seen = [], 0
    for name, is_tied in subject.having("tied").items():
        arm, tables = subject.arms[name], subject.size(name)[2]
        if "tree" not in arm or ("tables" not in arm and len(tables) > 2):
            continue  # other matrices have a side of that length too
        seen += 1
        if len(tables) != (1 if is_tied else 2):
            wrong.append(f"{'' if is_tied else 'un'}tied {name} has {', '.join(tables) or 'none'}")
    if not seen:
        raise Skip("No arm has tied, tree and at most two matrices that can be tables.", "tree")
    return none("arms with other leaves of vocabulary size", wrong, of=seen, key="wrong")


@check(
    "Work the budget out from the config as executed, and state that. Give all arms whose losses "
    "are compared the same."
)
def budget(subject: Subject) -> list[Measure]:
    """Stated budgets are the products of their factors, and equal where losses are compared."""
    budgets = subject.having("budget")
    wrong = [f"{name}: {text}" for name, b in budgets.items() for text in products([b])]
    found = [none("budgets that are no products", wrong, of=len(budgets), key="wrong")]
    stated = [b["stated"] for name, b in budgets.items() if "losses" in subject.arms[name]]
    if len(stated) > 1 and len({frozenset(b) for b in budgets.values()}) == 1:
        what, excess = "excess of the largest budget over the least", max(stated) / min(stated) - 1
        found.append(at_most(what, excess, MATCH, otherwise="warn", key="excess"))
    return found
