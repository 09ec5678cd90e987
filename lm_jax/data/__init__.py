"""From files to batches: shards, corpora, tokenizers, parts, store, pipeline; and n-grams."""
