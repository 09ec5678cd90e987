"""One-layer models: a correct one, and one for every way in which a position sees too much."""

import jax
import jax.numpy as jnp
import optax

LEAKS = {  # row of the catalogue, and the checks that see it in the forward pass
    "bidirectional": (13, "model.suffix_swap"),
    "off_by_one": (14, "model.suffix_swap"),
    "chunk_mean": (15, "model.suffix_swap"),
    "circular": (16, "model.suffix_swap"),
    "time_mean": (16, "model.truncation"),
    "batch_time_norm": (16, "model.row_independence"),
    "pair": (17, "model.suffix_swap"),
    "gated": (18, "model.suffix_swap"),
    "row_zero": (21, "model.row_independence"),
    "batch_axis": (22, "model.context_use"),
    "reshape": (23, "model.truncation"),
}
HEALTHY = ("correct", "convolution", "window", "tied")
D, LENGTHS = 32, 128


def init(kind, V, seed=0, head_std=D**-0.5):
    """Parameters; `gate` starts at 0 and multiplies what leaks in the kind "gated"."""
    keys = iter(jax.random.split(jax.random.key(seed), 12))

    def normal(*shape, std):
        return std * jax.random.normal(next(keys), shape)

    matrix = D**-0.5
    params = {
        "embedding": normal(V, D, std=0.2 if kind != "tied" else 0.1),
        "positions": normal(LENGTHS, D, std=0.1),
        **{name: normal(D, D, std=matrix) for name in ("query", "key", "value", "out")},
        "head": normal(D, V, std=head_std),
    }
    if kind == "tied":
        del params["head"]
    if kind == "gated":
        params |= {"gate": jnp.zeros(()), "leak": normal(D, D, std=matrix)}
    if kind in ("circular", "convolution"):
        params["filter"] = normal(LENGTHS, D, std=0.3)
    if kind == "pair":
        params["next"] = normal(V, D, std=0.2)
    return params


def forward(kind, chunk=16, heads=4):
    """The function (params, tokens [B, T]) -> logits [B, T, V] of a kind."""

    def rms(x):
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def attention(params, x, mask_TS):
        B, T, _ = x.shape
        q, k, v = (x @ params[n] for n in ("query", "key", "value"))
        if kind == "reshape":
            q, k, v = (y.reshape(B, heads, T, D // heads) for y in (q, k, v))
        else:
            q, k, v = (y.reshape(B, T, heads, -1).transpose(0, 2, 1, 3) for y in (q, k, v))
        if kind == "row_zero":
            k, v = (jnp.broadcast_to(y[:1], y.shape) for y in (k, v))
        scores = jnp.einsum("bhtc,bhsc->bhts", q, k) * (D // heads) ** -0.5
        probs = jax.nn.softmax(jnp.where(mask_TS[None, None], scores, -jnp.inf))
        y = jnp.einsum("bhts,bhsc->bhtc", probs, v)
        y = y if kind == "reshape" else y.transpose(0, 2, 1, 3)
        return y.reshape(B, T, D) @ params["out"]

    def apply(params, tokens):
        T = tokens.shape[1]
        x = params["embedding"][tokens] + params["positions"][None, :T]
        t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
        mask = s <= t
        if kind == "bidirectional":
            mask = jnp.ones_like(mask)
        if kind == "off_by_one":
            mask = s <= t + 1
        if kind == "window":
            mask = mask & (t - s < 5)
        if kind == "pair":
            x = x + jnp.pad(params["next"][tokens[:, 1:]], ((0, 0), (0, 1), (0, 0)))
        if kind == "batch_time_norm":
            x = (x - x.mean((0, 1), keepdims=True)) / (x.std((0, 1), keepdims=True) + 1e-3)
        if kind == "batch_axis":
            B = len(tokens)
            mask = jnp.arange(B)[None] <= jnp.arange(B)[:, None]
            y = attention(params, rms(x).transpose(1, 0, 2), mask).transpose(1, 0, 2)
        else:
            y = attention(params, rms(x), mask)
        x = x + y
        if kind == "chunk_mean":
            padded = jnp.pad(x, ((0, 0), (0, -T % chunk), (0, 0)))
            means = padded.reshape(len(x), -1, chunk, D).mean(2)
            x = x + jnp.repeat(means, chunk, axis=1)[:, :T]
        if kind == "time_mean":
            x = x + x.mean(1, keepdims=True)
        if kind == "gated":
            x = x + params["gate"] * (x.mean(1, keepdims=True) @ params["leak"])
        if kind in ("circular", "convolution"):
            n = T if kind == "circular" else 2 * T
            spectrum = jnp.fft.rfft(params["filter"][:T], n=n, axis=0)
            x = x + jnp.fft.irfft(jnp.fft.rfft(x, n=n, axis=1) * spectrum[None], n=n, axis=1)[:, :T]
        head = params["embedding"].T * D**-0.5 * 4 if kind == "tied" else params["head"]
        return rms(x) @ head

    return apply


def trainer(kind, V, *, chunk=16, rate=3e-3, shift=1, dropout=0.0, frozen=()):
    """(init_fn, step_fn, score_fn) of a model of a kind under Adam."""
    apply, tx = forward(kind, chunk), optax.adam(rate)

    def loss(params, tokens, key=None):
        for name in frozen:
            params = {**params, name: jax.lax.stop_gradient(params[name])}
        if key is not None:
            keep = jax.random.bernoulli(key, 1 - dropout, params["head"].shape)
            params = {**params, "head": params["head"] * keep / (1 - dropout)}
        logits = apply(params, tokens)
        T = tokens.shape[1] - shift
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :T], tokens[:, shift:])

    def init_fn(seed):
        params = init(kind, V, seed, head_std=0.02)
        return params, tx.init(params)

    @jax.jit
    def step_fn(state, tokens):
        params, moments = state
        nats, grads = jax.value_and_grad(lambda p: loss(p, tokens).mean())(params)
        updates, moments = tx.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), {"loss": nats}

    @jax.jit
    def score(params, tokens, key):
        return loss(params, tokens, key).sum()

    calls = iter(range(10**9))

    def score_fn(state, tokens):
        key = jax.random.key(next(calls)) if dropout else None
        nats = score(state[0], jnp.asarray(tokens), key)
        return float(nats), tokens.shape[0] * (tokens.shape[1] - shift)

    return init_fn, step_fn, score_fn


