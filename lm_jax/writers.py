"""Metrics of a run that goes on: `metrics.jsonl`, TensorBoard and Weights & Biases."""

import bisect
import importlib.util
import itertools
import json
import pathlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from html import escape
from typing import Any

import jax
import numpy as np

from lm_jax import config, console
from lm_jax.config import Config, ConfigError
from lm_jax.files import finite_or_none, write_text
from lm_jax.workdir import METRICS, whole_rows

Row = Mapping[str, float]
_TOLD = {"perf": 6, "data": 12}  # digits, by the beginning of the name


def check(cfg: Config) -> None:
    """Refuse a config that asks for a package which is not installed, or for W&B without login.

    Raises:
        ConfigError: naming the field and the command that helps.
    """
    for field, wanted, package in (
        ("tensorboard", cfg.train.tensorboard, "tensorboardX"),
        ("wandb", cfg.train.wandb, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"config.train.{field}: {wanted!r} needs {package}, which is not installed; "
                f"run `pip install 'lm_jax[{field}]'`, or leave the field out."
            )
    if cfg.train.wandb:
        _check_login(cfg.train.wandb)


def _check_login(project: str) -> None:
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    why = "no login is known"
    try:
        if wandb.login(prompt=False):
            return
    except wandb.errors.Error as error:
        why = str(error).rstrip(".")
    raise ConfigError(
        f"config.train.wandb: {project!r} cannot be opened ({why}); run `wandb login`, or set "
        "WANDB_MODE=offline and send the run later with `wandb sync`."
    )


class _TensorBoard:
    """Events in WORKDIR/tensorboard."""

    def __init__(self, workdir: pathlib.Path, cfg: Config, start: int):
        from tensorboardX import SummaryWriter

        # From `purge_step` on, what an earlier process wrote is dropped.
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        if start == 0:
            fields = [f"    {path}={value!r}" for path, value in config.named_fields(cfg)]
            self.text(0, "config", "\n".join(fields))

    def row(self, step: int, row: Row) -> None:
        for name, value in row.items():
            self._events.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._events.add_text(name, text, step)

    def close(self) -> None:
        self._events.close()


class _Wandb:
    """A run at Weights & Biases; its id stays in the workdir, so that a resumed run goes on."""

    def __init__(self, workdir: pathlib.Path, cfg: Config, start: int):
        import wandb

        self._wandb, known = wandb, workdir / "wandb_id"
        if start == 0 or not known.exists():
            write_text(known, secrets.token_hex(4))
        self._run = wandb.init(
            project=cfg.train.wandb,
            id=known.read_text(),
            resume="allow",
            name=workdir.resolve().name,
            dir=str(workdir),
            config=config.to_dict(cfg),
            settings=wandb.Settings(console="off", quiet=True),
        )
        # W&B's own step cannot go back to the checkpoint from which a killed run goes on.
        self._run.define_metric("*", step_metric="update")

    def row(self, step: int, row: Row) -> None:
        self._run.log({"update": step, **row})

    def text(self, step: int, name: str, text: str) -> None:
        shown = self._wandb.Html(f"<pre>{escape(text)}</pre>")
        self._run.log({"update": step, name: shown})

    def close(self) -> None:
        self._run.finish()


def tell_divergence(workdir: pathlib.Path, position: int | None, most: int) -> list[str]:
    """In words, where the last run ended for what was not finite; empty if it did not.

    Args:
        workdir: folder of the run.
        position: updates in the checkpoint from which it goes on; None: it begins anew.
        most: `train.max_nonfinite`.
    """
    last = _last_rows(workdir / METRICS, lambda row: row.get("optim/skipped_updates") == 0)
    rows = [row for row in last if "optim/skipped_updates" in row and row["step"] > (position or 0)]
    skipped = list(itertools.takewhile(lambda row: row["optim/skipped_updates"], reversed(rows)))
    if rows and rows[-1].get("optim/param_norm", 0) is None:
        found = f"update {rows[-1]['step']:,}, which made the parameters infinite"
    elif len(skipped) >= most:
        found = f"updates {skipped[-1]['step']:,} to {skipped[0]['step']:,}, which were not finite"
    else:
        return []
    where = "" if position is None else " in another --workdir"
    return [
        f"the last run here ended at {found}, and ends there again unless something changes: lower "
        f"config.optim.peak_lr, or lengthen config.optim.warmup,{where} or look at these batches"
    ]


def _last_rows(
    path: pathlib.Path, enough: Callable[[Mapping[str, Any]], bool]
) -> list[dict[str, Any]]:
    """The last rows of a log, which may be long, from one that is `enough` on, or earlier."""
    if not path.exists():
        return []
    size, read = path.stat().st_size, 1 << 16
    while True:
        with path.open("rb") as file:
            file.seek(max(0, size - read))
            if read < size:
                file.readline()
            rows = list(_counted(file))
        if read >= size or any(map(enough, rows)):
            return rows
        read *= 4


def _counted(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    return (row for row in whole_rows(lines) if isinstance(row.get("step"), int))


def _cut(path: pathlib.Path, start: int, again: bool) -> None:
    """Drop what is written again, and a line that a kill left unfinished.

    That is the rows of later updates than `start` and, if it is scored `again`, its evaluation. The
    rows lie in the order of the updates, so that a bisection finds the place.
    """

    def repeated(row: Row) -> bool:
        return row["step"] > start or (again and row["step"] == start and "train/loss" not in row)

    with path.open("rb+") as file:

        def later(at: int) -> bool:
            """Whether the first row that begins there or beyond is to be dropped."""
            file.seek(max(0, at - 1))
            if at:
                file.readline()
            return next((repeated(row) for row in _counted(file)), True)

        end = bisect.bisect_left(range(file.seek(0, 2)), True, key=later)
        file.seek(end)  # just behind the first byte of the last row that stays
        if end and not file.readline().endswith(b"\n"):
            file.write(b"\n")
        file.truncate()


def _short(name: str, value: Any) -> float:
    """A value with the digits that it has: those of float32, of which float64 has more.

    Of what is only told, as speeds, those that tell something are kept.
    """
    if isinstance(value, int):
        return value
    if isinstance(value, np.generic) and value.dtype.itemsize < 8:
        return float(str(value))
    digits = _TOLD.get(name.partition("/")[0])
    return float(f"{value:.{digits}g}") if digits else float(value)


class Writers:
    """Metrics of each update to their places; only process 0 writes."""

    def __init__(
        self, workdir: pathlib.Path, cfg: Config, *, start: int, resuming: bool, again: bool
    ):
        """Open the files; rows of updates after a checkpoint that was lost are dropped.

        Args:
            workdir: folder of the run.
            cfg: the config of the run, resolved.
            start: update from which the run goes on.
            resuming: whether those before were made in this folder, and are told if they are lost.
            again: whether that update is scored now, be it that a kill came after its score.
        """
        self._active = jax.process_index() == 0
        self._boards: list[_TensorBoard | _Wandb] = []
        if not self._active:
            return
        self._file = (workdir / METRICS).open("a", buffering=1)
        _cut(workdir / METRICS, start, again)
        if resuming:
            rows = _last_rows(workdir / METRICS, bool)
            last = max((row["step"] for row in rows), default=0)
            if last < start:
                console.say(
                    f"{workdir / METRICS} lacks the rows of updates {last + 1:,} to {start:,}: "
                    "figures of the run will too"
                )
        if cfg.train.tensorboard:
            self._boards.append(_TensorBoard(workdir, cfg, start))
        if cfg.train.wandb:
            self._boards.append(_Wandb(workdir, cfg, start))

    def write(self, step: int, row: Row) -> None:
        """Append one row; `step` counts finished updates."""
        if not self._active:
            return
        plain = {key: _short(key, value) for key, value in row.items()}
        line = json.dumps({"step": step} | finite_or_none(plain), separators=(",", ":"))
        self._file.write(line + "\n")
        for board in self._boards:
            board.row(step, plain)

    def text(self, step: int, name: str, text: str) -> None:
        """Show a text, as a sample, where texts are shown."""
        for board in self._boards:
            board.text(step, name, text)

    def close(self) -> None:
        """Flush everything."""
        if self._active:
            self._file.close()
            for board in self._boards:
                board.close()
