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
from sidcli.models.drawing import sizes
from sidcli.models.families import build
from sidcli.models.unet import Cond, denoise


def rehearse(
    networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str], latent: tuple[int, int, int], length: int
) -> None:
    """Generate one image with the given network configurations on the meta device, from a `latent` [C, h, w] and `length` tokens.

    Raises InputError, naming the configuration, if a network cannot be built or does not fit the others, or the image is not RGB.
    """
    found = misfit(json.dumps(networks), latent, length)
    if found:
        raise InputError(f"{places[found[0]]} does not describe a network that generates images: {found[1]}", OTHER_COPY)


@lru_cache(maxsize=8)  # a command describes a model first and loads it later
def misfit(networks: str, latent: tuple[int, int, int], length: int) -> tuple[str, str] | None:
    """Return the component that fails and the error, or None if the networks generate an image. `networks` is JSON text."""
    configs: dict[str, dict[str, Any]] = json.loads(networks)
    device, name = torch.device("meta"), "unet"
    built: dict[str, Any] = {}
    try:
        with device:
            for name, config in configs.items():
                built[name] = build(name, config).eval()
        with torch.no_grad():
            states, added = [], {}
            for name in (name for name in configs if name.startswith("text_encoder")):
                output = built[name](torch.zeros(1, length, dtype=torch.long, device=device), output_hidden_states=True)
                states.append(output.hidden_states[-2] if "text_encoder_2" in configs else output.last_hidden_state)
                if name == "text_encoder_2":
                    added = {"text_embeds": output.text_embeds, "time_ids": torch.empty(1, len(sizes(0, 0)), device=device)}
            name, x = "unet", torch.empty(1, *latent, device=device)
            t = torch.zeros(1, dtype=torch.long, device=device)
            predicted = denoise(built["unet"], x, t, Cond(torch.cat(states, -1), added))
            if predicted.shape != x.shape:
                return "unet", f"it turns latents {list(x.shape)} into {list(predicted.shape)}"
            name, image = "vae", built["vae"].decode(x).sample
            factor = codec_factor(configs["vae"])
            if image.shape != (1, 3, latent[1] * factor, latent[2] * factor):
                return "vae", f"it turns latents {list(x.shape)} into {list(image.shape)}"
    except Exception as error:  # libraries raise any kind of error for an invalid configuration
        return name, f"{type(error).__name__}: {first_line(error)}"
    return None
