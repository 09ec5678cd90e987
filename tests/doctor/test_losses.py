"""Planted faults of loss functions, and healthy losses that must pass every check."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax.doctor.loss import examine_loss
from lm_jax.loss import cross_entropy
from tests.helpers import LONG, thirds

V = 131  # beyond 100, so that a label of -100 can wrap
T = 12


def examine(loss_fn, **changes):
    return examine_loss(loss_fn, **{"vocab_size": V, "seq_len": T} | changes)


def in_range(tokens, weights, vocab_size):
    """What a data pipeline asserts on the host; compiled code cannot."""
    if not isinstance(tokens, jax.core.Tracer):
        scored = np.asarray(tokens)[np.asarray(weights) > 0]
        if scored.size and not (0 <= scored.min() and scored.max() < vocab_size):
            raise ValueError("a scored label is outside the vocabulary")


def shifted(nats_of):
    """A loss from per-token nats of (logits, targets, weights), shifted, masked and guarded."""

    def loss(logits, tokens, weights):
        in_range(tokens, weights, logits.shape[-1])
        logits, targets, weights = logits[:, :-1], tokens[:, 1:], weights[:, 1:]
        targets = jnp.where(weights > 0, targets, 0)
        logits = jnp.where(weights[..., None] > 0, logits, 0).astype(jnp.float32)
        nats = nats_of(logits, targets, weights)
        return (nats * weights).sum(), weights.sum()

    return loss


def plain(logits, targets, weights):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def real(dtype):
    """The loss of lm_jax, with its logits cast to that type."""

    def loss(logits, tokens, weights):
        return cross_entropy(logits[:, :-1].astype(dtype), tokens[:, 1:], weights[:, 1:])

    return loss


def numpy_loss(logits, tokens, weights):
    in_range(tokens, weights, logits.shape[-1])
    scored = weights[:, 1:] > 0
    z = logits[:, :-1].astype(np.float64)[scored]
    y, w = tokens[:, 1:][scored], weights[:, 1:][scored].astype(np.float64)
    top = z.max(-1, keepdims=True)
    norm = np.log(np.exp(z - top).sum(-1)) + top[:, 0]
    return float(((norm - z[np.arange(len(y)), y]) * w).sum()), float(w.sum())


def one_hot_loss(logits, targets, weights):
    return -(jax.nn.one_hot(targets, logits.shape[-1]) * jax.nn.log_softmax(logits)).sum(-1)


def chunked(logits, tokens, weights):
    """Row by row, as a fused loss works through its batch."""

    def row(carry, row):
        total, count = shifted(plain)(*(x[None] for x in row))
        return (carry[0] + total, carry[1] + count), None

    in_range(tokens, weights, logits.shape[-1])
    start = jnp.zeros(()), jnp.zeros(())
    return jax.lax.scan(row, start, (logits, tokens, weights))[0]


def quiet(report):
    return {f.check: f.evidence for f in report if f.status in ("fail", "warn")} == {}


REAL = {dtype: real(dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("seed", thirds(range(3)))
@pytest.mark.parametrize("dtype", REAL)
def test_own_loss_is_silent(dtype, seed):
    report = examine(REAL[dtype], seed=seed)
    assert quiet(report), report.to_json()
    assert all(f.status == "pass" for f in report)


@pytest.mark.parametrize(
    ("vocab_size", "seq_len", "batch_size"),
    [
        (2, 4, 2),
        pytest.param(3, 5, 2, marks=pytest.mark.slow),
        pytest.param(1025, 129, 5, marks=LONG),
        pytest.param(40_000, 64, 4, marks=LONG),
    ],
)
def test_sizes_are_silent(vocab_size, seq_len, batch_size):
    report = examine(REAL["float32"], vocab_size=vocab_size, seq_len=seq_len, batch_size=batch_size)
    assert quiet(report), report.to_json()


@pytest.mark.parametrize(
    "loss", [shifted(plain), shifted(one_hot_loss), chunked], ids=["optax", "one_hot", "chunked"]
)
def test_healthy_jax_losses_are_silent(loss):
    report = examine(loss)
    assert quiet(report), report.to_json()


@pytest.mark.parametrize("seed", range(3))
def test_a_numpy_loss_is_silent(seed):
    report = examine(numpy_loss, seed=seed)
    assert quiet(report), report.to_json()
    assert "central differences" in report["loss.contract"].evidence


def torch_loss(torch, *, ignore_index=-100):
    def loss(logits, tokens, weights):
        z = torch.from_numpy(logits.astype(np.float32))[:, :-1].flatten(0, 1)
        y = torch.from_numpy(tokens)[:, 1:].flatten().long()
        w = torch.from_numpy(weights)[:, 1:].flatten()
        kept = w > 0
        nats = torch.nn.functional.cross_entropy(
            z[kept], y[kept], reduction="none", ignore_index=ignore_index
        )
        return (nats * w[kept]).sum(), w.sum()

    return loss


def test_a_torch_loss_is_silent():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for seed in range(3):
        report = examine(torch_loss(torch, ignore_index=V + 1_000), seed=seed)
        assert quiet(report), report.to_json()


@pytest.mark.fault(9, "loss.label_range", "warn")
def test_torch_counts_an_ignored_label():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    report = examine(torch_loss(torch))
    assert not report.failed and "loss.label_range" in report.warned
    assert report["loss.label_range"].values["-100"] == "counted at no cost"


def labelled(logits, tokens, weights):
    """Targets without a weight get the label -100, as data collators give it; NumPy."""
    in_range(tokens, weights, logits.shape[-1])
    kept = np.where(weights > 0, tokens, -100) != -100
    return numpy_loss(logits, tokens, kept.astype(np.float32))


def masking(logits, tokens, weights):
    """A boolean mask takes the scored tokens out; JAX."""
    in_range(tokens, weights, logits.shape[-1])
    mask = weights[:, 1:] > 0
    targets = jnp.where(mask, tokens[:, 1:], 0)
    nats = plain(logits[:, :-1].astype(jnp.float32), targets, None)
    return jnp.where(mask, nats, 0).sum(), mask.sum()


@pytest.mark.parametrize("loss", [masking, labelled], ids=["mask", "labels"])
def test_a_mask_of_zeros_and_ones_is_healthy(loss):
    """It takes fractions for ones, which is a warning: no loop of whole weights meets it."""
    report = examine(loss)
    assert not report.failed, report.to_json()
    assert report.warned == ["loss.fractional_weights"]


@pytest.mark.parametrize("count", ["labels", "weights"])
def test_torch_labels_of_minus_100_are_healthy(count):
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def loss(logits, tokens, weights):
        z = torch.tensor(logits, requires_grad=True)
        labels = torch.where(torch.tensor(weights) > 0, torch.tensor(tokens).long(), -100)[:, 1:]
        total = torch.nn.functional.cross_entropy(
            z[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return total, (labels != -100).sum() if count == "labels" else weights[:, 1:].sum()

    report = examine(loss)
    assert not report.failed, report.to_json()
    hazard = ["loss.label_range"] if count == "weights" else []
    assert report.warned == [*hazard, "loss.fractional_weights"]


def test_refusals_are_no_failures():
    """Refusing is loud: labels out of range at weight 0, fractions, or a batch without targets."""

    def loss(logits, tokens, weights):
        if not (0 <= tokens.min() and tokens.max() < V):
            raise ValueError("a label is outside the vocabulary")
        if not set(np.unique(weights)) <= {0, 1} or not weights[:, 1:].any():
            raise ValueError("weights must be 0 and 1, and one of them 1")
        return numpy_loss(logits, tokens, weights)

    report = examine(loss)
    assert not report.failed and report.warned == ["loss.nothing_scored"], report.to_json()
    assert "labels of -100 at weight 0 are refused" in report["loss.masked"].evidence
    assert "refused" in report["loss.fractional_weights"].evidence


class WithGradient:
    """A NumPy loss that knows its gradient, as an adapter of another framework does."""

    def __init__(self, fault=lambda gradient: gradient):
        self.fault = fault

    def __call__(self, logits, tokens, weights):
        return numpy_loss(logits, tokens, weights)

    def gradient(self, logits, tokens, weights):
        w = np.append(weights[:, 1:], np.zeros_like(weights[:, :1]), 1)[..., None]
        z = np.where(w > 0, logits, 0).astype(np.float64)
        p = np.exp(z - z.max(-1, keepdims=True))
        g = p / p.sum(-1, keepdims=True)
        g[:, :-1] -= tokens[:, 1:, None] == np.arange(z.shape[-1])
        return self.fault(w * g)


def test_a_gradient_that_the_loss_has_is_used():
    report = examine(WithGradient())
    assert quiet(report), report.to_json()
    assert "loss_fn.gradient" in report["loss.contract"].evidence
    # Too small for central differences of float32 sums.
    finding = examine(WithGradient(lambda gradient: 1.001 * gradient))["loss.definition"]
    assert finding.status == "fail"
    assert list(finding.values) == ["error of the gradient of random logits"]
    report = examine(WithGradient(lambda gradient: gradient[:, :-1]))
    assert report.failed and {report[name].status for name in report.failed} == {"error"}


def test_a_gradient_that_cannot_be_resolved_is_not_judged():
    def loss(logits, tokens, weights):
        total, count = numpy_loss(logits, tokens, weights)
        return float(np.round(total / 16) * 16), count

    report = examine(loss)
    assert "loss.definition" in report.failed
    assert "gradient of random logits: not judged" in report["loss.definition"].evidence


@pytest.mark.slow
def test_no_call_is_large():
    sizes = []

    class Loss(WithGradient):
        def __call__(self, logits, tokens, weights):
            sizes.append(logits.size)
            return 1.0, 1.0

        def gradient(self, logits, tokens, weights):
            return np.zeros_like(logits)

    examine(Loss(), vocab_size=2**17, batch_size=50_000, seq_len=8192)
    assert len(sizes) > 50 and max(sizes) <= 2**24


def test_a_bidirectional_objective_is_declared():
    def loss(logits, tokens, weights):
        return cross_entropy(logits, tokens, weights)

    report = examine(loss, objective="bidirectional")
    assert quiet(report), report.to_json()
    assert "loss.oracle" in examine(loss).failed


# Planted faults.


@pytest.mark.fault(1, "loss.oracle")
def test_no_shift():
    report = examine(lambda z, y, w: cross_entropy(z, y, w))
    assert {"loss.oracle", "loss.definition"} <= set(report.failed)
    assert report["loss.oracle"].values["+0"] < 1e-3


def test_a_loss_of_the_first_positions_only():
    """Right for rows of up to 64 tokens, and examined with longer ones."""

    def first(z, y, w):
        return shifted(plain)(z[:, :64], y[:, :64], w[:, :64])

    report = examine_loss(first, vocab_size=V, seq_len=100)
    assert report.failed == ["loss.definition"]
    assert "of 100 tokens" in report["loss.definition"].evidence
    assert quiet(examine_loss(shifted(plain), vocab_size=V, seq_len=1000))


@pytest.mark.fault(2, "loss.oracle")
def test_double_shift():
    """The collator has shifted the labels already, the loss shifts again."""
    report = examine(lambda z, y, w: cross_entropy(z[:, :-2], y[:, 2:], w[:, 2:]))
    assert "loss.oracle" in report.failed
    means = report["loss.oracle"].values
    assert min(means, key=means.get) == "+2"


def flattened(logits, tokens, weights):
    """The shift comes after flattening."""
    flat = logits.reshape(1, -1, logits.shape[-1])[:, :-1]
    return cross_entropy(flat, tokens.reshape(1, -1)[:, 1:], weights.reshape(1, -1)[:, 1:])


@pytest.mark.fault(3, "loss.row_crossing")
def test_shift_crosses_rows():
    report = examine(flattened)
    assert "loss.row_crossing" in report.failed
    assert "loss.oracle" not in report.failed


def test_labels_rolled_around():
    report = examine(lambda z, y, w: cross_entropy(z, jnp.roll(y, -1, 1), jnp.roll(w, -1, 1)))
    assert "loss.row_crossing" in report.failed


@pytest.mark.fault(4, "loss.padding")
def test_padding_is_a_target():
    report = examine(lambda z, y, w: cross_entropy(z[:, :-1], y[:, 1:], jnp.ones_like(w)[:, 1:]))
    assert {"loss.padding", "loss.definition", "loss.nothing_scored"} <= set(report.failed)


@pytest.mark.fault(5, "loss.definition")
def test_padding_in_the_sum_alone():
    def loss(z, y, w):
        nats = optax.softmax_cross_entropy_with_integer_labels(z[:, :-1], y[:, 1:])
        return nats.sum(), w[:, 1:].sum()

    report = examine(loss)
    assert {"loss.definition", "loss.padding"} <= set(report.failed)
    off = report["loss.definition"].values
    assert max(x for name, x in off.items() if "mean of equal logits" in name) > 1
    assert not any("no padding" in name for name in off)


@pytest.mark.fault(5, "loss.definition")
def test_padding_in_the_count_alone():
    def loss(z, y, w):
        return REAL["float32"](z, y, w)[0], 1.0 * w[:, 1:].size

    report = examine(loss)
    assert {"loss.definition", "loss.padding"} <= set(report.failed)
    assert any("count of equal logits" in name for name in report["loss.definition"].values)


@pytest.mark.fault(6, "loss.split")
def test_sum_is_backpropagated():
    """What is differentiated is the sum: the count that divides it is 1."""
    report = examine(lambda z, y, w: (REAL["float32"](z, y, w)[0], jnp.ones(())))
    assert {"loss.split", "loss.definition"} <= set(report.failed)


@pytest.mark.fault(44, "loss.split")
def test_mean_of_rows():
    """Every row counts the same, however many tokens it has."""

    def loss(z, y, w):
        totals, counts = jax.vmap(lambda *row: REAL["float32"](*(x[None] for x in row)))(z, y, w)
        return (totals / counts).mean() * counts.sum(), counts.sum()

    report = examine(loss)
    assert {"loss.split", "loss.nothing_scored", "loss.definition"} <= set(report.failed)


@pytest.mark.fault(8, "loss.nothing_scored")
def test_zero_over_zero():
    def loss(z, y, w):
        total, count = REAL["float32"](z, y, w)
        return total / count * count, count

    report = examine(loss)
    assert report.failed == ["loss.nothing_scored"]
    assert "nan" in report["loss.nothing_scored"].evidence


@pytest.mark.fault(9, "loss.label_range", "warn")
def test_labels_wrap():
    """Labels are kept as they are; -100 indexes token V - 100."""

    def loss(z, y, w):
        z, y, w = z[:, :-1], jnp.where(w[:, 1:] > 0, y[:, 1:], 0), w[:, 1:]
        z = jnp.where(w[..., None] > 0, z, 0).astype(jnp.float32)
        return (plain(z, y, w) * w).sum(), w.sum()

    report = examine(loss)
    assert not report.failed and report.warned == ["loss.label_range"]
    assert report["loss.label_range"].values == {
        "-1": f"scored as token {V - 1}",
        "-100": f"scored as token {V - 100}",
        f"{V}": "not a number",
        f"{V + 7}": "not a number",
    }


@pytest.mark.fault(9, "loss.label_range", "warn")
@pytest.mark.parametrize("how", ["clipped", "one_hot"])
def test_labels_clipped_or_without_a_one_hot(how):
    def nats(z, y, w):
        return plain(z, jnp.clip(y, 0, V - 1), w) if how == "clipped" else one_hot_loss(z, y, w)

    def loss(z, y, w):
        masked = jnp.where(w[:, 1:] > 0, y[:, 1:], 0)
        logits = jnp.where(w[:, 1:, None] > 0, z[:, :-1], 0).astype(jnp.float32)
        return (nats(logits, masked, w) * w[:, 1:]).sum(), w[:, 1:].sum()

    report = examine(loss)
    assert not report.failed and report.warned == ["loss.label_range"]


@pytest.mark.fault(9, "loss.label_range", "warn")
def test_an_ignored_label_reaches_the_loss():
    """The product masks the sum, but label V has made it NaN before."""

    def loss(z, y, w):
        nats = plain(z[:, :-1].astype(jnp.float32), y[:, 1:], w)
        return (nats * w[:, 1:]).sum(), w[:, 1:].sum()

    report = examine(loss)
    assert not report.failed and report.warned == ["loss.masked", "loss.label_range"]
    hazards = str(report["loss.masked"].values)
    assert f"labels of {V} " in hazards and "logits of nan" in hazards
    assert "labels of -100" not in hazards  # its product with 0 is 0


@pytest.mark.fault(11, "loss.definition")
def test_label_smoothing_is_reported():
    def nats(z, y, w, epsilon=0.01):
        smooth = optax.smooth_labels(jax.nn.one_hot(y, z.shape[-1]), epsilon)
        return optax.softmax_cross_entropy(z, smooth)

    report = examine(shifted(nats))
    assert "loss.definition" in report.failed
    assert any("preferred by 50" in name for name in report["loss.definition"].values)
    assert "loss.oracle" not in report.failed


@pytest.mark.fault(11, "loss.definition")
def test_auxiliary_loss_is_reported():
    def nats(z, y, w):
        return plain(z, y, w) + 1e-4 * jax.nn.logsumexp(z, axis=-1) ** 2

    report = examine(shifted(nats))
    assert "loss.definition" in report.failed
    off = str(report["loss.definition"].values)
    assert "equal logits" in off and "preferred by 50" in off and "gradient" in off


def short(z, y, w):
    """The logits' own type all the way."""
    in_range(y, w, V)
    y, w = jnp.where(w > 0, y, 0)[:, 1:], w[:, 1:]
    z = jnp.where(w[..., None] > 0, z[:, :-1], 0)
    return (plain(z, y, w) * w).sum(), w.sum()


