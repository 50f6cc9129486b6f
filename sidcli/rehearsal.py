"""All networks of a description on the meta device: no weight is read and no number computed, and what does not fit shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sidcli.compatibility import OTHER_COPY
from sidcli.errors import InputError, first_line
from sidcli.families import build
from sidcli.text import Condition, denoise, sizes


def rehearse(
    networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str], latent: tuple[int, int, int], length: int
) -> None:
    """Draw one image's shape with the networks of these descriptions, from a `latent` [C, h, w] and `length` tokens.

    Raises InputError, naming the description, for networks that cannot be built or do not fit together, and for an image of the VAE
    that is not RGB.
    """
    running = "unet"
    try:
        with torch.device("meta"), torch.no_grad():
            built: dict[str, Any] = {}
            for running, config in networks.items():
                built[running] = build(running, config).eval()
            tokens, states, added = torch.zeros(1, length, dtype=torch.long), [], {}
            for running in (name for name in networks if name.startswith("text_encoder")):
                output = built[running](tokens, output_hidden_states=True)
                states.append(output.hidden_states[-2] if "text_encoder_2" in networks else output.last_hidden_state)
                added = (
                    {"text_embeds": output.text_embeds, "time_ids": torch.empty(1, len(sizes(0, 0)))} if len(states) == 2 else {}
                )
            running = "unet"
            x = torch.empty(1, *latent)
            predicted = denoise(built["unet"], x, torch.zeros(1, dtype=torch.long), Condition(torch.cat(states, -1), added))
            if predicted.shape != x.shape:
                raise ValueError(f"it turns latents {list(x.shape)} into {list(predicted.shape)}")
            running = "vae"
            image = built["vae"].decode(x).sample
            factor = 2 ** (len(networks["vae"]["block_out_channels"]) - 1)
            if image.shape != (1, 3, latent[1] * factor, latent[2] * factor):
                raise ValueError(f"it turns latents {list(x.shape)} into {list(image.shape)}")
    except Exception as error:  # libraries answer a stranger's description with any kind of error
        raise InputError(
            f"{places[running]} makes no network that draws: {type(error).__name__}: {first_line(error)}", OTHER_COPY
        ) from error
