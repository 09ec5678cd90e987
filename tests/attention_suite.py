"""What every implementation of attention is held to: cases, a float64 oracle, a comparison."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.kernels import dropout
from lm_jax.kernels.attention import attend

KEY = 7  # of dropout


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attend; `starts` are the first positions of the documents after the first."""

    T: int
    H: int = 2
    K: int = 2
    C: int = 32
    B: int = 2
    causal: bool = True
    starts: tuple[int, ...] | None = None
    padded: int = 0
    window: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    rate: float = 0.0
    magnitude: float = 1.0

    def options(self):
        """Keyword arguments of attend, but for the segment ids."""
        draw = dropout.Draw(jax.random.key(KEY)) if self.rate else None
        return dict(
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            dropout_rate=self.rate,
            draw=draw,
        )

    def segment_ids(self):
        """Documents 1, 2, ... in the first row; the next ones are shifted by their number."""
        if self.starts is None and not self.padded:
            return None
        ids = np.ones((self.B, self.T), np.int32)
        for b in range(self.B):
            for start in self.starts or ():
                ids[b, start + b :] += 1
        ids[:, self.T - self.padded :] = 0
        return ids


CASES = {
    "one position": Case(1),
    "two positions": Case(2),
    "block - 1": Case(63, H=4, K=2),
    "block": Case(64, C=64),
    "block + 1": Case(65, H=4, K=1),
    "two blocks - 1": Case(127),
    "two blocks": Case(128, H=4, K=2, C=64),
    "two blocks + 1": Case(129),
    "200": Case(200, B=1, H=6, K=3, C=80),
    "wide heads": Case(96, B=1, C=128),
    "not causal": Case(65, causal=False, H=4, K=2),
    "not causal in segments": Case(129, causal=False, starts=(31, 90), padded=5),
    "segments": Case(129, starts=(1, 50, 51), H=4, K=2),
    "segments at blocks": Case(128, B=1, starts=(64,)),
    "segments and padding": Case(130, starts=(64, 100), padded=20, H=4, K=2),
    "window 1": Case(65, window=1),
    "window 5": Case(129, window=5, H=4, K=2),
    "window 64": Case(200, B=1, window=64),
    "window 65": Case(130, B=1, window=65),
    "window over all": Case(65, window=100),
    "window, not causal": Case(129, window=5, causal=False),
    "softcap": Case(65, softcap=1.5, H=4, K=2),
    "scale": Case(65, scale=0.7),
    "negative scale": Case(65, scale=-0.2, H=4, K=2, window=9),
    "dropout": Case(130, rate=0.3, H=4, K=2),
    "all at once": Case(
        129, H=6, K=2, starts=(40,), padded=9, window=50, softcap=2.0, scale=0.3, rate=0.1
    ),
    "scores of 1e4": Case(65, magnitude=100.0, scale=0.2),
}


def inputs(case: Case, dtype) -> dict[str, np.ndarray]:
    """Random arguments and cotangents, exact in `dtype`."""
    rng = np.random.default_rng(0)
    queries, keys = (case.B, case.T, case.H, case.C), (case.B, case.T, case.K, case.C)
    arrays = {
        "q": case.magnitude * rng.normal(size=queries),
        "k": case.magnitude * rng.normal(size=keys),
        "v": rng.normal(size=keys),
        "dout": rng.normal(size=queries),
    }
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    wide = np.promote_types(dtype, np.float32) if dtype != jnp.bfloat16 else np.float32
    arrays["dlse"] = rng.normal(size=queries[:3]).astype(wide)
    return arrays