@pytest.mark.fault(12, "loss.dtype")
@pytest.mark.parametrize("seed", thirds(range(3)))
def test_loss_in_bfloat16(seed):
    report = examine(lambda z, y, w: short(z.astype(jnp.bfloat16), y, w), seed=seed)
    assert "loss.dtype" in report.failed


def test_a_plain_loss_is_only_warned_of_bfloat16_logits():
    report = examine(short)
    assert not report.failed and report.warned == ["loss.dtype"]


@pytest.mark.fault(12, "loss.dtype")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_in_a_short_type(dtype):
    def loss(z, y, w):
        total, count = REAL["float32"](z, y, w)
        return total.astype(dtype), count.astype(dtype)

    report = examine(loss)
    assert {"loss.dtype", "loss.definition"} <= set(report.failed)
    assert report["loss.dtype"].values["short types, many tokens"] == [dtype]


@pytest.mark.fault(55, "loss.extreme_logits")
def test_where_hides_the_logarithm_of_zero():
    """Masked positions take log(0) and hide it in the value, not in the gradient."""

    def loss(z, y, w):
        in_range(y, w, V)
        y, w = jnp.where(w > 0, y, 0)[:, 1:], w[:, 1:]
        z = z[:, :-1].astype(jnp.float32)
        p = jax.nn.softmax(z)
        picked = jnp.take_along_axis(p, y[..., None], -1)[..., 0]
        # A scored token of probability 0 costs its margin; only the masked ones hide log(0).
        margin = z.max(-1) - jnp.take_along_axis(z, y[..., None], -1)[..., 0]
        nats = jnp.where(picked > 0, -jnp.log(picked), margin)
        return jnp.where(w > 0, nats * w, 0).sum(), w.sum()

    report = examine(loss)
    finding = report["loss.extreme_logits"]
    assert finding.status == "fail"
    assert "target on top" in finding.values["gradients with NaN or inf"]
    assert [v for name, v in finding.values.items() if "error of the sum" in name] == [0]


