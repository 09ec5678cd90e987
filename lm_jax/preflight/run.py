"""The checks made before a run, on the run's own code and data."""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator

import jax

from lm_jax import console
from lm_jax.config import Config, rules
from lm_jax.config.resolve import resolve
from lm_jax.data import windows as pipeline
from lm_jax.data.open import open_data
from lm_jax.data.store import Store
from lm_jax.doctor.findings import Report
from lm_jax.preflight import data, distill
from lm_jax.preflight.small import Small


def examine_config(cfg: Config, *, level: str = "fast", store: Store | None = None) -> Report:
    """Examine the run that a config describes, before it starts.

    Data are the run's own. Model, loss, step and schedule are the run's own code and options, at
    two layers, a few heads and short rows, where every fault of the code is as visible.

    Args:
        cfg: the config as written.
        level: fast (seconds), or full, which adds short trainings on random tokens, gradients in
            float64, attention against the plain one and evaluation.
        store: the tokenised corpus, if it is open already.

    Raises:
        ConfigError: if the config is impossible.
        ValueError: if the corpus is.
    """
    if level not in ("fast", "full"):
        raise ValueError(f"level: {level!r} is neither fast nor full.")
    store = store or open_data(rules.validate(cfg))
    split = store.split("train")
    windows = pipeline.count_windows(split, cfg.data.seq_len, cfg.data.window_offset)
    cfg = resolve(cfg, windows=windows)
    with _compiled_soon(level), concurrent.futures.ThreadPoolExecutor(1) as beside:
        # NumPy counts while XLA compiles.
        of_data = beside.submit(data.examine_splits, cfg, store, windows, level=level)
        small = Small(cfg, store)
        parts: dict[str, Callable[[], Report]] = {
            "model": lambda: small.model(level),
            "loss": small.loss,
            "optimiser": lambda: small.optimiser(level),
        }
        if cfg.distill.taught:
            parts["teaching"] = lambda: distill.examine_teaching(cfg, small.cfg, store)
        parts["data"] = of_data.result
        if level == "full":
            parts |= {
                "training": small.training,
                "gradients": small.gradients,
                "attention": small.attention,
                "evaluation": small.evaluation,
            }
        report = Report()
        with console.phase("examining", len(parts)) as examining:
            for done, (name, examine) in enumerate(parts.items()):
                examining.update(done, f"{name}, {done + 1} of {len(parts)}")
                report += examine()
            examining.update(len(parts), f"{len(report.findings)} checks")
    return report


@contextlib.contextmanager
def _compiled_soon(level: str) -> Iterator[None]:
    """On a CPU skip most optimisations of what runs once: they take longer than they save."""
    before = jax.config.read("jax_disable_most_optimizations")
    soon = before or (level == "fast" and jax.default_backend() == "cpu")
    jax.config.update("jax_disable_most_optimizations", soon)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
