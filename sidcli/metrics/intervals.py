"""95 % intervals of averages over images. They cover the sampling of images, not the variation between training runs."""

from __future__ import annotations

import math

import numpy as np

from sidcli.metrics.catalog import METRICS, Measured

Z = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


EQUAL = 1e-6
"""Difference below which numbers of images are equal up to rounding."""


def mean(values: np.ndarray, name: str) -> Measured:
    """Return the mean of one number per image, [n], with the interval of the normal approximation. `name`: that of the metric in METRICS.

    Its width is 0 if all numbers are equal, as of four images with the best score. Where the metric has a range, the interval is then
    Wilson's for the mean's place in the range: of all numbers in a range, those at its two ends vary most.
    """
    center, metric = float(values.mean()), METRICS[name]
    if np.ptp(values) < EQUAL and math.isfinite(metric.low) and math.isfinite(metric.high):
        width = metric.high - metric.low
        found = wilson(min(1.0, max(0.0, (center - metric.low) / width)), len(values))
        low, high = (metric.low + width * end for end in (found.low, found.high))
        return Measured(center, min(center, low), max(center, high))  # a cosine can exceed 1 by rounding
    return around(center, float(values.std(ddof=1) / len(values) ** 0.5))


def share(hits: np.ndarray) -> Measured:
    """Return the share of images that have a property, bool [n], with Wilson's interval, whose width is not 0 at 0 and 1."""
    return wilson(float(hits.mean()), len(hits))


def wilson(value: float, count: int) -> Measured:
    """Return a share of `count` images, 0 to 1, with Wilson's interval."""
    center = (value + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * (value * (1 - value) / count + Z**2 / (4 * count**2)) ** 0.5
    return Measured(value, max(0.0, min(value, center - half)), min(1.0, max(value, center + half)))


def jackknife(value: float, left_out: np.ndarray) -> Measured:
    """Return any statistic with its jackknife interval. `left_out` [g]: its values with one of g equal groups left out.

    The jackknife does not underestimate the spread (Efron and Stein 1981). Unlike a bootstrap, it uses no image twice in a sample.
    """
    groups = len(left_out)
    return around(value, float(((groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5))


def around(value: float, error: float) -> Measured:
    """Return a value with the interval of its standard error."""
    return Measured(value, value - Z * error, value + Z * error)