@pytest.mark.fault(94, "loss.extreme_logits")
def test_epsilon_outside_the_softmax():
    def nats(z, y, w):
        p = jnp.take_along_axis(jax.nn.softmax(z), y[..., None], -1)[..., 0]
        return -jnp.log(p + 1e-8)

    assert "loss.extreme_logits" in examine(shifted(nats)).failed


def test_weights_taken_for_a_mask():
    def loss(z, y, w):
        return REAL["float32"](z, y, (w > 0).astype(jnp.float32))

    report = examine(loss)
    assert not report.failed and report.warned == ["loss.fractional_weights"]


def test_wrong_backward():
    """The forward pass is right; the hand-written backward forgets the one-hot of the target."""

    @jax.custom_vjp
    def nats(z, y):
        return plain(z, y, None)

    nats.defvjp(lambda z, y: (nats(z, y), jax.nn.softmax(z)), lambda p, g: (p * g[..., None], None))
    report = examine(shifted(lambda z, y, w: nats(z, y)))
    assert report.failed == ["loss.definition"]


# Thresholds: the weakest fault that must be seen.


def test_a_small_share_of_smoothing_is_seen(share=1e-4):
    def nats(z, y, w):
        return (1 - share) * plain(z, y, w) + share * (-jax.nn.log_softmax(z)).mean(-1)

    finding = examine(shifted(nats))["loss.definition"]
    assert finding.status == "fail" and "preferred by 50" in finding.evidence


