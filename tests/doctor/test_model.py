import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm_jax.doctor.model import examine_model
from lm_jax.doctor.model.causality import probe_cuts
from lm_jax.models.families import create_model
from tests.doctor import leaks
from tests.helpers import thirds, tiny_config

V = 61


@functools.cache
def jitted(kind, chunk=16):
    return jax.jit(leaks.forward(kind, chunk))


@functools.cache
def packed(fault):
    return jax.jit(leaks.packed(fault))


@functools.cache
def grouped(**how):
    return jax.jit(leaks.grouped(**how))


def examine(kind="correct", T=48, chunk=16, seed=0, **kwargs):
    params = leaks.init(kind, V, seed)
    kwargs = dict(params=params, vocab_size=V, seq_len=T, seed=seed) | kwargs
    return examine_model(jitted(kind, chunk), **kwargs)


def silent(report):
    """No failure, no warning; a skip says why."""
    assert not report.failed, [report[name].evidence for name in report.failed]
    assert not report.warned, [report[name].evidence for name in report.warned]
    assert all(f.evidence and (f.status == "pass" or not f.remedy) for f in report)
    return report


def fault(*rows):
    """Parameters of a test, each with the mark of the fault that it plants."""
    return [
        pytest.param(check, value, marks=pytest.mark.fault(number, check), id=str(value))
        for number, check, value in rows
    ]


# --- causality ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_healthy_twins_are_silent(seed):
    for kind in leaks.HEALTHY:
        report = silent(examine(kind, seed=seed))
        assert report["model.suffix_swap"].status == "pass"
        assert report["model.randomised"].status == "pass"


@pytest.mark.parametrize(
    "check, kind", fault(*((row, check, kind) for kind, (row, check) in leaks.LEAKS.items()))
)
def test_every_leak_is_seen(check, kind):
    report = examine(kind, chunk=12)
    assert check in report.failed
    assert {"difference", "least_change"} & set(report[check].values)
    assert report[check].remedy
    assert report["model.loss"].status == "pass"


@pytest.mark.parametrize("T, chunk", [(37, 5), (100, 24)])
def test_leaks_inside_chunks_of_any_length(T, chunk):
    report = examine("chunk_mean", T=T, chunk=chunk)
    assert "model.suffix_swap" in report.failed


@pytest.mark.parametrize("kind", sorted(set(leaks.LEAKS) - {"gated"}))
def test_every_leak_is_seen_without_parameters(kind):
    params = leaks.init(kind, V)
    f = jitted(kind, 12)
    report = examine_model(lambda t: np.asarray(f(params, t)), vocab_size=V, seq_len=48)
    assert leaks.LEAKS[kind][1] in report.failed + report.warned
    assert report.failed
    assert report["model.randomised"].status == "skip"


def test_cuts_lie_inside_chunks_of_every_length():
    for T in (5, 32, 48, 100, 257):
        assert probe_cuts(T, T, 0) == list(range(1, T))
        cuts = probe_cuts(T, 3, 0)
        assert {1, 3, T - 1} <= set(cuts) and max(cuts) < T
        for chunk in range(2, T):
            assert any(cut % chunk for cut in cuts)
    cuts = probe_cuts(4096, 200, 0)
    assert any(set(range(k, k + 200)) <= set(cuts) for k in range(1, 4096))
    assert len(cuts) < 240


@jax.jit
def border(params, tokens):
    """Where a chunk ends, and nowhere else, the next token is seen."""
    T = tokens.shape[1]
    logits = leaks.forward("correct")(params, tokens)
    ahead = 0.1 * params["embedding"][jnp.roll(tokens, -1, 1)] @ params["head"]
    ends = jnp.arange(T) % params["chunk"] == params["chunk"] - 1
    ends = ends.at[-1].set(False)
    return logits + jnp.where(ends[None, :, None], ahead, 0)


