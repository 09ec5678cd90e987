"""Does a position see what it must not: later tokens, other rows, other documents, padding?"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Broken, Skip, call
from lm_jax.doctor.findings import Measure, at_most, holds, none, note
from lm_jax.doctor.model.subject import Function, Subject, Variant, Variants, change, moves

MOST_CALLS = 8  # of one check, where one call has a row for every cut


def probe_cuts(seq_len: int, most: int, seed: int) -> list[int]:
    """Where suffixes start: everywhere or, in long rows, in somewhat more than `most` places.

    These are 1 and T - 1, those beside every power of two, since a leak inside chunks shows at no
    multiple of the chunk's length, and a stretch without gaps, for leaks across borders of chunks.
    """
    if seq_len - 1 <= most:
        return list(range(1, seq_len))
    powers = [2**k for k in range(1, seq_len.bit_length() + 1)]
    start = int(np.random.default_rng((seed, 3)).integers(1, seq_len - most))
    cuts = {1, seq_len - 1, *(n + side for n in powers for side in (-1, 1))}
    return sorted(cut for cut in cuts | {*range(start, start + most)} if 0 < cut < seq_len)


def odd_lengths(seq_len: int) -> list[int]:
    """Lengths to which inputs are cut; few, for every length is a shape to compile."""
    return sorted({1, min(2 * seq_len // 3 | 1, seq_len - 1), seq_len - 1})


class Worst:
    """Keeps the comparison that exceeds its tolerance by most."""

    def __init__(self, **more: Any):
        """Nothing compared so far; see `findings.holds` for `more`."""
        self.more = {"key": "difference"} | more
        self.ratio = -1.0
        self.found: list[Measure] = []
        self.refused: dict[str, Broken] = {}

    def add(self, moved: Any, limit: float, variant: Variant, how: str, **at: Any) -> None:
        """Compare changes of logits [B, T] that should be 0.

        Where rounding alone may move a logit by half of the largest there is, nothing is compared.
        """
        if limit >= variant.scale / 2:
            return
        row, position = (int(i) for i in np.unravel_index(np.argmax(moved), moved.shape))
        size = float(moved[row, position])
        if size / limit > self.ratio:
            self.ratio = size / limit
            what, where = f"largest change of a logit, {how}", f"{variant.name} parameters"
            at = {"row": row, "position": position, **at} if size > limit else {}
            worst = at_most(what, size, limit, where=where, **self.more)
            self.found = [worst, *(note(*x) for x in at.items())]

    @contextlib.contextmanager
    def refusal(self, what: str) -> Iterator[None]:
        """Let the function refuse a shape."""
        try:
            yield
        except Broken as broken:
            self.refused[what] = broken

    def measures(self) -> list[Measure]:
        """The worst difference, and what was refused, which is raised if that is all."""
        if not self.found:
            why = Skip("Not judged: rounding alone may move every logit by half its size.")
            raise next(iter(self.refused.values()), why)
        refused = [note(f"{what} was refused", str(why)) for what, why in self.refused.items()]
        return self.found + refused


@check(
    "A position sees later tokens, `distances` ahead. Look for a mask that is missing or shifted, "
    "for means, convolutions or norms over time, or for inputs made of the next token."
)
def suffix_swap(subject: Subject, causal: Variants) -> list[Measure]:
    """Replacing all tokens from a cut on leaves the logits before it as they are."""
    worst = Worst()
    for variant in causal:
        wide, base = variant.wide
        rng, rows, limit = subject.rng(10), len(wide), variant.same_shape
        cuts = probe_cuts(subject.seq_len, MOST_CALLS * rows, subject.seed)
        for first in range(0, len(cuts), rows):
            part = cuts[first : first + rows]
            tokens = wide.copy()
            for row, cut in enumerate(part):
                tokens[row, cut:] = subject.other_tokens(rng, tokens[row, cut:])
            moved = change(variant.logits(tokens), base)
            seen = []
            for row, cut in enumerate(part):
                before, how = moved[[row], :cut], f"tokens from {cut} on replaced"
                if before.max() > limit:
                    seen.append((before.max(), cut, how))
                else:
                    worst.add(before, limit, variant, how, cut=cut)
            # What a row sees may be another row: with one cut for all rows it is later tokens.
            for _, cut, how in sorted(seen)[-MOST_CALLS:]:
                before = variant.change(subject.replaced(rng, np.s_[:, cut:]))[:, :cut]
                ahead = cut - np.flatnonzero(before.max(0) > limit)
                reach = f"{ahead[-1]} to {ahead[0]}" if len(ahead) else "none"
                worst.add(before, limit, variant, how, cut=cut, distances=reach)
    return worst.measures()


@check(
    "With id 0 in the row a position sees later tokens. If 0 is padding, combine its mask with the "
    "causal one (and), and make it of earlier ids alone; else look for what treats 0 apart."
)
def id_zero(subject: Subject, causal: Variants) -> list[Measure]:
    """Id 0, which is often padding, at the end of a row lets no position see later tokens."""
    if not subject.lowest:
        raise Skip("Id 0 is among the ids of all checks, as there are few.")
    swapped, added = Worst(), Worst(otherwise="warn", key="by_zeros")
    end = 3 * subject.seq_len // 4
    cut = end // 2
    for variant in causal:
        tokens = subject.tokens.copy()
        tokens[:, end:] = 0
        try:
            base = variant.logits(tokens)
            tokens[:, cut:end] = subject.other_tokens(subject.rng(16), tokens[:, cut:end])
            moved, limit = change(variant.logits(tokens), base)[:, :cut], variant.same_shape
        except Broken as broken:
            return [holds(False, "with id 0 in a row", str(broken), otherwise="warn")]
        swapped.add(moved, limit, variant, f"0 from {end} on, tokens from {cut} on replaced")
        # A model may well count its padding, so this may be meant.
        moved = change(base, variant.base)[:, :end]
        added.add(moved, limit, variant, f"0 from {end} on in place of other ids")
    return [*added.measures(), *swapped.measures()]


@check(
    "What a position computes depends on how long the input is. Look for a reshape of heads and "
    "time without a transpose, for sums over time, or for sizes taken from T."
)
def truncation(subject: Subject, causal: Variants) -> list[Measure]:
    """The logits of the first n tokens are the first n logits of all tokens."""
    worst = Worst()
    for variant in causal:
        for n in odd_lengths(subject.seq_len):
            with worst.refusal(f"length {n}"):
                moved = variant.change(subject.tokens[:, :n])
                worst.add(moved, variant.other_shape, variant, f"cut to {n} tokens")
    try:
        return worst.measures()
    except Broken as broken:
        raise Skip(f"The model takes no shorter input: {broken}.") from broken


@check(
    "A row's logits depend on the other rows of the batch. Look for attention over the batch axis, "
    "keys and values of one row used for all, or statistics over the batch."
)
def row_independence(subject: Subject, variants: Variants) -> list[Measure]:
    """Replacing, permuting or leaving out the other rows leaves a row's logits as they are."""
    worst, rows = Worst(), subject.rows
    for variant in variants:
        rng, same, other = subject.rng(12), variant.same_shape, variant.other_shape
        for row in {0, rows - 1}:
            tokens = subject.replaced(rng, np.arange(rows) != row)
            worst.add(variant.change(tokens)[[row]], same, variant, "the other rows replaced")
            with worst.refusal("a batch of one"):
                moved = change(variant.logits(subject.tokens[[row]]), variant.base[[row]])
                worst.add(moved, other, variant, "the row alone in the batch")
        order = np.roll(np.arange(rows), 1)
        moved = change(variant.logits(subject.tokens[order]), variant.base[order])
        worst.add(moved, other, variant, "rows permuted")
        wide, logits = variant.wide
        if len(wide) > rows:
            moved = change(logits, variant.base[np.arange(len(wide)) % rows])
            worst.add(moved, other, variant, "more rows in the batch")
    return worst.measures()