def oracle(case: Case, arrays, with_lse: bool = True) -> dict[str, np.ndarray]:
    """Output, log-sum-exp and gradients, head by head in float64 NumPy."""
    q, k, v, dout, dlse = (
        np.asarray(arrays[name], np.float64) for name in ("q", "k", "v", "dout", "dlse")
    )
    ids = case.segment_ids()
    ids = np.ones((case.B, case.T), int) if ids is None else ids
    scale = case.scale or 1 / np.sqrt(case.C)
    seed = jax.random.bits(jax.random.key(KEY), (2,), "uint32")
    t, s = np.arange(case.T)[:, None], np.arange(case.T)[None]
    visible = np.ones((case.T, case.T), bool)
    if case.causal:
        visible &= s <= t
    if case.window:
        visible &= t - s < case.window
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    lse = np.full(dlse.shape, -np.inf)
    for b, h in np.ndindex(case.B, case.H):
        group = h // (case.H // case.K)
        row = np.s_[b, :, h], np.s_[b, :, group]
        seen = visible & (ids[b][:, None] == ids[b][None]) & (ids[b][None] > 0)
        z = scale * q[row[0]] @ k[row[1]].T
        capped = case.softcap * np.tanh(z / case.softcap) if case.softcap else z
        capped = np.where(seen, capped, -np.inf)
        top = np.where(seen.any(1), capped.max(1), 0)
        total = np.exp(capped - top[:, None]).sum(1)
        p = np.exp(capped - top[:, None]) / np.where(total > 0, total, 1)[:, None]
        with np.errstate(divide="ignore"):
            lse[row[0]] = top + np.log(total)
        factor = np.ones_like(p)
        if case.rate:
            words = dropout.query_words(
                dropout.seed_words(seed, jnp.full((1, 1), b * case.H + h)), jnp.asarray(t)
            )
            kept = np.asarray(dropout.keep(words, jnp.asarray(s), case.rate))
            factor = kept / (1 - case.rate)
        out[row[0]] = (p * factor) @ v[row[1]]
        dp = factor * (dout[row[0]] @ v[row[1]].T)
        from_lse = p * dlse[row[0]][:, None] if with_lse else 0
        ds = p * (dp - (p * dp).sum(1, keepdims=True)) + from_lse
        if case.softcap:
            ds *= 1 - np.tanh(z / case.softcap) ** 2
        dv[row[1]] += (p * factor).T @ dout[row[0]]
        dq[row[0]] = scale * ds @ k[row[1]]
        dk[row[1]] += scale * ds.T @ q[row[0]]
    results = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return results | {"lse": lse} if with_lse else results


def run(function, arrays, with_lse: bool = True, quick: bool = False) -> dict[str, np.ndarray]:
    """The same of `function(q, k, v) -> (out, lse)`, or `-> out`, compiled.

    Compiled `quick`, it is not the code that users run, but computes the same.
    """

    # The tests compile without it where nothing is said.
    options = None if quick else {"xla_backend_optimization_level": 3}

    @functools.partial(jax.jit, compiler_options=options)
    def all_of_it(q, k, v, dout, dlse):
        primal, pullback = jax.vjp(function, q, k, v)
        gradients = pullback((dout, dlse) if with_lse else dout)
        names = ("out", "lse") if with_lse else ("out",)
        primals = primal if with_lse else (primal,)
        return dict(zip((*names, "dq", "dk", "dv"), (*primals, *gradients), strict=True))

    results = jax.device_get(all_of_it(**arrays))
    for name in results:
        expected = arrays["dlse"].dtype if name == "lse" else arrays["q"].dtype
        assert results[name].dtype == expected, f"{name} is {results[name].dtype}"
    return results


def attention(impl: str, case: Case, with_lse: bool = True):
    """attend as a function of q, k and v."""
    ids = case.segment_ids()
    ids = None if ids is None else jnp.asarray(ids)
    return functools.partial(
        attend, impl=impl, segment_ids_BT=ids, return_lse=with_lse, **case.options()
    )


def errors(case: Case, results, truth) -> dict[str, tuple[float, float]]:
    """Error of each array, root mean square and largest, over the largest true value.

    Fails where there is anything but 0 in padding, and where what should be finite is not.
    """
    ids = case.segment_ids()
    found = {}
    for name, value in results.items():
        value = np.float64(value)
        if ids is not None:
            hidden = value[ids == 0]
            assert (hidden == (-np.inf if name == "lse" else 0)).all(), f"{name} in padding"
        real = np.isfinite(truth[name])
        np.testing.assert_array_equal(np.isfinite(value), real, err_msg=name)
        largest = max(1.0, np.abs(truth[name][real]).max())
        wrong = (value[real] - truth[name][real]) / largest
        found[name] = np.sqrt(np.square(wrong).mean()), np.abs(wrong).max()
    return found


def check_exact(case: Case, results, truth) -> None:
    """Float64 against float64."""
    for name, (_, most) in errors(case, results, truth).items():
        assert most < 1e-11, f"{name} is off by {most:.1e}"


def check_rounded(case: Case, results, plain, truth, largest: float = 2.0) -> None:
    """At most twice the error of the plain implementation in the same dtype.

    That holds for the root mean square and for the largest error; `largest` relaxes the latter. The
    plain error can be 0, where there is one key to see for instance; a few roundings of the float32
    that all accumulate in are allowed anyway.
    """
    allowed = errors(case, plain, truth)
    rounding = 8 * float(jnp.finfo(np.float32).eps)
    for name, found in errors(case, results, truth).items():
        for error, plain_error, factor in zip(found, allowed[name], (2, largest), strict=True):
            said = f"{name} is off by {error:.1e}, the plain one by {plain_error:.1e}"
            assert error <= factor * plain_error + rounding, said


@functools.cache
def expectation(case: Case, dtype: str, with_lse: bool, quick: bool = False):
    """Arguments, truth, and results of the plain implementation."""
    arrays = inputs(case, jnp.dtype(dtype))
    truth = oracle(case, arrays, with_lse)
    return arrays, truth, run(attention("reference", case, with_lse), arrays, with_lse, quick)
