"""What the columns of a log are: from the names that trainers write to the metrics known here."""

import difflib
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Names that the checks read, in the order in which a short form ("loss", "lr") stands for one.
METRICS = (
    "step",
    "train/loss",
    "train/token_ppl",
    *(
        f"{split}/{name}"
        for split in ("valid", "test")
        for name in ("loss", "token_ppl", "accuracy", "token_count", "lm_ce")
    ),
    "optim/lr",
    "optim/grad_norm",
    "optim/clip_rate",
    "optim/update_norm",
    "optim/param_norm",
    "optim/skipped_updates",
    "optim/loss_scale",
    "data/tokens",
    "data/epoch",
    "perf/tokens_per_second",
    "perf/mfu",
    "distill/objective",
    "distill/lm_ce",
    "distill/kd_kl",
    "distill/kd_kl_t2",
)
PREFIXES = ("distill/", "grad_norm/")

# Words of a name joined by "_", the surest first.
_ALIASES = {
    "step": "step global_step trainer_global_step iteration iterations iter iters it num_updates "
    "current_step current_steps optimizer_step update_step num_steps steps s updates batch "
    "batch_idx update",
    "optim/lr": "lr learning_rate last_lr",
    "optim/grad_norm": "grad_norm gnorm gradient_norm global_grad_norm gradnorm grad_norm_total "
    "total_norm norm",
    "optim/param_norm": "param_norm params_norm weight_norm",
    "optim/skipped_updates": "skipped_updates number_of_skipped_iterations skipped_iterations",
    "optim/loss_scale": "loss_scale grad_scale",
    "data/tokens": "tokens tokens_seen num_input_tokens_seen num_tokens total_tokens "
    "consumed_tokens tokens_consumed tokens_processed",
    "data/epoch": "epoch epochs",
    "perf/tokens_per_second": "tokens_per_second tokens_per_sec tok_per_sec tok_s tok_sec "
    "tokens_s tokens_sec tps wps",
    "perf/mfu": "mfu bf16_mfu fp16_mfu fp8_mfu",
}
_OF_A_SPLIT = {  # a perplexity is that of the likelihood, so `nll_loss` comes before `loss`
    "loss": "nll_loss nll loss lm_loss lm_loss_value ce_loss cross_entropy_loss cross_entropy ce "
    "xent loss_step batch_loss loss_epoch epoch_loss avg_loss loss_avg mean_loss loss_mean",
    "token_ppl": "token_ppl ppl perplexity lm_loss_ppl",
    "accuracy": "accuracy token_accuracy acc token_acc epoch_accuracy",
}
_SPLITS = {"train": "train", "training": "train", "tr": "train", "test": "test"} | dict.fromkeys(
    ("valid", "val", "validation", "eval", "evaluation", "dev"), "valid"
)
_SHORT = {"trl": "train loss", "tel": "valid loss"}  # of llm.c
_FILLERS = {"metrics", "metric", "history", "log", "logs", "scalars", "nats"}
_LOSSES = {"nll", "ce", "kl", "bpb", "bpc", "xent", "objective"}
_EXACT = {name.replace("/", "_"): name for name in METRICS}


class Meaning(NamedTuple):
    """The metric that a column may be."""

    metric: str
    rank: int  # the surest is 0
    implied: bool = False  # the name says no split, so it is taken for train


class Naming(NamedTuple):
    """What was made of the columns of a file."""

    records: list[dict[str, Any]]
    columns: dict[str, str]  # column of the file -> metric, or the name it keeps
    ignored: list[str]
    notes: list[str]


def metric_name(name: str) -> str:
    """The metric that a full or short name stands for; ValueError if there is none."""
    for candidate in METRICS:
        if name in (candidate, candidate.replace("/", "_"), candidate.split("/")[-1]):
            return candidate
    if name.startswith(PREFIXES):
        return name
    near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
    raise ValueError(f"mapping: {name!r} is no metric; did you mean {near!r}?")


def number(raw: Any) -> float | None:
    """A float, NaN for what stands for a non-finite value, None for what is no number."""
    if raw is None:
        return math.nan
    try:
        return float(raw)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if raw > 0 else -math.inf
    except (TypeError, ValueError):
        return None


def words(name: str) -> list[str]:
    """The words of a name, each once, without the run that Weights & Biases writes before it."""
    name = re.sub(r"\(.*?\)", "", name.rsplit(" - ", 1)[-1])
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()
    name = re.sub(r"\b(train|valid|val|eval|test)(loss|ppl|acc)\b", r"\1_\2", name)
    name = " ".join(_SHORT.get(word, word) for word in re.findall(r"[a-z0-9]+", name))
    return [word for word in dict.fromkeys(name.split()) if word not in _FILLERS]


def split_of(name: str) -> str | None:
    """The split that a name says."""
    return next((_SPLITS[word] for word in words(name) if word in _SPLITS), None)


