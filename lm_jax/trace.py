"""A profiler's trace of some updates: `--config.train.profile=10:20`."""

import pathlib

import jax


class Trace:
    """Writes what device and host do in the calls that hold some updates; one process, one trace.

    TensorBoard's profile plugin, XProf and Perfetto show it.
    """

    def __init__(self, workdir: pathlib.Path, updates: range):
        """Nothing is written before the first of the `updates`, which are counted from 1."""
        self._folder, self._updates = workdir / "profile", updates
        self._on = False

    def before(self, call: range) -> None:
        """Begin, if an update of this call is asked for; `call` counts from 0, as batches do."""
        first, last = self._updates.start, self._updates.stop - 1
        if not self._on and call.start < last and call.stop >= first:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, call: range) -> None:
        """End, if this call, which is done, has the last of the updates."""
        if self._on and call.stop >= self._updates.stop - 1:
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
