"""Self-corrected flow distillation (SCFlow, arXiv 2412.16906): bidirectional consistency, the student's own straight lines, and a GAN.

The consistency function is the student's clean prediction. One guided step of the teacher leads from a noised image to an earlier and to
a later timestep, at which an average of the student gives the targets. Between a noise and the image that the student draws from it in
one step, the student learns that same image. The discriminator has the place of the fake score: a copy of the teacher with a head on its
middle block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from sidcli.objectives.adversarial import discriminate, discriminator_gradient, fooling_gradient
from sidcli.objectives.base import (
    FAKE,
    GENERATOR,
    TARGET,
    TEACHER,
    Batch,
    Inputs,
    Networks,
    Objective,
    Pass,
    Phase,
    Role,
    Settings,
    Values,
)
from sidcli.objectives.terms import branches, distance, spread

if TYPE_CHECKING:
    from torch import Tensor

REACH = 10
"""Greatest distance of two timesteps, and the timestep below which an image is the target: T / REACH."""


@dataclass(frozen=True, kw_only=True)
class ScflowSettings(Settings):
    name: str = "scflow"
    guidance: float = 1.5
    """Guidance scale of the teacher's step. The student draws without guidance."""
    huber: float = 0.01
    """Constant c of the pseudo-Huber distance sqrt(d^2 + c^2) - c; 0: the squared distance d^2."""
    target: float = 0.9
    """Weight of the old average in each update of the target network."""
    backward: float = 0.1
    """Weight of the consistency with a later timestep."""
    correction: float = 0.1
    """Weight of the squared distance between the images of a noise and of a point on the way to its image."""
    gan: float = 0.1
    """Weight of the adversarial term, per element of a latent; 0: no discriminator."""
    joined_images: int = 20_000
    """Images after which the terms `backward` and `gan` join the loss."""
    shares, weights = ("target",), ("huber", "backward", "correction", "gan")

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def discriminates(self) -> bool:
        return self.gan > 0.0

    @property
    def joining_images(self) -> int:
        return self.joined_images


