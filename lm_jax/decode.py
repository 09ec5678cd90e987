"""Tokens that continue others, with a key/value cache; letters as in `models/transformer.py`.

Compiled are a pass over a padded context and a loop over new tokens, whose number is no part of its
shapes: a second prompt of about the same length compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax.ensemble import Ensemble
from lm_jax.kernels.divergences import mean_log_p
from lm_jax.models.layers import Cache
from lm_jax.workdir import Trained

CHUNK = 16  # tokens between two looks at them
LEAST = 32  # slots; contexts and caches have few lengths


class Sampling(NamedTuple):
    """How the next token is drawn; see `sample`."""

    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclasses.dataclass(frozen=True)
class _Model:
    """The structure of a run and how it computes; jit needs a hash, which a structure has not."""

    graphdef: Any = dataclasses.field(compare=False)
    identity: int  # of the structure
    precision: str
    dtype: jnp.dtype


def continuations(
    run: Trained,
    contexts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    tokens: int,
    how: Sampling,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and their log-probabilities, [B, n] with n up to `CHUNK`, `tokens` in all.

    A row gets what it would get alone. When its text is longer than the window that the model was
    trained on, the last half window of it is kept and read afresh.

    Args:
        run: the model, or several, whose probabilities are averaged.
        contexts: ids before the new ones, at least one a row; each of any length.
        numbers: of each row, by which its random key differs from that of others.
        tokens: new tokens a row.
        how: how they are drawn.

    Raises:
        FloatingPointError: if the logits are not finite.
    """
    window = run.cfg.data.seq_len
    models, params, layers = _members(run)
    rows, starts = [list(context) for context in contexts], [0] * len(contexts)
    drawn = (
        np.float32(how.temperature or 1),
        np.uint32(how.seed),
        np.asarray(numbers, np.int32),
        run.tokenizer.separator,
    )
    made = slots = 0
    while made < tokens:
        for b, row in enumerate(rows):
            if len(row) - starts[b] > window:
                starts[b] = len(row) - max(1, window // 2)
        texts = [row[start:] for row, start in zip(rows, starts, strict=True)]
        room = min(tokens - made, window + 1 - max(map(len, texts)))
        context_BP, first_B = _padded([text[:-1] for text in texts])
        slots = max(slots, -(-(context_BP.shape[1] + room) // LEAST) * LEAST)
        caches = tuple(
            _read(*own, context_BP, first_B, slots=slots, model=model)
            for *own, model in zip(params, layers, models, strict=True)
        )
        last_B1 = np.array([text[-1:] for text in texts], np.int32)
        for done in range(0, room, CHUNK):
            count = min(CHUNK, room - done)
            caches, *found = _extend(
                *(params, layers, caches, last_B1, *drawn, made, count),
                top_k=how.top_k if how.temperature else 1,
                top_p=how.top_p,
                models=models,
            )
            ids_Bn, log_probs_Bn = (np.asarray(x)[:, :count] for x in found)
            _require_finite(run, log_probs_Bn)
            for row, ids in zip(rows, ids_Bn.tolist(), strict=True):
                row += ids
            last_B1, made = ids_Bn[:, -1:], made + count
            yield ids_Bn, log_probs_Bn


def _members(run: Trained) -> tuple[tuple[Any, ...], ...]:
    """Of each model that is averaged, or of the one: `_Model`, parameters, and these by layer."""
    members = run.members if isinstance(run, Ensemble) else (run,)
    params = tuple(one.params for one in members)
    models = tuple(
        _Model(
            one.graphdef,
            id(one.graphdef),
            one.cfg.train.matmul_precision,
            jnp.dtype(one.cfg.train.compute_dtype),
        )
        for one in members
    )
    layers = tuple(_layers(own, model=model) for own, model in zip(params, models, strict=True))
    return models, params, layers


def _padded(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, P], and where each row's begin: padding comes first, so that all end together."""
    width = max(LEAST, 1 << (max(map(len, texts)) - 1).bit_length())
    ids_BP = np.zeros((len(texts), width), np.int32)
    first_B = np.array([width - len(text) for text in texts], np.int32)
    for row, first, text in zip(ids_BP, first_B, texts, strict=True):
        row[first:] = text
    return ids_BP, first_B


def _require_finite(run: Trained, log_probs_Bn: np.ndarray) -> None:
    if not np.isfinite(log_probs_Bn).all():
        raise FloatingPointError(
            f"The logits at step {run.step} are not finite: the run diverged, or its numbers leave "
            f"the range of config.train.compute_dtype={run.cfg.train.compute_dtype!r}."
        )


@functools.partial(jax.jit, static_argnames="model")
def _layers(params: Any, *, model: _Model) -> list[Any]:
    """The parameters layer by layer, which otherwise each call would copy out of their stack."""
    return nnx.merge(model.graphdef, params).by_layer()


@functools.partial(jax.jit, static_argnames=("slots", "model"))
def _read(
    params: Any,
    layers: list[Any],
    context_BP: jax.Array,
    first_B: jax.Array,
    *,
    slots: int,
    model: _Model,
) -> Cache:
    """A cache that holds a context, with as many slots in all."""
    decoder, dtype = nnx.merge(model.graphdef, params), model.dtype
    empty = decoder.empty_cache(len(context_BP), slots, dtype)._replace(first_B=first_B)
    with jax.default_matmul_precision(model.precision):
        return decoder.extend(context_BP, empty, dtype=dtype, layers=layers)[1]


@functools.partial(jax.jit, static_argnames=("top_k", "top_p", "models"), donate_argnames="caches")
def _extend(
    params: tuple[Any, ...],
    layers: tuple[list[Any], ...],
    caches: tuple[Cache, ...],
    last_B1: jax.Array,
    temperature: jax.Array,
    seed: jax.Array,
    number_B: jax.Array,
    separator: int,
    made: int,
    count: int,
    *,
    top_k: int,
    top_p: float,
    models: tuple[_Model, ...],
) -> tuple[tuple[Cache, ...], jax.Array, jax.Array]:
    """The longer caches, and `count` ids and log-probabilities [B, CHUNK]."""
    decoders = [nnx.merge(m.graphdef, own) for m, own in zip(models, params, strict=True)]
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), number_B)

    def read(caches, last_B1):
        longer, logits = [], []
        for decoder, cache, own, model in zip(decoders, caches, layers, models, strict=True):
            with jax.default_matmul_precision(model.precision):
                x_B1D, cache = decoder.extend(last_B1, cache, dtype=model.dtype, layers=own)
                logits.append(decoder.logits(x_B1D)[:, 0])
            longer.append(cache)
        return tuple(longer), logits[0] if len(logits) == 1 else mean_log_p(logits, 1.0)

    def read_and_sample(n, carry):
        caches, last_B1, ids_BN, log_probs_BN = carry
        caches, logits_BV = read(caches, last_B1)
        now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, made + n)
        last_B1 = sample(logits_BV, now_B, temperature, top_k, top_p, separator)[:, None]
        log_probs_B1 = jnp.take_along_axis(logits_BV, last_B1, axis=1)
        log_probs_B1 -= jax.nn.logsumexp(logits_BV, axis=1, keepdims=True)
        ids_BN = jax.lax.dynamic_update_slice_in_dim(ids_BN, last_B1, n, axis=1)
        log_probs_BN = jax.lax.dynamic_update_slice_in_dim(log_probs_BN, log_probs_B1, n, axis=1)
        return caches, last_B1, ids_BN, log_probs_BN

    wide = jnp.result_type(jnp.float32, *(model.dtype for model in models))
    nothing = (jnp.zeros((len(last_B1), CHUNK), kind) for kind in (jnp.int32, wide))
    after = jax.lax.fori_loop(0, count, read_and_sample, (caches, last_B1, *nothing))
    caches, _, ids_BN, log_probs_BN = after
    return caches, ids_BN, log_probs_BN


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    temperature: jax.typing.ArrayLike,
    top_k: int,
    top_p: float,
    separator: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """One id per row, int32 [B], never the separator; every row has a random key of its own.

    The arguments are those of `shortlist`.
    """
    if top_k == 1:
        return jnp.argmax(_without(separator, logits_BV), axis=1).astype(jnp.int32)
    ids_BK, scores_BK = shortlist(logits_BV, temperature, top_k, top_p, separator)
    places_B = _draw(scores_BK, keys_B)
    return jnp.take_along_axis(ids_BK, places_B[:, None], axis=1)[:, 0]


