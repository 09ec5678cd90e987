"""A model as a black box: asked for logits, with the given and with randomised parameters."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.old import Skip, call, whole

CAUSAL = "causal"
OBJECTIVES = (CAUSAL, "bidirectional", "masked")
MOST_LOGITS = 1 << 24  # of one call
LEAF_STD = 0.3  # of randomised parameters up to a width of 32, as the leaks were measured


@dataclasses.dataclass
class Model:
    """What the user handed in, and the inputs that the checks put to it.

    The fields are the arguments of `examine_model`, which describes them.
    """

    fn: Callable[..., Any]
    vocab_size: int
    seq_len: int
    params: Any = None
    objective: str = CAUSAL
    trained: bool = False
    segmented: Callable[..., Any] | None = None
    train_fn: Callable[..., Any] | None = None
    attention: Callable[..., Any] | None = None
    reference: Callable[..., Any] | None = None
    batch_size: int = 3
    seed: int = 0
    sample: Any = None
    token_table: Any = None
    position_table: Any = None
    tied: bool = False
    init_std: Mapping[str, float] | None = None
    compute_dtype: str | None = None

    def __post_init__(self):
        """Refuse arguments that no check could use."""
        if not callable(self.fn):
            raise ValueError(f"fn is a {type(self.fn).__name__}; give a function of tokens [B, T].")
        for name in ("segmented", "train_fn", "attention", "reference"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ValueError(f"{name} is no function; give one, or leave it out.")
        for name, least in (("vocab_size", 2), ("seq_len", 4), ("batch_size", 2), ("seed", 0)):
            whole(getattr(self, name), name, least)
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective is {self.objective!r}; give one of {', '.join(OBJECTIVES)}."
            )
        if self.compute_dtype is not None and not names_float(self.compute_dtype):
            raise ValueError(f"compute_dtype is {self.compute_dtype!r}; give a float dtype.")
        if self.init_std is not None and not (
            isinstance(self.init_std, Mapping)
            and all(isinstance(std, int | float) for std in self.init_std.values())
        ):
            raise ValueError(f"init_std is {self.init_std!r}; give a mapping of patterns to stds.")
        # Id 0 stands for padding in many vocabularies, and a box may well act on it.
        self.lowest = 1 if self.vocab_size > 3 else 0
        self.tokens = self.random_tokens(self.rng(0), self.batch_size)
        rows = min(self.seq_len - 1, MOST_LOGITS // (self.seq_len * self.vocab_size))
        # The same rows again and again, for many comparisons in one call.
        self.wide = self.tokens[np.arange(max(rows, self.batch_size)) % self.batch_size]
        self.dropped = ""  # why the randomised parameters are not used

    def rng(self, stream: int) -> np.random.Generator:
        """Random numbers of their own for every check."""
        return np.random.default_rng((self.seed, stream))

    def random_tokens(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        """Independent uniform ids [rows, T], without 0 where the vocabulary allows."""
        return rng.integers(self.lowest, self.vocab_size, (rows, self.seq_len), dtype=np.int32)

    def other_tokens(self, rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
        """Ids that differ from `tokens` in every place."""
        span = self.vocab_size - self.lowest
        step = rng.integers(1, span, tokens.shape, dtype=np.int32)
        return self.lowest + (tokens - self.lowest + step) % span

    @functools.cached_property
    def given(self) -> "Variant":
        """The box with the parameters as given."""
        return Variant(self, "given", self.params)

    @functools.cached_property
    def randomised(self) -> "Variant":
        """The box with noise in place of every parameter."""
        return Variant(self, "randomised", randomise(self.params, self.seed))

    @property
    def variants(self) -> Iterator["Variant"]:
        """The box with the given parameters and, where they can be had, with randomised ones."""
        yield self.given
        if self.params is not None and not self.dropped:
            yield self.randomised

    @functools.cached_property
    def precision(self) -> tuple[float, str]:
        """Unit roundoff of the narrowest arithmetic inside, and how it is known.

        The logits alone do not tell: a bfloat16 model may well return float32.
        """
        if self.compute_dtype is not None:
            return roundoff(self.compute_dtype), f"{self.compute_dtype}, declared"
        narrow = [jnp.dtype(self.given.dtype)]
        try:
            text = str(call("tracing", jax.make_jaxpr(self.fn), *self.given.leading, self.tokens))
        except Skip:
            return roundoff(jnp.bfloat16), "bfloat16, as the inside cannot be seen"
        found = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
        narrow += [jnp.dtype(t) for name, t in found.items() if re.search(rf"\b{name}\[", text)]
        if jax.default_backend() != "cpu":  # float32 products may be rounded to fewer bits there
            return roundoff(jnp.bfloat16), f"{jax.default_backend()} products"
        dtype = max(narrow, key=roundoff)
        return roundoff(dtype), f"{dtype}, the narrowest dtype inside"

    def causal_only(self) -> None:
        """Skip a check that means nothing under the declared objective."""
        if self.objective != CAUSAL:
            raise Skip(f"the objective is declared {self.objective}: later tokens may be seen")


class Variant:
    """The black box with one set of parameters, and what rounding alone does to its logits."""

    def __init__(self, model: Model, name: str, params: Any):
        """Nothing runs before it is asked for."""
        self.model, self.name, self.params = model, name, params
        self.leading = () if params is None else (params,)
        self.dtype = np.dtype(np.float32)  # of the logits, known after the first call

    def logits(self, tokens: np.ndarray, fn: Callable | None = None, *more: Any) -> np.ndarray:
        """Logits [B, T, V] in float32 or wider; skips if the function fails or they are unfit.

        Args:
            tokens: ids [B, T].
            fn: asked in place of the model's function, with the same leading parameters.
            more: further arguments of `fn`.
        """
        name = "the model" if fn is None else getattr(fn, "__name__", "the function")
        # A copy: a function that writes into its argument must not spoil the next comparison.
        raw = call(name, fn or self.model.fn, *self.leading, tokens.copy(), *more)
        values = call(f"numpy.asarray of what {name} returned", as_array, raw)
        expected = (*tokens.shape, self.model.vocab_size)
        if values.shape != expected:
            raise Skip(f"{name} returned shape {list(values.shape)}, expected {list(expected)}")
        if not is_floating(values.dtype):
            raise Skip(f"{name} returned {values.dtype}, expected floating-point logits")
        self.dtype = values.dtype
        wide = values.astype(np.promote_types(np.float32, np.dtype(f"f{max(4, values.itemsize)}")))
        if not np.isfinite(wide).all():
            where = np.argwhere(~np.isfinite(wide))
            raise Skip(
                f"{name} returned {len(where)} non-finite of {wide.size} logits, the first at "
                f"[row, position, id] = {where[0].tolist()}, with the {self.name} parameters"
            )
        return wide

    @functools.cached_property
    def base(self) -> np.ndarray:
        """Logits of the model's own tokens."""
        return self.logits(self.model.tokens)

    @functools.cached_property
    def wide(self) -> np.ndarray:
        """Logits of the rows of `Model.wide`; no more rows than usual if the function refuses."""
        try:
            return self.logits(self.model.wide)
        except Skip:
            self.model.wide = self.model.tokens
            return self.base

    @functools.cached_property
    def scale(self) -> float:
        """Largest logit in magnitude."""
        return max(float(np.abs(self.base).max()), 1e-30)

    @functools.cached_property
    def same_shape(self) -> float:
        """Largest difference that rounding may leave between calls of the same shape.

        0 for most models. The bound is the rounding error of a transform over time in float32,
        which carries 2^-23 log2(T) of the largest value everywhere (Higham 2002, section 24.1).
        """
        return 8 * 2.0**-23 * np.log2(2 * self.model.seq_len) * self.scale

    @functools.cached_property
    def other_shape(self) -> float:
        """Largest difference that rounding may leave where sums are taken in another order.

        Eight roundings of the largest logit or, where that is more, four times what a relative
        change of all parameters by one rounding does: a backward stable sum is exact for
        parameters that near.
        """
        unit, _ = self.model.precision
        response = 0.0
        if self.params is not None:
            moved = Variant(self.model, self.name, nudge(self.params, unit, self.model.seed))
            response = float(np.abs(moved.logits(self.model.tokens) - self.base).max())
        return max(8 * unit * self.scale, 4 * response)


