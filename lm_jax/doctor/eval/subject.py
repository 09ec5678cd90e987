"""An evaluation and a generator as black boxes, and predictors planted in place of the model."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import Bound, Broken, Facts, call, function, mapping, require, whole

OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty")
Batches = list[tuple[np.ndarray, np.ndarray]]  # tokens and weights of each

_sizes = Bound(
    "give a list of whole numbers of 1 or more",
    lambda x: isinstance(x, Sequence) and all(map(whole(1).holds, x)),
)
_options = Bound(
    f"give names among {', '.join(OPTIONS)}",
    lambda x: isinstance(x, Collection) and not isinstance(x, str) and set(x) <= set(OPTIONS),
)
_triple = Bound(
    "give the context, the continued ids and their log-probabilities or None",
    lambda x: len(x) == 3,
)


@dataclasses.dataclass
class Subject(Facts):
    """Examine how a model is evaluated and sampled; what is not given is skipped by name.

    Functions get NumPy arrays and may return arrays of NumPy, JAX or PyTorch.
    """

    _: dataclasses.KW_ONLY
    vocab_size: Annotated[int, "V.", whole(2)]
    seq_len: Annotated[int, "T of the random tokens that the model is fed.", whole(2)] = 64
    seed: Annotated[int, "of tokens and planted predictors.", whole()] = 0
    compute_dtype: Annotated[
        str,
        "dtype of the forward pass, which sets rounding errors.",
        Bound("give the name of a float type, such as bfloat16", trees.names_float),
    ] = "float32"
    evaluate_fn: Annotated[
        Callable[..., Mapping[str, Any]] | None,
        "(predict, batch_size) -> {'loss', 'token_ppl', 'token_count'}, the whole evaluation of a "
        "small split (the first entry, in nats per target, is required), with the model replaced "
        "by predict(tokens [B, T]) -> logits [B, T, V], which JAX can trace and which answers "
        "tensors of PyTorch in kind. With strides it is called as (predict, batch_size, stride).",
        function,
    ] = None
    targets: Annotated[Any, "ids of all targets of that split, in any order."] = None
    batch_sizes: Annotated[
        Sequence[int], "sequences at a time.", _sizes, Bound("give one or more", bool)
    ] = (1, 7, 64)
    strides: Annotated[Sequence[int], "targets scored per window.", _sizes] = ()
    batches_fn: Annotated[
        Callable[[int, int], Iterable[Mapping[str, Any]]] | None,
        "(process, processes) -> batches of that split, with 'tokens' and 'weights' [B, ...], "
        "where a weight above 0 marks a target.",
        function,
    ] = None
    processes: Annotated[int, "number of processes to divide the batches among.", whole(1)] = 2
    logits_fn: Annotated[
        Callable[..., Any] | None, "(tokens [B, T]) -> logits [B, T, V] as in evaluation.", function
    ] = None
    train_logits_fn: Annotated[
        Callable[..., Any] | None,
        "(tokens [B, T], seed) -> logits as in training; only for a model that drops.",
        function,
    ] = None
    extend_fn: Annotated[
        Callable[..., Any] | None,
        "(tokens [B, n], cache) -> (logits [B, n, V], cache), cached decoding; the cache is None "
        "at the start.",
        function,
    ] = None
    continuation: Annotated[
        tuple[Any, Any, Any] | None,
        "(context ids, continued ids, log-probabilities or None) of a free generation; without "
        "log-probabilities it was greedy.",
        _triple,
    ] = None
    sampler: Annotated[
        Callable[..., Any] | None, "(logits [B, 16], seed, **options) -> ids [B].", function
    ] = None
    sampler_options: Annotated[
        Collection[str],
        "those it has of temperature, top_k, top_p and repetition_penalty; the last comes with "
        "'seen', ids [B, S].",
        _options,
    ] = ()
    never_sampled: Annotated[Collection[int], "ids that it never returns."] = ()
    loss: Annotated[float | None, "nats per token of the model."] = None
    references: Annotated[
        Mapping[str, float] | None,
        "perplexities 'uniform', 'unigram', 'kn2', 'kn3' on the same tokens, and 'entropy_rate' in "
        "nats.",
        mapping,
    ] = None

    def __post_init__(self) -> None:
        """Refuse targets outside the vocabulary as well."""
        super().__post_init__()
        if self.targets is not None:
            ids = trees.as_array(self.targets)
            ok = bool(ids.size) and np.issubdtype(ids.dtype, np.integer)
            ok = ok and 0 <= ids.min() and ids.max() < self.vocab_size
            require(ok, "targets", f"give whole numbers in [0, {self.vocab_size})")

    @property
    def eps(self) -> float:
        """Step of the compute dtype near 1."""
        return float(jnp.finfo(self.compute_dtype).eps)

    def evaluate(self, predict: Callable[[Any], Any], *how: int) -> dict[str, float]:
        """What the evaluation reports of a predictor; `loss` is among it."""
        assert self.evaluate_fn is not None
        found = call("evaluate_fn", self.evaluate_fn, predict, *how)
        if not isinstance(found, Mapping) or "loss" not in found:
            raise Broken("evaluate_fn returned no mapping with 'loss'")

        def number(name: str) -> float:
            return float(trees.as_array(found[name]).item())

        names = [name for name in ("loss", "token_ppl", "token_count") if name in found]
        return {name: call(f"float of {name} of evaluate_fn", number, name) for name in names}

    def batches(self, process: int, processes: int) -> Batches:
        """Tokens and weights of one process's batches."""
        assert self.batches_fn is not None
        made = self.batches_fn
        rows = []
        for batch in call("batches_fn", lambda: list(made(process, processes))):
            try:
                tokens, weights = (trees.as_array(batch[name]) for name in ("tokens", "weights"))
            except (TypeError, KeyError, IndexError):
                raise Broken("a batch of batches_fn has no 'tokens' and 'weights'") from None
            if tokens.shape != weights.shape:
                raise Broken(f"batches_fn: tokens {tokens.shape}, but weights {weights.shape}")
            rows.append((tokens, weights))
        return rows

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] as in evaluation."""
        assert self.logits_fn is not None
        made = call("logits_fn", self.logits_fn, tokens_BT.copy())
        return fit("logits_fn", made, (*tokens_BT.shape, self.vocab_size))


def fit(what: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The values in float64.

    Raises:
        Broken: if they have another shape, or one is NaN or infinite; a logit of -inf is in order.
    """
    found = trees.as_array(values)
    if found.shape != shape:
        raise Broken(f"{what} returned shape {found.shape}, expected is {shape}")
    found = found.astype(np.float64)
    if bad := int((~(found < np.inf)).sum()):
        raise Broken(f"{what} returned {bad} numbers that are NaN or infinite")
    return found


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances of logits; 0 where both are -inf."""
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a - b))


class Planted(NamedTuple):
    """A predictor that looks at nothing, in place of the model."""

    predict: Callable[[Any], Any]
    nats: float  # per target, exactly


def plant(logits_V: np.ndarray, counts_V: np.ndarray) -> Planted:
    """The predictor that gives these logits everywhere."""

    def predict(tokens: Any) -> Any:
        if hasattr(tokens, "detach"):  # a tensor of PyTorch
            return tokens.float().new_tensor(logits_V).repeat(*tokens.shape, 1)
        return jnp.broadcast_to(jnp.asarray(logits_V), (*np.shape(tokens), len(logits_V)))

    nats = counts_V @ -numbers.log_softmax(logits_V) / counts_V.sum()
    return Planted(predict, float(nats))


@fixture
def counts_V(targets: Any, vocab_size: int) -> np.ndarray:
    """How often each id is a target."""
    return np.bincount(trees.as_array(targets).ravel(), minlength=vocab_size)


@fixture
def noisy(subject: Subject, counts_V: np.ndarray) -> Planted:
    """A predictor whose costs per token differ by nats."""
    logits_V = subject.rng().normal(0, 3, subject.vocab_size).astype(np.float32)
    return plant(logits_V, counts_V)


@fixture
def reported(subject: Subject, evaluate_fn: Any, noisy: Planted) -> dict[int, dict[str, float]]:
    """What the evaluation reports of that predictor, by batch size."""
    return {size: subject.evaluate(noisy.predict, size) for size in subject.batch_sizes}


@fixture
def alone(subject: Subject, batches_fn: Any) -> Batches:
    """The batches of a single process."""
    found = subject.batches(0, 1)
    if not found:
        raise Broken("batches_fn(0, 1) yields no batch")
    return found


@fixture
def tokens_BT(subject: Subject) -> np.ndarray:
    """Random tokens [2, T]."""
    shape = (2, subject.seq_len)
    return subject.rng().integers(0, subject.vocab_size, shape, dtype=np.int32)


@fixture
def logits_BTV(subject: Subject, logits_fn: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """Their logits as in evaluation."""
    return subject.logits(tokens_BT)
