"""Is a fresh model where it should start?"""

import fnmatch
import math

import jax
import numpy as np

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_least, at_most, holds, none, note
from lm_jax.doctor.model.subject import Subject, Variant, Variants, change, moves


@fixture
def fresh(trained: bool) -> bool:
    """The parameters are not trained, or there is nothing to look at."""
    if trained:
        raise Skip("The parameters are declared trained.")
    return True


@check(
    "Lower the scale of the output layer or the position table until the first loss is near ln V; "
    "a tied table needs a std near 1/sqrt(d) or less."
)
def loss(subject: Subject, fresh: bool) -> list[Measure]:
    """The loss at the start is ln V and half the variance of the logits, and that is not much.

    The mean over v of -log softmax(z)_v is ln V + Var(z) / 2 for normal logits; the logit of the
    position's own token, which a tied table raises, is counted apart.
    """
    V, tokens = subject.vocab_size, subject.tokens
    some = slice(None, None, 1 + (tokens.size * V >> 22))  # positions enough, of large logits
    z = subject.given.all_logits(tokens).reshape(-1, V)[some].astype(np.float64)
    own_id = tokens.ravel()[some, None]
    nats = -numbers.log_softmax(z).mean(-1)
    own = np.take_along_axis(z, own_id, -1)[:, 0]
    np.put_along_axis(z, own_id, np.nan, -1)
    mean, variance = np.nanmean(z, -1), np.nanvar(z, -1)
    # log of V - 1 others and the own token, each measured from the mean of the others.
    lift = own - mean
    expected = np.logaddexp(np.log(V - 1) + variance / 2, lift) - lift / V
    half = float(variance.mean()) / 2
    # The second term is the bias of a log of a mean over V normal logits (delta method).
    allowed = 0.1 + math.expm1(min(2 * half, 30.0)) / (2 * V)
    gap = float((nats - expected).mean())
    return [
        at_most("half the variance of the logits", half, math.nextafter(math.log(V), 0)),
        at_most("distance of the first loss from what is expected of it", abs(gap), allowed),
        note("first loss on uniform tokens, nats", float(nats.mean()), key="loss"),
    ]


@check(
    "Return logits: the loss applies the softmax itself, and a second one leaves the largest "
    "probability at e / (e + V - 1)."
)
def probabilities(subject: Subject, variants: Variants) -> Measure:
    """What the model returns are no probabilities: it has negative values, or sums other than 1."""
    found = [v.all_logits(subject.tokens) for v in variants]
    sums = max(numbers.gap(z.sum(-1), 1) for z in found)
    ok = bool(min(z.min() for z in found) < 0) or sums > 4 * subject.precision.unit
    what = "distance of sums over ids from 1"
    return holds(ok, what, sums, where="no value is negative: these are probabilities", key="sums")


