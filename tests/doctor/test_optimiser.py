"""Faults planted in training loops, and the checks that must see them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax import optim, step
from lm_jax.doctor.optimiser import examine_optimiser
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken, Summary
from tests.doctor import toy_loop
from tests.doctor.toy_loop import adam, init, matrices
from tests.helpers import random_batch, thirds, tiny_config

VOCABULARY = 29


def silent(report, skipped=()):
    assert not report.failed and not report.warned, [
        (f.check, f.evidence) for f in report if f.status in ("fail", "warn")
    ]
    assert {f.check for f in report if f.status == "skip"} == set(skipped)


def failed(check, loop, **changes):
    """The evidence of the check, which alone or with others fails."""
    report = examine_optimiser(**loop | changes)
    assert check in report.failed, report[check]
    assert report[check].remedy
    return report[check]


# Healthy twins


@functools.lru_cache
def whole_step(name, dtype):
    """lm_jax's own step, as a function from a seed to arguments."""
    cfg = tiny_config(
        model__layers=1,
        optim__name=name,
        train__compute_dtype=dtype,
        optim__ema_decay=0.999,
        data__micro_batch=3,
    )
    graphdef, build = create_model(cfg, VOCABULARY, "reference")
    train_step, steps = step.make_train_step(cfg, NextToken.of(cfg, graphdef)), int(cfg.train.steps)
    build = jax.jit(build)
    init_fn = jax.jit(functools.partial(step.init_state, cfg))

    def step_fn(state, batch):
        return train_step(state, {name: jnp.asarray(x[None]) for name, x in batch.items()})

    @functools.partial(jax.jit, static_argnums=2)
    def gradient_fn(params, batch, micro_batches):
        objective = NextToken(graphdef, jnp.dtype(dtype))
        return step.gradients(objective, params, batch, accumulation=micro_batches, key=None)[0]

    update, found = jax.jit(step.make_update(cfg)), Summary(1, jnp.ones(()), jnp.ones(()))

    def update_fn(params, grads, state, count):
        state, metrics = update(state, grads, found)
        return state.params, state, metrics

    def given(seed):
        params = build(jax.random.key(seed))
        batch = random_batch(np.random.default_rng(seed), (6, 12), VOCABULARY)
        for row in range(6):
            batch["weights"][row, 2 * row + 1 :] = 0
        bad = {**batch, "weights": batch["weights"].copy()}
        bad["weights"][-1, 1] = np.inf
        return dict(
            params=params,
            init_fn=init_fn,
            step_fn=step_fn,
            update_fn=update_fn,
            params_of=lambda state: state.params,
            updates_of=lambda state: state.step,
            batch=batch,
            empty_batch={**batch, "weights": 0 * batch["weights"]},
            bad_batch=bad,
            gradient_fn=gradient_fn,
            micro_batches=(6,),
            compute_dtype=dtype,
            learning_rate=optim.learning_rate(cfg.optim, steps),
            steps=steps,
            end_lr=cfg.optim.end_lr * cfg.optim.peak_lr,
            weight_decay=cfg.optim.weight_decay,
            decayed=optim.decayed(cfg.optim, params),
            clip_norm=cfg.optim.clip_norm,
            ema_of=lambda state: state.ema,
            seed=seed,
        )

    return given


@pytest.mark.slow
@pytest.mark.parametrize("dtype", thirds(["float32", "bfloat16"]))
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_silent_on_the_step_of_this_package(name, dtype):
    for seed in range(3):
        silent(examine_optimiser(**whole_step(name, dtype)(seed)))


