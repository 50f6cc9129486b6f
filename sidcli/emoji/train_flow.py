"""Train the emoji teacher of flow matching, a small transformer of Stable Diffusion 3. See `sidcli.emoji.train`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidcli.diffusion.path import FlowPath
from sidcli.emoji import models
from sidcli.emoji.examples import Encode, Examples, draw_batch, encoded_empty, make_examples
from sidcli.emoji.fit import HALF_LIFE, Fit, Loss, check_same
from sidcli.files import atomic_folder
from sidcli.formats.diffusers_folder import write_pipeline
from sidcli.formats.order import Order
from sidcli.models.loading import Model, load
from sidcli.models.sd3 import joint_cond
from sidcli.models.sources import find

NAME = "flow"
GUIDANCE = 2.5
"""Default guidance scale of the teacher."""


def new_teacher(layers: int, heads: int) -> Model:
    """Return an untrained teacher with the VAE, the text encoder and the tokenizer of the shipped teacher."""
    shipped, scheduler = load(find("emoji-teacher")), models.new_flow_scheduler()
    shipped.vae.register_to_config(shift_factor=0.0)  # the stock pipeline of Stable Diffusion 3 cannot draw without one
    (encoder,), (tokenizer,) = shipped.text_encoders, shipped.tokenizers
    return replace(
        shipped,
        denoiser=models.new_transformer(layers, heads),
        text_encoders=(models.projected(encoder), models.blank_text_encoder(encoder)),
        tokenizers=(tokenizer, tokenizer),
        texts=(),
        path=FlowPath(scheduler.config.num_train_timesteps, scheduler.config.shift),
        scheduler_config=dict(scheduler.config),
        card=shipped.card | {"guidance": GUIDANCE},
    )


def encode_of(teacher: Model) -> Encode:
    """Return what encodes captions: the states [B, 25, 136] and the pooled projections [B, 136] of the transformer."""
    encoders, config = dict(zip(teacher.texts, teacher.text_encoders, strict=True)), teacher.denoiser.config

    def encode(tokens: Tensor) -> tuple[Tensor, ...]:
        cond = joint_cond(encoders, dict.fromkeys(encoders, tokens), config)
        return cond.states, cond.added["pooled_projections"]

    return encode


def velocity_loss(net: nn.Module, path: FlowPath, examples: Examples, empty: tuple[Tensor, ...], batch: int) -> Loss:
    """Return the loss of flow matching: the squared error of the velocity, with a tenth of the captions replaced by `empty`.

    The times t in 0..1 are logit-normal, the sigmoid of a standard normal (arXiv 2403.03206). The network computes in bf16.
    """
    device = examples.latents.device

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, (states, pooled), shares, noise = draw_batch(examples, empty, batch, step, NAME)
        t = path.steps * torch.special.ndtri(shares).sigmoid()
        with torch.autocast(device.type, torch.bfloat16):
            predicted = net(path.noised(x, noise, t), states, pooled_projections=pooled, timestep=t).sample.float()
        error = F.mse_loss(predicted, noise - x)
        return error, {"mse": error.detach()}

    return loss


def train_flow(
    output: Path,
    steps: int,
    batch: int = 64,
    seconds: float | None = None,
    device: str = "cpu",
    scenes: int = 40_000,
    bare: float = 1 / 3,
    lr: float = 1e-3,
    layers: int = 8,
    heads: int = 5,
) -> None:
    """Train a teacher of flow matching, for `steps`, or for `seconds` if they are given, and write it in half precision to
    `output`/flow.

    It learns from `scenes` scenes with their captions, as in `train.train_teacher_further`; a scene takes 9 kB on the device. Only
    the transformer is trained, with `layers` layers and `heads` heads of 32 channels. Raises InputError if `output` holds a training
    with other settings.
    """
    place, began = torch.device(device), time.monotonic()
    settings: dict[str, object] = {"scenes": scenes, "bare": bare, "batch": batch, "lr": lr, "layers": layers, "heads": heads}
    check_same(output / f"{NAME}.json", settings)
    teacher = new_teacher(layers, heads)
    encode = encode_of(teacher)
    examples = make_examples(teacher, encode, scenes, bare, place)
    print(f"{NAME}: {scenes} scenes in {time.monotonic() - began:.0f} s", flush=True)
    net, path = teacher.denoiser.to(place), teacher.path
    assert isinstance(path, FlowPath)
    loss = velocity_loss(net, path, examples, encoded_empty(teacher.tokenizers[0], encode, place), batch)
    fit = Fit(NAME, net, loss, output, steps, lr, decay=0.5 ** (batch / HALF_LIFE), seconds=seconds)
    fit.run()
    with atomic_folder(output / NAME) as folder:
        write_pipeline(folder, teacher, models.new_flow_scheduler(), teacher.card | {"steps_trained": fit.step}, Order("fp16"))
