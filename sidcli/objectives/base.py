"""Interface between objectives and the engine: the networks that an objective trains, and the phases of a training step.

A phase trains one network. The network computes an output, the objective returns the gradient of its loss with respect to that
output, and the engine does the rest. Each objective is a module in this folder. No module in this folder imports torch when it is
imported, because command-line options and their help are made from the settings of the objectives.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from sidcli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

FAKE_OPTIONS = ("lr_fake", "fake_lora", "fake_warmup", "fake_updates")
"""Settings of a run that concern the fake score alone."""
TEACHER, FAKE, GENERATOR, TARGET = "teacher", "fake_score", "generator", "target"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one objective. The docstring of a field is its help text."""

    name: str = ""
    shares: ClassVar[tuple[str, ...]] = ()
    """Settings that are a share of something: at least 0 and below 1."""
    weights: ClassVar[tuple[str, ...]] = ()
    """Settings that are the weight of a term of a loss: at least 0, like all whole numbers."""
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Least and greatest values of settings that are a number."""
    scale: ClassVar[str] = "guidance"
    """The setting that is the guidance scale of the teacher, after which run folders are named; "": there is none."""
    has_scale_of_teacher: ClassVar[bool] = False
    """Whether the scale, if none is given, is that with which the teacher draws by default. Its run folders are not named after it."""
    before: ClassVar[Mapping[str, Any]] = {}
    """Values of settings in runs of versions that did not have them, where they are not the defaults."""
    draws_pairs: ClassVar[bool] = False
    """Whether the teacher draws pairs of images of one subject to train on, if `--data` does not give them."""
    needs_pairs: ClassVar[bool] = False
    """Whether the images must be the teacher's own, because a phase uses the noise from which they were drawn."""

    @property
    def needs_images(self) -> bool:
        """Whether a phase with these settings uses images, so that the run needs them (`--data`)."""
        return False

    @property
    def discriminates(self) -> bool:
        """Whether a discriminator reads the images."""
        return self.needs_images

    @property
    def joining_images(self) -> int:
        """Images after which the adversarial term joins the loss; 0: it is there from the start, or there is none."""
        return 0

    @property
    def drawing_guidance(self) -> float | None:
        """Guidance scale at which the teacher draws the images of `--data teacher`; None: its default."""
        return None

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{setting.name} must be finite, not {value}")
            if setting.name in self.shares and not 0 <= value < 1:
                raise UsageError(f"{setting.name} must be at least 0 and below 1, not {value}")
            if setting.name in self.ranges:
                least, most = self.ranges[setting.name]
                if not least <= value <= most:
                    raise UsageError(f"{setting.name} must be at least {least:,} and at most {most:,}, not {value}")
            elif (setting.name in self.weights or type(value) is int) and value < 0:
                raise UsageError(f"{setting.name} must be at least 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """Settings of an objective that trains the student on images without a discriminator."""

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def discriminates(self) -> bool:
        return False


@dataclass(frozen=True)
class Role:
    """A trained network, or with `follows` the average of one. It starts as a copy of the teacher, or with `lora` as adapters of that
    rank on the teacher's weights."""

    lr: float
    lora: int = 0
    stream: str = "lora"
    """Random stream that initializes the adapters."""
    average: bool = False
    """Whether its weights are averaged over time. The average is the student."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Betas of Adam. With beta1 = 0 the optimizer keeps no first moment."""
    weight_decay: float = 0.0
    clip: float = 0.0
    """Maximum norm of the gradient of all weights of the network; 0: no limit."""
    layout: str = ""
    """Layout of the reference image that the network takes, unlike the teacher; see `models.reference`."""
    head: bool = False
    """Whether the network has a discriminator head on its middle block, which is trained and saved with it."""
    follows: str = ""
    """Trained network of which this network is the exponential average. It starts equal to it and is not trained itself."""
    decay: float = 0.0
    """Weight of the old average at each update of the followed network."""


@dataclass(frozen=True)
class Inputs:
    """Random inputs of a phase: `turn` numbers the draws of a stream, `position` the batches of prompts."""

    stream: str
    turn: int
    position: int
    t_range: tuple[int, int]
    """Timesteps are in [t_range[0], t_range[1]), distributed as `diffusion.path.Path.draw` defines."""
    dropout: float = 0.0
    """Fraction of captions that are replaced by the empty prompt."""
    reference_dropout: float = 0.0
    """Fraction of reference images that are replaced by zeros, each with its caption."""
    both_dropout: float = 0.0
    """Fraction of samples of which caption and reference image are replaced."""
    reuse: bool = False
    """Use the samples of the previous phase instead of new noise. That phase must train the generator with the same `position`."""
    real: bool = False
    """Also draw real images, those of batch `turn` over the whole run."""
    span: int = 0
    """Also draw a distance of two timesteps for each sample, uniform in 1..span; 0: none."""
    source: Literal["prompts", "images"] = "prompts"
    """What the batch consists of: prompts; or the images of batch `turn`, as `samples`, with their captions as prompts. With
    `Settings.needs_pairs`, its `latents` are the noise from which the teacher drew the images."""


@dataclass(frozen=True)
class Drawing:
    """Random inputs of B images that a student draws: `prompts`, and noise [B, C, h, w] for each of its steps that adds noise."""

    prompts: list[str]
    noise: list[Tensor]


@dataclass(frozen=True)
class Batch:
    """Random inputs of one micro-batch of B samples: `prompts`; `latents`, noise [B, C, h, w] for each step of the generator;
    `noise` [B, C, h, w] and timesteps `t` [B], at which scores are compared."""

    prompts: list[str]
    latents: list[Tensor]
    noise: Tensor
    t: Tensor
    size: int
    """Number of samples in the global batch. Losses are sums over the elements of a sample and means over the global batch."""
    cond: Any = None
    reference: Tensor | None = None
    """Latents [B, C, h, w] of the reference images, if the generator takes them."""
    drawing: Drawing | None = None
    """Random inputs of the reference images, if a student draws them during the training."""
    samples: Tensor | None = None
    """The generator's samples [B, C, h, w] of the previous phase, if this phase reuses them; images, if they are its source."""
    span: Tensor | None = None
    """If the phase has `Inputs.span`: a distance of two timesteps for each sample, int64 [B]."""
    real: Batch | None = None
    """If the phase has `Inputs.real`: B real images as `samples`, their captions as `prompts` and `cond`, the same `noise` and `t`.
    With `Settings.needs_pairs`, `latents` are the noise from which the teacher drew them."""

    @property
    def share(self) -> float:
        """Fraction of the global batch in this micro-batch."""
        return len(self.prompts) / self.size


@dataclass(frozen=True)
class Pass:
    """Forward passes of a network in a phase, with `branches` rows per image.

    `gradient` is taken with respect to the network's weights, with respect to its input only, or not at all.
    """

    role: str
    branches: int
    gradient: Literal["weights", "input", "none"]
    scales: tuple[float, ...] = ()
    """Guidance scales of its predictions. Some networks need fewer rows than `branches` for them."""

    @property
    def forwards(self) -> int:
        """Work per image in forward passes. A backward pass costs two forward passes, or one if it ends at the input."""
        return self.branches * {"weights": 3, "input": 2, "none": 1}[self.gradient]


class Networks(Protocol):
    """Networks that the engine provides to an objective. Only predictions of the network in training carry gradients."""

    @property
    def path(self) -> Any:
        """Diffusion path of the teacher, a diffusion.path.Path."""

    def generate(self, batch: Batch) -> Tensor:
        """Return samples x [B, C, h, w] of the generator."""

    def predict(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        """Return raw predictions [B, C, h, w] of a network at `batch.t`, one for each guidance scale."""

    def features(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> tuple[list[Tensor], Tensor]:
        """Return raw predictions [B, C, h, w] of a trained network, one for each guidance scale, and what a discriminator uses of it.

        The latter is the output [B, channels, h', w'] of the middle block or, for a role with a head, the logits [B] of the head, both
        for the captions of the batch; for the empty prompt if all scales are 0.
        """

    def noise(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        """Return the noise [B, C, h, w] that a network predicts in x_t, one tensor for each guidance scale."""

    def clean(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        """Return the clean latent [B, C, h, w] that a network predicts from x_t, one tensor for each guidance scale."""

    def weights(self, reference: float) -> Tensor:
        """Return the weight [1, 1, 1, w] of each column of the generator's samples in a loss: `reference` for the columns of the
        reference image, if the samples have them, and 1 for all others."""

    def gradient_through(
        self, x: Tensor, networks: Sequence[Callable[[Tensor], list[Tensor]]], loss: Callable[..., tuple[Tensor, Values]]
    ) -> tuple[Tensor, Values]:
        """Return d loss / d x, with the gradient through the outputs of `networks` at x, and measurements.

        `loss` takes x and all outputs. It does not have to depend on each of them.
        """


Values = dict[str, "Tensor"]
"""Scalar measurements of a micro-batch. Their sums are the measurements of the global batch. The first one is the loss."""


@dataclass(frozen=True)
class Phase:
    """One update of one network. `forward` computes its output [B, ...]; `gradient` returns d loss / d output and measurements.

    An output can be a tuple of tensors; the gradient is then a tuple too.
    """

    role: str
    inputs: Inputs
    forward: Callable[[Networks, Batch], Any]
    gradient: Callable[[Networks, Any, Batch], tuple[Any, Values]]
    passes: tuple[Pass, ...]
    update: int = 0
    """Number of earlier updates of this network."""
    split: bool = False
    """Whether `gradient` runs networks. With `split_backward`, `forward` then runs again for its backward pass, to save memory."""


class RunConfig(Protocol):
    """Settings of a run that are common to all objectives."""

    @property
    def batch_size(self) -> int: ...
    @property
    def t_min(self) -> int: ...
    @property
    def t_max(self) -> int: ...
    @property
    def lr_fake(self) -> float: ...
    @property
    def lr_generator(self) -> float: ...
    @property
    def fake_lora(self) -> int: ...
    @property
    def student_lora(self) -> int: ...
    @property
    def fake_warmup(self) -> int: ...
    @property
    def fake_updates(self) -> int: ...
    @property
    def t_init(self) -> int: ...
    @property
    def student_steps(self) -> int: ...
    @property
    def renoise(self) -> str: ...
    @property
    def objective(self) -> Any: ...


class Objective(ABC):
    """A distillation method with the settings of one run."""

    Settings: ClassVar[type[Settings]]
    title: ClassVar[str]
    """Name and source for model cards."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of the run for which this objective has other defaults."""
    emoji_defaults: ClassVar[Mapping[str, Any]] = {}
    """The same for the emoji teacher, whose preset replaces the defaults above."""
    emoji_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of the objective that have other defaults for the emoji teacher, because its runs are short."""
    is_one_step: ClassVar[bool] = False
    """Whether the student can have one step only."""
    makes: ClassVar[Literal["student", "teacher"]] = "student"
    """What the generator is: a student of few steps, or a model of many steps."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Settings of the run that have no effect on this objective."""
    continues: ClassVar[str] = ""
    """Objective whose students it trains further (`--init`); "": it starts at the teacher."""
    discrete: ClassVar[bool] = False
    """Whether its equations need the discrete timesteps of a diffusion, which a teacher of flow matching does not have."""
    takes_references: ClassVar[bool] = False
    """Whether it distills a teacher that takes a reference image, if its settings need no images."""
    second: ClassVar[str] = "fake score"
    """What the trained network besides the generator is, if there is one."""
    reads: ClassVar[str]
    """Sentence for reports that explains how to read the losses."""

    def __init__(self, config: RunConfig, timesteps: int):
        self.config, self.settings, self.timesteps = config, config.objective, timesteps

    @property
    def method(self) -> str:
        """Name and source of the method with the settings of this run."""
        return self.title

    @staticmethod
    def first_step(config: RunConfig) -> int:
        """Return the number of the first step that updates the student."""
        return 0

    def student_role(self, role: Role) -> Role:
        """Return the role of the generator, whose average is the student, with the learning rate and LoRA rank of the run."""
        config = self.config
        return dataclasses.replace(role, lr=config.lr_generator, lora=config.student_lora, stream="generator lora", average=True)

    @property
    def sampling(self) -> dict[str, Any]:
        """How the student draws: entries of its card, sid.json."""
        config = self.config
        return {"t_init": config.t_init, "student_steps": config.student_steps, "renoise": config.renoise}

    @property
    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """Trained networks, and those that follow one, by name."""

    @abstractmethod
    def phases(self, step: int) -> list[Phase]:
        """Return the phases of a training step, in order."""


def generate(nets: Networks, batch: Batch) -> Tensor:
    """Return the generator's samples x [B, C, h, w]."""
    return nets.generate(batch)
