"""Logs that are event files of TensorBoard."""

import importlib.util
import logging
import pathlib
from typing import Any

from lm_jax.doctor.facts import require
from lm_jax.doctor.log.names import split_of
from lm_jax.doctor.log.tables import Table

PATTERN = "*tfevents*"


def read_events(path: pathlib.Path) -> Table | None:
    """The scalars of an event file, or of a folder's and those below it, in order of time.

    Raises:
        ValueError: if TensorBoard is not installed.
    """
    files = sorted(path.rglob(PATTERN)) if path.is_dir() else [path]
    if not files:
        return None
    require(
        importlib.util.find_spec("tensorboard") is not None,
        f"{path} holds events of TensorBoard",
        "install tensorboard to read them, or export the scalars as CSV",
    )
    from tensorboard.backend.event_processing import event_file_loader
    from tensorboard.util import tensor_util

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    scalars: list[tuple[float, int, str, float]] = []
    for file in files:
        folder = file.parent.name if file.parent != path and path.is_dir() else ""
        for event in event_file_loader.EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                tensor = tensor_util.make_ndarray(value.tensor)
                if tensor.size == 1 and tensor.dtype.kind == "f":
                    name = value.tag
                    if split_of(folder) and not split_of(name):
                        name = f"{folder}/{name}"
                    scalars.append((event.wall_time, event.step, name, float(tensor.item())))
    rows: list[dict[str, Any]] = []
    for _, step, name, x in sorted(scalars, key=lambda scalar: scalar[0]):
        if not rows or rows[-1]["step"] != step or name in rows[-1]:
            rows.append({"step": step})
        rows[-1][name] = x
    return Table("TensorBoard events", rows, []) if rows else None
