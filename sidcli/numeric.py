"""Conversion of numbers of other libraries, such as numpy's scalars, to Python's own."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def plain(value: Any, kind: type) -> Any:
    """Return a number as `kind`, int or float, if its value stays the same; otherwise return `value` unchanged.

    A boolean is not a number.
    """
    if isinstance(value, bool):
        return value
    if kind is int and isinstance(value, Integral):
        return int(value)
    if kind is float and isinstance(value, Real):
        try:
            converted = float(value)
        except OverflowError:
            return value
        return converted if converted == value or converted != converted else value  # NaN is not equal to itself
    return value