def packed(fault=""):
    """The function (params, tokens, segment_ids) -> logits of packed rows, with a fault."""

    def apply(params, tokens, ids):
        index = jnp.arange(tokens.shape[1])[None]
        first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
        positions = jnp.broadcast_to(index if fault == "no_restart" else index - start, ids.shape)
        x = params["embedding"][tokens] + params["positions"][positions]
        same = (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None]
        causal = index[0][:, None] >= index[0][None]
        mask = same & causal[None]
        if fault == "across":
            mask = jnp.broadcast_to(causal[None], mask.shape) & (ids > 0)[:, None]
        if fault == "replaces":
            mask = jnp.where((ids == 0).any(), same, mask)
        q, k, v = (x @ params[n] for n in ("query", "key", "value"))
        scores = jnp.einsum("btc,bsc->bts", q, k) * D**-0.5
        empty = ~mask.any(-1, keepdims=True)
        if not fault.startswith("nan"):
            scores = jnp.where(empty, 0, scores)
            mask = mask | empty
        # Added, as is often done, -inf lets the NaN of an empty row through to the gradient.
        probs = jax.nn.softmax(scores + jnp.where(mask, 0, -jnp.inf))
        if fault != "nan_forward":
            probs = jnp.where(empty, 0, probs)
        return (x + probs @ v @ params["out"]) @ params["head"]

    return apply


def grouped(order="repeat", block=None, clamped=False, heads=4, groups=2):
    """Attention with grouped heads, over blocks of queries if `block` is given.

    `order` "tile" maps query heads to the wrong groups. `clamped` forgets that the slice of the
    last block is moved back where T is no multiple of the block.
    """

    def apply(params, tokens):
        B, T = tokens.shape
        C = D // heads
        x = params["embedding"][tokens] + params["positions"][None, :T]
        q = (x @ params["query"]).reshape(B, T, heads, C)
        k, v = (
            (x @ params[n])[..., : groups * C].reshape(B, T, groups, C) for n in ("key", "value")
        )
        if order == "repeat":
            k, v = (jnp.repeat(y, heads // groups, axis=2) for y in (k, v))
        else:
            k, v = (jnp.tile(y, (1, 1, heads // groups, 1)) for y in (k, v))
        width = min(block or T, T)
        out = jnp.zeros((B, T, heads, C))
        for i in range(0, T, width):
            start = min(i, T - width)
            at = i if clamped else start
            scores = jnp.einsum("bthc,bshc->bhts", q[:, start : start + width], k) * C**-0.5
            mask = jnp.arange(T)[None] <= at + jnp.arange(width)[:, None]
            probs = jax.nn.softmax(jnp.where(mask[None, None], scores, -jnp.inf))
            out = out.at[:, start : start + width].set(jnp.einsum("bhts,bshc->bthc", probs, v))
        return (x + out.reshape(B, T, D) @ params["out"]) @ params["head"]

    return apply


def attention_maps(fault=""):
    """The function (params, tokens) -> probabilities [B, T, T]."""

    def apply(params, tokens):
        T = tokens.shape[1]
        x = params["embedding"][tokens]
        scores = jnp.einsum("btc,bsc->bts", x @ params["query"], x @ params["key"]) * 4
        mask = jnp.tril(jnp.ones((T, T), bool))[None]
        probs = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        if fault == "twice":
            probs = jax.nn.softmax(jnp.where(mask, probs, -jnp.inf))
        if fault == "dropped":
            probs = probs * jax.random.bernoulli(jax.random.key(0), 0.9, probs.shape) / 0.9
        return probs

    return apply
