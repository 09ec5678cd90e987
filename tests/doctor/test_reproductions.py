"""The real faults of five public trainers, rebuilt small, beside the same without the fault.

What each trainer published about itself is in `test_cases.py`. Here the boxes are as their code
has them, and the checks have to name what their authors did not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax.doctor import examine_gradients, examine_loss, examine_model, examine_training

pytestmark = pytest.mark.slow
fault = pytest.mark.fault
V, T, D, HEADS, LAYERS = 31, 12, 16, 2, 2


def silent(report):
    return not report.failed and not report.warned


def normal(key, *shape, std=D**-0.5):
    return std * jax.random.normal(key, shape)


def init(seed, *, same_seed=False):
    """A pre-norm decoder with learned positions, untied."""
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    layer_keys = list(jax.random.split(jax.random.key(1234), 6))

    def block():
        ks = layer_keys if same_seed else [next(keys) for _ in range(6)]
        names = ("query", "key", "value", "out", "up", "down")
        shapes = ((D, D),) * 4 + ((D, 2 * D), (2 * D, D))
        return {n: normal(k, *s) for n, k, s in zip(names, ks, shapes, strict=True)}

    return {
        "tokens": normal(next(keys), V, D, std=0.3),
        "positions": normal(next(keys), T, D, std=0.3),
        "blocks": [block() for _ in range(LAYERS)],
        "head": normal(next(keys), D, V),
    }


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def right(q, k, v):
    """Causal attention over [B, H, T, C]."""
    steps = q.shape[2]
    scores = q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
    mask = jnp.tril(jnp.ones((steps, steps), bool))[None, None]
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)) @ v


def decode(params, tokens, attend=right):
    """Logits [B, T, V]."""
    B, steps = tokens.shape
    x = params["tokens"][tokens] + params["positions"][None, :steps]
    for block in params["blocks"]:
        u = norm(x)
        heads = (
            (u @ block[n]).reshape(B, steps, HEADS, -1).swapaxes(1, 2)
            for n in ("query", "key", "value")
        )
        mixed = attend(*heads).swapaxes(1, 2).reshape(B, steps, D)
        x = x + mixed @ block["out"]
        x = x + jax.nn.gelu(norm(x) @ block["up"]) @ block["down"]
    return norm(x) @ params["head"]


def right_loss(logits, tokens, weights):
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    w = weights[:, 1:].astype(jnp.float32)
    targets = jnp.where(w > 0, tokens[:, 1:], 0)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    nats = -jnp.take_along_axis(log_p, jnp.where(inside, targets, 0)[..., None], 2)[..., 0]
    nats = jnp.where(w > 0, jnp.where(inside, nats, jnp.nan), 0.0)
    return (nats * w).sum(), w.sum()


def examine(attend=right, **more):
    return examine_model(
        lambda params, tokens: decode(params, tokens, attend),
        params=init(0),
        vocab_size=V,
        seq_len=T,
        **more,
    )


def training(loss=right_loss, attend=right, updates_due=lambda count: (count, True), steps=200):
    """Examine a loop of Adam; `updates_due` turns its counter into the next and a decision."""
    tx = optax.adam(1e-3)

    def mean(params, tokens):
        total, count = loss(decode(params, tokens, attend), tokens, jnp.ones(tokens.shape))
        return total / count

    def init_fn(seed):
        params = init(seed)
        return {"params": params, "opt": tx.init(params), "count": 0}

    @jax.jit
    def update(params, opt, tokens):
        updates, opt = tx.update(jax.grad(mean)(params, tokens), opt)
        return optax.apply_updates(params, updates), opt

    def step_fn(state, tokens):
        count, due = updates_due(state["count"])
        params, opt = update(state["params"], state["opt"], tokens)
        if not due:
            params, opt = state["params"], state["opt"]
        return {"params": params, "opt": opt, "count": count}

    @jax.jit
    def score(params, tokens):
        return loss(decode(params, tokens, attend), tokens, jnp.ones(tokens.shape))

    return examine_training(
        init_fn,
        step_fn,
        lambda state, tokens: score(state["params"], tokens),
        vocab_size=V,
        seq_len=T,
        steps=steps,
        params_of=lambda state: state["params"],
        smallest_leak=0.1,
    )


def test_without_the_faults_all_is_silent():
    for report in (examine(), examine_loss(right_loss, vocab_size=V, seq_len=T), training()):
        assert silent(report), [f for f in report if f.status in ("fail", "warn")]


# Stellux: labels are the inputs, padding among them; the library's shift is missing.


def copied_loss(logits, tokens, weights):
    log_p = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_p, tokens[..., None], 2)[..., 0]
    return nats.sum(), jnp.float32(tokens.size)


@fault(1, "loss.oracle")
@fault(4, "loss.padding")
def test_stellux_loss():
    report = examine_loss(copied_loss, vocab_size=V, seq_len=T)
    assert {"loss.oracle", "loss.padding"} <= set(report.failed)


@fault(1, "training.gibbs")
def test_stellux_training():
    """The model itself is causal; what it is trained on is not."""
    report = training(loss=copied_loss, steps=300)
    assert "training.gibbs" in report.failed
    assert report["training.gibbs"].values["excess"] < -1


# Tinker: attention of a library whose layout is [T, B, H, C], given [B, T, H, C].


def attends_rows(q, k, v):
    """What comes in as [B, H, T, C] is attended over B, as if it were the time."""
    q, k, v = (y.transpose(2, 1, 0, 3) for y in (q, k, v))
    return right(q, k, v).transpose(2, 1, 0, 3)


@fault(22, "model.row_independence")
@fault(22, "model.context_use")
def test_tinker_attention():
    report = examine(attends_rows)
    assert {"model.row_independence", "model.context_use"} <= set(report.failed)
    assert "model.suffix_swap" not in report.failed  # the future is not what leaks


def test_tinker_loss_has_no_shift():
    """The same missing shift as above, here with the weights respected."""

    def loss(logits, tokens, weights):
        each, w = -jax.nn.log_softmax(logits), weights.astype(jnp.float32)
        nats = jnp.take_along_axis(each, tokens[..., None], 2)[..., 0]
        return (nats * w).sum(), w.sum()

    assert "loss.oracle" in examine_loss(loss, vocab_size=V, seq_len=T).failed


# MU-SOTA: matrices of 8 x 8 in blocks of 2 x 2, attended block by block, without a mask.


def to_blocks(m):
    """[B, T, 8, 8] -> [B, T, 16, 4], the blocks in rows of four."""
    *lead, _, _ = m.shape
    return m.reshape(*lead, 4, 2, 4, 2).swapaxes(-3, -2).reshape(*lead, 16, 4)


def from_blocks(b):
    """The inverse."""
    *lead, _, _ = b.shape
    return b.reshape(*lead, 4, 4, 2, 2).swapaxes(-3, -2).reshape(*lead, 8, 8)


def musota(masked):
    """Block-wise attention, a linear map across blocks, and the gated update."""
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "tokens": normal(keys[0], V, 64, std=0.3),
        "positions": normal(keys[1], T, 64, std=0.3),
        "qkv": normal(keys[2], 3, 16, 4, 4, std=0.5),
        "across": normal(keys[3], 64, 64, std=0.125),
        "gate": normal(keys[4], 16, std=0.5),
        "head": normal(keys[5], 64, V, std=0.125),
    }

    def apply(params, tokens):
        B, steps = tokens.shape
        m = (params["tokens"][tokens] + params["positions"][None, :steps]).reshape(B, steps, 8, 8)
        x = to_blocks(m)
        q, k, v = (jnp.einsum("btnc,ncd->bntd", x, w) for w in params["qkv"])
        if masked:
            z = right(q, k, v)
        else:
            z = jax.nn.softmax(q @ k.swapaxes(2, 3) / 2) @ v
        z = z.swapaxes(1, 2).reshape(B, steps, 64)
        z = norm(z + z @ params["across"]).reshape(B, steps, 16, 4)
        x = x + jax.nn.sigmoid(params["gate"])[None, None, :, None] * (z - x)
        return from_blocks(x).reshape(B, steps, 64) @ params["head"]

    return examine_model(apply, params=params, vocab_size=V, seq_len=T)


@fault(13, "model.suffix_swap")
def test_musota_has_no_mask():
    assert silent(musota(masked=True))
    report = musota(masked=False)
    assert "model.suffix_swap" in report.failed


# MLP-cuda: keys and values as one [T, C] matrix, and a hand-written backward.


def first_row_and_head(q, k, v):
    """Rows and heads all attend to row 0 and head 0, and no mask is passed."""
    k, v = (jnp.broadcast_to(y[:1, :1], y.shape) for y in (k, v))
    return jax.nn.softmax(q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5) @ v


@fault(21, "model.row_independence")
@fault(13, "model.suffix_swap")
def test_mlp_cuda_attention():
    report = examine(first_row_and_head)
    assert {"model.row_independence", "model.suffix_swap"} <= set(report.failed)


@fault(59, "model.identical_leaves")
def test_mlp_cuda_layers_of_one_seed():
    params = init(0, same_seed=True)
    report = examine_model(decode, params=params, vocab_size=V, seq_len=T)
    assert "model.identical_leaves" in report.failed


def written_backward(params, buffer):
    """Loss and gradient of a normalised bigram, by hand; the norm's input comes from `buffer`."""
    pairs = np.random.default_rng(0).integers(0, V, (40, 2))
    table, head = (np.asarray(params[n], np.float64) for n in ("table", "head"))
    x = table[pairs[:, 0]]

    def normalise(x):
        centred = x - x.mean(-1, keepdims=True)
        scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return centred * scale, scale

    y, _ = normalise(x)
    z = y @ head
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    loss = -np.log(p[np.arange(40), pairs[:, 1]]).mean()
    dz = p.copy()
    dz[np.arange(40), pairs[:, 1]] -= 1
    dz /= 40
    dy = dz @ head.T
    y_back, scale = normalise(x if buffer == "input" else y * 3 + x[::-1])
    dx = scale * (dy - dy.mean(-1, keepdims=True) - y_back * (dy * y_back).mean(-1, keepdims=True))
    d_table = np.zeros_like(table)
    np.add.at(d_table, pairs[:, 0], dx)
    return loss, {"table": d_table, "head": y.T @ dz}


