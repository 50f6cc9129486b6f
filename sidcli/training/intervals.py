"""How often the training loop does what is not a step."""

from __future__ import annotations

from dataclasses import dataclass

KEEP = 2
"""Checkpoints that stay, unless told."""


@dataclass(frozen=True)
class Intervals:
    """How often the loop saves, samples, logs and evaluates, in steps; changes nothing that is computed."""

    save: int = 100
    sample: int = 50
    save_seconds: float = 480.0
    """A checkpoint is begun no later than this after the one before: eight minutes, and what is left of ten is to write it."""
    log: int = 10
    eval: int = 0
    """0: never."""
    keep: int = KEEP
    """Checkpoints that stay."""