@pytest.mark.parametrize("chunk, T", [(12, 64), (20, 64), (24, 64), (48, 64), (16, 33), (7, 33)])
def test_a_leak_across_the_borders_of_chunks(chunk, T):
    for seed in range(2):
        params = leaks.init("correct", V, seed) | {"chunk": jnp.int32(chunk)}
        report = examine_model(border, params=params, vocab_size=V, seq_len=T, seed=seed)
        assert "model.suffix_swap" in report.failed


def test_rows_that_mix_in_larger_batches_only():
    apply = leaks.forward("correct")

    def mixed(params, tokens):
        logits = apply(params, tokens)
        return logits + 0.1 * logits[:1] if len(tokens) > 3 else logits

    params = leaks.init("correct", V)
    report = examine_model(jax.jit(mixed), params=params, vocab_size=V, seq_len=33)
    assert "model.row_independence" in report.failed
    assert "more rows" in report["model.row_independence"].evidence


def test_weak_leak_and_position_of_it():
    apply = leaks.forward("correct")

    def weak(params, tokens):  # position 20 sees a ten-thousandth of token 45
        logits = apply(params, tokens)
        return logits.at[:, 20].add(1e-4 * params["embedding"][tokens[:, 45]] @ params["head"])

    report = examine_model(jax.jit(weak), params=leaks.init("correct", V), vocab_size=V, seq_len=48)
    assert report["model.suffix_swap"].values["position"] == 20
    assert report["model.suffix_swap"].status == "fail"


@pytest.mark.fault(14, "model.suffix_swap")
def test_off_by_one_is_named_as_distance_one():
    report = examine("off_by_one")
    assert report["model.suffix_swap"].values["distances"] == "1 to 1"


@pytest.mark.parametrize("objective", ["bidirectional", "masked"])
def test_declared_objective_skips_the_causal_checks(objective):
    report = silent(examine("bidirectional", objective=objective))
    for name in ("suffix_swap", "truncation"):
        assert report[f"model.{name}"].status == "skip"
        assert objective in report[f"model.{name}"].evidence
    assert report["model.row_independence"].status == "pass"
    assert "model.row_independence" in examine("row_zero", objective=objective).failed


@pytest.mark.slow
def test_low_precision_is_silent_and_still_sees_leaks():
    def low(kind):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), leaks.init(kind, V))
        return examine_model(jitted(kind, 12), params=params, vocab_size=V, seq_len=48)

    report = silent(low("correct"))
    assert "bfloat16" in report["model.output"].evidence
    for kind in ("reshape", "row_zero"):
        assert leaks.LEAKS[kind][1] in low(kind).failed


def test_no_pass_where_rounding_hides_everything():
    report = silent(examine(compute_dtype="float8_e5m2", segmented=packed("")))
    for name in ("truncation", "segment_restart"):
        assert report[f"model.{name}"].status == "skip"
        assert "rounding alone may move every logit" in report[f"model.{name}"].evidence
    # Calls of one shape are compared all the same.
    assert report["model.suffix_swap"].status == "pass"


@pytest.mark.parametrize(
    "check, name",
    fault(
        (24, "model.segment_isolation", "across"),
        (24, "model.segment_restart", "no_restart"),
        (20, "model.padding_mask", "replaces"),
        (25, "model.masked_rows", "nan_forward"),
        (25, "model.masked_rows", "nan_backward"),
    ),
)
def test_packed_rows(check, name):
    fn, params = jitted("correct"), leaks.init("correct", V)

    def report_of(name):
        kwargs = dict(params=params, vocab_size=V, seq_len=48, segmented=packed(name))
        return examine_model(fn, **kwargs)

    assert check in report_of(name).failed
    assert silent(report_of(""))[check].status == "pass"


@pytest.mark.parametrize(
    "check, change",
    fault(
        (19, "model.reference", dict(block=12, clamped=True)),
        (27, "model.reference", dict(order="tile")),
    ),
)
def test_second_implementation(check, change):
    kwargs = dict(params=leaks.init("correct", V), vocab_size=V, seq_len=20, reference=grouped())
    assert check in examine_model(grouped(**change), **kwargs).failed
    healthy = examine_model(grouped(block=12), **kwargs)
    assert silent(healthy)[check].status == "pass"


