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
from lm_jax.config import ConfigError
from lm_jax.config.resolve import resolve
from lm_jax.models import huggingface
from lm_jax.models.families import create_model
from tests.helpers import randomise, thirds
from tests.hugging_face import (
    GPT2,
    LLAMA,
    LLAMA3,
    YARN,
    V,
    head_dim,
    random_tensors,
    save_checkpoint,
)

QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 4, "rms_norm_eps": 1e-3}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 5}
WIDE = {"head_dim": 12, "rope_theta": 30.0}  # wavelengths on both sides of every ramp
WINDOWED = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}
VARIANTS = {
    "llama": LLAMA,
    "llama tied": LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama with biases in attention": LLAMA | {"attention_bias": True},
    "llama of one head a group": {
        name: value for name, value in LLAMA.items() if name != "num_key_value_heads"
    },
    "llama with wide heads": LLAMA | {"head_dim": 10},
    "llama as version 5 writes it": {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_scaling": None},
    "linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": LLAMA | WIDE | {"rope_scaling": LLAMA3},
    "llama3 as version 5 writes it": LLAMA
    | {"head_dim": 12, "rope_parameters": LLAMA3 | {"rope_theta": 30.0}},
    "yarn": LLAMA | WIDE | {"rope_scaling": YARN},
    "yarn with scales": LLAMA
    | WIDE
    | {"rope_scaling": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}},
    "yarn with betas": LLAMA
    | WIDE
    | {"rope_scaling": YARN | {"beta_fast": 3.0, "beta_slow": 0.5, "attention_factor": 1.3}},
    "mistral": MISTRAL,
    "mistral without window": MISTRAL | {"sliding_window": None},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen2 with windows": LLAMA | {"model_type": "qwen2"} | WINDOWED,
    "qwen3": QWEN3,
    "qwen2 with windows of no size": LLAMA
    | {"model_type": "qwen2", "max_position_embeddings": 5000}
    | WINDOWED
    | {"sliding_window": None},
    "qwen3 with windows in no layer": QWEN3
    | WINDOWED
    | {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "qwen3 with biases in attention": QWEN3 | {"attention_bias": True},
    "qwen3 with wide heads": QWEN3 | {"head_dim": 10, "attention_bias": True},
    "qwen3 with windows": QWEN3 | WINDOWED | {"layer_types": ["sliding_attention"] * 2},
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


def rotary_angles(c):
    """Angles per position, and the factor on the rotated vectors; one pair after the other."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type")
    theta = rope.get("rope_theta") or c["rope_theta"]
    C, s = head_dim(c), rope.get("factor", 1.0)
    learned = rope.get("original_max_position_embeddings")
    angles = []
    for i in range(C // 2):
        angle = theta ** (-2 * i / C)
        turns = learned and learned * angle / (2 * np.pi)
        if kind == "linear":  # Chen et al. 2023, equation 4
            angle /= s
        if kind == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if turns < low:
                angle /= s
            elif turns <= high:
                share = (turns - low) / (high - low)
                angle = (1 - share) * angle / s + share * angle
        if kind == "yarn":  # Peng et al. 2023, section 3.2: between the pairs that turn so often
            ends = [
                C * np.log(learned / (2 * np.pi * beta)) / (2 * np.log(theta))
                for beta in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
            ]
            if rope.get("truncate", True):
                ends = [np.floor(ends[0]), np.ceil(ends[1])]
            first, last = max(ends[0], 0), min(ends[1], C - 1)
            share = min(max((i - first) / (last - first), 0), 1)
            angle = (1 - share) * angle + share * angle / s
        angles.append(angle)
    factor = 1.0
    if kind == "yarn":
        scales = rope.get("mscale", 1), rope.get("mscale_all_dim", 0)
        up, down = (0.1 * scale * np.log(s) + 1 for scale in scales)
        factor = rope.get("attention_factor", up / down)
    return np.array(angles), factor


def rotated(x, position, angles, factor):
    """Coordinates i and i + C/2 are the parts of a complex number, turned by p theta^(-2i/C)."""
    half = len(x) // 2
    turned = factor * (x[:half] + 1j * x[half:]) * np.exp(1j * position * angles)
    return np.concatenate([turned.real, turned.imag])


def attended(queries, keys, values, window=None):
    """Each query with the keys up to its own place; all of one head, [T, C]."""
    out = []
    for t, query in enumerate(queries):
        seen = slice(max(0, t + 1 - window) if window else 0, t + 1)
        out.append(softmax(keys[seen] @ query / np.sqrt(len(query))) @ values[seen])
    return np.array(out)


def llama_logits(c, w, tokens):
    """Touvron et al. 2023, section 2.2, on one sequence; queries and keys normalised for Qwen3."""
    H, eps = c["num_attention_heads"], c["rms_norm_eps"]
    K = c.get("num_key_value_heads", H)
    C, turn = head_dim(c), rotary_angles(c)
    window = c.get("sliding_window")

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
            q, k = (np.array([rotated(v, p, *turn) for p, v in enumerate(z)]) for z in (q, k))
            values = np.array([head(f"{own}.v_proj", v, g) for v in normed])
            heads.append(attended(q, k, values, window))
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


@pytest.mark.parametrize("variant", thirds(VARIANTS))
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


@pytest.mark.parametrize("variant", thirds(VARIANTS))
def test_logits_of_transformers(tmp_path, variant):
    """Of checkpoints that transformers saves, as it computes them."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    c = VARIANTS[variant]
    options = {name: value for name, value in c.items() if name != "model_type"}
    kind = type(transformers.AutoConfig.for_model(c["model_type"]))
    own = kind(**options, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
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


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
REFUSED = {
    "other type": (LLAMA, {"model_type": "mamba"}, "model_type is 'mamba'.*'llama' or 'mistral'"),
    "no type": (LLAMA, {"model_type": None}, "model_type is None"),
    "scaled rope": (LLAMA, {"rope_scaling": DYNAMIC}, "rope_scaling is .*dynamic.*linear, llama3"),
    "scaled rope of version 5": (LLAMA, {"rope_parameters": DYNAMIC}, "rope_parameters is .*dyna"),
    "scale without factor": (LLAMA, {"rope_scaling": {"type": "linear"}}, "they are factor"),
    "more of a scale": (LLAMA, {"rope_scaling": YARN | {"mscal": 1.0}}, "mscal.*perhaps beta_fast"),
    "scale of 0": (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0; give a n"),
    "scale of no kind": (LLAMA, {"rope_scaling": {"factor": 2}}, "of no kind.*begin with linear"),
    "scale that is a word": (LLAMA, {"rope_scaling": "linear"}, "'linear'; supported is an object"),
    "scale of many kinds": (LLAMA, {"rope_scaling": {"type": ["yarn"]}}, "of no kind"),
    "partial rope of version 5": (
        LLAMA,
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5",
    ),
    "rope by layer": (LLAMA, {"rope_parameters": {"full": {}}}, "rope_parameters is .*full"),
    "partial rope": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "head width": (LLAMA, {"head_dim": 8}, r"o_proj.weight has shape \[24, 24\], .*\[24, 48\]"),
    "Qwen3's own head width": (QWEN3, {"head_dim": None}, r"shape \[4\], .* asks for \[128\]"),
    "odd heads": (LLAMA, {"num_attention_heads": 8}, "an even width, not 3"),
    "heads": (LLAMA, {"num_attention_heads": 5}, "num_attention_heads is 5; .*divisor of hidden"),
    "groups": (LLAMA, {"num_key_value_heads": 4}, "num_key_value_heads is 4; .*divisor"),
    "biases left over": (
        LLAMA | {"attention_bias": True},
        {"attention_bias": False},
        "q_proj|k_proj.bias and 7 more are no part",
    ),
    "other bias": (LLAMA, {"mlp_bias": True}, "mlp_bias is True; .*attention_bias true"),
    "window": (LLAMA, {"sliding_window": 8}, "sliding_window is 8; .*max_position_embeddings, 16"),
    "windows in some layers": (
        QWEN3,
        WINDOWED | {"max_window_layers": 1},
        "max_window_layers is 1; supported is a window in all layers or in none",
    ),
    "windows by layer": (
        QWEN3,
        WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]},
        "layer_types is .*; supported is a window in all layers or in none",
    ),
    "windows of no layers": (QWEN3, WINDOWED | {"layer_types": 2}, "layer_types is 2; supported"),
    "no first window": (QWEN3, WINDOWED | {"max_window_layers": None}, "max_window_layers is None"),
    "activation": (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; .*'silu'"),
    "width": (LLAMA, {"hidden_size": "24"}, "hidden_size is '24'; .*whole number above 0"),
    "depth": (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "depth beyond all": (LLAMA, {"num_hidden_layers": 10**9}, r"layers\.2\.\S+ is missing"),
    "width beyond all": (LLAMA, {"hidden_size": 6 * 10**8}, r"config.json asks for \[\d{9}"),
    "size beyond all": (GPT2, {"n_positions": 1 << 40}, "n_positions is 1099511627776; .* up to"),
    "epsilon beyond all": (LLAMA, {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*above 0"),
    "quantised": (
        LLAMA,
        {"quantization_config": {"quant_method": "gptq"}},
        r"quantization_config says that the weights are quantised \(gptq\); take the checkpoint",
    ),
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
    "layers beyond": (
        GPT2,
        {"n_layer": 3},
        r"tensor h\.2\.\S+ is missing, the nearest of the others are transformer\.h\.1",
    ),
    "layers left over": (
        GPT2,
        {"n_layer": 1},
        "tensor transformer.h.1.attn.c_attn.bias and 11 more are no",
    ),
    "untied without head": (
        GPT2,
        {"tie_word_embeddings": False},
        "lm_head.weight is missing.*; save it with its head, .* set tie_word_embeddings .* to true",
    ),
    "tied with another head": (LLAMA, {"tie_word_embeddings": True}, "lm_head.weight is not the"),
    "rows": (LLAMA, {"vocab_size": 40}, r"embed_tokens.weight has shape \[37, 24\], .*\[40, 24\]"),
}


def test_a_window_of_no_size_is_none(tmp_path):
    """Where positions go beyond the default of a window, which no window here is."""
    c = VARIANTS["qwen2 with windows of no size"]
    model = huggingface.load(save_checkpoint(tmp_path, c, random_tensors(c)))[0]
    assert model.window == 0 and c["max_position_embeddings"] > 4096


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
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {"head_dim": 4, "hidden_act": "swish"},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral"},
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
    refused(r"layers.1.mlp.up_proj.weight has shape \[24, 20\], .* asks for \[20, 24\]")
    save_checkpoint(folder, LLAMA, tensors | {name: tensors[name].astype(np.int8)})
    refused("layers.1.mlp.up_proj.weight is of type I8; save it as float32")
    save_checkpoint(folder, LLAMA, {key: value for key, value in tensors.items() if key != name})
    refused("layers.1.mlp.up_proj.weight is missing")
    save_checkpoint(folder, LLAMA, tensors | {"score.weight": tensors[name]})
    refused("score.weight is no part of the model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pickles of PyTorch, .*run code .*save_pretrained"),
        ("pytorch_model.bin.index.json", "pickles of PyTorch, .*run code .*save_pretrained"),
        ("llama-q4.gguf", "weights of llama.cpp, .* gguf_file"),
        (
            "consolidated.00.pth",
            "pickles of PyTorch in a layout of its maker, .* that its maker publishes",
        ),
        ("flax_model.msgpack", "weights of Flax, .* from_flax"),
        ("tf_model.h5", "weights of TensorFlow, .* from_tf"),
        ("adapter_config.json", "an adapter without its model, .* merge_and_unload"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_weights_in_another_format_are_named(tmp_path, name, message, config):
    (tmp_path / name).touch()
    if config:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert huggingface.is_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}: these are {message}.*\.$"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("outside", ["../a.safetensors", "/etc/a.safetensors", "b/../../a"])
def test_an_index_names_files_of_its_folder(tmp_path, outside):
    """Which may be links, as in the caches of Hugging Face."""
    tensors = random_tensors(LLAMA)
    folder = save_checkpoint(tmp_path / "model", LLAMA, tensors, shards=2)
    whole = huggingface.load(folder)
    for shard in folder.glob("*.safetensors"):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        shard.rename(tmp_path / "blobs" / shard.name)
        shard.symlink_to(tmp_path / "blobs" / shard.name)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder)[-1], whole[-1])
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"]["model.norm.weight"] = outside
    index.write_text(json.dumps(names))
    with pytest.raises(ValueError, match=rf"names '{outside}', which is outside the folder; .*\."):
        huggingface.load(folder)


@pytest.mark.parametrize("c", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_names_with_other_prefixes(tmp_path, c):
    """Of a model inside another module, of one that was compiled, and of one without its head."""
    tensors = random_tensors(c)
    expected = huggingface.load(save_checkpoint(tmp_path / "plain", c, tensors))[-1]
    base = "transformer." if c is GPT2 else "model."
    for before, without in (("module.", ""), ("_orig_mod.", ""), ("model._orig_mod.", base)):
        named = {before + name.removeprefix(without): x for name, x in tensors.items()}
        found = huggingface.load(save_checkpoint(tmp_path / before, c, named))[-1]
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    twice = tensors | {"module." + name: x for name, x in tensors.items()}
    with pytest.raises(ValueError, match=r"tensors \S+ and \S+ are the same parameter"):
        huggingface.load(save_checkpoint(tmp_path / "twice", c, twice))


# --- written -------------------------------------------------------------------------------------


L3 = "llama3:factor=8,low_freq_factor=1,high_freq_factor=4,original_max_position_embeddings=32"
GPT = dict(norm="layernorm", positions="learned", mlp="gelu_tanh", bias=True, kv_heads=6)
WRITTEN = {  # architecture and fields of the model
    "llama": ("llama", dict()),
    "llama, everything": (
        "llama",
        dict(tied=False, bias=True, head_dim=10, rope_scaling=L3, rope_theta=30.0),
    ),
    "biases in attention": ("llama", dict(bias=True, bias_in="attention")),
    "yarn": (
        "llama",
        dict(rope_scaling="yarn:factor=2,original_max_position_embeddings=8,truncate=0"),
    ),
    "qwen3": ("qwen3", dict(qk_norm=True, head_dim=10)),
    "qwen3, everything": (
        "qwen3",
        dict(qk_norm=True, bias=True, bias_in="attention", window=5)
        | dict(rope_scaling="linear:factor=2"),
    ),
    "qwen2": ("qwen2", dict(bias=True, bias_in="qkv", window=5, head_dim=10)),
    "mistral": ("mistral", dict(window=5)),
    "gpt2": ("gpt2", GPT),
    "gpt2 untied": ("gpt2", GPT | dict(tied=False, mlp="gelu", d_ff=40)),
}


def drawn(**changes):
    """A resolved config, the structure and parameters at random, after JAX has drawn none."""
    own = dict(layers=2, d_model=24, heads=6, kv_heads=2) | changes
    given = {f"model__{name}": value for name, value in own.items()}
    cfg = resolve(config.replace(config.Config(), data__seq_len=16, **given), windows=500)
    graphdef, init = create_model(cfg, V, "reference")
    return cfg, graphdef, randomise(jax.eval_shape(init, jax.random.key(0)), 2)


def own_logits(graphdef, params, tokens_BT):
    model = nnx.merge(graphdef, params)
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return np.asarray(model.logits(model(tokens_BT, np.ones_like(tokens_BT), positions_BT)))


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_is_read_back(tmp_path, case):
    kind, changes = WRITTEN[case]
    cfg, _, params = drawn(**changes)
    huggingface.write_model(tmp_path, cfg.model, V, 16, params, {"eos_token_id": 3})
    assert huggingface.architecture(cfg.model) == kind
    c = json.loads((tmp_path / "config.json").read_text())
    assert (c["model_type"], c["eos_token_id"], c["bos_token_id"]) == (kind, 3, None)
    *found, again = huggingface.load(tmp_path)
    assert found == [cfg.model, V, 16]
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("case", thirds(WRITTEN))
def test_transformers_computes_what_is_written(tmp_path, case):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    cfg, graphdef, params = drawn(**WRITTEN[case][1])
    huggingface.write_model(tmp_path, cfg.model, V, 16, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.dtype == torch.float32
    tokens_BT = random_tokens(2)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_BT).long()).logits.numpy()
    assert_close(own_logits(graphdef, params, tokens_BT), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_factorised_table_is_multiplied_out(tmp_path, tied):
    cfg, graphdef, params = drawn(embedding_rank=7, tied=tied)
    huggingface.write_model(tmp_path, cfg.model, V, 16, params)
    tokens_BT = random_tokens(3)
    assert_close(package_logits(tmp_path, tokens_BT), own_logits(graphdef, params, tokens_BT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mlp="relu2"), r"model\.mlp: 'relu2' .* llama, has 'swiglu'"),
        (dict(key_offset=True), r"model\.key_offset: True .* llama, has False"),
        (dict(head_gate=True), r"model\.head_gate: True .* llama, has False"),
        (dict(positions="none"), r"model\.positions: 'none' .* llama, has 'rotary'"),
        (dict(logit_softcap=30.0), r"model\.logit_softcap: 30\.0 .* has 0\.0"),
        (dict(norm="layernorm", bias=True), r"model\.positions: 'rotary' .* gpt2, has 'learned'"),
        (GPT | dict(bias=False), r"model\.bias: False .* gpt2, has True"),
        (GPT | dict(kv_heads=2), r"model\.kv_heads: 2 .* gpt2, has 6"),
        (GPT | dict(head_dim=8), r"model\.head_dim: 8 .* gpt2, has 4"),
        (GPT | dict(window=5), r"model\.window: 5 .* gpt2, has 0"),
        (dict(qk_norm=True, bias=True), r"model\.bias_in: 'all' .* qwen3, has 'attention'"),
        (dict(bias=True, window=5), r"model\.window: 5 .* llama, has 0"),
        (dict(d_model=28, head_dim=4), r"model\.heads: 6 .* llama, has a divisor of d_model=28"),
        (
            dict(family="musota", d_model=128, heads=4, kv_heads=0),
            r"model\.family: 'musota' .* 'dense'",
        ),
    ],
)
def test_what_no_architecture_computes_is_named(changes, message):
    own = dict(layers=2, d_model=24, heads=6, kv_heads=2) | changes
    given = {f"model__{name}": value for name, value in own.items()}
    cfg = resolve(config.replace(config.Config(), **given), windows=500)
    with pytest.raises(ConfigError, match=message):
        huggingface.architecture(cfg.model)
