"""Adversarial terms of objectives: a discriminator that reads the fake score's features of noised latents, real and generated.

Its loss for a logit d is softplus(-d) for real images and softplus(d) for generated ones, the binary cross-entropy with targets 1 and
0. It is averaged over the logits of an image, and summed and weighted like other losses, so it does not depend on the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sidcli.objectives.base import FAKE, Batch, Networks, Values
from sidcli.objectives.scores import denoising_gradient

if TYPE_CHECKING:
    from torch import Tensor

Outputs = tuple["Tensor", "Tensor", "Tensor"]
"""Noise [B, C, h, w] that the fake score predicts for generated images, logits [B, ...] of generated and of real images."""
Logits = Callable[["Tensor"], "Tensor"]
"""Maps what `Networks.features` returns to logits [B, ...]."""


def predict_and_judge(nets: Networks, batch: Batch, logits: Logits, scale: float = 1.0) -> Outputs:
    """Return the noise that the fake score predicts at a guidance scale, and the discriminator's logits.

    Generated and real images are noised with the same noise and timestep. The discriminator reads the same forward pass.
    """
    assert batch.real is not None and batch.real.samples is not None
    x = nets.generate(batch) if batch.samples is None else batch.samples
    x_t, real_t = (nets.path.noised(images, batch.noise, batch.t) for images in (x, batch.real.samples))
    (predicted,), fake = nets.features(FAKE, x_t, batch, scale)
    _, real = nets.features(FAKE, real_t, batch.real, 0.0 if scale == 0.0 else 1.0)
    return nets.path.noise(predicted, x_t, batch.t), logits(fake), logits(real)


def discriminating_gradient(nets: Networks, outputs: Outputs, batch: Batch, weight: float) -> tuple[Outputs, Values]:
    """Return the gradients of the loss of `denoising_gradient` plus `weight` times the discriminator's loss, and measurements."""
    from torch.nn.functional import softplus

    noise, fake, real = outputs
    slope, values = denoising_gradient(nets, noise, batch)
    factor = weight * len(fake) / (batch.size * fake.numel())
    loss = batch.share * (softplus(fake).mean() + softplus(-real).mean())
    slopes = factor * fake.sigmoid(), -factor * (-real).sigmoid()
    return (slope, *slopes), values | {"discriminator_loss": loss}


def fooling_losses(logits: Tensor) -> Tensor:
    """Return softplus(-d) of each image [B], averaged over its logits: the loss of a generator whose images should look real."""
    from torch.nn.functional import softplus

    return softplus(-logits).flatten(1).mean(1) if logits.ndim > 1 else softplus(-logits)
