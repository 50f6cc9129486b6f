"""Train the models of the emoji world's identities: the reader, and the teacher that draws sheets. See `sidcli.emoji.train`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sidcli.diffusion.path import DiscretePath
from sidcli.emoji import fit, identities, models, world
from sidcli.emoji.identities import Panels, Sheet
from sidcli.emoji.reader import HEADS, Reader
from sidcli.errors import InputError
from sidcli.files import atomic_folder
from sidcli.formats.diffusers_folder import write_pipeline
from sidcli.formats.order import Order
from sidcli.models.codec import Codec
from sidcli.models.drawing import Plan
from sidcli.models.loading import Model, load
from sidcli.models.sampler import Sampler
from sidcli.models.sources import WEIGHTS, Source, fingerprint
from sidcli.randomness import key, normal

SHARES: dict[Panels, float] = {1: 0.3, 2: 0.65, 4: 0.05}
"""Share of the images of each kind in the training of the teacher of sheets."""


def read_scenes(step: int, batch: int) -> tuple[list[identities.Portrait], Tensor]:
    """Return panels of all identities for the reader, and their degraded images float32 [B, 3, 64, 64] in 0..255."""
    panels = [
        identities.sheet(world.METRIC_SEED, step * batch + sample, 1, identities.USES[sample % len(identities.USES)]).panels[0]
        for sample in range(batch)
    ]
    pixels = torch.from_numpy(np.stack([identities.render(panel) for panel in panels])).permute(0, 3, 1, 2).float()
    return panels, fit.degraded(pixels, step)


def truth(panels: Sequence[identities.Portrait]) -> dict[str, Tensor]:
    """Return the attributes of panels as int64 [B], by the name of the reader's head."""
    values = {
        "noun": [world.NOUN_LIST.index(panel.noun) for panel in panels],
        "color": [world.COLOR_LIST.index(panel.color) for panel in panels],
        **{name: [getattr(panel.identity, name) for panel in panels] for name in identities.Identity._fields},
    }
    return {name: torch.tensor(value) for name, value in values.items()}


def train_reader(output: Path, steps: int, batch: int = 64) -> None:
    """Train the reader. Every second image went through the VAE of the shipped teacher, as images of models do."""
    net, codec = Reader(), Codec(load(Source("teacher", WEIGHTS / "teacher", "teacher")).vae)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        panels, pixels = read_scenes(step, batch)
        with torch.no_grad(), fit.half_precision():
            pixels[::2] = codec.decode(codec.encode(pixels[::2] / 127.5 - 1.0)) * 255.0
        wanted = truth(panels)
        with fit.half_precision():
            logits = net(pixels)
        total = sum((F.cross_entropy(logits[name].float(), wanted[name]) for name in HEADS), torch.zeros(()))
        right = {name: (logits[name].argmax(1) == wanted[name]).float().mean() for name in HEADS}
        return total, {"loss": total.detach(), **right}

    fit.Fit("reader", net, loss, output, steps, lr=2e-3, decay=0.99).run()
    save_file(net.state_dict(), output / "reader.safetensors")


