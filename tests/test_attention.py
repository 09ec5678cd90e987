"""One suite for all implementations of attention; what is special to one comes after it."""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lm_jax.kernels import attention as module
from lm_jax.kernels import blockwise as blocks
from lm_jax.kernels import dropout, measured, mosaic
from lm_jax.kernels.attention import attend, choose
from lm_jax.kernels.blockwise import blockwise
from tests.attention_suite import (
    CASES,
    Case,
    attention,
    check_exact,
    check_rounded,
    errors,
    expectation,
    inputs,
    oracle,
    run,
)
from tests.helpers import LONG, thirds

IMPLEMENTATIONS = ("reference", "xla", "cudnn", "blockwise", "pallas")
WITH_LSE = ("reference", "blockwise", "pallas")
SHORT = ("two blocks + 1", "segments and padding", "all at once", "scores of 1e4")
# Without blocks these sizes are like the others.
EDGES = ("block - 1", "block", "two blocks - 1", "two blocks", "two blocks + 1", "window 64")
WHOLE = [name for name in CASES if name not in (*EDGES, "segments at blocks")]
ROUNDED = SHORT + ("one position", "not causal", "window 1")


@pytest.fixture
def ready(request, monkeypatch, capfd):
    """The implementation of the test, made to run here where that is possible."""
    impl = request.param
    monkeypatch.setattr(blocks, "largest_block", lambda heads: 64)
    if impl == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cudnn needs a GPU")
    if impl == "pallas":
        interpret = jax.default_backend() == "cpu"
        reason = mosaic.unavailable(jnp.bfloat16, 64, interpret=interpret)
        if reason:
            pytest.skip(f"pallas: {reason}")
        from lm_jax.kernels import flash

        monkeypatch.setattr(
            module, "unavailable", functools.partial(mosaic.unavailable, interpret=interpret)
        )
        monkeypatch.setattr(flash, "flash", functools.partial(flash.flash, interpret=interpret))
        if interpret:
            from tests.races import forbidden

            with forbidden(monkeypatch, capfd):
                yield impl
            return
    yield impl


def every(*names):
    return pytest.mark.parametrize("ready", names or IMPLEMENTATIONS, indirect=True)


def dtype_of(impl):
    return "bfloat16" if impl in ("cudnn", "pallas") else "float32"


def sized(impl, case):
    """The same case with fewer rows and heads for pallas, whose interpreter is slow."""
    return dataclasses.replace(case, B=1, H=2, K=1) if impl == "pallas" else case


@pytest.mark.parametrize(
    ("ready", "name"),
    thirds([*(("reference", name) for name in WHOLE), *(("blockwise", name) for name in CASES)]),
    indirect=["ready"],
)
def test_float64(ready, name):
    case = CASES[name]
    with jax.enable_x64(True):
        arrays = inputs(case, np.float64)
        check_exact(case, run(attention(ready, case), arrays, quick=True), oracle(case, arrays))


def held_to_the_rule(impl, name, dtype, quick=False):
    case = sized(impl, CASES[name])
    with_lse = impl in WITH_LSE
    half = dtype == "float16" and jax.default_backend() == "cpu"
    if not with_lse and (case.softcap or case.rate or half):
        refusal = f"attention.impl {impl} (has no|cannot compute in float16).*use reference or"
        with pytest.raises(ValueError, match=refusal):
            jax.eval_shape(attention(impl, case, with_lse), *list(inputs(case, dtype).values())[:3])
        return
    arrays, truth, plain = expectation(case, dtype, with_lse, quick)
    results = run(attention(impl, case, with_lse), arrays, with_lse, quick)
    check_rounded(case, results, plain, truth)


@every("xla")
@pytest.mark.parametrize("name", thirds(WHOLE))
def test_xla(ready, name):
    held_to_the_rule(ready, name, "float32", quick=True)


@every("blockwise")
@pytest.mark.parametrize("name", thirds(ROUNDED))
def test_float32(ready, name):
    held_to_the_rule(ready, name, "float32")


@every("xla", "cudnn", "blockwise")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=LONG)])
@pytest.mark.parametrize("name", SHORT[1:])
def test_16_bits(ready, name, dtype):
    if dtype == "float16" and jax.default_backend() == "cpu" and jax.__version_info__ < (0, 12):
        pytest.skip("this jax sums float16 products in float16 on a cpu")
    held_to_the_rule(ready, name, dtype)


