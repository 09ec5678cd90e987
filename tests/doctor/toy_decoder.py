"""A one-layer decoder with rotary positions, dropout and a cache, a sampler, and their faults."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

V, C, SLOTS = 23, 16, 40


def init(seed):
    rng = np.random.default_rng(seed)
    shapes = dict(embedding=(V, C), qkv=(C, 3 * C), out=(C, C), head=(C, V))
    return {
        name: np.float32(rng.normal(0, 1.0 if name == "embedding" else C**-0.5, shape))
        for name, shape in shapes.items()
    }


def rotary(x_BTC, positions_T):
    half = C // 2
    angles_TC = positions_T[:, None] * 10.0 ** (-jnp.arange(half) / half)[None]
    cos, sin = jnp.cos(angles_TC)[None], jnp.sin(angles_TC)[None]
    a, b = x_BTC[..., :half], x_BTC[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@functools.partial(jax.jit, static_argnames=("causal", "mixing"))
def layer(params, tokens_BT, positions_T, cache, start, *, causal=True, key=None, mixing=False):
    """Logits of tokens that stand at the slots from `start` on, and the filled cache."""
    x_BTC = params["embedding"][tokens_BT]
    q, k, v = jnp.split(x_BTC @ params["qkv"], 3, -1)
    q, k = rotary(q, positions_T), rotary(k, positions_T)
    keys, values = (
        jax.lax.dynamic_update_slice(old, new, (0, start, 0))
        for old, new in zip(cache, (k, v), strict=True)
    )
    slots_T = start + jnp.arange(tokens_BT.shape[1])
    last_T = slots_T if causal else jnp.full_like(slots_T, start + tokens_BT.shape[1] - 1)
    scores = jnp.einsum("btc,bsc->bts", q, keys) / C**0.5
    seen_TS = jnp.arange(keys.shape[1])[None] <= last_T[:, None]
    probs = jax.nn.softmax(jnp.where(seen_TS[None], scores, -jnp.inf))
    y = x_BTC + jnp.einsum("bts,bsc->btc", probs, values) @ params["out"]
    if mixing:  # a normalisation over the batch
        y = y - y.mean(0, keepdims=True) if len(y) > 1 else y
    if key is not None:
        y = jnp.where(jax.random.bernoulli(key, 0.9, y.shape), y / 0.9, 0)
    return y @ params["head"], (keys, values)


def empty(rows):
    return (np.zeros((rows, SLOTS, C), np.float32),) * 2


def forward(params, tokens_BT, **how):
    tokens_BT = np.asarray(tokens_BT)
    return layer(params, tokens_BT, np.arange(tokens_BT.shape[1]), empty(len(tokens_BT)), 0, **how)[
        0
    ]


def extender(params, fault=""):
    """`(tokens, cache) -> (logits, cache)`; the cache also holds its length."""

    def extend(tokens_BT, state):
        tokens_BT = np.asarray(tokens_BT)
        cache, start = state or (empty(len(tokens_BT)), 0)
        size = tokens_BT.shape[1]
        positions_T = start + np.arange(size)
        if fault == "positions restart":
            positions_T = np.arange(size)
        if fault == "off by one after the prompt" and start:
            positions_T = positions_T + 1
        logits, cache = layer(params, tokens_BT, positions_T, cache, start)
        if fault == "one slot is overwritten" and start == 10:
            size -= 1
        return logits, (cache, start + size)

    return extend


def generate(params, context, tokens, extend):
    """Most likely ids that continue the context, and their log-probabilities."""
    part, state, ids, log_probs = np.asarray(context)[None], None, [], []
    for _ in range(tokens):
        logits, state = extend(part, state)
        log_p = scipy.special.log_softmax(np.asarray(logits)[0, -1])
        ids.append(int(log_p.argmax()))
        log_probs.append(float(log_p[ids[-1]]))
        part = np.array([[ids[-1]]])
    return ids, log_probs


def sampler(fault=""):
    """`(logits, seed, **options) -> ids`."""

    def sample(
        logits, seed, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seen=None
    ):
        logits = np.array(logits, np.float64)
        rows = np.arange(len(logits))[:, None]
        if seen is not None:
            old = logits[rows, seen]
            divided = old / repetition_penalty
            fair = np.where(old > 0, divided, old * repetition_penalty)
            logits[rows, seen] = divided if fault == "penalty divides" else fair
        if temperature == 0:
            if fault == "zero means one":
                temperature = 1.0
            elif fault != "zero is refused":
                return logits.argmax(1)
            else:
                raise ValueError("temperature must be above 0")
        logits = logits * temperature if fault == "multiplied" else logits / temperature
        order = np.argsort(-logits, axis=1)
        ranked = np.take_along_axis(logits, order, 1)
        if top_k:
            ranked[:, top_k + (fault == "one more") :] = -np.inf
        p = np.exp(ranked - ranked[:, :1])
        p /= p.sum(1, keepdims=True)
        mass = p.cumsum(1)
        if top_p < 1:
            cut = mass > top_p if fault == "last one cut" else mass - p >= top_p
            if fault == "first dropped":
                cut = mass - p >= top_p
                cut[:, 0] |= p[:, 0] < top_p
            if fault == "last one cut":
                cut[:, 0] = False
            p = np.where(cut, 0, p)
        p /= p.sum(1, keepdims=True)
        u = np.random.default_rng(seed).random((len(p), 1))
        places = (p.cumsum(1) < u).sum(1).clip(max=p.shape[1] - 1)
        return order[rows[:, 0], places]

    return sample
