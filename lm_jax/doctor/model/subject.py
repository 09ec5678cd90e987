"""A model as a black box: asked for logits, with the given and with randomised parameters."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import (
    Bound,
    Broken,
    Facts,
    Skip,
    array,
    call,
    function,
    one_of,
    real,
    whole,
)
from lm_jax.doctor.findings import Finding, Measure, holds, shown
from lm_jax.doctor.numbers import FLOAT32_EPS, resolution, roundoff

Function = Callable[..., Any]
Maybe = Annotated[Function | None, function]
Stds = Mapping[str, float]
TREE = Bound(
    "give a tree of arrays; a class of your own must be a pytree of JAX",
    lambda tree: any(hasattr(x, "dtype") for x in jax.tree.leaves(tree) or [np.array(0)]),
)
NUMBERS = Bound("give numbers, by pattern", lambda x: all(map(real, dict(x).values())))
FLOAT = Bound("give a float dtype", trees.names_float)
CAUSAL = "causal"
OBJECTIVE = one_of(CAUSAL, "bidirectional", "masked")
MOST_LOGITS = 1 << 24  # kept of one call: beyond it there are fewer rows, then fewer of the ids


@dataclasses.dataclass
class Subject(Facts):
    """Examine the forward pass of a language model.

    NumPy goes in; what comes out may be of NumPy, JAX or PyTorch. The function is called about 50
    times, twice that with parameters, and last with those that were given. `torch_model` makes
    such a function of a PyTorch module; `params` and `train_fn`, which it has, need not be given.
    """

    fn: Annotated[Function, "(tokens int32 [B, T]), or (params, tokens), -> [B, T, V].", function]
    _: dataclasses.KW_ONLY
    vocab_size: Annotated[int, "V.", whole(2)]
    seq_len: Annotated[int, "T of most calls; shorter ones are tried as well.", whole(4)]
    params: Annotated[Any, "pytree of arrays; checks run again with noise for it.", TREE] = None
    objective: Annotated[str, "masked and bidirectional skip causal checks.", OBJECTIVE] = CAUSAL
    trained: Annotated[bool, "checks of fresh parameters are skipped."] = False
    segmented: Annotated[Maybe, "`fn` with segment_ids int32 [B, T] added, 0 for padding."] = None
    train_fn: Annotated[Maybe, "`fn` with dropout, and the number of the update added."] = None
    attention: Annotated[Maybe, "as `fn`, returns attention probabilities [..., T, T]."] = None
    reference: Annotated[Maybe, "another implementation of `fn`."] = None
    batch_size: Annotated[int | None, "rows of a batch; 3, or 2 of large logits.", whole(2)] = None
    seed: Annotated[int, "of the inputs and of the noise.", whole()] = 0
    sample: Annotated[Any, "ids [N, T] of text as a trained model was trained on."] = None
    token_table: Annotated[Any, "the token embedding, [V, D]."] = None
    position_table: Annotated[Any, "the position embedding, [T, D], if there is one."] = None
    tied: Annotated[bool, "`token_table` is declared to be the head as well."] = False
    init_std: Annotated[Stds | None, 'declared, by pattern of the path, "a/*/b".', NUMBERS] = None
    compute_dtype: Annotated[str | None, "narrowest dtype inside, where hidden.", FLOAT] = None

    def __post_init__(self) -> None:
        """Refuse what no check could use; copy what the function may change."""
        super().__post_init__()
        own = getattr(self.fn, "params", None)
        # What merely has an attribute of that name takes tokens alone.
        if self.params is None and own is not None and "params" in signature(self.fn).parameters:
            self.params, self.train_fn = own, self.train_fn or getattr(self.fn, "train_fn", None)
        # Leaves of one piece of memory are one parameter; it goes by the first of their names.
        before = trees.float_leaves(self.params)
        first = {(x.ctypes.data, x.size): name for name, x in reversed(before.items())}
        self.params = trees.copies(self.params)
        leaves = trees.float_leaves(self.params)
        self.leaves = {name: leaves[name] for name in before if name in first.values()}
        for name in ("token_table", "position_table"):
            if (table := getattr(self, name)) is not None:
                setattr(self, name, np.array(trees.as_array(table)))
        room = MOST_LOGITS // (self.seq_len * self.vocab_size)
        self.rows = self.batch_size or (3 if room else 2)
        # Id 0 stands for padding in many vocabularies, and a model may well act on it.
        self.lowest = 1 if self.vocab_size > 3 else 0
        size = (self.rows, self.seq_len)
        self.tokens = self.rng(0).integers(self.lowest, self.vocab_size, size, dtype=np.int32)
        # The same rows again and again, for many comparisons in one call.
        self.wide = self.tokens[np.arange(max(min(self.seq_len - 1, room), self.rows)) % self.rows]
        self.step = 1 + self.tokens.size * self.vocab_size // MOST_LOGITS  # from id to id compared
        self.given = Variant(self, "given", self.params)
        self.last: dict[int, tuple] = {}  # call of every function, and the variant it was of

    def other_tokens(self, rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
        """Ids that differ from `tokens` in every place, without 0 where the vocabulary allows."""
        span = self.vocab_size - self.lowest
        step = rng.integers(1, span, tokens.shape, dtype=np.int32)
        return self.lowest + (tokens - self.lowest + step) % span

    def replaced(self, rng: np.random.Generator, where: Any) -> np.ndarray:
        """The subject's tokens with others at an index."""
        tokens = self.tokens.copy()
        tokens[where] = self.other_tokens(rng, tokens[where])
        return tokens

    def restore(self) -> None:
        """Call what was last called with noise again: it may have put that into a module."""
        for variant, fn, *arguments in list(self.last.values()):
            if variant is not self.given:
                with contextlib.suppress(Broken):
                    self.given.ask("the function", fn, *arguments)

    @functools.cached_property
    def precision(self) -> "Precision":
        """The narrowest arithmetic inside; a bfloat16 model may well return float32 logits."""
        if self.compute_dtype is not None:
            return Precision(roundoff(self.compute_dtype), f"{self.compute_dtype}, declared")
        if (backend := jax.default_backend()) != "cpu":  # float32 products may be rounded more
            return Precision(roundoff(jnp.bfloat16), f"{backend} products")
        narrow: list[Any] = [self.given.dtype, *(x.dtype for x in self.leaves.values())]
        how = "the narrowest dtype inside"
        try:
            text = str(jax.make_jaxpr(self.fn)(*self.given.leading, self.tokens))
            inside: dict[str, Any] = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
            narrow += [t for name, t in inside.items() if re.search(rf"\b{name}\[", text)]
        except Exception:  # of code that is not JAX's
            if not self.leaves:
                return Precision(roundoff(jnp.bfloat16), "bfloat16, as the inside cannot be seen")
            how = "the narrowest of parameters and logits"
            some = self.given.base[0, :4]
            if np.unique(some).size > some.size // 2 and resolution(some) == 2.0**-7:
                narrow.append(jnp.bfloat16)
        dtype = max(map(jnp.dtype, narrow), key=roundoff)
        return Precision(roundoff(dtype), f"{dtype}, {how}")


