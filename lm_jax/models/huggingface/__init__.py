"""Checkpoints in the layout of Hugging Face transformers, read and written.

Read are folders of Llama (Touvron et al. 2023), Mistral (Jiang et al. 2023), Qwen2 (Yang et al.
2024), Qwen3 without experts (Yang et al. 2025) and GPT-2 (Radford et al. 2019): config.json, and
the weights in model.safetensors or in the shards that model.safetensors.index.json lists. Nothing
is downloaded. What would compute something else than its model here is refused, both ways.
"""

from lm_jax.models.huggingface.checkpoint import load, write_model
from lm_jax.models.huggingface.reading import is_checkpoint, read_model
from lm_jax.models.huggingface.writing import architecture

__all__ = ["architecture", "is_checkpoint", "load", "read_model", "write_model"]
