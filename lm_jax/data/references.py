"""Reference predictors of a split: uniform, unigram and interpolated Kneser-Ney.

They are fitted on the training tokens and scored on the same tokens as the model, so that its
perplexity can be compared with theirs. The tokens are one stream without separators: histories
cross documents, and the history before the first token of either stream is `start`, repeated.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lm_jax import console, together
from lm_jax.data.files import hash_json
from lm_jax.data.store import Store
from lm_jax.data.tokenizers.kinds import WordTokenizer
from lm_jax.files import can_write, read_json, write_json

# Tokens to fit on and to score at most: sorting takes seconds, and 140 bytes of memory for each.
_REFERENCE_TOKENS = 20_000_000
_REFERENCE_SCORED = 4_000_000
# Their names where they are shown.
NAMES = {"kn2": "Kneser-Ney bigram", "kn3": "Kneser-Ney trigram", "entropy_rate": "entropy rate"}


def references(store: Store, split_name: str) -> dict[str, float]:
    """Scores of simple predictors on a split; computed once and kept beside its tokens.

    They are kept with a hash of themselves and of the store's manifest, and computed again where it
    is missing or wrong. A folder that cannot be written to keeps nothing. Of several processes the
    first one does it, and the others wait for it.

    `uniform`, `unigram`, `kn2` and `kn3` are perplexities per token. The predictors are fitted on
    the first 20 million tokens of the training split and scored on the first 4 million of this one.
    `entropy_rate`, where the source is known, is in nats per token.

    Raises:
        ValueError: if the corpus has no such split.
    """
    name = f"references {hash_json([split_name, store.manifest])}"
    return together.first_alone(name, lambda: _references(store, split_name))


def _references(store: Store, split_name: str) -> dict[str, float]:
    path = store.path / f"references_{split_name}.json"
    if (kept := _kept(path, store)) is not None:
        return kept
    split, tokenizer = store.split(split_name), store.tokenizer
    # WikiText's convention: the history before the first word is an end of line.
    start = tokenizer.line_end if isinstance(tokenizer, WordTokenizer) else tokenizer.separator
    with console.phase(f"scoring the references of {split_name}"):
        result = perplexities(
            store.split("train").tokens[:_REFERENCE_TOKENS],
            split.tokens[:_REFERENCE_SCORED],
            vocab_size=tokenizer.vocab_size - 1,
            start=start,
        )
    entropy_rate = store.manifest["entropy_rate"]
    if entropy_rate is not None and tokenizer.kind == "char":  # one token, one symbol
        result["entropy_rate"] = entropy_rate
    if can_write(path.parent):
        write_json(path, {**result, "sha256": hash_json([result, store.manifest])})
    return result


def _kept(path: Path, store: Store) -> dict[str, float] | None:
    """The references in a file, if they are those that were written there for this store."""
    if not path.exists():
        return None
    what = "is not what was written there for its store"
    with contextlib.suppress(ValueError, PermissionError):  # cut, or not from here
        result = read_json(path)
        sha256 = result.pop("sha256", None)
        if sha256 == hash_json([result, store.manifest]):
            return result
        what = what if sha256 else "is of a version that kept no hash"
    console.say(f"{path} {what}: it is computed again")
    return None


def in_nats(by_name: Mapping[str, float]) -> dict[str, float]:
    """The scores of `references` in nats per token, worst first."""
    nats = {k: x if k == "entropy_rate" else math.log(x) for k, x in by_name.items()}
    return dict(sorted(nats.items(), key=lambda item: -item[1]))


def perplexities(
    train_ids: np.ndarray,
    ids: np.ndarray,
    *,
    vocab_size: int,
    start: int,
    orders: Sequence[int] = (2, 3),
) -> dict[str, float]:
    """Perplexities per token of `ids`: uniform, unigram, and kn<order> for each order.

    `vocab_size` counts the types that can occur in the text, separators excluded.

    Raises:
        ValueError: if there are no tokens to fit or to score.
    """
    if not len(train_ids) or not len(ids):
        raise ValueError(
            f"reference perplexities need tokens, but there are {len(train_ids)} to fit and "
            f"{len(ids)} to score: check that neither split is empty."
        )
    nats_by_name = {"unigram": unigram_nats(train_ids, ids, vocab_size=vocab_size)}
    for order in orders:
        nats_by_name[f"kn{order}"] = nats(train_ids, ids, order, vocab_size=vocab_size, start=start)
    by_name = {name: math.exp(nats_N.mean()) for name, nats_N in nats_by_name.items()}
    return {"uniform": float(vocab_size), **by_name}


def unigram_nats(train_ids: np.ndarray, ids: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """-ln of the relative frequency in `train_ids` of each token of `ids`, float64 [len(ids)].

    If any scored token never occurs in training, one is added to the count of every type. Neither
    may be empty.
    """
    counts = np.bincount(train_ids, minlength=int(ids.max()) + 1)
    counts_N = counts[ids]
    if counts_N.min() > 0:
        return -np.log(counts_N / len(train_ids))
    return -np.log((counts_N + 1) / (len(train_ids) + vocab_size))


def nats(
    train_ids: np.ndarray, ids: np.ndarray, order: int, *, vocab_size: int, start: int
) -> np.ndarray:
    r"""-ln p(token | history) under interpolated Kneser-Ney, float64 [len(ids)].

    With h' the history h without its first token, for k = 1 ... order:

        p_k(w|h) = max(c(hw) - D, 0) / c(h.)  +  D t(h.) / c(h.) p_{k-1}(w|h'),   p_0 = 1 / V

    where c counts occurrences at the top order and distinct left neighbours below it, c(h.) is the
    sum of c(hw) over w, t(h.) the number of w with c(hw) > 0, and D = n1 / (n1 + 2 n2) from the
    number of k-grams with count 1 and 2. A history never seen leaves p_k = p_{k-1}. Where no k-gram
    has count 1, which gives no estimate, D = 1/2 keeps unseen tokens possible.

    Takes about 100 bytes of memory for each token of both streams at order 3.
    """
    pad = np.full(order, start, np.int64)
    stream = np.concatenate([pad, train_ids, pad, ids])
    trained = slice(order, order + len(train_ids))
    scored = np.arange(len(stream) - len(ids), len(stream))
    grams = _gram_ids(stream, order)
    # A position of every distinct k-gram.
    distinct = [np.unique(gram[trained], return_index=True)[1] + order for gram in grams]

    size = len(stream)
    probability_N = np.full(len(ids), 1 / vocab_size)
    for k in range(1, order + 1):
        gram, history, last = grams[k], grams[k - 1], distinct[k]
        count = np.bincount(gram[trained if k == order else distinct[k + 1]], minlength=size)
        total = np.bincount(history[last - 1], weights=count[gram[last]], minlength=size)
        types = np.bincount(history[last - 1], minlength=size)
        once, twice = np.count_nonzero(count == 1), np.count_nonzero(count == 2)
        discount = once / (once + 2 * twice) if once else 0.5

        total_N, types_N = total[history[scored - 1]], types[history[scored - 1]]
        kept_N = np.maximum(count[gram[scored]] - discount, 0)
        mixed_N = kept_N + discount * types_N * probability_N
        np.divide(mixed_N, total_N, out=probability_N, where=total_N > 0)
    return -np.log(probability_N)


def _gram_ids(stream: np.ndarray, order: int) -> list[np.ndarray]:
    """For k = 0 ... order, the number of the k-gram that ends at each position; equal iff equal.

    Each k-gram is a pair of two small numbers, its history's and its last token's, so that keys
    never overflow. Positions before k - 1 hold no k-gram; padding keeps them out of the counts.
    """
    grams = [np.zeros(len(stream), np.int64)]
    types, token = np.unique(stream, return_inverse=True)
    for _ in range(order):
        history = np.concatenate([[0], grams[-1][:-1]])
        key = history * len(types) + token
        grams.append(np.unique(key, return_inverse=True)[1])
    return grams
