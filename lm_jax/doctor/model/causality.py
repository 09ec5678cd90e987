"""Does a position see what it must not: later tokens, other rows, other documents?"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.model.subject import Model, Variant, is_float_leaf
from lm_jax.doctor.old import Skip, Verdict, call, check, verdict

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
    """Lengths to which inputs are cut: 1, about two thirds, odd, and T - 1.

    Every length is a shape to compile, so they are few.
    """
    return sorted({1, min(2 * seq_len // 3 | 1, seq_len - 1), seq_len - 1})


def largest(difference: np.ndarray) -> tuple[float, list[int]]:
    """The largest magnitude of [B, T, V] and its row, position and id."""
    magnitude = np.abs(difference)
    where = np.unravel_index(np.argmax(magnitude), magnitude.shape)
    return float(magnitude[where]), [int(i) for i in where]


class Worst:
    """Keeps the comparison that exceeds its tolerance by most."""

    def __init__(self) -> None:
        """Nothing compared so far."""
        self.ratio, self.made, self.over, self.blind = -1.0, 0, 0, 0
        self.values: dict[str, Any] = {}

    def add(self, difference: np.ndarray, tolerance: float, variant: Variant, **about: Any) -> None:
        """Compare a difference of logits [B, T, V] that should be 0.

        Where rounding alone may move a logit by as much as the largest there is, nothing is
        compared.
        """
        if tolerance >= variant.scale:
            self.blind += 1
            return
        size, (row, position, _) = largest(difference)
        self.made += 1
        self.over += size > tolerance
        if size / tolerance > self.ratio:
            self.ratio = size / tolerance
            self.values = {
                "difference": size,
                "tolerance": tolerance,
                "largest_logit": variant.scale,
                "parameters": variant.name,
                "row": row,
                "position": position,
                **about,
            }

    def verdict(self, what: str, threshold: str, note: str = "") -> Verdict:
        """Pass if no difference exceeded its tolerance.

        Args:
            what: the comparison in words, a format string of the values.
            threshold: where the tolerance comes from.
            note: added to the evidence.
        """
        if not self.made:
            raise Skip(
                f"rounding may move every logit by its own size ({threshold}): no comparison"
            )
        if self.blind:
            note = (
                f" {self.blind} more were not made: rounding may be as large as the logits.{note}"
            )
        v: dict[str, Any] = {**self.values, "comparisons": self.made, "over": self.over}
        evidence = (
            f"{what.format(**v)}: logits of position {v['position']} in row {v['row']} differ by "
            f"{v['difference']:.3g}, allowed {v['tolerance']:.2g} ({threshold}; largest logit "
            f"{v['largest_logit']:.3g}, {v['parameters']} parameters). {self.over} of {self.made} "
            f"comparisons exceed what is allowed.{note}"
        )
        return verdict(self.ratio <= 1, evidence, **v)


SAME = "rounding of float32 in calls of the same shape"


def other(model: Model) -> str:
    """Where the tolerance between calls of different shapes comes from."""
    return f"8 roundings of {model.precision[1]}"


@check(
    "causality.suffix_swap",
    remedy="A position sees later tokens. Look for a missing or shifted causal mask, a mean, "
    "convolution or normalisation over time, or input features built from the next token.",
)
def suffix_swap(model: Model) -> Verdict:
    """Replace all tokens from a cut on; the logits before it must not change."""
    model.causal_only()
    worst = Worst()
    for variant in model.variants:
        rng, rows = model.rng(10), len(variant.wide)
        cuts = probe_cuts(model.seq_len, MOST_CALLS * rows, model.seed)
        for first in range(0, len(cuts), rows):
            tokens = model.wide.copy()
            for row, cut in enumerate(cuts[first : first + rows]):
                tokens[row, cut:] = model.other_tokens(rng, tokens[row, cut:])
            change = variant.logits(tokens) - variant.wide
            seen = []
            for row, cut in enumerate(cuts[first : first + rows]):
                before = change[row : row + 1, :cut]
                if np.abs(before).max() > variant.same_shape:
                    seen.append((np.abs(before).max(), cut))
                else:
                    worst.add(before, variant.same_shape, variant, cut=cut, row=row)
            # What a row sees may be another row: with one cut for all rows it is later tokens.
            for _, cut in sorted(seen)[-MOST_CALLS:]:
                tokens = model.tokens.copy()
                tokens[:, cut:] = model.other_tokens(rng, tokens[:, cut:])
                change = variant.logits(tokens)[:, :cut] - variant.base[:, :cut]
                worst.add(change, variant.same_shape, variant, cut=cut)
    return worst.verdict("Tokens from {cut} on replaced", SAME)


@check(
    "causality.token_swap",
    remedy="A position sees a later token; the distance says how far ahead. Distance 1 is a mask "
    "shifted by one, or a label that is part of the input.",
)
def token_swap(model: Model) -> Verdict:
    """Replace one token; the logits before it must not change."""
    model.causal_only()
    worst = Worst()
    last = model.seq_len - 1
    for variant in model.variants:
        rng = model.rng(11)
        for place in sorted({1, last // 3 | 1, 2 * last // 3 | 1, last}):
            tokens = model.tokens.copy()
            tokens[:, place] = model.other_tokens(rng, tokens[:, place])
            change = variant.logits(tokens)[:, :place] - variant.base[:, :place]
            moved = np.flatnonzero(np.abs(change).max((0, 2)) > variant.same_shape)
            reach = f"{place - moved[-1]} to {place - moved[0]}" if len(moved) else "none"
            worst.add(change, variant.same_shape, variant, place=place, distances=reach)
    return worst.verdict(
        "Token {place} alone replaced; distances ahead that are seen: {distances}", SAME
    )


@check(
    "causality.truncation",
    remedy="What a position computes depends on how long the input is. Look for a reshape of "
    "heads and time without a transpose, for sums over time, or for sizes taken from T.",
)
def truncation(model: Model) -> Verdict:
    """The logits of the first n tokens must be the first n logits of all tokens."""
    model.causal_only()
    worst, refused = Worst(), {}
    for variant in model.variants:
        for n in odd_lengths(model.seq_len):
            try:
                short = variant.logits(model.tokens[:, :n])
            except Skip as reason:
                refused[n] = str(reason)
                continue
            worst.add(short - variant.base[:, :n], variant.other_shape, variant, length=n)
    if refused and not worst.made + worst.blind:
        raise Skip(f"the model takes no shorter input: {next(iter(refused.values()))}")
    note = f" Lengths {sorted(refused)} were refused by the model." if refused else ""
    return worst.verdict(f"Cut to {{length}} of {model.seq_len} tokens", other(model), note)


@check(
    "causality.row_independence",
    remedy="A row's logits depend on the other rows of the batch. Look for attention over the "
    "batch axis, keys and values of one row used for all, or statistics over the batch.",
)
def row_independence(model: Model) -> Verdict:
    """Replace or permute the other rows, or leave them out; a row must not change."""
    worst = Worst()
    note = ""
    rows = model.batch_size
    for variant in model.variants:
        rng = model.rng(12)
        for row in {0, rows - 1}:
            others = np.arange(rows) != row
            tokens = model.tokens.copy()
            tokens[others] = model.other_tokens(rng, tokens[others])
            change = (variant.logits(tokens) - variant.base)[row : row + 1]
            worst.add(change, variant.same_shape, variant, how="the other rows replaced")
        order = np.roll(np.arange(rows), 1)
        change = variant.logits(model.tokens[order]) - variant.base[order]
        worst.add(change, variant.other_shape, variant, how="rows permuted")
        if len(variant.wide) > rows:
            change = variant.wide - variant.base[np.arange(len(variant.wide)) % rows]
            worst.add(change, variant.other_shape, variant, how="more rows in the batch")
        try:
            for row in {0, rows - 1}:
                alone = variant.logits(model.tokens[row : row + 1])
                change = alone - variant.base[row : row + 1]
                worst.add(change, variant.other_shape, variant, how="the row alone in the batch")
        except Skip as reason:
            note = f" A batch of one was refused: {reason}."
    return worst.verdict("With {how}", f"{SAME}, else {other(model)}", note)


@check(
    "causality.context_use",
    remedy="Earlier tokens have no effect on later logits: the model is a bigram table at best. "
    "Look for attention over the wrong axis, a mask that shows only the position itself, or a "
    "branch that is multiplied by zero.",
)
def context_use(model: Model) -> Verdict:
    """Replace the first half of the tokens; the logits of the second half must change."""
    half = model.seq_len // 2
    rows: dict[str, dict[str, float]] = {}
    used = False
    for variant in model.variants:
        rng, change = model.rng(13), np.zeros(model.batch_size)
        # One row at a time: what comes from another row is no context.
        for row in range(model.batch_size):
            tokens = model.tokens.copy()
            tokens[row, :half] = model.other_tokens(rng, tokens[row, :half])
            change[row] = np.abs((variant.logits(tokens) - variant.base)[row, half:]).max()
        used |= bool((change > variant.same_shape).all())
        rows[variant.name] = {"least_change": float(np.min(change)), "rounding": variant.same_shape}
    evidence = f"Tokens before {half} replaced, one row at a time: logits after it change by " + (
        " and ".join(
            f"{v['least_change']:.3g} at least ({name} parameters, rounding {v['rounding']:.2g})"
            for name, v in rows.items()
        )
    )
    if not used and model.params is None:
        evidence += ". A projection that starts at zero would look the same; give params to tell"
        return verdict(False, evidence + ".", otherwise="warn", variants=rows)
    return verdict(used, evidence + ".", variants=rows)


def documents(model: Model, splits: Sequence[int]) -> np.ndarray:
    """Segment ids [B, T] of rows cut at `splits`, counted from 1."""
    ids = 1 + np.searchsorted(np.asarray(splits), np.arange(model.seq_len), side="right")
    return np.tile(ids.astype(np.int32), (model.batch_size, 1))


def needs_segments(model: Model) -> Callable[..., Any]:
    """The function with segment ids, or a skip."""
    if model.segmented is None:
        raise Skip("no function with segment ids was given (segmented)")
    return model.segmented


@check(
    "causality.segment_isolation",
    remedy="A document sees its neighbours in the packed row. Combine the causal mask with "
    "segment[t] == segment[s] in every layer, or do not pack.",
)
def segment_isolation(model: Model) -> Verdict:
    """Replace one document of a packed row; the others must not change."""
    segmented = needs_segments(model)
    first, second = model.seq_len // 3 | 1, 2 * model.seq_len // 3 | 1
    ids = documents(model, (first, second))
    worst = Worst()
    for variant in model.variants:
        rng = model.rng(14)
        base = variant.logits(model.tokens, segmented, ids)
        for document in range(1, ids.max() + 1):
            inside = ids == document
            tokens = np.where(inside, model.other_tokens(rng, model.tokens), model.tokens)
            change = variant.logits(tokens, segmented, ids) - base
            outside = np.where(inside[..., None], 0, change)
            worst.add(outside, variant.same_shape, variant, document=document)
    return worst.verdict(f"Rows cut at {first} and {second}, document {{document}} replaced", SAME)


@check(
    "causality.segment_restart",
    remedy="A document's logits depend on its place in the packed row. Let positions restart at 0 "
    "with every segment.",
)
def segment_restart(model: Model) -> Verdict:
    """A document at the start of a row and the same in its middle must have the same logits."""
    segmented = needs_segments(model)
    start = model.seq_len // 3 | 1
    length = model.seq_len - start
    moved = np.roll(model.tokens, -start, axis=1)  # the second document first
    worst = Worst()
    for variant in model.variants:
        packed = variant.logits(model.tokens, segmented, documents(model, (start,)))
        alone = variant.logits(moved, segmented, documents(model, (length,)))
        # An angle of up to T radians is off by T roundings of float32 before it is rotated by.
        tolerance = variant.other_shape * (1 + model.seq_len * 2.0**-24 / model.precision[0])
        worst.add(packed[:, start:] - alone[:, :length], tolerance, variant, start=start)
    what = "Document moved from {start} to the start of the row"
    return worst.verdict(what, f"{other(model)}, and of angles of T radians")


@check(
    "causality.padding_mask",
    remedy="With padding in the batch a position sees later tokens or the padding. The padding "
    "mask must be combined with the causal mask (and), not replace it.",
)
def padding_mask(model: Model) -> Verdict:
    """With padding at the end, neither later tokens nor the padding may change the logits."""
    segmented = needs_segments(model)
    model.causal_only()
    real = 2 * model.seq_len // 3 | 1
    ids = documents(model, ())
    ids[:, real:] = 0
    worst = Worst()
    for variant in model.variants:
        rng = model.rng(15)
        base = variant.logits(model.tokens, segmented, ids)
        for cut in sorted({1, real // 2 | 1, real - 1, real}):
            tokens = model.tokens.copy()
            tokens[:, cut:] = model.other_tokens(rng, tokens[:, cut:])
            change = variant.logits(tokens, segmented, ids)[:, :cut] - base[:, :cut]
            worst.add(change, variant.same_shape, variant, cut=cut)
    return worst.verdict(f"Padding from {real} on, tokens from {{cut}} on replaced", SAME)


@check(
    "causality.masked_rows",
    remedy="A position without any key to attend to must give output 0 and gradient 0. Replace "
    "the scores before the softmax (and the result after it) with where, not only the result.",
)
def masked_rows(model: Model) -> Verdict:
    """Padding at the start and a row of padding alone: logits and gradient must be finite."""
    segmented = needs_segments(model)
    ids = documents(model, ())
    ids[0, : model.seq_len // 3 | 1] = 0
    ids[-1] = 0
    what = "Padding at the start of a row, and a row without tokens"
    for variant in model.variants:
        variant.logits(model.tokens, segmented, documents(model, ()))  # what fails here is no fault
        try:
            variant.logits(model.tokens, segmented, ids)
        except Skip as reason:
            return verdict(False, f"{what}: {reason}.")
    if model.params is None:
        return verdict(True, "All logits are finite; gradients need params and were not taken.")

    def total(params: Any) -> jax.Array:
        logits = segmented(params, jnp.asarray(model.tokens), jnp.asarray(ids))
        return jnp.where((ids > 0)[..., None], logits, 0).sum()

    try:
        grads = call("the gradient", jax.grad(total, allow_int=True), model.params)
    except Skip as reason:
        return verdict(True, f"All logits are finite; {reason}, so gradients were not taken.")
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, g in jax.tree.leaves_with_path(grads)
        if is_float_leaf(g) and not np.isfinite(np.asarray(g, np.float32)).all()
    ]
    evidence = (
        f"{what}: all logits are finite; {len(bad)} parameters have a non-finite gradient"
        f"{': ' if bad else ''}{', '.join(bad[:4])}."
    )
    return verdict(not bad, evidence, parameters=bad)


@check(
    "causality.reference",
    remedy="The two implementations do not compute the same function. Compare head by head: the "
    "mask, the mapping of query to key heads (repeat, not tile), the window and the last block.",
)
def reference(model: Model) -> Verdict:
    """Another implementation of the same function must give the same logits at every length."""
    if model.reference is None:
        raise Skip("no second implementation was given (reference)")
    worst, refused = Worst(), {}
    for variant in model.variants:
        for n in (*odd_lengths(model.seq_len), model.seq_len):
            tokens = model.tokens[:, :n]
            try:
                change = variant.logits(tokens) - variant.logits(tokens, model.reference)
            except Skip as reason:
                refused[n] = str(reason)
                continue
            worst.add(change, variant.other_shape, variant, length=n)
    if refused and not worst.made + worst.blind:
        raise Skip(next(iter(refused.values())))
    note = f" Not compared: {refused}." if refused else ""
    return worst.verdict("Against the reference at {length} tokens", other(model), note)


CHECKS = (
    suffix_swap,
    token_swap,
    truncation,
    row_independence,
    context_use,
    segment_isolation,
    segment_restart,
    padding_mask,
    masked_rows,
    reference,
)
