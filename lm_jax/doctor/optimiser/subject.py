"""What the user gives to `examine_optimiser`."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Annotated, Any

from lm_jax.doctor import trees
from lm_jax.doctor.facts import Bound, Facts, above, function, require, whole

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

    The loop is a whole step or only its second half, from gradients on. It always starts from
    fresh copies of `params`, so that it may donate or overwrite what it is given; the host holds a
    few copies of the state meanwhile. States may hold modules and optimisers of PyTorch.
    """

    params: Annotated[Any, "tree of arrays to start from; of a module its named_parameters."] = None
    init_fn: Annotated[Function, "`(params) -> state`, or `-> opt_state` without `step_fn`."] = None
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
    calls_per_update: Annotated[int, "calls of `step_fn` that make one update.", whole(1)] = 1
    updates_of: Annotated[Function, "`(state) -> int`, the loop's own count of updates."] = None
    first_update: Annotated[int, "number of the update a fresh state makes first.", whole()] = 0
    update_fn: Annotated[
        Function,
        "`(params, grads, opt_state, update) -> (params, opt_state)` or with metrics as a third; "
        "fed noise, zeros and non-finite gradients. Beside `step_fn` only the clipping is seen by "
        "it, and `opt_state` is the whole state of `init_fn`.",
    ] = None
    gradient_fn: Annotated[
        Function,
        "`(params, batch, micro_batches) -> grads` of the mean over the scored tokens, in so many "
        "micro-batches; without dropout, and then `step_fn` too.",
    ] = None
    micro_batches: Annotated[
        Sequence[int] | None, "the numbers of micro-batches to compare with one.", _counts
    ] = None
    compute_dtype: Annotated[str, "of the passes, which sets rounding.", _dtype] = "float32"
    learning_rate: Annotated[Function, "`(update) -> float`."] = None
    steps: Annotated[int | None, "updates of the run.", whole(1)] = None
    end_lr: Annotated[Number, "learning rate declared for the last update."] = None
    weight_decay: Annotated[Number, "decoupled, in params -= lr weight_decay params."] = None
    decayed: Annotated[
        Any, "tree like `params`, true where a leaf decays; None: no vector or scalar should."
    ] = None
    clip_norm: Annotated[Number, "largest norm of the whole gradient; None or 0: any."] = None
    ema_of: Annotated[Function, "`(state) -> average of params`, as evaluation uses it."] = None
    first_eval: Annotated[int, "updates before the average is first evaluated.", whole(1)] = 100
    unused: Annotated[
        Collection[str], 'leaves, or what holds them ("block/gate"), that need not move.', _names
    ] = ()
    seed: Annotated[int, "of the noise.", whole()] = 0

    def __post_init__(self) -> None:
        """Refuse arguments that do not fit together."""
        super().__post_init__()
        needed = {"step_fn": ("params", "init_fn", "params_of", "batch")}
        for loop in ("step_fn", "update_fn"):
            for name in needed.get(loop, ("params", "init_fn")):
                fit = getattr(self, loop) is None or getattr(self, name) is not None
                require(fit, name, f"give it with {loop}")
        module = isinstance(self.params, Iterator) or hasattr(self.params, "named_parameters")
        remedy = "give dict(module.named_parameters()), and load it into a module in init_fn"
        require(not module, "params", remedy)
        floats = any(x.size for x in trees.float_leaves(self.params).values())
        remedy = "give a pytree that holds floating-point arrays"
        require(self.params is None or floats, "params", remedy)