@pytest.mark.parametrize(
    "check, name",
    fault((28, "model.attention_softmax", "dropped"), (28, "model.attention_softmax", "twice")),
)
def test_attention_probabilities(check, name):
    assert check in examine(attention=leaks.attention_maps(name)).failed
    assert silent(examine(attention=leaks.attention_maps()))[check].status == "pass"


@pytest.mark.fault(28, "model.probabilities")
def test_probabilities_in_place_of_logits():
    f, params = jitted("correct"), leaks.init("correct", V)
    report = examine_model(
        lambda p, t: jax.nn.softmax(f(p, t)), params=params, vocab_size=V, seq_len=48
    )
    assert report.failed == ["model.probabilities"]


# --- target ------------------------------------------------------------------------------------


@functools.cache
def trained_on_chain(shift):
    """A model trained on a noisy chain with labels `shift` ahead, and rows of the chain."""
    rng = np.random.default_rng(0)
    follow = rng.permutation(V)

    def rows(n):
        tokens = rng.integers(0, V, (n, 32), dtype=np.int32)
        for t in range(1, 32):
            tokens[:, t] = np.where(rng.random(n) < 0.8, follow[tokens[:, t - 1]], tokens[:, t])
        return tokens

    init_fn, step_fn, _ = leaks.trainer("correct", V, shift=shift, rate=1e-2)
    state = init_fn(0)
    for _ in range(120):
        state, _ = step_fn(state, rows(16))
    return state[0], rows(40)


@pytest.mark.parametrize(
    "check, shift", fault((1, "model.offset_scan", 0), (2, "model.offset_scan", 2))
)
def test_offset_of_the_labels(check, shift):
    params, sample = trained_on_chain(shift)
    kwargs = dict(vocab_size=V, seq_len=32, trained=True)
    report = examine_model(jitted("correct"), params=params, sample=sample, **kwargs)
    assert report[check].status == "fail" and report[check].values["best"] == shift
    params, sample = trained_on_chain(1)
    report = silent(examine_model(jitted("correct"), params=params, sample=sample, **kwargs))
    assert report[check].status == "pass"
    # Without text, or with text of another kind, it does not pass.
    report = examine_model(jitted("correct"), params=params, **kwargs)
    assert report[check].status == "skip"
    other = np.random.default_rng(1).integers(0, V, (40, 32))
    report = examine_model(jitted("correct"), params=params, sample=other, **kwargs)
    assert report[check].status in ("warn", "fail")


@pytest.mark.fault(17, "model.suffix_swap")
def test_a_trained_leak_shows_on_random_tokens():
    init_fn, step_fn, _ = leaks.trainer("pair", V, rate=1e-2)
    state, rng = init_fn(0), np.random.default_rng(0)
    for _ in range(60):
        state, _ = step_fn(state, rng.integers(0, V, (16, 48), dtype=np.int32))
    report = examine("pair", params=state[0], trained=True)
    assert "model.suffix_swap" in report.failed


# --- init --------------------------------------------------------------------------------------


@pytest.mark.fault(59, "model.identical_leaves")
@pytest.mark.parametrize("stacked", [False, True])
def test_layers_of_one_seed(stacked):
    def report_of(same):
        keys = [0, 0, 0] if same else [0, 1, 2]
        layers = [np.asarray(jax.random.normal(jax.random.key(k), (8, 8))) for k in keys]
        blocks = np.stack(layers) if stacked else layers
        ones = [np.ones(8, np.float32), np.ones(8, np.float32)]  # norms are alike everywhere
        params = {"blocks": blocks, "norms": ones, **leaks.init("correct", V)}
        return examine("correct", params=params)

    assert report_of(True).failed == ["model.identical_leaves"]
    assert "blocks" in report_of(True)["model.identical_leaves"].evidence
    silent(report_of(False))