def drawn(part: np.ndarray) -> bool:
    """Whether numbers look drawn at random: many values, that turn as often as noise does.

    Along an axis of n independent numbers, 2 (n - 2) / 3 are larger or smaller than both their
    neighbours, with a variance of (16 n - 29) / 90. Decays, slopes, frequencies and sinusoids,
    which are equal in every layer by design, turn less often.
    """
    many = part.size >= 8 and np.unique(part).size > min(16, part.size // 2)
    if not many or not np.isfinite(part).all():
        return False
    for axis in (axis for axis, n in enumerate(part.shape) if n > 2):
        steps = np.sign(np.diff(part.astype(np.float64), axis=axis))
        turns = np.count_nonzero(np.diff(steps, axis=axis))
        n, lines = part.shape[axis], part.size // part.shape[axis]
        if turns < lines * 2 * (n - 2) / 3 - 3 * math.sqrt(lines * (16 * n - 29) / 90):
            return False
    return True


@check(
    "Draw every parameter from a key of its own (fold in the layer's number); a table that is "
    "meant to be tied must be one leaf, not a copy."
)
def identical_leaves(leaves: trees.Arrays) -> Measure:
    """No two leaves, and no two layers of a stacked leaf, hold the same random numbers."""
    parts: trees.Arrays = {}
    for name, leaf in leaves.items():  # one [L, ..., ...] of scanned layers is L matrices
        stacked = leaf.ndim > 2
        parts |= {f"{name}[{i}]": x for i, x in enumerate(leaf)} if stacked else {name: leaf}
    parts = {name: x for name, x in parts.items() if drawn(x)}
    first: dict[int, str] = {}
    twins = []
    for name, x in parts.items():
        if earlier := first.get(_digest(x)) or first.get(_digest(x.T)):
            twins.append(f"{name} = {earlier}")
        first[_digest(x)] = name
    return none("parameters with the random numbers of another", twins, of=len(parts), key="twins")


def _digest(array: np.ndarray) -> int:
    """Hash of shape and contents."""
    return hash((array.shape, array.tobytes()))


@check("Find what made the named parameters; the first update spreads a NaN to all others.")
def norms(leaves: trees.Arrays) -> Measure:
    """All parameters are finite."""
    bad = [name for name in trees.nonfinite(leaves) if not trees.is_mask(leaves[name])]
    return none("parameters that are not finite", bad, of=len(leaves), key="non_finite")


@check("Bring the two tables to one scale, so that neither drowns the other.")
def position_scale(fresh: bool, token_table: np.ndarray, position_table: np.ndarray) -> Measure:
    """Neither the token nor its position drowns in the sum of the two tables."""
    sizes = {"token": trees.rms(token_table) ** 2, "position": trees.rms(position_table) ** 2}
    weaker = min(sizes, key=sizes.__getitem__)
    what = f"share of the {weaker} in the variance of the input"
    share = sizes[weaker] / max(sum(sizes.values()), 1e-30)
    # A table of zeros is meant to start there.
    grave = "fail" if 0 < share < 0.01 else "warn"
    return at_least(what, share, 0.05, otherwise=grave, key="share")


@check("Check the initialiser and its fan-in, and that the key in the config reaches it.")
def declared_std(fresh: bool, leaves: trees.Arrays, init_std: dict[str, float]) -> Measure:
    """The standard deviation of a leaf is the declared one, within 5 standard errors."""
    matches = {pattern: fnmatch.filter(leaves, pattern) for pattern in init_std}
    wrong = [f"{pattern} matches no parameter" for pattern, names in matches.items() if not names]
    for name, std in [(name, init_std[p]) for p, names in matches.items() for name in names]:
        found = float(leaves[name].astype(np.float64).std())
        # The standard error of the standard deviation of n normal numbers is this part of it.
        if abs(found - std) * (2 * leaves[name].size) ** 0.5 > 5 * std:
            wrong.append(f"{name} has {found:.4g}, declared {std:.4g}")
    return none("leaves that are not as declared", wrong, key="wrong")


@check("Use one leaf for the embedding and the head; a copy drifts away and is counted twice.")
def tied_table(subject: Subject, leaves: trees.Arrays, token_table: np.ndarray) -> Measure:
    """A table declared tied moves the logits of ids that are not in the input."""
    if not subject.tied:
        raise Skip("The table is not declared tied.", "tied")
    same = next((n for n, leaf in leaves.items() if _digest(leaf) == _digest(token_table)), None)
    absent = np.setdiff1d(np.arange(subject.vocab_size), subject.tokens)
    if same is None:
        raise Skip("token_table is no leaf of params.")
    if not len(absent):
        raise Skip("Every id is in the input; a larger vocabulary or fewer tokens are needed.")
    changed = token_table.astype(np.float64)
    # Noise, not a constant: a layernorm before the head would take a constant away.
    noise = subject.rng(30).standard_normal((len(absent), token_table.shape[1]))
    changed[absent] += max(trees.rms(token_table), 1e-3) * noise
    params = jax.tree.map_with_path(
        lambda path, x: trees.like(x, changed) if trees.path_name(path) == same else x,
        subject.params,
    )
    both = Variant(subject, "changed", params), subject.given
    moved = change(*(v.all_logits(subject.tokens)[..., absent] for v in both)).max()
    what, rounding = f"change of logits of {len(absent)} absent ids", subject.given.same_shape
    return moves(what, moved, rounding, key="change")