def test_one_crossing_pair_is_seen():
    """Only the last row borders on the next: one position in the whole batch is wrong."""

    def loss(z, y, w):
        total, count = REAL["float32"](z, y, w)
        extra = cross_entropy(z[1:2, -1:], y[2:3, :1], w[2:3, :1])
        return total + extra[0], count + extra[1]

    assert "loss.row_crossing" in examine(loss, seed=1).failed


WRONG_VALUES = {
    "bits": shifted(lambda z, y, w: plain(z, y, w) / np.log(2)),
    "softmax twice": shifted(lambda z, y, w: plain(jax.nn.softmax(z), y, w)),
    "smoothing": shifted(
        lambda z, y, w: 0.9 * plain(z, y, w) - 0.1 * jax.nn.log_softmax(z).mean(-1)
    ),
    "class weights": shifted(lambda z, y, w: plain(z, y, w) * (0.5 + y / V)),
    "a mean beside the count": lambda z, y, w: (real("float32")(z, y, w)[0] / 99, w[:, 1:].sum()),
}


@pytest.mark.parametrize("name", thirds(WRONG_VALUES))
def test_a_wrong_value_is_no_shift_no_padding_and_no_rounding(name):
    report = examine(WRONG_VALUES[name])
    assert report.failed[0] == "loss.definition"
    assert not {"loss.split", "loss.dtype"} & set(report.failed)
    assert len(report["loss.definition"].evidence) < 400
    assert "loss.definition" in report["loss.dtype"].evidence