@functools.lru_cache
def second_half(name="adamw", guard=True, clip=optim.clip):
    """lm_jax's pieces from gradients on, as a function from a seed to arguments."""
    cfg = tiny_config(model__layers=1, optim__name=name)
    _, build = create_model(cfg, VOCABULARY, "reference")
    build = jax.jit(build)
    tx, lr = optim.make_optimizer(cfg.optim), optim.learning_rate(cfg.optim, 20)

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def update_fn(params, grads, opt_state, update):
        clipped, norm, _ = clip(grads, cfg.optim.clip_norm)
        direction, new_state = tx.update(clipped, opt_state, params)
        new = optax.apply_updates(params, jax.tree.map(lambda u: -lr(update) * u, direction))
        ok = jnp.isfinite(norm) | (not guard)
        made = jax.tree.map(lambda a, b: jnp.where(ok, a, b), (new, new_state), (params, opt_state))
        return *made, {"optim/lr": lr(update), "optim/skipped_updates": 1 - ok}

    def given(seed=0):
        params = build(jax.random.key(seed))
        return dict(
            params=params,
            init_fn=jax.jit(tx.init),
            update_fn=update_fn,
            first_update=2,
            learning_rate=lr,
            weight_decay=cfg.optim.weight_decay,
            decayed=optim.decayed(cfg.optim, params),
            clip_norm=cfg.optim.clip_norm,
            seed=seed,
        )

    return given


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_silent_on_the_second_half_of_the_step(name):
    for seed in range(3):
        report = examine_optimiser(**second_half(name)(seed))
        lacking = "accumulation grad_norm last_lr warmup ema".split()
        silent(report, {f"optimiser.{check}" for check in lacking})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_silent_on_a_healthy_toy(seed):
    silent(examine_optimiser(**toy_loop.loop(seed)), {"optimiser.clip"})


