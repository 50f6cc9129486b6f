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


def consistency_grid(t_init: int, solver_steps: int, steps: int) -> tuple[int, ...]:
    """Return the timesteps of multistep consistency sampling from `t_init`, those of LCMScheduler in diffusers.

    The timesteps of the solver are k - 1, 2 k - 1, ..., t_init with k = (t_init + 1) / solver_steps. The grid has `steps` evenly
    spaced ones of them. Four of 50 steps from t_init 999 are 999, 759, 499, 259.
    """
    k = (t_init + 1) // solver_steps
    # Floating point as in diffusers, whose rounding decides some timesteps, such as those of 22 of 30 steps.
    return tuple(k * (solver_steps - int(index * (solver_steps / steps))) - 1 for index in range(steps))
