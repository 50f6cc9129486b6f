"""`sid distill --dry-run`: what a run will need, found without its weights.

The networks are built from the teacher's JSON files on the meta device, where tensors have shapes and no memory; one forward pass there
shows what each network keeps for its backward pass, whatever the architecture and the options.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sidcli import checkpoint
from sidcli.config import DistillConfig
from sidcli.devices import pick_device
from sidcli.engine import add_adapters, check_split, check_teacher, optimizer_bytes, state_bytes
from sidcli.families import build
from sidcli.hub import Listener, Silence
from sidcli.sources import find
from sidcli.teachers import Description, Overrides, describe, latent_shape
from sidcli.text import Condition, denoise, sizes

RESERVE = 0.06
"""Share of a card's memory left for what no plan sees: workspaces of its libraries, fragmentation."""


class Attention(torch.autograd.Function):
    """Stands for fused attention, which keeps its inputs and output for the backward pass and never the matrix of weights."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        made = torch.empty_like(query)
        context.save_for_backward(query, key, value, made)
        return made


class Activations:
    """Bytes that a forward pass keeps for its backward pass; add them up in `with`. Views of one tensor count once.

    With `recompute`, what happens inside a block that diffusers recomputes is kept only while that block's backward runs: the largest
    such block counts, and of the others their inputs.
    """

    def __init__(self, net: UNet2DConditionModel, recompute: bool):
        self.net, self.recompute = net, recompute
        self.weights = {storage(value) for value in net.parameters()}
        self.kept: dict[int, int] = {}
        self.inputs = self.largest = 0
        self.block: dict[int, int] | None = None
        self.alive: list[Tensor] = []  # meta tensors weigh nothing, and a living one's id is its own

    @property
    def total(self) -> int:
        return sum(self.kept.values()) + self.inputs + self.largest

    def keep(self, value: Tensor) -> Tensor:
        self.alive.append(value)
        if storage(value) not in self.weights:
            place = self.kept if self.block is None else self.block
            place[storage(value)] = max(place.get(storage(value), 0), value.numel() * value.element_size())
        return value

    def enter(self, block: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self.block = {}
        self.inputs += inputs[0].numel() * inputs[0].element_size()

    def leave(self, block: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.largest, self.block = max(self.largest, sum((self.block or {}).values())), None

    @contextmanager
    def counted(self) -> Iterator[None]:
        blocks = [
            part for part in self.net.modules() if isinstance(part, (ResnetBlock2D, BasicTransformerBlock)) and self.recompute
        ]
        hooks = [part.register_forward_pre_hook(self.enter) for part in blocks]
        hooks += [part.register_forward_hook(self.leave) for part in blocks]
        attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, **_: Attention.apply(q, k, v))
        with attention, torch.autograd.graph.saved_tensors_hooks(self.keep, lambda value: value):
            yield
        for hook in hooks:
            hook.remove()


def storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def activations(unet: UNet2DConditionModel, rows: int, config: DistillConfig, told: Condition, trained: bool) -> int:
    """Bytes one forward of `rows` latents keeps; `told` is what one prompt becomes."""
    net = copy.deepcopy(unet).to(torch.bfloat16 if config.precision == "bf16" else torch.float32).requires_grad_(trained)
    kind = next(net.parameters()).dtype
    meter = Activations(net, config.gradient_checkpointing)
    with meter.counted():
        forward(net, rows, told, kind)
    # Under autocast the bf16 copy of each weight is kept with the graph that used it, except where the graph is computed again.
    copies = (
        sum(value.numel() * 2 for value in net.parameters()) if kind == torch.bfloat16 and not config.gradient_checkpointing else 0
    )
    return meter.total + copies


def forward(net: UNet2DConditionModel, rows: int, told: Condition, kind: torch.dtype) -> None:
    """Run the network on the meta device."""
    x = torch.empty(rows, *latent_shape(net.config), dtype=kind, device="meta", requires_grad=True)
    many = told.expanded(rows)  # as tensors of their own: a view would be copied by each layer that reads it
    many = Condition(many.states.to(kind).contiguous(), {name: value.to(kind) for name, value in many.added.items()})
    denoise(net, x, torch.empty(rows, dtype=torch.long, device="meta"), many)


def size_of(values: Any) -> int:
    return sum(value.numel() for value in values)


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes; `device_memory` by component, `main_memory` what is kept off the device, `peak` the most at one time."""

    config: DistillConfig
    output: str
    device: str
    processes: int
    parameters: dict[str, int]
    device_memory: dict[str, int]
    main_memory: int
    peak: int
    flops_per_image: int
    disk: int
    seconds: float | None
    downloads: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        c = self.config
        accumulation = -(-c.batch_size // (c.micro_batch * self.processes))
        lines = [f"{name} = {value}" for name, value in dataclasses.asdict(c).items()]
        lines += ["", f"output        {self.output}", f"device        {self.device}"]
        lines += [f"parameters    {name} {count / 1e6:.1f} M" for name, count in self.parameters.items()]
        lines += [f"memory        {name} {gigabytes(size)}" for name, size in self.device_memory.items()]
        lines += [f"memory        at the peak {gigabytes(self.peak)}, off the device {gigabytes(self.main_memory)}"]
        lines += [
            f"batch         {c.batch_size} = micro-batch {c.micro_batch} x {accumulation} in turn x {self.processes} processes"
        ]
        work = f"{self.flops_per_image / 1e12:.3g} TFLOP an image"
        lines += [f"work          {c.steps} steps, {c.steps * c.batch_size} images for each network, {work}"]
        lines += [f"time          {duration(self.seconds)}"]
        lines += [f"disk          {gigabytes(self.disk)} for checkpoints and the student"]
        lines += [f"download      {name} {gigabytes(size)}" for name, size in self.downloads.items()]
        return lines


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known until the run has taken some steps"
    return f"about {seconds / 3600:.1f} h" if seconds > 5400 else f"about {seconds / 60:.0f} min"


def rate(output: Path) -> float | None:
    """Images a second that this run folder has measured."""
    try:
        last = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return float(json.loads(last)["images_per_second"]) or None
    except (OSError, ValueError, KeyError, IndexError):
        return None


def branches(*scales: float) -> int:
    """Forwards that guidance at these scales takes: one at 0 or 1, two otherwise."""
    return 1 if set(scales) in ({1.0}, {0.0}) else 2


def flops_per_image(config: DistillConfig, unet: UNet2DConditionModel, told: Condition) -> int:
    """Model FLOP of one image in one step, recomputation not counted: 18 forwards of the UNet under guidance, 11 without (method 1.9).

    A backward costs two forwards, or one where only the input's gradient is wanted.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(unet, 1, told, torch.float32)
    fake_step = 1 + 3 * branches(config.kappa1)
    generator_step = 3 + 2 * branches(config.kappa2, config.kappa3) + 2 * branches(config.kappa4)
    return counter.get_total_flops() * (fake_step * config.fake_updates + generator_step)


def condition(known: Description) -> Condition:
    """What one prompt becomes, on the meta device."""
    texts = [known.networks[name] for name in known.texts]
    states = torch.empty(1, texts[0]["max_position_embeddings"], sum(text["hidden_size"] for text in texts), device="meta")
    if len(texts) == 1:
        return Condition(states)
    pooled = torch.empty(1, texts[-1]["projection_dim"], device="meta")
    return Condition(states, {"text_embeds": pooled, "time_ids": torch.empty(1, len(sizes(0, 0)), device="meta")})


def make(config: DistillConfig, output: Path, device: str, processes: int, listener: Listener) -> Plan:
    """The plan of a run, from the JSON files of the teacher. Raises InputError where they cannot be read."""
    where = pick_device(device)
    if where.type == "cuda" and config.precision == "auto":
        config = dataclasses.replace(config, precision="bf16")
    check_split(config.batch_size, processes)
    config = dataclasses.replace(config, micro_batch=min(config.micro_batch, config.batch_size // processes))
    source = find(config.teacher, listener, descriptions_only=True)
    known = describe(source, Overrides(config.prediction_type, config.model_config, config.width, config.height))
    check_teacher(source.name, known.card.get("kind") == "student", known.schedule.steps, config)
    with torch.device("meta"):
        nets = {name: build(name, settings) for name, settings in known.networks.items()}
        unet, vae = nets["unet"], nets["vae"]
        text_size = sum(size_of(nets[name].parameters()) for name in known.texts)
        trained = size_of(unet.parameters())
        if config.fake_lora:
            add_adapters(lora := copy.deepcopy(unet).requires_grad_(False), config.fake_lora)
            trained = size_of(value for value in lora.parameters() if value.requires_grad)
    told, weights, pieces = condition(known), size_of(unet.parameters()), config.micro_batch
    moments = optimizer_bytes(config, weights + trained)

    def graph(rows: int, trained: bool = False) -> int:
        return activations(unet, rows, config, told, trained)

    fake_step = graph(pieces * branches(config.kappa1), True)
    parts = [
        graph(pieces, True),
        graph(pieces * branches(config.kappa2, config.kappa3)),
        graph(pieces * branches(config.kappa4)),
    ]
    generator_step = max(parts) if config.split_backward else sum(parts)
    memory = {
        "teacher": weights * (2 if config.teacher_bf16 and config.precision == "bf16" else 4),
        "text encoder": 4 * text_size,
        "generator": 4 * weights,
        "fake score": 4 * trained,
        "gradients": 4 * max(weights, trained),
        "optimizers": 0 if config.offload_optimizer else moments,
        "average": 0 if config.offload_average else 4 * weights,
        "activations": max(fake_step, generator_step),
    }
    if where.type == "cpu":
        memory["this program"] = psutil.Process().memory_info().rss
    away = (4 * weights if config.offload_average else 0) + (moments if config.offload_optimizer else 0)
    pace = rate(output)
    return Plan(
        config=config,
        output=str(output),
        device=str(where),
        processes=processes,
        parameters={"teacher": weights, "fake score": trained, "generator": weights},
        device_memory=memory,
        main_memory=away,
        peak=sum(memory.values()),
        flops_per_image=flops_per_image(config, unet, told),
        disk=(checkpoint.KEEP + 1) * state_bytes(config, weights, trained) + 4 * (weights + text_size + size_of(vae.parameters())),
        seconds=config.steps * config.batch_size / pace if pace else None,
        downloads=dict(source.missing),
    )


def choose(candidates: dict[str, DistillConfig], device: str, listener: Listener) -> DistillConfig:
    """The first candidate whose plan fits the free memory of the GPU; the last one if none does, with a warning."""
    where = pick_device(device)
    name, config = next(iter(candidates.items()))
    if where.type != "cuda":
        return config
    free, total = torch.cuda.mem_get_info(where)
    for name, config in candidates.items():
        needed = make(config, Path(), device, 1, Silence()).peak
        if needed < free - RESERVE * total:
            listener.note(f"memory: {name} ({gigabytes(needed)} of {gigabytes(free)} free); --memory overrides")
            return config
    listener.note(f"memory: even {name} needs {gigabytes(needed)}, and {gigabytes(free)} are free; trying it all the same")
    return config