def shortlist(
    logits_BV: jax.Array,
    temperature: jax.typing.ArrayLike,
    top_k: int,
    top_p: float,
    separator: jax.typing.ArrayLike = 0,
) -> tuple[jax.Array, jax.Array]:
    """Ids and their logits / temperature, -inf for those cut, [B, K].

    Args:
        logits_BV: scores of the next token.
        temperature: above 0.
        top_k: the k most likely are kept, of equals those with the lower id; 0: all.
        top_p: of these, the fewest that together have this probability; 1: all.
        separator: id that is never drawn.
    """
    V = logits_BV.shape[1]
    scores_BK = _without(separator, logits_BV)
    ids_BK = jnp.broadcast_to(jnp.arange(V), scores_BK.shape)
    if 0 < top_k < V:
        scores_BK, ids_BK = jax.lax.top_k(scores_BK, top_k)
    scores_BK = _tempered(scores_BK, temperature)
    if top_p < 1:
        scores_BK = jnp.where(_fewest(scores_BK, top_p), scores_BK, -jnp.inf)
    return ids_BK, scores_BK


def _fewest(scores_BK: jax.Array, top_p: float) -> jax.Array:
    """Whether a place belongs to the fewest that together have this probability.

    Of equals the first ones do. The least probability among them is found bit by bit, which takes a
    thirtieth of the time of a sort on a CPU.
    """
    probs_BK = jax.nn.softmax(scores_BK).astype(jnp.float32)

    def longer(n, bits_B1):
        tried_B1 = bits_B1 | (1 << (30 - n))
        kept_BK = probs_BK >= jax.lax.bitcast_convert_type(tried_B1, jnp.float32)
        sums_B1 = jnp.where(kept_BK, probs_BK, 0).sum(axis=1, keepdims=True)
        return jnp.where(sums_B1 >= top_p, tried_B1, bits_B1)

    bits_B1 = jax.lax.fori_loop(0, 31, longer, jnp.zeros((len(probs_BK), 1), jnp.int32))
    least_B1 = jax.lax.bitcast_convert_type(bits_B1, jnp.float32)
    more_BK, equal_BK = probs_BK > least_B1, probs_BK == least_B1
    missing_B1 = top_p - jnp.where(more_BK, probs_BK, 0).sum(axis=1, keepdims=True)
    before_BK = jnp.cumsum(equal_BK, axis=1) - 1
    return more_BK | (equal_BK & ((before_BK == 0) | (before_BK * least_B1 < missing_B1)))


