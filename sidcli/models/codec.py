"""The codec of a latent diffusion model: its VAE encodes images to latents and decodes latents to images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidcli.models.drawing import check_finite


def levels_entry(config: Mapping[str, Any]) -> str:
    """Return the entry of a VAE's configuration that lists its levels; AutoencoderDC has one for each half."""
    halves = "encoder_block_out_channels"
    return halves if halves in config else "block_out_channels"


def codec_factor(config: Mapping[str, Any]) -> int:
    """Return the VAE's downsampling factor (image side / latent side), computed from its configuration."""
    return int(2 ** (len(config[levels_entry(config)]) - 1))


@dataclass(frozen=True)
class Codec:
    """A VAE with the scale and shift of its latents: latents = (encoded - shift) * scale."""

    vae: Any

    @property
    def channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """The VAE's downsampling factor: image side / latent side."""
        return codec_factor(self.vae.config)

    @property
    def scale(self) -> float:
        return float(self.vae.config.scaling_factor)

    @property
    def shift(self) -> float:
        return float(self.vae.config.get("shift_factor") or 0.0)

    def digest(self) -> str:
        """Return a SHA-256 in hex of the VAE's weights, the scale and the shift."""
        found = hashlib.sha256(repr((self.scale, self.shift)).encode())
        for name, value in self.vae.state_dict().items():
            found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def to(self, device: torch.device | str) -> Codec:
        """Move the VAE to `device` and return the codec."""
        network: nn.Module = self.vae
        network.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in -1..1 to their latents, of a distribution to the mean, float32 [B, C, h, w]."""
        found = self.vae.encode(images.to(self.vae.dtype))
        latents = found.latent if "latent" in found else found.latent_dist.mean  # AutoencoderDC has no distribution
        return (latents.float() - self.shift) * self.scale

    @torch.no_grad()
    def encode_image(self, pixels: np.ndarray) -> Tensor:
        """Return the latent [1, C, h, w] of an image uint8 [H, W, 3], on the VAE's device."""
        image = torch.tensor(pixels, device=self.vae.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        return self.encode(image)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to images float32 [B, 3, H, W] in 0..1. A value that is not finite becomes NaN."""
        value = latents / self.scale
        if self.shift:
            value = value + self.shift
        images = self.vae.decode(value.to(self.vae.dtype)).sample.float() / 2 + 0.5
        # A clamp turns infinity into 1, and that of OpenVINO turns NaN into a number. The difference is 0 for finite values.
        return images.clamp(0, 1) + (images - images)


def to_bytes(images: Tensor, prompts: Sequence[str], seeds: Sequence[int], hint: str) -> np.ndarray:
    """Convert images float32 [B, 3, H, W] in 0..1 to uint8 [B, H, W, 3].

    Raises NotFinite, with the first prompt and seed whose image has a value that is not finite.
    """
    check_finite(images.isfinite().flatten(1).all(1).tolist(), prompts, seeds, hint)
    return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
