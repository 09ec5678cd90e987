"""Checkpoints in Hugging Face's layout, made here and read by the package.

The expected logits come from the papers' equations in NumPy's float64, one head at a time, and,
where it is installed, from transformers itself.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm_jax import config
from lm_jax.config.resolve import resolve
from lm_jax.models import huggingface
from lm_jax.models.families import create_model
from tests.hugging_face import GPT2, LLAMA, V, random_tensors, save_checkpoint

QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 4, "rms_norm_eps": 1e-3}
VARIANTS = {
    "llama": LLAMA,
    "llama tied": LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama of one head a group": {
        name: value for name, value in LLAMA.items() if name != "num_key_value_heads"
    },
    "llama as version 5 writes it": {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_scaling": None},
    "qwen3": QWEN3,
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | {"tie_word_embeddings": False, "n_inner": 40},
    "gpt2 with exact gelu": GPT2 | {"activation_function": "gelu"},
}


# --- the models by their equations ---------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def layer_norm(x, weight, bias, eps):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def rotated(x, position, theta):
    """Coordinates i and i + C/2 are the parts of a complex number, turned by p theta^(-2i/C)."""
    half = len(x) // 2
    turned = x[:half] + 1j * x[half:]
    turned = turned * np.exp(1j * position / theta ** (2 * np.arange(half) / len(x)))
    return np.concatenate([turned.real, turned.imag])


def attended(queries, keys, values):
    """Each query with the keys up to its own place; all of one head, [T, C]."""
    return np.array(
        [
            softmax(keys[: t + 1] @ query / np.sqrt(len(query))) @ values[: t + 1]
            for t, query in enumerate(queries)
        ]
    )


def llama_logits(c, w, tokens):
    """Touvron et al. 2023, section 2.2, on one sequence; queries and keys normalised for Qwen3."""
    H, eps = c["num_attention_heads"], c["rms_norm_eps"]
    K = c.get("num_key_value_heads", H)
    C = c["hidden_size"] // H
    theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def head(name, x, h, norm=None):
        part = linear(name, x)[h * C : (h + 1) * C]
        return rms_norm(part, w[norm], eps) if norm in w else part

    x = [w["model.embed_tokens.weight"][token] for token in tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        own = f"{at}.self_attn"
        normed = [rms_norm(v, w[f"{at}.input_layernorm.weight"], eps) for v in x]
        heads = []
        for h in range(H):
            g = h // (H // K)
            q = [head(f"{own}.q_proj", v, h, f"{own}.q_norm.weight") for v in normed]
            k = [head(f"{own}.k_proj", v, g, f"{own}.k_norm.weight") for v in normed]
            q, k = (np.array([rotated(v, p, theta) for p, v in enumerate(z)]) for z in (q, k))
            heads.append(attended(q, k, np.array([head(f"{own}.v_proj", v, g) for v in normed])))
        joined = np.concatenate(heads, axis=1)
        x = [v + linear(f"{own}.o_proj", y) for v, y in zip(x, joined, strict=True)]
        for t, v in enumerate(x):
            y = rms_norm(v, w[f"{at}.post_attention_layernorm.weight"], eps)
            gate = linear(f"{at}.mlp.gate_proj", y)
            inner = gate / (1 + np.exp(-gate)) * linear(f"{at}.mlp.up_proj", y)
            x[t] = v + linear(f"{at}.mlp.down_proj", inner)
    table = w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return np.array([table @ rms_norm(v, w["model.norm.weight"], eps) for v in x])


def erf(x):
    """Maclaurin's series; arguments here are small."""
    total, term = np.zeros_like(x), x.copy()
    for n in range(60):
        total += term / (2 * n + 1)
        term = -term * x * x / (n + 1)
    return 2 / np.sqrt(np.pi) * total


def gpt2_logits(c, w, tokens):
    """Radford et al. 2019 with the norms before the branches, on one sequence."""
    D, H, eps = c["n_embd"], c["n_head"], c["layer_norm_epsilon"]
    C = D // H

    def linear(name, x):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(name, x):
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def gelu(x):
        if c["activation_function"] == "gelu":
            return x * (1 + erf(x / np.sqrt(2))) / 2
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    w = {name.removeprefix("transformer."): value for name, value in w.items()}
    x = [w["wte.weight"][token] + w["wpe.weight"][p] for p, token in enumerate(tokens)]
    for i in range(c["n_layer"]):
        made = np.array([linear(f"h.{i}.attn.c_attn", norm(f"h.{i}.ln_1", v)) for v in x])
        q, k, v = made[:, :D], made[:, D : 2 * D], made[:, 2 * D :]
        heads = [slice(h * C, (h + 1) * C) for h in range(H)]
        joined = np.concatenate([attended(q[:, h], k[:, h], v[:, h]) for h in heads], axis=1)
        x = [v + linear(f"h.{i}.attn.c_proj", y) for v, y in zip(x, joined, strict=True)]
        for t, v in enumerate(x):
            inner = gelu(linear(f"h.{i}.mlp.c_fc", norm(f"h.{i}.ln_2", v)))
            x[t] = v + linear(f"h.{i}.mlp.c_proj", inner)
    head = w["wte.weight" if c.get("tie_word_embeddings", True) else "lm_head.weight"]
    return np.array([head @ norm("ln_f", v) for v in x])


