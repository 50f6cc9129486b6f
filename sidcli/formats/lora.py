"""The difference student - teacher as a LoRA that stock diffusers loads into the teacher, and how much of the student it keeps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sidcli.errors import InputError, UsageError
from sidcli.formats.card import write_card
from sidcli.formats.diffusers_folder import run_pipeline, stock, student_scheduler, visits
from sidcli.formats.order import Order
from sidcli.sampler import plan_for
from sidcli.teachers import Model

USAGE = """```python
from diffusers import EulerDiscreteScheduler, {pipeline}

pipe = {pipeline}.from_pretrained("{teacher}")
pipe.scheduler = EulerDiscreteScheduler.from_pretrained("FOLDER", subfolder="scheduler")
pipe.load_lora_weights("FOLDER")
pipe("a cat", {visits}, guidance_scale=0).images[0].save("cat.png")
```

Rank {rank} keeps {kept:.1%} of the difference between student and teacher (squared norm over all weights that a LoRA can change)."""


def factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of this rank (Eckart-Young) of a Linear's [out, in] or a convolution's [out, in, h, w] weight difference,
    as the LoRA pair down [r, in(, h, w)] and up [out, r(, 1, 1)]."""
    flat = difference.flatten(1).double()
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    if difference.ndim == 4:
        return down.view(rank, *difference.shape[1:]).float().contiguous(), up[..., None, None].float().contiguous()
    return down.float().contiguous(), up.float().contiguous()


def layers(student: UNet2DConditionModel, teacher: UNet2DConditionModel, rank: int) -> tuple[dict[str, Tensor], float]:
    """LoRA weights by diffusers' names, and the share of the squared difference that they keep.

    Biases and norms cannot be in a LoRA; their difference counts as lost. Raises InputError where the two do not fit.
    """
    before = dict(teacher.named_parameters())
    weights: dict[str, Tensor] = {}
    total = lost = 0.0
    for name, after in student.named_parameters():
        if name not in before or before[name].shape != after.shape:
            raise InputError(f"the student's {name} does not fit this teacher", "--teacher: the model that the student came from")
        difference = after.detach().float() - before[name].detach().float()
        total += float(difference.square().sum())
        if after.ndim not in (2, 4) or not name.endswith(".weight"):
            lost += float(difference.square().sum())
            continue
        down, up = factors(difference, rank)
        lost += float((difference.flatten(1) - up.flatten(1) @ down.flatten(1)).square().sum())
        layer = name.removesuffix(".weight")
        weights |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return weights, 1.0 - lost / total if total else 1.0


def merged(model: Model, teacher: Model, rank: int) -> Model:
    """The teacher with the LoRA added, which is what its user will draw with."""
    weights, _ = layers(model.unet, teacher.unet, rank)
    unet = copy.deepcopy(teacher.unet)
    values = dict(unet.named_parameters())
    for name in weights:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            down, up = weights[name], weights[f"{layer}.lora_B.weight"]
            value = values[f"{layer}.weight"]
            value.data += (up.flatten(1) @ down.flatten(1)).view_as(value)
    return model.with_unet(unet)


def write(folder: Path, model: Model, order: Order) -> None:
    teacher = _teacher(order)
    weights, kept = layers(model.unet, teacher.unet, order.rank)
    kind = stock(model)
    kind.save_lora_weights(folder, unet_lora_layers={name: value.to(order.torch_dtype) for name, value in weights.items()})
    student_scheduler(model.scheduler_config, int(model.card["t_init"])).save_pretrained(folder / "scheduler")
    calls = ", ".join(f"{name}={value}" for name, value in visits(plan_for(model)).items())
    origin = teacher.source.origin
    origin = origin.removeprefix("hub:") if origin.startswith("hub:") else f"FOLDER_OF_{Path(teacher.source.name).name}"
    usage = USAGE.format(pipeline=kind.__name__, teacher=origin, visits=calls, rank=order.rank, kept=kept)
    write_card(folder, model, model.card | {"lora": {"rank": order.rank, "kept": round(kept, 6), "teacher": origin}}, usage)


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """One image, uint8 [H, W, 3], by stock diffusers: the teacher's pipeline with the LoRA loaded into it."""
    teacher = _teacher(order)
    networks: dict[str, Any] = {"unet": copy.deepcopy(teacher.unet), "vae": teacher.vae, "text_encoder": teacher.text_encoders[0]}
    networks["tokenizer"] = teacher.tokenizers[0]
    if model.is_xl:
        networks |= {"text_encoder_2": teacher.text_encoders[1], "tokenizer_2": teacher.tokenizers[1]}
    else:
        networks |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = stock(model)(**networks, scheduler=student_scheduler(model.scheduler_config, int(model.card["t_init"])))
    pipe.load_lora_weights(folder)
    return run_pipeline(pipe, plan_for(model), prompt, seed)


def _teacher(order: Order) -> Model:
    if order.teacher is None:
        raise UsageError("--format lora needs the teacher to take the difference from", "--teacher NAME")
    return order.teacher
