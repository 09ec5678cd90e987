"""Public models and losses of PyTorch, as a user has them: healthy ones silent, leaks seen."""

import types
from typing import Any

import numpy as np
import pytest

from lm_jax import doctor

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)  # of models as small as these more threads only wait for each other
V, T = 47, 12


class NanoGPT(torch.nn.Module):
    """A decoder in the style of nanoGPT: a mask as a float buffer, (logits, loss), tied tables."""

    def __init__(self, masked=True, dropout=0.1, every_position=False):
        super().__init__()
        self.every_position = every_position
        self.wte, self.wpe = torch.nn.Embedding(V, 32), torch.nn.Embedding(T, 32)
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(32) for _ in range(3)])
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
        self.drop = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(32, V, bias=False)
        self.head.weight = self.wte.weight
        mask = torch.ones(T, T).tril() if masked else torch.ones(T, T)
        self.register_buffer("bias", mask[None, None])
        self.register_buffer("masked_bias", torch.tensor(-1e4))
        self.register_buffer("calls", torch.zeros(1))
        for p in self.parameters():
            torch.nn.init.normal_(p, std=0.1) if p.ndim > 1 else None

    def forward(self, idx, targets=None):
        B, size = idx.shape
        self.calls += 1
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(size, device=idx.device)))
        q, k, v = (
            y.view(B, size, 4, 8).transpose(1, 2) for y in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        scores = q @ k.transpose(2, 3) / 8**0.5
        scores = scores.masked_fill(self.bias[:, :, :size, :size] == 0, float(self.masked_bias))
        y = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(B, size, 32)
        x = x + self.drop(self.out(y))
        x = x + self.drop(self.down(torch.nn.functional.gelu(self.up(self.norms[1](x)))))
        x = self.norms[2](x)
        if targets is not None:
            logits = self.head(x)
            return logits, torch.nn.functional.cross_entropy(logits.view(-1, V), targets.view(-1))
        return self.head(x if self.every_position else x[:, [-1]]), None


def nano(**how):
    torch.manual_seed(0)
    return NanoGPT(**how)


def examine(module, **more):
    return doctor.examine_model(doctor.torch_model(module), vocab_size=V, seq_len=T, **more)


def silent(report):
    notable = [f for f in report if f.status not in ("pass", "skip")]
    assert not notable, [(f.check, f.evidence) for f in notable]
    return report


def hugging_face(kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    tiny = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)
    if kind == "GPT2":
        cfg = transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        return transformers.GPT2LMHeadModel(cfg)
    if kind == "Bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**tiny, **heads))
    if kind == "Mamba":
        cfg = transformers.MambaConfig(**tiny, state_size=8)
    elif kind == "Rwkv":
        cfg = transformers.RwkvConfig(**tiny, attention_hidden_size=32, context_length=64)
    else:
        cfg = getattr(transformers, f"{kind}Config")(**tiny, **heads, num_key_value_heads=2)
    return getattr(transformers, f"{kind}ForCausalLM")(cfg)


CAUSAL = ("GPT2", "Llama", "Qwen3", "Mamba", "Rwkv")


@pytest.mark.parametrize("kind", CAUSAL)
def test_public_models_are_silent(kind):
    report = silent(examine(hugging_face(kind)))
    passed = ["suffix_swap", "id_zero", "truncation", "row_independence", "randomised"]
    assert {report[f"model.{name}"].status for name in passed} == {"pass"}
    assert report["model.dropout"].status == ("pass" if kind == "GPT2" else "skip")


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_mean_over_the_future_is_seen_in_public_models(kind):
    module = hugging_face(kind)
    body = next(m for m in module.modules() if isinstance(m, torch.nn.ModuleList))

    def leak(layer, args, out):
        x = out[0] if isinstance(out, tuple) else out
        x = x + 0.1 * x.mean(1, keepdim=True)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    body[0].register_forward_hook(leak)
    assert {"model.suffix_swap", "model.truncation"} <= set(examine(module).failed)


def test_a_bidirectional_model_is_silent_where_declared():
    module = hugging_face("Bert")
    report = silent(examine(module, objective="bidirectional"))
    assert report["model.suffix_swap"].status == "skip"
    assert report["model.row_independence"].status == "pass"
    assert "model.suffix_swap" in examine(module).failed


@pytest.mark.parametrize("every_position", [False, True])
def test_nanogpt(every_position):
    module = nano(every_position=every_position)
    tables = dict(token_table=module.wte.weight, position_table=module.wpe.weight, tied=True)
    report = silent(examine(module, **tables))
    assert "float32" in report["model.output"].evidence
    passed = ["suffix_swap", "randomised", "dropout", "tied_table", "position_scale"]
    assert {report[f"model.{name}"].status for name in passed} == {"pass"}
    assert "model.suffix_swap" in examine(nano(masked=False)).failed


def test_a_module_is_left_as_it_was():
    module = nano()
    module.norms[1].eval()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    modes, random = [m.training for m in module.modules()], torch.random.get_rng_state()
    examine(module)
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in module.parameters())


