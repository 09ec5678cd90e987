"""An evaluation and a generator as black boxes, and predictors planted in place of the model."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import Bound, Broken, Facts, above, array, call, function, require, whole

OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty")
REFERENCES = ("uniform", "unigram", "kn2", "kn3", "entropy_rate")

SIZES = Bound(
    "give a list of whole numbers of 1 or more",
    lambda x: isinstance(x, Sequence) and all(map(whole(1).holds, x)),
)
NAMES = Bound(
    f"give names among {', '.join(OPTIONS)}",
    lambda x: isinstance(x, Collection) and not isinstance(x, str) and set(x) <= set(OPTIONS),
)
FLOAT = Bound("give the name of a float type, such as bfloat16", trees.names_float)
TRIPLE = Bound("give context, continued ids and log-probabilities or None", lambda x: len(x) == 3)
NUMBER = Bound("give a number", lambda x: hasattr(x, "__float__"))
IDS = Bound("give a list of ids", lambda x: all(map(whole().holds, x)))
KNOWN = Bound(
    f"give numbers of at least 0 by names among {', '.join(REFERENCES)}",
    lambda x: set(x) <= set(REFERENCES) and all(map(above(0, or_equal=True).holds, x.values())),
)
Function = Annotated[Callable[..., Any] | None, function]


@dataclasses.dataclass
class Subject(Facts):
    """Examine how a model is evaluated and sampled; what is not given is skipped by name.

    A model of PyTorch:

        ids = torch.as_tensor
        doctor.examine_evaluation(vocab_size=V, logits_fn=lambda x: model(ids(x)).logits).show()

    Functions get NumPy arrays and may return arrays of NumPy, JAX or PyTorch. Tokens are [B, T],
    logits [B, T, V].
    """

    _: dataclasses.KW_ONLY
    vocab_size: Annotated[int, "V.", whole(2)]
    seq_len: Annotated[int, "T of the random tokens that the model is fed.", whole(2)] = 64
    seed: Annotated[int, "of tokens and planted predictors.", whole()] = 0
    compute_dtype: Annotated[str, "of the forward pass, for rounding.", FLOAT] = "float32"
    evaluate_fn: Annotated[
        Function,
        "(predict, batch_size[, stride]) -> {'loss', 'token_ppl', 'token_count'}, the whole "
        "evaluation of a small split. In place of the model it gets predict(tokens) -> logits, "
        "which answers tensors of PyTorch in kind and can be traced by JAX. The loss, in nats per "
        "target, is required; the perplexity may also be called 'ppl' or 'perplexity'.",
    ] = None
    targets: Annotated[Any, "ids of all targets of that split, in any order."] = None
    batch_sizes: Annotated[
        Sequence[int], "sequences at a time.", SIZES, Bound("give one or more", bool)
    ] = (1, 7, 64)
    strides: Annotated[Sequence[int], "targets scored per window.", SIZES] = ()
    batches_fn: Annotated[
        Function,
        "(process, processes) -> batches of that split, with 'tokens' and 'weights' [B, ...], "
        "where a weight above 0 marks a target.",
    ] = None
    processes: Annotated[int, "to divide the batches among.", whole(1)] = 2
    logits_fn: Annotated[Function, "(tokens) -> logits as in evaluation."] = None
    train_logits_fn: Annotated[
        Function, "(tokens, seed) -> logits as in training; only for a model that drops."
    ] = None
    extend_fn: Annotated[
        Function, "(tokens, cache) -> (logits, cache), cached decoding; first, the cache is None."
    ] = None
    continuation: Annotated[
        tuple[Any, Any, Any] | None,
        "(context ids, continued ids, log-probabilities) of a free generation; None for the last "
        "if it was greedy.",
        TRIPLE,
    ] = None
    sampler: Annotated[Function, "(logits [B, 16], seed, **options) -> ids [B]."] = None
    sampler_options: Annotated[
        Collection[str],
        "those it has of temperature, top_k, top_p and repetition_penalty; the last comes with "
        "'seen', ids [B, S].",
        NAMES,
    ] = ()
    never_sampled: Annotated[Collection[int], "ids that it never returns.", IDS] = ()
    loss: Annotated[float | None, "nats per token of the model.", NUMBER] = None
    references: Annotated[
        Mapping[str, float] | None,
        "perplexities 'uniform', 'unigram', 'kn2', 'kn3' on the same tokens, and 'entropy_rate' in "
        "nats.",
        KNOWN,
    ] = None

    def __post_init__(self) -> None:
        """Refuse targets outside the vocabulary as well."""
        super().__post_init__()
        if self.targets is not None:
            ok = Bound("", lambda x: are_ids(trees.as_array(x), self.vocab_size)).admits
            require(ok(self.targets), "targets", f"give whole numbers in [0, {self.vocab_size})")

    @property
    def eps(self) -> float:
        """Step of the compute dtype near 1."""
        return float(jnp.finfo(self.compute_dtype).eps)


def are_ids(ids: np.ndarray, vocab_size: int) -> bool:
    """Whether these are whole numbers inside the vocabulary, one or more."""
    if not (ids.size and np.issubdtype(ids.dtype, np.integer)):
        return False
    return bool(0 <= ids.min() and ids.max() < vocab_size)


def fit(what: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The values in float64.

    Raises:
        Broken: if they have another shape, or one is NaN or infinite; a logit of -inf is in order.
    """
    found = array(what, values)
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


@fixture
def tokens_BT(subject: Subject) -> np.ndarray:
    """Random tokens [2, T]."""
    shape = (2, subject.seq_len)
    return subject.rng().integers(0, subject.vocab_size, shape, dtype=np.int32)


@fixture
def forward(logits_fn: Any, vocab_size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Tokens [B, T] to logits [B, T, V] as in evaluation."""
    return lambda tokens: fit(
        "logits_fn", call("logits_fn", logits_fn, tokens.copy()), (*tokens.shape, vocab_size)
    )


@fixture
def logits_BTV(forward: Callable[[np.ndarray], np.ndarray], tokens_BT: np.ndarray) -> np.ndarray:
    """The logits of the random tokens."""
    return forward(tokens_BT)
