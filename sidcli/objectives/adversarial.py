"""Adversarial terms of objectives: a discriminator that reads the fake score's features of noised latents, real and generated.

Its loss for a logit d is softplus(-d) for real images and softplus(d) for generated ones, the binary cross-entropy with targets 1 and
0. It is averaged over the logits of an image, and summed and weighted like other losses, so it does not depend on the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sidcli.errors import UsageError
from sidcli.objectives.base import FAKE, Batch, Networks, Values
from sidcli.objectives.scores import denoising_gradient

if TYPE_CHECKING:
    from torch import Tensor

Outputs = tuple["Tensor", "Tensor", "Tensor"]
"""Noise [B, C, h, w] that the fake score predicts for generated images, logits [B, ...] of generated and of real images."""
Logits = Callable[["Tensor"], "Tensor"]
"""Maps what `Networks.features` returns to logits [B, ...]."""
DIVERGENCES: dict[str, Callable[[Any], Any]] = {
    "reverse-kl": lambda r: 1.0,
    "kl": lambda r: r,
    "js": lambda r: r / (1.0 + r),
    "jeffreys": lambda r: 1.0 + r,
}
"""Weight of the score difference for each divergence, given r = p_real / p_generated at x_t (f-distill, arXiv 2502.15681)."""
LARGEST_RATIO = 10.0
"""r is limited to 1 / LARGEST_RATIO .. LARGEST_RATIO."""


def predict_and_discriminate(nets: Networks, batch: Batch, logits: Logits, scale: float = 1.0) -> Outputs:
    """Return the noise that the fake score predicts at a guidance scale, and the discriminator's logits.

    Generated and real images are noised with the same noise and timestep. The discriminator reads the same forward pass.
    """
    assert batch.real is not None and batch.real.samples is not None
    x = nets.generate(batch) if batch.samples is None else batch.samples
    x_t, real_t = (nets.path.noised(images, batch.noise, batch.t) for images in (x, batch.real.samples))
    (predicted,), fake = nets.features(FAKE, x_t, batch, scale)
    _, real = nets.features(FAKE, real_t, batch.real, 0.0 if scale == 0.0 else 1.0)
    return nets.path.noise(predicted, x_t, batch.t), logits(fake), logits(real)


def fake_score_gradient(nets: Networks, outputs: Outputs, batch: Batch, weight: float) -> tuple[Outputs, Values]:
    """Return the gradients of the loss of `denoising_gradient` plus `weight` times the discriminator's loss, and measurements."""
    noise, fake, real = outputs
    slope, values = denoising_gradient(nets, noise, batch)
    slopes, loss = logit_gradients(fake, real, batch, weight)
    return (slope, *slopes), values | {"discriminator_loss": loss}


def logit_gradients(fake: Tensor, real: Tensor, batch: Batch, weight: float) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the gradients of `weight` times the discriminator's loss with respect to logits [B, ...] of generated and of real
    images, and the loss."""
    from torch.nn.functional import softplus

    factor = weight * len(fake) / (batch.size * fake.numel())
    loss = batch.share * (softplus(fake).mean() + softplus(-real).mean())
    return (factor * fake.sigmoid(), -factor * (-real).sigmoid()), loss


def discriminate(nets: Networks, *images: tuple[Tensor, Batch]) -> tuple[Tensor, ...]:
    """Return the logits [B] of images x_t, each with the batch of its captions and timesteps, then what the discriminator predicts
    in them as a denoiser.

    The predictions have no loss. They are outputs so that each weight has a gradient, as processes that train together expect.
    """
    found = [nets.features(FAKE, x_t, batch, 1.0) for x_t, batch in images]
    return (*(logits for _, logits in found), *(predicted for (predicted,), _ in found))


def discriminator_gradient(
    outputs: tuple[Tensor, ...], batch: Batch, weight: float, more: Sequence[Tensor] = ()
) -> tuple[tuple[Tensor, ...], Values]:
    """Return the gradients of `weight` CHW times the discriminator's loss, and measurements. CHW is the number of elements of a latent.

    `outputs` are what `discriminate` returns, for generated images first, then for real ones. `more` are gradients of further logits.
    """
    slopes, loss = logit_gradients(outputs[0], outputs[1], batch, weight * batch.noise[0].numel())
    unused = [0.0 * one for one in outputs[2 + len(more) :]]
    return (*slopes, *more, *unused), {"discriminator_loss": loss}


def fooling_gradient(
    nets: Networks, x: Tensor, seen: Callable[[Tensor], tuple[Tensor, Batch]], batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of CHW times the sum of `fooling_losses` over the global batch with respect to x, its value, and the sum.

    `seen` returns x_t, as the discriminator reads it, and the batch of its captions and timesteps.
    """

    def logits(x: Tensor) -> list[Tensor]:
        x_t, at = seen(x)
        return [nets.features(FAKE, x_t, at, 1.0)[1]]

    def loss(x: Tensor, logits: Tensor) -> tuple[Tensor, Values]:
        fooling = fooling_losses(logits).sum() / batch.size
        return fooling * x[0].numel(), {"adversarial_loss": fooling}

    slope, found = nets.gradient_through(x, [logits], loss)
    return slope, found["adversarial_loss"] * x[0].numel(), found["adversarial_loss"]


def fooling_losses(logits: Tensor) -> Tensor:
    """Return softplus(-d) of each image [B], averaged over its logits: the loss of a generator whose images should look real."""
    from torch.nn.functional import softplus

    return softplus(-logits).flatten(1).mean(1) if logits.ndim > 1 else softplus(-logits)


def check_divergence(divergence: str, gan: float) -> None:
    """Raises UsageError for an unknown divergence, or one that needs a discriminator where the weight `gan` is 0."""
    if divergence not in DIVERGENCES:
        raise UsageError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {divergence!r}")
    if divergence != "reverse-kl" and not gan:
        raise UsageError(f"divergence={divergence} reads the discriminator, and gan is 0", "--set gan=0.001")


def divergence_weight(divergence: str, logits: Tensor) -> Tensor | float:
    """Return the weight [B, 1, 1, 1] of the score difference of each sample for a divergence of DIVERGENCES.

    `logits` [B] are those of the discriminator at x_t; those of an optimal one are ln r. The weights are not divided by their mean
    over the batch, as published ones are, so that they do not depend on the micro-batch.
    """
    return DIVERGENCES[divergence](logits.exp().clamp(1.0 / LARGEST_RATIO, LARGEST_RATIO).view(-1, 1, 1, 1))
