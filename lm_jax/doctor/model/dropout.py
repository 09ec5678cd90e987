"""Forward passes made twice: evaluation must repeat itself, dropout must not."""

import numpy as np

from lm_jax.doctor.model.subject import Model
from lm_jax.doctor.old import Skip, Verdict, check, verdict


@check(
    "training.eval_repeats",
    remedy="Switch dropout and every other source of randomness off in evaluation (train=False, "
    "model.eval(), no key).",
)
def eval_repeats(model: Model) -> Verdict:
    """The same input twice must give the same logits, bit by bit."""
    change = max(float(np.abs(v.logits(model.tokens) - v.base).max()) for v in model.variants)
    evidence = f"Two forward passes of the same tokens differ by {change:.3g} at most, allowed 0."
    return verdict(change == 0, evidence, change=change)


def train_logits(model: Model, tokens: np.ndarray, step: int) -> np.ndarray:
    """Logits of update `step`, with dropout on and the given parameters."""
    if model.train_fn is None:
        raise Skip("no forward pass in training mode was given (train_fn)")
    return model.given.logits(tokens, model.train_fn, step)


@check(
    "training.dropout_on",
    remedy="Dropout has no effect in training: hand the key (or train=True) down to every layer.",
)
def dropout_on(model: Model) -> Verdict:
    """In training mode the logits must differ from those of evaluation."""
    change = float(np.abs(train_logits(model, model.tokens, 0) - model.given.base).max())
    evidence = f"Logits in training and in evaluation differ by {change:.3g} at most."
    return verdict(change > model.given.same_shape, evidence, change=change)


@check(
    "training.dropout_varies",
    remedy="The dropout key is used again. Fold the number of the update into it, and draw the "
    "mask for the whole batch, not for one row.",
)
def dropout_varies(model: Model) -> Verdict:
    """Masks must differ between updates and between rows."""
    tokens = np.tile(model.tokens[:1], (model.batch_size, 1))  # rows alike but for the mask
    first, second = (train_logits(model, tokens, step) for step in (0, 1))
    updates = float(np.abs(first - second).max())
    rows = float(np.abs(first[1:] - first[:1]).max())
    evidence = (
        f"With dropout on, logits of updates 0 and 1 differ by {updates:.3g} and those of equal "
        f"rows by {rows:.3g}; rounding explains {model.given.other_shape:.2g}."
    )
    ok = updates > model.given.same_shape and rows > model.given.other_shape
    return verdict(ok, evidence, updates=updates, rows=rows)


@check(
    "training.dropout_repeats",
    remedy="Derive the dropout key from the seed and the number of the update alone, so that a "
    "resumed run draws the same masks.",
)
def dropout_repeats(model: Model) -> Verdict:
    """The same update twice must draw the same masks."""
    first, again = (train_logits(model, model.tokens, 1) for _ in range(2))
    change = float(np.abs(first - again).max())
    evidence = f"Update 1 run twice with dropout on: logits differ by {change:.3g}, allowed 0."
    return verdict(change == 0, evidence, change=change)


CHECKS = (eval_repeats, dropout_on, dropout_varies, dropout_repeats)
