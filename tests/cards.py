"""Reading the model card of an export as its user would: front matter, facts, and the commands, which are run."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from sidcli.formats.export import apart
from sidcli.models.loading import Model
from sidcli.models.sampler import Sampler, plan_for

PROMPT, SEED = "a cat", 0
FIXED = ", generator=torch.Generator().manual_seed(0)"
"""What makes the image of a stock pipeline repeat; without it a card's line draws another image each time."""


class Card:
    """README.md of an exported folder."""

    def __init__(self, folder: Path):
        self.folder, self.text = folder, (folder / "README.md").read_text(encoding="utf-8")
        _, front, self.body = self.text.split("---\n", 2)
        self.data: dict[str, Any] = yaml.safe_load(front)
        rows = [line.strip("| ").split(" | ") for line in self.body.splitlines() if line.startswith("| ")]
        self.facts = {row[0]: row[1] for row in rows if len(row) == 2}

    def code(self, language: str) -> str:
        """All code blocks of a language, one after the other."""
        found = re.findall(rf"^ *```{language}\n(.*?)^ *```", self.body, re.DOTALL | re.MULTILINE)
        return "".join(textwrap.dedent(block) for block in found)

    def commands(self) -> list[list[str]]:
        """Shell commands, in blocks and in the text."""
        lines = [*self.code("bash").splitlines(), *re.findall(r"`(sid [^\s`]+ [^`]+)`", self.body)]
        return [shlex.split(line) for line in lines]

    def draw(self, places: dict[str, Path], at: Path) -> np.ndarray:
        """Run the Python of the card with `places` for its placeholders; the image it saves, uint8 [H, W, 3]."""
        code = re.sub(r"guidance_scale=\d+", rf"\g<0>{FIXED}", self.code("python")).replace('"cat.png"', repr(str(at)))
        for name, path in places.items():
            code = code.replace(name, str(path))
        if "pipe" in code:
            code = code.replace("\npipe(", "\npipe.set_progress_bar_config(disable=True)\npipe(")
        exec(compile(code, "README.md", "exec"), {"torch": torch})
        with Image.open(at) as picture:
            return np.asarray(picture)


def options(command: list[str]) -> dict[str, str]:
    """Name -> value of a command whose options all have one."""
    return dict(zip(command[1::2], command[2::2], strict=True))


def ours(model: Model, noise: torch.Tensor | None = None) -> np.ndarray:
    """What `sid sample` draws for the card's prompt from seed 0, or from this noise."""
    sampler = Sampler(model, torch.device("cpu"))
    plan = plan_for(model)
    drawn = sampler.latents([PROMPT], sampler.noise([SEED], plan.noises) if noise is None else [noise], plan)
    return sampler.decode(drawn, [PROMPT], [SEED])[0]


def is_near(one: np.ndarray, other: np.ndarray, dtype: str) -> bool:
    """Within the rounding of a dtype."""
    return one.shape == other.shape and apart(one, other) <= {"fp32": 1, "fp16": 4, "bf16": 16}[dtype]
