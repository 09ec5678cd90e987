"""From files to batches: files, shards, corpora, tokenizers, parts, store, windows; references."""
