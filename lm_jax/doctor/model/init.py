"""Is a fresh model where it should start?"""

import fnmatch
import hashlib
from typing import Any

import jax
import numpy as np

from lm_jax.doctor.model.subject import Model, Variant, like, named_leaves
from lm_jax.doctor.old import Skip, Status, Verdict, check, verdict


def fresh(model: Model) -> None:
    """Skip a check of fresh parameters where they are declared trained."""
    if model.trained:
        raise Skip("the parameters are declared trained")


def leaves_of(model: Model) -> dict[str, np.ndarray]:
    """Floating-point leaves by path, or a skip."""
    if model.params is None:
        raise Skip("no parameters were given (params)")
    return named_leaves(model.params)


@check(
    "init.loss",
    remedy="Lower the scale of the output layer or of the position table until the first loss is "
    "near ln V; a tied table needs a std near 1/sqrt(d) or less.",
)
def first_loss(model: Model) -> Verdict:
    """The loss at the start must be ln V and half the variance of the logits, and not much.

    The mean over v of -log softmax(z)_v is ln V + Var(z) / 2 for normal logits; the logit of the
    position's own token, which a tied table raises, is counted apart.
    """
    fresh(model)
    z = np.asarray(model.given.base, np.float64)
    V = model.vocab_size
    own = np.take_along_axis(z, model.tokens[..., None], -1)[..., 0]
    rest_mean = (z.sum(-1) - own) / (V - 1)
    rest_var = (np.square(z - rest_mean[..., None]).sum(-1) - np.square(own - rest_mean)) / (V - 1)
    top = z.max(-1)
    nats = top + np.log(np.exp(z - top[..., None]).sum(-1)) - z.mean(-1)
    chance = float(np.log(V))
    # log of V - 1 others and the own token, each measured from the mean of the others.
    lift = own - rest_mean
    expected = np.logaddexp(np.log(V - 1) + rest_var / 2, lift) - lift / V
    gap = float((nats - expected).mean())
    variance = float(rest_var.mean())
    # The second term is the bias of a log of a mean over V normal logits (delta method).
    allowed = 0.1 + float(np.expm1(min(variance, 30.0))) / (2 * V)
    evidence = (
        f"First loss on uniform tokens {nats.mean():.3f} nats, expected {expected.mean():.3f}: "
        f"ln V = {chance:.3f}, half the logit variance {variance / 2:.3f}, own token's logit "
        f"{lift.mean():+.3f} above the mean; the difference is {gap:+.3f}, allowed {allowed:.2g}."
    )
    values: dict[str, Any] = {
        "loss": float(nats.mean()),
        "expected": float(expected.mean()),
        "ln_v": chance,
    }
    if variance / 2 >= chance:
        evidence += " The logits alone cost more than there is to learn."
        return verdict(False, evidence, logit_variance=variance, **values)
    return verdict(abs(gap) <= allowed, evidence, logit_variance=variance, **values)


@check(
    "init.probabilities",
    remedy="Return logits: the loss applies the softmax itself, and a second one leaves the "
    "largest probability at e / (e + V - 1).",
)
def probabilities(model: Model) -> Verdict:
    """What the model returns must not be probabilities already."""
    worst = max(float(np.abs(v.base.sum(-1) - 1).max()) for v in model.variants)
    lowest = min(float(v.base.min()) for v in model.variants)
    are = lowest >= 0 and worst <= 4 * model.precision[0]
    evidence = f"Sums over ids differ from 1 by up to {worst:.3g}; the lowest value is {lowest:.3g}"
    return verdict(not are, evidence + (": these are probabilities." if are else "."), sums=worst)


@check(
    "init.identical_leaves",
    remedy="Draw every parameter from a key of its own (split or fold in the layer's number); a "
    "table that is meant to be tied must be one leaf, not a copy.",
)
def identical_leaves(model: Model) -> Verdict:
    """No two leaves, and no two layers of a stacked leaf, may hold the same random numbers."""
    leaves = leaves_of(model)
    seen: dict[bytes, str] = {}
    twins: list[tuple[str, str]] = []
    for name, leaf in leaves.items():
        # A leaf [L, ..., ...] of scanned layers is L matrices.
        stacked = leaf.ndim > 2
        for i, part in enumerate(leaf) if stacked else [(-1, leaf)]:
            if part.size < 2 or (part == part.flat[0]).all():
                continue  # norms and biases start as constants
            label = f"{name}[{i}]" if stacked else name
            forms = {digest(part), digest(part.T)} if part.ndim == 2 else {digest(part)}
            earlier = next((seen[form] for form in forms if form in seen), None)
            if earlier is None:
                seen[digest(part)] = label
            elif not shared(leaves[earlier.split("[")[0]], leaf) or stacked:
                twins.append((earlier, label))
    evidence = f"{len(seen) + len(twins)} parameters that are not constant, {len(twins)} of them "
    evidence += "hold the numbers of another"
    evidence += "".join(f"; {b} = {a}" for a, b in twins[:4])
    return verdict(not twins, evidence + ".", twins=twins)


def digest(array: np.ndarray) -> bytes:
    """Hash of shape and contents."""
    array = np.ascontiguousarray(array)
    return hashlib.blake2b(array.tobytes(), person=str(array.shape).encode()[:16]).digest()