@pytest.mark.fault(60, "model.position_scale")
def test_positions_drown_tokens():
    def report_of(amplitude):
        params = leaks.init("correct", V)
        angles = np.arange(leaks.LENGTHS)[:, None] / 50 ** (np.arange(leaks.D) / leaks.D)
        params["positions"] = jnp.asarray(amplitude * np.sin(angles), jnp.float32)
        tables = dict(token_table=params["embedding"], position_table=params["positions"])
        return examine("correct", params=params, **tables)

    finding = report_of(5.0)["model.position_scale"]
    assert finding.status == "fail" and finding.values["share"] < 0.01
    assert report_of(2.0)["model.position_scale"].status == "warn"
    assert silent(report_of(0.2))["model.position_scale"].status == "pass"


@pytest.mark.fault(60, "model.loss")
@pytest.mark.parametrize("seed", range(3))
def test_first_loss_far_above_chance(seed):
    params = leaks.init("correct", V, seed)
    for factor in (0.02, 1.0, 1.4):  # half the logit variance up to 1
        silent(examine("correct", params={**params, "head": factor * params["head"]}))
    report = examine("correct", params={**params, "head": 5 * params["head"]})
    assert "model.loss" in report.failed


@pytest.mark.fault(61, "model.loss")
def test_tied_table_of_unit_scale():
    params = leaks.init("tied", V)
    params["embedding"] = params["embedding"] * 10  # std 1
    assert "model.loss" in examine("tied", params=params).failed


@pytest.mark.parametrize(
    "check, way", fault((61, "model.identical_leaves", "copied"), (61, "model.tied_table", "apart"))
)
def test_table_tied_in_name_only(check, way):
    params = leaks.init("correct", V)
    if way == "copied":  # at the start
        params["head"] = params["embedding"].T * 1.0
    report = examine(params=params, token_table=params["embedding"], tied=True)
    assert {check, "model.tied_table"} <= set(report.failed)
    params = leaks.init("tied", V)
    silent(examine("tied", params=params, token_table=params["embedding"], tied=True))
    # One array under two names is one parameter, as in a state dict of another framework.
    twice = params | {"again": params["embedding"]}
    assert examine("tied", params=twice)["model.identical_leaves"].status == "pass"


@pytest.mark.fault(59, "model.declared_std")
def test_declared_standard_deviation():
    declared = {"embedding": 0.2, "positions": 0.1, "query": leaks.D**-0.5}
    silent(examine(init_std=declared))
    report = examine(init_std={"embedding": 0.02})
    assert report.failed == ["model.declared_std"]
    assert "embedding has" in report["model.declared_std"].evidence
    assert examine(init_std={"no such": 1.0}).failed == ["model.declared_std"]


# --- dropout -----------------------------------------------------------------------------------


def dropped(how):
    """Forward pass of an update with dropout on the logits."""
    f, calls = jitted("correct"), iter(range(10**6))

    def train(params, tokens, step):
        logits = f(params, tokens)
        key = jax.random.fold_in(jax.random.key(0), step)
        if how == "off":
            return logits
        if how == "same_key":
            key = jax.random.key(0)
        if how == "clock":
            key = jax.random.key(next(calls))
        shape = (1, *logits.shape[1:]) if how == "same_rows" else logits.shape
        return jnp.where(jax.random.bernoulli(key, 0.9, shape), logits / 0.9, 0)

    return train


@pytest.mark.parametrize(
    "check, how",
    fault(
        (57, "model.dropout", "same_key"),
        (57, "model.dropout", "same_rows"),
        (57, "model.dropout", "clock"),
        (58, "model.dropout", "off"),
    ),
)
def test_dropout(check, how):
    assert check in examine(train_fn=dropped(how)).failed
    assert silent(examine(train_fn=dropped("right")))[check].status == "pass"


# --- real models -------------------------------------------------------------------------------