def roundoff(dtype: Any) -> float:
    """Largest relative error of rounding to a dtype."""
    return float(jnp.finfo(dtype).eps) / 2


def is_floating(dtype: Any) -> bool:
    """Whether the dtype is a float of any width, bfloat16 and the like included."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def as_array(value: Any) -> np.ndarray:
    """A NumPy array of anything that has one inside, PyTorch tensors of every dtype included."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
    return np.asarray(value)


def names_float(dtype: Any) -> bool:
    """Whether this is, or is the name of, a float dtype."""
    try:
        return is_floating(jnp.dtype(dtype))
    except TypeError:
        return False


def named_leaves(params: Any) -> dict[str, np.ndarray]:
    """Floating-point leaves by path, `a/b/0/c`; leaves that are the same object come once."""
    found: dict[str, np.ndarray] = {}
    seen: set[int] = set()
    for path, leaf in jax.tree.leaves_with_path(params):
        if is_float_leaf(leaf) and id(leaf) not in seen:
            seen.add(id(leaf))
            found[jax.tree_util.keystr(path, simple=True, separator="/")] = as_array(leaf)
    return found


def is_float_leaf(leaf: Any) -> bool:
    """Whether a leaf is an array of floats, of NumPy, JAX or PyTorch."""
    if hasattr(leaf, "is_floating_point"):
        return bool(leaf.is_floating_point())
    try:
        return hasattr(leaf, "dtype") and is_floating(leaf.dtype)
    except TypeError:  # a dtype of another framework, or of random keys
        return False


