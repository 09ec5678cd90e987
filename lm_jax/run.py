"""A run in its folder, opened with its verbs."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lm_jax import curves, page
from lm_jax.config import Config
from lm_jax.data.store import Store
from lm_jax.data.tokenizers.base import Tokenizer
from lm_jax.doctor.findings import Report
from lm_jax.evaluate import OWN, among_references, named_lines, score_split
from lm_jax.export import export
from lm_jax.generate import generate
from lm_jax.history import History, Log
from lm_jax.places import pulled
from lm_jax.preflight import examine_workdir
from lm_jax.report import newest_results, results_html
from lm_jax.rundir import read_scores, read_state
from lm_jax.samples import Samples, read_samples
from lm_jax.workdir import REPORT, Trained, choose_update, open_trained, read_metrics, read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NEXT = (
    '.generate("..."), .evaluate("test"), .examine(), .history(), .plot(), .samples(), '
    '.export("..."), .config, .params'
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished or stopped run: what it learnt, what it left behind, and what to do with it.

    Attributes:
        workdir: its folder.
        config: its config, with what was left open resolved.
        step: updates behind its parameters.
    """

    workdir: pathlib.Path
    config: Config
    step: int

    @functools.cached_property
    def _trained(self) -> Trained:
        return open_trained(self.workdir, checkpoint=self.step)

    @property
    def params(self) -> Any:
        """The parameters, a tree of arrays; read when they are first asked for."""
        return self._trained.params

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer: `.encode(text)`, `.decode(ids)`, `.vocab_size`."""
        return self._trained.tokenizer

    @property
    def store(self) -> Store:
        """Its data, opened when they are first asked for; errors as in `Trained.store`."""
        return self._trained.store

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """The newest results of each scored split, as in `eval_<split>.json`."""
        return read_scores(self.workdir)

    def evaluate(self, split: str = "test", stride: int | None = None) -> dict[str, Any]:
        """Score a whole split, each token once; print it and write it into the workdir.

        What `compare_runs` reads there is then of this stride and this checkpoint.

        Args:
            split: train, valid or test.
            stride: targets scored per window; None: as in the run's config.

        Returns:
            The values of `eval_<split>.json`, see docs/evaluation.md.

        Raises:
            ValueError: if the corpus has no such split or has changed since, or the stride is
                impossible.
        """
        return score_split(self._trained, self.workdir, split, stride)

    def generate(self, prompts: str | Sequence[str] = "", n: int = 1, **options: Any) -> Samples:
        """Continue each prompt `n` times.

        Other options (tokens, temperature, top_k, top_p, seed, stop) and the errors are those of
        `lm_jax.generate.generate`.
        """
        return generate(self._trained, prompts, samples=n, **options)

    def export(self, to: str | os.PathLike, *, scored: bool = True) -> pathlib.Path:
        """Write a folder that Hugging Face transformers loads; see `lm_jax.export.export`."""
        return export(self._trained, self.workdir, to, scored=scored)

    def examine(self) -> Report:
        """What the doctor finds in its metrics and scores; see `lm_jax.preflight`."""
        return examine_workdir(self.workdir)

    def samples(self) -> Samples:
        """Those of `samples.jsonl`: of the evaluations of the run and of the command `generate`."""
        return read_samples(self.workdir)

    def history(self) -> History:
        """What the run logged: `.train` and `.valid` are tables, `.rows` is all of it."""
        return History(list(read_metrics(self.workdir)))

    def plot(self) -> "Figure":
        """The figures of `report.html` in one of matplotlib, which a notebook shows.

        Raises:
            ValueError: if nothing is logged yet.
        """
        lines = named_lines(self.scores.get("valid", {}).get("references", {}))
        drawings = curves.drawings(Log(self.workdir).read(), self.config, lines)
        if not drawings:
            raise ValueError(f"{self.workdir}: no update is logged yet; train the run first.")
        return curves.plot(drawings)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also in another process, reads the parameters anew."""
        return Run, (self.workdir, self.config, self.step)

    def __fspath__(self) -> str:
        """Its folder, so that a run stands wherever one is asked for."""
        return str(self.workdir)

    def _results(self) -> dict[str, Mapping[str, Any]]:
        return newest_results(self.scores, Log(self.workdir).read().events, {})

    def __repr__(self) -> str:
        """Where it is, how far, its results with their reference lines, and what to do next."""
        lines = [f"{self.workdir}: {self._state()}"]
        for split, result in self._results().items():
            *others, own = sorted(among_references(result), key=lambda row: row[""] == OWN)
            told = ", ".join(f"{value} {unit}" for unit, value in own.items() if unit)
            known = ", ".join(f"{row['']} {row['nats per token']}" for row in others)
            lines.append(f"{split}: {told}" + (f"; {known}" if known else ""))
        return "\n".join([*lines, f"next: {_NEXT}"])

    def _repr_html_(self) -> str:
        """The same with tables."""
        return page.fragment(
            f"<p><b>{escape(self.workdir.name)}</b>: {self._state()}</p>"
            f'<p class="soft">{escape(str(self.workdir / REPORT))} shows all of it.</p>'
            f'{results_html(self._results())}<p class="soft">Next: {escape(_NEXT)}</p>'
        )

    def _state(self) -> str:
        return f"{read_state(self.workdir)}; parameters of update {self.step:,}"


def open_run(workdir: str | os.PathLike, *, checkpoint: str | int = "best") -> Run:
    """Open a finished or stopped run to use what it has learnt.

    Example:
        ```python
        run = lm_jax.open_run("runs/example")
        longer = run.evaluate("test", stride=16)  # with 16 tokens of context
        samples = run.generate(tokens=20, n=2, temperature=0.5)
        losses = run.history().train["loss"]
        ```

    Args:
        workdir: folder of the run.
        checkpoint: that with the lowest valid loss ("best"; the newest where nothing was evaluated
            yet, which is said), the newest ("last"), or that of an update, by its number.

    Raises:
        FileNotFoundError: if the workdir holds no config or no such checkpoint.
        ConfigError: if the record of the run cannot be read, or the run is of version 0.1.
    """
    folder = pulled(workdir, checkpoint).absolute()  # the process may move to another folder
    record = read_record(folder, checkpoints=True)
    return Run(folder, record.cfg, choose_update(folder, str(checkpoint)))
