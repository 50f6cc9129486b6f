"""The processes that train together: who I am, who shares a gradient, who writes. One process alone needs none of it.

`accelerate` does the work (DDP, or FSDP2 for networks that outgrow one card); a process group is there when WORLD_SIZE says so,
which is what `accelerate launch`, torchrun and `sid distill --processes` set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Team:
    """This process among `count`; `shard` splits weights, gradients and optimizer state over all of them (FSDP2)."""

    def __init__(self, device: torch.device, shard: bool = False):
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.accelerator: Accelerator | None = None
        self.device = device
        if self.count > 1:
            self.accelerator = _accelerator(device, shard)
            self.device = self.accelerator.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, samples: range) -> range:
        """The samples of a global batch that this process computes: equal, contiguous parts."""
        size = len(samples) // self.count
        return samples[self.rank * size : (self.rank + 1) * size]

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The network to call where gradients are to be shared, and its optimizer."""
        if self.accelerator is None:
            return net, optimizer
        return self.accelerator.prepare(net, optimizer)

    @contextmanager
    def gradients(self, net: nn.Module, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients travel between the processes at the last one of a step only."""
        if self.accelerator is None or last:
            yield
            return
        with self.accelerator.no_sync(net):
            yield

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same tensor on each of them."""
        return value if self.accelerator is None else self.accelerator.reduce(value, "sum")

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def _accelerator(device: torch.device, shard: bool) -> Accelerator:
    from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin

    options: dict[str, Any] = {"mixed_precision": "no", "cpu": device.type == "cpu"}
    if shard:
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    return Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)], **options
    )


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts, on the CPU; every process must ask."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)
