"""What several objectives compute: distances, steps of DDIM, the consistency function, the rows of guidance, and a measurement of the
samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidcli.objectives.base import Batch, Networks

if TYPE_CHECKING:
    from torch import Tensor


def branches(*scales: float) -> int:
    """Return the rows per image that guidance with these scales needs: 1 if all scales are 0 or all are 1, else 2."""
    return 1 if set(scales) in ({1.0}, {0.0}) else 2


def distance(x: Tensor, target: Tensor, huber: float, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the gradient of the distance of x to a target with respect to x, and the distance, a scalar.

    The distance is the square d^2 of each difference d or, with `huber` = c > 0, the pseudo-Huber distance sqrt(d^2 + c^2) - c. It is
    summed over the elements of a sample and averaged over the global batch.
    """
    difference = x - target
    if not huber:
        return difference * (2.0 / batch.size), difference.square().sum() / batch.size
    root = (difference.square() + huber**2).sqrt()
    return difference / (root * batch.size), (root - huber).sum() / batch.size


def ddim(nets: Networks, role: str, x_t: Tensor, batch: Batch, end: Tensor, scale: float = 1.0) -> Tensor:
    """Return the DDIM step of a network from x_t at `batch.t` to the timesteps `end` [B] (arXiv 2010.02502)."""
    (predicted,) = nets.predict(role, x_t, batch, scale)
    path, t = nets.path, batch.t
    return path.noised(path.clean(predicted, x_t, t), path.noise(predicted, x_t, t), end)


def consistency(nets: Networks, role: str, x_t: Tensor, batch: Batch) -> Tensor:
    """Return the consistency function of a network at x_t and `batch.t`."""
    from sidcli.diffusion.sampling import consistent

    return consistent(nets.clean(role, x_t, batch, 1.0)[0], x_t, batch.t)


def spread(x: Tensor, batch: Batch) -> Tensor:
    """Return this micro-batch's part of the mean standard deviation of the samples."""
    return batch.share * x.std((1, 2, 3)).mean()