def test_silent_on_common_optimisers():
    params = init(0)
    for tx in (
        optax.adamw(1e-3, weight_decay=0.1, mask=matrices),
        optax.sgd(1e-2, momentum=0.9),
        optax.lion(1e-3, weight_decay=0.1, mask=matrices),
        optax.apply_if_finite(optax.adam(1e-3), 5),
    ):

        def update_fn(params, grads, state, update, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        report = examine_optimiser(params=params, init_fn=tx.init, update_fn=update_fn)
        expected = {"optimiser.nonfinite"}  # apart from the last, none has a guard
        if isinstance(tx.init(params), optax.ApplyIfFiniteState):
            expected = set()
            assert report["optimiser.nonfinite"].values["counted"] == 1
        assert set(report.failed) == expected and not report.warned


# Planted faults


def test_a_step_up_the_gradient():
    loop = toy_loop.loop(tx=optax.chain(adam(), optax.scale(-1)))
    assert failed("optimiser.descent", loop).values["cosine of the step and the gradient"] > 0.3


def test_what_holds_frozen_leaves_may_be_declared():
    params = {"head": {"kernel": np.ones((3, 2), np.float32)}, "rest": np.ones(2, np.float32)}

    def update_fn(params, grads, state, update):
        return params | {"rest": params["rest"] - grads["rest"]}, state

    loop = dict(params=params, init_fn=lambda params: (), update_fn=update_fn)
    assert "optimiser.updates" in examine_optimiser(**loop, unused=["hea"]).failed
    assert examine_optimiser(**loop, unused=["head"])["optimiser.updates"].status == "pass"


@pytest.mark.fault(44, "optimiser.accumulation")
def test_mean_of_the_means_of_ragged_micro_batches():
    loop = toy_loop.loop(average="micro-batches")
    found = failed("optimiser.accumulation", loop)
    assert found.values["errors"][4] > 0.05 and "weights" not in found.evidence


def test_one_token_more_in_one_row_is_enough_to_see_it():
    batch = toy_loop.ragged(0, [5] * 7 + [6])
    failed("optimiser.accumulation", toy_loop.loop(average="micro-batches"), batch=batch)
    report = examine_optimiser(**toy_loop.loop() | {"batch": batch})
    assert report["optimiser.accumulation"].status == "pass"
    even = toy_loop.ragged(0, [5] * 8)
    report = examine_optimiser(**toy_loop.loop() | {"batch": even})
    assert "no split can matter" in report["optimiser.accumulation"].evidence


class OneCycle:
    """A cosine from the peak to 0 over so many of its own steps."""

    def __init__(self, total):
        self.total = total

    def __call__(self, count):
        return 1e-3 * 0.5 * (1 + np.cos(np.pi * min(1, (count + 1) / self.total)))


@pytest.mark.fault(45, "optimiser.last_lr")
@pytest.mark.parametrize("accumulation, share", [(2, 0.5), (4, 0.85), (8, 0.96)])
def test_schedule_sized_in_micro_batches_but_stepped_per_update(accumulation, share):
    run = dict(steps=1000, end_lr=0.0)
    silent_part = examine_optimiser(learning_rate=OneCycle(1000), **run)
    assert silent_part["optimiser.last_lr"].status == "pass"
    found = examine_optimiser(learning_rate=OneCycle(1000 * accumulation), **run)
    assert "optimiser.last_lr" in found.failed
    assert abs(found["optimiser.last_lr"].values["last"] / 1e-3 - share) < 0.02


@pytest.mark.fault(45, "optimiser.last_lr")
@pytest.mark.parametrize("accumulation", [2, 8])
def test_schedule_at_its_end_long_before_the_run(accumulation):
    report = examine_optimiser(
        learning_rate=lambda update: OneCycle(1000)(update * accumulation), steps=1000, end_lr=0.0
    )
    assert "optimiser.last_lr" in report.failed
    assert abs(report["optimiser.last_lr"].values["idle"] - (1 - 1 / accumulation)) < 0.05


@pytest.mark.fault(45, "optimiser.executed_lr")
def test_schedule_stepped_per_micro_batch():
    failed("optimiser.executed_lr", toy_loop.loop(clock=lambda update: 2 * update))


class Accumulator:
    """Says whether an update is due; asking it counts."""

    def __init__(self, every, pure):
        self.every, self.pure, self.count = every, pure, 0

    def should_step(self):
        if not self.pure:
            self.count += 1
        return self.count % self.every == 0


def micro_loop(every, pure):
    """A loop that reads one micro-batch a call, in the way of a script with objects."""
    tx = adam()

    class Trainer:
        def __init__(self, params):
            self.params, self.opt = params, tx.init(params)
            self.grads = jax.tree.map(jnp.zeros_like, params)
            self.accumulator, self.updates = Accumulator(every, pure), 0

    def step_fn(trainer, batch):
        grads = toy_loop.gradient(trainer.params, batch, 1)
        trainer.grads = jax.tree.map(jnp.add, trainer.grads, grads)
        accumulator = trainer.accumulator
        if pure:
            accumulator.count += 1
        due = accumulator.should_step()
        lr = 1e-3 if accumulator.should_step() else 0.0  # for the progress line
        if due:
            updates, trainer.opt = tx.update(trainer.grads, trainer.opt, trainer.params)
            trainer.params = jax.tree.map(lambda p, u: p + 1e-3 * u, trainer.params, updates)
            trainer.grads = jax.tree.map(jnp.zeros_like, trainer.grads)
            trainer.updates += 1
        return trainer, {"optim/lr": lr}

    healthy = toy_loop.loop()
    return dict(
        params=init(0),
        init_fn=Trainer,
        step_fn=step_fn,
        params_of=lambda trainer: trainer.params,
        updates_of=lambda trainer: trainer.updates,
        batch=healthy["batch"],
        empty_batch=healthy["empty_batch"],
        calls_per_update=every,
    )


@pytest.mark.fault(46, "optimiser.updates")
@pytest.mark.fault(46, "optimiser.update_count")
def test_accumulation_counter_read_twice():
    report = examine_optimiser(**micro_loop(2, pure=True))
    assert not report.failed and not report.warned
    report = examine_optimiser(**micro_loop(2, pure=False))  # 1 and 2, 3 and 4: never even first
    assert {"optimiser.updates", "optimiser.update_count"} <= set(report.failed)
    assert len(report["optimiser.updates"].values["unchanged"]) == 4
    report = examine_optimiser(**micro_loop(3, pure=False))
    assert report["optimiser.update_count"].values["moved"] != [3, 6, 9]
    assert "optimiser.update_count" in report.failed


@pytest.mark.fault(46, "optimiser.updates")
def test_one_leaf_never_moves():
    found = failed("optimiser.updates", toy_loop.loop(frozen=["bias"]))
    assert found.values["unchanged"] == ["bias"]


@pytest.mark.fault(49, "optimiser.decay")
def test_decay_of_every_leaf():
    loop = toy_loop.loop(tx=adam(mask=None))
    assert set(failed("optimiser.decay", loop).values["wrong"]) == {
        "bias",
        "embedding",
        "scale",
    }
    # Nothing declared: still no norm scale and no bias should decay.
    found = failed("optimiser.decay", loop, decayed=None)
    assert set(found.values["wrong"]) == {"bias", "scale"}
    report = examine_optimiser(**toy_loop.loop() | {"decayed": None})
    assert report["optimiser.decay"].status == "pass"


@pytest.mark.fault(49, "optimiser.decay")
def test_decay_that_is_declared_but_absent():
    found = failed(
        "optimiser.decay", toy_loop.loop(tx=adam(mask=lambda p: dict.fromkeys(p, False)))
    )
    assert found.values["amount"] == ["kernel"]


@pytest.mark.fault(50, "optimiser.grad_norm")
@pytest.mark.parametrize(
    "how", [dict(clip_by="scaled", loss_scale=1024.0), dict(clip_by="micro-batch")]
)
def test_clipping_before_unscaling_or_per_micro_batch(how):
    failed("optimiser.grad_norm", toy_loop.loop(**how))


def clip_leaves(grads, limit):
    clipped = jax.tree.map(lambda g: g * jnp.minimum(1, limit / jnp.linalg.norm(g)), grads)
    return clipped, optax.tree.norm(grads), optax.tree.norm(clipped)


@pytest.mark.fault(50, "optimiser.clip")
@pytest.mark.parametrize("clip", [clip_leaves, lambda g, limit: (g, optax.tree.norm(g), 0)])
def test_clipping_leaf_by_leaf_or_not_at_all(clip):
    loop = second_half(clip=clip)()
    assert failed("optimiser.clip", loop).values["beyond"] > 0.1


def test_clipping_is_seen_by_the_second_half_of_a_whole_step():
    def given(clipped):
        loop = toy_loop.loop()

        def update_fn(params, grads, state, update):
            grads = toy_loop.clip(grads, loop["clip_norm"]) if clipped else grads
            updates, opt = adam().update(grads, state["opt"], params)
            params = jax.tree.map(lambda p, u: p + 1e-2 * u, params, updates)
            return params, state | {"params": params, "opt": opt}

        return loop | {"update_fn": update_fn, "calls_per_update": 1}

    report = examine_optimiser(**given(clipped=True))
    silent(report)
    assert report["optimiser.executed_lr"].status == "pass"  # of step_fn, which logs it
    assert examine_optimiser(**given(clipped=False)).failed == ["optimiser.clip"]


@pytest.mark.fault(51, "optimiser.dtype")
@pytest.mark.fault(52, "optimiser.decay")
def test_bfloat16_parameters():
    report = examine_optimiser(**toy_loop.loop(dtype=jnp.bfloat16, tx=adam(b2=0.999), peak=1e-3))
    assert "optimiser.dtype" in report.failed
    assert any("nu" in name for name in report["optimiser.dtype"].values["stuck"])
    assert "not at all, in bfloat16" in report["optimiser.decay"].evidence


@pytest.mark.fault(51, "optimiser.dtype")
def test_bfloat16_second_moment_that_never_decays():
    def narrow(b2):
        def init_fn(params):
            return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.bfloat16), params)

        def update(grads, nu, params=None):
            def follow(v, g):
                return b2 * v + (1 - b2) * jnp.square(g.astype(v.dtype))

            nu = jax.tree.map(follow, nu, grads)
            return jax.tree.map(lambda g, v: -g / (jnp.sqrt(v) + 1e-8), grads, nu), nu

        return optax.GradientTransformation(init_fn, update)

    found = failed("optimiser.dtype", toy_loop.loop(tx=narrow(0.999)))
    assert len(found.values["stuck"]) == 4 and not found.values["params"]
    report = examine_optimiser(**toy_loop.loop(tx=narrow(0.9)))
    assert "optimiser.dtype" in report.warned  # a choice that loses little