def looks_like_a_loss(name: str) -> bool:
    """Whether a column without a meaning here may be a loss."""
    if name.endswith(("__MIN", "__MAX")):  # extremes that Weights & Biases writes beside a column
        return False
    return any("loss" in word or word in _LOSSES for word in words(name))


@functools.cache
def meaning(name: str) -> Meaning | None:
    """The metric that a column of this name may be."""
    if name in METRICS:
        return Meaning(name, 0)
    found, split = words(name), split_of(name)
    if name.endswith(("__MIN", "__MAX")) or not found:
        return None
    if metric := _EXACT.get("_".join(found)):
        return Meaning(metric, 1)
    rest = "_".join(word for word in found if word not in _SPLITS)
    for metric, text in _ALIASES.items():
        if rest in text.split() and (split in (None, "train") or metric == "step"):
            return Meaning(metric, 2 + text.split().index(rest))
    for quantity, text in _OF_A_SPLIT.items():
        metric = f"{split or 'train'}/{quantity}"
        if metric in METRICS and rest in text.split():
            return Meaning(metric, 2 + text.split().index(rest) + 100 * (not split), not split)
    if name.lower() in ("train", "val", "valid"):
        return Meaning(f"{split}/loss", 80)
    if found[0] == "lr" and len(found) < 4:  # lr-AdamW/pg1
        return Meaning("optim/lr", 90)
    if "/" in name and (last := meaning(name.rsplit("/", 1)[-1])):  # run_3/loss
        if last.implied and split:
            last = last._replace(metric=f"{split}/{last.metric.split('/')[1]}")
        fits = last.implied or split in (None, "train") or last.metric.startswith(f"{split}/")
        known = last.metric != "step" and fits
        return last._replace(rank=last.rank + 200) if known else None
    return None


def name_columns(
    rows: Sequence[Mapping[str, Any]], given: Mapping[str, str], *, what: str
) -> Naming:
    """Rename the columns of rows.

    Args:
        rows: the rows as they were read.
        given: column -> metric, as the user says.
        what: name of the file, for messages.

    Raises:
        ValueError: if a given column is missing, or if no column is a metric.
    """
    count = Counter(key for row in rows for key, x in row.items() if number(x) is not None)
    present = list(dict.fromkeys(key for row in rows for key in row))
    for column in given:
        if column not in present:
            raise ValueError(
                f"mapping: no record of {what} has {column!r}; "
                f"choose from {', '.join(sorted(present))}."
            )
    columns = dict(given)
    candidates: dict[str, list[str]] = {}
    for name in present:
        known = meaning(name)
        if known and count[name] and name not in given and known.metric not in given.values():
            candidates.setdefault(known.metric, []).append(name)
    notes = []
    for metric, names in candidates.items():
        if metric == "step":  # rows may name it differently
            names.sort(key=_rank)
            own = [name for name in names if not name.startswith("_")]  # _step counts calls
            columns |= dict.fromkeys(own or names, metric)
            continue
        longest = max(names, key=lambda name: count[name])
        beside = {name for row in rows if longest in row for name in names if name in row}
        best = min(beside, key=lambda name: (_rank(name), -count[name]))
        columns[best] = metric
        if others := [name for name in names if name != best]:
            notes.append(f"{best} was taken for {metric}, not {', '.join(others)}")
    if "train/loss" not in columns.values():  # a perplexity alone says nothing of its split
        for name in [n for n, m in columns.items() if m == "train/token_ppl" and n not in given]:
            if (known := meaning(name)) and known.implied:
                del columns[name]
    kept = [
        name
        for name in present
        if name not in columns and count[name] and name not in METRICS
        if name.startswith(PREFIXES) or name == "resumed" or looks_like_a_loss(name)
    ]
    columns |= {name: name for name in kept}
    results = [m for m in columns.values() if m not in ("step", "data/epoch")]
    if not results or (len(rows) == 1 and not any(map(is_result, columns))):
        raise ValueError(
            f"{what} names no loss among its columns ({', '.join(present[:8])}); "
            "say which is which with --map=loss=COLUMN,step=COLUMN."
        )
    records = []
    used: dict[str, None] = {}
    for row in rows:
        of = {m: n for n, m in reversed(columns.items()) if n in row}  # of several steps the surest
        records.append({m: row[n] for n, m in columns.items() if of.get(m) == n})
        used |= dict.fromkeys(of.values())
    _carry_steps(records)
    columns = {name: metric for name, metric in columns.items() if name in used}
    return Naming(records, columns, [name for name in present if name not in columns], notes)


def _rank(name: str) -> int:
    known = meaning(name)
    return known.rank if known else 0


def _carry_steps(records: list[dict[str, Any]]) -> None:
    """Rows without a step have that of the row before, or 0, if any row has one."""
    step: Any = 0
    if any("step" in record for record in records):
        for record in records:
            step = record.setdefault("step", step)


def is_result(name: str) -> bool:
    """Whether a column tells how good a model is."""
    known = meaning(name)
    return looks_like_a_loss(name) or (known is not None and known.metric[:5] in _RESULTS)


_RESULTS = ("train", "valid", "test/", "disti")
