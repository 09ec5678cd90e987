"""What the user gives to `examine_optimiser`."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Annotated, Any

import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.facts import Bound, Broken, Facts, above, call, function, require, whole

UPDATES = 3  # made from every start
_names = Bound("give a list of names", lambda x: isinstance(x, Collection) and type(x) is not str)
_counts = Bound(
    "give a list of whole numbers of 2 or more",  # one micro-batch is what they are compared with
    lambda x: isinstance(x, Collection) and all(whole(2).holds(n) for n in x),
)
_dtype = Bound("give the name of a float dtype", trees.names_float)
Function = Annotated[Callable[..., Any] | None, function]
Number = Annotated[float | None, above(0, or_equal=True)]


@dataclasses.dataclass(kw_only=True)
class Subject(Facts):
    """Examine how a loop updates its parameters; what is not given is skipped by name.

    The loop is a whole step or only its second half, from gradients on. It is called nine
    times per call that an update takes, or sixteen times as `update_fn`, always from fresh copies
    of `params`, so that it may donate or overwrite what it is given. The host holds a few copies
    of the state meanwhile. States may hold modules and optimisers of PyTorch.
    """

    params: Annotated[Any, "tree of arrays to start from; of a module its named_parameters."] = None
    init_fn: Annotated[
        Function, "`(params) -> state` of the whole step, or `-> opt_state` for `update_fn`."
    ] = None
    step_fn: Annotated[
        Function,
        "`(state, batch) -> state` or `(state, metrics)`; metrics are read under `optim/lr`, "
        "`optim/grad_norm`, `optim/grad_norm_clipped`, `optim/skipped_updates`.",
    ] = None
    params_of: Annotated[Function, "`(state) -> params`."] = None
    batch: Annotated[
        Any,
        "what `step_fn` and `gradient_fn` read. For the accumulation check a dict whose `weights` "
        "[B, ...] leave rows with unequal numbers of scored tokens.",
    ] = None
    empty_batch: Annotated[Any, "one without a scored token, so that its gradient is 0."] = None
    bad_batch: Annotated[Any, "one whose gradient is not finite."] = None
    calls_per_update: Annotated[
        int, "calls of `step_fn` that make one update, if each is a micro-batch.", whole(1)
    ] = 1
    updates_of: Annotated[Function, "`(state) -> int`, the loop's own count of updates."] = None
    first_update: Annotated[int, "number of the update a fresh state makes first.", whole()] = 0
    update_fn: Annotated[
        Function,
        "`(params, grads, opt_state, update) -> (params, opt_state)` or with metrics as a third; "
        "instead of `step_fn`. It is fed noise, zeros and non-finite gradients.",
    ] = None
    gradient_fn: Annotated[
        Function,
        "`(params, batch, micro_batches) -> grads`, the gradient of the mean over the scored "
        "tokens of the batch, computed in so many micro-batches; without dropout, and then "
        "`step_fn` too.",
    ] = None
    micro_batches: Annotated[
        Sequence[int] | None, "the numbers of micro-batches to compare with one.", _counts
    ] = None
    compute_dtype: Annotated[
        str, "of the forward and backward pass, which sets rounding errors.", _dtype
    ] = "float32"
    learning_rate: Annotated[Function, "`(update) -> float`."] = None
    steps: Annotated[int | None, "updates of the run.", whole(1)] = None
    end_lr: Annotated[Number, "learning rate declared for the last update."] = None
    weight_decay: Annotated[Number, "decoupled, in params -= lr weight_decay params."] = None
    decayed: Annotated[
        Any,
        "tree like `params`, true where a leaf decays; None: only leaves of fewer than two axes "
        "are judged, which should not.",
    ] = None
    clip_norm: Annotated[Number, "largest norm of the whole gradient; None or 0: any."] = None
    ema_of: Annotated[Function, "`(state) -> average of params`, as evaluation uses it."] = None
    first_eval: Annotated[int, "updates before the average is first evaluated.", whole(1)] = 100
    unused: Annotated[Collection[str], 'leaves that need not move, as "block/gate".', _names] = ()
    seed: Annotated[int, "of the noise.", whole()] = 0

    def __post_init__(self) -> None:
        """Refuse arguments that do not fit together."""
        super().__post_init__()
        loop = [name for name in ("step_fn", "update_fn") if getattr(self, name) is not None]
        require(len(loop) < 2, "step_fn", "give it or update_fn, not both")
        needed = {"step_fn": ("params", "init_fn", "params_of", "batch")}
        for name in needed.get(loop[0], ("params", "init_fn")) if loop else ():
            require(getattr(self, name) is not None, name, f"give it with {loop[0]}")
        micro = self.update_fn is None or self.calls_per_update == 1
        require(micro, "calls_per_update", "leave it at 1, since every update_fn is an update")
        module = isinstance(self.params, Iterator) or hasattr(self.params, "named_parameters")
        remedy = "give dict(module.named_parameters()), and load it into a module in init_fn"
        require(not module, "params", remedy)
        sizes = map(np.size, trees.float_leaves(self.params).values())
        remedy = "give a pytree that holds floating-point arrays"
        require(self.params is None or any(sizes), "params", remedy)

    def gradient(self, micro_batches: int) -> trees.Arrays:
        """The gradient of the batch in so many pieces, in float64."""
        gradient_fn: Any = self.gradient_fn
        given = trees.copies(self.params), trees.copies(self.batch)
        made = call("gradient_fn", gradient_fn, *given, micro_batches)
        found = {name: x.astype(np.float64) for name, x in trees.named(made).items()}
        if trees.shapes(found) != trees.shapes(trees.named(self.params)):
            raise Broken("gradient_fn returned other names or shapes than those of params")
        return found