def expected_logits(c, tensors, tokens_BT):
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    forward = gpt2_logits if c["model_type"] == "gpt2" else llama_logits
    return np.array([forward(c, w, tokens) for tokens in tokens_BT])


# --- the package's model -------------------------------------------------------------------------


def package_logits(folder, tokens_BT):
    """Logits of a loaded checkpoint, through the structure that `step.create_model` makes."""
    model_cfg, vocab_size, max_len, params = huggingface.load(folder)
    cfg = config.replace(config.Config(model=model_cfg), data__seq_len=max_len)
    resolved = resolve(config.replace(cfg, train__steps="200"), windows=50)
    assert resolved.model == model_cfg
    graphdef, init = create_model(cfg, vocab_size, "reference")
    like = jax.eval_shape(init, jax.random.key(0))
    found = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert found == like

    @jax.jit
    def forward(params, tokens_BT):
        model = nnx.merge(graphdef, params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return model.logits(model(tokens_BT, jnp.ones_like(tokens_BT), positions_BT))

    return np.asarray(forward(params, tokens_BT))


def random_tokens(seed=0):
    return np.random.default_rng(seed).integers(0, V, (2, 16)).astype(np.int32)


def assert_close(logits, expected):
    """To the rounding of float32: 32 units in the last place of the largest logit."""
    bound = 32 * np.finfo(np.float32).eps * np.abs(expected).max()
    error = np.abs(logits - expected).max()
    print(f"largest logit {np.abs(expected).max():.2f}, error {error:.1e} of {bound:.1e}")
    assert expected.std() > 0.1
    assert error < bound


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_follow_the_equations(tmp_path, variant):
    c = VARIANTS[variant]
    tensors = random_tensors(c)
    folder = save_checkpoint(tmp_path, c, tensors)
    tokens_BT = random_tokens()
    assert_close(package_logits(folder, tokens_BT), expected_logits(c, tensors, tokens_BT))


@pytest.mark.parametrize("c", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_shards_and_half_precision(tmp_path, c):
    """Weights of fewer bits are the same numbers in float32."""
    for dtype, shards in ((jnp.bfloat16, 1), (np.float16, 1), (np.float32, 3)):
        tensors = random_tensors(c, dtype=np.dtype(dtype))
        folder = save_checkpoint(tmp_path / np.dtype(dtype).name, c, tensors, shards)
        _, _, _, params = huggingface.load(folder)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
        tokens_BT = random_tokens()
        assert_close(package_logits(folder, tokens_BT), expected_logits(c, tensors, tokens_BT))


def test_what_old_checkpoints_hold_beside_parameters(tmp_path):
    """GPT-2 as first published: no prefix, masks stored, the head as a copy of the table."""
    tensors = random_tensors(GPT2)
    tokens_BT = random_tokens()
    expected = expected_logits(GPT2, tensors, tokens_BT)
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    for i in range(2):
        old[f"h.{i}.attn.bias"] = np.ones((1, 1, 16, 16), np.uint8)
        old[f"h.{i}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    old["lm_head.weight"] = old["wte.weight"]
    assert_close(package_logits(save_checkpoint(tmp_path / "gpt2", GPT2, old), tokens_BT), expected)

    tensors = random_tensors(LLAMA)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    expected = expected_logits(LLAMA, tensors, tokens_BT)
    assert_close(
        package_logits(save_checkpoint(tmp_path / "llama", LLAMA, tensors), tokens_BT), expected
    )


def library_config(transformers, c):
    kinds = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "gpt2": "GPT2Config"}
    options = {name: value for name, value in c.items() if name != "model_type"}
    made = getattr(transformers, kinds[c["model_type"]])
    return made(**options, bos_token_id=1, eos_token_id=2, attn_implementation="eager")


@pytest.mark.parametrize("variant", ["llama", "llama tied", "qwen3", "gpt2"])
def test_logits_of_transformers(tmp_path, variant):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    c = VARIANTS[variant]
    own = library_config(transformers, c)
    model = transformers.AutoModelForCausalLM.from_config(own).eval()
    tensors = {name: torch.from_numpy(value) for name, value in random_tensors(c, 1).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = c.get("tie_word_embeddings", True)
    assert not unexpected and missing == (["lm_head.weight"] if tied else [])
    model.save_pretrained(tmp_path)
    tokens_BT = random_tokens(1)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_BT).long(), use_cache=False).logits.numpy()
    assert_close(package_logits(tmp_path, tokens_BT), expected)


# --- what is refused -----------------------------------------------------------------------------


LINEAR = {"rope_type": "linear", "factor": 2.0}
REFUSED = {
    "other type": (LLAMA, {"model_type": "mamba"}, "model_type is 'mamba'.*'llama' or 'qwen3'"),
    "no type": (LLAMA, {"model_type": None}, "model_type is None"),
    "scaled rope": (LLAMA, {"rope_scaling": LINEAR}, "rope_scaling is .*linear.*null"),
    "scaled rope of version 5": (LLAMA, {"rope_parameters": LINEAR}, "rope_parameters is .*linear"),
    "rope by layer": (LLAMA, {"rope_parameters": {"full": {}}}, "rope_parameters is .*full"),
    "partial rope": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "head width": (LLAMA, {"head_dim": 8}, "head_dim is 8; .*num_attention_heads, 4"),
    "Qwen3's own head width": (QWEN3, {"head_dim": None}, "head_dim is None; .*, 4"),
    "odd heads": (LLAMA, {"num_attention_heads": 8, "num_key_value_heads": 8}, "even width"),
    "heads": (LLAMA, {"num_attention_heads": 5}, "num_attention_heads is 5; .*divisor of hidden"),
    "groups": (LLAMA, {"num_key_value_heads": 4}, "num_key_value_heads is 4; .*divisor"),
    "one bias": (LLAMA, {"attention_bias": True}, "mlp_bias is None; .*attention_bias, True"),
    "other bias": (LLAMA, {"mlp_bias": True}, "mlp_bias is True; .*attention_bias, False"),
    "window": (LLAMA, {"sliding_window": 8}, "sliding_window is 8; .*max_position_embeddings, 16"),
    "Qwen3's window": (
        QWEN3,
        {"sliding_window": 15, "use_sliding_window": True},
        "sliding_window is 15",
    ),
    "activation": (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; .*'silu'"),
    "width": (LLAMA, {"hidden_size": "24"}, "hidden_size is '24'; .*whole number above 0"),
    "depth": (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "no epsilon": (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps is None; .*above 0"),
    "theta": (LLAMA, {"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    "tied is no number": (LLAMA, {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    "activation of GPT-2": (GPT2, {"activation_function": "relu"}, "activation_function is 'relu'"),
    "scale": (GPT2, {"scale_attn_weights": False}, "scale_attn_weights is False"),
    "scale by layer": (
        GPT2,
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx is True",
    ),
    "cross-attention": (GPT2, {"add_cross_attention": True}, "add_cross_attention is True"),
    "layers beyond": (GPT2, {"n_layer": 3}, "tensor h.2.ln_1.weight is missing"),
    "layers left over": (GPT2, {"n_layer": 1}, "tensor h.1.attn.c_attn.bias and 11 more are no"),
    "untied without head": (GPT2, {"tie_word_embeddings": False}, "lm_head.weight is missing"),
    "tied with another head": (LLAMA, {"tie_word_embeddings": True}, "lm_head.weight is not the"),
    "rows": (LLAMA, {"vocab_size": 40}, r"embed_tokens.weight has shape \[37, 24\]; .*\[40, 24\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_model_is_refused(tmp_path, case):
    c, changes, message = REFUSED[case]
    folder = save_checkpoint(tmp_path, c, random_tensors(c))
    (folder / "config.json").write_text(json.dumps(c | changes))
    with pytest.raises(ValueError, match=message) as caught:
        huggingface.load(folder)
    assert str(folder) in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 16},
        {"sliding_window": None},
        {"sliding_window": 4, "use_sliding_window": False},
        {"rope_scaling": {"type": "default"}},
        {"head_dim": 4, "hidden_act": "swish"},
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_taken(tmp_path, changes):
    tensors = random_tensors(LLAMA)
    plain = huggingface.load(save_checkpoint(tmp_path / "plain", LLAMA, tensors))[:3]
    assert (
        huggingface.load(save_checkpoint(tmp_path / "other", LLAMA | changes, tensors))[:3] == plain
    )


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, LLAMA, random_tensors(LLAMA))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="needs the package safetensors: pip install"):
        huggingface.load(tmp_path)


def test_damaged_files_are_named(tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            huggingface.load(folder)

    folder = tmp_path / "model"
    refused("config.json is missing")
    tensors = random_tensors(LLAMA)
    save_checkpoint(folder, LLAMA, tensors, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused("00002.safetensors cannot be read")
    shard.unlink()
    refused("00002.safetensors, which model.safetensors.index.json names, is missing")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused("weight_map does not name")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused("index.json holds no JSON object")
    (folder / "model.safetensors.index.json").unlink()
    refused("holds neither model.safetensors nor model.safetensors.index.json")
    (folder / "config.json").write_text("{")
    refused("config.json is no JSON")

    name = "model.layers.1.mlp.up_proj.weight"
    save_checkpoint(folder, LLAMA, tensors | {name: tensors[name].T.copy()})
    refused(r"layers.1.mlp.up_proj.weight has shape \[24, 20\]; config.json asks for \[20, 24\]")
    save_checkpoint(folder, LLAMA, tensors | {name: tensors[name].astype(np.int8)})
    refused("layers.1.mlp.up_proj.weight is of type I8; save it as float32")
    save_checkpoint(folder, LLAMA, {key: value for key, value in tensors.items() if key != name})
    refused("layers.1.mlp.up_proj.weight is missing")
    save_checkpoint(folder, LLAMA, tensors | {"score.weight": tensors[name]})
    refused("score.weight is no part of the model")
