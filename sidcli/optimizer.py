"""Adam without a first moment if beta1 is 0, as in SiD (arXiv 2406.01561): weights and state take a third less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.optim.adam import adam

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is split over processes. Only a DTensor has `to_local`; importing its class takes two seconds."""
    return hasattr(value, "to_local")


def local(value: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or the tensor itself if it is not sharded."""
    return value.to_local() if is_sharded(value) else value


class Adam(torch.optim.Optimizer):
    """Adam that computes the same as fused torch.optim.AdamW, on the CPU and on CUDA. With beta1 = 0 it keeps no first moment.

    `found_inf`, a tensor of one element, may be set before `step()`: the device skips the update if it is 1, so the host does not
    wait. With `offload` the moments stay in CPU memory and the update is computed there: gradients and weights are copied once per
    step, which is cheap relative to a large accumulated batch.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        offload: bool = False,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.offload = offload
        self.found_inf: Tensor | None = None
        moments = ("exp_avg", "exp_avg_sq") if betas[0] else ("exp_avg_sq",)
        for group in self.param_groups:
            for value in group["params"]:
                where = "cpu" if offload else value.device
                zeros = {name: torch.zeros_like(value, device=where, memory_format=torch.preserve_format) for name in moments}
                self.state[value] = {"step": torch.zeros((), dtype=torch.float32, device=where), **zeros}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            values = [value for value in group["params"] if value.grad is not None]
            # One call for all tensors is fastest. With `offload`, one tensor at a time needs the least memory.
            for chunk in [[value] for value in values] if self.offload else [values] if values else []:
                self._update(chunk, group)

    def _update(self, values: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[value] for value in values]
        weights, gradients = [local(value) for value in values], [local(value.grad) for value in values if value.grad is not None]
        skip = self.found_inf
        if self.offload:
            weights, gradients = ([value.cpu() for value in row] for row in (weights, gradients))
            skip = None if skip is None else skip.cpu()
        adam(
            weights,
            gradients,
            # With beta1 = 0 the first moment is the gradient, so the gradient is passed instead.
            [local(state["exp_avg"]) for state in states] if group["betas"][0] else gradients,
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=True,
            eps=group["eps"],
            maximize=False,
            fused=True,
            found_inf=skip,
        )
        if self.offload:
            for value, weight in zip(values, weights, strict=True):
                local(value).copy_(weight)
