"""Checks of the optimiser: that updates happen, are whole, and survive a bad batch."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.old import Report, Skip, Verdict, check, require, run_all, verdict, whole
from lm_jax.doctor.optimiser import schedule
from lm_jax.doctor.optimiser.subject import (
    FLOAT32_EPS,
    UPDATES,
    Arrays,
    Given,
    flat,
    is_floating,
    listed,
    same,
)
from lm_jax.doctor.trees import float_leaves as named_leaves


@check(
    "optimiser.updates",
    remedy="Look for a gradient that is cut off, an optimiser that does not hold these leaves, or "
    "a step that is never reached; or declare leaves that are frozen on purpose with unused=.",
)
def updates(given: Given) -> Verdict:
    """Every leaf has moved after the first updates."""
    start, *_, end = given.loop.good
    broken = [name for name, x in end.params.items() if not np.isfinite(x).all()]
    if broken:
        evidence = f"After {UPDATES} updates there are non-finite numbers in {listed(broken)}."
        return verdict(False, evidence, nonfinite=broken)
    read = {name: x for name, x in end.params.items() if name not in given.unused}
    still = [name for name, x in read.items() if same(start.params[name], x)]
    excused = []
    if given.learning_rate is not None:
        # An early warm-up may move less than float32 resolves at a leaf's scale.
        lr = max(given.first_lrs())
        excused = [
            n for n in still if 0 < lr < FLOAT32_EPS * np.abs(start.params[n]).max(initial=0)
        ]
    still = [name for name in still if name not in excused]
    leaves = len(read)
    evidence = f"After {UPDATES} updates {leaves - len(still)} of {leaves} leaves have moved"
    evidence += f"; bit-unchanged: {listed(still)}." if still else "."
    if excused:
        evidence += f" A learning rate of {lr:.2g} is below float32's steps in {listed(excused)}."
    return verdict(not still, evidence, unchanged=still, excused=excused)


@check(
    "optimiser.update_count",
    remedy="Count micro-batches in one place, once per batch, and let nothing that asks whether an "
    "update is due change the count.",
)
def update_count(given: Given) -> Verdict:
    """Calls that move the parameters are every calls_per_update-th, and the counter agrees."""
    points, per = given.loop.good, given.calls_per_update
    moved = [
        i
        for i in range(1, len(points))
        if any(not same(x, points[i - 1].params[n]) for n, x in points[i].params.items())
    ]
    due = list(range(per, len(points), per))
    ok = moved == due
    evidence = f"Of {len(points) - 1} calls those that moved parameters are {moved}, due are {due}."
    counted = [p.updates - points[0].updates for p in points] if given.updates_of else []
    if counted:
        expected = [i // per for i in range(len(points))]
        ok &= counted == expected
        evidence += f" The counter read {counted}, floor(calls / {per}) is {expected}."
    return verdict(ok, evidence, moved=moved, due=due, counted=counted)


@check(
    "optimiser.share_changed",
    remedy="Keep a float32 master copy of the parameters: updates smaller than half a step of "
    "their dtype are lost.",
)
def share_changed(given: Given) -> Verdict:
    """An update changes the bits of nearly all elements it has a gradient for."""
    *_, before, after = given.loop.good[:: given.calls_per_update]
    changed = active = 0
    for name, x in before.params.items():
        rows = (x != after.params[name]).reshape(-1, x.shape[-1] if x.ndim else 1)
        # Rows of a table whose tokens are not in the batch have no gradient.
        rows = rows[rows.any(1)]
        changed, active = changed + int(rows.sum()), active + rows.size
    if not active:
        return verdict(False, "An update changed not one element.", share=0.0)
    share = changed / active
    evidence = (
        f"An update changed {share:.1%} of the elements in the rows it reached (at least 90%)."
    )
    return verdict(share > 0.9, evidence, share=share, elements=active)


@check(
    "optimiser.dtype",
    remedy="Keep parameters and moments in float32 and cast to the compute dtype in the forward "
    "pass; optax gives moments the dtype of the parameters.",
)
def dtype(given: Given) -> Verdict:
    """Parameters and moments are at least float32."""
    start = given.loop.good[0]

    def narrow(arrays: Arrays) -> dict[str, Any]:
        floats = {n: x.dtype for n, x in arrays.items() if is_floating(x)}
        return {n: d for n, d in floats.items() if jnp.finfo(d).bits < 32}

    params, moments = narrow(start.params), narrow(start.arrays)
    narrowest = [*params.values(), *moments.values()]
    if not narrowest:
        leaves = len(start.params) + len(start.arrays)
        return verdict(True, f"All {leaves} leaves of parameters and state have 32 bits or more.")
    stuck = _stuck(given, moments) if moments else []
    eps = float(jnp.finfo(narrowest[0]).eps)
    evidence = (
        f"Of {len(start.params)} parameter leaves {len(params)} and of {len(start.arrays)} of the "
        f"state {len(moments)} are narrower than float32 ({listed([*params, *moments], 3)}: "
        f"{narrowest[0]}); near 1 its step is {eps:.1g}, so a 1 - beta below {eps / 4:.1g} is lost"
    )
    evidence += f"; bit-unchanged by an update of zero gradient: {listed(stuck)}." if stuck else "."
    # Moments in 16 bits that do decay are a choice; a master copy in 16 bits loses updates.
    return verdict(
        False,
        evidence,
        otherwise="fail" if params or stuck else "warn",
        params=list(params),
        moments=list(moments),
        stuck=stuck,
    )


def _stuck(given: Given, moments: dict[str, Any]) -> list[str]:
    """Moments that are not zero and that zero gradients leave as they are."""
    loop = given.loop
    if loop.empty is None:
        return []
    live = loop.start()
    for _ in range(given.calls_per_update):
        live, _ = loop.advance(live, loop.batch)
    before = loop.look(live).arrays
    for _ in range(given.calls_per_update):
        live, _ = loop.advance(live, loop.empty)
    after = loop.look(live)
    return [
        name
        for name in moments
        if name in after.arrays
        and before[name].any()
        and same(before[name], after.arrays[name])
        # A copy of parameters that did not move says nothing.
        and not any(same(before[name], x) for x in after.params.values())
    ]


@check(
    "optimiser.accumulation",
    remedy="Add the micro-batches' summed nats and their token counts, and divide once by the "
    "count of the whole update, over all micro-batches and devices.",
)
def accumulation(given: Given) -> Verdict:
    """The gradient of ragged rows does not depend on how they are split."""
    given.need("gradient_fn", "params", "batch", "micro_batches")
    if not given.micro_batches:
        raise Skip("micro_batches is empty.")
    try:
        weights = np.asarray(given.batch["weights"])
    except (TypeError, KeyError, IndexError):
        raise Skip(
            "batch has no entry 'weights', so unequal token counts cannot be seen."
        ) from None
    counts = weights.reshape(len(weights), -1).sum(1)
    if len(set(counts.tolist())) < 2:
        raise Skip(f"Every row of batch scores {counts[0]:.0f} tokens: no split can matter.")
    whole = given.whole_gradient
    norm = np.linalg.norm(flat(whole))
    # The catalogue's 1e-5 is 84 eps of float32; a narrower compute dtype rounds the rows' share.
    limit = max(1e-5, 4 * given.eps)
    errors, worst = {}, ""
    for n in given.micro_batches:
        split = given.gradient(n)
        gaps = {name: np.linalg.norm(split[name] - whole[name]) for name in whole}
        errors[n] = float(np.linalg.norm(list(gaps.values())) / norm)
        if errors[n] >= max(errors.values()):
            worst = max(gaps, key=lambda name: gaps[name])
    most = max(errors.values())
    evidence = (
        f"The gradient of rows with {counts.min():.0f} to {counts.max():.0f} scored tokens changes "
        f"by {most:.2e} of its norm when split into {listed(errors)} micro-batches (limit "
        f"{limit:.0e}), most in {worst}."
    )
    return verdict(bool(most <= limit), evidence, errors=errors, limit=limit, leaf=worst)


@check(
    "optimiser.clip",
    remedy="Scale all leaves by one factor, max_norm / norm of the whole gradient, after "
    "unscaling and averaging and before the moments.",
)
def clip(given: Given) -> Verdict:
    """Gradients beyond the maximal norm act as if they had it; below, nothing is cut."""
    given.need("update_fn")
    if not given.clip_norm:
        raise Skip("Not given: clip_norm, or 0.")
    loop, limit = given.loop, float(given.clip_norm)

    def effect(norm: float) -> np.ndarray:
        before, after = loop.trajectory(loop.direction(norm), 1)
        kind = "arrays" if before.arrays else "params"
        return flat(getattr(after, kind)) - flat(getattr(before, kind))

    at, beyond = effect(1.001 * limit), effect(100 * limit)
    small, half = effect(0.25 * limit), effect(0.5 * limit)
    leak = float(np.linalg.norm(beyond - at) / np.linalg.norm(at))
    reacts = float(np.linalg.norm(half - small) / np.linalg.norm(half))
    # Float32 norms and one division; moments keep a few eps of it.
    ok = leak <= 1e-4 and reacts > 0.1
    evidence = (
        f"Gradients of norm {100 * limit:.3g} change the moments by {leak:.1e} more than the same "
        f"of norm {limit:.3g}, the maximum (limit 1e-4); halving one below it changes them by "
        f"{reacts:.2f} (at least 0.1)."
    )
    return verdict(bool(ok), evidence, beyond=leak, below=reacts)


@check(
    "optimiser.grad_norm",
    remedy="Average over all micro-batches and devices, divide by the loss scale, take and log "
    "the norm of the result, and only then clip.",
)
def grad_norm(given: Given) -> Verdict:
    """The logged norms are those of the full averaged gradient before and after clipping."""
    given.need("gradient_fn", "step_fn", "batch")
    logged = given.logged("optim/grad_norm")[0]
    norm = float(np.linalg.norm(flat(given.whole_gradient)))
    limit = max(1e-4, 4 * given.eps)
    ok = abs(logged - norm) <= limit * norm
    evidence = (
        f"The first update logged gradient norm {logged:.5g}, the whole averaged gradient has "
        f"{norm:.5g} (relative limit {limit:.0e})."
    )
    clipped = None
    if given.clip_norm:
        clipped = given.logged("optim/grad_norm_clipped")[0]
        expected = min(norm, given.clip_norm)
        ok &= abs(clipped - expected) <= limit * expected
        evidence += f" After clipping to {given.clip_norm:g} it logged {clipped:.5g}."
    return verdict(bool(ok), evidence, logged=logged, norm=norm, clipped=clipped)


@check(
    "optimiser.nonfinite",
    remedy="Test the whole gradient's norm and the loss, and skip the whole update if either is "
    "not finite: parameters and moments stay; never put 0 in place of a NaN.",
)
def nonfinite(given: Given) -> Verdict:
    """A non-finite gradient changes no bit of parameters or moments, and training goes on."""
    for name, before, after, later in given.loop.poisoned:
        state = {**before.params, **{f"state:{n}": x for n, x in before.arrays.items()}}
        now = {**after.params, **{f"state:{n}": x for n, x in after.arrays.items()}}
        broken = [n for n, x in now.items() if not np.isfinite(x).all()]
        moved = [n for n, x in now.items() if n not in state or not same(state[n], x)]
        if broken or moved:
            evidence = f"After {name} {len(broken)} of {len(now)} leaves hold non-finite numbers"
            evidence += (
                f" ({listed(broken, 3)})."
                if broken
                else f", but {len(moved)} moved ({listed(moved, 3)}): the bad part was replaced."
            )
            return verdict(False, evidence, batch=name, nonfinite=broken, moved=moved)
        if all(same(x, later.params[n]) for n, x in after.params.items()):
            return verdict(False, f"After {name} a good batch moves nothing either.", batch=name)
    names = [row[0] for row in given.loop.poisoned]
    evidence = f"After {listed(names)} all parameters and moments are bit-unchanged, and the next "
    return verdict(True, evidence + "good batch moves them again.")


@check(
    "optimiser.nonfinite_counted",
    remedy="Log skipped updates under 'optim/skipped_updates', and stop after some in a row.",
)
def nonfinite_counted(given: Given) -> Verdict:
    """A skipped update is counted, in the metrics or in the state."""
    silent = []
    for name, before, after, later in given.loop.poisoned:
        if after.metrics.get("optim/skipped_updates", 0) > 0:
            continue
        grew = [
            n
            for n, count in after.counters.items()
            if count > before.counters.get(n, count) and later.counters.get(n, count + 1) <= count
        ]
        if not (grew or after.metrics):
            raise Skip("The loop returns no metrics, nor does its state count skipped updates.")
        if not grew:
            silent.append(name)
    evidence = f"Of {len(given.loop.poisoned)} bad updates {len(silent)} are not counted"
    evidence += f": {listed(silent)}." if silent else "."
    return verdict(not silent, evidence, silent=silent)


CHECKS = (
    updates,
    update_count,
    share_changed,
    dtype,
    accumulation,
    clip,
    grad_norm,
    nonfinite,
    nonfinite_counted,
    *schedule.CHECKS,
)


def examine_optimiser(
    *,
    params: Any = None,
    init_fn: Callable[..., Any] | None = None,
    step_fn: Callable[..., Any] | None = None,
    params_of: Callable[..., Any] | None = None,
    batch: Any = None,
    empty_batch: Any = None,
    bad_batch: Any = None,
    calls_per_update: int = 1,
    updates_of: Callable[..., Any] | None = None,
    first_update: int = 0,
    update_fn: Callable[..., Any] | None = None,
    gradient_fn: Callable[..., Any] | None = None,
    micro_batches: Sequence[int] | None = None,
    compute_dtype: str = "float32",
    learning_rate: Callable[..., Any] | None = None,
    steps: int | None = None,
    end_lr: float | None = None,
    weight_decay: float | None = None,
    decayed: Any = None,
    clip_norm: float | None = None,
    ema_of: Callable[..., Any] | None = None,
    first_eval: int = 100,
    unused: Collection[str] = (),
    seed: int = 0,
) -> Report:
    """Examine how a loop updates its parameters; what is not given is skipped by name.

    The loop is a whole step or only its second half, from gradients on. It is called nine
    times per call that an update takes, or sixteen times as `update_fn`, always from fresh copies
    of `params`, so that it may donate or overwrite what it is given. The host holds a few copies
    of the state meanwhile.

    Args:
        params: tree of arrays to start from.
        init_fn: `(params) -> state` of the whole step, or `(params) -> opt_state` for `update_fn`.
        step_fn: `(state, batch) -> state` or `(state, metrics)`; metrics are read under
            `optim/lr`, `optim/grad_norm`, `optim/grad_norm_clipped`, `optim/skipped_updates`.
        params_of: `(state) -> params`.
        batch: what `step_fn` and `gradient_fn` read. For the accumulation check a dict whose
            `weights` [B, ...] leave rows with unequal numbers of scored tokens.
        empty_batch: one of which no token is scored, so that its gradient is zero.
        bad_batch: one whose gradient is not finite.
        calls_per_update: calls of `step_fn` that make one update, if each is a micro-batch.
        updates_of: `(state) -> int`, the loop's own count of updates.
        first_update: number of the update that a fresh state makes first.
        update_fn: `(params, grads, opt_state, update) -> (params, opt_state)` or with metrics as
            a third; instead of `step_fn`. It is fed noise, zeros and non-finite gradients.
        gradient_fn: `(params, batch, micro_batches) -> grads`, the gradient of the mean over the
            scored tokens of the batch, computed in so many micro-batches; without dropout, and
            then `step_fn` too.
        micro_batches: the numbers of micro-batches to compare with one.
        compute_dtype: dtype of the forward and backward pass, which sets rounding errors.
        learning_rate: `(update) -> float`.
        steps: updates of the run.
        end_lr: learning rate declared for the last update.
        weight_decay: decoupled decay, in params -= lr weight_decay params.
        decayed: tree like `params`, true where a leaf decays; None: only leaves of fewer than
            two axes are judged, which should not.
        clip_norm: largest global norm of the gradient; None or 0: not clipped.
        ema_of: `(state) -> average of params`, as evaluation uses it.
        first_eval: updates before the average is first evaluated.
        unused: names of leaves ("block/gate") that need not move.
        seed: of the noise.

    Raises:
        ValueError: if the arguments do not fit together.
    """
    given = Given(**locals())
    _validate(given)
    return run_all(CHECKS, given)


def _validate(given: Given) -> None:
    both = given.step_fn is not None and given.update_fn is not None
    require(not both, "step_fn", "give it or update_fn, not both")
    if given.step_fn is not None or given.update_fn is not None:
        for name in ("params", "init_fn"):
            require(getattr(given, name) is not None, name, "give it with step_fn or update_fn")
    if given.step_fn is not None:
        for name in ("params_of", "batch"):
            require(getattr(given, name) is not None, name, "give it with step_fn")
    lows = {"calls_per_update": 1, "first_eval": 1, "first_update": 0, "seed": 0}
    for name, low in (lows if given.steps is None else lows | {"steps": 1}).items():
        whole(getattr(given, name), name, low)
    require(
        given.update_fn is None or given.calls_per_update == 1,
        "calls_per_update",
        "an update_fn makes an update in every call; leave it at 1",
    )
    norm = given.clip_norm
    require(
        norm is None or (isinstance(norm, int | float) and norm >= 0),
        "clip_norm",
        "give the norm, or 0 for no clipping",
    )
    for count in given.micro_batches or ():  # one micro-batch is what they are compared with
        whole(count, "micro_batches", 2)
    require(
        given.params is None or any(leaf.size for leaf in named_leaves(given.params).values()),
        "params",
        "give a pytree that holds floating-point arrays",
    )