@every("pallas")
@pytest.mark.parametrize("name", thirds([*SHORT[1:], "one position"]))
@pytest.mark.slow
def test_pallas(ready, name):
    held_to_the_rule(ready, name, "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SHORT)
def test_the_plain_one_rounds_a_few_times(name, dtype):
    """What the others are measured against is itself as good as its dtype."""
    case = CASES[name]
    _, truth, plain = expectation(case, dtype, True)
    sharpness = case.magnitude**2 if dtype == "float32" else case.magnitude
    for array, (_, most) in errors(case, plain, truth).items():
        assert most < 8 * sharpness * float(jnp.finfo(dtype).eps), array


@every()
def test_padding_may_hold_anything(ready):
    case = sized(ready, Case(66, H=4, K=2, starts=(20,), padded=20))
    with_lse = ready in WITH_LSE
    arrays = inputs(case, jnp.dtype(dtype_of(ready)))
    clean = run(attention(ready, case, with_lse), arrays, with_lse)
    for name, garbage in (("q", np.nan), ("k", np.inf), ("v", np.nan), ("dout", np.nan)):
        arrays[name] = arrays[name].copy()
        arrays[name][:, case.T - case.padded :] = garbage
    dirty = run(attention(ready, case, with_lse), arrays, with_lse)
    for name in clean:
        assert np.abs(np.nan_to_num(np.float32(clean[name]), neginf=0)).max() > 0.1
        np.testing.assert_array_equal(clean[name], dirty[name], err_msg=name)


@every()
def test_rows_of_padding_only(ready):
    case = Case(40, C=64, padded=40)
    with_lse = ready in WITH_LSE
    results = run(attention(ready, case, with_lse), inputs(case, dtype_of(ready)), with_lse)
    for name, value in results.items():
        np.testing.assert_array_equal(np.float32(value), -np.inf if name == "lse" else 0, name)


@every()
def test_runs_give_the_same_bits(ready):
    case = sized(ready, Case(66, H=4, K=2, rate=0.3 if ready in WITH_LSE else 0.0))
    arrays = inputs(case, jnp.dtype(dtype_of(ready)))
    f = jax.jit(
        jax.grad(
            lambda q, k, v: (attention(ready, case, False)(q, k, v) * arrays["dout"]).sum(),
            (0, 1, 2),
        )
    )
    first = jax.device_get(f(arrays["q"], arrays["k"], arrays["v"]))
    for _ in range(3):
        again = jax.device_get(f(arrays["q"], arrays["k"], arrays["v"]))
        for a, b in zip(first, again, strict=True):
            assert a.tobytes() == b.tobytes() and np.isfinite(np.float32(a)).all()


def gradient_and_arguments(impl):
    case = Case(70, B=1, H=2, K=1, C=64, starts=(30,))
    arrays = inputs(case, jnp.dtype(dtype_of(impl)))
    f = attention(impl, case, False)

    def gradient(q, k, v, dout, wrap=lambda f: f):
        def loss(q, k, v):
            return (wrap(f)(q, k, v) * dout).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    return gradient, [arrays[name] for name in ("q", "k", "v", "dout")]


def assert_close(impl, actual, expected):
    tolerance = 20 * float(jnp.finfo(dtype_of(impl)).eps)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)


@every()
def test_vmap(ready):
    gradient, arguments = gradient_and_arguments(ready)
    two = [np.stack([x, 0.5 * x]).astype(x.dtype) for x in arguments]
    mapped = jax.jit(jax.vmap(gradient))(*two)
    compiled = jax.jit(gradient)
    for i in range(2):
        assert_close(ready, [x[i] for x in mapped], compiled(*[x[i] for x in two]))


@every()
def test_remat_and_no_jit(ready):
    if ready == "pallas" and jax.default_backend() == "cpu":
        pytest.skip("pallas: checkpoint refuses the effects of the interpreter")
    gradient, arguments = gradient_and_arguments(ready)
    again = jax.jit(functools.partial(gradient, wrap=jax.checkpoint))(*arguments)
    assert_close(ready, again, gradient(*arguments))


