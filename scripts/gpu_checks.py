"""What `gpu_correct.py` checks: attention, the loss and whole updates, each with its definition."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gpu_peers
import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import config, loss, step
from lm_jax.kernels.attention import attend
from lm_jax.kernels.dropout import Draw
from lm_jax.kernels.linear_loss import linear_cross_entropy
from lm_jax.models.families import choose_attention, create_model
from lm_jax.models.layers import head_logits
from lm_jax.objective import NextToken

Values = dict[str, Any]  # arrays, or lists of them
Function = Callable[..., Values]


class Check(NamedTuple):
    """Something that several implementations compute from the same arrays."""

    name: str
    args: tuple[Any, ...]
    exact: Function
    plain: Function
    functions: dict[str, Function]
    slack: dict[str, float]  # what an error may have beyond twice that of the plain implementation


class Shape(NamedTuple):
    """Attention of `rows` rows of T positions, H heads that read K key/value heads, C wide."""

    rows: int
    T: int
    H: int
    K: int
    C: int
    dtype: str = "bfloat16"
    documents: int = 1
    padding: bool = False
    size: float = 1.0  # of the queries
    # Beyond twice the error of the plain implementation. Where probabilities are near 1, the
    # gradient of a score is a small difference of values that kernels keep in 16 bits.
    slack: float = 1e-3
    options: dict[str, Any] = {}

    def small(self) -> "Shape":
        """The same for a CPU."""
        return self._replace(rows=2, T=self.T // 16, H=2, K=1 + (self.H == self.K), C=self.C // 8)


SHAPES = {  # the important ones first
    "documents": Shape(32, 512, 6, 6, 64, documents=2),
    "plain": Shape(2, 512, 8, 4, 64),
    "padding": Shape(3, 512, 4, 4, 64, documents=2, padding=True),
    "wide": Shape(2, 1024, 4, 4, 128),
    "grouped": Shape(3, 1024, 4, 2, 64, documents=3),
    "long": Shape(1, 4096, 4, 4, 64),
    "ragged": Shape(2, 1000, 4, 2, 80),
    "window": Shape(2, 1024, 4, 4, 64, options=dict(window=200)),
    "dropout": Shape(2, 512, 4, 4, 64, options=dict(dropout_rate=0.2)),
    "softcap": Shape(2, 512, 4, 4, 64, options=dict(softcap=15.0)),
    "all": Shape(
        3, 1024, 4, 2, 128, documents=3, options=dict(window=300, softcap=20.0, dropout_rate=0.1)
    ),
    "not causal": Shape(2, 512, 4, 4, 128, options=dict(causal=False)),
    "float16": Shape(2, 512, 4, 4, 64, "float16"),
    "large": Shape(2, 512, 4, 4, 64, size=30.0, slack=1e-2),
}


def attention_check(name: str, shape: Shape, impls: list[str]) -> Check:
    """Output and gradients of `attend`."""
    rng = np.random.default_rng(len(name))
    B, T = shape.rows, shape.T

    def array(heads: int, size: float = 1.0) -> jax.Array:
        return jnp.asarray(size * rng.standard_normal((B, T, heads, shape.C)), shape.dtype)

    arrays = (array(shape.H, shape.size), array(shape.K), array(shape.K), array(shape.H))
    ids_BT = documents(rng, B, T, shape.documents)
    if shape.padding:
        ids_BT[0, T // 2 :] = 0
        ids_BT[1] = 0
    segments = jnp.asarray(ids_BT) if shape.documents > 1 else None
    draw = Draw(jax.random.key(3)) if "dropout_rate" in shape.options else None

    def run(impl: str, q, k, v, dout, segments) -> Values:
        how = dict(impl=impl, segment_ids_BT=segments, draw=draw, **shape.options)
        out, pull = jax.vjp(functools.partial(attend, **how), q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(dout)), strict=True))

    functions: dict[str, Function] = {impl: functools.partial(run, impl) for impl in impls}
    slack = dict.fromkeys(("out", "dq", "dk", "dv"), shape.slack)
    plain = functools.partial(run, "reference")
    return Check(f"attention {name}", (*arrays, segments), widened(plain), plain, functions, slack)


def documents(rng: np.random.Generator, rows: int, length: int, count: int) -> np.ndarray:
    """Segment ids of rows that are cut at random, [rows, length]."""
    cuts = np.sort(rng.integers(1, length, (rows, count - 1)), axis=1)
    after = np.arange(length)[None, :, None] >= cuts[:, None]
    return 1 + after.sum(-1, dtype=np.int32)


def widened(function: Function) -> Function:
    """The same with float32 in place of 16 bits and the highest precision of products."""

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def exact(*args: Any) -> Values:
        with jax.default_matmul_precision("highest"):
            return function(*jax.tree.map(wide, args))

    return exact


def loss_check(vocab_size: int, width: int, length: int) -> Check:
    """Value and gradients of the linear layer with cross-entropy."""
    rng = np.random.default_rng(vocab_size)
    x = jnp.asarray(rng.standard_normal((8, length, width)), jnp.bfloat16)
    head = jnp.asarray(rng.standard_normal((vocab_size, width)) * width**-0.5, jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, vocab_size, (8, length)), jnp.int32)
    weights = np.ones((8, length), np.float32)
    weights[0, : length // 2] = 0

    def differentiated(f: Callable[..., jax.Array]) -> Function:
        def run(x, head) -> Values:
            value, (dx, dhead) = jax.value_and_grad(f, (0, 1))(x, head.astype(jnp.float32))
            return {"loss": value, "dx": dx, "dhead": dhead}

        return run

    def materialised(x, head):
        return loss.cross_entropy(head_logits(x, head, 0.0), targets, jnp.asarray(weights))[0]

    def fused(x, head):
        return linear_cross_entropy(x, head, targets, jnp.asarray(weights)).objective

    plain = differentiated(materialised)
    functions = {"fused": differentiated(fused)}
    slack = dict(loss=1e-4, dx=1e-4, dhead=1e-4)
    return Check(f"loss {vocab_size}", (x, head), widened(plain), plain, functions, slack)


def step_check(case: str, layers: int, rows: int, impls: list[str]) -> Check:
    """Loss, gradients and the sizes of gradient and update of one update."""
    size = gpu_peers.CASES[case]
    base = gpu_peers.config_of(size)
    base = config.replace(base, model__layers=layers, data__batch_size=rows)
    B, T, V = rows, base.data.seq_len, size.vocab_size

    def update(attention: str, kind: str, dtype: str, precision: str) -> Function:
        changes = dict(attention__impl=attention, loss__impl=kind, train__compute_dtype=dtype)
        cfg = config.replace(base, **changes, train__matmul_precision=precision)
        graphdef, _ = create_model(cfg, V, choose_attention(cfg)[0])
        gradients_of = step.make_gradients(cfg, NextToken.of(cfg, graphdef))
        make = step.make_update(cfg)

        def run(state: step.TrainState, batch: loss.Batch) -> Values:
            with jax.default_matmul_precision(precision):
                found = gradients_of(state.params, state.step, state.loss_scale, batch)
                metrics = make(state, *found)[1]
            return {
                "loss": metrics["train/loss"],
                "gradient norm": metrics["optim/grad_norm"],
                "update norm": metrics["optim/update_norm"],
                "gradient": jax.tree.leaves(found[0]),
            }

        return run

    _, init = create_model(base, V, "reference")
    state = jax.jit(lambda key: step.init_state(base, init(key)))(jax.random.key(0))
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, V, (B, T + 1)).astype(np.int32)
    ids = documents(rng, B, T + 1, 3)
    batch = {
        "tokens": tokens,
        "segment_ids": ids,
        "weights": np.float32(rng.random(ids.shape) < 0.9),
    }
    half = (base.train.compute_dtype, base.train.matmul_precision)
    functions = {impl: update(impl, "fused", *half) for impl in impls}
    slack = {"loss": 1e-3, "gradient norm": 3e-3, "update norm": 2e-2, "gradient": 1e-3}
    return Check(
        f"update {case}",
        (state, jax.device_put(batch)),
        update("reference", "materialised", "float32", "float32"),
        update("reference", "materialised", *half),
        functions,
        slack,
    )


class Planned(NamedTuple):
    """A check that is made when its turn comes."""

    name: str
    impls: list[str]
    make: Callable[[], Check]


def plan(impls: list[str], toy: bool) -> list[Planned]:
    """All checks, in the order in which time is spent on them."""
    attention, rest = [], []
    for name, shape in SHAPES.items():
        make = functools.partial(attention_check, name, shape.small() if toy else shape, impls)
        attention.append(Planned(f"attention {name}", impls, make))
    # Whole updates take longest to compile; on a CPU "auto" is enough.
    whole = [impl for impl in impls if impl not in ("blockwise", "xla" if toy else "")]
    if "pallas" not in impls:
        whole = ["auto", *whole]
    for case in (f"{size}{' toy' * toy}" for size in ("17M", "124M")):
        rest.append(
            Planned(f"update {case}", whole, functools.partial(step_check, case, 2, 2, whole))
        )
    losses = ((16_384, 384, 512), (50_257, 768, 512), (1_000, 64, 100))
    for vocab_size, width, length in losses if "pallas" not in impls else ():
        sizes = (vocab_size // 50, 32, 20) if toy else (vocab_size, width, length)
        make = functools.partial(loss_check, *sizes)
        rest.append(Planned(f"loss {sizes[0]}", ["fused"], make))
    return [*attention[:2], *rest, *attention[2:]]
