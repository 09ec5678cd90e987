"""The objective of a train step: its interface, and next-token cross-entropy."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax import loss as losses
from lm_jax.config import Config
from lm_jax.kernels.dropout import Draw
from lm_jax.optim import Params

Metrics = dict[str, jax.Array]


class Summary(NamedTuple):
    """The sums of a whole batch."""

    divisor: jax.typing.ArrayLike  # what the gradient of the summed objective is divided by
    nats: jax.Array  # summed next-token nats
    count: jax.Array  # type: ignore[assignment]  # scored tokens
    metrics: Metrics = {}  # logged beside those of every step


class Objective(Protocol):
    """The quantity that a train step minimises.

    A batch is cut into micro-batches, whose values and gradients are added up: `plan` sees the
    whole batch before, `sums` one micro-batch, `summary` the added sums.
    """

    @property
    def reads(self) -> Any:
        """Arrays that are read and not trained, as a teacher's parameters."""

    @property
    def beside_lr(self) -> float:
        """Peak learning rate of what is trained beside the model; 0 if nothing is."""

    def extend(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add to a batch on the host what the objective needs of it."""

    def beside(self, key: jax.Array) -> Params | None:
        """The first parameters of what is trained beside the model; None if nothing is."""

    def plan(self, batch: losses.Batch, update: jax.typing.ArrayLike) -> Any:
        """Everything a micro-batch needs to know of its batch and of the number of the update."""

    def sums(
        self, trained: Any, rows: losses.Batch, plan: Any, draw: Draw | None, reads: Any
    ) -> tuple[jax.Array, Metrics]:
        """The summed objective of a micro-batch, to be differentiated, and sums to be logged.

        `trained` is the model's parameters or, with something beside it, the pair of both.
        """

    def summary(self, sums: Metrics, plan: Any) -> Summary:
        """The summary of a batch, from the added sums of its micro-batches."""


@dataclasses.dataclass(frozen=True, eq=False)
class NextToken:
    """Cross-entropy of the next token, mean over the scored tokens of a batch."""

    graphdef: nnx.GraphDef
    dtype: Any = jnp.float32  # of the activations
    loss_impl: str = "auto"
    label_smoothing: float = 0.0
    reads: Any = ()
    beside_lr: float = 0.0

    @classmethod
    def of(cls, cfg: Config, graphdef: nnx.GraphDef) -> "NextToken":
        """The objective of a resolved config."""
        dtype = jnp.dtype(cfg.train.compute_dtype)
        return cls(graphdef, dtype, cfg.loss.impl, cfg.loss.label_smoothing)

    def extend(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch as it is."""
        return batch

    def beside(self, key: jax.Array) -> None:
        """Nothing."""

    def plan(self, batch: losses.Batch, update: jax.typing.ArrayLike) -> None:
        """Nothing."""

    def sums(
        self, trained: Params, rows: losses.Batch, plan: None, draw: Draw | None, reads: Any
    ) -> tuple[jax.Array, Metrics]:
        """Summed nats, smoothed if asked for, and what is logged of them."""
        scored = self.scored(trained, rows, draw)
        return scored.objective, {"nats": scored.nats, "count": scored.count}

    def summary(self, sums: Metrics, plan: None) -> Summary:
        """A batch without a scored token has gradient 0, not 0 / 0."""
        return Summary(jnp.maximum(sums["count"], 1), sums["nats"], sums["count"])

    def scored(self, params: Params, rows: losses.Batch, draw: Draw | None = None) -> losses.Scored:
        """Sums over the scored tokens of some rows; `draw` is for dropout, None for none."""
        model = nnx.merge(self.graphdef, params)
        b = losses.shift(rows)
        x_BTD = model(b.inputs, b.segment_ids, b.positions, dtype=self.dtype, draw=draw)
        return losses.from_hidden(
            x_BTD,
            model.head_VD(),
            b,
            softcap=model.cfg.logit_softcap,
            impl=self.loss_impl,
            label_smoothing=self.label_smoothing,
        )