@every("reference", "blockwise")
def test_central_differences(ready, monkeypatch):
    """Forward and backward agree, also on what dropout drops."""
    monkeypatch.setattr(blocks, "largest_block", lambda heads: 8)
    case = Case(19, B=1, H=4, K=2, C=3, starts=(7,), padded=2, window=6, softcap=1.5, rate=0.3)
    with jax.enable_x64(True):
        arrays = inputs(case, np.float64)
        f = attention(ready, case)
        real = case.segment_ids()[..., None] > 0

        def total(q, k, v):
            out, lse = f(q, k, v)
            return (out * arrays["dout"]).sum() + jnp.where(real, lse * arrays["dlse"], 0).sum()

        primals = tuple(arrays[name] for name in ("q", "k", "v"))
        check_grads(jax.jit(total), primals, order=1, modes=["rev"], atol=1e-7, rtol=1e-7, eps=1e-6)


def test_a_step_too_small_for_float32_is_no_evidence():
    """Differences of 1e-6 in float32 condemn a right gradient; those above are in float64."""
    case = Case(9, B=1)
    arrays = inputs(case, np.float32)
    f = attention("reference", case, False)

    def along(step):
        """The derivative of the summed output by a factor on the queries."""
        totals = [
            float(f(arrays["q"] * (1 + e), arrays["k"], arrays["v"]).sum()) for e in (step, -step)
        ]
        return (totals[0] - totals[1]) / (2 * step)

    gradient = jax.grad(lambda q: f(q, arrays["k"], arrays["v"]).sum())(arrays["q"])
    exact = float((gradient * arrays["q"]).sum())
    errors = {step: abs(along(step) / exact - 1) for step in (1e-6, 1e-2)}
    assert errors[1e-6] > 0.01 > 10 * errors[1e-2], errors


def test_tiling_changes_nothing(monkeypatch):
    """The same function whatever the block, dropout included; blocks that do not divide T too."""
    case = CASES["all at once"]
    with jax.enable_x64(True):
        arrays = inputs(case, np.float64)
        ids = jnp.asarray(case.segment_ids())
        words = dropout.head_words(dropout.Draw(jax.random.key(0)), case.B, case.H)
        options = dict(causal=True, window=50, softcap=2.0, scale=0.3, dropout_rate=0.1)

        def of_size(size):
            monkeypatch.setattr(blocks, "largest_block", lambda heads: size)
            return run(
                lambda q, k, v: blockwise(q, k, v, ids, words, **options), arrays, quick=True
            )

        one, *others = (of_size(size) for size in (129, 50, 17))
        assert (one["out"] != 0).mean() > 0.9
        for other in others:
            for name in one:
                np.testing.assert_allclose(other[name], one[name], rtol=0, atol=1e-12)


def test_rows_without_keys(monkeypatch):
    """Handed padding itself, blockwise gives 0, -inf and no gradient, and nothing leaks."""
    case = CASES["segments and padding"]
    ids = case.segment_ids()
    ids[:, 10:20] = 0
    arrays = inputs(case, np.float32)
    monkeypatch.setattr(blocks, "largest_block", lambda heads: 32)
    options = dict(causal=True, window=None, softcap=0.0, scale=0.2, dropout_rate=0.0)
    results = run(lambda q, k, v: blockwise(q, k, v, jnp.asarray(ids), None, **options), arrays)
    for name, value in results.items():
        np.testing.assert_array_equal(value[ids == 0], -np.inf if name == "lse" else 0, name)
        assert np.isfinite(value[ids > 0]).all() and np.abs(value[ids > 0]).min() > 0


def temporary_bytes(impl, backward):
    """What XLA sets aside for T 4096, beside arguments and results."""
    shape = jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.float32)
    f = functools.partial(attend, impl=impl)
    if backward:
        f = jax.grad(lambda q, k, v: attend(q, k, v, impl=impl).sum(), (0, 1, 2))
    return jax.jit(f).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True])
def test_blockwise_memory(backward):
    assert temporary_bytes("blockwise", backward) < temporary_bytes("xla", backward) / 8


def test_work_outside_the_mask_is_skipped(monkeypatch):
    """Blocks are of 4, and 4 positions seen: 2 of 33 blocks. NaN times a masked 0 is NaN."""
    T, options = 4 * 33, dict(causal=True, window=4, softcap=0.0, scale=1.0, dropout_rate=0.0)
    x = jnp.ones((1, T, 1, 2))
    monkeypatch.setattr(blocks, "largest_block", lambda heads: 4)

    @jax.jit
    def out_and_gradients(v, dout):
        f = functools.partial(blockwise, segment_ids_BT=None, words_2BH=None, **options)
        out, pullback = jax.vjp(lambda *qkv: f(*qkv)[0], x, x, v)
        return out, *pullback(dout)

    def spoilt(array):
        return np.flatnonzero(np.isnan(array).reshape(33, -1).any(1)).tolist()

    for i in (0, 1, 16, 32):
        hole = x.at[0, 4 * i + 1].set(jnp.nan)
        after, before = [i, i + 1][: 33 - i], [i - 1, i][i == 0 :]
        out, *_ = out_and_gradients(hole, x)
        assert spoilt(out) == after
        _, dq, dk, dv = out_and_gradients(x, hole)
        assert spoilt(dq) == [i] and spoilt(dk) == spoilt(dv) == before