def _without(separator: jax.typing.ArrayLike, logits_BV: jax.Array) -> jax.Array:
    """It stands before a document; it is never a target in training either."""
    return logits_BV.at[:, separator].set(-jnp.inf)


def _tempered(scores_BK: jax.Array, temperature: jax.typing.ArrayLike) -> jax.Array:
    """Divided; the best becomes 0, so that a tiny temperature gives -inf below it, not nan."""
    scores_BK = scores_BK - scores_BK.max(axis=1, keepdims=True)
    return scores_BK / jnp.maximum(temperature, jnp.finfo(scores_BK.dtype).tiny)


def _draw(scores_BK: jax.Array, keys_B: jax.Array) -> jax.Array:
    """A place per row, [B], by the softmax of its scores: one random number, not one a place."""
    probs_BK = jnp.exp(scores_BK)
    # What has no probability is left out by name: a sum in parallel need not be monotonic.
    sums_BK = jnp.where(probs_BK > 0, jnp.cumsum(probs_BK, axis=1), 0)
    shares_B1 = jax.vmap(jax.random.uniform)(keys_B)[:, None].astype(sums_BK.dtype)
    at_B1 = shares_B1 * sums_BK.max(axis=1, keepdims=True)
    return jnp.argmax(sums_BK > at_B1, axis=1).astype(jnp.int32)
