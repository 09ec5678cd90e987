"""The Hopper kernels by themselves: interpreted with race detection, and lowered for CUDA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from lm_jax.kernels import mosaic
from tests.attention_suite import Case, attention, check_rounded, inputs, oracle, run

if reason := mosaic.unavailable(jnp.bfloat16, 64, interpret=True):
    pytest.skip(reason, allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm_jax.kernels.dropout import head_words
from lm_jax.kernels.flash import flash
from lm_jax.kernels.flash_tile import Settings, block_ranges
from tests.helpers import LONG
from tests.races import WGMMA, forbidden


class Unsorted(Case):
    """Documents that come back after others, and padding between them."""

    def segment_ids(self):
        ids = np.random.default_rng(3).integers(0, 3, (self.B, -(-self.T // 8)))
        return np.repeat(ids.astype(np.int32), 8, axis=1)[:, : self.T]


EVERYTHING: dict[str, Any] = dict(starts=(70,), padded=20, window=50, softcap=2.0, rate=0.2)
# Queries and keys are in tiles of 128 (64 queries in one of the kernels at width 128); a ring of
# 2 or 3 tiles of them comes round in "padded keys".
CASES = {
    "one position": Case(1, B=1, H=1, K=1),
    "whole tiles skipped": Case(256, B=1, H=1, K=1, C=64, starts=(128,)),
    "heads in groups, 127": Case(127, B=1, H=4, K=2, C=64),
    "padded keys, width 80": Case(270, B=1, H=1, K=1, C=80, causal=False),
    "everything": Case(200, H=1, K=1, C=64, **EVERYTHING),
    "everything, width 128": Case(129, B=1, K=1, C=128, **EVERYTHING),
    "unsorted documents": Unsorted(256, B=1, H=1, K=1, C=64, causal=False),
}
DETERMINISTIC = {
    "width 48": Case(200, B=1, H=1, K=1, C=48),
    "everything, width 128": Case(129, B=1, K=1, C=128, **EVERYTHING),
}


def fast(cases, names):
    """Names of cases; all but `names` are long tests, for they change with these kernels alone."""
    return [pytest.param(n, marks=[] if n in names else LONG) for n in cases]


def flash_of(case, **options):
    """flash as a function of q, k and v."""
    ids = case.segment_ids()
    settings = case.options() | dict(scale=case.scale or case.C**-0.5, interpret=True) | options
    draw = settings.pop("draw")
    words = draw and head_words(draw, case.B, case.H)
    ids = None if ids is None else jnp.asarray(ids)
    return lambda q, k, v: flash(q, k, v, ids, words, **settings)


@pytest.fixture(autouse=True)
def races(monkeypatch, capfd):
    """No test may race."""
    with forbidden(monkeypatch, capfd):
        yield


def check(case, dtype, largest=2.0, **options):
    arrays = inputs(case, jnp.dtype(dtype))
    truth = oracle(case, arrays)
    plain = run(attention("reference", case), arrays)
    results = run(flash_of(case, **options), arrays)
    if (ids := case.segment_ids()) is not None:
        # attend hides padding in what it is given and returns; here it must be hidden anyway.
        for name in ("dk", "dv"):
            assert not np.float32(results[name])[ids == 0].any()
    check_rounded(case, results, plain, truth, largest)


@pytest.mark.parametrize(
    "name", fast(CASES, ("one position", "everything", "heads in groups, 127"))
)
def test_values_and_gradients(name):
    # With one key the softmax has no gradient; what is left is the rounding of the output, which
    # the plain form does not use.
    largest = 4.0 if name == "one position" else 2.0
    check(CASES[name], "float16" if CASES[name].H == 1 else "bfloat16", largest)


@pytest.mark.parametrize("name", fast(DETERMINISTIC, ("everything, width 128",)))
def test_deterministic(name):
    check(DETERMINISTIC[name], "bfloat16", deterministic=True)


@pytest.mark.slow
def test_missing_fence_is_a_race(monkeypatch, capfd):
    """That the detector sees anything at all: outputs are copied from where they just went."""
    case = Case(64, B=1, H=1, K=1, C=64)
    arrays = inputs(case, jnp.bfloat16)
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    monkeypatch.setattr(plgpu, "wgmma", WGMMA)
    try:
        jax.block_until_ready(flash_of(case)(arrays["q"], arrays["k"], arrays["v"]))
        said = capfd.readouterr().out  # jax 0.11
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        gpu_callbacks.reset_gpu_interpret_mode_state()
    capfd.readouterr()
    assert "RACE DETECTED" in said


@pytest.mark.slow
@pytest.mark.long
def test_deterministic_differs_in_the_gradient_of_queries_alone(monkeypatch):
    """The two backward passes share the rest, and both give the same bits each time."""
    monkeypatch.setattr(plgpu, "wgmma", WGMMA)
    case = Case(300, B=1, H=1, K=1, C=64)  # a row of queries sums over up to three tiles of keys
    arrays = inputs(case, jnp.bfloat16)
    fast, fixed, again = (run(flash_of(case, deterministic=d), arrays) for d in (False, True, True))
    for name in fast:
        np.testing.assert_array_equal(np.float32(fixed[name]), np.float32(again[name]))
        if name != "dq":
            np.testing.assert_array_equal(np.float32(fast[name]), np.float32(fixed[name]))


@pytest.mark.slow
def test_vmap_gives_the_same_bits(monkeypatch):
    """The mapped axis joins the batch, but not in the counter of dropout."""
    monkeypatch.setattr(plgpu, "wgmma", WGMMA)
    case = Case(64, B=1, H=1, K=1, C=64, starts=(20,), rate=0.3)
    q, k, v, dout, dlse = inputs(case, jnp.bfloat16).values()

    def both(q, v):
        results, pullback = jax.vjp(lambda *x: flash_of(case)(*x), q, k, v)
        return *results, *pullback((dout, dlse))

    mapped = jax.jit(jax.vmap(both, in_axes=(0, None)))(np.stack([q, -2 * q]), v)
    for row, q_row in enumerate((q, -2 * q)):
        for ours, alone in zip(mapped, jax.jit(both)(q_row, v), strict=True):
            np.testing.assert_array_equal(np.float32(ours[row]), np.float32(alone))


@pytest.mark.parametrize("tiles", [(128, 64), (64, 128)])
@pytest.mark.parametrize("causal, window", [(True, None), (True, 70), (False, 70), (False, None)])
@pytest.mark.parametrize("kind", [Case, Unsorted])
def test_ranges_hide_nothing_visible(kind, causal, window, tiles):
    case = kind(500, B=2, starts=(100, 260), padded=30, causal=causal, window=window)
    settings = Settings(500, causal, window, 0.0, 1.0, 0.0, False, True)
    ids = np.pad(case.segment_ids(), ((0, 0), (0, 12)))
    t, s = np.arange(512)[:, None], np.arange(512)[None]
    for given in (ids, None):
        mask = np.broadcast_to(s < 500, (2, 512, 512))
        mask = mask & (s <= t) if causal else mask
        mask = mask & (t - s < window) if window else mask
        if given is not None:
            mask = mask & (ids[:, :, None] == ids[:, None]) & (ids[:, None] > 0)
        tiled = mask.reshape(2, 512 // tiles[0], tiles[0], 512 // tiles[1], tiles[1])
        some, whole = tiled.any((2, 4)), tiled.all((2, 4))
        ranges = block_ranges(given, settings, 2, 512, tiles)
        for found, some, whole in (  # noqa: B020
            (ranges[0], some, whole),
            (ranges[1], some.swapaxes(1, 2), whole.swapaxes(1, 2)),
        ):
            first, start, stop, end = np.moveaxis(np.asarray(found)[..., None], 2, 0)
            index = np.arange(some.shape[2])
            real = index < -(-500 // (512 // some.shape[2]))
            assert not (some & real & ((index < first) | (index >= end))).any()
            assert whole[(index >= start) & (index < stop)].all()
            assert (end > first).all() and (end <= len(index)).all()
            if kind is Case:  # and where the documents are in order it skips all that it can
                busy = some.any(2)
                np.testing.assert_array_equal((end - first)[..., 0][busy], some.sum(2)[busy])


def lowered(case, dtype, deterministic):
    arrays = [jax.ShapeDtypeStruct(x.shape, dtype) for x in inputs(case, dtype).values()][:3]
    f = flash_of(case, deterministic=deterministic, interpret=False)
    grad = jax.grad(lambda *x: f(*x)[0].astype(jnp.float32).sum(), (0, 1, 2))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("_",), abstract_device=device)):
        return jax.jit(grad).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("deterministic, kernels", [(False, 2), (True, 3)])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=LONG)])
@pytest.mark.parametrize("name", ["everything", "everything, width 128", "padded keys, width 80"])
def test_lowers_for_cuda(monkeypatch, name, dtype, deterministic, kernels):
    monkeypatch.setattr(plgpu, "wgmma", WGMMA)
    text = lowered(CASES[name], jnp.dtype(dtype), deterministic)
    assert text.count("custom_call @mosaic_gpu_v2") == kernels


def test_refusals():
    q = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    options = dict(causal=True, window=None, softcap=0.0, dropout_rate=0.0)
    with pytest.raises(ValueError, match="the device is a cpu, not a Hopper GPU"):
        flash(q, q, q, None, None, scale=1.0, **options)
    options["interpret"] = True
    with pytest.raises(ValueError, match="dtype float32 is neither bfloat16 nor float16"):
        flash(*(x.astype(jnp.float32) for x in (q, q, q)), None, None, scale=1.0, **options)
    with pytest.raises(ValueError, match="A scale of 0"):
        flash(q, q, q, None, None, scale=0.0, **options)
    assert "head width 136" in mosaic.unavailable(jnp.bfloat16, 136, interpret=True)
    assert "head width 20" in mosaic.unavailable(jnp.bfloat16, 20, interpret=True)


def test_refusals_of_other_machines(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax, "__version_info__", (0, 11, 1))
        assert "older than 0.11.2" in mosaic.unavailable(jnp.bfloat16, 64, interpret=True)
    with monkeypatch.context() as patch:
        patch.setenv("NPROC", "2")
        assert "set NPROC=8" in mosaic.unavailable(jnp.bfloat16, 64, interpret=True)
    device = functools.partial(jax.sharding.AbstractDevice, num_cores=1, platform="gpu")
    for kind, refused in (("Tesla T4", True), ("NVIDIA H200", False), ("NVIDIA B200", True)):
        mesh = AbstractMesh((1,), ("_",), abstract_device=device(device_kind=kind))
        with jax.sharding.use_abstract_mesh(mesh):
            assert bool(mosaic.unavailable(jnp.bfloat16, 64)) == refused
