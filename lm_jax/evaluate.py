"""Exact evaluation: the whole split, every target once, at any batch size.

    python -m lm_jax.evaluate runs/quickstart-0 --split=test

scores the best checkpoint of a run and writes `eval_<split>.json` and, document by document,
`documents_<split>.npz` into its folder.

    python -m lm_jax.evaluate runs/a-0,runs/a-1 --out=runs/both

scores the mean of the probabilities of several runs. The files go where `--out` says, and that
folder then stands for the runs, here and in `generate`, `compare` and `distill.teachers`; without
`--out` nothing is written.

    python -m lm_jax.evaluate FOLDER --config.data.corpus=wikitext2 --config.data.seq_len=1024

scores a Hugging Face checkpoint on a corpus, in the checkpoint's own tokens, and writes the same
files into `scores/`, or where `--out` says.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from rich.table import Table

from lm_jax import config, console, metrics, processes, sharding, signals, step
from lm_jax.config import Config, ConfigError, manual, rules
from lm_jax.config.flags import parse_flags
from lm_jax.config.section import advice, get
from lm_jax.data import windows
from lm_jax.data.references import NAMES, in_nats, references
from lm_jax.data.store import Store
from lm_jax.door import command
from lm_jax.ensemble import MODELS, Ensemble, make_mean_step, open_models, record_members
from lm_jax.files import user_path, whole, write_json
from lm_jax.models import huggingface
from lm_jax.models.families import FAMILIES, family
from lm_jax.places import put_back
from lm_jax.pretrained import define_model
from lm_jax.workdir import DOCUMENTS, SCORES, Trained

OWN = "this model"
# Fields that may be given: where the data of a run lie now, whose hash must stay the same ...
PLACES = [
    *("data.source_dir", "data.files", "data.valid_files", "data.test_files", "data.cache_dir"),
    *("data.workers", "eval.batch_size"),
]
# ... and what a Hugging Face checkpoint reads, and how.
_READ = [
    *("data.corpus", "data.document", "data.valid_fraction", "data.test_fraction"),
    *("data.seq_len", "data.document_mask", "train.compute_dtype"),
]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Scores splits of one store with one model structure."""

    cfg: Config
    store: Store
    mesh: Mesh
    eval_step: Callable[..., step.Metrics]
    scored: Callable[[bool], object] = lambda more: None  # hears of each batch: whether more follow
    names: tuple[str, ...] = ()  # of the runs whose mean is scored, if it is one

    @classmethod
    def of(cls, run: Trained, store: Store) -> "Evaluator":
        """The evaluator of a run, or of several as one, on a store."""
        if isinstance(run, Ensemble):
            return cls(run.cfg, store, run.mesh, make_mean_step(run), names=run.names)
        return cls(run.cfg, store, run.mesh, step.make_eval_step(run.cfg, run.graphdef, run.mesh))

    def __call__(self, params: Any, split_name: str) -> dict[str, Any]:
        """Score a whole split; see `score`."""
        return self.score(params, split_name)[0]

    def score(self, params: Any, split_name: str) -> tuple[dict[str, Any], np.ndarray]:
        """Score a whole split, as a whole and by document.

        Returns:
            `loss` (nats per token), `token_ppl`, `word_ppl`, `bits_per_byte`, `accuracy`,
            `token_count`, `split_token_count` (equal, or this raises) and `stride`; what is
            observed of the family by its name, for each column its mean by layer, or of several
            runs as one `members`, the loss of each; and the nats of each document, float64
            [documents].
        """
        cfg, split = self.cfg, self.store.split(split_name)
        batches = windows.eval_batches(
            split,
            seq_len=cfg.data.seq_len,
            batch_size=sharding.round_up(cfg.eval.batch_size, self.mesh),
            document_mask=cfg.data.document_mask,
            stride=cfg.eval.stride,
            **sharding.share_of_rows(self.mesh),
        )
        total, parts, pending = metrics.Sums(), [], None
        observed, seen = family(cfg.model).observed, np.zeros(())
        with console.phase(f"scoring {split_name}", len(split.tokens)) as scoring:
            for batch in itertools.chain(batches, [None]):
                begun = None
                if batch is not None:
                    begun = self.eval_step(params, sharding.put_batch(self.mesh, batch, axis=0))
                # Read the batch before while this one computes.
                if pending is not None:
                    sums, nats_N = _fetch(pending)
                    total += sums
                    parts.append(nats_N)
                    if "observed" in pending:
                        seen = seen + np.asarray(pending["observed"], np.float64)
                    scoring.update(int(total.count))
                    self.scored(begun is not None)
                pending = begun
        assert int(total.count) == len(split.tokens), (total.count, len(split.tokens))
        result: dict[str, Any] = {
            **metrics.summarise(total, split_bytes=split.bytes, split_words=split.words),
            "split_token_count": len(split.tokens),
            "stride": cfg.eval.stride,
        }
        means = (seen / total.count).T.tolist()
        if self.names:
            result["members"] = dict(zip(self.names, means, strict=True))
        elif observed:
            result[observed.name] = dict(zip(observed.columns, means, strict=True))
        # The windows score every token once and in the order of the split, whatever their stride.
        nats_N = np.concatenate(parts)
        return result, np.add.reduceat(nats_N, split.document_starts[:-1], dtype=np.float64)


