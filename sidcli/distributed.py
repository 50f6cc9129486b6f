"""The group of processes that train together: ranks, parts of the batch, gradient synchronization and sharding.

`accelerate` starts the group and runs DDP. Networks that do not fit on one GPU are sharded with torch's FSDP2 directly, because
accelerate supports FSDP2 only on GPUs. A group exists if WORLD_SIZE is above 1, as set by torchrun, `accelerate launch` or `sid
distill --processes`. A process without a group skips all communication, and does not import FSDP2, which takes two seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sidcli.environment import group
from sidcli.errors import EnvironmentProblem
from sidcli.optimizer import is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator


def count() -> int:
    """Return the number of processes in the group of this process."""
    return group().count


def check_cards(device_type: str, processes: int) -> None:
    """Raises EnvironmentProblem if several processes of this machine would have to share a GPU, which NCCL does not support."""
    if device_type != "cuda" or torch.distributed.is_initialized():  # the caller initialized the group with its own backend
        return
    cards = torch.cuda.device_count()
    if processes > cards:
        raise EnvironmentProblem(
            f"{processes} processes on this machine need {processes} GPUs; it has {cards}", f"--processes {max(1, cards)}"
        )


@dataclass(frozen=True)
class Share:
    """Part `rank` of `count` equal parts of a workload."""

    rank: int = 0
    count: int = 1


class Distributed:
    """This process in a group of `count`. `shard` splits weights, gradients and optimizer state over the group (FSDP2)."""

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
        """The part of a workload that this process computes."""
        return Share(self.rank, self.count)

    @property
    def is_main(self) -> bool:
        """Whether this process has rank 0, which writes files and prints."""
        return self.rank == 0

    def share(self, samples: range) -> range:
        """Return the samples of a global batch that this process computes: contiguous parts of equal size."""
        size = len(samples) // self.count
        return samples[self.rank * size : (self.rank + 1) * size]

    def split(self, net: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Shard the weights of a network, block by block, if `shard` is set. Call it before the optimizer is created."""
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for part in (*blocks, net):
                fully_shard(part)

    def reshard(self, net: nn.Module) -> None:
        """Drop the full weights that a forward pass without a backward pass leaves behind. Call it before the weights are changed."""
        if hasattr(net, "reshard"):  # a method of the class that FSDP2 gives to a sharded module
            net.reshard()  # type: ignore[operator]

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the module to call in forward passes whose gradients are averaged over the processes, and its optimizer."""
        if self.accelerator is None or self.sharded:
            return net, optimizer
        return self.accelerator.prepare(net, optimizer)

    @contextmanager
    def gradients(self, net: nn.Module, last: bool) -> Iterator[None]:
        """Context of one micro-batch's forward and backward. Only the last micro-batch of an update synchronizes gradients."""
        if hasattr(net, "set_requires_gradient_sync"):  # a method of the class that FSDP2 gives to a sharded module
            net.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif self.accelerator is None or last:
            yield
        else:
            with self.accelerator.no_sync(net):
                yield

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; every process gets the same tensor."""
        return value if self.accelerator is None else self.accelerator.reduce(value, "sum")

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def whole(value: Tensor, copy: bool = False) -> Tensor:
    """Return a full tensor on the CPU; every process must call this if it is sharded. With `copy` it shares no memory with
    `value`."""
    value = value.detach()
    if is_sharded(value):
        from torch.distributed.tensor import Replicate

        value = value.redistribute(placements=[Replicate()] * value.device_mesh.ndim).to_local()
    return value.to("cpu", copy=copy)


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a tensor that may be sharded."""
    with torch.no_grad():
        if is_sharded(target):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)
