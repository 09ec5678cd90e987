"""What is handed to `examine_evaluation`, and predictors planted in place of the model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.old import Arguments, Skip, call


@dataclasses.dataclass(frozen=True)
class Given(Arguments):
    """The arguments of `examine_evaluation`, which has their types and describes them."""

    vocab_size: int
    seq_len: int
    seed: int
    compute_dtype: str
    evaluate_fn: Any
    targets: Any
    batch_sizes: Any
    strides: Any
    batches_fn: Any
    processes: int
    logits_fn: Any
    train_logits_fn: Any
    extend_fn: Any
    continuation: Any
    sampler: Any
    sampler_options: Any
    never_sampled: Any
    loss: float | None
    references: Any

    @property
    def eps(self) -> float:
        """Step of the compute dtype near 1."""
        return float(jnp.finfo(self.compute_dtype).eps)

    @functools.cached_property
    def counts_V(self) -> np.ndarray:
        """How often each id is a target."""
        return np.bincount(np.asarray(self.targets).ravel(), minlength=self.vocab_size)

    @functools.cached_property
    def noisy_V(self) -> np.ndarray:
        """Logits of a predictor that looks at nothing; its costs per token differ by nats."""
        return np.random.default_rng(self.seed).normal(0, 3, self.vocab_size).astype(np.float32)

    def costly_V(self, nats: float) -> np.ndarray:
        """Logits of one that is sure of the rarest id, so that every other target costs `nats`."""
        logits_V = np.zeros(self.vocab_size, np.float32)
        logits_V[np.argmin(self.counts_V)] = nats
        return logits_V

    def truth(self, logits_V: np.ndarray) -> float:
        """Nats per target of such a predictor, exactly."""
        wide_V = logits_V.astype(np.float64)
        top = np.max(wide_V)
        nats_V = top + np.log(np.exp(wide_V - top).sum()) - wide_V
        return float(self.counts_V @ nats_V / self.counts_V.sum())

    def evaluate(self, name: str, logits_V: np.ndarray, *how: int) -> float:
        """What the user's evaluation reports of a predictor that gives these logits everywhere.

        Raises:
            Skip: if it does not report `name`.
        """
        key = (logits_V.tobytes(), how)
        if key not in self._results:
            table_V = jnp.asarray(logits_V)

            def predict(tokens: Any) -> Any:
                return jnp.broadcast_to(table_V, (*np.shape(tokens), self.vocab_size))

            self._results[key] = call("evaluate_fn", self.evaluate_fn, predict, *how)
        result = self._results[key]
        if not isinstance(result, Mapping) or name not in result:
            raise Skip(f"evaluate_fn does not return a mapping with '{name}'.")
        return call(f"float of the {name} from evaluate_fn", lambda: float(result[name]))

    @functools.cached_property
    def _results(self) -> dict[Any, Any]:
        return {}

    @functools.cached_property
    def tokens_BT(self) -> np.ndarray:
        """Random tokens [2, T]."""
        rng = np.random.default_rng(self.seed)
        return rng.integers(0, self.vocab_size, (2, self.seq_len)).astype(np.int32)

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """The user's logits in float64.

        Raises:
            Skip: if they have another shape or are not finite.
        """
        logits_BTV = np.asarray(call("logits_fn", self.logits_fn, tokens_BT), np.float64)
        return checked("logits_fn", logits_BTV, (*tokens_BT.shape, self.vocab_size))


def checked(name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array, if it has the shape and is finite, or `Skip`."""
    if x.shape != shape:
        raise Skip(f"{name} returned shape {x.shape}, expected is {shape}.")
    if not np.isfinite(x).all():
        raise Skip(f"{name} returned {(~np.isfinite(x)).sum()} numbers that are not finite.")
    return x
