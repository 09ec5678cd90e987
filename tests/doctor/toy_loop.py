"""A small language model and its training loop, into which faults of the loop can be planted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.helpers import random_batch

V, D, T, ROWS, STEPS, PEAK = 17, 8, 6, 8, 40, 1e-2


def schedule(update, peak=PEAK):
    """Linear warm-up over 4 updates, then a line to a tenth of the peak at the last one."""
    warm = (update + 1) / 4
    rest = 1 - 0.9 * (update - 3) / (STEPS - 4)
    return peak * jnp.minimum(warm, rest)


def init(seed, dtype=jnp.float32):
    a, b = jax.random.split(jax.random.key(seed))
    params = {
        "embedding": 0.3 * jax.random.normal(a, (V, D)),
        "kernel": 0.3 * jax.random.normal(b, (D, D)),
        "scale": jnp.ones(D),
        "bias": jnp.zeros(D),
    }
    return jax.tree.map(lambda x: x.astype(dtype), params)


def matrices(params):
    return {name: name == "kernel" for name in params}


def nats(params, batch):
    x = params["embedding"][batch["tokens"][:, :-1]].astype(jnp.float32)
    x = x + jnp.tanh(
        x * params["scale"][None, None] @ params["kernel"] + params["bias"][None, None]
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(
        x @ params["embedding"].T.astype(x.dtype), batch["tokens"][:, 1:]
    )
    return (loss * batch["weights"][:, 1:]).sum(), batch["weights"][:, 1:].sum()


def micros(batch, number):
    return [
        {name: x[i * len(x) // number : (i + 1) * len(x) // number] for name, x in batch.items()}
        for i in range(number)
    ]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def gradient(params, batch, number, average="tokens", clip_norm=None):
    """Of the mean over the batch's tokens, or what is often taken for it."""
    total, tokens = jax.tree.map(jnp.zeros_like, params), 0.0
    for micro in micros(batch, number):
        grads, count = jax.grad(nats, has_aux=True)(params, micro)
        if average == "micro-batches":
            grads, count = jax.tree.map(lambda g, n=count: g / jnp.maximum(n, 1), grads), 1.0
        if clip_norm:
            grads = jax.tree.map(lambda g, n=count: g / jnp.maximum(n, 1), grads)
            grads, count = clip(grads, clip_norm), 1.0
        total, tokens = jax.tree.map(jnp.add, total, grads), tokens + count
    return jax.tree.map(lambda g: g / jnp.maximum(tokens, 1), total)


def clip(grads, limit):
    scale = jnp.minimum(1, limit / jnp.maximum(optax.tree.norm(grads), 1e-30))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def ragged(seed, counts=range(1, ROWS + 1)):
    """Rows with different numbers of scored tokens."""
    batch = random_batch(np.random.default_rng(seed), (ROWS, T + 1), V)
    batch["weights"] = np.float32(
        np.arange(T + 1)[None] <= np.minimum(np.array(list(counts)), T)[:, None]
    )
    return batch


def adam(weight_decay=0.1, mask=matrices, b2=0.95):
    """A direction to be scaled by the learning rate."""
    return optax.chain(
        optax.scale_by_adam(0.9, b2), optax.add_decayed_weights(weight_decay, mask), optax.scale(-1)
    )


def loop(
    seed=0,
    *,
    tx=None,
    clock=lambda update: update,
    average="tokens",
    loss_scale=1.0,
    clip_by="whole",
    finite="skip",
    ema="warm",
    frozen=(),
    dtype=jnp.float32,
    accumulation=2,
    peak=PEAK,
):
    """Arguments for `examine_optimiser`: a healthy loop, but for what is asked for."""
    tx = tx or adam()
    clip_norm = 0.5

    def init_fn(params):
        start = jax.tree.map(jnp.zeros_like if ema == "zero" else jnp.copy, params)
        return {
            "step": jnp.int32(0),
            "params": params,
            "opt": tx.init(params),
            "ema": start,
        }

    @functools.partial(jax.jit, donate_argnums=0)
    def step_fn(state, batch):
        params = state["params"]
        grads = gradient(
            params, batch, accumulation, average, clip_norm if clip_by == "micro-batch" else None
        )
        grads = {n: g * 0 if n in frozen else g for n, g in grads.items()}
        if finite == "impute":
            grads = jax.tree.map(lambda g: jnp.nan_to_num(g, posinf=0, neginf=0), grads)
        scaled = jax.tree.map(lambda g: g * loss_scale, grads)
        norm = optax.tree.norm(scaled if clip_by == "scaled" else grads)
        if clip_by == "scaled":
            grads = jax.tree.map(lambda g: g / loss_scale, clip(scaled, clip_norm))
        else:
            grads = clip(grads, clip_norm)
        lr = schedule(clock(state["step"]), peak)
        updates, opt = tx.update(grads, state["opt"], params)
        new = jax.tree.map(lambda p, u: p + (lr * u).astype(p.dtype), params, updates)
        decay = 0.9999
        if ema == "warm":
            decay = jnp.minimum(decay, (1.0 + state["step"]) / (10.0 + state["step"]))
        average_ = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], new)
        made = {"params": new, "opt": opt, "ema": average_}
        metrics = {
            "optim/lr": lr,
            "optim/grad_norm": norm,
            "optim/grad_norm_clipped": optax.tree.norm(grads),
        }
        if finite in ("skip", "silent"):
            ok = jnp.isfinite(norm)
            old = {name: state[name] for name in made}
            made = jax.tree.map(lambda a, b: jnp.where(ok, a, b), made, old)
            metrics["optim/skipped_updates"] = 1.0 - ok if finite == "skip" else 0.0
        return {"step": state["step"] + 1, **made}, metrics

    params = init(seed, dtype)
    batch = ragged(seed)
    empty = {**batch, "weights": 0 * batch["weights"]}
    bad = {**batch, "weights": batch["weights"].copy()}
    bad["weights"][-1, 1] = np.inf
    return dict(
        params=params,
        init_fn=init_fn,
        step_fn=step_fn,
        params_of=lambda state: state["params"],
        updates_of=lambda state: state["step"],
        batch=batch,
        empty_batch=empty,
        bad_batch=bad,
        gradient_fn=lambda params, batch, n: gradient(params, batch, n, average),
        micro_batches=(2, 4),
        learning_rate=functools.partial(schedule, peak=peak),
        steps=STEPS,
        end_lr=0.1 * peak,
        weight_decay=0.1,
        decayed=matrices(params),
        clip_norm=clip_norm,
        ema_of=lambda state: state["ema"],
        seed=seed,
    )
