"""The rule by which a gap between two arms counts as more than noise."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit


class Noise(NamedTuple):
    """The noise of the difference between the means of two samples."""

    error: float  # standard error of the difference
    freedom: float  # degrees of freedom of that error; infinite for a known one
    t: float  # 97.5 % point of Student's t: the 95 % interval is the gap +- t * error
    needed: float  # the gap must exceed so many standard errors


def noise_of_gap(a: np.ndarray, b: np.ndarray, *, known: float = 0.0) -> Noise | None:
    """The noise of the difference between the means of two samples; None with one value in either.

    This is Welch's test (1947): the samples may vary differently, and the degrees of freedom follow
    from Welch-Satterthwaite. The gap must exceed t standard errors, and never fewer than 2.

    Args:
        a: the losses of one arm, one per seed [S].
        b: those of the other one [S'].
        known: a further standard error of the gap, which is known rather than estimated.
    """
    sizes = np.array([len(a), len(b)])
    if sizes.min() < 2:
        return None
    variances = np.array([np.var(a, ddof=1), np.var(b, ddof=1)]) / sizes
    error = math.sqrt(variances.sum() + known**2)
    uncertain = float((variances**2 / (sizes - 1)).sum())
    return as_noise(error, error**4 / uncertain if uncertain else math.inf)


def as_noise(error: float, freedom: float) -> Noise:
    """The noise for a standard error with so many degrees of freedom."""
    t = float(stdtrit(min(freedom, 1e6), 0.975))
    return Noise(error, freedom, t, max(2.0, t))
