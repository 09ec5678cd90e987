"""The parts of a run, put together before its first update."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import lm_jax
from lm_jax import (
    checkpoint,
    console,
    evaluate,
    generate,
    length,
    memory,
    preflight,
    report,
    rundir,
    sharding,
    step,
    together,
    workdir,
    writers,
)
from lm_jax.checkpoint import Checkpoints, Kept, Manifest
from lm_jax.compilations import keep_compilations
from lm_jax.config import Config, ConfigError, rules
from lm_jax.config.resolve import resolve, spans
from lm_jax.data import windows
from lm_jax.data.open import open_data
from lm_jax.data.store import Store
from lm_jax.distill import scores
from lm_jax.distill.objective import distilled
from lm_jax.distill.opening import open_teacher, record_teacher, verify
from lm_jax.distill.teachers import Teacher
from lm_jax.environment import check_environment
from lm_jax.evaluate import Evaluator
from lm_jax.files import write_text
from lm_jax.generate import Sample
from lm_jax.kernels.device import choose_dtype
from lm_jax.models.families import choose_attention, create_model
from lm_jax.objective import NextToken, Objective
from lm_jax.start import Origin, find_origin
from lm_jax.step import TrainState


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run; none of them changes while it goes on."""

    cfg: Config  # resolved
    folder: pathlib.Path  # the workdir
    store: Store
    mesh: Mesh
    windows: int  # of one epoch
    graphdef: nnx.GraphDef
    objective: Objective
    init_state: Callable[..., TrainState]  # of a key and, unless they are drawn, the parameters
    train_steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluator: Evaluator
    checkpoints: Checkpoints
    lines: tuple[str, ...]  # what was chosen, in words
    resuming: bool  # whether the folder holds a checkpoint of this run
    teacher: Teacher | None = None
    origin: Origin | None = None  # what a new run starts from

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return int(self.cfg.train.steps)

    @functools.cached_property
    def start(self) -> int:
        """Updates that this run has behind it."""
        if self.origin is not None and self.origin.whole:
            return self.origin.update
        return self.checkpoints.position() or 0

    def restore(self) -> tuple[TrainState, Manifest]:
        """The newest good checkpoint of this run.

        Raises:
            ConfigError: if what is trained beside the model was saved by version 0.2.
            Damaged: if no checkpoint is good.
        """
        like = self._like.saved()

        def read(kept: Kept) -> tuple[dict[str, Any], Manifest]:
            self._refuse_older(manifest := kept.manifest())
            return kept.restore(like), manifest

        state, manifest = self.checkpoints.restore(read)
        # After a kill the best checkpoint may be newer than the one to go on from.
        best = self.checkpoints.best()
        manifest |= {name: best.get(name) for name in ("best_loss", "best_position")}
        return TrainState(**state), manifest

    def _refuse_older(self, manifest: Manifest) -> None:
        if self.objective.beside_lr and "version" not in manifest:
            raise ConfigError(
                f"{self.folder}: the projections of this distillation were saved by lm_jax 0.2, "
                "and this version cannot go on from them; go on with that one, or train anew in "
                "another --workdir."
            )

    def begin(self) -> tuple[TrainState, Manifest]:
        """The state before the first update, once teachers and doctor have nothing against it.

        Raises:
            ConfigError: if a teacher is not what its record says, or knows nothing of the text, or
                if the state to start from is another one.
            Unfit: if a check of the doctor failed.
        """
        if self.teacher:
            with console.phase("examining the teacher"):
                taught = verify(self.teacher, self.cfg, self.store)
            for line in taught:
                console.say(line)
        examine_run(self.cfg, self.store, self.folder)
        manifest: Manifest = {"position": 0, "tokens": 0}
        key, origin, like = jax.random.key(self.cfg.seed), self.origin, self._like
        if origin is not None and origin.whole:
            with console.phase("reading the state to start from"):
                saved, manifest = origin.state(like.saved())
            self._refuse_older(manifest)
            state = TrainState(**saved)
        else:
            given = () if origin is None else (origin.weights(like.params),)
            shardings = jax.tree.map(lambda x: x.sharding, like)
            with console.phase("drawing the parameters"):
                state = jax.jit(self.init_state, out_shardings=shardings)(key, *given)
        manifest |= {"version": lm_jax.__version__, "best_loss": None, "best_position": None}
        manifest["skipped"] = []
        return state, manifest

    @property
    def _like(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        abstract = jax.eval_shape(self.init_state, jax.random.key(self.cfg.seed))
        return checkpoint.abstract_like(abstract, sharding.places(self.mesh, abstract))

    def batches(self) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
        """The remaining calls: the updates of each, and their batches."""
        data, calls = self.cfg.data, length.Calls(self.cfg, self.start)
        batches = windows.train_batches(
            self.store.split("train"),
            seq_len=data.seq_len,
            batch_size=data.batch_size,
            document_mask=data.document_mask,
            seed=self.cfg.seed,
            calls=calls,
            movable=data.window_offset,
            growth=int(data.growth),
            **sharding.share_of_rows(self.mesh),
            threads=data.threads,
            extend=self.objective.extend,
        )
        return zip(calls, batches, strict=True)

    def step(
        self, state: TrainState, batch: dict[str, np.ndarray]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Dispatch the updates of one call; the state is donated."""
        on_device = sharding.put_batch(self.mesh, batch, axis=1)
        with jax.transfer_guard("disallow"):
            return self.train_steps(state, on_device, self.objective.reads)

    def evaluates(self, position: int) -> bool:
        """True if the valid split is scored after this update."""
        return length.due(position, self.cfg.train.eval_every, self.steps)

    def saves(self, position: int) -> bool:
        """True if a checkpoint is written after this update."""
        return length.due(position, self.cfg.train.checkpoint_every, self.steps)

    def evaluate(self, state: TrainState) -> tuple[dict[str, Any], list[Sample]]:
        """Score the valid split and sample, with averaged parameters if there are any."""
        params = state.ema if self.cfg.optim.ema_decay else state.params
        with memory.exhausted(self.cfg, self.mesh, scoring=True):
            result = self.evaluator(params, "valid")
        if jax.process_count() > 1:
            return result, []
        parts = self.cfg, self.store.tokenizer, self.mesh, self.graphdef, params
        now = workdir.Trained(*parts, int(state.step), self.store.manifest)
        return result, generate.sample_prompts(now, self.folder)

    def finish(self) -> dict[str, Any]:
        """Score the best checkpoint on the splits that the config names."""
        best = workdir.open_trained(self.folder, mesh=self.mesh)
        if self.teacher is not None:
            scores.report_distillation(self.cfg, self.folder, best, self.store, self.teacher)
        # Last, for they say that the run is finished.
        names = rules.eval_splits(self.cfg, self.store.manifest["splits"])
        results = evaluate.score_splits(self.evaluator, best, self.folder, names)
        if jax.process_index() == 0:
            report.write(self.folder)
        return results


def assemble(
    cfg: Config, folder: pathlib.Path, store: Store | None, held: contextlib.ExitStack
) -> Setup:
    """Put a run together, and write its record into the workdir or compare with the one there.

    Args:
        cfg: the config as written; what it leaves open is resolved here.
        folder: the workdir.
        store: the data of the config, if they are open already.
        held: takes the lock of the workdir, to be released when the run has ended.

    Raises:
        ConfigError: for an impossible config, or one that differs from the workdir's, or if another
            trainer has the workdir.
    """
    asked = rules.validate(cfg)
    check_environment(asked, folder)
    keep_compilations(cfg)
    store = store or open_data(asked)
    train = store.split("train")
    epoch = windows.count_windows(train, cfg.data.seq_len, cfg.data.window_offset)
    cfg = resolve(asked, windows=epoch)
    mesh = sharding.make_mesh(cfg.mesh)
    for prompt in generate.evaluation_prompts(cfg):
        generate.encode_prompt(store.tokenizer, prompt, "config.train.sample_prompts")
    graphdef, init = create_model(cfg, store.tokenizer.vocab_size, choose_attention(cfg)[0])
    teacher = None
    objective: Objective = NextToken.of(cfg, graphdef)
    if cfg.distill.taught:
        teacher = open_teacher(cfg, store, mesh)
        objective = distilled(cfg, graphdef, init, teacher)

    def init_state(key: jax.Array, params: Any = None) -> TrainState:
        params = init(key) if params is None else params
        return step.init_state(cfg, params, objective.beside(key))

    memory.require_memory(cfg, mesh, jax.eval_shape(init_state, jax.random.key(0)))
    lines = _choices(asked, cfg, store, mesh, epoch, init)  # refuses before there is a folder
    checkpoints, origin, more = _enter(folder, cfg, store, asked, held)
    resuming = checkpoints.position() is not None
    if teacher is not None:
        record_teacher(folder, teacher, resuming=resuming)
    return Setup(
        cfg=cfg,
        folder=folder,
        store=store,
        mesh=mesh,
        windows=epoch,
        graphdef=graphdef,
        objective=objective,
        init_state=init_state,
        train_steps=step.make_train_step(cfg, objective),
        evaluator=Evaluator(cfg, store, mesh, step.make_eval_step(cfg, graphdef, mesh)),
        checkpoints=checkpoints,
        lines=lines + more,
        resuming=resuming,
        teacher=teacher,
        origin=origin,
    )


def _enter(
    folder: pathlib.Path, cfg: Config, store: Store, asked: Config, held: contextlib.ExitStack
) -> tuple[Checkpoints, Origin | None, tuple[str, ...]]:
    """Lock the workdir and write or renew the record in it.

    Returns:
        Its checkpoints; what a new run starts from; what is to be said of it.
    """
    together.require_agreement(cfg, store.manifest)
    origin = find_origin(cfg, store) if rundir.newest_update(folder) is None else None
    together.first_alone("lock", lambda: held.enter_context(rundir.occupied(folder)))
    checkpoints = Checkpoints(folder, cfg.train.keep)
    position = checkpoints.position()
    lines = []
    if jax.process_index() == 0:  # alone, for it clears the log below while others would read
        lines = writers.tell_divergence(folder, position, cfg.train.max_nonfinite)
    if position is not None:
        old = workdir.resume_record(folder, cfg, store, asked=asked, position=position)
        lines += length.renewed(old, cfg, position)
        if cfg.distill.taught and old.train.steps != cfg.train.steps:
            lines.append("the curves of config.distill.* run to the new end")
        return checkpoints, None, tuple(lines)
    checkpoints.clear_best()  # another run may have left something here
    workdir.clear_results(folder, *workdir.RESULTS)
    start = None if origin is None else origin.record
    workdir.record_config(folder, cfg, store, asked=asked, start=start)
    lines += [] if origin is None else [origin.line]
    return checkpoints, origin, tuple(lines)


def _choices(
    asked: Config, cfg: Config, store: Store, mesh: Mesh, epoch: int, init: Callable
) -> tuple[str, ...]:
    """The choices made for a run and their reasons, in words; `asked` is the config as written."""
    impl, reason = choose_attention(cfg)
    vocab_size = store.tokenizer.vocab_size
    with jax.set_mesh(mesh):  # the devices share the rows
        micro_batches = sharding.accumulation(cfg)
        loss, loss_reason = step.choose_loss(cfg, vocab_size)
    if cfg.distill.taught:
        loss, loss_reason = "fused", "one operation with the divergence"
    _, dtype_reason = choose_dtype(asked.train.compute_dtype)
    params = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))
    steps, per_update = int(cfg.train.steps), cfg.data.batch_size * cfg.data.seq_len
    tokens, devices = len(store.split("train").tokens), jax.devices()
    lines = [
        f"model: {params:,} parameters on {len(devices)} {devices[0].device_kind} device(s)",
        f"computed in {cfg.train.compute_dtype}: {dtype_reason}",
        f"attention {impl}: {reason}",
        f"loss {loss}: {loss_reason}",
        f"data: {tokens:,} training tokens in {store.path.name}",
        f"training: {steps:,} updates of {per_update:,} tokens, "
        f"{steps * cfg.data.batch_size / epoch:.1f} epochs"
        + (f", in {micro_batches} micro-batches" if micro_batches > 1 else ""),
    ]
    lines += [
        f"config.{path}: {span.written:,} updates made {span.taken:,}, {span.why}"
        for path, span in spans(asked, windows=epoch).items()
        if span.why
    ]
    return tuple(lines)


def examine_run(cfg: Config, store: Store, folder: pathlib.Path) -> None:
    """Examine a new run; keep the findings in `doctor.json`, print what is not in order.

    Raises:
        Unfit: if a check failed.
    """
    if cfg.doctor == "off":
        return
    report, kept = preflight.examine_once(cfg, level=cfg.doctor, store=store)
    if jax.process_index() == 0:
        write_text(folder / workdir.DOCTOR, report.to_json() + "\n")
        report.show(console.sheet())
        if kept:
            console.say(f"these findings are of {kept}, for the same config, data and code")
    if report.failed:
        raise preflight.Unfit(
            f"the doctor refuses this run: {', '.join(report.failed)} failed (above, and in "
            f"{folder / workdir.DOCTOR}); mend it, or give --config.doctor=off."
        )