class Scflow(Objective):
    Settings = ScflowSettings
    title = "Self-corrected flow distillation (SCFlow, arXiv 2412.16906)"
    defaults: ClassVar = {"t_init": 999}
    emoji_settings: ClassVar = {"guidance": 3.0, "joined_images": 1600}
    unused = ("fake_warmup", "fake_updates", "t_min", "t_max")
    second = "discriminator"
    reads = "The losses of SCFlow compare the student with its own average, and do not show progress."

    @property
    def roles(self) -> dict[str, Role]:
        config, betas = self.config, (0.9, 0.999)
        student = self.student_role(Role(0.0, betas=betas, weight_decay=0.01))
        target = Role(0.0, student.lora, student.stream, follows=GENERATOR, decay=self.settings.target)
        discriminator = Role(config.lr_fake, config.fake_lora, betas=betas, weight_decay=0.01, head=True)
        return {GENERATOR: student, TARGET: target} | ({FAKE: discriminator} if self.settings.gan else {})

    def phases(self, step: int) -> list[Phase]:
        s, joined = self.settings, step * self.config.batch_size >= self.settings.joined_images
        inputs = Inputs("generator", step, step, (1, self.timesteps), real=True, span=self.timesteps // REACH)
        fooling = joined and s.gan > 0.0
        more = (Pass(FAKE, 1, "input"),) if fooling else ()
        targets = Pass(TEACHER, branches(s.guidance), "none"), Pass(TARGET, 2 if joined else 1, "none")
        gradient = partial(self.gradient, joined=joined)
        passes = (Pass(GENERATOR, 3, "weights"), *targets, *more)
        update = Phase(GENERATOR, inputs, self.forward, gradient, passes, step, split=True)
        if not fooling:
            return [update]
        discriminating = Pass(GENERATOR, 1, "none"), Pass(FAKE, 2, "weights")
        return [Phase(FAKE, replace(inputs, stream="fake"), self.discriminate, self.discriminator_gradient, discriminating), update]

    def forward(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the student's predictions at noised real images, its images of new noise, and its predictions on the way to them."""
        real, x = batch.real, nets.generate(batch)
        assert real is not None
        (clean,) = nets.clean(GENERATOR, nets.path.noised(real.samples, batch.noise, batch.t), real, 1.0)
        (again,) = nets.clean(GENERATOR, nets.path.noised(x.detach(), batch.latents[0], batch.t), batch, 1.0)
        return clean, x, again

    def gradient(
        self, nets: Networks, outputs: tuple[Tensor, Tensor, Tensor], batch: Batch, joined: bool
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Values]:
        """Return the gradients of d(f(x_t), sg f_target(x_s)) + backward d(f(x_t), sg f_target(x_r)) + correction || f(z_t) - sg x ||^2
        + gan CHW softplus(-D(x noised at s)), and measurements. Without `joined`, the second and the last term are left out.

        x_t is a noised real image, z_t a point between a noise and the student's image x of it, and CHW the number of its elements.
        """
        s, (clean, x, again) = self.settings, outputs
        targets = self.targets(nets, batch, joined)
        (slope, total), *back = (distance(clean, target, s.huber, batch) for target in targets)
        correcting, corrected = distance(again, x, 0.0, batch)
        total, against, values = total + s.correction * corrected, 0.0 * x, {"correction_loss": corrected}
        for later, apart in back:
            slope, total, values["backward_loss"] = slope + s.backward * later, total + s.backward * apart, apart
        if joined and s.gan:
            against, value, values["adversarial_loss"] = fooling_gradient(nets, x, partial(self.noised, nets, batch), batch)
            total = total + s.gan * value
        values = {"generator_loss": total, "sample_std": spread(x, batch), **values}
        return (slope, s.gan * against, s.correction * correcting), values

    def targets(self, nets: Networks, batch: Batch, joined: bool) -> list[Tensor]:
        """Return f_target(x_s) and, with `joined`, f_target(x_r).

        x_s and x_r are where the teacher's guided step from x_t ends, at an earlier and at a later timestep. Where s is below
        T / REACH, the first target is the real image.
        """
        real, path = batch.real, nets.path
        assert real is not None and real.samples is not None and batch.span is not None
        x_t = path.noised(real.samples, batch.noise, batch.t)
        (predicted,) = nets.predict(TEACHER, x_t, real, self.settings.guidance)
        clean, noise = path.clean(predicted, x_t, batch.t), path.noise(predicted, x_t, batch.t)
        ends = earlier(batch), (batch.t + batch.span).clamp_max(self.timesteps - 1)
        found = [nets.clean(TARGET, path.noised(clean, noise, end), replace(real, t=end), 1.0)[0] for end in ends[: 1 + joined]]
        is_near = (ends[0] < self.timesteps // REACH).view(-1, 1, 1, 1)
        return [real.samples.where(is_near, found[0]), *found[1:]]

    def noised(self, nets: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, Batch]:
        """Return images as the discriminator reads them, noised at s, and the batch with this timestep."""
        at = replace(batch, t=earlier(batch))
        return nets.path.noised(x, at.noise, at.t), at

    def discriminate(self, nets: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """Return what the discriminator finds in the student's and in real images, which share their noise and timesteps."""
        assert batch.real is not None and batch.real.samples is not None
        images = (nets.generate(batch), batch), (batch.real.samples, batch.real)
        return discriminate(nets, *(self.noised(nets, own, x) for x, own in images))

    def discriminator_gradient(
        self, nets: Networks, outputs: tuple[Tensor, ...], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Values]:
        return discriminator_gradient(outputs, batch, self.settings.gan)


def earlier(batch: Batch) -> Tensor:
    """Return the timesteps s before those of the batch, at least 0."""
    assert batch.span is not None
    return (batch.t - batch.span).clamp_min(0)
