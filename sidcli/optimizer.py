"""Adam without a first moment where beta1 is 0, as SiD trains with (arXiv 2406.01561): a third less state than torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam


def local(value: Tensor) -> Tensor:
    """The part of a tensor that lives in this process; the tensor itself where nothing is sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


class Adam(torch.optim.Optimizer):
    """Equals torch.optim.AdamW, fused, on the CPU and on CUDA. With beta1 = 0 it keeps no first moment.

    `found_inf`, a tensor of one element, may be set before `step()`: the update is left out where it is 1, decided on the device.
    With `offload` the moments stay in the main memory and the update is computed there: gradients and weights travel once a
    step, which a large accumulated batch makes cheap.
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
            # One network at once is quickest; where everything travels, one tensor at once needs the least room.
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
            # With beta1 = 0 the first moment is the gradient, so the gradient may stand in for it.
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
