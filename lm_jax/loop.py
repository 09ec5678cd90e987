"""The training loop, top to bottom."""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax

from lm_jax import console, heartbeat, memory, rundir, setup, signals
from lm_jax.config import Config
from lm_jax.data.store import Store
from lm_jax.heartbeat import Heartbeat
from lm_jax.progress import Progress
from lm_jax.signals import Interrupted
from lm_jax.step import TrainState


def train_and_evaluate(
    cfg: Config, workdir: str | pathlib.Path, store: Store | None = None
) -> dict[str, Any]:
    """Train, evaluate and checkpoint one run; with the same workdir, go on where it stopped.

    Args:
        cfg: the config as written; durations are resolved here.
        workdir: folder for everything the run leaves behind.
        store: the data of the config, if they are open already.

    Returns:
        The results of the scored splits by name, as in `eval_<split>.json`.

    Raises the errors of `lm_jax.train`.
    """
    console.use(silent=jax.process_index() > 0)
    folder = pathlib.Path(workdir)
    with (
        signals.handled(),
        contextlib.ExitStack() as held,
        heartbeat.watched(folder, cfg.train.hang_seconds) as heart,
    ):
        with rundir.disk_told(folder, cfg.data.cache_dir):
            run = setup.assemble(cfg, folder, store, held)
        # Anew, for now the folder is there.
        with rundir.disk_told(folder, cfg.data.cache_dir), memory.exhausted(run.cfg, run.mesh):
            heart.settles()
            evaluator = dataclasses.replace(run.evaluator, scored=heart.scored)
            return _train(dataclasses.replace(run, evaluator=evaluator), heart)


def _train(run: setup.Setup, heart: Heartbeat) -> dict[str, Any]:
    for line in run.lines:
        console.say(line)
    state, manifest = run.restore() if run.resuming else run.begin()
    with (
        contextlib.closing(Progress(run, manifest)) as progress,
        contextlib.closing(run.checkpoints) as checkpoints,
        jax.set_mesh(run.mesh),
    ):

        def score(state: TrainState, position: int) -> None:
            if progress.evaluate(state, position):
                checkpoints.save(state.saved(), manifest | {"position": position}, best=True)

        if manifest.get("unscored"):
            score(state, run.start)
        for updates, batch in progress.waited(run.batches()):
            heart.computes(batch["tokens"].shape)
            state, metrics = run.step(state, batch)
            heart.dispatched(updates, batch["tokens"].shape)
            progress.dispatched(updates, batch, metrics, state)
            position = updates.stop
            if run.evaluates(position):
                progress.catch_up(state)
                heart.rests()
                score(state, position)
            stopping = signals.agreed()
            if run.saves(position) or stopping:
                progress.catch_up(state)
                heart.rests()
                manifest["position"] = position
                # Among skipped updates every checkpoint would be the same, in place of older ones.
                if stopping or position == run.steps or not progress.skipping:
                    checkpoints.save(state.saved(), manifest)
            if stopping and position < run.steps:
                raise Interrupted(stopping, f"after update {position:,}")
            heart.reads()
    heart.rests()
    del state  # the best parameters take its place
    scoring = memory.exhausted(run.cfg, run.mesh, scoring=True)
    with jax.set_mesh(run.mesh), signals.let_through("this scoring"), scoring:
        return run.finish()
