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


def shifted(share: float, shift: float) -> float:
    """Return shift s / (1 + (shift - 1) s), the time in 0 .. 1 of the evenly spaced time s (equation 23 of arXiv 2403.03206)."""
    return shift * share / (1.0 + (shift - 1.0) * share)


def even_shares(steps: int) -> tuple[float, ...]:
    """Return the evenly spaced times 1, ..., 1 / steps of a student of flow matching, before the shift."""
    return tuple(1.0 - index / steps for index in range(steps))


def flow_grid(timesteps: int, shift: float, steps: int) -> tuple[float, ...]:
    """Return the timesteps of a student of flow matching with `steps` steps from pure noise. Four of 1000 at shift 3 are 1000, 900,
    750, 500."""
    return tuple(timesteps * shifted(share, shift) for share in even_shares(steps))


def flow_teacher_grid(timesteps: int, shift: float, steps: int) -> tuple[float, ...]:
    """Return the timesteps at which FlowMatchEulerDiscreteScheduler of diffusers draws in `steps` steps.

    It shifts evenly spaced times from 1 down to its smallest one, which is itself shifted.
    """
    smallest = shifted(1.0 / timesteps, shift)
    shares = [1.0 + (smallest - 1.0) * index / max(1, steps - 1) for index in range(steps)]
    return tuple(timesteps * shifted(share, shift) for share in shares)


def consistency_grid(t_init: int, solver_steps: int, steps: int) -> tuple[int, ...]:
    """Return the timesteps of multistep consistency sampling from `t_init`, those of LCMScheduler in diffusers.

    The timesteps of the solver are k - 1, 2 k - 1, ..., t_init with k = (t_init + 1) / solver_steps. The grid has `steps` evenly
    spaced ones of them. Four of 50 steps from t_init 999 are 999, 759, 499, 259.
    """
    k = (t_init + 1) // solver_steps
    # Floating point as in diffusers, whose rounding decides some timesteps, such as those of 22 of 30 steps.
    return tuple(k * (solver_steps - int(index * (solver_steps / steps))) - 1 for index in range(steps))