def test_on_a_gpu_the_compiler_knows_the_length_of_every_loop():
    """A loop of unknown length is a `while`, and one of known length a `scan`."""
    shape = jax.ShapeDtypeStruct((1, 1000, 2, 64), jnp.bfloat16)
    found = {}
    for target in (gpu("NVIDIA H200"), types.SimpleNamespace(platform="cpu")):

        def total(q, k, v):
            return attend(q, k, v, impl="blockwise", window=300).astype(jnp.float32).sum()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks.device, "target", lambda target=target: target)
            traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(shape, shape, shape)
        found[target.platform] = set(re.findall(r"= (scan|while)\[", str(traced.jaxpr)))
    assert found == {"gpu": {"scan"}, "cpu": {"scan", "while"}}


@pytest.mark.parametrize("name", ["not causal", "segments and padding", "window 65", "all at once"])
def test_the_loops_for_a_gpu_compute_the_same(name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(blocks, "largest_block", lambda heads: 64)
    monkeypatch.setattr(blocks.device, "target", lambda: gpu("NVIDIA H200"))
    with jax.enable_x64(True):
        arrays = inputs(case, np.float64)
        check_exact(
            case, run(attention("blockwise", case), arrays, quick=True), oracle(case, arrays)
        )


SHARDED = """
import functools, jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lm_jax.kernels.attention import attend
from lm_jax.kernels.dropout import Draw

mesh = Mesh(jax.devices(), ("x",))
draw = Draw(jax.random.key(0))

def loss(q, k, v, ids):
    out = attend(q, k, v, segment_ids_BT=ids, impl="blockwise", dropout_rate=0.1, draw=draw)
    return jnp.square(out).sum((1, 2, 3))

def gradient(q, k, v, ids):
    out, pullback = jax.vjp(functools.partial(loss, ids=ids), q, k, v)
    return pullback(jnp.ones_like(out))

for arrays, rows in (((None, None, "x"), ()), (("x",), ("x",))):
    arrays, rows = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (arrays, rows))
    shape = jax.ShapeDtypeStruct((4, 300, 4, 16), jnp.float32, sharding=arrays)
    ids = jax.ShapeDtypeStruct((4, 300), jnp.int32, sharding=rows)
    text = jax.jit(gradient, out_shardings=arrays).lower(shape, shape, shape, ids).compile()
    text = text.as_text()
    assert "while" in text
    for word in ("all-gather", "all-to-all", "collective-permute"):
        assert word not in text, (arrays, word)
"""


def test_split_over_devices_nothing_is_gathered():
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
    }
    root = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", SHARDED], env=env, cwd=root, check=True, timeout=300)


# What the suite must catch. Each of these is wrong in one way.


