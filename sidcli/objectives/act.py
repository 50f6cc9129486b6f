"""Adversarial consistency training (ACT, arXiv 2311.14097): the student learns consistency from images, and to deceive a discriminator.

No teacher takes a step: the two points of a trajectory are one image with the same noise at two timesteps. The discriminator reads real
images and the student's predictions, both without noise, and the timestep of the prediction. It has the place of the fake score: a copy
of the teacher with a head on its middle block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from sidcli.objectives.adversarial import discriminate, discriminator_gradient, fooling_gradient
from sidcli.objectives.base import FAKE, GENERATOR, TARGET, Batch, Inputs, Networks, Pass, Phase, Role, Settings, Values
from sidcli.objectives.lcm import Lcm
from sidcli.objectives.terms import consistency, distance, spread

if TYPE_CHECKING:
    from torch import Tensor

SHIFT = 0.1
"""Standard deviation of the noise on real images with which the penalty of the discriminator's gradient is estimated."""


@dataclass(frozen=True, kw_only=True)
class ActSettings(Settings):
    name: str = "act"
    intervals: int = 150
    """Intervals between the timesteps of the pairs at the end. Their number starts at 1 and grows as a square root."""
    growing_images: int = 1_000_000
    """Images after which there are all intervals."""
    huber: float = 0.001
    """Constant c of the pseudo-Huber distance sqrt(d^2 + c^2) - c; 0: the squared distance d^2."""
    target: float = 0.95
    """Weight of the old average in each update of the target network; 0: the target network is the student itself."""
    gan: float = 0.3
    """Share of the loss that is the adversarial term, per element of a latent. The rest is consistency."""
    r1: float = 10.0
    """Weight of the penalty of the discriminator's gradient at real images."""
    solver_steps: int = 50
    """Timesteps from which a student of several steps takes its own, as with lcm."""
    scale: ClassVar = ""
    shares, weights = ("target",), ("huber", "r1")
    ranges: ClassVar = {"gan": (0.001, 0.999), "intervals": (1, 1000), "growing_images": (1, 1e12)}

    @property
    def needs_images(self) -> bool:
        return True


class Act(Lcm):
    Settings = ActSettings  # type: ignore[assignment]
    title = "Adversarial consistency training (ACT, arXiv 2311.14097)"
    defaults: ClassVar = {}
    emoji_settings: ClassVar = {"intervals": 40, "growing_images": 9600}
    unused = ("fake_warmup", "fake_updates", "t_init", "t_min", "t_max", "renoise")
    second = "discriminator"
    reads = "The losses of ACT change as its timesteps come closer together, and do not show progress."

    @property
    def roles(self) -> dict[str, Role]:
        return super().roles | {FAKE: Role(self.config.lr_fake, self.config.fake_lora, betas=(0.0, 0.99), head=True)}

    def intervals(self, step: int) -> int:
        """Return the number of intervals of a step: ceil(sqrt(k ((s + 1)^2 - 4) + 4) - 1) for the part k of `growing_images`, with
        s = `intervals` (appendix C of arXiv 2303.01469)."""
        s = self.settings
        part = min(1.0, step * self.config.batch_size / s.growing_images)
        return math.ceil(math.sqrt(part * ((s.intervals + 1) ** 2 - 4) + 4) - 1)

    def phases(self, step: int) -> list[Phase]:
        count = self.intervals(step)
        inputs = Inputs("generator", step, step, (1, count + 1), source="images")
        target = Pass(TARGET if self.settings.target else GENERATOR, 1, "none")
        passes = Pass(GENERATOR, 1, "weights"), target, Pass(FAKE, 1, "input")
        discriminating = Pass(GENERATOR, 1, "none"), Pass(FAKE, 3, "weights")
        discriminate, forward = partial(self.discriminate, count=count), partial(self.forward, count=count)
        return [
            Phase(FAKE, replace(inputs, stream="fake"), discriminate, self.discriminator_gradient, discriminating),
            Phase(GENERATOR, inputs, forward, partial(self.gradient, count=count), passes, step, split=True),
        ]

    def point(self, nets: Networks, batch: Batch, count: int, back: int = 0) -> tuple[Tensor, Batch]:
        """Return x_t and the batch with the timesteps t of number n - `back`; `batch.t` is n. They divide 0..T - 1 into `count` parts."""
        begun = replace(batch, t=((batch.t - back) * self.timesteps // count - 1).clamp_min(0))
        return nets.path.noised(batch.samples, batch.noise, begun.t), begun

    def forward(self, nets: Networks, batch: Batch, count: int = 1) -> Tensor:
        """Return the student's consistency function at the later point of each pair."""
        return consistency(nets, GENERATOR, *self.point(nets, batch, count))

    def gradient(self, nets: Networks, x: Tensor, batch: Batch, count: int = 1) -> tuple[Tensor, Values]:
        """Return the gradient of (1 - gan) d(f(x_t), sg f_target(x_s)) + gan CHW softplus(-D(f(x_t), t)), and measurements.

        s is the timestep before t, and CHW the number of elements of a latent.
        """
        s, begun = self.settings, self.point(nets, batch, count)[1]
        target = consistency(nets, TARGET if s.target else GENERATOR, *self.point(nets, batch, count, back=1))
        slope, loss = distance(x, target, s.huber, batch)
        against, value, fooling = fooling_gradient(nets, x, lambda x: (x, begun), batch)
        values = {"generator_loss": (1 - s.gan) * loss + s.gan * value, "adversarial_loss": fooling}
        return (1 - s.gan) * slope + s.gan * against, values | {"sample_std": spread(x, batch)}

    def discriminate(self, nets: Networks, batch: Batch, count: int) -> tuple[Tensor, ...]:
        """Return what the discriminator finds in the student's predictions, real images, and real images with a little noise."""
        from torch import no_grad

        with no_grad():
            x = self.forward(nets, batch, count)
        begun = self.point(nets, batch, count)[1]
        assert batch.samples is not None
        return discriminate(nets, *((images, begun) for images in (x, batch.samples, batch.samples + SHIFT * batch.noise)))

    def discriminator_gradient(
        self, nets: Networks, outputs: tuple[Tensor, ...], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Values]:
        """Return the gradients of gan CHW times the discriminator's loss with its penalty, and measurements.

        The penalty r1 / 2 || dD / dx ||^2 at real images is estimated as r1 / 2 ((D(x + e) - D(x)) / SHIFT)^2, e normal with the
        standard deviation SHIFT: the exact one needs second derivatives, which fused attention does not have.
        """
        s, rise = self.settings, (outputs[2] - outputs[1]) / SHIFT
        push = s.gan * s.r1 * batch.noise[0].numel() * rise / (SHIFT * batch.size)
        slopes, values = discriminator_gradient(outputs, batch, s.gan, [push])
        penalty = 0.5 * s.r1 * rise.square().sum() / batch.size
        return (slopes[0], slopes[1] - push, *slopes[2:]), values | {"gradient_penalty": penalty}
