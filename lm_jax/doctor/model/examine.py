"""All checks of a model's forward pass."""

from collections.abc import Callable, Mapping
from typing import Any

from lm_jax.doctor.model import attention, causality, dropout, init, target
from lm_jax.doctor.model.subject import CAUSAL, Model, named_leaves
from lm_jax.doctor.old import Finding, Report, Skip, Verdict, check, run_all, verdict


@check(
    "model.output",
    remedy="Hand in a function of int32 ids [B, T] that returns finite floating-point logits "
    "[B, T, V] (numpy.asarray must accept them); nothing else was examined.",
)
def output(model: Model) -> Verdict:
    """The function must return finite logits of the right shape."""
    try:
        base = model.given.base
    except Skip as reason:
        return verdict(False, f"{reason}.")
    spread = float(base.std())
    evidence = (
        f"Logits {list(base.shape)} {model.given.dtype}, all finite, within "
        f"±{model.given.scale:.3g} (standard deviation {spread:.3g}); "
        f"arithmetic: {model.precision[1]}."
    )
    return verdict(True, evidence, scale=model.given.scale, std=spread)


@check("model.randomised", remedy="")
def randomised(model: Model) -> Verdict:
    """The checks are repeated with noise in place of the parameters, if the function bears it."""
    if model.params is None:
        raise Skip("no parameters were given (params): a leak behind a zero gate is not seen")
    if not named_leaves(model.params):
        raise Skip("params hold no floating-point array of NumPy, JAX or PyTorch")
    try:
        scale = model.randomised.scale
    except Skip as reason:
        model.dropped = str(reason)
        raise Skip(f"{reason}: a leak behind a zero gate is not seen") from reason
    evidence = f"Every check is repeated with noise for parameters; logits within ±{scale:.3g}."
    return verdict(True, evidence, scale=scale)


CHECKS = (
    randomised,
    *causality.CHECKS,
    *attention.CHECKS,
    *target.CHECKS,
    *init.CHECKS,
    *dropout.CHECKS,
)


def examine_model(
    fn: Callable[..., Any],
    *,
    vocab_size: int,
    seq_len: int,
    params: Any = None,
    objective: str = CAUSAL,
    trained: bool = False,
    segmented: Callable[..., Any] | None = None,
    train_fn: Callable[..., Any] | None = None,
    attention: Callable[..., Any] | None = None,
    reference: Callable[..., Any] | None = None,
    batch_size: int = 3,
    seed: int = 0,
    sample: Any = None,
    token_table: Any = None,
    position_table: Any = None,
    tied: bool = False,
    init_std: Mapping[str, float] | None = None,
    compute_dtype: str | None = None,
) -> Report:
    """Examine the forward pass of a language model: families causality, target, init, training.

    Args:
        fn: (tokens int32 [B, T]) -> logits [B, T, V]; with `params`, (params, tokens). Numpy in,
            anything that numpy.asarray takes out. Called about 50 times, twice that with `params`.
        vocab_size: V.
        seq_len: T of most calls; shorter ones are tried as well.
        params: pytree of arrays. The checks are then repeated with noise in their place, which
            finds what a zero at the start hides.
        objective: "causal", "bidirectional" or "masked"; causal checks are skipped for the others.
        trained: the parameters are trained: checks of fresh ones are skipped.
        segmented: as `fn` with a further argument segment_ids int32 [B, T], 0 for padding.
        train_fn: as `fn` with a further argument, the number of the update: the forward pass of
            that update with dropout on. Leave it out where no dropout is used.
        attention: as `fn`, but returns attention probabilities [..., T, T].
        reference: another implementation of `fn`.
        batch_size: rows of a batch, 2 or more.
        seed: of the inputs and of the noise.
        sample: ids [N, T] of text like that which a trained model was trained on.
        token_table: the token embedding, [V, D].
        position_table: the position embedding, [T, D], if there is one.
        tied: `token_table` is declared to be the head as well.
        init_std: declared standard deviations, by pattern of the leaf's path, "blocks/*/kernel".
        compute_dtype: narrowest dtype inside, where tracing the function cannot show it.

    Raises:
        ValueError: if an argument is impossible.
    """
    model = Model(
        fn,
        vocab_size,
        seq_len,
        params=params,
        objective=objective,
        trained=trained,
        segmented=segmented,
        train_fn=train_fn,
        attention=attention,
        reference=reference,
        batch_size=batch_size,
        seed=seed,
        sample=sample,
        token_table=token_table,
        position_table=position_table,
        tied=tied,
        init_std=init_std,
        compute_dtype=compute_dtype,
    )
    return gated(output, CHECKS, model)


def gated(gate: Callable[..., Finding], checks: Any, subject: Any) -> Report:
    """Run `gate`; run the checks if it passes, else report them all as skipped."""
    first = gate(subject)
    if first.status == "fail":
        why = f"{first.check} failed"
        return Report((first, *(Finding(c.check_name, "skip", why) for c in checks)))
    return Report((first,)) + run_all(checks, subject)
