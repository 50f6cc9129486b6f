"""Intervals between checkpoints, samples, log records and evaluations of the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from sidcli.errors import UsageError

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
    keep_best: bool = False
    """Also keep the checkpoint of the best evaluation, and write the student from it."""

    def __post_init__(self) -> None:
        if self.keep_best and not self.eval:
            raise UsageError("--keep-best selects by the measurements of --eval-every, which is 0", "--eval-every 50")

    @property
    def checkpoints(self) -> int:
        """Largest number of checkpoints that stay on disk."""
        return self.keep + self.keep_best
