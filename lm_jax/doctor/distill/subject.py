"""A distillation as a black box: teacher, targets, objective and loop."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.distill.divergence import log_softmax
from lm_jax.doctor.old import Arguments, Skip, call
from lm_jax.doctor.trees import Arrays, named, same


@dataclasses.dataclass(frozen=True)
class Given(Arguments):
    """The arguments of `examine_distillation`, which has their types and describes them."""

    teacher_fn: Any
    teacher_params: Any
    targets_fn: Any
    batch: Any
    unigram_nats: Any
    suffix_fn: Any
    compute_dtype: str
    student_params: Any
    objective_fn: Any
    whole_fn: Any
    eval_fn: Any
    init_fn: Any
    step_fn: Any
    student_of: Any
    teacher_of: Any
    calls: int
    student_parameters: Any
    teacher_parameters: Any
    records: Any
    weights_fn: Any
    steps: Any
    contrastive_candidates: Any
    seed: int

    @property
    def eps(self) -> float:
        """Step of the compute dtype near 1."""
        return float(jnp.finfo(self.compute_dtype).eps)

    @property
    def tokens(self) -> np.ndarray:
        """Student tokens [B, T] of the batch."""
        self.need("batch")
        return call("batch['tokens']", lambda: np.asarray(self.batch["tokens"]))

    @property
    def scored(self) -> np.ndarray:
        """Whether the logits at a position [B, T - 1] are scored on the next token."""
        if "weights" not in self.batch:
            return np.ones(self.tokens[:, 1:].shape, bool)
        return np.asarray(self.batch["weights"])[:, 1:] > 0

    def targets(self, batch: Any = None, teacher_params: Any = None) -> np.ndarray:
        """Teacher logits [B, T, V] as the student's loss reads them."""
        self.need("targets_fn", "teacher_params", "batch")
        params = self.teacher_params if teacher_params is None else teacher_params
        batch = self.batch if batch is None else batch
        made = call("targets_fn", self.targets_fn, params, batch)
        return self._logits("targets_fn", made)

    @functools.cached_property
    def alone(self) -> np.ndarray:
        """The teacher's logits on the batch's tokens, outside the pipeline."""
        self.need("teacher_fn", "teacher_params", "batch")
        made = call("teacher_fn", self.teacher_fn, self.teacher_params, self.tokens)
        return self._logits("teacher_fn", made)

    def _logits(self, what: str, made: Any) -> np.ndarray:
        logits = call(f"np.asarray of what {what} returned", np.asarray, made)
        if logits.ndim != 3 or logits.shape[:2] != self.tokens.shape:
            raise Skip(f"{what} returned shape {logits.shape}, not {self.tokens.shape} and V.")
        return logits.astype(np.float64)

    def objective(self, teacher_params: Any, alpha: float) -> tuple[float, dict[str, float]]:
        """Total and raw parts for a share alpha of distillation."""
        self.need("objective_fn", "student_params", "teacher_params", "batch")
        made = call(
            "objective_fn",
            self.objective_fn,
            self.student_params,
            teacher_params,
            self.batch,
            alpha,
        )
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping)):
            raise Skip("objective_fn did not return (total, mapping of raw parts).")
        parts = {str(n): call(f"part {n}", float, x) for n, x in made[1].items()}
        return call("the total", float, made[0]), parts

    @functools.cached_property
    def loop(self) -> tuple["Point", "Point"]:
        """Student, teacher and targets before and after some calls of the loop."""
        self.need("init_fn", "step_fn", "student_of", "batch")
        state = call("init_fn", self.init_fn, self.seed)
        before = Point.of(self, state)
        for _ in range(self.calls):
            made = call("step_fn", self.step_fn, state, self.batch)
            # A state may itself be a tuple, even a pair: metrics are a mapping at its end.
            pair = type(made) is tuple and len(made) == 2 and isinstance(made[1], Mapping)
            state = made[0] if pair else made
        after = Point.of(self, state)
        if before.student.keys() != after.student.keys():
            raise Skip("After a call student_of returns other leaves than before.")
        return before, after


@dataclasses.dataclass(frozen=True)
class Point:
    """What the loop holds at a time."""

    student: Arrays
    teacher: Arrays | None
    targets: np.ndarray | None

    @classmethod
    def of(cls, given: Given, state: Any) -> "Point":
        """Copied to the host."""
        student = call("student_of", lambda: named(given.student_of(state)))
        if given.teacher_of is None:
            return cls(student, None, None)
        params = call("teacher_of", given.teacher_of, state)
        teacher = call("np.asarray of the teacher", named, params)
        targets = None
        if given.targets_fn is not None and given.teacher_params is not None:
            targets = given.targets(teacher_params=params)
        return cls(student, teacher, targets)


def changed_leaves(before: Arrays, after: Arrays) -> list[str]:
    """Names of the leaves of which any bit is another."""
    return [n for n, x in before.items() if n not in after or not same(x, after[n])]


def next_token_nats(given: Given, logits: np.ndarray) -> np.ndarray:
    """Nats of the batch's scored next tokens under logits [B, T, V]."""
    scored, ahead = given.scored, given.tokens[:, 1:][given.scored]
    if not len(ahead):
        raise Skip("No token of batch is scored.")
    if not 0 <= ahead.min() <= ahead.max() < logits.shape[-1]:
        raise Skip(f"Tokens reach {ahead.max()}, logits have {logits.shape[-1]} entries.")
    log_p = log_softmax(logits[:, :-1][scored])
    return -np.take_along_axis(log_p, ahead[:, None], 1)[:, 0]
