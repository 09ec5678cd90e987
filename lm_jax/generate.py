"""Samples from a trained run, with a key/value cache.

    python -m lm_jax.generate runs/quickstart-0 --prompt="..." --samples=3

prints samples and appends them to `samples.jsonl` of the run; in a notebook
`lm_jax.open_run(workdir).generate(prompt)` returns them. Letters as in `models/transformer.py`.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from lm_jax.config.flags import parse_flags
from lm_jax.door import command
from lm_jax.workdir import SAMPLES, Trained, open_trained


class ArgumentError(ValueError):
    """An argument that is impossible, or impossible with this run."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and one continuation of it."""

    prompt: str
    text: str  # the continuation alone
    ids: list[int]  # its tokens
    log_probs: list[float]  # nats, of each token under the model itself: temperature 1, no cuts


def generate(
    run: Trained,
    prompt: str,
    *,
    tokens: int | None = None,
    samples: int = 1,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Sample]:
    """Continue `prompt`, which opens a document.

    Args:
        run: from `open_trained` or `open_run`.
        prompt: text; empty to start from nothing.
        tokens: length of each continuation; None: 200, or fewer where the window is shorter.
        samples: number of continuations.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep only so many of the most likely tokens; 0: all.
        top_p: keep the fewest tokens whose probability, after temperature and top_k, sums to
            this or more.
        seed: the same seed gives the same samples.

    Raises:
        ArgumentError: if an argument is impossible, naming the command's flag and the remedy.
    """
    _check_options(samples, temperature, top_k, top_p, seed)
    tokenizer = run.store.tokenizer
    try:
        ids = tokenizer.encode(prompt)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ArgumentError(f"--prompt: {reason}, or leave it out of the prompt.") from error
    tokens = _fit(len(ids), tokens, run.cfg.data.seq_len)

    # A document starts with its separator, in training too.
    context_P = np.concatenate([[tokenizer.separator], ids]).astype(np.int32)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(samples))
    greedy = temperature == 0
    with jax.default_matmul_precision(run.cfg.train.matmul_precision):
        ids_BN, log_probs_BN = _decode(
            _Structure(run.graphdef),
            run.params,
            np.tile(context_P, (samples, 1)),
            keys_B,
            1.0 if greedy else float(temperature),
            1 if greedy else min(top_k, tokenizer.vocab_size),
            float(top_p),
            tokenizer.separator,
            tokens=tokens,
            dtype=jnp.dtype(run.cfg.train.compute_dtype),
        )
    if not np.isfinite(log_probs_BN).all():
        raise FloatingPointError(
            f"The logits at step {run.step} are not finite: the run diverged, or its numbers leave "
            f"the range of config.train.compute_dtype={run.cfg.train.compute_dtype!r}."
        )
    rows = zip(np.asarray(ids_BN), np.asarray(log_probs_BN), strict=True)
    return [Sample(prompt, tokenizer.decode(i), i.tolist(), lp.tolist()) for i, lp in rows]


@dataclasses.dataclass(frozen=True, eq=False)
class _Structure:
    """A graphdef compared by identity: it holds a config and so has no hash, which jit needs."""

    graphdef: nnx.GraphDef

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Structure) and self.graphdef is other.graphdef

    def __hash__(self) -> int:
        return id(self.graphdef)


@functools.partial(jax.jit, static_argnames=("structure", "tokens", "dtype"))
def _decode(
    structure: _Structure,
    params: Any,
    context_BP: jax.Array,
    keys_B: jax.Array,
    temperature: float,
    top_k: int,
    top_p: float,
    separator: int,
    *,
    tokens: int,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """N = `tokens` ids [B, N] that continue contexts of P, and their log-probabilities [B, N]."""
    model = nnx.merge(structure.graphdef, params)
    B, P = context_BP.shape

    def read_and_sample(carry, index):
        cache, next_BT = carry
        x_BTD, cache = model.extend(next_BT, cache, dtype=dtype)
        logits_BV = model.logits(x_BTD[:, -1:])[:, 0]
        now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
        ids_B1 = sample(logits_BV, now_B, temperature, top_k, top_p, separator)[:, None]
        log_probs_B1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), ids_B1, axis=1)
        return (cache, ids_B1), (ids_B1, log_probs_B1)

    # Nothing reads the last token, so it needs no slot.
    cache = model.empty_cache(B, P + tokens - 1, dtype)
    carry, first = read_and_sample((cache, context_BP), 0)
    _, rest = jax.lax.scan(read_and_sample, carry, jnp.arange(1, tokens))
    return jax.tree.map(
        lambda one_B1, rest_NB1: jnp.concatenate([one_B1, rest_NB1[:, :, 0].T], axis=1), first, rest
    )


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    temperature: jax.typing.ArrayLike,
    top_k: jax.typing.ArrayLike,
    top_p: jax.typing.ArrayLike,
    separator: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """One id per row, [B], never the separator; every row has a random key of its own."""
    ids_BV, scores_BV = shortlist(logits_BV, temperature, top_k, top_p, separator)
    places_B = jax.vmap(jax.random.categorical)(keys_B, scores_BV)
    return jnp.take_along_axis(ids_BV, places_B[:, None], axis=1)[:, 0]