def randomise(params: Any, seed: int) -> Any:
    """Every floating-point leaf replaced by noise, so that nothing hides behind a zero or a one.

    N(0, 0.3^2), for matrices wider than 32 less by the root of the width, so that activations
    keep their size. Leaves that hold just two values are masks, not parameters, and stay.
    """
    rng = np.random.default_rng((seed, 1))

    def noise(leaf: Any) -> Any:
        if not is_float_leaf(leaf):
            return leaf
        values = as_array(leaf)
        if values.ndim > 1 and np.unique(values).size == 2:
            return leaf
        width = sorted(values.shape)[-2] if values.ndim > 1 else 1
        std = LEAF_STD * min(1.0, (32 / max(width, 1)) ** 0.5)
        return like(leaf, std * rng.standard_normal(values.shape))

    return jax.tree.map(noise, params)


def nudge(params: Any, size: float, seed: int) -> Any:
    """Every element of every floating-point leaf moved up or down by the relative `size`."""
    rng = np.random.default_rng((seed, 2))

    def move(leaf: Any) -> Any:
        if not is_float_leaf(leaf):
            return leaf
        values = as_array(leaf).astype(np.float64)
        return like(leaf, values * (1 + size * rng.choice([-1.0, 1.0], values.shape)))

    return jax.tree.map(move, params)


def like(leaf: Any, values: np.ndarray) -> Any:
    """`values` in the dtype and the kind of array of `leaf`."""
    if hasattr(leaf, "detach"):
        return leaf.detach().new_tensor(values)
    if isinstance(leaf, jax.Array):
        return jnp.asarray(values, leaf.dtype)
    return np.asarray(values).astype(leaf.dtype)