def test_parameters_of_the_function():
    module = nano()
    fn = doctor.torch_model(module)
    assert "head.weight" not in fn.params and "bias" in fn.params  # tied once; a mask
    assert "masked_bias" not in fn.params
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    logits = fn(fn.params, tokens)
    module.eval()
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        expected = module(ids, ids)[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    noise = {name: np.zeros(x.shape, np.float32) for name, x in fn.params.items()}
    assert (fn(noise, tokens) == 0).all()  # NumPy arrays in place of tensors
    assert not np.array_equal(*(fn.train_fn(fn.params, tokens, i) for i in (0, 1)))
    assert doctor.torch_model(nano(dropout=0.0)).train_fn is None


class Returns(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.table = how, torch.nn.Embedding(V, V)

    def forward(self, ids):
        return self.how(self.table(ids))


@pytest.mark.parametrize(
    "how",
    [
        lambda z: (torch.tensor(0.0), z),
        lambda z: [None, z],
        lambda z: types.SimpleNamespace(logits=z),
        lambda z: {"loss": None, "logits": z},
        lambda z: {"x": z},
        lambda z: (z.flatten(0, 1), None),
        lambda z: z.bfloat16(),
        lambda z: z.double(),
    ],
)
def test_forms_of_output(how):
    module = Returns(how)
    fn = doctor.torch_model(module)
    logits = fn(fn.params, np.array([[1, 2, 3]], np.int32))
    expected = module.table.weight.detach()[[1, 2, 3]][None].numpy()
    assert logits.shape == (1, 3, V) and logits.dtype in (np.float32, np.float64)
    np.testing.assert_allclose(logits, expected, atol=0.02)


@pytest.mark.parametrize("how, said", [(lambda z: z[:, -1:], "last position"), (tuple, "logits")])
def test_what_cannot_be_used_is_said(how, said):
    report = examine(Returns(how))
    assert report.failed == ["model.output"] and said in report["model.output"].evidence


class Asks(torch.nn.Module):
    """Has a forward pass that asks for more than ids."""

    def __init__(self, how):
        super().__init__()
        self.inner = nano(every_position=True)
        if how == "labels":
            self.forward = lambda ids, labels=None: self.logits(ids, labels is not None)
        if how == "y":
            self.forward = lambda ids, y: self.logits(ids, y.shape == ids.shape)
        if how == "attention_mask":
            self.forward = lambda ids, attention_mask: self.logits(ids, attention_mask.all())

    def logits(self, ids, every):
        z = self.inner(ids)[0]
        return z if every else z[:, [-1]]


@pytest.mark.parametrize("how", ["labels", "y", "attention_mask"])
def test_targets_and_masks_are_given_where_asked_for(how):
    silent(examine(Asks(how)))


def test_dropout_behind_a_head_of_zeros():
    module = nano(every_position=True)
    module.head.weight = torch.nn.Parameter(torch.zeros(V, 32))
    assert silent(examine(module))["model.dropout"].status == "pass"


class Normed(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.inner, self.norm = nano(every_position=True, dropout=0.0), norm

    def forward(self, ids):
        x = self.inner.wte(ids)
        x = torch.cumsum(self.norm(x.transpose(1, 2)).transpose(1, 2), 1)
        return self.inner.head(x) * 0.1


@pytest.mark.fault(16, "model.suffix_swap")
def test_a_batch_norm_over_time_is_seen_in_evaluation():
    module = Normed(torch.nn.BatchNorm1d(32)).eval()
    assert {"model.suffix_swap", "model.row_independence"} <= set(examine(module).failed)
    assert (module.norm.running_mean == 0).all() and not module.norm.training
    silent(examine(Normed(torch.nn.Identity())))


def test_a_module_itself_is_referred_to_its_function():
    report = doctor.examine_model(nano(), vocab_size=V, seq_len=T)
    assert report.failed == ["model.output"] and report["model.output"].status == "error"
    assert "torch_model" in report["model.output"].remedy


def test_low_precision_is_known_from_the_parameters():
    module = nano(every_position=True).bfloat16()
    report = silent(examine(module))
    assert "bfloat16" in report["model.output"].evidence


def cross_entropy(logits, tokens, weights):
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    w = weights[:, 1:].flatten().to(nats.dtype)
    return (nats * w).sum(), w.sum()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_loss_and_its_gradient(dtype):
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 5, V)).astype(jnp.dtype(dtype))
    tokens = rng.integers(0, V, (2, 5)).astype(np.int32)
    weights = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32)
    loss = doctor.torch_loss(cross_entropy)
    total, count = loss(logits, tokens, weights)
    z = logits.astype(np.float64)[:, :-1]
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
    assert count == 6 and total == pytest.approx((nats * weights[:, 1:]).sum(), rel=0.02)
    one_hot = np.eye(V)[tokens[:, 1:]]
    expected = (np.exp(log_p) - one_hot) * weights[:, 1:, None]
    gradient = loss.gradient(logits, tokens, weights)
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    np.testing.assert_allclose(gradient[:, :-1].astype(np.float64), expected, atol=0.01)
    assert (gradient[:, -1] == 0).all()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda total, count: total, "loss_fn returned a Tensor, not (sum, count)"),
        (lambda total, count: {"loss": total}, "loss_fn returned a dict, not (sum, count)"),
        (lambda total, count: (total.detach(), count), "the sum has no gradient"),
    ],
)
def test_what_a_loss_should_not_return_is_said(change, said):
    loss = doctor.torch_loss(lambda *tensors: change(*cross_entropy(*tensors)))
    report = doctor.examine_loss(loss, vocab_size=V, seq_len=T)
    assert any(said in finding.evidence for finding in report if finding.status == "error")
    assert not report.clean