@pytest.mark.fault(52, "optimiser.decay")
def test_decay_scaled_once_more_than_declared():
    half = failed("optimiser.decay", toy_loop.loop(tx=adam(weight_decay=0.05)))
    assert "kernel" in half.evidence
    # One per cent of the decay, which itself is 1e-3 of the parameters or less.
    failed("optimiser.decay", toy_loop.loop(tx=adam(weight_decay=0.101)))


@pytest.mark.fault(52, "optimiser.decay")
def test_decay_through_the_gradient():
    coupled = optax.chain(optax.add_decayed_weights(0.1, matrices), optax.adam(1.0))
    found = failed("optimiser.decay", toy_loop.loop(tx=coupled))
    assert found.values["coupled"] == ["kernel"] and "other than by shrinking" in found.evidence


@pytest.mark.fault(53, "optimiser.nonfinite")
def test_non_finite_parts_replaced_by_zero():
    found = failed("optimiser.nonfinite", toy_loop.loop(finite="impute"))
    assert found.values["moved"] and not found.values["nonfinite"]


@pytest.mark.fault(53, "optimiser.nonfinite")
def test_skipped_update_that_nobody_counts():
    found = failed("optimiser.nonfinite", toy_loop.loop(finite="silent"))
    assert found.values["counted"] == 0
    assert not found.values["nonfinite"] and not found.values["moved"]