def shortlist(
    logits_BV: jax.Array,
    temperature: jax.typing.ArrayLike,
    top_k: jax.typing.ArrayLike,
    top_p: jax.typing.ArrayLike,
    separator: jax.typing.ArrayLike = 0,
) -> tuple[jax.Array, jax.Array]:
    """Ids from most to least likely and their logits / temperature, -inf for those cut, [B, V].

    Args:
        logits_BV: scores of the next token.
        temperature: above 0.
        top_k: the k most likely are kept, of equals those with the lower id; 0: all.
        top_p: of these, the fewest that together have this probability; 1: all.
        separator: id that is never drawn.
    """
    # The separator stands before a document; it is never a target in training either.
    logits_BV = logits_BV.at[:, separator].set(-jnp.inf)
    ids_BV = jnp.argsort(-logits_BV, axis=1, stable=True)
    scores_BV = jnp.take_along_axis(logits_BV, ids_BV, axis=1)
    # The best score becomes 0, so that a tiny temperature gives -inf below it and not inf / inf.
    scores_BV = scores_BV - scores_BV[:, :1]
    scores_BV = scores_BV / jnp.maximum(temperature, jnp.finfo(scores_BV.dtype).tiny)
    rank_1V = jnp.arange(logits_BV.shape[1])[None]
    scores_BV = jnp.where((rank_1V < top_k) | (top_k == 0), scores_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(scores_BV)
    before_BV = jnp.cumsum(probs_BV, axis=1) - probs_BV
    # Rank 0 and top_p 1 are named, for rounding may leave `before` off 0 or at 1.
    keep_BV = (before_BV < top_p) | (rank_1V == 0) | (jnp.asarray(top_p) >= 1)
    return ids_BV, jnp.where(keep_BV, scores_BV, -jnp.inf)


def _fit(prompt_tokens: int, tokens: int | None, seq_len: int) -> int:
    """The number of tokens to generate, if it fits behind the prompt."""
    room = seq_len - prompt_tokens
    if tokens is None:
        tokens = max(1, min(200, room))
    _check(tokens >= 1, f"--tokens={tokens}", "give 1 or more")
    if tokens > room:
        remedy = f"lower --tokens to {room}" if room > 0 else f"shorten --prompt by {tokens - room}"
        raise ArgumentError(
            f"--tokens={tokens}: with the {prompt_tokens} tokens of --prompt that is more than "
            f"config.data.seq_len={seq_len}, the window this model was trained on; {remedy}."
        )
    return tokens


def _check_options(samples: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    _check(samples >= 1, f"--samples={samples}", "give 1 or more")
    _check(0 <= temperature < math.inf, f"--temperature={temperature}", "give 0 or more")
    _check(top_k >= 0, f"--top_k={top_k}", "give 1 or more, or 0 for all tokens")
    _check(0 < top_p <= 1, f"--top_p={top_p}", "give more than 0 and at most 1")
    # JAX drops the higher bits of a seed, so two of them would give the same samples.
    _check(0 <= seed < 2**32, f"--seed={seed}", "give 0 or more and below 2**32")


def _check(ok: bool, flag: str, remedy: str) -> None:
    if not ok:
        raise ArgumentError(f"{flag} is impossible; {remedy}.")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print samples of a run and append them to its `samples.jsonl`."""
    given = flags.FlagValues()
    flags.DEFINE_string("prompt", "", "Opens the document.", given)
    tokens = "Length of a sample. Default: 200, or as many as fit."
    flags.DEFINE_integer("tokens", None, tokens, flag_values=given)
    flags.DEFINE_integer("samples", 1, "Number of samples.", flag_values=given)
    flags.DEFINE_float("temperature", 0.8, "0: the most likely token.", flag_values=given)
    flags.DEFINE_integer("top_k", 0, "Most likely tokens kept; 0: all.", flag_values=given)
    flags.DEFINE_float("top_p", 1.0, "Probability mass kept.", flag_values=given)
    flags.DEFINE_integer("seed", 0, "The same seed gives the same samples.", flag_values=given)
    names = list(given)  # the arguments of `generate`
    flags.DEFINE_string("workdir", None, "Folder of the run.", given)
    parse_flags(given, argv, __doc__, subject=["workdir"])
    workdir = pathlib.Path(given.workdir)
    options: dict[str, Any] = {name: given[name].value for name in names}
    run = open_trained(workdir)
    made = generate(run, **options)
    del options["tokens"]  # each record holds its tokens
    with (workdir / SAMPLES).open("a") as file:
        for one in made:
            record = {"step": run.step, **options, **dataclasses.asdict(one)}
            file.write(json.dumps(record) + "\n")
    for number, one in enumerate(made, start=1):
        if len(made) > 1:
            print(f"--- sample {number} of {len(made)}")
        print(one.prompt + one.text)


if __name__ == "__main__":
    main()