def tiled_groups(q, k, v):
    k, v = (jnp.tile(x, (1, 1, q.shape[2] // x.shape[2], 1)) for x in (k, v))
    return attend(q, k, v, impl="reference", return_lse=True)


def window_off_by_one(q, k, v):
    return attend(q, k, v, impl="reference", window=q.shape[1] - 5, return_lse=True)


def no_mask(q, k, v):
    return attend(q, k, v, impl="reference", causal=False, return_lse=True)


def padding_keys_enter(q, k, v):
    T = q.shape[1]
    q, k, v = (jnp.pad(x, [(0, 0), (0, 3), (0, 0), (0, 0)]) for x in (q, k, v))
    out, lse = attend(q, k, v, impl="reference", causal=False, return_lse=True)
    return out[:, :T], lse[:, :T]


def last_block_of_keys_left_out(q, k, v):
    """Right for up to 32 positions, which is all that a test of toy size tries."""
    whole = max(32, q.shape[1] // 32 * 32)
    ids = (jnp.arange(q.shape[1]) < whole).astype(jnp.int32)[None].repeat(len(q), 0)
    return attend(q, k, v, impl="reference", segment_ids_BT=ids, return_lse=True)


def lse_without_gradient(q, k, v):
    out, lse = attend(q, k, v, impl="reference", return_lse=True)
    return out, jax.lax.stop_gradient(lse)


def scale_forgotten_in_backward(q, k, v):
    half = q / 2 + jax.lax.stop_gradient(q / 2)
    return attend(half, k, v, impl="reference", return_lse=True)


@jax.custom_vjp
def part_of_a_gradient_unwritten(q, k, v):
    return attend(q, k, v, impl="reference", return_lse=True)


def _pullback(residuals, cotangents):
    dq, dk, dv = jax.vjp(functools.partial(attend, impl="reference", return_lse=True), *residuals)[
        1
    ](cotangents)
    return dq, dk.at[:, -1].set(0.25), dv


part_of_a_gradient_unwritten.defvjp(
    lambda *args: (part_of_a_gradient_unwritten(*args), args), _pullback
)

PLANTED = {
    last_block_of_keys_left_out: Case(33),
    tiled_groups: Case(33, H=4, K=2),
    window_off_by_one: Case(33, window=27),
    no_mask: Case(33),
    padding_keys_enter: Case(33, causal=False),
    lse_without_gradient: Case(33),
    scale_forgotten_in_backward: Case(33),
    part_of_a_gradient_unwritten: Case(33),
}


@pytest.mark.parametrize("wrong", PLANTED, ids=lambda f: f.__name__)
def test_planted_faults_are_seen(wrong):
    case = PLANTED[wrong]
    arrays, truth, plain = expectation(case, "float32", True)
    check_rounded(case, plain, plain, truth)
    with pytest.raises(AssertionError, match="is off by|Arrays are not equal"):
        check_rounded(case, run(wrong, arrays), plain, truth)


def test_toy_sizes_see_less():
    """Why the suite goes around the sizes of blocks."""
    case = Case(8)
    arrays, truth, plain = expectation(case, "float32", True)
    check_rounded(case, run(last_block_of_keys_left_out, arrays), plain, truth)


@pytest.mark.parametrize("garbage", ["the mean of all values", "NaN of a softmax of nothing"])
def test_garbage_in_padding_is_seen(garbage):
    case = Case(33, padded=4)
    arrays, truth, plain = expectation(case, "float32", True)
    wrong = plain | {"out": plain["out"].copy()}
    mean = arrays["v"].mean(1, keepdims=True)
    wrong["out"][:, -4:] = np.nan if "NaN" in garbage else mean
    with pytest.raises(AssertionError, match="out in padding"):
        check_rounded(case, wrong, plain, truth)


# Refusals and choice.


@pytest.mark.parametrize(
    ("impl", "changes", "match"),
    [
        ("flash", {}, "attention.impl flash does not exist; use reference or blockwise"),
        ("xla", {"return_lse": True}, "xla has no log-sum-exp that can be differentiated; use"),
        ("xla", {"softcap": 2.0}, "xla has no softcap; use reference or blockwise"),
        ("xla", {"dropout_rate": 0.1}, "xla has no dropout; .* or set attention_dropout to 0"),
        ("blockwise", {"window": 0}, "A window of 0 sees nothing; choose at least 1"),
        ("blockwise", {"softcap": -1.0}, "softcap of -1.0 turns scores around; give 0 for none"),
        ("reference", {"dropout_rate": 1.0}, r"rate of 1.0 is not in \[0, 1\); give a share"),
        ("reference", {"dropout_rate": -0.1}, r"rate of -0.1 is not in \[0, 1\); give a share"),
    ],
)
def test_refusals_name_the_remedy(impl, changes, match):
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match=match):
        attend(x, x, x, impl=impl, draw=dropout.Draw(jax.random.key(0)), **changes)


def test_more_refusals(monkeypatch):
    x = jnp.ones((1, 5, 4, 8))
    for q, k, v, match in (
        (
            x,
            x[:, :, :3],
            x[:, :, :3],
            "4 query heads are no multiple of 3 key/value heads",
        ),
        (x, x, x[:, :, :2], r"q, k and v are .*; give \[B, T, H, C\] and twice \[B, T"),
        (x, x[:, :4], x[:, :4], "q, k and v are"),
        (x, x, x.astype(jnp.bfloat16), "are float32, float32, bfloat16; give all the same dtype"),
        (x[:, :0], x[:, :0], x[:, :0], "is empty; give at least one position"),
    ):
        with pytest.raises(ValueError, match=match):
            attend(q, k, v, impl="blockwise")
    with jax.enable_x64(True):
        wide = x.astype(jnp.float64)
        with pytest.raises(ValueError, match="rounds float64 scores to float32; use reference"):
            attend(wide, wide, wide, impl="xla")
    half, narrow = x.astype(jnp.bfloat16), jnp.ones((1, 5, 4, 4), jnp.bfloat16)
    for device, y, changes, match in (
        (gpu("Tesla T4"), half, {}, "a GPU of compute capability 8.0 or more, not 7.5; use xla or"),
        (gpu("Tesla K80"), half, {}, "a GPU of compute capability 8.0 or more; use xla or"),
        (gpu("NVIDIA H200"), x, {}, "compute in float32; use xla, or compute in bfloat16"),
        (gpu("NVIDIA H200"), narrow, {}, "a multiple of 8 up to 128, not 4; use xla"),
        (gpu("NVIDIA H200"), half, {"window": 2, "causal": False}, "only where it is causal; use"),
    ):
        monkeypatch.setattr(module.devices, "target", lambda device=device: device)
        with pytest.raises(ValueError, match=match):
            attend(y, y, y, impl="cudnn", **changes)


@pytest.mark.parametrize("T", [4, 5])
def test_cudnn_with_segments_gets_an_even_length(T, monkeypatch):
    """The same call as xla but for the length; cuDNN itself runs on a GPU alone."""
    lengths, original = [], jax.nn.dot_product_attention

    def note(*arrays, implementation, **options):
        lengths.append(arrays[0].shape[1])
        return original(*arrays, implementation="xla", **options)

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, T, 2, 8)), jnp.bfloat16) for _ in range(3))
    ids = jnp.asarray([[1] * T, [1, 1] + [2] * (T - 2)], jnp.int32)
    expected = attend(q, k, v, impl="xla", segment_ids_BT=ids)
    monkeypatch.setattr(module.devices, "target", lambda: gpu("NVIDIA H200"))
    monkeypatch.setattr(jax.nn, "dot_product_attention", note)
    found = attend(q, k, v, impl="cudnn", segment_ids_BT=ids)
    assert lengths == [T + T % 2]
    np.testing.assert_array_equal(np.float32(found), np.float32(expected))