def _fetch(result: step.Metrics) -> tuple[metrics.Sums, np.ndarray]:
    """Sums of a batch, and the nats of its scored tokens in order."""
    sums = {name: float(result[name]) for name in ("nats", "count", "correct")}
    scored_BT = np.asarray(result["token_weights"]) > 0
    return metrics.Sums(**sums), np.asarray(result["token_nats"])[scored_BT]


def documents(store: Store, split_name: str, nats_D: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of each document of a split, in its order.

    Returns:
        `nats` float64, `tokens` and `bytes` int64, all [documents]. There is no `bytes` where the
        ids do not tell them: kind "word", with white space or words that it does not keep.
    """
    split, bytes_V = store.split(split_name), store.tokenizer.bytes_V
    result = {"nats": nats_D, "tokens": np.diff(split.document_starts)}
    bytes_D = np.add.reduceat(bytes_V[split.tokens], split.document_starts[:-1], dtype=np.int64)
    if bytes_D.sum() == split.bytes:
        result["bytes"] = bytes_D
    return result


def named_lines(references: Mapping[str, float]) -> dict[str, float]:
    """The scores of `references` in nats per token, by the names that are shown."""
    return {NAMES.get(name, name): nats for name, nats in in_nats(references).items()}


def own_name(result: Mapping[str, Any]) -> str:
    """What the line of a result is called among its references."""
    members = result.get("members")
    return f"mean of {len(members)} runs" if members else OWN


def among_references(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A result among its reference lines, worst first, as rows of a table by their headings.

    Args:
        result: of `score_run`, perhaps read from JSON, which has null for what is not finite.
    """
    loss, bits = (math.nan if result[x] is None else result[x] for x in ("loss", "bits_per_byte"))
    forms: dict[str, Callable[[float], str]] = {
        "nats per token": "{:.4f}".format,
        "token ppl": lambda nats: perplexity(metrics.exp(nats)),
    }
    if loss:  # a loss of 0 does not tell how long the text is
        forms["bits per byte"] = lambda nats: f"{bits / loss * nats:.4f}"
    if loss and metrics.has_words(result):
        tokens_per_word = math.log(result["word_ppl"]) / loss
        forms["word ppl"] = lambda nats: perplexity(metrics.exp(nats * tokens_per_word))
    members = {name: math.nan if x is None else x for name, x in result.get("members", {}).items()}
    lines = named_lines(result["references"]) | members | {own_name(result): loss}
    return [
        {"": name} | {heading: form(lines[name]) for heading, form in forms.items()}
        for name in sorted(lines, key=lines.__getitem__, reverse=True)
    ]


def perplexity(value: float) -> str:
    """A perplexity as it is shown."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.1e}"


def knowledge(references: Mapping[str, float]) -> str:
    """What the reference lines know, in a sentence."""
    told = (
        "Of these, uniform knows nothing, unigram how often each token occurs, a Kneser-Ney bigram "
        "or trigram the one or two tokens before it"
    )
    least = "; no model can stay below the entropy rate" * ("entropy_rate" in references)
    return f"{told}{least}."


def report(name: str, result: dict[str, Any]) -> None:
    """Print one split's line among its references, worst first, and what they know."""
    rows = among_references(result)
    table = Table(title=f"{name}: {result['token_count']:,} tokens, each scored once")
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row.values(), style="bold" if row[""] == own_name(result) else None)
    sheet = console.sheet()
    sheet.print(table)
    sheet.print(knowledge(result["references"]), highlight=False)
    for observed in filter(None, (known.observed for known in FAMILIES.values())):
        if by_column := result.get(observed.name):
            table = Table(title=f"mean {observed.name}, by layer")
            for heading in ("", *range(len(next(iter(by_column.values()))))):
                table.add_column(str(heading), justify="right")
            for column, means in by_column.items():
                table.add_row(column, *(f"{mean:.3f}" for mean in means))
            sheet.print(table)