class Precision(NamedTuple):
    """Unit roundoff of an arithmetic, and how it is known."""

    unit: float
    how: str


class Variant:
    """The black box with one set of parameters, and what rounding alone does to its logits."""

    def __init__(self, subject: Subject, name: str, params: Any):
        """Nothing runs before it is asked for."""
        self.subject, self.name, self.params = subject, name, params
        self.leading = () if params is None else (params,)
        self.dtype = np.dtype(np.float32)  # of the logits, known after the first call

    def ask(self, name: str, fn: Function, tokens: np.ndarray, *more: Any) -> Any:
        """What a function returns with these parameters."""
        self.subject.last[id(fn)] = (self, fn, tokens, *more)
        # A copy: a function that writes into its argument must not spoil the next comparison.
        return call(name, fn, *self.leading, tokens.copy(), *more)

    def logits(self, tokens: np.ndarray, fn: Function | None = None, *more: Any) -> np.ndarray:
        """A copy of the logits to compare; see `all_logits`."""
        return self.all_logits(tokens, fn, *more)[..., :: self.subject.step].copy()

    def all_logits(self, tokens: np.ndarray, fn: Function | None = None, *more: Any) -> np.ndarray:
        """Logits [B, T, V] in float32 or wider, 0 for ids that are masked at every position.

        Of `fn`, if given, in place of the model's function, with `more` arguments. Raises `Broken`
        if it raises or returns no such logits, all finite.
        """
        name = "the model" if fn is None else getattr(fn, "__name__", "the function")
        raw = trees.logits_of(self.ask(name, fn or self.subject.fn, tokens, *more), *tokens.shape)
        values = array(name, raw)
        expected = (*tokens.shape, self.subject.vocab_size)
        if values.shape != expected:
            raise Broken(f"{name} returned shape {list(values.shape)}, expected {list(expected)}")
        if not trees.is_floating(values.dtype):
            raise Broken(f"{name} returned {values.dtype}, expected floating-point logits")
        self.dtype = values.dtype
        values = values.astype(np.float64 if values.itemsize > 4 else np.float32, copy=False)
        if values.min() <= -trees.MASK_VALUE:  # a padded vocabulary, perhaps
            padding = (values <= -trees.MASK_VALUE).all((0, 1))
            values = values if padding.all() else np.where(padding, 0, values)
        if not np.isfinite(values.sum()) and len(where := np.argwhere(~np.isfinite(values))):
            raise Broken(
                f"{name} returned {len(where)} non-finite of {values.size} logits, the first at "
                f"[row, position, id] = {where[0].tolist()}, with the {self.name} parameters"
            )
        return values

    def change(self, tokens: np.ndarray) -> np.ndarray:
        """Largest change of a logit [B, T] from `base`, for as many rows and positions."""
        return change(self.logits(tokens), self.base)

    @functools.cached_property
    def base(self) -> np.ndarray:
        """Logits of the subject's own tokens."""
        return self.logits(self.subject.tokens)

    @functools.cached_property
    def wide(self) -> tuple[np.ndarray, np.ndarray]:
        """Many rows and their logits; no more rows than usual if the function refuses."""
        tokens = self.subject.wide
        with contextlib.suppress(Broken):
            if len(tokens) > self.subject.rows:
                return tokens, self.logits(tokens)
        return self.subject.tokens, self.base

    @functools.cached_property
    def scale(self) -> float:
        """Largest logit in magnitude."""
        return max(float(self.base.max()), -float(self.base.min()), 1e-30)

    @functools.cached_property
    def same_shape(self) -> float:
        """Largest difference that rounding may leave between calls of the same shape.

        0 for most models; a transform over time in float32 carries 2^-23 log2(T) of the largest
        value everywhere (Higham 2002, section 24.1).
        """
        return float(8 * FLOAT32_EPS * np.log2(2 * self.subject.seq_len) * self.scale)

    @functools.cached_property
    def other_shape(self) -> float:
        """Largest difference that rounding may leave where sums are taken in another order.

        Eight roundings of the largest logit, or four times what one rounding of all parameters
        does: a backward stable sum is exact for parameters that near.
        """
        unit, subject = self.subject.precision.unit, self.subject
        nudged = Variant(subject, self.name, trees.nudge(self.params, unit, subject.seed))
        response = 0 if self.params is None else change(nudged.base, self.base).max()
        return max(8 * unit * self.scale, 4 * float(response))


