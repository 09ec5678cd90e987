"""The training loop, top to bottom."""

import contextlib
import itertools
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lm_jax import checkpoint, evaluate, metrics, optim, preflight, sharding, step
from lm_jax.config import Config, rules
from lm_jax.config.resolve import resolve, rounded
from lm_jax.data import windows as pipeline
from lm_jax.data.open import open_data
from lm_jax.data.references import references
from lm_jax.data.store import Store
from lm_jax.distill import scores as distill_report
from lm_jax.distill import step as distill_step
from lm_jax.distill.opening import open_teacher, record_teacher, verify
from lm_jax.doctor import provenance
from lm_jax.kernels.device import choose_dtype
from lm_jax.signals import Interrupted, Signals, agree
from lm_jax.workdir import open_run, record_config
from lm_jax.writers import Writers


def train_and_evaluate(cfg: Config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Train, evaluate and checkpoint one run; with the same workdir, go on where it stopped.

    Args:
        cfg: the config as written; durations are resolved here.
        workdir: folder for everything the run leaves behind.

    Returns:
        The results of the scored splits by name, as in `eval_<split>.json`.

    Raises:
        ConfigError: for an impossible config, or one that differs from the workdir's.
        FloatingPointError: after `train.max_nonfinite` skipped updates in a row.
        Unfit: if the doctor finds the run at fault before it starts.
        Interrupted: after SIGTERM or SIGINT, once the state is saved.
    """
    workdir = pathlib.Path(workdir)
    store = open_data(rules.validate(cfg))
    train_split = store.split("train")
    windows = pipeline.count_windows(train_split, cfg.data.seq_len, cfg.data.window_offset)
    asked, dtype_reason = cfg.train.compute_dtype, choose_dtype(cfg.train.compute_dtype)[1]
    whole_calls = rounded(cfg, windows=windows)
    cfg = resolve(cfg, windows=windows)
    steps = int(cfg.train.steps)
    impl, reason = step.choose_attention(cfg)
    mesh = sharding.make_mesh(cfg.mesh.fsdp)
    with jax.set_mesh(mesh):  # the devices share the rows
        micro_batches = sharding.accumulation(cfg)
        loss_impl, loss_reason = step.choose_loss(cfg, store.tokenizer.vocab_size)
    distilling = bool(cfg.distill.teachers or cfg.distill.cache)
    if distilling:
        loss_impl, loss_reason = "fused", "one operation with the divergence"
    graphdef, init = step.create_model(cfg, store.tokenizer.vocab_size, impl)
    if distilling:
        teacher = open_teacher(cfg, store, mesh)
        auxiliary, init_aux = distill_step.create_auxiliary(cfg, graphdef, init, teacher)

    def init_state(key: jax.Array) -> step.TrainState:
        state = step.init_state(cfg, init(key))
        return state._replace(aux=init_aux(key)) if distilling else state

    abstract = jax.eval_shape(init_state, jax.random.key(cfg.seed))
    shardings = sharding.by_shape(mesh, abstract)
    checkpoints = checkpoint.Checkpoints(workdir, cfg.train.keep)
    start = checkpoints.position() or 0
    record_config(workdir, cfg, store, resuming=start > 0, asked_dtype=asked)
    if distilling:
        record_teacher(workdir, teacher, resuming=start > 0)
    teaching: list[str] = []
    if start:
        saved = checkpoint.abstract_like(abstract.saved(), shardings.saved())
        state = step.TrainState(**checkpoints.restore(saved))
        manifest = checkpoints.manifest()
        if checkpoints.position(best=True) is not None:
            # After a kill the best checkpoint may be newer than the one to go on from.
            best = checkpoints.manifest(best=True)
            manifest |= {"best_loss": best["best_loss"], "best_position": best["best_position"]}
    else:
        teaching = verify(teacher, cfg, store) if distilling else []
        examine(cfg, store, workdir)
        state = jax.jit(init_state, out_shardings=shardings)(jax.random.key(cfg.seed))
        manifest = {"position": 0, "tokens": 0, "best_loss": None, "best_position": None}
    calls = dispatches(cfg, start)
    batches = pipeline.train_batches(
        train_split,
        seq_len=cfg.data.seq_len,
        batch_size=cfg.data.batch_size,
        document_mask=cfg.data.document_mask,
        seed=cfg.seed,
        calls=calls,
        movable=cfg.data.window_offset,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=cfg.data.threads,
        extend=teacher.extend if distilling else dict,
    )
    if distilling:
        train_steps = distill_step.make_train_step(cfg, graphdef, auxiliary, teacher)
        gradients_of = distill_step.make_gradients(cfg, graphdef, auxiliary, teacher)
    else:
        train_steps = step.make_train_step(cfg, graphdef)
        gradients_of = step.make_gradients(cfg, graphdef)
    evaluator = evaluate.Evaluator(cfg, store, mesh, step.make_eval_step(cfg, graphdef, mesh))

    writers = Writers(workdir, steps=steps, start=start, tensorboard=cfg.train.tensorboard)
    decays = optim.decayed(cfg.optim, abstract.params)
    writers.say(
        f"{parameter_count(abstract.params):,} parameters on {jax.device_count()} "
        f"{jax.devices()[0].device_kind} device(s); {cfg.train.compute_dtype} ({dtype_reason}); "
        f"attention {impl} ({reason}); loss {loss_impl} ({loss_reason}); "
        f"{len(train_split.tokens):,} training tokens, {steps:,} updates of "
        f"{cfg.data.batch_size * cfg.data.seq_len:,}"
        + (f" in {micro_batches} micro-batches" if micro_batches > 1 else "")
        + f" from update {start:,}"
    )
    for path, (exact, whole) in whole_calls.items():
        writers.say(
            f"config.{path}: {exact:,} updates made {whole:,}, "
            f"whole calls of config.train.steps_per_call={cfg.train.steps_per_call}"
        )
    for line in teaching:
        writers.say(line)
    kept = [optim.path_name(p) for p, decay in jax.tree.leaves_with_path(decays) if not decay]
    writers.say(f"no weight decay on {len(kept)} leaves: {', '.join(kept)}")
    flops = metrics.flops_per_token(cfg, store.tokenizer.vocab_size)
    peak = metrics.peak_flops(
        jax.devices()[0].device_kind, cfg.train.compute_dtype, jax.device_count()
    )

    def finish(pending: dict[str, Any] | None, state: step.TrainState) -> None:
        """Log one dispatched call; reading its metrics waits until it is done."""
        if pending is None:
            return
        values = jax.device_get(pending["metrics"])
        seconds = time.perf_counter() - pending["began"]
        count = len(values["train/loss"])
        speed = metrics.throughput(
            tokens=count * cfg.data.batch_size * cfg.data.seq_len,
            seconds=seconds,
            steps=count,
            input_wait=pending["input_wait"],
            flops=flops,
            peak=peak,
        )
        for i in range(count):
            now = pending["step"] + i + 1
            row = {key: value[i] for key, value in values.items()}
            scored = int(row.pop("data/scored"))
            manifest["tokens"] += scored
            row |= {
                "data/scored_fraction": scored / (cfg.data.batch_size * cfg.data.seq_len),
                "data/tokens": manifest["tokens"],
                "data/examples": now * cfg.data.batch_size,
                "data/epoch": now * cfg.data.batch_size / windows,
                **speed,
            }
            if now == start + 1 > 1:
                row["resumed"] = start
            writers.write(now, row)
            if now % int(cfg.train.log_every) == 0 or now == steps:
                writers.progress(now, row)
            guard(now, row, {key: value[i] for key, value in pending["batch"].items()}, state)

    skipped: list[int] = []

    def guard(
        now: int, row: dict[str, Any], batch: dict[str, np.ndarray], state: step.TrainState
    ) -> None:
        """Name skipped updates and what spoiled them, and stop after too many in a row."""
        if not row["optim/skipped_updates"]:
            skipped.clear()
            return
        skipped.append(now)
        writers.say(f"update {now} skipped: loss or gradient of batch {now - 1} is not finite")
        if len(skipped) == 1 and jax.process_count() == 1:
            origin = provenance.trace(
                lambda params, batch: gradients_of(params, now - 1, state.loss_scale, batch),
                params=state.trained,
                batch=batch,
            )
            writers.say(provenance.describe(origin))
        if len(skipped) >= cfg.train.max_nonfinite:
            raise FloatingPointError(
                f"updates {skipped[0]} to {skipped[-1]} were all skipped for non-finite loss or "
                "gradient; lower config.optim.peak_lr or look at these batches."
            )

    watch = preflight.Watch(workdir)

    def evaluate_now(state: step.TrainState, position: int) -> None:
        result = evaluator(state.ema if cfg.optim.ema_decay else state.params, "valid")
        row = {k: v for k, v in result.items() if k in _LOGGED}
        for block, by_layer in result.get("sensitivity", {}).items():
            row[f"sensitivity/{block}"] = sum(by_layer) / len(by_layer)
        writers.write(position, {f"valid/{k}": v for k, v in row.items()})
        writers.say(
            f"step {position}/{steps}  valid loss {result['loss']:.4f}  word ppl "
            f"{result['word_ppl']:.2f}  bits per byte {result['bits_per_byte']:.4f}"
        )
        if cfg.doctor != "off" and jax.process_index() == 0:
            for line in watch.look(references(store, "valid")):
                writers.say(line)
        best = math.inf if manifest["best_loss"] is None else manifest["best_loss"]
        if result["loss"] < best:
            manifest.update(best_loss=result["loss"], best_position=position)
            checkpoints.save(state.saved(), manifest | {"position": position}, best=True)

    pending = None
    with (
        contextlib.closing(writers),
        contextlib.closing(checkpoints),
        Signals() as signals,
        jax.set_mesh(mesh),
    ):
        for call in calls:
            began = time.perf_counter()
            batch = next(batches)
            input_wait = time.perf_counter() - began
            device_batch = sharding.put_batch(mesh, batch, axis=1)
            with jax.transfer_guard("disallow"):
                state, values = train_steps(state, device_batch)
            # The previous call is logged while this one computes.
            finish(pending, state)
            pending = {
                "batch": batch,
                "metrics": values,
                "step": call.start,
                "began": began if pending is None else time.perf_counter(),
                "input_wait": input_wait,
            }
            position = call.stop
            evaluating = due(position, cfg.train.eval_every, steps)
            stopped_by = agree(signals.received)
            saving = due(position, cfg.train.checkpoint_every, steps) or stopped_by
            if evaluating or saving:
                finish(pending, state)
                pending = None
            if evaluating:
                evaluate_now(state, position)
            if saving:
                manifest["position"] = position
                checkpoints.save(state.saved(), manifest)
            if stopped_by and position < steps:
                checkpoints.wait()
                writers.say(
                    f"stopped by {stopped_by} after update {position}, which is saved; "
                    "run the same command again to go on"
                )
                raise Interrupted(0)
    del state  # the best parameters take its place
    with jax.set_mesh(mesh):
        run = open_run(workdir)
        names = rules.eval_splits(cfg, store.manifest["splits"])
        results = {name: evaluate.score_run(evaluator, run, workdir, name) for name in names}
        if distilling:
            distill_report.write(cfg, workdir, run, teacher)
    return results


def examine(cfg: Config, store: Store, workdir: pathlib.Path) -> None:
    """Examine a new run; keep the findings in `doctor.json`, print what is not in order.

    Raises:
        Unfit: if a check failed.
    """
    if cfg.doctor == "off":
        return
    report = preflight.examine_config(cfg, level=cfg.doctor, store=store)
    if jax.process_index() == 0:
        (workdir / "doctor.json").write_text(report.to_json() + "\n")
        report.show(Console(), everything=False)
    if report.failed:
        raise preflight.Unfit(
            f"the doctor refuses this run: {', '.join(report.failed)} failed (above, and in "
            f"{workdir / 'doctor.json'}); mend it, or give --config.doctor=off."
        )


_LOGGED = ("loss", "token_ppl", "word_ppl", "bits_per_byte", "accuracy", "token_count")


def dispatches(cfg: Config, start: int) -> list[range]:
    """The updates from `start` to the end, cut into the calls that are dispatched.

    Calls end on a grid that depends on the config alone, so that a resumed run compiles and runs
    the same calls as one that was never stopped.
    """
    steps = int(cfg.train.steps)
    every = (cfg.train.steps_per_call, int(cfg.train.eval_every), int(cfg.train.checkpoint_every))
    ends = {end for span in every if span for end in range(span, steps, span)} | {steps}
    bounds = [start, *sorted(end for end in ends if end > start)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


def due(position: int, every: str, steps: int) -> bool:
    """Whether something that happens `every` so many updates, and at the end, happens now."""
    return position == steps or (int(every) > 0 and position % int(every) == 0)


def parameter_count(params: Any) -> int:
    """Number of scalars in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