def score_run(
    evaluator: Evaluator, run: Trained, workdir: pathlib.Path | None, name: str
) -> dict[str, Any]:
    """Score one split of a run; print the result, and write it if there is a folder for it."""
    result, nats_D = evaluator.score(run.params, name)
    result = {"step": run.step, **result, "references": references(evaluator.store, name)}
    if not run.data:  # there is no record of a run beside it
        result |= {"config": config.to_dict(run.cfg), "data": evaluator.store.manifest}
    if jax.process_index() == 0:
        if workdir is not None:
            workdir.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = documents(evaluator.store, name, nats_D)
            with whole(workdir / DOCUMENTS.format(name)) as file:
                np.savez(file, allow_pickle=False, **arrays)
            write_json(workdir / SCORES.format(name), result)
        report(name, result)
    return result


def score_splits(
    evaluator: Evaluator, run: Trained, workdir: pathlib.Path, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """As `score_run`, the splits of these names; several processes stop between two of them."""
    results = {}
    for name in names:
        signals.stop_together(evaluator.mesh, f"before {name} was scored")
        results[name] = score_run(evaluator, run, workdir, name)
    return results


def score_split(
    run: Trained, workdir: pathlib.Path | None, name: str, stride: int | None
) -> dict[str, Any]:
    """As `score_run`, with another stride if one is given.

    Raises:
        ConfigError: if there is no such split or the stride is impossible, before data are opened.
    """
    cfg = run.cfg
    if stride is not None:
        cfg = rules.validate(config.replace(cfg, eval__stride=stride or cfg.data.seq_len))
    elif isinstance(run, Ensemble):
        run.require_one_stride()
    if name not in (splits := (run.data or run.store.manifest)["splits"]):
        raise ConfigError(f"--split={name}: there are no such data; {advice(name, [*splits])}")
    evaluator = Evaluator.of(dataclasses.replace(run, cfg=cfg), run.store)
    result = score_run(evaluator, run, workdir, name)
    if workdir is not None:
        put_back(workdir, SCORES.format(name), DOCUMENTS.format(name))
    return result


def define_fields(paths: Iterable[str], given: flags.FlagValues) -> None:
    """Define flags of some fields of the config, which are None where they are not given."""
    define: dict[type, Callable[..., Any]] = {
        str: flags.DEFINE_string,
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
    }
    default, means = Config(), manual.meanings()
    for path in paths:
        kind = type(get(default, path))
        define[kind](f"config.{path}", None, means[path], flag_values=given)


def given_fields(paths: Iterable[str], given: flags.FlagValues) -> dict[str, Any]:
    """Those of these flags that were given, as changes for `config.replace`."""
    values = {path.replace(".", "__"): given[f"config.{path}"].value for path in paths}
    return {path: value for path, value in values.items() if value is not None}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Score one split; write `eval_<split>.json` and `documents_<split>.npz`."""
    given = flags.FlagValues()
    define_model(given, MODELS)
    flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "What is scored.", given)
    stride = "Targets scored per window. Default: as in the run's config, or all."
    flags.DEFINE_integer("stride", None, stride, flag_values=given)
    results = "Folder of the results. Default: that of the run; of a checkpoint scores/NAME-CORPUS."
    flags.DEFINE_string("out", None, results, given)
    define_fields(PLACES + _READ, given)
    parse_flags(given, argv, __doc__, subject=["workdir"])
    console.use(silent=processes.find_place().rank > 0, aside=True)
    trained = not huggingface.is_checkpoint(pathlib.Path(given.workdir).expanduser())
    if trained and (asked := next(iter(given_fields(_READ, given)), None)):
        raise ConfigError(
            f"config.{asked.replace('__', '.')}: a run is scored on its own data, as it was "
            "trained; leave it out, or export the run and score that folder."
        )
    if not trained and given["config.data.corpus"].value is None:
        raise ConfigError(
            f"config.data.corpus: {given.workdir} is a Hugging Face checkpoint; name the corpus on "
            "which it is scored."
        )
    processes.join_others(Config().cluster)
    with console.phase(f"opening {given.workdir}"):
        changes = given_fields(PLACES + _READ, given)
        run, folder = open_models(given.workdir, given.checkpoint, **changes)
    if folder is not None and not trained:
        folder = pathlib.Path("scores", f"{folder.resolve().name}-{run.cfg.data.corpus}")
    if given.out:
        folder = user_path(given.out)
        if isinstance(run, Ensemble):
            record_members(folder, run)
    score_split(run, folder, given.split, given.stride)
    if folder is not None:
        console.say(f"{folder / SCORES.format(given.split)} holds the result")


if __name__ == "__main__":
    main()
