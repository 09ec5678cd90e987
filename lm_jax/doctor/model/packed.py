"""Packed and padded rows: does a document see its neighbours, or padding?"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Broken, call
from lm_jax.doctor.findings import Measure, none, note
from lm_jax.doctor.model.causality import Worst
from lm_jax.doctor.model.subject import Function, Subject, Variant, change


def documents(subject: Subject, splits: Sequence[int] = ()) -> np.ndarray:
    """Segment ids [B, T] of rows cut at `splits`, counted from 1."""
    ids = 1 + np.searchsorted(np.asarray(splits), np.arange(subject.seq_len), side="right")
    return np.tile(ids.astype(np.int32), (subject.rows, 1))


def outside(
    parts: trees.Arrays, segmented: Function, ids: np.ndarray, variants: list[Variant]
) -> list[Measure]:
    """Replace the tokens of each part, a mask [B, T], and compare all logits outside it."""
    subject = variants[0].subject
    worst = Worst()
    for variant in variants:
        rng = subject.rng(14)
        base = variant.logits(subject.tokens, segmented, ids)
        for how, inside in parts.items():
            moved = change(variant.logits(subject.replaced(rng, inside), segmented, ids), base)
            worst.add(np.where(inside, 0, moved), variant.same_shape, variant, f"{how} replaced")
    return worst.measures()


@check(
    "A document sees its neighbours in the packed row. Combine the causal mask with "
    "segment[t] == segment[s] in every layer, or do not pack."
)
def segment_isolation(
    subject: Subject, segmented: Function, variants: list[Variant]
) -> list[Measure]:
    """Replacing one document of a packed row leaves the logits of the others as they are."""
    ids = documents(subject, (subject.seq_len // 3 | 1, 2 * subject.seq_len // 3 | 1))
    parts = {f"document {i} of {ids.max()} in a row": ids == i for i in range(1, ids.max() + 1)}
    return outside(parts, segmented, ids, variants)


@check(
    "A document's logits depend on its place in the packed row. Let positions restart at 0 with "
    "every segment."
)
def segment_restart(
    subject: Subject, segmented: Function, variants: list[Variant]
) -> list[Measure]:
    """A document at the start of a row and the same one in its middle have the same logits."""
    # A power of two, so that the borders of blocks, if attention is local to them, move along.
    start = 1 << (subject.seq_len // 2).bit_length() - 1
    length = subject.seq_len - start
    moved = np.roll(subject.tokens, -start, axis=1)  # the second document first
    worst = Worst()
    for variant in variants:
        packed = variant.logits(subject.tokens, segmented, documents(subject, (start,)))
        alone = variant.logits(moved, segmented, documents(subject, (length,)))
        # An angle of up to T radians is off by T roundings of float32 before it is rotated by.
        angles = 1 + subject.seq_len * 2.0**-24 / subject.precision.unit
        gap = change(packed[:, start:], alone[:, :length])
        how = f"a document moved from {start} to the start of the row"
        worst.add(gap, variant.other_shape * angles, variant, how)
    return worst.measures()


@check(
    "With padding in the batch a position sees later tokens or the padding. The padding mask must "
    "be combined with the causal mask (and), not replace it."
)
def padding_mask(subject: Subject, segmented: Function, causal: list[Variant]) -> list[Measure]:
    """With padding at the end of a row, neither it nor later tokens change a position's logits."""
    real, ids = 2 * subject.seq_len // 3 | 1, documents(subject)
    ids[:, real:] = 0
    place = np.tile(np.arange(subject.seq_len), (subject.rows, 1))
    parts = {
        f"padding from {real} on, tokens from {cut} on": place >= cut
        for cut in sorted({1, real // 2 | 1, real - 1, real})
    }
    return outside(parts, segmented, ids, causal)


@check(
    "A position without any key to attend to must give output 0 and gradient 0. Replace the scores "
    "before the softmax (and the result after it) with where, not only the result."
)
def masked_rows(subject: Subject, segmented: Function, variants: list[Variant]) -> list[Measure]:
    """Padding at the start of a row, and a row of padding, give finite logits and gradients."""
    ids = documents(subject)
    for variant in variants:
        variant.logits(subject.tokens, segmented, ids)  # raises if that is at fault
    ids[0, : subject.seq_len // 3 | 1] = ids[-1] = 0
    try:
        for variant in variants:
            variant.logits(subject.tokens, segmented, ids)
    except Broken as broken:
        return [none("variants with unfit logits", [broken], of=len(variants))]
    judged = note("variants with finite logits", len(variants))

    def total(params: Any) -> jax.Array:
        logits = segmented(params, jnp.asarray(subject.tokens), jnp.asarray(ids))
        return jnp.where((ids > 0)[..., None], logits, 0).sum()

    try:
        if subject.params is None:
            raise Broken("params were not given")
        grads = call("the gradient", jax.grad(total, allow_int=True), subject.params)
    except Broken as broken:
        return [judged, note("gradients were not taken", str(broken))]
    leaves = trees.float_leaves(grads)
    bad = trees.nonfinite(leaves)
    return [judged, none("parameters with a non-finite gradient", bad, of=len(leaves))]
