"""`sid distill --dry-run`: what a run will need, found by taking two steps of the real engine on tensors without content.

Fake tensors have shapes and storages but no memory, so a meter that adds up the live ones sees what the real run will hold, whatever
the architecture and the options. Works on the CPU alone; only JSON files of the teacher are read.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sidcli import checkpoint
from sidcli.config import DistillConfig
from sidcli.engine import Engine
from sidcli.errors import InputError
from sidcli.prompts import open_prompts
from sidcli.sampler import pick_device
from sidcli.teachers import Model, find, read_card, read_schedule

RESERVE = 0.06
"""Share of a card's memory left for what no plan sees: workspaces of its libraries, fragmentation."""


class Meter(TorchDispatchMode):
    """Adds up the storages that are alive while the mode is on. `peak` is the largest sum so far, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self.see(value)
        return made

    def see(self, value: torch.Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or value.device.type == "meta":
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def weightless(name: str, note: Any) -> Model:
    """The teacher's networks without weights, from its JSON files; call it where tensors are fake."""
    source = find(name, note)
    folder = source.folder

    def read(*parts: str) -> dict[str, Any]:
        try:
            return json.loads(folder.joinpath(*parts).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{name}: cannot read {'/'.join(parts)}: {error}", "pass a Stable Diffusion folder or hub id"
            ) from error

    scheduler = read("scheduler", "scheduler_config.json")
    with torch.device("meta"):  # training never decodes, so the VAE takes no room
        vae = AutoencoderKL.from_config(read("vae", "config.json"))
    unet = UNet2DConditionModel.from_config(read("unet", "config.json"))
    nets = (unet, vae, CLIPTextModel(CLIPTextConfig(**read("text_encoder", "config.json"))))
    for net in nets:
        net.eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return Model(source, *nets, tokenizer, read_schedule(scheduler), scheduler, read_card(source))


def count_bytes(values: Any) -> int:
    """Bytes of distinct tensors."""
    return sum({value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in values}.values())


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
    disk: int
    seconds: float | None

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
        lines += [f"work          {c.steps} steps, {c.steps * c.batch_size} images for each network"]
        lines += [f"time          {duration(self.seconds)}"]
        lines += [f"disk          {gigabytes(self.disk)} for checkpoints and the student"]
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


def make(config: DistillConfig, output: Path, device: str, processes: int, note: Any) -> Plan:
    """Two steps without content, one micro-batch each: accumulating more of them needs no more memory."""
    where = pick_device(device)
    precision = "bf16" if where.type == "cuda" and config.precision == "auto" else config.precision
    small = dataclasses.replace(
        config, batch_size=config.micro_batch, precision=precision, compile="off", shard=False, fake_warmup=0
    )
    meter = Meter()
    # The meter is on before the networks are built, so that it knows their weights.
    with FakeTensorMode(allow_non_fake_inputs=True), meter:
        model = weightless(config.teacher, note)
        engine = Engine(model, small, open_prompts(config.prompts), torch.device("cpu"))
        for _ in range(2):
            engine.advance()
        trained = [value for value in engine.fake_score.parameters() if value.requires_grad]
        states = {
            name: [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
            for name, optimizer in (("fake", engine.optimizer_fake), ("generator", engine.optimizer_generator))
        }
        average = count_bytes(engine.average)
        optimizer = sum(count_bytes(values) for values in states.values())
        generator = count_bytes(engine.generator.parameters())
        parts = {
            "teacher": count_bytes(engine.teacher.parameters()),
            "text encoder": count_bytes(engine.sampler.text_encoder.parameters()),
            "generator": generator,
            "fake score": count_bytes(trained),
            "gradients": max(generator, count_bytes(trained)),
            "optimizers": 0 if config.offload_optimizer else optimizer,
            "average": 0 if config.offload_average else average,
        }
        parameters = {
            "teacher": sum(value.numel() for value in engine.teacher.parameters()),
            "fake score": sum(value.numel() for value in trained),
            "generator": sum(value.numel() for value in engine.generator.parameters()),
        }
        saved = 2 * generator + count_bytes(trained) + optimizer
        student = (
            generator + count_bytes(model.text_encoder.parameters()) + sum(4 * value.numel() for value in model.vae.parameters())
        )
    away = (average if config.offload_average else 0) + (optimizer if config.offload_optimizer else 0)
    peak = meter.peak - away
    parts["activations"] = max(0, peak - sum(parts.values()))
    pace = rate(output)
    seconds = config.steps * config.batch_size / pace if pace else None
    disk = (checkpoint.KEEP + 1) * saved + student
    return Plan(config, str(output), str(where), processes, parameters, parts, away, peak, disk, seconds)


def choose(candidates: dict[str, DistillConfig], device: str, note: Any) -> DistillConfig:
    """The first candidate whose plan fits the free memory of the GPU; the last one if none does, with a warning."""
    where = pick_device(device)
    name, config = next(iter(candidates.items()))
    if where.type != "cuda":
        return config
    free, total = torch.cuda.mem_get_info(where)
    for name, config in candidates.items():
        needed = make(config, Path(), device, 1, lambda text: None).peak
        if needed < free - RESERVE * total:
            note(f"memory: {name} ({gigabytes(needed)} of {gigabytes(free)} free); --memory overrides")
            return config
    note(f"memory: even {name} needs {gigabytes(needed)}, and {gigabytes(free)} are free; trying it all the same")
    return config
