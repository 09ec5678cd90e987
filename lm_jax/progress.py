"""Logging and guarding a run while it goes on."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lm_jax import console, metrics, preflight, report, signals, step
from lm_jax.checkpoint import Manifest
from lm_jax.data.references import references
from lm_jax.doctor import provenance
from lm_jax.history import Log
from lm_jax.models.families import family
from lm_jax.samples import drop_samples
from lm_jax.setup import Setup
from lm_jax.signals import Interrupted
from lm_jax.step import TrainState
from lm_jax.trace import Trace
from lm_jax.writers import Writers

Batch = dict[str, np.ndarray]
_TELLING = 1e6  # perplexities of a word beyond it say nothing to a person
_SHOWN = 300  # characters of a sample
_LOGGED = ("loss", "token_ppl", "word_ppl", "bits_per_byte", "accuracy", "token_count")


class Call(NamedTuple):
    """A call of the step that was dispatched and is not logged yet."""

    updates: range
    batch: Batch
    metrics: dict[str, jax.Array]
    signal: jax.Array | None  # of any process, if there are several


class Progress:
    """Logs calls one behind the device, guards against updates that are not finite."""

    def __init__(self, run: Setup, manifest: Manifest):
        """Open the files of a run and say what it is.

        Args:
            run: its parts.
            manifest: what was saved with its state; kept up to date here.
        """
        cfg = run.cfg
        self.run, self.manifest = run, manifest
        again = bool(manifest.get("unscored"))
        self._writers = Writers(
            run.folder, cfg, start=run.start, resuming=run.resuming, again=again
        )
        if jax.process_index() == 0:
            drop_samples(run.folder, run.start - again)
        self._trace = Trace(run.folder, cfg.train.profile.updates())
        self._peak = metrics.peak_flops(
            jax.devices()[0].device_kind, cfg.train.compute_dtype, jax.device_count()
        )
        self._pending: Call | None = None
        self._clock = 0.0  # when the last call was done, or this one began
        self._waited = 0.0  # seconds since then without a batch
        self._recent = 0.0, 0.0  # tokens and seconds of the last calls
        self._skipped: list[int] = manifest.setdefault("skipped", [])  # in a row
        self._valid: tuple[str, ...] = ()
        self._watch, self._log = preflight.Watch(run.folder), Log(run.folder)
        self._open = contextlib.ExitStack()
        self._shared = signals.Shared(run.mesh) if jax.process_count() > 1 else None

    def close(self) -> None:
        """Close the files."""
        self._open.close()
        self._trace.close()
        self._writers.close()

    def waited(self, batches: Iterable[tuple[range, Batch]]) -> Iterator[tuple[range, Batch]]:
        """Pass batches through and time how long the loop waits for each."""
        remaining = iter(batches)
        self._phase = self._open.enter_context(console.phase("compiling"))
        while True:
            began = time.perf_counter()
            if self._pending is None:
                self._clock = began
            if (item := next(remaining, None)) is None:
                return
            self._waited += time.perf_counter() - began
            self._trace.before(item[0])
            yield item

    def dispatched(
        self, updates: range, batch: Batch, values: dict[str, jax.Array], state: TrainState
    ) -> None:
        """Log the call before, while this one computes."""
        asked = None if self._shared is None else self._shared.ask()
        if not self._phase.total:
            self._open.close()
            self._open.enter_context(signals.held())  # from now on there is something to lose
            training = console.phase("training", self.run.steps, updates.start)
            self._phase = self._open.enter_context(training)
        self.catch_up(state)
        self._pending = Call(updates, batch, values, asked)

    def catch_up(self, state: TrainState) -> None:
        """Log the call that is not logged yet; waits until it is done.

        Raises:
            FloatingPointError: after `train.max_nonfinite` skipped updates in a row, or one that
                made the parameters infinite.
        """
        if self._pending is None:
            return
        call, self._pending = self._pending, None
        cfg, run = self.run.cfg, self.run
        values, answer = jax.device_get((call.metrics, call.signal))
        if answer is not None:
            signals.note(answer)
        # The device goes from call to call, so one lasts from the end of the one before to its own.
        done = time.perf_counter()
        seconds, waited = done - self._clock, self._waited
        self._clock, self._waited = done, 0.0
        self._trace.after(call.updates)
        per_update = cfg.data.batch_size * cfg.data.seq_len
        seq_len = call.batch["tokens"].shape[-1] - 1
        speed = metrics.throughput(
            tokens=len(call.updates) * per_update,
            seconds=seconds,
            steps=len(call.updates),
            input_wait=waited,
            flops=metrics.flops_per_token(cfg, run.store.tokenizer.vocab_size, seq_len),
            peak=self._peak,
        )
        for i, now in enumerate(range(call.updates.start + 1, call.updates.stop + 1)):
            row = {key: value[i] for key, value in values.items()}
            scored = int(row.pop("data/scored"))
            self.manifest["tokens"] += scored
            row |= {
                "data/scored_fraction": scored / per_update,
                "data/tokens": self.manifest["tokens"],
                "data/examples": now * cfg.data.batch_size,
                "data/epoch": now * cfg.data.batch_size / run.windows,
                **speed,
            }
            if now == run.start + 1 > 1:
                row["resumed"] = run.start
            self._writers.write(now, row)
            self._guard(now, row, {key: value[i] for key, value in call.batch.items()}, state)
        self._loss = float(row["train/loss"])
        self._told(now, len(call.updates) * per_update, seconds)

    def _told(self, now: int, tokens: int, seconds: float) -> None:
        """Tell how far the run is, after a call of `tokens` that took `seconds`."""
        before = self._phase.done
        if before == self.run.start:  # the first call was compiled
            self._phase.restart(now)
        else:
            self._recent = tokens + 0.9 * self._recent[0], seconds + 0.9 * self._recent[1]
            self._show(now)
        every = int(self.run.cfg.train.log_every)
        if every and now // every > before // every:
            console.say(self._phase.line())

    def _show(self, now: int) -> None:
        tokens, seconds = self._recent
        self._phase.update(
            now,
            f"loss {self._loss:.4f}",
            *self._valid,
            f"{tokens / seconds:,.0f} tok/s",
            f"{now:,}/{self.run.steps:,}",
        )

    def _guard(self, now: int, row: dict[str, Any], batch: Batch, state: TrainState) -> None:
        """Name skipped updates and what spoiled them; stop after too many, or infinite parameters.

        What is saved is looked at here before.
        """
        if not math.isfinite(row["optim/param_norm"]):
            raise FloatingPointError(
                f"update {now:,} made the parameters infinite, at a learning rate of "
                f"{row['optim/lr']:.3g}; lower config.optim.peak_lr."
            )
        if not row["optim/skipped_updates"]:
            self._skipped.clear()
            return
        self._skipped.append(now)
        console.say(f"update {now} skipped: loss or gradient of batch {now - 1} is not finite")
        if len(self._skipped) == 1 and jax.process_count() == 1:
            gradients_of = step.make_gradients(self.run.cfg, self.run.objective)

            def spoiled(params: Any, batch: Any) -> tuple[Any, ...]:
                grads, found = gradients_of(params, now - 1, state.loss_scale, batch)
                return found.nats, found.count, grads

            origin = provenance.trace(spoiled, params=state.trained, batch=batch)
            console.say(provenance.describe(origin))
        if len(self._skipped) >= self.run.cfg.train.max_nonfinite:
            raise FloatingPointError(
                f"updates {self._skipped[0]} to {self._skipped[-1]} were all skipped for "
                "non-finite loss or gradient; lower config.optim.peak_lr or look at these batches."
            )

    @property
    def skipping(self) -> bool:
        """Whether the last update that was logged was skipped: the state is that of before it."""
        return bool(self._skipped)

    def evaluate(self, state: TrainState, position: int) -> bool:
        """Score the valid split and log it; whether it is the best so far, as the manifest says.

        A signal comes first: then the run that goes on scores it.
        """
        self.catch_up(state)
        self.manifest["unscored"] = True
        try:
            with signals.let_through():
                result, samples = self.run.evaluate(state)
        except Interrupted:
            return False
        self.manifest["unscored"] = False
        row = {name: value for name, value in result.items() if name in _LOGGED}
        if observed := family(self.run.cfg.model).observed:
            for column, by_layer in result[observed.name].items():
                row[f"{observed.name}/{column}"] = sum(by_layer) / len(by_layer)
        self._writers.write(position, {f"valid/{name}": value for name, value in row.items()})
        best = self.manifest["best_loss"]
        better = bool(result["loss"] < (math.inf if best is None else best)) and not self.skipping
        if better:
            self.manifest |= {"best_loss": result["loss"], "best_position": position}
        self._valid = (f"valid {result['loss']:.4f}",)
        if self._recent[1]:
            self._show(position)
        telling = metrics.has_words(result) and result["word_ppl"] < _TELLING
        words = f", word perplexity {result['word_ppl']:,.2f}" if telling else ""
        console.say(
            f"update {position:,}: valid loss {result['loss']:.4f}, bits per byte "
            f"{result['bits_per_byte']:.4f}{words}" + (", the best so far" if better else "")
        )
        for number, one in enumerate(samples):
            self._writers.text(position, f"samples/{number}", one.prompt + one.text)
            console.say(f"sample: {' '.join((one.prompt + one.text).split())[:_SHOWN]}")
        if jax.process_index() == 0:
            lines = references(self.run.store, "valid")
            if self.run.cfg.doctor != "off":
                for line in self._watch.look(lines):
                    console.say(line)
            report.write(self.run.folder, lines, self._log)
        return better