def test_a_step_that_stops_at_a_bad_batch_is_no_fault():
    def stopping(error, before):
        loop = toy_loop.loop(finite="no" if before else "skip")

        def step_fn(state, batch):
            bad = state if before else batch
            if not all(np.isfinite(x).all() for x in jax.tree.leaves(bad)):
                raise error
            return loop["step_fn"](state, batch)

        return examine_optimiser(**loop | {"step_fn": step_fn})["optimiser.nonfinite"]

    for error in (FloatingPointError(), RuntimeError("the total norm is non-finite")):
        found = stopping(error, before=False)
        assert found.status == "pass" and "stops by design" in found.evidence
    assert stopping(ValueError("a definite bug"), before=False).status == "error"
    # One update late: the state is corrupted by then.
    assert stopping(FloatingPointError(), before=True).status == "error"


@pytest.mark.fault(54, "optimiser.nonfinite")
def test_clipping_an_infinite_gradient_poisons_every_leaf():
    found = failed("optimiser.nonfinite", second_half(guard=False)())
    assert "blocks/mlp/up/kernel" in found.values["nonfinite"]
    found = failed("optimiser.nonfinite", toy_loop.loop(finite="no"))
    assert {"embedding", "kernel", "scale", "bias"} <= set(found.values["nonfinite"])


@pytest.mark.fault(56, "optimiser.first_lr")
def test_learning_rate_of_the_first_update_is_zero():
    lr = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 1000)
    assert examine_optimiser(learning_rate=lr, steps=1000).failed == ["optimiser.first_lr"]
    report = examine_optimiser(learning_rate=lambda i: lr(i + 1), steps=1000, end_lr=0.0)
    silent_ones = [f for f in report if f.check.endswith("lr") or f.check.endswith("warmup")]
    assert not report.failed and len(silent_ones) == 4


@pytest.mark.fault(56, "optimiser.warmup")
def test_warm_up_as_long_as_the_run():
    def lr(update, warmup):
        return 1e-3 * min(1, (update + 1) / warmup)

    report = examine_optimiser(learning_rate=functools.partial(lr, warmup=2000), steps=1000)
    assert report.failed == ["optimiser.warmup"]
    assert "still rising" in report["optimiser.warmup"].evidence
    report = examine_optimiser(learning_rate=functools.partial(lr, warmup=300), steps=1000)
    assert not report.failed and report.warned == ["optimiser.warmup"]
    report = examine_optimiser(learning_rate=functools.partial(lr, warmup=190), steps=1000)
    assert not report.failed and not report.warned