@fault(65, "gradient.directional")
def test_mlp_cuda_backward_of_another_buffer():
    rng = np.random.default_rng(1)
    params = {"table": rng.normal(0, 0.5, (V, 8)), "head": rng.normal(0, 0.5, (8, V))}

    def report(buffer):
        return examine_gradients(
            lambda params: written_backward(params, "input")[0],
            params,
            grad_fn=lambda params: written_backward(params, buffer)[1],
        )

    assert silent(report("input"))
    assert "gradient.directional" in report("swapped").failed


def test_mlp_cuda_the_blamed_loss_is_right():
    """The masked mean and its gradient (softmax - one-hot) / N, which the authors suspected."""

    @jax.custom_vjp
    def loss(logits, tokens, weights):
        return right_loss(logits, tokens, weights)

    def forward(logits, tokens, weights):
        return loss(logits, tokens, weights), (logits, tokens, weights)

    def backward(saved, cotangent):
        logits, tokens, weights = saved
        p = jax.nn.softmax(logits[:, :-1])
        hot = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
        w = weights[:, 1:, None]
        d = jnp.where(w > 0, w * (p - hot), 0.0) * cotangent[0]
        return jnp.pad(d, ((0, 0), (0, 1), (0, 0))), None, None

    loss.defvjp(forward, backward)
    report = examine_loss(loss, vocab_size=1100, seq_len=T)
    assert silent(report), [f for f in report if f.status in ("fail", "warn")]


# Distillation: a counter that is read, and raised, twice for each batch.


def asked_twice(count):
    """Asking raises the counter, and it is asked again for the log: the first sees odd ones."""
    due = (count + 1) % 8 == 0
    return count + 2, due


def asked_once(count):
    return count + 1, (count + 1) % 8 == 0


@fault(46, "training.updates")
@fault(46, "training.score_changes")
def test_distillation_never_steps():
    assert "training.updates" not in training(updates_due=asked_once, steps=40).failed
    report = training(updates_due=asked_twice, steps=40)
    assert {"training.updates", "training.score_changes"} <= set(report.failed)


@fault(8, "loss.nothing_scored")
def test_distillation_batch_without_labels():
    def loss(logits, tokens, weights):
        total, count = right_loss(logits, tokens, weights)
        return total / count * count, count  # the mean of the library, over no token

    report = examine_loss(loss, vocab_size=V, seq_len=T)
    assert "loss.nothing_scored" in report.failed
