"""The page of a run.

    python -m lm_jax.report runs/quickstart-0

writes `report.html` into the folder of the run.

It shows how far the run is, its scores among the reference lines, the course of its training, what
the doctor found, samples and the config. All of it comes from the files in the workdir. Training
writes the page at every evaluation and at its end.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from absl import flags

from lm_jax import curves, metrics, page, processes, workdir
from lm_jax.compare.tables import short
from lm_jax.config.flags import parse_flags
from lm_jax.config.section import fields_html
from lm_jax.doctor.findings import Report
from lm_jax.door import command
from lm_jax.evaluate import OWN, among_references, knowledge, named_lines, perplexity
from lm_jax.files import read_json, write_text
from lm_jax.history import Log, finite
from lm_jax.models.families import size
from lm_jax.places import pulled, put_back
from lm_jax.rundir import read_scores
from lm_jax.samples import sample_html

_NEWEST = 8  # evaluations that are shown at once
_POINTS = 1000  # stretches of the run, of which a median is taken
_STYLE = """
.facts { display: grid; gap: .9rem 1.25rem; margin: 1.25rem 0 0;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.facts dt { color: var(--soft); font-size: .8125rem; } .facts dd { margin: 0; }
.path { color: var(--soft); margin: 0 0 1.25rem; }
.bar { height: 6px; background: var(--rule); border-radius: 3px; margin: .4rem 0 0; }
.bar div { height: 100%; background: var(--c0); border-radius: 3px; min-width: 2px; }
"""


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the files of a workdir say."""

    folder: pathlib.Path
    record: workdir.Record
    made: Mapping[str, Any]  # config.json
    log: Log  # metrics.jsonl
    scores: Mapping[str, Mapping[str, Any]]  # eval_<split>.json, by split
    references: Mapping[str, float]  # of the valid split

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return int(self.record.cfg.train.steps)


def write(
    folder: pathlib.Path, references: Mapping[str, float] | None = None, log: Log | None = None
) -> pathlib.Path:
    """Write the page of a run into its workdir.

    Args:
        folder: the workdir.
        references: those of the valid split, as `lm_jax.data.references` has them; if None, they
            are read from `eval_valid.json`, which is there once the run is finished.
        log: that of the run, read up to an earlier page; if None, it is read from its beginning.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if the folder holds no record of a run.
        ConfigError: if the record is not as a run writes it.
    """
    record = workdir.read_record(folder)
    scores = read_scores(folder)
    if references is None:
        references = scores.get("valid", {}).get("references", {})
    made = read_json(record.path)
    run = _Run(folder, record, made, (log or Log(folder)).read(), scores, references)
    # A page that is still to change looks for its newer self.
    head = "" if run.log.done >= run.steps else '<meta http-equiv="refresh" content="60">\n'
    name = folder.resolve().name
    text = page.document(f"{name}, {_state(run)}", _body(run, name), style=_STYLE, head=head)
    write_text(folder / workdir.REPORT, text)
    return folder / workdir.REPORT


def _body(run: _Run, name: str) -> str:
    drawings = curves.drawings(run.log, run.record.cfg, named_lines(run.references))
    drawn = "".join(page.figure(*one) for one in drawings)
    sections = {
        "Result": _results(run),
        "Course": f'<div class="figures">{drawn}</div>' if drawn else "",
        "Doctor": _doctor(run.folder),
        "Samples": _samples(run.folder),
        "Evaluations": _evaluations(run),
        "Config": fields_html(run.record.cfg),
    }
    parts = [f"<section><h2>{k}</h2>\n{text}</section>" for k, text in sections.items() if text]
    return "\n".join([_head(run, name), *parts])


def _state(run: _Run) -> str:
    if run.log.done >= run.steps:
        return f"finished after {run.steps:,} updates"
    return f"update {run.log.done:,} of {run.steps:,}"


def _head(run: _Run, name: str) -> str:
    cfg, data, made, log = run.record.cfg, run.record.data, run.made, run.log
    train = data["splits"]["train"]["tokens"]
    speed, step_ms = (
        log.course(f"perf/{x}", _POINTS).mean for x in ("tokens_per_second", "step_ms")
    )
    skipped = log.total("optim/skipped_updates")
    revision = made["git_revision"] or ""
    devices = [f"{made['devices'].count(k)} {k}" for k in dict.fromkeys(made["devices"])]
    seen = float(log.course("data/tokens", _POINTS).high[-1:].sum())
    resumed = [row["resumed"] for row in log.events if finite(row.get("resumed"))]
    facts = {
        "Parameters": short(size(cfg.model, data["vocab_size"], cfg.data.seq_len).total),
        "Data": f"{data['corpus']}, {short(train)} training tokens",
        "Tokenizer": f"{data['tokenizer_kind']}, {data['vocab_size']:,} ids",
        "Device": f"{', '.join(devices)}, {cfg.train.compute_dtype}",
        "Tokens seen": f"{short(seen)}, {seen / train:.2f} epochs" if seen else "",
        "Training time": _spoken(log.total("perf/step_ms") / 1e3) if len(step_ms) else "",
        "Speed": f"{np.median(speed):,.0f} tokens/s" if len(speed) else "",
        "Time left": _spoken((run.steps - run.log.done) * np.median(step_ms[-_POINTS // 5 :]) / 1e3)
        if len(step_ms) and run.log.done < run.steps
        else "",
        "Skipped updates": f"{skipped:,.0f}" if skipped else "",
        "Resumed after update": ", ".join(f"{x:,.0f}" for x in resumed),
        "Started": made["started"][:16].replace("T", " "),
        "lm_jax": f"{made['versions']['lm_jax']} {revision[:8]}{revision[40:]}",  # and its "+"
    }
    told = "".join(f"<div><dt>{k}</dt><dd>{escape(x)}</dd></div>" for k, x in facts.items() if x)
    share = min(1, run.log.done / run.steps)
    return (
        f'<h1>{escape(name)}</h1>\n<p class="path">{escape(str(run.folder))}</p>\n'
        f"<strong>{_state(run).capitalize()}</strong>"
        f'<div class="bar"><div style="width: {share:.1%}"></div></div>\n'
        f'<dl class="facts">{told}</dl>'
    )


def _spoken(seconds: Any) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _evaluated(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations of the valid split whose loss was finite."""
    return [
        {name.removeprefix("valid/"): x for name, x in row.items()}
        for row in rows
        if finite(row.get("valid/loss"))
    ]


def newest_results(
    scores: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    references: Mapping[str, float],
) -> dict[str, Mapping[str, Any]]:
    """The scored splits; before the end of a run, its newest evaluation of the valid split.

    Args:
        scores: of `eval_<split>.json`, by split.
        rows: of `metrics.jsonl`; of them the evaluations count.
        references: of the valid split.
    """
    if scores or not (evaluations := _evaluated(rows)):
        return dict(scores)
    return {"valid": evaluations[-1] | {"references": references}}


def _results(run: _Run) -> str:
    """The results among their reference lines."""
    results = newest_results(run.scores, run.log.events, run.references)
    told = knowledge(run.references) if run.references else ""
    return f'{results_html(results)}<p class="soft">{told}</p>' if results else ""


def results_html(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores of splits, by their names, among their reference lines; side by side."""
    tables = "".join(
        f"<div><h3>{name}: {result['token_count']:,.0f} tokens, after update {result['step']:,}"
        f"</h3>{page.table(among_references(result), name, own=OWN)}</div>"
        for name, result in results.items()
    )
    return f'<div class="tables">{tables}</div>'


def _doctor(folder: pathlib.Path) -> str:
    """What is not in order before and in the run; what was looked at otherwise."""
    parts = []
    for name, when in ((workdir.DOCTOR, "before the run"), (workdir.WATCH, "in the run")):
        if not (folder / name).exists():
            continue
        found = Report.from_json((folder / name).read_text())
        parts += [finding.html(when) for finding in found.amiss]
        passed = sum(f.status == "pass" for f in found)
        idle = sum(f.status == "skip" for f in found)
        told = f"{passed} other checks" if found.amiss else f"all {passed} checks"
        told += f" passed; {idle} had nothing to look at" if idle else " passed"
        parts.append(f'<p class="panel good">{when.capitalize()}: {told}.</p>')
    return "".join(parts)


def _samples(folder: pathlib.Path, most: int = 5) -> str:
    """The newest samples, newest first; the prompt is bold."""
    rows = [row for row in workdir.read_rows(folder / workdir.SAMPLES) if "text" in row]
    parts = []
    for row in rows[: -most - 1 : -1]:
        how = ("step", "temperature", "top_k", "top_p", "seed")
        told = ", ".join(
            f"{name.replace('step', 'update')} {row[name]}"
            for name in how
            if row.get(name) is not None
        )
        sample = sample_html(str(row.get("prompt", "")), str(row["text"]))
        parts.append(f'{sample}<p class="soft">{told}</p>')
    return "\n".join(parts)


def _evaluations(run: _Run) -> str:
    """Every evaluation of the valid split, newest first."""
    if not (evaluations := _evaluated(run.log.events)):
        return ""
    best = min(evaluations, key=lambda row: row["loss"])
    four = "{:.4f}".format
    forms: dict[str, Any] = {"loss": four, "token_ppl": perplexity}
    forms |= {"word_ppl": perplexity} if metrics.has_words(best) else {}
    forms |= {"bits_per_byte": four, "accuracy": "{:.1%}".format}
    table = [
        {"update": f"{row['step']:,}{' (best)' * (row == best)}"}
        | {
            name.replace("_", " "): form(row[name]) if finite(row.get(name)) else "-"
            for name, form in forms.items()
        }
        for row in reversed(evaluations)
    ]
    own = f"{best['step']:,} (best)"
    text = page.table(table[:_NEWEST], "Evaluations", own=own)
    if len(table) > _NEWEST:
        older = page.table(table[_NEWEST:], "Older evaluations", own=own)
        text += f"<details><summary>{len(table) - _NEWEST} older</summary>{older}</details>"
    return text


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write `report.html` of a run and print its path."""
    given = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run.", given)
    parse_flags(given, argv, __doc__, subject=["workdir"])
    processes.only_first("report")
    folder = pulled(given.workdir)
    print(write(folder))
    put_back(folder, workdir.REPORT)


if __name__ == "__main__":
    main()
