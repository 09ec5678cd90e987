"""Compare runs: size, cost, bits per byte with intervals, and a ranking where noise allows one.

    python -m lm_jax.compare runs/a-0 runs/a-1 runs/b-0 --out=comparison

Each RUN is the workdir of a finished run. Runs whose folders differ only in a trailing `-<seed>`
are the seeds of one arm and must have equal configs. The folder of an ensemble, as `evaluate --out`
writes it, is an arm of its own: its size, FLOPs, tokens and seconds are the sums over its members.
Prints Markdown; with `--out` writes `compare.md`, `compare.json` and `compare.html`.

The values of `compare.json`:

- `split`, `corpus`, `split_bytes`, `split_words`, `documents`: what was scored;
  `documents_weighed_by` bytes, tokens, or null where documents cannot be paired.
- `one_tokenizer`: whether perplexities per token can be compared; else there are none.
- `arms`, best first: `name`, `folders`, `members` (folders of an ensemble's runs, else empty),
  `seeds` (empty for an ensemble), `tokenizer` (kind and number of ids),
  `parameters_{total,table,positions,blocks}`, `flops_per_token` (training), `tokens_seen` and
  `text_bytes_seen` (in training; means over seeds), `tokens_per_second` (median over updates, then
  seeds; null for an ensemble), `training_seconds` (mean; without evaluations); `bits_per_byte`,
  `word_perplexity` and `token_perplexity`, each with `mean`, `low95`, `high95` (Student's t over
  seeds, null with one seed; for a perplexity exp of mean and bounds of the nats) and `by_seed`; and
  `curves`, for each seed `valid_tokens`, `valid_bits_per_byte`, `train_tokens`,
  `train_bits_per_byte` (means of up to 100 stretches).
- `references`: for each tokenizer the predictors of `eval_<split>.json` in the same units.
- `pairs`: `better`, `worse`, `gap_bits_per_byte`, `standard_error_seeds`,
  `standard_error_documents`, `standard_error` (root of the sum of squares), `degrees_of_freedom`
  (null: infinite), `needed_standard_errors`, `gap_low95`, `gap_high95`, `verdict` (separated,
  not distinguishable or not ranked) and `reason`; see `lm_jax.compare.ranking.judge`.
- `ranking`: groups of arms, best first; every arm of a group is separated from every arm of the
  groups after it. Empty where there is nothing to rank.
- `same_model`: groups of arms whose configs are equal. `notes`: sentences.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from lm_jax import console, metrics, processes
from lm_jax.compare import page, ranking, tables
from lm_jax.compare.runs import Arm, Run, group_runs, load_run, with_one_hash
from lm_jax.config.flags import misuse, parse_flags
from lm_jax.data.references import in_nats
from lm_jax.door import command
from lm_jax.files import finite_or_none, user_path, write_json, write_text
from lm_jax.page import fragment
from lm_jax.places import pulled

_PARTS = ("total", "table", "positions", "blocks")  # of the parameters of a model


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """A finished comparison; `values` is described at the top of this module."""

    values: dict[str, Any]

    def markdown(self) -> str:
        """The tables and the ranking as Markdown."""
        return tables.markdown(self.values)

    def html(self) -> str:
        """One page with the figures."""
        return page.html(self.values)

    def __repr__(self) -> str:
        """As Markdown."""
        return self.markdown().rstrip()

    def _repr_html_(self) -> str:
        """The ranking, the tables and the notes, without the figures of the page."""
        return fragment(page.body(self.values, figures=False))


def compare_runs(
    workdirs: str | os.PathLike | Sequence[str | os.PathLike], *, split: str = "test"
) -> Comparison:
    """Compare finished runs, opened or by their folders, by their exact evaluations of a split.

    Example:
        ```python
        comparison = lm_jax.compare_runs(["runs/example"])  # or several
        print(comparison.markdown())
        ```

    Raises:
        FileNotFoundError: for a folder that lacks a file of a finished and evaluated run.
        ValueError: for runs that cannot be compared; the sentence names them.
    """
    if isinstance(workdirs, str | os.PathLike):
        workdirs = [workdirs]
    if not workdirs:
        raise ValueError("workdirs: no run is given; name one or several.")
    runs = with_one_hash([load_run(pulled(workdir), split) for workdir in workdirs])
    arms = group_runs(runs)
    _require_one_text(arms, split)
    arms.sort(key=lambda arm: arm.bits_per_byte.mean())
    runs = [run for arm in arms for run in arm.runs]
    first = runs[0]
    counts = first.data["splits"][split]
    has_words = counts["bytes"] <= metrics.LONGEST_WORD * counts["words"]
    words = counts["words"] if has_words else 0
    one_tokenizer = len({run.data["tokenizer_hash"] for run in runs}) == 1
    weighed_by, bytes_D = _document_bytes(runs, counts["bytes"])
    pairs = _pairs(arms, bytes_D)
    separated = {frozenset((p["better"], p["worse"])) for p in pairs if p["verdict"] == "separated"}
    several = [arm.name for arm in arms if len(arm.runs) > 1]
    values = {
        "split": split,
        "corpus": first.data["corpus"],
        "split_bytes": counts["bytes"],
        "split_words": counts["words"],
        "documents": len(first.documents["nats"]),
        "documents_weighed_by": weighed_by,
        "one_tokenizer": one_tokenizer,
        "arms": [_describe(arm, words, one_tokenizer) for arm in arms],
        "references": _references(runs, counts["bytes"], words, one_tokenizer),
        "pairs": pairs,
        "ranking": ranking.rank(several, separated) if len(several) > 1 else [],
        "same_model": _same_models(arms),
    }
    values["notes"] = _notes(arms, values)
    return Comparison(finite_or_none(values))


def _pairs(arms: Sequence[Arm], bytes_D: np.ndarray | None) -> list[dict[str, Any]]:
    errors = {}
    if bytes_D is not None and len(bytes_D) > 1:
        errors = ranking.document_errors({arm.name: arm.nats_D for arm in arms}, bytes_D)
    pairs = []
    for a, b in itertools.combinations(arms, 2):
        documents = errors.get(frozenset((a.name, b.name)))
        pair = ranking.judge(a.bits_per_byte, b.bits_per_byte, documents)
        if a.settings == b.settings:
            pair |= {"verdict": "not ranked", "reason": "the same model"}
        pairs.append({"better": a.name, "worse": b.name} | pair)
    return pairs


def _require_one_text(arms: Sequence[Arm], split: str) -> None:
    def text(run: Run) -> tuple:
        counts = run.data["splits"][split]
        return run.data["corpus_fingerprint"], counts["bytes"], counts["words"]

    runs = [run for arm in arms for run in arm.runs]
    first = runs[0]
    for run in runs[1:]:
        if text(run) != text(first):
            raise ValueError(
                f"{first.folder} and {run.folder} were trained and scored on different texts "
                f"(data of {first.data['corpus']} and {run.data['corpus']}); compare runs of one "
                "corpus."
            )
        if run.data["tokenizer_hash"] != first.data["tokenizer_hash"]:
            for lossy in (run, first):
                if "bytes" not in lossy.documents:
                    raise ValueError(
                        f"{lossy.folder}: its tokenizer drops part of the text (words that became "
                        "<unk>, white space), so its bits per byte are not those of all bytes; "
                        "compare it with runs of the same tokenizer."
                    )


def _document_bytes(runs: Sequence[Run], split_bytes: int) -> tuple[str | None, np.ndarray | None]:
    """The unit in which documents are weighed, and the bytes of each document, float64.

    Where no run knows the bytes, the unit is "tokens", and each token stands for the mean number of
    bytes. Both are None where the runs do not have the same documents.
    """
    how, known = "bytes", [run.documents["bytes"] for run in runs if "bytes" in run.documents]
    if not known:
        how, known = "tokens", [run.documents["tokens"] for run in runs]
    sizes = {len(run.documents["nats"]) for run in runs}
    if len(sizes) > 1 or any(not np.array_equal(known[0], other) for other in known):
        return None, None
    return how, known[0] * (split_bytes / known[0].sum())


def _same_models(arms: Sequence[Arm]) -> list[list[str]]:
    """Groups of arms with equal settings."""
    groups = (tuple(b.name for b in arms if b.settings == a.settings) for a in arms)
    return [list(names) for names in dict.fromkeys(groups) if len(names) > 1]


def _describe(arm: Arm, words: int, one_tokenizer: bool) -> dict[str, Any]:
    sizes, first = arm.size, arm.runs[0]
    loss = np.array([run.result["loss"] for run in arm.runs])
    tokens = first.result["token_count"]
    speeds = [run.trained[0].tokens_per_second for run in arm.runs]
    seconds = [sum(one.seconds for one in run.trained) for run in arm.runs]
    return {
        "name": arm.name,
        "folders": [str(run.folder) for run in arm.runs],
        "members": arm.members,
        "seeds": [] if arm.members else [run.cfg.seed for run in arm.runs],
        "tokenizer": first.tokenizer,
        **{f"parameters_{part}": getattr(sizes, part) for part in _PARTS},
        "flops_per_token": sizes.flops,
        "tokens_seen": float(np.mean([run.tokens_seen for run in arm.runs])),
        "text_bytes_seen": arm.bytes_seen,
        "tokens_per_second": None if arm.members else float(np.median(speeds)),
        "training_seconds": float(np.mean(seconds)),
        "bits_per_byte": _interval(arm.bits_per_byte),
        "word_perplexity": _interval(loss * tokens / words, metrics.exp) if words else None,
        "token_perplexity": _interval(loss, metrics.exp) if one_tokenizer else None,
        "curves": [] if arm.members else [run.trained[0].curve for run in arm.runs],
    }


def _interval(values: np.ndarray, unit: Any = float) -> dict[str, Any]:
    mean, low, high = map(unit, ranking.interval(values))
    return {"mean": mean, "low95": low, "high95": high, "by_seed": [unit(x) for x in values]}


def _references(
    runs: Sequence[Run], split_bytes: int, words: int, one_tokenizer: bool
) -> list[dict[str, Any]]:
    """The simple predictors of each tokenizer, worst first."""
    rows = []
    for run in {run.data["tokenizer_hash"]: run for run in runs}.values():
        tokens = run.result["token_count"]
        for name, nats in in_nats(run.result["references"]).items():
            rows.append(
                {
                    "name": name,
                    "tokenizer": run.tokenizer,
                    "bits_per_byte": nats * tokens / split_bytes / math.log(2),
                    "word_perplexity": metrics.exp(nats * tokens / words) if words else None,
                    "token_perplexity": metrics.exp(nats) if one_tokenizer else None,
                }
            )
    return sorted(rows, key=lambda row: -row["bits_per_byte"])


def _notes(arms: Sequence[Arm], values: Mapping[str, Any]) -> list[str]:
    """Sentences that a reader must know before trusting a table."""
    notes = [
        f"{' and '.join(names)} have one config: they are the same model."
        for names in values["same_model"]
    ]
    notes += [
        f"{a.name} and {b.name} have equally many parameters in tables, positions and blocks, "
        f"{a.size.total:,}."
        for a, b in itertools.combinations(arms, 2)
        if a.size[:3] == b.size[:3] and a.settings != b.settings
    ]
    notes += [
        f"{arm.name} is the mean of {len(arm.members)} runs ({', '.join(arm.members)}): its size, "
        "FLOPs per token and tokens seen are the sums over them."
        for arm in arms
        if arm.members
    ]
    if not values["one_tokenizer"]:
        notes.append(
            "The tokenizers differ, so perplexities per token cannot be compared and are left out; "
            "bits per byte and perplexity per word can."
        )
    if single := [arm.name for arm in arms if len(arm.runs) < 2]:
        notes.append(f"One seed of {', '.join(single)}: without the noise of seeds, no ranking.")
    pairs, documents = len(values["pairs"]), values["documents"]
    if values["documents_weighed_by"] is None:
        notes.append("The tokenizers keep different documents, which cannot be paired: no ranking.")
    elif documents == 1:
        notes.append("The split is one document: how far it decides is not known, so no ranking.")
    elif documents < 20:
        notes.append(f"{documents} documents are few to estimate the noise over documents from.")
    if values["documents_weighed_by"] == "tokens":
        notes.append(
            "The bytes of each document are not known, since words became <unk>; documents are "
            "weighed by their tokens."
        )
    windows = {(a.runs[0].cfg.data.seq_len, a.runs[0].result["stride"]) for a in arms}
    if len(windows) > 1:
        notes.append(
            "The arms were scored with different contexts, (tokens of a window, targets scored in "
            f"it): {', '.join(map(str, sorted(windows)))}."
        )
    seen = [arm.bytes_seen for arm in arms]
    if max(seen) > 1.01 * min(seen):
        notes.append(
            f"The arms saw from {min(seen):,.0f} to {max(seen):,.0f} bytes of training text."
        )
    if pairs > 1:
        notes.append(
            f"{pairs} pairs were compared, each by itself: of arms that are all equally good, one "
            f"pair in 20 would seem separated, here {pairs / 20:.1g} on average."
        )
    return notes


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Compare finished runs and print the comparison."""
    given = flags.FlagValues()
    flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Whose scores.", given)
    out = "Folder for compare.md, compare.json and compare.html."
    flags.DEFINE_string("out", None, out, given)
    about = (__doc__ or "").partition("\n\nThe values of")[0]
    folders = parse_flags(given, argv, about, others="RUN RUN ...")
    if not folders:
        misuse("no RUN is given; give the workdirs of finished runs.")
    processes.only_first("compare")
    console.use(aside=True)
    with console.phase("comparing"):
        comparison = compare_runs(folders, split=given.split)
    print(comparison.markdown())
    if given.out is None:
        return
    folder = user_path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.md", comparison.markdown())
    write_json(folder / "compare.json", comparison.values)
    write_text(folder / "compare.html", comparison.html())
