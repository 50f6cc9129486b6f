"""Denoisers that take a reference image beside the prompt (Diffusion Self-Distillation, arXiv 2411.18616), and their layouts.

Such a denoiser has the entry `reference_layout` in its configuration. It denoises a canvas: two frames side by side, of which the
first shows the subject of the reference and the second is the image that is drawn. The clean latents of the reference enter through
input channels of their own, whose weights start at zero, so that training starts at the teacher's predictions.

A layout says how the canvas passes through the network:

- `frames`: the frames are two images of the batch, and their self-attention is shared, as in a video model (section 3.2 of the paper);
- `diptych`: the canvas is one wide image, as in the code that the authors released;
- `channels`: the canvas is the drawn frame alone, as in InstructPix2Pix (arXiv 2211.09800), a baseline of the paper.

A denoiser without a reference gets zeros for its latents. Its training sees them too, which makes guidance on the reference possible.

With `frames`, a denoiser draws from several references of one subject, too: each is a frame of its own.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

ENTRY = "reference_layout"
"""Entry of a denoiser's configuration with the name of its layout."""
COUNT = "reference_count"
"""Entry of a denoiser's configuration with the number of references of an image. It is 1 except while several are used."""

Network = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""(Input [B', C', h, w'], function that repeats a tensor of the batch [B, ...] for it [B', ...]) -> output [B', C, h, w']."""


@dataclass(frozen=True)
class Layout(ABC):
    """How a canvas of B pairs passes through a network. A frame is the latent of one image, [B, C, h, w]."""

    references: int = 1
    """Number of references of an image, K. Their latents are side by side, [B, C, h, K w]."""
    name: ClassVar[str]
    several: ClassVar[bool] = False
    """Whether an image can have more than one reference."""

    @property
    def frames(self) -> int:
        """Number of frames of the canvas, side by side. The last one is drawn."""
        return self.references + 1

    @abstractmethod
    def channels(self, latent: int) -> int:
        """Return the number of input channels of a network for latents with `latent` channels."""

    @abstractmethod
    def run(self, network: Network, canvas: Tensor, reference: Tensor) -> Tensor:
        """Return the network's prediction for a canvas [B, C, h, frames w] with the references [B, C, h, K w]."""

    def canvas(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape of a canvas for frames of this shape."""
        channels, height, width = shape
        return channels, height, width * self.frames

    def join(self, reference: Tensor, target: Tensor) -> Tensor:
        """Return the canvas [B, C, h, frames w] of references and a drawn frame."""
        return torch.cat([reference, target], -1) if self.frames > 1 else target

    def target(self, canvas: Tensor) -> Tensor:
        """Return the drawn frame [B, C, h, w] of a canvas."""
        return canvas.chunk(self.frames, -1)[-1]

    def nothing(self, canvas: Tensor) -> Tensor:
        """Return what a network gets for a canvas without references: zeros [B, C, h, K w]."""
        return torch.zeros_like(self.target(canvas)).repeat(1, 1, 1, self.references)

    def known(self, references: Tensor) -> Tensor:
        """Return what a network is told of a canvas [B, C + 1, h, frames w]: the latents of the references, and where they are."""
        given = torch.cat([references, torch.ones_like(references[:, :1])], 1)
        return torch.cat([given, torch.zeros_like(given.chunk(self.references, -1)[0])], -1)


class Channels(Layout):
    name = "channels"

    @property
    def frames(self) -> int:
        return 1

    def channels(self, latent: int) -> int:
        return 2 * latent

    def run(self, network: Network, canvas: Tensor, reference: Tensor) -> Tensor:
        return network(torch.cat([canvas, reference], 1), lambda value: value)


class Diptych(Layout):
    name = "diptych"

    def channels(self, latent: int) -> int:
        return 2 * latent + 1

    def run(self, network: Network, canvas: Tensor, reference: Tensor) -> Tensor:
        return network(torch.cat([canvas, self.known(reference)], 1), lambda value: value)


class Frames(Layout):
    name, several = "frames", True

    def channels(self, latent: int) -> int:
        return 2 * latent + 1

    def run(self, network: Network, canvas: Tensor, reference: Tensor) -> Tensor:
        wide = torch.cat([canvas, self.known(reference)], 1)
        rows = torch.stack(wide.chunk(self.frames, -1), 1).flatten(0, 1)
        output = network(rows, lambda value: value.repeat_interleave(self.frames, 0))
        return torch.cat(output.unflatten(0, (-1, self.frames)).unbind(1), -1)


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Diptych(), Frames(), Channels())}


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """Return the layout of a denoiser's configuration; None if it takes no reference."""
    name = config.get(ENTRY)
    return replace(LAYOUTS[name], references=config.get(COUNT, 1)) if name else None


class SharedAttention(AttnProcessor2_0):  # type: ignore[misc]
    """Self-attention over the tokens of `count` consecutive images of a batch together. Cross-attention is that of each image."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        shared = hidden_states.unflatten(0, (-1, self.count)).flatten(1, 2)
        return super().__call__(attn, shared, None, *args, **kwargs).unflatten(1, (self.count, -1)).flatten(0, 1)


def share_attention(net: Any, count: int) -> None:
    """Let the self-attention of a UNet see `count` consecutive images of a batch together."""
    for module in net.modules():
        if isinstance(module, Attention):
            module.set_processor(SharedAttention(count))


def widen(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Return a copy of a convolution with more input channels, whose weights are zero."""
    wider = copy.deepcopy(conv)
    wider.in_channels = channels
    wider.weight = nn.Parameter(conv.weight.new_zeros(conv.out_channels, channels, *conv.kernel_size))
    with torch.no_grad():
        wider.weight[:, : conv.in_channels] = conv.weight
    return wider