@check(
    "Earlier tokens have no effect on later logits. Look for attention over the wrong axis, a mask "
    "that shows only the position itself, or a branch that is multiplied by zero."
)
def context_use(subject: Subject, variants: Variants) -> Measure:
    """Replacing all earlier tokens changes the logits of every row."""
    half, found = subject.seq_len // 2, []
    # Where attention is local to blocks a cut may be a border; the next one is none then.
    for variant, cut in itertools.product(variants, (half, half + 1)):
        rng = subject.rng(13)
        # One row at a time: what comes from another row is no context.
        tokens = [subject.replaced(rng, np.s_[row, :cut]) for row in range(subject.rows)]
        moved = min(variant.change(t)[row, cut:].max() for row, t in enumerate(tokens))
        found.append((moved, variant))
        if moved > variant.same_shape:
            break
    least, variant = max(found, key=lambda pair: pair[0] / pair[1].same_shape)
    what, more = "change of later logits by earlier tokens, of the row with the least", {}
    if subject.params is None:
        why = "a projection that starts at zero looks the same; give params to tell"
        more = {"otherwise": "warn", "where": why}
    return moves(what, least, variant.same_shape, key="least_change", **more)


@check(
    "The two implementations do not compute the same function. Compare head by head: the mask, the "
    "mapping of query to key heads (repeat, not tile), the window and the last block."
)
def reference(subject: Subject, variants: Variants, reference: Function) -> list[Measure]:
    """Another implementation of the same function gives the same logits at every length."""
    worst = Worst()
    for variant in variants:
        for n in (*odd_lengths(subject.seq_len), subject.seq_len):
            with worst.refusal(f"length {n}"):
                tokens = subject.tokens[:, :n]
                moved = change(variant.logits(tokens), variant.logits(tokens, reference))
                how = f"against the reference at {n} tokens"
                worst.add(moved, variant.other_shape, variant, how)
    return worst.measures()


