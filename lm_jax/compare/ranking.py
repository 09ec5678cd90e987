"""Statistics of a comparison: is a gap larger than the noise of seeds and of documents?"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from lm_jax.doctor.arms.noise import noise_of_gap

_RESAMPLES = 10_000
_MOST_BLOCKS = 2_000  # of neighbouring documents, where there are more documents


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval by Student's t; NaN bounds with one seed."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def document_errors(
    nats: Mapping[str, np.ndarray], bytes_D: np.ndarray
) -> dict[frozenset[str], float]:
    """Standard error of the difference in bits per byte of each pair of arms, over documents.

    A paired bootstrap (Efron 1979; Koehn 2004): documents are drawn with replacement, the same ones
    for all arms, and the difference of sum nats / sum bytes is taken. It measures how far the gap
    depends on which documents the split happens to hold; since the nats are means over seeds, a
    little of the noise of seeds is in it too, which errs on the side of caution. Above 2,000
    documents, neighbouring ones are drawn together.

    Args:
        nats: of each document [D], mean over seeds, by arm.
        bytes_D: bytes of each document; two documents or more.
    """
    D = len(bytes_D)
    assert D > 1
    columns_DA = np.stack([*nats.values(), bytes_D * math.log(2)], axis=1)
    blocks = min(D, _MOST_BLOCKS)
    edges = np.arange(blocks) * D // blocks
    bits_RA = _resampled(np.add.reduceat(columns_DA, edges))
    # The bootstrap divides a sum of squares by n, where a sample's variance has n - 1.
    factor = math.sqrt(blocks / (blocks - 1))
    return {
        frozenset((a, b)): float(factor * np.std(bits_RA[:, i] - bits_RA[:, j]))
        for (i, a), (j, b) in itertools.combinations(enumerate(nats), 2)
    }


def _resampled(columns_DA: np.ndarray) -> np.ndarray:
    """Sums over resampled rows, each divided by that of the last column: [resamples, A - 1]."""
    rng, D, at_once = np.random.default_rng(0), len(columns_DA), 500
    first = D * np.arange(at_once)[:, None]
    parts = []
    for _ in range(_RESAMPLES // at_once):
        drawn = rng.integers(0, D, (at_once, D)) + first
        times_RD = np.bincount(drawn.ravel(), minlength=at_once * D).reshape(at_once, D)
        parts.append(times_RD.astype(float) @ columns_DA)
    sums_RA = np.concatenate(parts)
    return sums_RA[:, :-1] / sums_RA[:, -1:]


def judge(better: np.ndarray, worse: np.ndarray, over_documents: float | None) -> dict[str, Any]:
    """Decide whether the gap between two arms exceeds the noise of seeds and documents.

    The rule is `lm_jax.doctor.arms.noise.noise_of_gap`, the error over documents being known. Equal
    seeds are not paired: they share only the order of the data, and pairing them would make the
    error larger.

    Args:
        better: bits per byte by seed of the arm with the lower mean.
        worse: those of the other one.
        over_documents: standard error, see `document_errors`; None if it is not known.

    Returns:
        The values of a pair in `compare.json`, without the names.
    """
    gap = float(worse.mean() - better.mean())
    over_seeds, noise = noise_of_gap(better, worse), None
    reason = "one seed" if over_seeds is None else "noise over documents unknown"
    if over_documents is not None:
        noise = noise_of_gap(better, worse, known=over_documents)
    verdict, low, high = "not ranked", None, None
    if noise is not None:
        verdict = "separated" if gap > noise.needed * noise.error else "not distinguishable"
        low, high = gap - noise.t * noise.error, gap + noise.t * noise.error
        reason = "no noise"
        if noise.error:
            reason = f"{gap / noise.error:.1f} SE, {noise.needed:.1f} needed"
    return {
        "gap_bits_per_byte": gap,
        "standard_error_seeds": over_seeds and over_seeds.error,
        "standard_error_documents": over_documents,
        "standard_error": noise and noise.error,
        "degrees_of_freedom": noise and noise.freedom,
        "needed_standard_errors": noise and noise.needed,
        "gap_low95": low,
        "gap_high95": high,
        "verdict": verdict,
        "reason": reason,
    }


def rank(names: Sequence[str], separated: set[frozenset[str]]) -> list[list[str]]:
    """Names in groups, best first; all arms of a group are separated from all of later groups."""
    groups: list[list[str]] = []
    for i, name in enumerate(names):
        pairs = itertools.product(names[:i], names[i:])
        if separated.issuperset(frozenset(pair) for pair in pairs):
            groups.append([])
        groups[-1].append(name)
    return groups
