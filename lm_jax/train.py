"""The training loop, top to bottom."""

import contextlib
import pathlib
from typing import Any

import jax

from lm_jax import setup
from lm_jax.config import Config
from lm_jax.data.store import Store
from lm_jax.progress import Progress
from lm_jax.signals import Interrupted, Signals


def train_and_evaluate(
    cfg: Config, workdir: str | pathlib.Path, store: Store | None = None
) -> dict[str, Any]:
    """Train, evaluate and checkpoint one run; with the same workdir, go on where it stopped.

    Example:
        ```python
        results = lm_jax.train_and_evaluate(cfg, "runs/example")
        results["valid"]["loss"], results["valid"]["references"]
        ```

    Args:
        cfg: the config as written; durations are resolved here.
        workdir: folder for everything the run leaves behind.
        store: the data of the config, if they are open already.

    Returns:
        The results of the scored splits by name, as in `eval_<split>.json`.

    Raises:
        ConfigError: for an impossible config, or one that differs from the workdir's, or if another
            trainer has the workdir.
        FloatingPointError: after `train.max_nonfinite` skipped updates in a row.
        Unfit: if the doctor finds the run at fault before it starts.
        Interrupted: after SIGTERM or SIGINT, once the state is saved.
    """
    with contextlib.ExitStack() as held:
        return _train(setup.assemble(cfg, pathlib.Path(workdir), store, held))


def _train(run: setup.Setup) -> dict[str, Any]:
    state, manifest = run.restore() if run.resuming else run.begin()
    with (
        contextlib.closing(run.checkpoints) as checkpoints,
        Progress(run, manifest) as progress,
        Signals() as signals,
        jax.set_mesh(run.mesh),
    ):
        for updates, batch in progress.waited(run.batches()):
            state, metrics = run.step(state, batch)
            progress.dispatched(updates, batch, metrics, state)
            position = updates.stop
            stopped_by = signals.agreed()
            if run.evaluates(position):
                progress.catch_up(state)
                if progress.evaluated(run.evaluate(state), position):
                    checkpoints.save(state.saved(), manifest | {"position": position}, best=True)
            if run.saves(position) or stopped_by:
                progress.catch_up(state)
                manifest["position"] = position
                checkpoints.save(state.saved(), manifest)
            if stopped_by and position < run.steps:
                checkpoints.wait()
                progress.say(
                    f"stopped by {stopped_by} after update {position}, which is saved; "
                    "run the same command again to go on"
                )
                raise Interrupted(0)
    del state  # the best parameters take its place
    with jax.set_mesh(run.mesh):
        return run.finish()
