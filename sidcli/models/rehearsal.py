"""Run all networks of a model on the meta device, to find shape errors without reading weights or computing values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from sidcli.errors import InputError, first_line
from sidcli.models.codec import codec_factor
from sidcli.models.compatibility import OTHER_COPY
from sidcli.models.kind import Kind


def rehearse(kind: Kind, networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str], length: int) -> None:
    """Generate one image with the given network configurations on the meta device, from a latent and a prompt of `length` tokens.

    Raises InputError, naming the configuration, if a network cannot be built or does not fit the others, or the image is not RGB.
    """
    found = misfit(kind, json.dumps(networks), length)
    if found:
        raise InputError(f"{places[found[0]]} does not describe a network that generates images: {found[1]}", OTHER_COPY)


@lru_cache(maxsize=8)  # a command describes a model first and loads it later
def misfit(kind: Kind, networks: str, length: int) -> tuple[str, str] | None:
    """Return the component that fails and the error, or None if the networks generate an image. `networks` is JSON text."""
    configs: dict[str, dict[str, Any]] = json.loads(networks)
    device, name = torch.device("meta"), kind.component
    latent = kind.latent_shape(configs[kind.component])
    built: dict[str, Any] = {}
    try:
        with device:
            for name, config in configs.items():
                built[name] = kind.build(name, config).eval()
        with torch.no_grad():
            name = next(text for text in kind.texts if text in configs)
            cond = kind.rehearsed_cond(built, length)
            name, x = kind.component, torch.empty(1, *latent, device=device)
            predicted = kind.denoise(built[name], x, torch.zeros(1, dtype=torch.long, device=device), cond)
            if predicted.shape != x.shape:
                return name, f"it turns latents {list(x.shape)} into {list(predicted.shape)}"
            name, image = "vae", built["vae"].decode(x).sample
            factor = codec_factor(configs["vae"])
            if image.shape != (1, 3, latent[1] * factor, latent[2] * factor):
                return "vae", f"it turns latents {list(x.shape)} into {list(image.shape)}"
    except Exception as error:  # libraries raise any kind of error for an invalid configuration
        return name, f"{type(error).__name__}: {first_line(error)}"
    return None
