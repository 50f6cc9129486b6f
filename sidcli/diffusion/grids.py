"""The timesteps of sampling, and the kinds of noise between them. Imports no torch, because exported graphs draw without it."""

from __future__ import annotations

from typing import Literal

Renoise = Literal["ddim", "fixed", "fresh"]


def exit_grid(t_init: int, steps: int) -> tuple[int, ...]:
    """Return the timesteps of a student with `steps` steps: t_init (1 - i / steps), rounded down.

    Four steps from t_init 625 are 625, 468, 312, 156. A student that was trained with a random exit (arXiv 2505.12674) may stop
    after any of its timesteps.
    """
    return tuple(t_init * (steps - index) // steps for index in range(steps))


def trailing_grid(timesteps: int, steps: int) -> tuple[int, ...]:
    """Return `steps` evenly spaced timesteps from T - 1, where x_t is only noise, down to T / steps - 1; T is `timesteps`."""
    return tuple(round(timesteps * (steps - index) / steps) - 1 for index in range(steps))