@pytest.mark.fault(64, "optimiser.ema")
def test_average_that_keeps_the_random_start():
    found = failed("optimiser.ema", toy_loop.loop(ema="cold"))
    assert found.values["left"] > 0.98 and abs(found.values["total"] - 1) < 1e-3


@pytest.mark.fault(64, "optimiser.ema")
def test_average_that_starts_from_zero_without_correction():
    found = failed("optimiser.ema", toy_loop.loop(ema="zero"))
    assert found.values["total"] < 0.01


# Bad input


def test_nothing_given_is_skipped_by_name():
    report = examine_optimiser()
    assert {f.status for f in report} == {"skip"} and not report.failed
    assert "learning_rate" in report["optimiser.first_lr"].evidence


CALLS = itertools.count()


def raising(*_):
    raise RuntimeError(f"out of cheese at call {next(CALLS)}")


LOOP = ("updates", "nonfinite", "decay", "ema")


@pytest.mark.parametrize(
    "name, checks",
    [
        *((name, LOOP) for name in ("init_fn", "step_fn", "params_of", "ema_of", "updates_of")),
        ("gradient_fn", ("accumulation", "grad_norm")),
        ("learning_rate", ("first_lr", "last_lr", "warmup", "executed_lr", "decay")),
    ],
)
def test_a_function_that_raises_is_an_error_told_once(name, checks):
    report = examine_optimiser(**toy_loop.loop() | {name: raising})
    (told,) = report.failed
    assert report[told].status == "error" and "out of cheese" in report[told].evidence
    waiting = {f"optimiser.{check}" for check in checks} - {told}
    assert all("which met this error" in report[check].evidence for check in waiting)


def test_an_update_that_raises_or_returns_nothing_is_an_error():
    for update_fn, said in ((raising, "out of cheese"), (lambda *_: None, "neither")):
        report = examine_optimiser(**second_half()() | {"update_fn": update_fn})
        assert len(report.failed) == 1 and said in report[report.failed[0]].evidence
    report = examine_optimiser(**toy_loop.loop() | {"step_fn": lambda state, batch: None})
    assert len(report.failed) == 1 and "return the state" in report[report.failed[0]].evidence


def test_wrong_shapes_and_non_finite_parameters():
    loop = toy_loop.loop()
    report = examine_optimiser(**loop | {"params_of": lambda s: {"kernel": s["params"]["bias"]}})
    assert "other names or shapes" in report["optimiser.updates"].evidence
    report = examine_optimiser(**loop | {"gradient_fn": lambda p, b, n: p["kernel"]})
    assert report["optimiser.accumulation"].status == "error"
    broken = loop["params"] | {"scale": jnp.full(toy_loop.D, jnp.nan)}
    report = examine_optimiser(**loop | {"params": broken})
    assert "optimiser.updates" in report.failed
    report = examine_optimiser(learning_rate=lambda _: float("nan"), steps=10, end_lr=0.0)
    assert report["optimiser.first_lr"].status == "fail"
    assert report["optimiser.last_lr"].status == "error"


def test_warm_up_too_small_for_float32_is_no_fault():
    loop = second_half()()
    lr = loop["learning_rate"]
    loop |= dict(first_update=0, learning_rate=lambda i: 1e-9 * lr(i))
    report = examine_optimiser(**loop)
    assert report["optimiser.decay"].status == "pass"
    assert "is lost in float32" in report["optimiser.decay"].evidence


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(step_fn=None, update_fn=lambda *_: None, init_fn=None), "init_fn"),
        (dict(params_of=None), "params_of"),
        (dict(calls_per_update=0), "calls_per_update"),
        (dict(micro_batches=(1,)), "micro_batches"),
        (dict(steps=0), "steps"),
        (dict(clip_norm=-1.0), "clip_norm"),
    ],
)
def test_misuse(change, word):
    with pytest.raises(ValueError, match=word):
        examine_optimiser(**toy_loop.loop() | change)
