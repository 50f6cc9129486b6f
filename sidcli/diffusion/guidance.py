"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from torch import Tensor


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return out(x, "") + kappa (out(x, c) - out(x, "")) for predictions [B, ...]; kappa is the guidance scale `scale`."""
    return unconditional + scale * (conditional - unconditional)
