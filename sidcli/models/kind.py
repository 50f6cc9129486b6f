"""A kind of denoiser: what its network, its text encoders and its files need, and no other code knows.

Each kind is one module of this package with one instance of a subclass of `Kind`; `kinds` lists them. Its methods import the classes of
networks and pipelines, which takes seconds, when they need them.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path as Folder
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from sidcli.diffusion.guidance import guided
from sidcli.diffusion.path import Path
from sidcli.errors import InputError
from sidcli.models.compatibility import Rules
from sidcli.models.ldm import Places
from sidcli.models.reference import COUNT, Layout, layout_of
from sidcli.objectives.terms import branches


@dataclass(frozen=True)
class Cond:
    """Conditioning of a denoiser on B prompts: `states` float32 [B, tokens, width], and `added`, tensors [B, width] by the name
    that the denoiser gives them. `reference` are the latents [B, C, h, w] of reference images, if the denoiser takes them."""

    states: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the tensors."""
        return tuple((name, tuple(value.shape)) for name, value in {"states": self.states, **self.added}.items())

    def contiguous(self) -> Cond:
        """Return the cond with states in contiguous memory; each layer that reads a view would copy it."""
        return replace(self, states=self.states.contiguous())

    def to(self, device: torch.device) -> Cond:
        """Return the cond on a device."""
        added = {name: value.to(device) for name, value in self.added.items()}
        return Cond(self.states.to(device), added, None if self.reference is None else self.reference.to(device))

    def with_reference(self, reference: Tensor | None) -> Cond:
        """Return the cond with other reference images [B, C, h, w], or with none."""
        return replace(self, reference=reference)

    def expand(self, count: int) -> Cond:
        """Return the cond of one prompt without a reference, repeated `count` times."""
        return Cond(self.states.expand(count, -1, -1), {name: value.expand(count, -1) for name, value in self.added.items()})

    def cat(self, other: Cond) -> Cond:
        """Return both conds as one batch, this one first. Either both have a reference, or none has."""
        pair = [one.reference for one in (self, other) if one.reference is not None]
        return Cond(
            torch.cat([self.states, other.states]),
            {name: torch.cat([value, other.added[name]]) for name, value in self.added.items()},
            torch.cat(pair) if pair else None,
        )