FAMILIES = {
    "llama_scanned": dict(model__scan_layers=True),
    "gpt2_bfloat16": dict(
        model__norm="layernorm", model__positions="learned", model__mlp="gelu", model__bias=True
    ),
    "grouped_untied": dict(model__kv_heads=2, model__qk_norm=True, model__tied=False),
    "grouped_bfloat16": dict(model__kv_heads=1, model__init="normal"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", thirds(FAMILIES))
def test_transformers_of_the_package_are_silent(family):
    T = 40
    cfg = tiny_config(data__seq_len=T, **FAMILIES[family])
    dtype = jnp.dtype("bfloat16" if "bfloat16" in family else "float32")
    graphdef, init = create_model(cfg, V, "reference")
    params = jax.jit(init)(jax.random.key(1))

    @jax.jit
    def segmented(params, tokens, ids):
        index = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        positions = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, ids, positions, dtype=dtype))

    def fn(params, tokens):
        return segmented(params, tokens, jnp.ones(tokens.shape, jnp.int32))

    tables = dict(token_table=params["embedding"], position_table=params.get("position_embedding"))
    kwargs = dict(vocab_size=V, seq_len=T, tied=cfg.model.tied, init_std={"embedding": 0.02})
    report = silent(examine_model(fn, params=params, segmented=segmented, **tables, **kwargs))
    checked = ["suffix_swap", "truncation", "segment_isolation", "segment_restart", "masked_rows"]
    assert {report[f"model.{name}"].status for name in checked} == {"pass"}
    assert str(dtype) in report["model.output"].evidence


def torch_model(torch, causal, dtype):
    """A small model written for PyTorch, as a function of numpy arrays."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    embed, place = torch.nn.Embedding(V, 32), torch.nn.Embedding(64, 32)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    head = torch.nn.Linear(32, V)
    modules = torch.nn.ModuleList([embed, place, layer, head]).eval().to(dtype)
    assert modules is not None

    @torch.no_grad()
    def fn(tokens):
        T = tokens.shape[1]
        x = embed(torch.from_numpy(tokens)) + place(torch.arange(T))[None]
        mask = torch.full((T, T), -torch.inf, dtype=dtype).triu(1) if causal else None
        return head(layer(x, src_mask=mask)).float().numpy()

    return fn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_model(dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    kwargs = dict(vocab_size=V, seq_len=33)
    report = silent(examine_model(torch_model(torch, True, getattr(torch, dtype)), **kwargs))
    assert report["model.suffix_swap"].values["difference"] == 0
    report = examine_model(torch_model(torch, False, getattr(torch, dtype)), **kwargs)
    assert {"model.suffix_swap", "model.truncation"} <= set(report.failed)


def test_pytorch_parameters_are_randomised():
    """A mean over time behind a gate of zero, with the parameters of PyTorch itself."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.nn.Parameter(0.3 * torch.randn(*shape, generator=generator))

    params = {"E": leaf(V, 16), "A": leaf(16, 16), "W": leaf(16, V), "g": leaf(1).detach() * 0}

    def fn(params, tokens):
        x = params["E"][torch.from_numpy(tokens).long()]
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]
        return (x + past @ params["A"] + params["g"] * x.mean(1, keepdim=True)) @ params["W"]

    report = examine_model(fn, params=params, vocab_size=V, seq_len=33)
    assert report["model.randomised"].status == "pass"
    assert "model.suffix_swap" in report.failed
    half = {name: x.to(torch.bfloat16) for name, x in params.items()}
    report = examine_model(fn, params=half, vocab_size=V, seq_len=33)
    assert report["model.output"].status == "pass"
    assert "model.suffix_swap" in report.failed


def test_parameters_that_hold_nothing_are_said():
    apply, real = jitted("correct"), leaks.init("correct", V)

    def report_of(params):
        fn = lambda params, tokens: apply(real, tokens)  # noqa: E731
        return examine_model(fn, params=params, vocab_size=V, seq_len=48)

    assert report_of({})["model.randomised"].status == "skip"
    for opaque in ({"a": object()}, real.copy):
        with pytest.raises(ValueError, match="params=.*give a tree of arrays"):
            report_of(opaque)