def test_refusals_on_this_device():
    if jax.default_backend() != "cpu":
        pytest.skip("about a CPU")
    x = jnp.ones((1, 4, 2, 64), jnp.bfloat16)
    with pytest.raises(
        ValueError, match="cudnn needs a GPU of compute capability 8.0 or more; use"
    ):
        attend(x, x, x, impl="cudnn")
    with pytest.raises(ValueError, match="attention.impl pallas cannot run: .*; use blockwise"):
        attend(x, x, x, impl="pallas")


def test_pallas_is_not_split_by_the_compiler(monkeypatch):
    monkeypatch.setattr(module, "unavailable", lambda *_, **__: None)
    x = jnp.ones((2, 4, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        with pytest.raises(
            ValueError, match=r"not split over 2 devices; call it inside jax\.shard"
        ):
            jax.eval_shape(functools.partial(attend, impl="pallas"), x, x, x)


def test_blocks_are_those_of_the_device_compiled_for():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("_",), abstract_device=device)
    here, x = blocks.largest_block(1000), jnp.ones((1, 4, 2, 8))
    with jax.sharding.use_abstract_mesh(mesh):
        assert blocks.largest_block(1000) == 256 > here or jax.default_backend() != "cpu"
        assert choose("auto", **shape(128))[0] == "cudnn"
        with pytest.raises(ValueError, match="cudnn cannot compute in float32"):
            attend(x, x, x, impl="cudnn")


def gpu(kind, **attributes):
    return types.SimpleNamespace(platform="gpu", device_kind=kind, **attributes)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (gpu("Tesla T4"), (7, 5)),
        (gpu("Tesla V100-SXM2-16GB"), (7, 0)),
        (gpu("Tesla P100-PCIE-16GB"), (6, 0)),
        (gpu("NVIDIA A100-SXM4-40GB"), (8, 0)),
        (gpu("NVIDIA A10G"), (8, 6)),
        (gpu("NVIDIA A10"), (8, 6)),
        (gpu("NVIDIA GeForce RTX 3090"), (8, 6)),
        (gpu("NVIDIA L4"), (8, 9)),
        (gpu("NVIDIA L40S"), (8, 9)),
        (gpu("NVIDIA GeForce RTX 4090"), (8, 9)),
        (gpu("NVIDIA RTX 6000 Ada Generation"), (8, 9)),
        (gpu("NVIDIA H100 80GB HBM3"), (9, 0)),
        (gpu("NVIDIA GH200 480GB"), (9, 0)),
        (gpu("NVIDIA H20"), (9, 0)),
        (gpu("NVIDIA B200"), (10, 0)),
        (gpu("NVIDIA GB300"), (10, 3)),
        (gpu("NVIDIA GeForce RTX 5090"), (12, 0)),
        (gpu("Tesla K80"), None),
        (gpu("some new GPU"), None),
        (gpu("some new GPU", compute_capability="13.1"), (13, 1)),
        (gpu("Tesla T4", compute_capability="9.0"), (9, 0)),
        (gpu("AMD Instinct MI300X", compute_capability="gfx942"), None),
        (types.SimpleNamespace(platform="cpu", device_kind="cpu"), None),
    ],
)
def test_compute_capability(device, expected):
    assert module.devices.compute_capability(device) == expected


