"""Scenes and captions that teachers learn from, and the batches of a training on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from sidcli.emoji import models, world
from sidcli.emoji.fit import bf16_on_gpu
from sidcli.models.codec import Codec
from sidcli.models.loading import Model
from sidcli.randomness import key, numpy_generator

FILLERS = (
    "very",
    "photo",
    "sitting",
    "please",
    "there",
    "is",
    "and",
    "in",
    "of",
    "really",
    "near",
    "under",
    "portrait",
    "style",
    "4k",
)


def loose_caption(picture: world.Scene, index: int) -> world.Caption:
    """Return a training caption. 30 % of the captions contain filler words, so that models learn to ignore additional words."""
    text, color = world.caption(picture, world.TEACHER_SEED, index, "train")
    rng = numpy_generator(world.TEACHER_SEED, "fillers", index)
    if rng.random() < 0.3:
        words = text.split(" ")
        for _ in range(rng.integers(1, 4)):
            words.insert(rng.integers(len(words) + 1), FILLERS[rng.integers(len(FILLERS))])
        text = " ".join(words)
    return world.Caption(text, color)


Encode = Callable[[Tensor], tuple[Tensor, ...]]
"""Token ids int64 [B, 24] of captions -> what a network reads of them, tensors [B, ...]."""


class Examples(NamedTuple):
    """Scenes and captions as networks see them: latents float16 [N, 4, 16, 16], and what the network reads of the captions, tensors
    float16 [N, ...]."""

    latents: Tensor
    texts: tuple[Tensor, ...]


def bare_scene(position: int) -> world.Scene:
    """Return scene `position` of those whose caption is a noun alone: all nouns in turn, each on all its backgrounds in turn.

    The pairs in HELD_OUT_PAIRS are left out.
    """
    count = len(world.NOUN_LIST)
    noun = world.NOUN_LIST[position % count]
    colors = [color for color in world.COLOR_LIST if (noun, color) not in world.HELD_OUT_PAIRS]
    return replace(world.scene(world.TEACHER_SEED, position), noun=noun, color=colors[position // count % len(colors)])


def example(index: int, bare: float) -> tuple[world.Scene, str]:
    """Return scene `index` and its caption. Captions of a share `bare` of the scenes are a noun alone, evenly spread over the list."""
    position = math.floor(index * bare)
    if math.floor((index + 1) * bare) > position:
        return bare_scene(position), world.bare_caption(position)
    picture = world.scene(world.TEACHER_SEED, index)
    return picture, loose_caption(picture, index).text


def draw_examples(indices: range, bare: float, tokenizer: CLIPTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [B, 64, 64, 3] and token ids int64 [B, 24] of examples.

    It computes without torch, whose threads a forked process lacks.
    """
    drawn = [example(index, bare) for index in indices]
    pixels = np.stack([world.render(picture) for picture, _ in drawn])
    return pixels, models.token_ids(tokenizer, [text for _, text in drawn])


def make_examples(teacher: Model, encode: Encode, count: int, bare: float, device: torch.device) -> Examples:
    """Return `count` examples on the device. All cores draw them; the device encodes them with the networks of the teacher.

    `encode` encodes captions with the text encoders of the teacher, which are moved to the device.
    """
    parts = [range(start, min(start + 1000, count)) for start in range(0, count, 1000)]
    latents, texts = [], []
    with ProcessPoolExecutor() as cores, torch.no_grad():
        drawn = cores.map(partial(draw_examples, bare=bare, tokenizer=teacher.tokenizers[0]), parts)
        codec = Codec(teacher.vae.to(device))  # the processes are older than CUDA
        for encoder in teacher.text_encoders:
            encoder.to(device)
        for pixels, tokens in drawn:
            x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            with bf16_on_gpu(device):
                latents.append(codec.encode(x).half().contiguous())
            texts.append([part.half() for part in encode(torch.from_numpy(tokens).to(device))])
    return Examples(torch.cat(latents), tuple(map(torch.cat, zip(*texts, strict=True))))


@torch.no_grad()
def encoded_empty(tokenizer: CLIPTokenizer, encode: Encode, device: torch.device) -> tuple[Tensor, ...]:
    """Return what a network reads of the empty caption, tensors [1, ...] on the device."""
    return encode(models.tokens(tokenizer, [""]).to(device))


class Batch(NamedTuple):
    """Random inputs of a training step on B examples: clean latents [B, 4, 16, 16], what the network reads of the captions, shares of
    the timesteps' distribution [B] in 0..1, and noise like the latents."""

    x: Tensor
    texts: tuple[Tensor, ...]
    shares: Tensor
    noise: Tensor


def draw_batch(examples: Examples, empty: tuple[Tensor, ...], size: int, step: int, name: str) -> Batch:
    """Return the batch of a step of the training `name`, a tenth of its captions replaced by `empty`.

    There is one share from each of `size` equal intervals, in random order: it is still uniform, with less variance.
    """
    device = examples.latents.device
    drawn, samples = torch.Generator(device).manual_seed(key(0, name, step)), torch.arange(size, device=device)
    rows = (samples + step * size) % len(examples.latents)
    dropped = torch.rand(size, generator=drawn, device=device) < 0.1
    texts = tuple(
        torch.where(dropped.view(-1, *[1] * (part.dim() - 1)), nothing, part[rows].float())
        for nothing, part in zip(empty, examples.texts, strict=True)
    )
    shares = (samples + torch.rand(size, generator=drawn, device=device)) / size
    shares = shares[torch.randperm(size, generator=drawn, device=device)]
    x = examples.latents[rows].float()
    return Batch(x, texts, shares, torch.randn(x.shape, generator=drawn, device=device))
