"""Gradients of single phases of a step, for comparing the engine with itself and with the equations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sidcli.distributed import assign
from sidcli.engine import Engine


def gradient(built: Engine, phase: str = "generator") -> Tensor:
    """The flat gradient of one phase, caught before the optimizer uses it."""
    (chosen,) = [one for one in built.objective.phases(built.step) if one.role == phase]
    wrapped = built.roles[phase].optimizer
    optimizer = getattr(wrapped, "optimizer", wrapped)  # accelerate wraps it where several processes train together
    caught: list[Tensor] = []

    def catch(*_: object) -> None:
        caught.extend(full(value.grad).flatten() for group in optimizer.param_groups for value in group["params"])

    optimizer.register_step_pre_hook(catch)
    built.run_phase(chosen)
    return torch.cat(caught)


def perturbed(built: Engine, role: str = "fake_score") -> Engine:
    """With a network that differs from the teacher. A fake score that agrees with it has no gradient for the generator.

    The noise is drawn on the CPU, so that it is the same on every device.
    """
    torch.manual_seed(1)
    with torch.no_grad():
        for value in built.roles[role].net.parameters():
            noise = 0.01 * torch.randn(value.shape)
            if value.requires_grad:
                assign(value, full(value) + noise.to(value.device))
    return built


def full(value: Tensor) -> Tensor:
    """A tensor with all its parts, where it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
