"""What the columns of a log are: from the names that trainers write to the metrics known here."""

import difflib
import functools
import math
import re
from typing import Any, NamedTuple

# Names that the checks read, in the order in which a short form ("loss", "lr") stands for one.
METRICS = tuple(
    "step train/loss train/token_ppl valid/loss valid/token_ppl valid/accuracy valid/token_count "
    "valid/lm_ce test/loss test/token_ppl test/accuracy test/token_count test/lm_ce optim/lr "
    "optim/grad_norm optim/clip_rate optim/update_norm optim/param_norm optim/skipped_updates "
    "optim/loss_scale data/tokens data/epoch perf/tokens_per_second perf/mfu distill/objective "
    "distill/lm_ce distill/kd_kl distill/kd_kl_t2".split()
)
PREFIXES = ("distill/", "grad_norm/")

# Words of a name joined by "_", the surest first.
_ALIASES = {
    "step": "step global_step trainer_global_step iteration iterations iter iters it num_updates "
    "current_step current_steps completed_step optimizer_step update_step num_steps steps s batch "
    "batch_idx",
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
    "xent language_cross_entropy negative_likelihood negative_likelihood_loss "
    "reduced_loss loss_step step_loss batch_loss loss_epoch epoch_loss avg_loss "
    "loss_avg mean_loss loss_mean",
    "token_ppl": "token_ppl ppl perplexity lm_loss_ppl lm_loss_ppl_value",
    "accuracy": "accuracy token_accuracy acc token_acc epoch_accuracy",
}
_VALID = "valid val validation validate validating eval evaluation evaluate evaluating dev".split()
_SPLITS = {"train": "train", "training": "train", "tr": "train", "test": "test"}
_SPLITS |= dict.fromkeys(_VALID, "valid")
_SHORT = {"trl": "train loss", "tel": "valid loss"}  # of llm.c
_SHORT |= {"losses": "loss", "lrs": "lr", "ppls": "ppl", "accs": "acc"}  # of lists
_SHORT |= {"perplexities": "perplexity", "accuracies": "accuracy"}
FACTORS = {"%": 0.01, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}  # of units behind numbers
_FILLERS = {"metrics", "metric", "history", "log", "logs", "scalars", "nats"}
_LOSSES = {"nll", "ce", "kl", "bpb", "bpc", "xent", "objective"}
_EXACT = {name.replace("/", "_"): name for name in METRICS}
_KNOWN = {
    alias: (name, rank)
    for name, aliases in (_ALIASES | _OF_A_SPLIT).items()
    for rank, alias in enumerate(aliases.split(), 1)
}


class Meaning(NamedTuple):
    """The metric that a column may be."""

    metric: str = ""
    rank: int = 0  # of the surest
    implied: bool = False  # the name says no split, so it is taken for train


def metric_name(name: str) -> str:
    """The metric that a full or short name stands for; ValueError if there is none."""
    forms = {m.split("/")[-1]: m for m in reversed(METRICS)} | _EXACT | {m: m for m in METRICS}
    if name in forms or name.startswith(PREFIXES):
        return forms.get(name, name)
    near = difflib.get_close_matches(name, forms, n=1, cutoff=0.0)[0]
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


@functools.cache
def words(name: str) -> list[str]:
    """The words of a name, each once, without the run that Weights & Biases writes before it."""
    if name.endswith(("__MIN", "__MAX")):  # extremes that Weights & Biases writes beside a column
        return []
    name = re.sub(r"\(.*?\)", "", name.rsplit(" - ", 1)[-1])
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()
    name = re.sub(r"\b(train|valid|val|eval|test)(loss|ppl|acc)\b", r"\1_\2", name)
    name = " ".join(_SHORT.get(word, word) for word in re.findall(r"[a-z0-9]+", name))
    return [word for word in dict.fromkeys(name.split()) if word not in _FILLERS]


def split_of(name: str) -> str | None:
    """The split that a name says."""
    return next((_SPLITS[word] for word in words(name) if word in _SPLITS), None)


def looks_like_a_loss(name: str) -> bool:
    """Whether a column may be a loss, known here or not."""
    return any("loss" in word or word in _LOSSES for word in words(name))


@functools.cache
def meaning(name: str) -> Meaning:
    """The metric that a column of this name may be, if any."""
    found, split = words(name), split_of(name)
    if metric := _EXACT.get("_".join(found)):
        return Meaning(metric, int(metric != name))
    rest = "_".join(word for word in found if word not in _SPLITS)
    metric, rank = _KNOWN.get(rest, ("", 0))
    of_train = split in (None, "train")
    if metric in _OF_A_SPLIT:
        metric = f"{split or 'train'}/{metric}"
        known = Meaning(metric, rank + 100 * (not split), not split)
        return known if metric in METRICS else Meaning()
    if metric and (of_train or metric == "step"):
        return Meaning(metric, rank)
    if name.lower() in ("train", "val", "valid"):
        return Meaning(f"{split}/loss", 80)
    if rest.startswith("lr_") and (len(found) < 4 or "lr-" in name):  # lr-AdamW/pg1
        return Meaning("optim/lr", 90)
    tail = name.rsplit("/", 1)[-1]
    metric, rank, implied = meaning(tail) if tail != name else Meaning()  # run_3/loss
    if metric == "step" and len(words(tail)) == 1:  # ms/step
        return Meaning()
    if implied and split:
        metric, implied = f"{split}/{metric.split('/')[1]}", False
    fits = metric in METRICS and (of_train or metric.startswith(f"{split}/"))
    return Meaning(metric, rank + 200, implied) if fits else Meaning()


def metric_of(name: str) -> str:
    """The metric that a column of this name may be, or nothing."""
    return meaning(name).metric


@functools.cache
def is_result(name: str) -> bool:
    """Whether a column tells how good a model is."""
    results = ("train/", "valid/", "test/", "distill/")
    return looks_like_a_loss(name) or metric_of(name).startswith(results)
