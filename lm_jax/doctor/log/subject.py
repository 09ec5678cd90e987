"""What is known of a run: its log, and what is declared about it."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import Bound, Facts, Skip, above, mapping, real, whole
from lm_jax.doctor.log.read import METRICS, PREFIXES, Problem
from lm_jax.doctor.log.series import EMPTY, Records, Series, noise, pairs

SUBWORDS = 1000  # ids; with fewer, low perplexities are ordinary: characters, made-up tasks
_LOSS_WORDS = {"nll", "ce", "kl", "xent", "bpb", "bpc"}
_NO_LOSS = re.compile(r"scale|weight|coef|count|lambda|best|delta")

Amount = Annotated[float | None, above(0)]
Rate = Annotated[float | None, above(0, or_equal=True)]
Sizes = int | Mapping[str, int] | None
Texts = Mapping[str, Any]
Rows = Iterable[Mapping[str, Any]]


def _list_of(remedy: str, holds: Callable[[Any], bool]) -> Bound:
    """A sequence of which every item holds."""
    kinds = Sequence | np.ndarray
    return Bound(
        remedy, lambda x: isinstance(x, kinds) and not isinstance(x, str) and all(map(holds, x))
    )


def _amounts(x: Any) -> bool:
    """Positive numbers by name; an entropy rate may be 0."""
    return isinstance(x, Mapping) and all(
        real(v) and (v > 0 or (v == 0 and k == "entropy_rate")) for k, v in x.items()
    )


_SIZES = Bound(
    "give a number above 0, or one for each split by name",
    lambda x: _amounts(x if isinstance(x, Mapping) else {"valid": x}),
)
_REFERENCES = Bound('give a mapping like {"unigram": 760.0}', _amounts)
_RESUMES = _list_of("give a list of updates", whole().holds)
_BUDGETS = _list_of(
    'give rows with "stated" and at least one factor, all above 0',
    lambda x: _amounts(x) and "stated" in x and len(x) > 1,
)
_COMPARISONS = _list_of(
    'give rows with "name", "tokenizer", "corpus" and "unit"',
    lambda x: isinstance(x, Mapping) and "name" in x,
)
_PROBLEMS = _list_of("give those that read_log returned", lambda x: isinstance(x, Problem))
_NAMES = _list_of("give a list of names", lambda x: isinstance(x, str))


class Overfit(NamedTuple):
    """Nats of a split that was lowest at a step and rose again."""

    start: float  # of the split or of the training, whichever is higher
    low: float
    step: int
    end: float


@dataclasses.dataclass
class Subject(Facts):
    """Say what a run's metrics rule out, and which check decides what they leave open.

    Every argument but the first is optional: a check that lacks something is skipped and says
    what. Steps may be counted from 0 or from 1. Losses in bits, whose perplexity is 2^loss in every
    row, are judged in nats.
    """

    records: Annotated[
        Rows | Records,
        'rows like {"step": 10, "train/loss": 9.5} in the order of the log, named as '
        "`read.METRICS`; None is a non-finite value. A `Records` may be added to.",
    ]
    _: dataclasses.KW_ONLY
    vocab_size: Annotated[int | None, "number of ids the model can predict.", whole(2)] = None
    split_tokens: Annotated[Sizes, "tokens in valid, or in each split by name.", _SIZES] = None
    train_tokens: Annotated[Amount, "tokens in the training split."] = None
    tokens_per_step: Annotated[Amount, "tokens of an update, if data/tokens is not logged."] = None
    parameters: Annotated[Amount, "parameters, without tables only looked up."] = None
    peak_flops: Annotated[Amount, "FLOP/s of all devices together."] = None
    lr_peak: Annotated[Amount, "configured peak learning rate."] = None
    lr_end: Annotated[Rate, "configured learning rate of the last update."] = None
    steps: Annotated[Amount, "configured updates; a shorter log is not judged by its end."] = None
    resumes: Annotated[Sequence[int], "updates after which the run was resumed.", _RESUMES] = ()
    overfit: Annotated[bool, "the run overfits a batch on purpose."] = False
    references: Annotated[
        Mapping[str, float] | None,
        "perplexities `unigram` and `kn2` of the evaluated tokens, and `entropy_rate` of their "
        "source in nats, as in `eval_<split>.json`.",
        _REFERENCES,
    ] = None
    budgets: Annotated[
        Sequence[Mapping[str, float]],
        'rows like {"stated": 6e9, "steps": 30000, "tokens": 131072}, a product and its factors.',
        _BUDGETS,
    ] = ()
    comparisons: Annotated[
        Sequence[Texts],
        "other perplexities, each with `name`, `tokenizer`, `corpus` and `unit` (token, byte).",
        _COMPARISONS,
    ] = ()
    measured_on: Annotated[Texts | None, "the same of this run's perplexities.", mapping] = None
    problems: Annotated[Sequence[Problem], "unread lines, from `read_log`.", _PROBLEMS] = ()
    columns: Annotated[Texts | None, "column -> metric, from `read_log`.", mapping] = None
    ignored: Annotated[Sequence[str], "columns not used, from `read_log`.", _NAMES] = ()

    def __post_init__(self) -> None:
        """Sort the rows by column; see `Facts` and `Records` for the errors."""
        super().__post_init__()
        self.rows = self.records if isinstance(self.records, Records) else Records(self.records)

    # ---- Columns --------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether any row holds the column."""
        return name in self.rows.names

    def series(self, name: str) -> Series:
        """The rows of a column, losses in nats; Skip if there is none."""
        if not self.has(name):
            raise Skip(f"The log has no {name}.")
        found = self.rows.series(name)
        return Series(found.steps, found.values * math.log(2)) if self.in_bits(name) else found

    def finite(self, name: str, least: int = 1) -> Series:
        """The finite rows of a column; Skip if there are fewer than `least`."""
        found = self.series(name).finite()
        if len(found) < least:
            raise Skip(f"{name} has {len(found)} finite rows and this check needs {least}.")
        return found

    def logged(self, name: str) -> Series:
        """The finite rows of a column; empty where it is not logged."""
        return self.series(name).finite() if self.has(name) else EMPTY

    @functools.cached_property
    def losses(self) -> list[str]:
        """Columns that are losses or divergences by their names."""
        return [name for name in self.rows.names if _names_loss(name)]

    @functools.cached_property
    def _bits(self) -> bool:
        """Whether every logged perplexity is 2^loss and not e^loss."""
        seen = []
        for name in self.rows.names:
            loss = name.replace("token_ppl", "loss")
            if name.endswith("/token_ppl") and self.has(loss):
                _, ppl, x = pairs(self.rows.series(name), self.rows.series(loss))
                use = (ppl > 0) & np.isfinite(ppl) & (x > 0.1) & np.isfinite(x)
                seen += (np.abs(np.log2(ppl[use]) / x[use] - 1) < 0.01).tolist()
        return bool(seen) and all(seen)

    def in_bits(self, name: str) -> bool:
        """Whether a column is a loss in bits."""
        return name in METRICS and _names_loss(name) and self._bits

    def splits(self, *names: str) -> list[str]:
        """Splits other than train for which one of the metrics is logged."""
        known = (f"{split}/{name}" for name in names for split in ("valid", "test"))
        return list(dict.fromkeys(key.split("/")[0] for key in known if self.has(key)))

    def scored(self) -> list[str]:
        """Splits with a loss or a perplexity."""
        return self.splits("loss", "token_ppl")

    def nats(self, split: str) -> Series:
        """The loss of a split, or the logarithm of its perplexity where only that is logged."""
        if self.has(f"{split}/loss"):
            return self.finite(f"{split}/loss")
        ppl = self.finite(f"{split}/token_ppl")
        if ppl.values.min() <= 0:
            raise Skip(f"{split}/token_ppl is not positive (log.ppl_of_loss).")
        return Series(ppl.steps, np.log(ppl.values))

    # ---- What is declared or follows ------------------------------------------------------

    @property
    def sizes(self) -> Mapping[str, int]:
        """Tokens of the splits by name."""
        given = self.split_tokens
        return given if isinstance(given, Mapping) else {"valid": given} if given else {}

    @property
    def objective(self) -> str:
        """The column that training lowers: the objective of a distillation, else the loss."""
        return "distill/objective" if self.has("distill/objective") else "train/loss"

    def tokens(self, steps: np.ndarray) -> np.ndarray | None:
        """Training tokens seen at the given steps, or None if it is not known."""
        if self.has("data/tokens") or self.tokens_per_step is None:
            return self._between("data/tokens", steps)
        return steps * self.tokens_per_step

    def epochs(self, steps: np.ndarray) -> np.ndarray | None:
        """Passes over the training data at the given steps, or None if it is not known."""
        if self.has("data/epoch") or not self.train_tokens:
            return self._between("data/epoch", steps)
        tokens = self.tokens(steps)
        return None if tokens is None else tokens / self.train_tokens

    def _between(self, name: str, steps: np.ndarray) -> np.ndarray | None:
        """A column at any steps, or None if it is not logged."""
        if not self.has(name):
            return None
        known = self.finite(name)
        return np.interp(steps, known.steps, known.values)

    def overfitted(self, split: str) -> Overfit | None:
        """How a split's loss lost half of its fall while the training loss fell by 3 SE, or None.

        The fall counts from the first row of either loss.
        """
        if not self.has("train/loss"):
            return None
        loss, train = self.nats(split), self.finite("train/loss")
        place = int(np.argmin(loss.values))
        low, end, step = float(loss.values[place]), float(loss.values[-1]), int(loss.steps[place])
        start = max(float(loss.values[0]), float(train.values[0]))
        before, after = train.values[train.steps <= step], train.values[train.steps > step]
        size = min(8, len(before), len(after))
        if not size or end - low <= max(0.5 * (start - low), 0):
            return None
        spread = noise(train.values) if len(train) >= 4 else 0.0
        falls = before[-size:].mean() - after[-size:].mean() > 3 * spread * math.sqrt(2 / size)
        return Overfit(start, low, step, end) if falls else None

    def skip_if_overfit(self) -> None:
        """Skip if the run overfits on purpose."""
        if self.overfit:
            raise Skip("Overfitting is declared.")

    def settled(self, steps: np.ndarray) -> bool:
        """Whether the run is long enough to be compared with trivial predictors."""
        epochs = self.epochs(steps[-1:])
        return bool(steps[-1] >= 99 or (epochs is not None and epochs[0] >= 1))  # counted from 0


def _names_loss(name: str) -> bool:
    """Whether this is the name of a loss."""
    name = name.lower()
    words = set(re.split(r"[^a-z]+", name))
    return ("loss" in name or bool(words & _LOSS_WORDS)) and not _NO_LOSS.search(name)


def is_known(name: str) -> bool:
    """Whether this is the name of a metric that checks read."""
    return name in METRICS or name.startswith(PREFIXES)


@fixture
def loss(subject: Subject) -> Series:
    """The finite rows of the training loss."""
    return subject.finite("train/loss")


@fixture
def uniform(vocab_size: int) -> float:
    """Nats of a uniform guess, ln V."""
    return math.log(vocab_size)
