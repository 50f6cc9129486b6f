"""What the kinds of transformers share: text encoders of CLIP and a language model, tokens of patches, and checks of their latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sidcli.errors import InputError
from sidcli.models import families, t5, tokenizers
from sidcli.models.compatibility import OTHER_COPY, OTHER_MODEL, check_scale, is_number, positive_integer, sides_of, value_text
from sidcli.models.kind import Cond, Head, Kind

LARGE = 1_000_000_000
"""Weights of a transformer above which student and fake score are LoRAs by default. A training of all weights takes 26 bytes for each of
them: 2 of the teacher in bf16, 4 of each of student, fake score, their gradients, their two second moments and the weight average. So
this is what no longer fits a GPU of 24 GB, even without activations and text encoders."""


class Tokens(NamedTuple):
    """Token ids and attention mask of B prompts for one text encoder, int64 [B, length]. The mask is 0 behind the end of a prompt."""

    ids: Tensor
    mask: Tensor


class Transformer(Kind):
    """A kind whose denoiser is a transformer. Its last text encoder is a language model, those before it are of CLIP."""

    component, title = "transformer", "transformer"
    formats: ClassVar[tuple[str, ...]] = ("diffusers", "lora")
    lora_above = LARGE
    text_classes: ClassVar[Mapping[str, str]]
    """Text encoder -> its class in transformers."""
    language: ClassVar[Any] = t5
    """Module that reads the configuration and the tokenizer of the language model."""

    @property
    def language_model(self) -> str:
        return self.texts[-1]

    @abstractmethod
    def text_tokens(self, config: Mapping[str, Any]) -> int:
        """Return the number of tokens that the last text encoder reads for a denoiser with this configuration, as the stock pipeline
        does."""

    @abstractmethod
    def cond(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tokens], config: Mapping[str, Any]) -> Cond:
        """Return the cond of B prompts from their tokens by text encoder; `config` is the denoiser's configuration."""

    def prepared(self, prompt: str) -> str:
        """Return the text that the tokenizers read."""
        return prompt

    # Files

    def network_class(self, component: str) -> Any:
        if component in self.texts:
            import transformers

            return getattr(transformers, self.text_classes[component])
        import diffusers

        return getattr(diffusers, self.rules.classes[component])

    def text_config(self, component: str, config: Mapping[str, Any]) -> Any:
        return (self.language if component == self.language_model else families).text_config(config)

    def read_tokenizer(self, component: str, folder: Path, config: Mapping[str, Any], place: str) -> Any:
        return (self.language if component == self.language_model else tokenizers).read_tokenizer(folder, config, place)

    # Text

    def encoder(self, model: Any, device: torch.device) -> TextEncoders:
        return TextEncoders(self, model, device)

    def rehearsed_cond(self, built: Mapping[str, Any], length: int) -> Cond:
        config, encoders = built[self.component].config, {name: built[name] for name in self.texts if name in built}
        lengths = {name: self.text_tokens(config) if name == self.language_model else length for name in encoders}
        tokens = {name: torch.zeros(1, count, dtype=torch.long, device="meta") for name, count in lengths.items()}
        return self.cond(encoders, {name: Tokens(ids, ids) for name, ids in tokens.items()}, config)

    # The denoiser

    def patch(self, config: Mapping[str, Any], place: str) -> int:
        return positive_integer({"patch_size": 2, **config}, "patch_size", place)

    def blocks(self, net: Any) -> list[nn.Module]:
        return list(net.transformer_blocks)

    def middle(self, net: Any) -> nn.Module:
        blocks = self.blocks(net)
        return blocks[len(blocks) // 2]

    def feature_map(self, net: Any, output: Any) -> Tensor:
        _, height, width = self.latent_shape(net.config)
        patch = self.patch(net.config, self.title)
        states: Tensor = output[1] if isinstance(output, tuple) else output  # the first of two outputs is that of the text
        return states.transpose(1, 2).unflatten(2, (height // patch, width // patch))

    def head(self, config: Mapping[str, Any]) -> Head:
        _, height, width = self.latent_shape(config)
        patch, heads = self.patch(config, self.title), config["num_attention_heads"]
        return Head(heads * config["attention_head_dim"], height // patch, width // patch, heads)


class TextEncoders:
    """The text encoders of a model on a device, by name. `truncated` counts prompts that are longer than the last of them reads.

    If `model.text_bf16` is set, the weights of the model's own language model become bf16, which takes no memory for a copy.
    """

    def __init__(self, kind: Transformer, model: Any, device: torch.device):
        self.kind, self.config, self.device, self.truncated = kind, model.denoiser.config, device, 0
        if model.text_bf16:
            # Not its buffers: the frequencies of Gemma's positions, in bf16, would be wrong for all but the first tokens.
            for value in model.networks[kind.language_model].parameters():
                value.data = value.data.bfloat16()
        self.encoders = {name: encoder.to(device) for name, encoder in zip(model.texts, model.text_encoders, strict=True)}
        self.tokenizers = dict(zip(model.texts, model.tokenizers, strict=True))

    def tokens(self, name: str, prompts: Sequence[str]) -> Tokens:
        """Return the tokens of B prompts for the encoder `name`."""
        is_language_model = name == self.kind.language_model
        length = self.kind.text_tokens(self.config) if is_language_model else self.tokenizers[name].model_max_length
        return self.padded(name, [self.kind.prepared(prompt) for prompt in prompts], length)

    def padded(self, name: str, texts: Sequence[str], length: int) -> Tokens:
        """Return the tokens of B texts for the encoder `name`, cut off or filled up to this length."""
        tokenizer = self.tokenizers[name]
        if name == list(self.encoders)[-1]:
            self.truncated += sum(len(row) > length for row in tokenizer(texts).input_ids)
        found = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return Tokens(found.input_ids.to(self.device), found.attention_mask.to(self.device))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Cond:
        cond = self.kind.cond(self.encoders, {name: self.tokens(name, prompts) for name in self.encoders}, self.config)
        return replace(cond, states=cond.states.float())


def check_latents(name: str, channels: int, vae: Mapping[str, Any], place: str) -> None:
    """Raises InputError if the transformer of the model `name` does not take the latents of its VAE, whose configuration is in `place`."""
    latent = positive_integer({"latent_channels": 4, **vae}, "latent_channels", place)
    if channels != latent:
        raise InputError(f"{name}: the transformer takes latents of {channels} channels, its VAE gives {latent}", OTHER_COPY)
    check_scale(place, vae)
    shift = vae.get("shift_factor")
    if shift is not None and not is_number(shift):
        raise InputError(f"{place}: shift_factor is {value_text(shift)}; it must be a number", OTHER_COPY)


def check_outputs(config: Mapping[str, Any], place: str, *supported: int) -> None:
    """Raises InputError if the number of output channels of a transformer is not a supported one."""
    channels = config["in_channels"]
    if config.get("out_channels", supported[0]) not in (None, *supported):
        raise InputError(f"{place}: out_channels is {config['out_channels']} where in_channels is {channels}", OTHER_MODEL)


def check_square(name: str, config: Mapping[str, Any]) -> None:
    """Raises InputError if the images are not square. The position embeddings of the transformer then fit no exported student."""
    height, width = sides_of(config) or (0, 0)
    if height != width:
        raise InputError(
            f"{name} draws square images; sample_size is {value_text(config['sample_size'])}", "--width equal to --height"
        )


def check_states(
    name: str,
    config: Mapping[str, Any],
    entry: str,
    text: Mapping[str, Any],
    places: Sequence[str],
    title: str = "T5",
    width_entry: str = "d_model",
) -> None:
    """Raises InputError if an entry of the transformer's configuration is not the width of the language model `title`.

    `width_entry` is the entry of its configuration with the width; `places` are the files of both configurations.
    """
    wanted, width = positive_integer(config, entry, places[0]), positive_integer(text, width_entry, places[1])
    if wanted != width:
        raise InputError(f"{name}: {entry} is {wanted}, and the states of {title} have width {width}", OTHER_COPY)


def keep_positions(config: Mapping[str, Any], resized: dict[str, Any], default: float | None) -> dict[str, Any]:
    """Return a resized configuration with the positions that the stock pipeline computes at that size.

    A position is the index of a token times `base size / (tokens on a side * interpolation scale)`. The base size is that of the
    configuration, so the scale keeps its ratio to the tokens on a side. `default` is the scale of a configuration without one; None:
    the transformer then has no positions.
    """
    before, size = config.get("sample_size"), resized["sample_size"]
    scale = config.get("interpolation_scale") or default
    if scale and isinstance(before, int) and isinstance(size, int) and size != before:
        return {**resized, "interpolation_scale": scale * size / before}
    return resized
