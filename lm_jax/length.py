"""The length of a run: its calls and events, and what another length changes."""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Any

from lm_jax import config, optim
from lm_jax.config import Config


class Calls(Sequence[range]):
    """The updates from one on to the end, cut into the calls that are dispatched.

    Calls end on a grid that depends on the config alone, so that a resumed run compiles and runs
    the same calls as one that was never stopped. Each is computed when it is asked for: a list of
    the calls of a long run would fill the memory.
    """

    def __init__(self, cfg: Config, start: int):
        """The calls of a resolved config from update `start` on."""
        self._start, self._steps = start, int(cfg.train.steps)
        every = cfg.train.steps_per_call, int(cfg.train.eval_every), int(cfg.train.checkpoint_every)
        spans = {span for span in every if span} | {self._steps}
        self._spans = [s for s in spans if not any(s % other == 0 for other in spans - {s})]
        # By inclusion and exclusion: numbers that several spans divide count once.
        self._signs = [
            ((-1) ** (count + 1), math.lcm(*some))
            for count in range(1, len(self._spans) + 1)
            for some in itertools.combinations(self._spans, count)
        ]

    def _ends(self, update: int) -> int:
        """How many calls of the whole run end at this update or before."""
        return sum(sign * (update // span) for sign, span in self._signs)

    def ends_at(self, update: int) -> bool:
        """Whether a call of the whole run ends there."""
        return any(update % span == 0 for span in self._spans)

    def __len__(self) -> int:
        """The number of calls."""
        return max(0, self._ends(self._steps) - self._ends(self._start))

    def __getitem__(self, at: Any) -> Any:
        """The updates of one call."""
        earlier = self._ends(self._start) + range(len(self))[at]
        begin = bisect.bisect_left(range(self._steps), earlier, key=self._ends)
        begin = max(begin, self._start)  # of the first call, which may begin within one
        return range(begin, min(span * (begin // span + 1) for span in self._spans))


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
    if not Calls(cfg, 0).ends_at(position):
        lines.append(
            f"update {position:,} is no end of a call in a run like this one, which from the start "
            "could differ in the last bits"
        )
    if changed := config.difference(old, cfg, {"train.steps"}):
        lines.append(f"changed from here on: {'; '.join(changed)}")
    return lines
