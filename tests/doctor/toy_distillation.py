"""A small distillation on a Markov chain, into which faults can be planted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

V, T, ROWS, STEPS = 13, 12, 16, 40
TEMPERATURE, PEAK, ALPHA = 2.0, 3e-2, 0.7


def init(seed, width):
    rng = np.random.default_rng(seed)
    shapes = dict(embedding=(V, width), earlier=(width, width), head=(width, V))
    return {
        name: jnp.asarray(rng.normal(0, 1.0 if name == "embedding" else 0.3, shape), jnp.float32)
        for name, shape in shapes.items()
    }


@jax.jit
def states(params, tokens, drop=None):
    x = params["embedding"][tokens]
    before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    h = jnp.tanh(x + before @ params["earlier"])
    return h if drop is None else h * jax.random.bernoulli(drop, 0.8, h.shape) / 0.8


@jax.jit
def forward(params, tokens, drop=None):
    return states(params, tokens, drop) @ params["head"]


def draw(seed):
    """Rows of one Markov chain, of unequal length."""
    chain = np.random.default_rng(7).dirichlet(np.full(V, 0.2), V)
    rng = np.random.default_rng(seed)
    tokens = np.zeros((ROWS, T), np.int32)
    tokens[:, 0] = rng.integers(0, V, ROWS)
    for t in range(1, T):
        tokens[:, t] = [rng.choice(V, p=chain[token]) for token in tokens[:, t - 1]]
    weights = (np.arange(T)[None] < rng.integers(T - 3, T + 1, ROWS)[:, None]).astype(np.float32)
    return {"tokens": tokens, "weights": weights, "ids": np.arange(ROWS)}


@jax.jit
def cross_entropy(logits, batch):
    nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["tokens"][:, 1:])
    return (nats * batch["weights"][:, 1:]).sum() / batch["weights"][:, 1:].sum()


@functools.lru_cache
def trained_teacher():
    tx = optax.adam(PEAK)
    batches = [{n: draw(100 + i)[n] for n in ("tokens", "weights")} for i in range(10)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)

    def one(carry, i):
        params, state = carry
        batch = jax.tree.map(lambda x: x[i % 10], stacked)
        grads = jax.grad(lambda p: cross_entropy(forward(p, batch["tokens"]), batch))(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    params = init(5, 16)
    run = jax.jit(lambda c: jax.lax.scan(one, c, jnp.arange(200))[0])
    return run((params, tx.init(params)))[0]


@functools.partial(jax.jit, static_argnames="power")
def kl(student, teacher, weights, temperature, *, power=2):
    """Forward divergence times temperature^power."""
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    nats = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return temperature**power * (nats * weights).sum(), weights.sum()


def curriculum(update):
    """Weights that add up to 1, and the temperature, over the run's updates."""
    progress = min(1.0, update / (STEPS - 1))
    kd = ALPHA * min(1.0, 0.2 + progress)
    return {"kd_kl_t2": kd, "lm_ce": 1 - kd, "temperature": 3 - progress}


