"""Scores of simple predictors on a split, kept beside its tokens."""

import json

from lm_jax.data import ngram
from lm_jax.data.store import Store
from lm_jax.data.tokenizers.kinds import WordTokenizer
from lm_jax.files import write_json

# Tokens to fit on and to score at most: sorting takes seconds, and 140 bytes of memory for each.
_REFERENCE_TOKENS = 20_000_000
_REFERENCE_SCORED = 4_000_000


def references(store: Store, split_name: str) -> dict[str, float]:
    """Scores of simple predictors on a split; computed once and kept in the store.

    `uniform`, `unigram`, `kn2` and `kn3` are perplexities per token. The predictors are fitted on
    the first 20 million tokens of the training split and scored on the first 4 million of this one.
    `entropy_rate`, where the source is known, is in nats per token.

    Raises:
        ValueError: if the corpus has no such split.
    """
    path = store.path / f"references_{split_name}.json"
    if path.exists():
        return json.loads(path.read_text())
    split, tokenizer = store.split(split_name), store.tokenizer
    # WikiText's convention: the history before the first word is an end of line.
    start = tokenizer.line_end if isinstance(tokenizer, WordTokenizer) else tokenizer.separator
    result = ngram.perplexities(
        store.split("train").tokens[:_REFERENCE_TOKENS],
        split.tokens[:_REFERENCE_SCORED],
        vocab_size=tokenizer.vocab_size - 1,
        start=start,
    )
    entropy_rate = store.manifest["entropy_rate"]
    if entropy_rate is not None and tokenizer.kind == "char":  # one token, one symbol
        result["entropy_rate"] = entropy_rate
    write_json(path, result)
    return result
