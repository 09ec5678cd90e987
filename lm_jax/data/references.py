"""What simple predictors reach on a split, kept beside its tokens."""

import json

from lm_jax.data import ngram
from lm_jax.data.store import Store
from lm_jax.data.tokenizers.kinds import WordTokenizer
from lm_jax.files import write_json

# Reference predictors are fitted on and score at most this many tokens: sorting takes seconds, and
# some 140 bytes of memory for each.
_REFERENCE_TOKENS = 20_000_000
_REFERENCE_SCORED = 4_000_000


def references(store: Store, split_name: str) -> dict[str, float]:
    """What simple predictors reach on the same tokens; computed once and kept in the store.

    `uniform`, `unigram`, `kn2` and `kn3` are perplexities per token, fitted on the training split
    (its first 20 million tokens) and of a split of more than 4 million tokens only on the first 4
    million; `entropy_rate`, where the source is known, is in nats per token.
    """
    path = store.path / f"references_{split_name}.json"
    if path.exists():
        return json.loads(path.read_text())
    split, tokenizer = store.split(split_name), store.tokenizer
    # WikiText's convention: the history before the first word is an end of line.
    start = tokenizer.line_end if isinstance(tokenizer, WordTokenizer) else tokenizer.separator
    result = ngram.references(
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
