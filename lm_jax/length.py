"""The length of a run: its calls and events, and what another length changes."""

import itertools

from lm_jax import config, optim
from lm_jax.config import Config


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
    """True if an event that happens every `every` updates, and at the end, is due now."""
    return position == steps or (int(every) > 0 and position % int(every) == 0)


def renewed(old: Config, cfg: Config, position: int) -> list[str]:
    """In words, what of a run changes at update `position`, from where it goes on."""
    before, steps = int(old.train.steps), int(cfg.train.steps)
    lines = []
    if steps != before:
        then = float(optim.learning_rate(old.optim, before)(position))
        now = float(optim.learning_rate(cfg.optim, steps)(position))
        lines.append(
            f"{'lengthened' if steps > before else 'shortened'} from {before:,} to {steps:,} "
            f"updates: the learning rate at update {position:,} goes from {then:.2e} to {now:.2e}"
        )
    if position not in {call.stop for call in dispatches(cfg, 0)}:
        lines.append(
            f"update {position:,} is no end of a call in a run like this one, which from the start "
            "could differ in the last bits"
        )
    if changed := config.difference(old, cfg, {"train.steps"}):
        lines.append(f"changed from here on: {'; '.join(changed)}")
    return lines