def test_compute_capability_of_a_device_of_this_machine(monkeypatch):
    """An abstract device of a kind that no table knows is looked up among the real ones."""
    real = gpu("some new GPU", compute_capability="13.1")
    monkeypatch.setattr(jax, "devices", lambda: [real])
    assert module.devices.compute_capability(gpu("some new GPU")) == (13, 1)
    assert module.devices.compute_capability(gpu("another one")) is None


def shape(seq_len, **changes):
    """Arguments of `choose`."""
    return dict(seq_len=seq_len, head_dim=64, dtype="bfloat16", segments=True) | changes


CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v4")
T4, H200 = gpu("Tesla T4"), gpu("NVIDIA H200")


@pytest.mark.parametrize(
    ("device", "arguments", "expected", "said"),
    [
        (CPU, shape(64), "reference", "faster than blockwise on a cpu"),
        (CPU, shape(511), "reference", ""),
        (CPU, shape(512), "blockwise", "leaner"),
        (CPU, shape(4096, attention_dropout=0.1), "blockwise", ""),
        (H200, shape(256), "cudnn", "compute capability 9.0, bfloat16, head width 64"),
        (H200, shape(511, dtype="float16"), "cudnn", "compute capability 9.0, float16"),
        (H200, shape(4096, segments=False, head_dim=128), "cudnn", ""),
        (gpu("NVIDIA A100-SXM4-40GB"), shape(512), "cudnn", "compute capability 8.0"),
        (H200, shape(512, dtype="float32"), "xla", "cudnn cannot compute in float32"),
        (H200, shape(512, head_dim=136), "xla", "up to 128, not 136"),
        (H200, shape(512, head_dim=2), "xla", "multiple of 8"),
        (H200, shape(512, attention_dropout=0.1), "reference", "cudnn has no dropout"),
        (H200, shape(2048, attention_dropout=0.1), "blockwise", "cudnn has no dropout"),
        (H200, shape(2048, dtype="float32"), "blockwise", "no scores of 2048 x 2048"),
        (T4, shape(1024, dtype="float16"), "xla", "capability 8.0 or more, not 7.5; compute capab"),
        (T4, shape(1025, dtype="float16"), "blockwise", "no scores of 1025 x 1025"),
        (T4, shape(512, dtype="float16", attention_dropout=0.1), "reference", ""),
        (gpu("Tesla K80"), shape(512, dtype="float32"), "xla", "Tesla K80, float32"),
        (TPU, shape(512), "xla", "TPU v4, bfloat16"),
    ],
)
def test_choose(device, arguments, expected, said, monkeypatch):
    monkeypatch.setattr(module.devices, "target", lambda: device)
    impl, reason = choose("auto", **arguments)
    assert impl == expected and said in reason and len(reason) > 20
    assert choose("xla", **arguments) == ("xla", "named in the config")