def sheets_at(step: int, batch: int) -> list[Sheet]:
    """Return the sheets of a training step, all with as many panels. A step has `batch` panels in all."""
    panels = panels_at(step)
    count = max(1, batch // panels)
    return [identities.sheet(world.TEACHER_SEED, step * count + sample, panels) for sample in range(count)]


def panels_at(step: int) -> Panels:
    """Return the number of panels of the sheets of a step: each kind evenly spread over the steps, in its share."""
    passed = 0.0
    for panels, share in SHARES.items():
        passed += share
        if math.floor((step + 1) * passed + 1e-9) > math.floor(step * passed + 1e-9):
            return panels
    return 1


def drawn_at(step: int, batch: int) -> tuple[np.ndarray, list[str]]:
    """Return the images uint8 [B, H, W, 3] and the captions of the sheets of a training step. It computes without torch, as forked
    processes must."""
    sheets = sheets_at(step, batch)
    captions = [identities.sheet_caption(picture.noun, picture.colors) for picture in sheets]
    return np.stack([identities.render_sheet(picture) for picture in sheets]), captions


class Ahead:
    """The sheets of consecutive steps, which all cores but one draw before they are needed. Its processes use neither torch nor CUDA."""

    def __init__(self, batch: int):
        count = max(1, (os.cpu_count() or 1) - 1)
        self.cores, self.batch, self.depth = ProcessPoolExecutor(count), batch, 2 * count
        self.waiting: dict[int, Future[tuple[np.ndarray, list[str]]]] = {}

    def at(self, step: int) -> tuple[np.ndarray, list[str]]:
        """Return the images and captions of a step, and start on those of the next steps."""
        for coming in range(step, step + self.depth):
            if coming not in self.waiting:
                self.waiting[coming] = self.cores.submit(drawn_at, coming, self.batch)
        return self.waiting.pop(step).result()


def sheets_loss(teacher: Model, batch: int, device: torch.device) -> fit.Loss:
    """Return the loss of epsilon prediction on sheets, with the weight 1 / sqrt(SNR), at most 10, and a tenth of the captions empty.

    It trains the UNet and the text encoder of the teacher, which are on the device. The weight is that of arXiv 2310.08442. Identities
    are decided at high noise, where the usual min-SNR weight is so small that panels do not come to agree.
    """
    unet, encoder, tokenizer = teacher.denoiser, teacher.text_encoders[0], teacher.tokenizers[0]
    codec, ahead = Codec(teacher.vae), Ahead(batch)
    path = teacher.path
    assert isinstance(path, DiscretePath)
    abar = path.abar.float().to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, captions = ahead.at(step)
        count = len(images)
        drawn = torch.Generator().manual_seed(key(0, "sheets", step))
        dropped = (torch.rand(count, generator=drawn) < 0.1).tolist()
        tokens = models.tokens(tokenizer, ["" if drop else text for text, drop in zip(captions, dropped, strict=True)])
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.no_grad(), fit.half_precision():
            x = codec.encode(pixels).float()
        # One timestep from each of `count` equal intervals, in random order, as in `train.train_teacher`.
        t = ((torch.arange(count) + torch.rand(count, generator=drawn)) * (1000 / count)).long().clamp(max=999)
        t = t[torch.randperm(count, generator=drawn)].to(device)
        noise = torch.randn(x.shape, generator=drawn).to(device)
        a = abar[t].view(-1, 1, 1, 1)
        with fit.half_precision():
            states = encoder(tokens.to(device)).last_hidden_state
            predicted = unet(a.sqrt() * x + (1.0 - a).sqrt() * noise, t, states).sample.float()
        error = (predicted - noise).square().mean((1, 2, 3))
        weighted = (path.debiased_weight(t).flatten() * error).mean()
        return weighted, {"mse": error.mean().detach(), f"weighted_{panels_at(step)}": weighted.detach()}

    return loss


def draw_sheets(teacher: Model, device: torch.device) -> Image.Image:
    """Return a picture of 24 sheets of two panels that the teacher draws."""
    sampler = Sampler(teacher, device)
    shown = [identities.sheet(world.PROMPT_SEED, index, 2) for index in range(24)]
    texts = [identities.sheet_caption(picture.noun, picture.colors) for picture in shown]
    noise = normal((4, 16, 32), 0, "sheets probe", 0, range(len(shown)))
    with torch.no_grad(), fit.half_precision():
        latents = sampler.latents(texts, [noise.to(device)], Plan(15, 2.0)).float()
        images = sampler.decode(latents, texts, range(len(shown)))
    return Image.fromarray(np.concatenate([np.concatenate(list(images[place : place + 6]), 1) for place in range(0, 24, 6)]))


def train_sheets(
    output: Path,
    steps: int,
    batch: int = 32,
    start: Path = WEIGHTS / "teacher",
    lr: float = 1e-3,
    seconds: float | None = None,
    device: str = "cpu",
) -> None:
    """Train the teacher in the folder `start` to draw identities and sheets, and write it in half precision to `output`/sheets.

    Its text encoder is trained too: it must tell the background of one panel from that of another, which captions of one image do not
    need. Raises InputError if `start` is not a teacher of the emoji world that predicts epsilon, or if `output` holds a training with other
    settings.
    """
    teacher, place = load(Source("teacher", start, str(start))), torch.device(device)
    path = teacher.path
    if teacher.is_student or not teacher.is_emoji or path.prediction != "epsilon" or not isinstance(path, DiscretePath):
        raise InputError(f"{start} is not a teacher of the emoji world that predicts epsilon", "leave --start out")
    fit.check_same(output / "sheets.json", {"start": fingerprint(teacher.source), "batch": batch, "lr": lr})
    began = time.monotonic()
    loss = sheets_loss(teacher, batch, place)
    networks = nn.ModuleDict({"unet": teacher.denoiser, "text": teacher.text_encoders[0]}).to(place).requires_grad_(True)
    teacher.vae.to(place)

    def probe() -> str:
        file = output / f"sheets-{training.step:06d}.png"
        draw_sheets(teacher, place).save(file)
        return str(file)

    training = fit.Fit("sheets", networks, loss, output, steps, lr, decay=0.999 ** (batch / 32), seconds=seconds)
    training.run(probe, probe_steps=500)
    print(f"sheets: {time.monotonic() - began:.0f} s", flush=True)
    card = teacher.card | {"steps_trained": teacher.card.get("steps_trained", 0) + training.step, "sheets": True}
    with atomic_folder(output / "sheets") as folder:
        write_pipeline(folder, teacher, models.new_scheduler(), card, Order("fp16"))
