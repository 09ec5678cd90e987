"""A run in its folder, opened with its verbs."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from lm_jax.evaluate import score_split
from lm_jax.generate import Sample, generate
from lm_jax.workdir import Trained, open_trained, read_metrics


@dataclasses.dataclass(frozen=True)
class Run(Trained):
    """A finished or stopped run: its parts, as `Trained` has them, and what to do with it."""

    workdir: pathlib.Path

    def evaluate(self, split: str = "test", stride: int | None = None) -> dict[str, Any]:
        """Score a whole split, each token once; print it and write it into the workdir.

        What `compare_runs` reads there is then of this stride and this checkpoint.

        Args:
            split: train, valid or test.
            stride: targets scored per window; None: as in the run's config.

        Returns:
            The values of `eval_<split>.json`, see the README.

        Raises:
            ValueError: if the corpus has no such split or has changed since, or the stride is
                impossible.
        """
        return score_split(self, self.workdir, split, stride)

    def generate(self, prompts: str | Sequence[str] = "", **options: Any) -> list[Sample]:
        """Continue prompts; options and errors are those of `lm_jax.generate.generate`."""
        return generate(self, prompts, **options)

    def history(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` in order; a number that was not finite is None."""
        return list(read_metrics(self.workdir))


def open_run(workdir: str | pathlib.Path, *, checkpoint: str | int = "best") -> Run:
    """Open a finished or stopped run to use what it has learnt.

    Example:
        ```python
        run = lm_jax.open_run("runs/example")
        longer = run.evaluate("test", stride=16)  # with 16 tokens of context
        samples = run.generate(tokens=20, samples=2, temperature=0.5)
        losses = [row["train/loss"] for row in run.history() if "train/loss" in row]
        ```

    Args:
        workdir: folder of the run.
        checkpoint: that with the lowest valid loss ("best"; the newest where nothing was evaluated
            yet, which is said), the newest ("last"), or that of an update, by its number.

    Raises:
        FileNotFoundError: if the workdir holds no config, no tokenizer or no such checkpoint.
        ConfigError: if the tokenizer is not that of the run, or the run is of version 0.1.
    """
    folder = pathlib.Path(workdir).absolute()  # the process may move to another folder
    return Run(workdir=folder, **vars(open_trained(folder, checkpoint=checkpoint)))
