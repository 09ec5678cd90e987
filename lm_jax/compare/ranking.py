"""What of a comparison stands out of the noise of seeds and of documents."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

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
    """Whether the gap between two arms stands out of the noise of seeds and documents.

    The error over seeds is Welch's (1947): arms may vary differently. Equal seeds are not paired:
    all they share is the order of the data, and to leave out what that has in common makes the
    error larger. The error over documents is added as a known one; the degrees of freedom follow
    from Welch-Satterthwaite. The gap must exceed 2 standard errors or, where few seeds leave their
    noise uncertain, the 97.5 % point of Student's t times the standard error.

    Args:
        better: bits per byte by seed of the arm with the lower mean.
        worse: those of the other one.
        over_documents: standard error, see `document_errors`; None if it is not known.

    Returns:
        The values of a pair in `compare.json`, but for the names.
    """
    gap = float(worse.mean() - better.mean())
    seeds = np.array([len(better), len(worse)])
    result: dict[str, Any] = {
        "gap_bits_per_byte": gap,
        "standard_error_seeds": None,
        "standard_error_documents": over_documents,
        "standard_error": None,
        "degrees_of_freedom": None,
        "needed_standard_errors": None,
        "gap_low95": None,
        "gap_high95": None,
        "verdict": "not ranked",
    }
    if seeds.min() < 2:
        return result | {"reason": "one seed"}
    variances = np.array([better.var(ddof=1), worse.var(ddof=1)]) / seeds
    result["standard_error_seeds"] = math.sqrt(variances.sum())
    if over_documents is None:
        return result | {"reason": "noise over documents unknown"}
    error = math.sqrt(variances.sum() + over_documents**2)
    uncertain = float((variances**2 / (seeds - 1)).sum())
    freedom = error**4 / uncertain if uncertain else math.inf
    t = float(stdtrit(min(freedom, 1e6), 0.975))
    needed = max(2.0, t)
    separated = gap > needed * error
    return result | {
        "standard_error": error,
        "degrees_of_freedom": freedom,
        "needed_standard_errors": needed,
        "gap_low95": gap - t * error,
        "gap_high95": gap + t * error,
        "verdict": "separated" if separated else "not distinguishable",
        "reason": f"{gap / error:.1f} SE, {needed:.1f} needed" if error else "no noise",
    }


def rank(names: Sequence[str], separated: set[frozenset[str]]) -> list[list[str]]:
    """Names, best first, cut wherever all before are separated from all behind."""
    groups: list[list[str]] = []
    for i, name in enumerate(names):
        pairs = itertools.product(names[:i], names[i:])
        if separated.issuperset(frozenset(pair) for pair in pairs):
            groups.append([])
        groups[-1].append(name)
    return groups