def test_scored_padding_is_no_crossing_of_rows():
    report = examine(lambda z, y, w: cross_entropy(z[:, :-1], y[:, 1:], jnp.ones_like(w)[:, 1:]))
    assert report.failed[0] == "loss.padding"


# Bad input.


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda z, y, w: 1 / 0, "ZeroDivisionError"),
        (lambda z, y, w: z.sum(), "not (sum, count)"),
        (lambda z, y, w: (z, w), "not two scalars"),
        (lambda z, y, w: ("a", "b"), "returned 'a', not an array"),
        (lambda z, y, w: None, "returned None, not (sum, count)"),
        (lambda z, y: (z.sum(), 1.0), "TypeError"),
    ],
    ids=["raises", "scalar", "arrays", "text", "none", "two_arguments"],
)
def test_bad_functions_are_reported(loss, reason):
    report = examine(loss)
    assert report["loss.contract"].status == "error" and report.failed == ["loss.contract"]
    assert reason in report["loss.contract"].evidence
    assert {f.status for f in report} == {"error", "skip"}
    assert not any(f.status == "pass" for f in report)


def test_nan_never_passes():
    report = examine(lambda z, y, w: (z.sum() * jnp.nan, w.sum()))
    assert report.failed == ["loss.contract"] and "nan" in report["loss.contract"].evidence
    assert not any(f.status == "pass" for f in report)


def test_a_refusal_of_bfloat16_is_told_and_the_rest_judged():
    def loss(z, y, w):
        if z.dtype == jnp.bfloat16:
            raise TypeError("float32 only")
        return REAL["float32"](z, y, w)

    report = examine(loss)
    assert "refused" in report["loss.dtype"].evidence
    assert "float32 only" in report["loss.dtype"].evidence
    assert quiet(report)


@pytest.mark.parametrize(
    "bad",
    [
        dict(vocab_size=1),
        dict(vocab_size=2**20),
        dict(seq_len=3),
        dict(batch_size=1),
        dict(objective="masked"),
    ],
)
def test_misuse_names_the_argument(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        examine(REAL["float32"], **bad)
    with pytest.raises(ValueError, match="loss_fn"):
        examine(None)
