"""From files to batches: files, shards, corpora, tokenizers, parts, store, pipeline; n-grams."""
