"""Score identity Distillation with Long and Short Guidance (SiD-LSG, arXiv 2406.01561), as tensor maths.

Names: x the generator's sample, y_real the teacher's clean prediction, y_fake the fake score's, all [B, C, h, w] float32 and all at
the same noised x_t. Sums run over one sample's elements, the mean over `batch` samples, which is the global batch: gradients of
micro-batches and processes then add up to the gradient of the whole.
"""

from __future__ import annotations

from torch import Tensor


def fake_score_loss(noise_predicted: Tensor, noise: Tensor, batch: int) -> Tensor:
    """|| eps_psi(x_t) - eps ||^2 summed over elements, over the global batch (method 1.4).

    For a v-predicting network pass its prediction converted to noise: that weights the v error by abar, which is the same loss.
    """
    return (noise_predicted - noise).square().sum() / batch


def generator_loss(x: Tensor, y_real: Tensor, y_fake: Tensor, y_fake_target: Tensor, alpha: float, batch: int) -> Tensor:
    """(y_real - y_fake) . [(y_fake_target - x) + (1 - alpha) (y_real - y_fake)] / w (method 1.5), summed over elements, over `batch`.

    y_fake is the fake score at kappa2, y_fake_target at kappa3; where they are equal the bracket is (y_real - x) - alpha (y_real -
    y_fake), the form of the official code. w is the mean absolute |x - y_real| of the sample, a constant for the gradient. The
    gradient flows through both score networks, which sets SiD apart from score distillation with a stopped gradient. The value
    hovers around zero and measures nothing.
    """
    weight = (x - y_real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5).detach()
    difference = y_real - y_fake
    return (difference * ((y_fake_target - x) + (1.0 - alpha) * difference) / weight).sum() / batch


def health(x: Tensor, y_real: Tensor, y_fake: Tensor) -> Tensor:
    """|y_real - y_fake| / |y_real - x|, averaged over the batch: how far the two scores still are apart. Detached scalar."""
    apart = (y_real - y_fake).abs().mean((1, 2, 3)) / (y_real - x).abs().mean((1, 2, 3)).clamp_min(1e-5)
    return apart.mean().detach()