def arguments(
    seed=0,
    *,
    frozen=True,
    project=False,
    drop=False,
    source="teacher",
    cache="none",
    swap=False,
    blur=False,
    clock=lambda update: update,
    total="sum",
    eval_alpha=None,
):
    """Arguments for `examine_distillation`: a healthy distillation, but for what is asked for."""
    teacher, batch = trained_teacher(), draw(seed)
    student, tx = init(seed, 8), optax.adam(1e-2)
    calls = iter(range(10**6))
    if project:  # teacher states through the student's width and a table that knows no tokens
        rng = np.random.default_rng(seed)
        teacher = {
            "model": teacher,
            "projection": jnp.asarray(rng.standard_normal((16, 8)), jnp.float32),
            "table": jnp.asarray(rng.standard_normal((8, V)), jnp.float32),
        }

    def teacher_fn(params, tokens):
        return forward(params["model"] if project else params, tokens)

    def targets_fn(params, batch):
        tokens = batch["tokens"]
        if cache == "shuffled":  # outputs of the rows in an epoch's other order
            order = np.random.default_rng(3).permutation(ROWS)
            return teacher_fn(params, tokens)[order]
        if project:
            logits = states(params["model"], tokens) @ params["projection"] @ params["table"]
        elif blur:  # a time axis resized to two thirds and back
            h = states(params, tokens)
            shape = h.shape
            h = jax.image.resize(h, (ROWS, 2 * T // 3, shape[2]), "linear")
            logits = jax.image.resize(h, shape, "linear") @ params["head"]
        elif drop:
            logits = forward(
                params, tokens, jax.random.key(0 if drop == "one mask" else next(calls))
            )
        else:
            logits = teacher_fn(params, tokens)
        if cache == "shifted":
            logits = jnp.roll(logits, 1, axis=1)
        return jax.lax.stop_gradient(logits) if frozen else logits

    def parts_of(student, teacher, batch, temperature):
        logits = forward(student, batch["tokens"])
        targets = logits if source == "student" else targets_fn(teacher, batch)
        weights = batch["weights"][:, 1:]
        divergence, count = kl(logits[:, :-1], targets[:, :-1], weights, temperature, power=0)
        return {
            "kd_kl": divergence / count,
            "kd_kl_t2": temperature**2 * divergence / count,
            "lm_ce": cross_entropy(logits, batch),
        }

    def objective_fn(student, teacher, batch, alpha, temperature=TEMPERATURE):
        parts = parts_of(student, teacher, batch, temperature)
        if source == "weight 0":
            return parts["lm_ce"], parts
        return alpha * parts["kd_kl_t2"] + (1 - alpha) * parts["lm_ce"], parts

    @jax.jit
    def update(state, batch, alpha, temperature):
        which = (0, 1) if project and not frozen else 1 if swap else 0
        (total, parts), grads = jax.value_and_grad(objective_fn, which, has_aux=True)(
            state["student"], state["teacher"], batch, alpha, temperature
        )
        names = ["student", "teacher"] if which == (0, 1) else ["teacher" if swap else "student"]
        old = {n: state[n] for n in names}
        grads = dict(zip(names, grads if which == (0, 1) else [grads], strict=True))
        updates, opt = tx.update(grads, state["opt"], old)
        new = optax.apply_updates(old, updates)
        return {**state, **new, "opt": opt}, total, parts

    def init_fn(seed):
        held = {"student": student, "teacher": teacher}
        names = ["student", "teacher"] if project and not frozen else ["student"]
        names = ["teacher"] if swap else names
        return {**held, "opt": tx.init({n: held[n] for n in names}), "step": 0}

    def step_fn(state, batch):
        weights = curriculum(clock(state["step"]))
        state, objective, parts = update(state, batch, weights["kd_kl_t2"], weights["temperature"])
        weighted = {n: weights[n] * float(parts[n]) for n in ("kd_kl_t2", "lm_ce")}
        record = {f"distill/{n}": float(x) for n, x in parts.items()}
        record |= {f"distill/weighted/{n}": x for n, x in weighted.items()}
        record |= {"distill/temperature": weights["temperature"]}
        record |= {"distill/objective": float(objective)}
        if total == "raw":  # raw values under the names of the weighted ones
            record |= {f"distill/weighted/{n}": float(parts[n]) for n in weighted}
        if total == "scaled":  # T^2 hidden in the name of the plain divergence
            record["distill/kd_kl"] = record["distill/kd_kl_t2"]
        state = {**state, "step": state["step"] + 1}
        return state, record | {"step": state["step"]}

    def eval_fn(student, teacher, batch, update):
        temperature = eval_alpha(update)["temperature"] if eval_alpha else 1.0
        return parts_of(student, teacher, batch, temperature)

    return dict(
        kd_fn=kl,
        vocab_size=V,
        teacher_fn=teacher_fn,
        teacher_params=teacher,
        targets_fn=targets_fn,
        batch=batch,
        student_params=student,
        objective_fn=objective_fn,
        eval_fn=eval_fn,
        init_fn=init_fn,
        step_fn=step_fn,
        student_of=lambda state: state["student"],
        teacher_of=lambda state: state["teacher"],
        student_parameters=sum(x.size for x in student.values()),
        weights_fn=curriculum,
        steps=STEPS,
        contrastive_candidates=ROWS,
        seed=seed,
    )


def train(given):
    """Records of the whole run."""
    state, records = given["init_fn"](0), []
    for _ in range(STEPS):
        state, record = given["step_fn"](state, given["batch"])
        records.append(record)
    return records
