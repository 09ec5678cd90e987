"""Forward passes made twice: evaluation must repeat itself, dropout must not."""

import numpy as np

from lm_jax.doctor.checks import check
from lm_jax.doctor.findings import Finding, Measure, at_most, equals, note
from lm_jax.doctor.model.subject import Function, Subject, Variant, change, moves


@check(
    "Hand in a function of NumPy's int32 ids [B, T] that returns finite float logits [B, T, V]; "
    "a PyTorch module goes through doctor.torch_model. Nothing else was examined.",
    gate=True,
)
def output(subject: Subject) -> list[Measure]:
    """The function returns finite logits of the right shape."""
    given = subject.given
    return [
        note("largest logit", given.scale, key="scale"),
        note("dtype of the logits", str(given.dtype)),
        note("arithmetic", subject.precision.how),
    ]


@check(
    "Switch dropout and every other source of randomness off in evaluation (train=False, "
    "model.eval(), no key), and keep nothing between calls."
)
def eval_repeats(subject: Subject, output: Finding, noisy: Variant | None = None) -> Measure:
    """Without dropout, two calls of the same input give the same logits, bit by bit."""
    found = [(v.change(subject.tokens).max(), v) for v in (subject.given, noisy) if v is not None]
    gap, variant = max(found, key=lambda pair: pair[0] / pair[1].same_shape)
    # Kernels that add in random order differ by roundings; dropout by far more.
    return equals(
        "difference of two calls of the same input",
        float(gap),
        0,
        otherwise="fail" if gap > variant.same_shape else "warn",
        where="as dropout left on makes it",
        key="change",
    )


@check(
    "The function takes params and computes with others, of a closure or a module, so that its "
    "checks with noise are worth nothing. Use what is handed in (torch.func.functional_call)."
)
def randomised(subject: Subject, noisy: Variant) -> Measure:
    """Noise in place of all parameters, with which every check is repeated, changes the logits."""
    moved = change(noisy.base, subject.given.base).max()
    what, ignored = "change of a logit by noise for parameters", "the function ignores parameters"
    return moves(what, moved, 0, otherwise="warn", where=ignored, key="change")


@check(
    "Hand the dropout key (or train=True) down to every layer. Draw it from the seed and the "
    "number of the update alone, and the mask for the whole batch, not for one row."
)
def dropout(subject: Subject, train_fn: Function, noisy: Variant | None = None) -> list[Measure]:
    """Masks of dropout change the logits, differ by update and row, and come again when rerun."""
    # A head or a branch that starts at zero hides what is dropped before it.
    variant, tokens = noisy or subject.given, np.tile(subject.tokens[:1], (subject.rows, 1))
    off = variant.logits(tokens)
    first, again, second = (variant.logits(tokens, train_fn, i) for i in (0, 0, 1))
    updates, rows = change(first, second).max(), change(first[1:], first[:-1]).max()
    # In low precision the bound of rounding can be as large as what a little dropout does.
    rounding = max(variant.same_shape, min(variant.other_shape, float(updates) / 4))
    return [
        moves("change of a logit by dropout", change(first, off).max(), variant.same_shape),
        moves("difference of updates 0 and 1", updates, variant.same_shape),
        moves("difference of equal rows", rows, rounding),
        at_most("difference of update 0 run twice", float(change(first, again).max()), 0),
    ]