Variants = list[Variant]


def change(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest difference over ids [B, T] of logits [B, T, V], as far as both reach."""
    time = min(a.shape[1], b.shape[1])
    # A row at a time: with a large vocabulary the logits of a batch take hundreds of megabytes.
    return np.stack(
        [np.abs(x[:time] - y[:time]).max(-1, initial=0) for x, y in zip(a, b, strict=False)]
    )


def moves(what: str, change: Any, rounding: float, **more: Any) -> Measure:
    """A change that must be larger than rounding. See `findings.holds` for `more`."""
    ok, limit = bool(change > rounding), f"more than {shown(rounding)}"
    return holds(ok, what, float(change), limit=limit, **more)


@fixture
def leaves(subject: Subject, params: Any) -> trees.Arrays:
    """Floating-point leaves by path, as they were given."""
    if not subject.leaves:
        raise Skip("params holds no floating-point array of NumPy, JAX or PyTorch.")
    return subject.leaves


@fixture
def noisy(subject: Subject, params: Any, leaves: trees.Arrays) -> Variant:
    """The box with noise in place of every parameter, if it bears that."""
    made = Variant(subject, "randomised", trees.randomise(params, subject.seed))
    try:
        made.scale  # noqa: B018
    except Broken as broken:
        raise Skip(f"{broken}: a leak behind a zero gate is not seen.") from broken
    return made


@fixture
def variants(subject: Subject, eval_repeats: Finding, noisy: Variant | None = None) -> Variants:
    """The box with the given parameters and, where they can be had, with randomised ones."""
    return [subject.given] if noisy is None else [subject.given, noisy]


@fixture
def causal(objective: str, variants: Variants) -> Variants:
    """The variants, where the objective does not let positions see later tokens."""
    if objective != CAUSAL:
        raise Skip(f"The objective is declared {objective}: later tokens may be seen.")
    return variants