def test_choose_by_what_was_measured(monkeypatch):
    """Pallas where it was faster in this very shape and can run."""
    here = shape(1024, segments=False)
    monkeypatch.setattr(module.devices, "target", lambda: H200)
    monkeypatch.setattr(measured, "ATTENTION", ())
    assert choose("auto", **here)[0] == "cudnn"
    row = measured.Times("NVIDIA H200", "bfloat16", 64, 1024, False, cudnn=2.0, pallas=1.5)
    monkeypatch.setattr(measured, "ATTENTION", (row,))
    monkeypatch.setattr(jax, "__version_info__", (1, 0, 0))
    impl, reason = choose("auto", **here)
    assert impl == "pallas" and reason.startswith("measured: cudnn 2.0 ms, pallas 1.5 ms; ")
    for others in (
        {"segments": True},
        {"seq_len": 512},
        {"head_dim": 128},
        {"dtype": "float16"},
    ):
        assert choose("auto", **(here | others))[0] == "cudnn", others
    with monkeypatch.context() as patch:
        patch.setattr(module.devices, "target", lambda: gpu("NVIDIA H100 80GB HBM3"))
        assert choose("auto", **here)[0] == "cudnn"
    monkeypatch.setattr(measured, "ATTENTION", (row._replace(pallas=2.5),))
    impl, reason = choose("auto", **here)
    assert impl == "cudnn" and "measured" in reason


# The generator of dropout.


def kept(seed, row, T, S, rate):
    of_row = dropout.seed_words(jnp.asarray(seed, jnp.uint32), jnp.full((1, 1), row))
    words = dropout.query_words(of_row, jnp.arange(T)[:, None])
    return np.asarray(jax.jit(lambda s: dropout.keep(words, s, rate))(jnp.arange(S)[None]))


def test_dropout_keeps_its_share():
    for rate in (0.1, 0.5, 0.9):
        mask = kept((1, 2), 3, 512, 512, rate)
        deviation = np.sqrt(rate * (1 - rate) / mask.size)
        assert abs(mask.mean() - (1 - rate)) < 4 * deviation
        for axis in (0, 1):  # every row and every column too: no stripes
            counts = mask.sum(axis)
            spread = np.sqrt(512 * rate * (1 - rate))
            assert np.abs(counts - 512 * (1 - rate)).max() < 5 * spread
            assert 0.8 < counts.std() / spread < 1.2
    assert kept((1, 2), 3, 64, 64, 0.0).all()
    assert kept((1, 2), 3, 64, 64, 1e-12).all()


def uniform_bits(seed, row, T, S):
    """Which of 16 equal classes each element falls into, read off nested thresholds."""
    return sum(
        (~kept(seed, row, T, S, i / 16)).astype(int) for i in range(1, 16)
    )  # fmt: skip


def test_dropout_is_uniform_and_pairs_are_independent():
    """Chi-square of 16 classes, and of pairs of neighbours along s, t, head and seed."""
    a = uniform_bits((5, 6), 0, 256, 256)
    counts = np.bincount(a.ravel(), minlength=16)
    assert (((counts - a.size / 16) ** 2) / (a.size / 16)).sum() < 37.7  # 0.1 % of chi2(15)
    pairs = {
        "s": (a[:, :-1], a[:, 1:]),
        "t": (a[:-1], a[1:]),
        "transposed": (a, a.T),
        "head": (a, uniform_bits((5, 6), 1, 256, 256)),
        "seed": (a, uniform_bits((6, 6), 0, 256, 256)),
        "second word": (a, uniform_bits((5, 7), 0, 256, 256)),
    }
    for name, (x, y) in pairs.items():
        if name == "transposed":
            x, y = (z[np.triu_indices(256, 1)] for z in (x, y))
        table = np.bincount((16 * x + y).ravel(), minlength=256)
        expected = x.size / 256
        assert (((table - expected) ** 2) / expected).sum() < 330.5, name  # 0.1 % of chi2(255)


def test_dropout_rows_are_distinct_and_far_positions_count():
    """No two of many rows share a mask, and high bits of heads and positions matter."""
    rows = np.r_[np.arange(200), np.zeros(200, int), 2**20, 0]
    positions = np.r_[np.zeros(200, int), np.arange(200), 0, 2**20]
    of_rows = dropout.seed_words(jnp.uint32([1, 2]), jnp.asarray(rows)[:, None])
    words = dropout.query_words(of_rows, jnp.asarray(positions)[:, None])
    mask = np.asarray(dropout.keep(words, jnp.arange(64)[None], 0.5))
    assert len({row.tobytes() for row in mask}) == 401  # head 0, position 0 is there twice
    assert (np.abs((mask[-2:] != mask[0]).sum(1) - 32) < 20).all()
