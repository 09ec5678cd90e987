"""Central differences that know how far they can be trusted.

A central difference with step e is off by about e^2 (the third derivative) and by noise / e, where
the noise is what rounding adds to the function. The first is read off neighbouring steps, the
second from high differences of the function on a line: a smooth function has next to none.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lm_jax.doctor.numbers import resolution

STEPS = 10.0 ** -np.arange(1, 7.5, 0.5)
POINTS, ORDER = 13, 6  # of a line whose differences of that order show the noise


class Slope(NamedTuple):
    """A derivative along a line, by central differences."""

    value: float  # at the step with the least error bound
    bound: float  # of its error
    step: float  # that step
    values: np.ndarray  # at every step tried, largest step first


def slope(
    along: Callable[[float], float], centre: float, noise: float, steps: np.ndarray = STEPS
) -> Slope:
    """Derivative of `along` at 0, with the `noise` of its rounding and at decreasing `steps`.

    The bound adds the rounding, the change from the step before, which exceeds the truncation, and
    half the jump of the derivative if the line has a kink at 0: there no difference can decide.
    """
    ends = np.array([[along(step), along(-step)] for step in steps])
    with np.errstate(invalid="ignore", over="ignore"):  # far steps may leave the domain
        values = (ends[:, 0] - ends[:, 1]) / (2 * steps)
        # For a smooth function the one-sided slopes differ in proportion to the step.
        jumps = (ends.sum(1) - 2 * centre) / steps
        shrink = steps[1:] / steps[:-1]
        kinks = np.abs(jumps[1:] - jumps[:-1] * shrink) / (2 * (1 - shrink))
        bounds = 3 * (2 * noise / steps[1:] + np.abs(np.diff(values)) + kinks)
    best = int(np.argmin(np.where(np.isfinite(bounds), bounds, np.inf)))
    return Slope(float(values[best + 1]), float(bounds[best]), float(steps[best + 1]), values)


def rounding(along: Callable[[float], float], centre: float) -> float:
    """Standard deviation of the rounding of `along` near 0 (Hamming; More and Wild 2011).

    A function that computes in a short type stays constant over short distances: the points are
    spread until all values differ, and values that a short type holds exactly count as its own.
    Rounding is the same at every spacing, so what is a thousand times less at a fine one was the
    function itself: a kink between the points.
    """
    for spacing in (1e-3, 1e-2, 1e-1):
        values = _line(along, spacing)
        if len(set(values)) == POINTS:
            break
    noise = _noise(values)
    fine = _line(along, 1e-6)
    if len(set(fine)) == POINTS and 1e3 * _noise(fine) < noise:
        noise = _noise(fine)
    size = np.abs(values).max(initial=abs(centre))
    return float(max(noise, resolution(values) / 12**0.5 * size, 2.0**-53 * size))


def _line(along: Callable[[float], float], spacing: float) -> np.ndarray:
    return np.array([along(spacing * k) for k in range(-(POINTS // 2), POINTS // 2 + 1)])


def _noise(values: np.ndarray) -> float:
    """Standard deviation of noise on a smooth function, from high differences."""
    pascal = np.prod(np.arange(ORDER + 1, 2 * ORDER + 1) / np.arange(1, ORDER + 1))
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.sqrt((np.diff(values, ORDER) ** 2).mean() / pascal))
