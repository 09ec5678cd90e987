"""How likely a model finds ids after others: each scored once, at any length."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm_jax import config, console, sharding, step
from lm_jax.models.families import choose_attention, create_model
from lm_jax.workdir import Trained

LEAST = 32  # tokens of a row: shorter ones gain nothing, and each length is compiled


class Row(NamedTuple):
    """At most one window of inputs and the id after it; the last ids are scored."""

    ids: Sequence[int]
    scored: int


def rows_of(context: Sequence[int], ids: Sequence[int], window: int) -> list[Row]:
    """Rows that score each of `ids` once, after what stands before it.

    Whatever a window leaves out is on the left. Where `ids` are longer than the window, each row
    but the last scores a whole window, and the last has a whole window before its end: the rolling
    windows of lm_eval.

    Args:
        context: ids that are read alone, at least one.
        ids: those that are scored.
        window: most ids that the model reads.
    """
    text = [*context, *ids]
    ends = [*range(len(context) + window, len(text), window), len(text)] if len(ids) else []
    firsts = [len(context), *ends]
    return [
        Row(text[max(0, end - window - 1) : end], end - first)
        for first, end in zip(firsts, ends, strict=False)
    ]


class Likelihood(NamedTuple):
    """Of ids after a context."""

    log_prob: float  # nats
    greedy: bool  # whether no other id is more likely than any of them


class Scorer:
    """Scores ids with a model, in batches of `config.eval.batch_size` rows of about one length."""

    def __init__(self, run: Trained):
        """Nothing is compiled yet."""
        self.run, self.window = run, run.cfg.data.seq_len
        self._rows = sharding.round_up(run.cfg.eval.batch_size, run.mesh)
        self._steps: dict[int, Callable[..., step.Metrics]] = {}

    def __call__(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """The likelihood of the second ids of each pair after the first, in order.

        The first are at least one id; where both do not fit the window, see `rows_of`.

        Raises:
            FloatingPointError: if the model's numbers are not finite.
        """
        rows, owners = [], []
        for number, (context, ids) in enumerate(requests):
            made = rows_of(context, ids, self.window)
            rows += made
            owners += [number] * len(made)
        log_probs, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        by_width: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            by_width.setdefault(self._width(row), []).append(place)
        with console.phase("scoring", len(rows)) as scoring:
            for width, places in sorted(by_width.items(), reverse=True):
                for first in range(0, len(places), self._rows):
                    now = places[first : first + self._rows]
                    nats_N, greedy_N = self._score([rows[place] for place in now], width)
                    owner_N = [owners[place] for place in now]
                    np.subtract.at(log_probs, owner_N, nats_N)
                    np.logical_and.at(greedy, owner_N, greedy_N)
                    scoring.update(scoring.done + len(now))
        if not np.isfinite(log_probs).all():
            raise FloatingPointError(
                f"The logits at step {self.run.step} are not finite: the model diverged, or its "
                "numbers leave the range of config.train.compute_dtype="
                f"{self.run.cfg.train.compute_dtype!r}."
            )
        return [
            Likelihood(*found) for found in zip(log_probs.tolist(), greedy.tolist(), strict=True)
        ]

    def _width(self, row: Row) -> int:
        """The inputs of a row with its padding: a power of two, or the window."""
        least = max(LEAST, 1 << (len(row.ids) - 2).bit_length())
        return min(least, self.window)

    def _score(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Nats, float64, and whether all is greedy, of each row."""
        shape = self._rows, width + 1
        batch = {
            "tokens": np.full(shape, self.run.tokenizer.separator, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "weights": np.zeros(shape, np.float32),
        }
        for b, (ids, scored) in enumerate(rows):
            batch["tokens"][b, : len(ids)] = ids
            batch["segment_ids"][b, : len(ids)] = 1
            batch["weights"][b, len(ids) - scored : len(ids)] = 1
        batch = sharding.put_batch(self.run.mesh, batch, axis=0)
        found = jax.device_get(self._step(width)(self.run.params, batch))
        missed_BT = found["token_weights"] - found["token_correct"]
        nats_B = found["token_nats"].sum(axis=1, dtype=np.float64)
        return nats_B[: len(rows)], (missed_BT.sum(axis=1) == 0)[: len(rows)]

    def _step(self, width: int) -> Callable[..., step.Metrics]:
        """The evaluation of rows of one width, with the attention for it."""
        if width not in self._steps:
            cfg = config.replace(self.run.cfg, data__seq_len=width)
            vocab_size = self.run.tokenizer.vocab_size
            graphdef, _ = create_model(cfg, vocab_size, choose_attention(cfg)[0])
            self._steps[width] = step.make_eval_step(cfg, graphdef, self.run.mesh)
        return self._steps[width]