def test_hugging_face_model():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    cfg = transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(cfg).eval()
    params = {k: v.detach().numpy() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def fn(params, tokens):
        model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in params.items()})
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()

    tables = dict(
        token_table=params["transformer.wte.weight"],
        position_table=params["transformer.wpe.weight"],
    )
    params = {k: np.array(v) for k, v in params.items() if k != "lm_head.weight"}

    def tied(params, tokens):
        return fn(params | {"lm_head.weight": params["transformer.wte.weight"]}, tokens)

    kwargs = dict(vocab_size=V, seq_len=33, init_std={"transformer.wte.weight": 0.02})
    report = silent(examine_model(tied, params=params, tied=True, **tables, **kwargs))
    assert report["model.tied_table"].status == "pass"


# --- bad input ---------------------------------------------------------------------------------


def raises(tokens):
    raise RuntimeError("no such table")


@pytest.mark.parametrize(
    "fn, reason",
    [
        (raises, "RuntimeError: no such table"),
        (lambda t: np.full((*t.shape, V), np.nan), "non-finite"),
        (lambda t: np.zeros(t.shape), "shape"),
        (lambda t: np.zeros((*t.shape, V + 1)), "expected [3, 48, 61]"),
        (lambda t: np.zeros((*t.shape, V), np.int32), "int32"),
        (lambda t: None, "returned None, not an array"),
        (lambda t, extra: t, "TypeError"),
    ],
)
def test_unfit_functions_fail_once_and_skip_the_rest(fn, reason):
    report = examine_model(fn, vocab_size=V, seq_len=48)
    assert report.failed == ["model.output"] and reason in report["model.output"].evidence
    rest = [f for f in report if f.check != "model.output"]
    assert rest and {f.status for f in rest} == {"skip"}
    assert all(f.evidence == "Waits for model.output, which failed." for f in rest)
    assert report["model.output"].status == "error"


def test_functions_that_take_one_length_or_one_batch_size():
    f, params = jitted("correct"), leaks.init("correct", V)

    def fixed(tokens):
        assert tokens.shape == (3, 48), "compiled for [3, 48]"
        return f(params, tokens)

    report = silent(examine_model(fixed, vocab_size=V, seq_len=48, compute_dtype="float32"))
    assert "compiled for" in report["model.truncation"].evidence
    assert report["model.truncation"].status == "skip"
    assert "batch of one was refused" in report["model.row_independence"].evidence


def test_noise_that_the_function_does_not_bear():
    f = jitted("correct")

    def logs(params, tokens):
        return f(params, tokens) + 0 * jnp.log(params["scale"]).sum()

    params = leaks.init("correct", V) | {"scale": jnp.ones(4)}
    report = silent(examine_model(logs, params=params, vocab_size=V, seq_len=48))
    assert report["model.randomised"].status == "skip"
    assert "non-finite" in report["model.randomised"].evidence


def test_input_that_is_written_to():
    f, params = jitted("correct"), leaks.init("correct", V)

    def rude(tokens):
        out = np.asarray(f(params, tokens))
        tokens[:] = 0
        return out

    silent(examine_model(rude, vocab_size=V, seq_len=48, compute_dtype="float32"))


@pytest.mark.parametrize(
    "change",
    [
        dict(vocab_size=1),
        dict(vocab_size=2.5),
        dict(seq_len=2),
        dict(batch_size=1),
        dict(objective="left"),
        dict(segmented=3),
        dict(compute_dtype="int32"),
    ],
)
def test_impossible_arguments(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        examine(**change)
    with pytest.raises(ValueError, match="fn=3"):
        examine_model(3, vocab_size=V, seq_len=48)


def test_report_is_json():
    assert '"model.suffix_swap"' in examine("bidirectional").to_json()
