"""Intervals between checkpoints, samples, log records and evaluations of the training loop."""

from __future__ import annotations

from dataclasses import dataclass

KEEP = 2
"""Default number of checkpoints to keep."""


@dataclass(frozen=True)
class Intervals:
    """Steps between checkpoints, samples, log records and evaluations. They do not affect what is computed."""

    save: int = 100
    sample: int = 50
    save_seconds: float = 480.0
    """Maximum seconds between the starts of two checkpoints: eight minutes, so that a checkpoint is on disk within ten minutes."""
    log: int = 10
    eval: int = 0
    """0: no evaluation."""
    keep: int = KEEP
    """Checkpoints to keep."""
