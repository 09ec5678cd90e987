"""A small but real trainer, with the faults that its log should give away as options."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm_jax import metrics
from lm_jax.data.references import perplexities

V, D, T, B = 1024, 32, 24, 8
PEAK = 0.01


def corpus(seed, windows):
    """Windows [N, T + 1]: Zipfian words with likely successors, documents of unequal order."""
    rng = np.random.default_rng(seed)
    zipf = 1 / np.arange(1, V + 1)
    zipf /= zipf.sum()
    successors = np.random.default_rng(99).choice(V, (V, 3), p=zipf)
    order = rng.beta(0.6, 0.6, (windows, 1))  # how predictable the document is
    free = rng.choice(V, (windows, T + 1), p=zipf)
    follow = rng.random((windows, T + 1)) < order
    which = rng.integers(0, 3, (windows, T + 1))
    tokens = free.copy()
    for t in range(1, T + 1):
        tokens[:, t] = np.where(follow[:, t], successors[tokens[:, t - 1], which[:, t]], free[:, t])
    return tokens.astype(np.int32)


def init(seed, scale=1.0):
    shapes = {"table": (V, D), "pos": (T, D), "q": (D, D), "k": (D, D), "v": (D, D), "out": (D, D)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: scale * D**-0.5 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def logits(params, tokens, causal=True):
    x = params["table"][tokens] + params["pos"][None]
    scores = (x @ params["q"]) @ jnp.swapaxes(x @ params["k"], 1, 2) / D**0.5
    seen = jnp.tril(jnp.ones(scores.shape[1:], bool))[None] | ~jnp.asarray(causal)
    x = x + jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ (x @ params["v"]) @ params["out"]
    return x @ params["table"].T


def log_probabilities(params, window, fault, dtype=jnp.float32):
    """Those of every id after every token [B, T, V]."""
    inputs = jnp.where(fault["shift"], window[:, :-1], window[:, 1:])
    return jax.nn.log_softmax(logits(params, inputs, fault["causal"]).astype(dtype))


def nats(log_p, window, fault):
    """Nats of every target [B, T]."""
    targets = jnp.where(fault["crossed"], jnp.roll(window, 1, 0), window)[:, 1:]
    return -jnp.take_along_axis(log_p, targets[..., None], 2)[..., 0]


norm_of = jax.jit(optax.tree.norm)


@functools.lru_cache
def compiled(dtype):
    """The optimiser and an update; what is at fault is an argument, so that all runs share it."""
    tx = optax.scale_by_adam()

    def objective(params, window, weights, fault):
        log_p = log_probabilities(params, window, fault, dtype)
        weights = weights.astype(dtype)
        # 0 / 0 where nothing is scored
        ce = (nats(log_p, window, fault) * weights).sum() / weights.sum()
        # `extra` weighs a distillation from a teacher that guesses.
        return ce - fault["extra"] * log_p.mean(), ce

    def update(params, state, window, weights, lr, clip, fault):
        grad = jax.value_and_grad(objective, has_aux=True)
        (total, ce), grads = grad(params, window, weights, fault)
        norm = optax.tree.norm(grads)
        clipped = jax.tree.map(lambda g: g * jnp.minimum(1, clip / norm), grads)
        direction, state = tx.update(clipped, state, params)
        updates = jax.tree.map(lambda u: -lr * u, direction)
        return (
            optax.apply_updates(params, updates),
            state,
            {
                "train/loss": ce,
                "total": total,
                "optim/lr": lr,
                "optim/grad_norm": norm,
                "optim/clip_rate": norm > clip,
                "optim/update_norm": optax.tree.norm(updates),
            },
        )

    return tx, jax.jit(update)


@jax.jit
def evaluate(params, windows, fault):
    log_p = log_probabilities(params, windows, fault)
    best = logits(params, windows[:, :-1], fault["causal"]).argmax(-1)
    return nats(log_p, windows, fault), (best == windows[:, 1:]).mean()


def train(seed=0, **options):
    """Rows of the log of a training, see `_train`; each is made once."""
    return [dict(row) for row in _train(seed, **options)]


@functools.cache
def _train(
    seed=0,
    *,
    steps=300,
    windows=1600,
    peak=PEAK,
    scale=1.0,
    shift=True,
    causal=True,
    crossed=False,  # the targets are those of the next row of the batch
    dtype=jnp.float32,
    extra=0.0,
    clip=1.0,
    micro_batches=1,  # the schedule is sized in these, a fault if not 1
    stepping=True,  # else the optimiser's result is dropped
    reshuffle=True,
    resume_at=None,  # go on after this update with the data from the start, or
    lost=(),  # with these lost: "data", "optimiser"
    unscored_at=(),  # batches without a scored token
    impute=False,  # non-finite losses become 0, and the update is made all the same
    perplexity=lambda each, loss: metrics.exp(loss),
    valid_slots=1,  # times that each token of the valid split is counted
    tokens_counted=1,  # times that each training token is counted
):
    """Train and return the rows of the log."""
    data = corpus(seed, windows)
    valid = corpus(seed + 1000, 64)
    tx, update = compiled(dtype)
    fault = {"shift": shift, "causal": causal, "crossed": crossed, "extra": jnp.float32(extra)}
    length = max(steps, 30) * micro_batches
    schedule = optax.warmup_cosine_decay_schedule(peak / 20, peak, 20, length, 0.0)
    rates = np.asarray(schedule(jnp.arange(steps)))
    params = init(seed, scale)
    state, rows, per_epoch = tx.init(params), [], windows // B
    position = 0
    for step in range(1, steps + 1):
        if resume_at == step - 1:
            position = 0 if "data" in lost else position
            if "optimiser" in lost:
                params = jax.tree.map(lambda p: p + 0.08 * jnp.sign(p), params)
                state = tx.init(params)
        epoch, place = divmod(position, per_epoch)
        order = np.random.default_rng((seed, epoch if reshuffle else 0)).permutation(windows)
        batch = data[order[place * B : (place + 1) * B]]
        position += 1
        weights = np.full((B, T), 0.0 if step in unscored_at else 1.0, np.float32)
        new_params, new_state, row = update(
            params, state, batch, weights, rates[step - 1], clip, fault
        )
        if stepping and step not in unscored_at:
            params, state = new_params, new_state
        row["optim/param_norm"] = norm_of(params)
        rows.append({"step": step} | row)  # fetched at the end
        if step % 100 == 0:
            each, accuracy = evaluate(params, valid, fault)
            each = np.asarray(each, np.float64)
            loss = float(row["total"]) if extra else each.mean()
            rows.append(
                {
                    "step": step,
                    "valid/loss": float(loss),
                    "valid/token_ppl": perplexity(each, float(loss)),
                    "valid/accuracy": float(accuracy),
                    "valid/token_count": each.size * valid_slots,
                }
            )
    rows = jax.device_get(rows)
    for row in rows:
        if "train/loss" in row:
            _finish(row, extra, impute, B * T * tokens_counted, per_epoch)
    return rows


def _finish(row, extra, impute, tokens, per_epoch):
    """A row of training as trainers write it."""
    total = row.pop("total")
    if extra:
        row["distill/objective"] = total
    if impute and not math.isfinite(row["train/loss"]):
        row["train/loss"] = 0.0
    for name, x in row.items():
        row[name] = x if name == "step" else float(x) if math.isfinite(x) else None
    row |= {"data/tokens": row["step"] * tokens, "data/epoch": row["step"] / per_epoch}


def references(seed=0, windows=1600):
    """Unigram and bigram perplexity of the valid split."""
    train_ids, ids = corpus(seed, windows).ravel(), corpus(seed + 1000, 64)[:, 1:].ravel()
    return perplexities(train_ids, ids, vocab_size=V, start=0, orders=(2,))


def declared(seed=0, steps=300, windows=1600, peak=PEAK, **more):
    """What a user would tell `examine_log` about the run."""
    return {
        "vocab_size": V,
        "split_tokens": 64 * T,
        "train_tokens": windows * T,
        "tokens_per_step": B * T,
        "parameters": V * D + 4 * D * D,
        "lr_peak": peak,
        "lr_end": 0.0,
        "steps": steps,
        "references": references(seed, windows),
    } | more


def train_on_a_cycle(ids=2000, steps=200, tokens=1024):
    """Rows of a run on text without entropy: each id has one successor."""
    follows = np.random.default_rng(0).permutation(ids)
    keys = jax.random.split(jax.random.key(0))
    shapes = ((ids, 64), (64, ids))
    params = [0.02 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    tx = optax.adam(0.02)

    def objective(params, x, y):
        logits = params[0][x] @ params[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def update(params, state, x, y):
        loss, grads = jax.value_and_grad(objective)(params, x, y)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, rows = tx.init(params), []
    rng = np.random.default_rng(1)
    for step in range(1, steps + 1):
        x = rng.integers(0, ids, tokens)
        params, state, loss = update(params, state, x, follows[x])
        rows.append(
            {
                "step": step,
                "train/loss": float(loss),
                "data/tokens": step * tokens,
                "data/epoch": step / steps,
            }
        )
    return rows
