"""Metrics of a run that goes on: a progress line, `metrics.jsonl`, TensorBoard."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping

import jax

from lm_jax.files import finite_or_none, whole
from lm_jax.workdir import METRICS, read_metrics

Row = Mapping[str, float]


class Writers:
    """Metrics of each update to their places; only process 0 writes."""

    def __init__(self, workdir: pathlib.Path, *, steps: int, start: int, tensorboard: bool):
        """Open the files; rows of updates after a checkpoint that was lost are dropped.

        Args:
            workdir: folder of the run.
            steps: length of the run, for the remaining time.
            start: update from which the run goes on.
            tensorboard: also write TensorBoard events.
        """
        self._active = jax.process_index() == 0
        self._steps, self._start, self._began = steps, start, time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._events = None
        if not self._active:
            return
        with whole(workdir / METRICS) as file:
            for row in read_metrics(workdir):
                if row["step"] <= start:
                    file.write((json.dumps(row) + "\n").encode())
        self._file = (workdir / METRICS).open("a", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(workdir / "tensorboard"),
                purge_step=start + 1,  # the first to be dropped
            )

    def write(self, step: int, row: Row) -> None:
        """Append one row; `step` counts finished updates."""
        if not self._active:
            return
        plain = {key: float(value) for key, value in row.items()}
        self._file.write(json.dumps({"step": step} | finite_or_none(plain)) + "\n")
        if self._events is not None:
            for key, value in plain.items():
                self._events.add_scalar(key, value, step)

    def progress(self, step: int, row: Row) -> None:
        """Show how far the run is: in place on a terminal, else a line of its own."""
        done = step - self._start
        left = (time.monotonic() - self._began) / max(1, done) * (self._steps - step)
        line = (
            f"step {step}/{self._steps}  loss {row['train/loss']:.4f}  lr {row['optim/lr']:.2e}  "
            f"grad {row['optim/grad_norm']:.2f}  {row['perf/tokens_per_second']:,.0f} tok/s  "
            f"wait {row['perf/input_wait']:.1%}  eta {_clock(left)}"
        )
        if self._active:
            print(f"\r{line}\033[K" if self._terminal else line, end=self._end(), flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._active:
            print(f"\r\033[K{text}" if self._terminal else text, flush=True)

    def _end(self) -> str:
        return "" if self._terminal else "\n"

    def close(self) -> None:
        """Flush everything."""
        if self._active:
            self._file.close()
            if self._events is not None:
                self._events.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