# ---- Packed and padded rows --------------------------------------------------------------------


def documents(subject: Subject, splits: Sequence[int] = ()) -> np.ndarray:
    """Segment ids [B, T] of rows cut at `splits`, counted from 1."""
    ids = 1 + np.searchsorted(np.asarray(splits), np.arange(subject.seq_len), side="right")
    return np.tile(ids.astype(np.int32), (subject.rows, 1))


def outside(parts: dict, segmented: Function, ids: Any, variants: Variants) -> list[Measure]:
    """Replace the tokens of each part, a mask [B, T], and compare all logits outside it."""
    worst, subject = Worst(), variants[0].subject
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
def segment_isolation(subject: Subject, segmented: Function, variants: Variants) -> list[Measure]:
    """Replacing one document of a packed row leaves the logits of the others as they are."""
    ids = documents(subject, (subject.seq_len // 3 | 1, 2 * subject.seq_len // 3 | 1))
    parts = {f"document {i} of {ids.max()} in a row": ids == i for i in range(1, ids.max() + 1)}
    return outside(parts, segmented, ids, variants)


@check(
    "A document's logits depend on its place in the packed row. Let positions restart at 0 with "
    "every segment."
)
def segment_restart(subject: Subject, segmented: Function, variants: Variants) -> list[Measure]:
    """A document at the start of a row and the same one in its middle have the same logits."""
    # A power of two, so that the borders of blocks, if attention is local to them, move along.
    start = 1 << (subject.seq_len // 2).bit_length() - 1
    length = subject.seq_len - start
    moved = np.roll(subject.tokens, -start, axis=1)  # the second document first
    worst, how = Worst(), f"a document moved from {start} to the start of the row"
    # An angle of up to T radians is off by T roundings of float32 before it is rotated by.
    angles = 1 + subject.seq_len * 2.0**-24 / subject.precision.unit
    for variant in variants:
        packed = variant.logits(subject.tokens, segmented, documents(subject, (start,)))
        alone = variant.logits(moved, segmented, documents(subject, (length,)))
        gap = change(packed[:, start:], alone[:, :length])
        worst.add(gap, variant.other_shape * angles, variant, how)
    return worst.measures()


@check(
    "With padding in the batch a position sees later tokens or the padding. The padding mask must "
    "be combined with the causal mask (and), not replace it."
)
def padding_mask(subject: Subject, segmented: Function, causal: Variants) -> list[Measure]:
    """With padding at the end of a row, neither it nor later tokens change a position's logits."""
    real, ids = 2 * subject.seq_len // 3 | 1, documents(subject)
    ids[:, real:] = 0
    place = np.tile(np.arange(subject.seq_len), (subject.rows, 1))
    cuts = sorted({1, real // 2 | 1, real - 1, real})
    parts = {f"padding from {real} on, tokens from {cut} on": place >= cut for cut in cuts}
    return outside(parts, segmented, ids, causal)


@check(
    "A position without any key to attend to must give output 0 and gradient 0. Replace the scores "
    "before the softmax (and the result after it) with where, not only the result."
)
def masked_rows(subject: Subject, segmented: Function, variants: Variants) -> list[Measure]:
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
