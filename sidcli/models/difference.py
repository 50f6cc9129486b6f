"""A model that is stored as the difference to another one: two low-rank factors for each large weight, as in a LoRA.

An embedded model that was trained from another embedded model needs a quarter of its size this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn


def extracted(component: str, changed: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the difference of the weights of a network to those of another one, in half precision, by COMPONENT/WEIGHT/PART.

    A weight with two or more dimensions becomes the factors `up` [out, rank] and `down` [rank, rest] of the best approximation of that
    rank (Eckart and Young 1936), if they are smaller than the difference; other weights become the difference `full`.
    """
    found: dict[str, Tensor] = {}
    for name, weight in changed.items():
        difference = (weight - base[name]).detach().float()
        rows = difference.flatten(1) if difference.ndim > 1 else difference
        if rows.ndim == 1 or rank * sum(rows.shape) >= rows.numel():
            found[f"{component}/{name}/full"] = difference.half()
            continue
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        root = s[:rank].sqrt()
        found[f"{component}/{name}/up"] = (u[:, :rank] * root).half().contiguous()
        found[f"{component}/{name}/down"] = (root[:, None] * v[:rank]).half().contiguous()
    return found


@torch.no_grad()
def add(net: nn.Module, component: str, file: Path) -> None:
    """Add the difference in a file to the weights of a network, float32."""
    weights = dict(net.named_parameters())
    with safe_open(file, "pt") as content:
        for key in content.keys():  # noqa: SIM118 - not a mapping
            owner, name, part = key.split("/")
            if owner != component or part == "down":
                continue
            value = content.get_tensor(key).float()
            if part == "up":
                value = value @ content.get_tensor(f"{owner}/{name}/down").float()
            weights[name].add_(value.view_as(weights[name]))
