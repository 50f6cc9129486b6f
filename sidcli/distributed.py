"""The processes that train together: who I am, who shares a gradient, who writes. One process alone needs none of it.

`accelerate` starts the group and runs DDP; networks that outgrow one card are sharded with torch's FSDP2 itself, because accelerate
only offers it on GPUs. A group is there when WORLD_SIZE says so, which `accelerate launch`, torchrun and `sid distill --processes` set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from sidcli.environment import group
from sidcli.errors import EnvironmentProblem

if TYPE_CHECKING:
    from accelerate import Accelerator


def count() -> int:
    """Processes of the group this one belongs to."""
    return group().count


def check_cards(device_type: str, processes: int) -> None:
    """Raises EnvironmentProblem where several processes of this machine would have to share a GPU, which NCCL refuses."""
    if device_type != "cuda" or torch.distributed.is_initialized():  # whoever began the group has chosen another backend
        return
    cards = torch.cuda.device_count()
    if processes > cards:
        raise EnvironmentProblem(
            f"{processes} processes on this machine need {processes} GPUs; it has {cards}", f"--processes {max(1, cards)}"
        )


@dataclass(frozen=True)
class Share:
    """One of `count` equal parts of some work."""

    rank: int = 0
    count: int = 1


class Distributed:
    """This process among `count`; `shard` splits weights, gradients and optimizer state over all of them (FSDP2)."""

    def __init__(self, device: torch.device, shard: bool = False):
        here = group()
        self.rank, self.count = here.rank, here.count
        self.accelerator: Accelerator | None = None
        self.device, self.sharded = device, shard and self.count > 1
        if self.count > 1:
            check_cards(device.type, here.local_count)
            from accelerate import Accelerator, DistributedDataParallelKwargs

            kwargs = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
            self.accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu", kwargs_handlers=[kwargs])
            self.device = self.accelerator.device

    @property
    def part(self) -> Share:
        """The part of any work that this process does."""
        return Share(self.rank, self.count)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, samples: range) -> range:
        """The samples of a global batch that this process computes: equal, contiguous parts."""
        size = len(samples) // self.count
        return samples[self.rank * size : (self.rank + 1) * size]

    def split(self, net: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Under `shard`, leave each process its part of the weights of a network and its blocks; before an optimizer sees them."""
        if self.sharded:
            for part in (*blocks, net):
                fully_shard(part)

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The network to call where gradients are to be shared, and its optimizer."""
        if self.accelerator is None or self.sharded:
            return net, optimizer
        return self.accelerator.prepare(net, optimizer)

    @contextmanager
    def gradients(self, net: nn.Module, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients travel between the processes at the last one of a step only."""
        if isinstance(net, FSDPModule):
            net.set_requires_gradient_sync(last)
            yield
        elif self.accelerator is None or last:
            yield
        else:
            with self.accelerator.no_sync(net):
                yield

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same tensor on each of them."""
        return value if self.accelerator is None else self.accelerator.reduce(value, "sum")

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def whole(value: Tensor, copy: bool = False) -> Tensor:
    """A tensor with all its parts, on the CPU; every process must ask. With `copy` it is nobody else's, wherever it was."""
    value = value.detach()
    if isinstance(value, DTensor):
        value = value.redistribute(placements=[Replicate()] * value.device_mesh.ndim).to_local()
    return value.to("cpu", copy=copy)


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)
