"""Tasks of EleutherAI's lm-evaluation-harness, on a run or a Hugging Face checkpoint."""
