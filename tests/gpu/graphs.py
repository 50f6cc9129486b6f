"""An experiment: the passes of small networks recorded as CUDA graphs, because launching their kernels takes longer than running them.

`attach(engine)` replaces the forward of the three networks. A pass is recorded at its first use for each kind of call: with gradients of
the weights, with gradients of the input alone, or without any. The engine's step stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sidcli.engine import Engine

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Raw(nn.Module):
    """A UNet as a function of tensors that returns a tensor."""

    def __init__(self, net: nn.Module, forward: Any):
        super().__init__()
        self.net, self.call = net, forward
        self.train(net.training)

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return self.call(x, t, states).sample


class Recorder:
    def __init__(self) -> None:
        self.recorded: dict[Any, Forward] = {}

    def wrap(self, net: nn.Module) -> None:
        plain = net.forward
        first = next(net.parameters())

        def forward(x: Tensor, t: Tensor, states: Tensor, **more: Any) -> Any:
            if more:
                return plain(x, t, states, **more)
            trains = torch.is_grad_enabled() and first.requires_grad
            flows = torch.is_grad_enabled() and x.requires_grad
            key = (id(net), tuple(x.shape), trains, flows)
            if key not in self.recorded:
                self.recorded[key] = self.record(Raw(net, plain), x, t, states, trains or flows)
            return SimpleNamespace(sample=self.recorded[key](x.contiguous(), t.contiguous(), states.contiguous()))

        net.forward = forward  # type: ignore[method-assign]

    def record(self, raw: Raw, x: Tensor, t: Tensor, states: Tensor, learns: bool) -> Forward:
        samples = (
            x.detach().clone().contiguous().requires_grad_(x.requires_grad and torch.is_grad_enabled()),
            t.clone().contiguous(),
            states.detach().clone().contiguous(),
        )
        if learns:
            return torch.cuda.make_graphed_callables(raw, samples, allow_unused_input=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                raw(*samples)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = raw(*samples)

        def replay(*given: Tensor) -> Tensor:
            for place, value in zip(samples, given, strict=True):
                place.copy_(value)
            graph.replay()
            return output.clone()

        return replay


def attach(engine: Engine) -> Recorder:
    recorder = Recorder()
    for net in (engine.teacher, *(role.net for role in engine.roles.values())):
        recorder.wrap(net)
    return recorder
