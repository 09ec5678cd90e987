"""Metrics of a run that goes on: `metrics.jsonl`, TensorBoard."""

import json
import pathlib
from collections.abc import Mapping

import jax

from lm_jax.files import finite_or_none, whole
from lm_jax.workdir import METRICS, read_metrics

Row = Mapping[str, float]


class Writers:
    """Metrics of each update to their places; only process 0 writes."""

    def __init__(self, workdir: pathlib.Path, *, start: int, tensorboard: bool):
        """Open the files; rows of updates after a checkpoint that was lost are dropped.

        Args:
            workdir: folder of the run.
            start: update from which the run goes on.
            tensorboard: also write TensorBoard events.
        """
        self._active = jax.process_index() == 0
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

    def close(self) -> None:
        """Flush everything."""
        if self._active:
            self._file.close()
            if self._events is not None:
                self._events.close()