Denoise = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x_t [B, C, h, w], t [B], cond of B prompts) -> prediction [B, C, h, w]."""


def guided_predictions(denoise: Denoise, x_t: Tensor, t: Tensor, cond: Cond, empty: Cond, scales: Sequence[float]) -> list[Tensor]:
    """Return predictions [B, C, h, w] with classifier-free guidance, one per guidance scale, from one call of the network.

    `empty` is the cond of the empty prompt [1]. The unconditional half of the batch is computed only if a scale is not 1, the
    conditional half only if a scale is not 0. Both halves have the reference of `cond`.
    """
    if all(scale == 1.0 for scale in scales):
        return [denoise(x_t, t, cond)] * len(scales)
    nothing = empty.expand(len(cond)).with_reference(cond.reference)
    if all(scale == 0.0 for scale in scales):
        return [denoise(x_t, t, nothing)] * len(scales)
    both = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.cat(nothing))
    conditional, unconditional = both.chunk(2)
    return [guided(conditional, unconditional, scale) for scale in scales]


def doubly_guided(
    denoise: Denoise, x_t: Tensor, t: Tensor, cond: Cond, empty: Cond, scale: float, reference_scale: float
) -> Tensor:
    """Return the prediction [B, C, h, w] with guidance on the reference and on the prompt, from one call of the network.

    It is f(0, 0) + reference_scale (f(0, I) - f(0, 0)) + scale (f(T, I) - f(0, I)) with prompt T and reference I (equation 3 of
    arXiv 2211.09800, with the order of text and image exchanged).
    """
    text_free = empty.expand(len(cond)).with_reference(cond.reference)
    assert cond.reference is not None
    blind = empty.expand(len(cond)).with_reference(torch.zeros_like(cond.reference))
    rows = denoise(torch.cat([x_t] * 3), torch.cat([t] * 3), cond.cat(text_free).cat(blind))
    both, seen, nothing = rows.chunk(3)
    return nothing + reference_scale * (seen - nothing) + scale * (both - seen)


class Head(nn.Module):
    """Discriminator that maps features [B, channels, h, w] to one logit per image [B], the last layers of arXiv 2405.14867.

    Convolutions of stride 2 halve a side while it is above 4, and one convolution covers what remains. For maps of 8 x 8 these are the
    layers of the published head; maps of 2 x 2 to 4 x 4 have no convolution of stride 2.
    """

    def __init__(self, channels: int, height: int, width: int, groups: int):
        super().__init__()
        layers: list[nn.Module] = []
        while max(height, width) > 4:
            stride = [2 if side > 4 else 1 for side in (height, width)]
            kernel = [step + 2 for step in stride]
            layers += [nn.Conv2d(channels, channels, kernel, stride, 1), nn.GroupNorm(groups, channels), nn.SiLU()]  # type: ignore[arg-type]
            height, width = height // stride[0], width // stride[1]
        layers += [nn.Conv2d(channels, channels, (height, width)), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten()


class TextEncoder(Protocol):
    """The text encoders of a model on a device. `truncated` counts prompts that are longer than they read."""

    truncated: int

    def __call__(self, prompts: Sequence[str]) -> Cond: ...


class Kind(ABC):
    """One kind of denoiser. Methods that take a `net` work on any network of this kind, on any device.

    `networks` maps the names of components to their configurations, `places` to the files of these, for errors.
    """

    component: ClassVar[str]
    """Name of the denoiser among the components of a pipeline, which is also that of its folder."""
    title: ClassVar[str]
    """Name of the network in messages."""
    models: ClassVar[str]
    """Name of the models with such a denoiser, for messages."""
    texts: ClassVar[tuple[str, ...]]
    """Text encoders that a model can have, in order. The tokenizer of `text_encoder_2` is `tokenizer_2`."""
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]]
    """Tokenizer -> its classes that model_index.json may name."""
    rules: ClassVar[Rules]
    """Supported pipelines, schedulers and entries of configurations."""
    architecture: ClassVar[tuple[str, ...]]
    """Entries of the denoiser's configuration that determine the shapes of its weights."""
    formats: ClassVar[tuple[str, ...]]
    """Formats in which a student is exported."""
    missing_formats: ClassVar[Mapping[str, str]] = {}
    """Another format -> why no student is exported in it, where more can be said than that sid does not write it."""
    is_ldm: ClassVar[bool] = False
    """Whether a single file of a model contains all its networks under the names of the original Stable Diffusion code (ldm). LoRAs of
    such models also have the names of kohya's scripts. A single file of other models contains the denoiser only; see `places`."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Modules of the denoiser that get a LoRA adapter."""
    lora_above: ClassVar[float] = math.inf
    """Number of weights of a denoiser above which student and fake score are LoRAs by default."""
    text_attention: ClassVar[str] = "sdpa"
    """Implementation of attention in the text encoders, as transformers names it."""
    is_square: ClassVar[bool] = False
    """Whether a model draws square images only."""
    size_entries: ClassVar[tuple[str, ...]] = ("sample_size",)
    """Entries of the denoiser's configuration that `resized` sets."""
    default_side: ClassVar[int | None] = None
    """Latents on a side of a model whose configuration has no sample_size; None: it must have one."""
    former_classes: ClassVar[Mapping[str, str]] = {}
    """Component -> the former name of its class, which the files of published models still have."""

    @property
    def language_model(self) -> str:
        """The text encoder that is a language model, whose weights can be in bf16; "" if models of this kind have none."""
        return ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Folders of a pipeline that are read."""
        return self.component, "vae", *self.texts, *map(tokenizer_of, self.texts), "scheduler"

    # Files

    @abstractmethod
    def network_class(self, component: str) -> Any:
        """Return the class of a component. A class name in a model's files is only compared with it, never imported."""

    @abstractmethod
    def text_config(self, component: str, config: Mapping[str, Any]) -> Any:
        """Return a text encoder's configuration without the entries that select an implementation."""

    @abstractmethod
    def pipeline(self, texts: Sequence[str]) -> Any:
        """Return the stock pipeline class for a model with these text encoders."""

    def absent(self, texts: Sequence[str]) -> list[str]:
        """Return the components that the stock pipeline expects and a model with these text encoders does not have."""
        return []

    def stock_problem(self, texts: Sequence[str]) -> str:
        """Return why the stock pipeline cannot draw from prompts with these text encoders, or ""."""
        return ""

    def call_options(self, config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """Return the arguments, other than its steps, with which the stock pipeline draws a student as sid does.

        `config` is the denoiser's configuration, `size` height and width in pixels. By default a pipeline draws square images.
        """
        height, width = size
        return ({} if height == width else {"height": height, "width": width}) | {"guidance_scale": 0}

    @abstractmethod
    def index_entries(self, model: Any) -> dict[str, Any]:
        """Return the entries of model_index.json for a `loading.Model`, other than those of its components."""

    @abstractmethod
    def text_names(self, index: Mapping[str, Any], place: str) -> list[str]:
        """Return the text encoders that a model_index.json names, in order. Raises InputError if a necessary one is missing."""

    @abstractmethod
    def read_path(self, scheduler: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
        """Return the path of a scheduler configuration, which can depend on the image size in the denoiser's configuration `config`.

        Raises InputError if it defines none that is supported.
        """

    @abstractmethod
    def check_schedule(self, place: str, scheduler: Mapping[str, Any]) -> None:
        """Raises InputError, naming the file `place`, if a scheduler configuration lacks what `read_path` needs."""

    def known_schedule(self, scheduler: Mapping[str, Any]) -> dict[str, Any]:
        """Return a checked scheduler configuration as `read_path` and the exports of students read it; by default unchanged."""
        return dict(scheduler)

    @abstractmethod
    def check_fit(self, name: str, networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str]) -> None:
        """Raises InputError if the inputs and outputs of the networks of the model `name` do not match each other."""

    @abstractmethod
    def read_tokenizer(self, component: str, folder: Folder, config: Mapping[str, Any], place: str) -> Any:
        """Return the tokenizer in a folder for the text encoder `component`, whose configuration is in the file `place`.

        Raises InputError if it is missing, damaged, or of another text encoder.
        """

    def build(self, component: str, config: Mapping[str, Any]) -> nn.Module:
        """Build a network with random weights on torch's default device (under `torch.device("meta")` it needs no memory)."""
        kind = self.network_class(component)
        is_text = component.startswith("text")
        network: nn.Module = kind(self.text_config(component, config)) if is_text else kind.from_config(dict(config))
        return network

    def usual_guidance(self, config: Mapping[str, Any]) -> float:
        """Return the guidance scale at which a teacher draws by default."""
        return 7.5

    def places(self, config: Mapping[str, Any]) -> Places:
        """Return where a file of the original code has each tensor of a denoiser with this configuration; see `ldm.locate`.

        Kinds with single files of the denoiser alone have it.
        """
        raise NotImplementedError(f"{self.models} has no single files of its {self.title}")

    def single_file_problem(self, config: Mapping[str, Any]) -> str:
        """Return why no program reads a single file of a denoiser with this configuration, or ""."""
        return ""

    def in_comfyui(self, config: Mapping[str, Any]) -> bool:
        """Return whether ComfyUI reads single files and LoRAs of a denoiser with this configuration.

        ComfyUI derives the sizes of a network from few of its tensors and assumes those of published models for the others
        (comfy/model_detection.py).
        """
        return False

    # Sizes

    @abstractmethod
    def patch(self, config: Mapping[str, Any], place: str) -> int:
        """Return the number of latents, in each direction, of which the denoiser makes one token; 1 if it makes none.

        Raises InputError, naming the file `place` of the configuration, if it has an invalid number.
        """

    def largest(self, config: Mapping[str, Any], place: str) -> float:
        """Return the largest side of a latent that the denoiser can take.

        Raises InputError, naming the file `place` of the configuration, if it defines none.
        """
        return math.inf

    def frame_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return channels, height and width of the latent of an image."""
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return config["out_channels" if layout_of(config) else "in_channels"], height, width

    def latent_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return channels, height and width of what the denoiser denoises: the latent of an image, or a canvas with a reference."""
        layout, shape = layout_of(config), self.frame_shape(config)
        return layout.canvas(shape) if layout else shape

    def resized(self, config: Mapping[str, Any], size: int | list[int]) -> dict[str, Any]:
        """Return the denoiser's configuration for latents of this size: the side of a square, or height and width."""
        return {**config, "sample_size": size}

    # Text

    @abstractmethod
    def encoder(self, model: Any, device: torch.device) -> TextEncoder:
        """Return the text encoders of a `loading.Model`, moved to a device."""

    @abstractmethod
    def rehearsed_cond(self, built: Mapping[str, Any], length: int) -> Cond:
        """Return the cond of one prompt of `length` tokens from networks by component, on the meta device."""

    @abstractmethod
    def meta_cond(self, networks: Mapping[str, Mapping[str, Any]]) -> Cond:
        """Return the cond of one prompt on the meta device, from configurations alone."""

    # The denoiser

    def reference_weights(self, net: Any) -> nn.Module:
        """Return the layer of a denoiser that takes the reference image."""
        return net.conv_in  # type: ignore[no-any-return]

    def share_attention(self, net: Any, count: int) -> None:
        """Let the self-attention of a denoiser see `count` consecutive images of a batch together; 1: each image alone.

        Raises InputError if denoisers of this kind cannot.
        """
        raise InputError(f"{self.models} cannot share its self-attention between images", "--set pairs=grid")

    def prepare(self, net: Any) -> None:
        """Set up a denoiser that was just built or loaded as its configuration requires, where its class does not do so."""
        return

    def take_reference(self, net: Any, layout: Layout) -> None:
        """Change a denoiser to one that takes a reference image. Its predictions do not depend on the reference at first.

        Raises InputError if denoisers of this kind cannot.
        """
        raise InputError(f"{self.models} cannot be trained to take a reference image", "use a Stable Diffusion 1, 2 or XL model")

    def set_references(self, net: Any, count: int) -> None:
        """Set the number of references of an image for a denoiser whose layout takes several."""
        net.register_to_config(**{COUNT: count})
        self.prepare(net)

    @abstractmethod
    def denoise(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the prediction [B, C, h, w] for x_t [B, C, h, w], timesteps [B] and the cond of B prompts."""

    def guided(self, denoise: Denoise, x_t: Tensor, t: Tensor, cond: Cond, empty: Cond, scales: Sequence[float]) -> list[Tensor]:
        """Return predictions [B, C, h, w] under guidance, one per guidance scale; `empty` is the cond of the empty prompt [1]."""
        return guided_predictions(denoise, x_t, t, cond, empty, scales)

    def rows(self, config: Mapping[str, Any], scales: Sequence[float]) -> int:
        """Return the rows per image that `guided` computes for these guidance scales."""
        return branches(*scales)

    @abstractmethod
    def blocks(self, net: Any) -> list[nn.Module]:
        """Return the blocks in the order of the forward pass, for sharding."""

    @abstractmethod
    def recomputed(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of the modules that diffusers recomputes with gradient checkpointing."""

    @abstractmethod
    def middle(self, net: Any) -> nn.Module:
        """Return the block whose output a discriminator reads."""

    @abstractmethod
    def feature_map(self, net: Any, output: Any) -> Tensor:
        """Return the output of the middle block as a map [B, channels, h, w]."""

    @abstractmethod
    def head(self, config: Mapping[str, Any]) -> Head:
        """Return a discriminator for the map of the middle block."""

    def add_head(self, net: Any) -> None:
        """Add a discriminator that reads the middle block, as the module `discriminator`; see `features`."""
        net.discriminator = self.head(net.config).to(net.device)

    @contextmanager
    def features(self, net: Any) -> Iterator[list[Tensor]]:
        """Context that collects what a discriminator uses from each call of the denoiser.

        This is the map [B, channels, h, w] of the middle block or, after `add_head`, the logits [B] of the head for it. The head runs
        inside of the call, where the weights of a sharded network are complete.
        """
        found: list[Tensor] = []
        head = getattr(net, "discriminator", nn.Identity())
        hook = self.middle(net).register_forward_hook(
            lambda module, inputs, output: found.append(head(self.feature_map(net, output)))
        )
        try:
            yield found
        finally:
            hook.remove()

    def add_adapters(self, net: Any, rank: int) -> None:
        """Add LoRA adapters of this rank to every module in `lora_targets`. Their output is zero at first."""
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(self.lora_targets)), net)

    def merged(self, net: Any, adapters: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """Return the weights of a denoiser, float32 on the CPU, with trained adapters merged into them; see `add_adapters`."""
        from diffusers.utils.peft_utils import recurse_remove_peft_layers
        from peft.tuners.tuners_utils import BaseTunerLayer

        copies: dict[int, Any] = {
            id(value): nn.Parameter(value.detach().to("cpu", torch.float32, copy=True)) for value in net.parameters()
        }
        twin = copy.deepcopy(net, copies)
        self.add_adapters(twin, rank)
        twin.load_state_dict(adapters, strict=False)
        for module in twin.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        merged: dict[str, Tensor] = recurse_remove_peft_layers(twin).state_dict()
        return merged


def tokenizer_of(text: str) -> str:
    """Return the name of the tokenizer of a text encoder, for example `tokenizer_2` of `text_encoder_2`."""
    return text.replace("text_encoder", "tokenizer")
