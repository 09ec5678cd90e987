"""From corpora to batches: corpora, tokenizers, store, pipeline, and reference perplexities."""
