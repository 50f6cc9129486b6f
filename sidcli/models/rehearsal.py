"""All networks of a description on the meta device: no weight is read and no number computed, and what does not fit shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from sidcli.errors import InputError, first_line
from sidcli.models.codec import codec_factor
from sidcli.models.compatibility import OTHER_COPY
from sidcli.models.families import build
from sidcli.models.unet import Cond, denoise, sizes


def rehearse(
    networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str], latent: tuple[int, int, int], length: int
) -> None:
    """Draw one image, of shapes alone, with the networks of these descriptions, from a `latent` [C, h, w] and `length` tokens.

    Raises InputError, naming the description, for networks that cannot be built or do not fit together, and for images that are not RGB.
    """
    found = misfit(json.dumps(networks), latent, length)
    if found:
        raise InputError(f"{places[found[0]]} does not describe a network that generates images: {found[1]}", OTHER_COPY)


@lru_cache(maxsize=8)  # a model is described, and then loaded
def misfit(networks: str, latent: tuple[int, int, int], length: int) -> tuple[str, str] | None:
    """The component at which the drawing ends, and what is wrong; None where an image comes out."""
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
    except Exception as error:  # libraries answer a stranger's description with any kind of error
        return name, f"{type(error).__name__}: {first_line(error)}"
    return None
