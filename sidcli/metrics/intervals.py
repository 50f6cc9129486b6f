"""95 % intervals of averages over images. They cover the sampling of images, not the variation between training runs."""

from __future__ import annotations

import numpy as np

from sidcli.metrics.catalog import Measured

Z = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


def mean(values: np.ndarray) -> Measured:
    """Return the mean of one number per image, [n], with the interval of the normal approximation."""
    center = float(values.mean())
    return around(center, float(values.std(ddof=1) / len(values) ** 0.5))


def share(hits: np.ndarray) -> Measured:
    """Return the share of images that have a property, bool [n], with Wilson's interval, whose width is not 0 at 0 and 1."""
    count, value = len(hits), float(hits.mean())
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