def shared(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether both are views of the same memory: one parameter under two names."""
    return np.may_share_memory(a, b)


@check(
    "init.norms",
    remedy="Find the initialiser of the named parameters; a non-finite value spreads to all "
    "others at the first update.",
)
def norms(model: Model) -> Verdict:
    """All parameters must be finite."""
    leaves = leaves_of(model)
    rms = {name: root_mean_square(leaf) for name, leaf in leaves.items() if leaf.size}
    bad = [name for name, value in rms.items() if not np.isfinite(value)]
    evidence = f"{sum(leaf.size for leaf in leaves.values())} parameters in {len(rms)} leaves, "
    if bad:
        return verdict(False, evidence + f"not finite: {', '.join(bad[:4])}.", non_finite=bad)
    if not rms:
        raise Skip("params has no floating-point leaf")
    low, high = min(rms, key=lambda k: rms[k]), max(rms, key=lambda k: rms[k])
    evidence += f"all finite; RMS from {rms[low]:.3g} ({low}) to {rms[high]:.3g} ({high})."
    return verdict(True, evidence, rms=rms)


def root_mean_square(values: Any) -> float:
    """Root of the mean square, in float64."""
    return float(np.sqrt(np.square(np.asarray(values).astype(np.float64)).mean()))


@check(
    "init.position_scale",
    remedy="Bring the two tables to one scale, so that a position neither drowns the token nor "
    "is drowned by it.",
)
def position_scale(model: Model) -> Verdict:
    """Neither the token nor its position may be drowned in the sum of the two tables."""
    fresh(model)
    if model.token_table is None or model.position_table is None:
        raise Skip("no tables were given (token_table and position_table)")
    token, position = root_mean_square(model.token_table), root_mean_square(model.position_table)
    ratio = position / max(token, 1e-30)
    share = min(ratio, 1 / max(ratio, 1e-30)) ** 2
    share /= 1 + share
    weaker = "token" if ratio > 1 else "position"
    evidence = (
        f"RMS of the positions {position:.3g}, of the tokens {token:.3g}, ratio {ratio:.3g}: the "
        f"{weaker} makes {100 * share:.2g} % of the variance of the input. A failure below 1 % "
        "(a ratio of 10), a warning below 5 %."
    )
    status: Status = "fail" if share < 0.01 else "warn"
    return verdict(share >= 0.05, evidence, otherwise=status, ratio=ratio, share=share)


@check(
    "init.declared_std",
    remedy="The parameters are not drawn as declared. Check the initialiser and its fan-in, and "
    "that the key in the config reaches it.",
)
def declared_std(model: Model) -> Verdict:
    """The standard deviation of a leaf must be the declared one, within 5 standard errors."""
    fresh(model)
    leaves = leaves_of(model)
    if not model.init_std:
        raise Skip("no standard deviations were declared (init_std)")
    wrong, compared, worst = [], 0, 0.0
    for pattern, std in model.init_std.items():
        names = fnmatch.filter(leaves, pattern)
        if not names:
            wrong.append(f"{pattern} matches no parameter")
        for name in names:
            values = leaves[name].astype(np.float64)
            # Standard error of the standard deviation of n normal numbers.
            z = (values.std() / std - 1) * (2 * values.size) ** 0.5
            worst, compared = max(worst, abs(z)), compared + 1
            if abs(z) > 5:
                wrong.append(f"{name} has {values.std():.4g}, declared {std:.4g} ({z:+.0f} SE)")
    evidence = f"{compared} leaves compared, the furthest {worst:.1f} SE from its declared value"
    return verdict(not wrong, "; ".join([evidence, *wrong[:4]]) + ".", wrong=wrong)


@check(
    "init.tied_table",
    remedy="Use one leaf for the embedding and the head; a copy made at the start drifts away "
    "and is counted twice.",
)
def tied_table(model: Model) -> Verdict:
    """A table declared tied must move logits of ids that are not in the input."""
    if not model.tied:
        raise Skip("the table is not declared tied (tied=True)")
    leaves = leaves_of(model)
    if model.token_table is None:
        raise Skip("no token table was given (token_table)")
    table = np.asarray(model.token_table)
    same = [n for n, leaf in leaves.items() if digest(leaf) == digest(table)]
    if not same:
        raise Skip("token_table is no leaf of params")
    absent = np.setdiff1d(np.arange(model.vocab_size), model.tokens)
    if not len(absent):
        raise Skip("every id is in the input; a larger vocabulary or fewer tokens are needed")
    changed = table.astype(np.float64)
    # Noise, not a constant: a layernorm before the head would take a constant away.
    noise = model.rng(30).standard_normal((len(absent), table.shape[1]))
    changed[absent] += max(root_mean_square(table), 1e-3) * noise

    def replace(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return like(leaf, changed) if name == same[0] else leaf

    params = jax.tree.map_with_path(replace, model.params)
    moved = Variant(model, "given", params).logits(model.tokens) - model.given.base
    here = float(np.abs(moved[..., absent]).max())
    copies = [n for n, leaf in leaves.items() if leaf.shape in (table.shape, table.shape[::-1])]
    evidence = (
        f"Rows of {same[0]} of {len(absent)} ids that are not in the input changed: logits of "
        f"those ids move by {here:.3g} (rounding {model.given.same_shape:.2g}); leaves of the "
        f"table's shape: {', '.join(copies)}."
    )
    return verdict(here > model.given.same_shape, evidence, change=here, leaves=copies)


CHECKS = (
    first_loss,
    probabilities,
    identical_leaves,
    norms,
    position_scale,
    declared_std,
    tied_table,
)
