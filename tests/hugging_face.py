"""Tokenizers and checkpoints in Hugging Face's layout, made here."""

import json

import numpy as np
import safetensors.numpy
import tokenizers

CORPUS = ["low lower lowest new newer newest naïve café 北京\n\n  the end\n"] * 9
V = 37
LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": V,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 16,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def byte_level():
    """In the manner of GPT-2."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return json.loads(made.to_str())


def save_tokenizer(folder, tree, special="<s>", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    c = {"vocab_size": 340, "bos_token_id": None, "eos_token_id": None} | changes
    (folder / "config.json").write_text(json.dumps(c))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": special}))
    return folder


def head_dim(c):
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def llama_shapes(c):
    D, F, L = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    C, H = head_dim(c), c["num_attention_heads"]
    kv = c.get("num_key_value_heads", H) * C
    biased = {"q", "k", "v"} if c["model_type"] == "qwen2" else set()
    biased |= set("qkvo") if c.get("attention_bias") else set()
    biased |= {"gate", "up", "down"} if c.get("mlp_bias") else set()
    yield "model.embed_tokens.weight", (c["vocab_size"], D)
    for i in range(L):
        yield f"model.layers.{i}.input_layernorm.weight", (D,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (D,)
        for part, name, shape in (
            ("self_attn", "q", (H * C, D)),
            ("self_attn", "k", (kv, D)),
            ("self_attn", "v", (kv, D)),
            ("self_attn", "o", (D, H * C)),
            ("mlp", "gate", (F, D)),
            ("mlp", "up", (F, D)),
            ("mlp", "down", (D, F)),
        ):
            yield f"model.layers.{i}.{part}.{name}_proj.weight", shape
            if name in biased:
                yield f"model.layers.{i}.{part}.{name}_proj.bias", shape[:1]
        if c["model_type"] == "qwen3":
            yield f"model.layers.{i}.self_attn.q_norm.weight", (C,)
            yield f"model.layers.{i}.self_attn.k_norm.weight", (C,)
    yield "model.norm.weight", (D,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], D)


def gpt2_shapes(c):
    D, F = c["n_embd"], c.get("n_inner", 4 * c["n_embd"])
    yield "transformer.wte.weight", (c["vocab_size"], D)
    yield "transformer.wpe.weight", (c["n_positions"], D)
    for i in range(c["n_layer"]):
        for name, shape in (
            ("ln_1", (D,)),
            ("attn.c_attn", (D, 3 * D)),
            ("attn.c_proj", (D, D)),
            ("ln_2", (D,)),
            ("mlp.c_fc", (D, F)),
            ("mlp.c_proj", (F, D)),
        ):
            yield f"transformer.h.{i}.{name}.weight", shape
            yield f"transformer.h.{i}.{name}.bias", shape[-1:]
    yield "transformer.ln_f.weight", (D,)
    yield "transformer.ln_f.bias", (D,)
    if not c.get("tie_word_embeddings", True):
        yield "lm_head.weight", (c["vocab_size"], D)


def random_tensors(c, seed=0, dtype=np.float32):
    """Tables are small, so that an epsilon counts; the rest is large enough to matter."""
    rng = np.random.default_rng(seed)
    shapes = gpt2_shapes(c) if c["model_type"] == "gpt2" else llama_shapes(c)
    tensors = {}
    for name, shape in shapes:
        std = 0.05 if "embed" in name or "wte" in name or "wpe" in name else 0.3
        centre = 1.0 if len(shape) == 1 and "bias" not in name else 0.0
        tensors[name] = rng.normal(centre, std, shape).astype(dtype)
    return tensors


def save_checkpoint(folder, c, tensors, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


LONGEST = 48  # tokens of a window of those that `save_pretrained` writes


def save_pretrained(folder):
    """Folders of a Llama and a GPT-2 with a tokenizer that keeps every byte, by name."""
    sizes = {"vocab_size": 320, "max_position_embeddings": LONGEST, "n_positions": LONGEST}
    tree = byte_level()
    tree["pre_tokenizer"]["add_prefix_space"] = False  # transformers would add a space
    ends = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    folders = {"llama": folder / "llama", "gpt2": folder / "gpt2"}
    for fields, path in zip((LLAMA | sizes, GPT2 | sizes), folders.values(), strict=True):
        save_checkpoint(path, fields, random_tensors(fields))
        (path / "tokenizer.json").write_text(json.dumps(tree))
        (path / "tokenizer_config.json").write_text(json.dumps(ends))
    return folders
