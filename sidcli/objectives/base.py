"""What an objective tells the engine: the networks that it trains, and the phases of a training step.

A phase trains one network. The network makes an output, the objective returns the gradient of its loss with respect to that output, and
the engine does the rest. An objective is a file beside this one; nothing here or there imports torch when it is imported, because options
and their help are made from the settings of the objectives.
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

TEACHER, FAKE, GENERATOR = "teacher", "fake_score", "generator"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that one objective has. The docstring of a field is its help."""

    name: str = ""
    shares: ClassVar[tuple[str, ...]] = ()
    """Settings that are a share of something: at least 0 and below 1."""
    scale: ClassVar[str] = "guidance"
    """The setting that is the guidance scale of the teacher, after which run folders are named."""

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{setting.name} must be finite, not {value}")
            if setting.name in self.shares and not 0 <= value < 1:
                raise UsageError(f"{setting.name} must be at least 0 and below 1, not {value}")


@dataclass(frozen=True)
class Role:
    """A network that is trained. It starts as the teacher: as a copy, or with `lora` as adapters of that rank on the teacher's weights."""

    lr: float
    lora: int = 0
    stream: str = "lora"
    """Random stream of the adapters' start."""
    average: bool = False
    """Whether its weights are averaged over time. The average is the student."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Of Adam. Without beta1 the optimizer keeps one moment less."""
    weight_decay: float = 0.0
    clip: float = 0.0
    """Largest norm of the gradient of all its weights; 0 does not limit it."""


@dataclass(frozen=True)
class Inputs:
    """The random inputs that a phase draws: `turn` numbers the draws of a stream, `position` the batches of prompts."""

    stream: str
    turn: int
    position: int
    t_range: tuple[int, int]
    """Timesteps are uniform from the first to the second, which is excluded."""
    dropout: float = 0.0
    """Share of captions that are replaced by the empty prompt."""
    reuse: bool = False
    """Take the samples of the phase before, which must be one of the generator and have the same `position`, instead of new noise."""


@dataclass(frozen=True)
class Batch:
    """Random inputs of one micro-batch of B samples: prompts, noise [B, C, h, w] of each step of the generator, noise [B, C, h, w] and
    timesteps int64 [B] at which scores are compared."""

    prompts: list[str]
    latents: list[Tensor]
    noise: Tensor
    t: Tensor
    size: int
    """Samples of the global batch. Losses are sums over the elements of a sample and means over the global batch."""
    cond: Any = None
    samples: Tensor | None = None
    """In a phase that reuses them: the generator's samples [B, C, h, w] of the phase before."""

    @property
    def share(self) -> float:
        """Part of the global batch."""
        return len(self.prompts) / self.size


@dataclass(frozen=True)
class Pass:
    """Forward passes in a phase: `branches` rows of a network per image. `gradient`: of its weights, of its input alone, or none."""

    role: str
    branches: int
    gradient: Literal["weights", "input", "none"]

    @property
    def forwards(self) -> int:
        """Work per image in forward passes. A backward pass costs two, or one where it ends at the input."""
        return self.branches * {"weights": 3, "input": 2, "none": 1}[self.gradient]


def branches(*scales: float) -> int:
    """Rows per image that guidance at these scales takes: one at 0 or 1, two otherwise."""
    return 1 if set(scales) in ({1.0}, {0.0}) else 2


class Networks(Protocol):
    """What the engine gives an objective. Predictions of the network in training carry gradients; all others do not."""

    @property
    def path(self) -> Any:
        """The teacher's diffusion.path.Path."""

    def generate(self, batch: Batch) -> Tensor:
        """Samples x [B, C, h, w] of the generator."""

    def noise(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        """The noise [B, C, h, w] that a network predicts in x_t, once for each guidance scale."""

    def clean(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        """The clean latent [B, C, h, w] that a network predicts from x_t, once for each guidance scale."""

    def gradient_through(
        self, x: Tensor, networks: Sequence[Callable[[Tensor], list[Tensor]]], loss: Callable[..., tuple[Tensor, Values]]
    ) -> tuple[Tensor, Values]:
        """d loss / d x, with the gradient that flows through the outputs of `networks` at x. `loss` takes x and all the outputs."""


Values = dict[str, "Tensor"]
"""Measurements of a micro-batch as scalars that add up to those of the global batch; the first one is the loss."""


@dataclass(frozen=True)
class Phase:
    """One update of one network. `forward` makes its output [B, ...]; `gradient` returns d loss / d output and measurements."""

    role: str
    inputs: Inputs
    forward: Callable[[Networks, Batch], Tensor]
    gradient: Callable[[Networks, Tensor, Batch], tuple[Tensor, Values]]
    passes: tuple[Pass, ...]
    update: int = 0
    """Updates of this network before this one."""
    split: bool = False
    """Whether `gradient` runs networks, so that it is worth it to keep no graph of `forward` meanwhile (`split_backward`)."""


class RunConfig(Protocol):
    """The settings of a run that objectives share."""

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
    def objective(self) -> Any: ...


class Objective(ABC):
    """A distillation method under the settings of one run."""

    Settings: ClassVar[type[Settings]]
    title: ClassVar[str]
    """Name and source for model cards."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of the run that differ from the usual ones under this objective."""
    reads: ClassVar[str]
    """A sentence on how to read its losses, for reports."""

    def __init__(self, config: RunConfig, timesteps: int):
        self.config, self.settings, self.timesteps = config, config.objective, timesteps

    @property
    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """The networks that are trained, by name."""

    @abstractmethod
    def phases(self, step: int) -> list[Phase]:
        """The phases of a training step, in order."""
