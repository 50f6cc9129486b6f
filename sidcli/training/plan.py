"""`sid distill --dry-run`: the resources that a run needs, computed without its weights.

The networks are built from the teacher's JSON files on the meta device, where tensors have shapes but use no memory. A forward pass
there shows what each network saves for its backward pass, for any architecture and options.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import tomli_w
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sidcli import objectives
from sidcli.curation import check_model
from sidcli.data.latents import TEACHER_IMAGES
from sidcli.devices import pick_device
from sidcli.distributed import count
from sidcli.engine import check_split, check_teacher, optimizer_bytes, state_bytes
from sidcli.files import gigabytes
from sidcli.formats.order import require
from sidcli.models.kind import Cond
from sidcli.models.kinds import kind_of
from sidcli.models.loading import Description, describe, quiet_libraries
from sidcli.models.reference import LAYOUTS
from sidcli.models.sampler import plan_for
from sidcli.models.sources import find
from sidcli.objectives.base import FAKE, TEACHER, Pass, Phase, Role
from sidcli.objectives.self_distillation import SelfDistillationSettings
from sidcli.progress import Listener, Silence, counted, duration
from sidcli.settings import TEACHER_DRAWS, DistillConfig, takes_reference
from sidcli.training import checkpoint, initial
from sidcli.training.gpus import GPUS, Gpu
from sidcli.training.references import describe_student

RESERVE = 0.06
"""Fraction of a GPU's memory reserved for memory use that the plan does not include, such as fragmentation."""
WORKSPACES = 700_000_000
"""Bytes of cuBLAS and cuDNN: memory use on an H200 beyond the other parts of the plan
(tests/benchmarks/results/gpu-visit-h200.jsonl)."""
TRANSIENT = 3
"""Number of gradients of the largest activation's size that exist at the same time in a backward pass."""


class FusedAttention(torch.autograd.Function):
    """Stand-in for fused attention, which saves its inputs and output for the backward pass, but not the attention matrix."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        made = torch.empty_like(query)
        context.save_for_backward(query, key, value, made)
        return made


class MetaAutocast(TorchFunctionMode):
    """Emulates the dtypes of torch.autocast to bf16 on the meta device, which autocast does not support.

    On CUDA, autocast also runs normalization and softmax in float32, and their float32 inputs are saved for the backward pass.
    """

    LOWER = (functional.linear, functional.conv2d, torch.matmul, torch.bmm, torch.baddbmm)
    FULL = (functional.group_norm, functional.layer_norm, functional.softmax)

    def __init__(self, device_type: str):
        super().__init__()
        attention = functional.scaled_dot_product_attention  # looked up here, because `Activations.counted` patches it
        self.kinds = dict.fromkeys((*self.LOWER, attention), torch.bfloat16)
        if device_type == "cuda":
            self.kinds |= dict.fromkeys(self.FULL, torch.float32)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self.kinds.get(function)

        def cast(value: Any) -> Any:
            return value.to(kind) if kind and isinstance(value, Tensor) and value.is_floating_point() else value

        return function(*map(cast, args), **{name: cast(value) for name, value in (kwargs or {}).items()})


class Activations:
    """Counts the bytes that a forward pass in the `counted` context saves for its backward pass. Views of one tensor count once.

    With `recompute`, tensors inside a block that diffusers recomputes are kept only during the backward pass of that block. `total`
    then counts the inputs of all these blocks and the tensors inside the largest block.
    """

    def __init__(self, net: Any, recompute: bool):
        self.net, self.recompute = net, recompute
        self.weights = {storage(value) for value in net.parameters()}
        self.kept: dict[int, int] = {}
        self.inputs = self.largest = self.widest = 0
        self.block: dict[int, int] | None = None
        self.alive: list[Tensor] = []  # keeps the ids of storages unique; meta tensors use no memory

    @property
    def total(self) -> int:
        return sum(self.kept.values()) + self.inputs + self.largest

    def keep(self, value: Tensor) -> Tensor:
        self.alive.append(value)
        if storage(value) not in self.weights:
            place = self.kept if self.block is None else self.block
            size = value.numel() * value.element_size()
            place[storage(value)] = max(place.get(storage(value), 0), size)
            self.widest = max(self.widest, size)
        return value

    def enter(self, block: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.block = {}
        kept = inputs[:1] or [value for value in named.values() if isinstance(value, Tensor)]
        self.inputs += sum(value.numel() * value.element_size() for value in kept)

    def leave(self, block: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.largest, self.block = max(self.largest, sum((self.block or {}).values())), None

    @contextmanager
    def counted(self) -> Iterator[None]:
        kinds = kind_of(self.net).recomputed() if self.recompute else ()
        blocks = [part for part in self.net.modules() if isinstance(part, kinds)]
        hooks = [part.register_forward_pre_hook(self.enter, with_kwargs=True) for part in blocks]
        hooks += [part.register_forward_hook(self.leave) for part in blocks]
        attention = mock.patch(
            "torch.nn.functional.scaled_dot_product_attention",
            lambda query, key, value, **_: FusedAttention.apply(query, key, value),
        )
        with attention, torch.autograd.graph.saved_tensors_hooks(self.keep, lambda value: value):
            yield
        for hook in hooks:
            hook.remove()


def storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


COUNTED: dict[Any, tuple[int, int]] = {}
"""Results of `activations`, by everything that determines them."""
TRAINED: dict[Any, int] = {}
"""Results of `trained_weights` for networks with adapters or a head."""
FLOPS: dict[Any, int] = {}
"""Results of `forward_flops`."""


def activations(
    denoiser: Any, rows: int, config: DistillConfig, cond: Cond, trained: bool, device_type: str = "cpu", lora: int = 0
) -> tuple[int, int]:
    """Return the bytes that a forward pass of `rows` latents saves, and the bytes of gradients alive at once in its backward pass.

    `cond` is the cond of one prompt. `lora` is the rank of adapters; with adapters, `trained` applies to the adapters only. Under
    autocast the bf16 copies of weights count as part of the graph that uses them. Equal passes are counted once per process.
    """
    settings = config.teacher_bf16, config.precision, config.gradient_checkpointing
    key = repr(dict(denoiser.config)), rows, settings, cond.shapes, trained, device_type, lora
    if key not in COUNTED:
        COUNTED[key] = _activations(denoiser, rows, config, cond, trained, device_type, lora)
    return COUNTED[key]


def _activations(
    denoiser: Any, rows: int, config: DistillConfig, cond: Cond, trained: bool, device_type: str, lora: int
) -> tuple[int, int]:
    net = copy.deepcopy(denoiser).requires_grad_(trained and not lora)
    if (lora or not trained) and config.teacher_bf16 and config.precision == "bf16":
        net = net.bfloat16()
    if lora:
        with torch.device("meta"):
            kind_of(net).add_adapters(net, lora)
        if not trained:
            net.requires_grad_(False)
    meter = Activations(net, config.gradient_checkpointing)
    with meter.counted(), MetaAutocast(device_type) if config.precision == "bf16" else nullcontext():
        forward(net, rows, cond)
    return meter.total, TRANSIENT * meter.widest


def forward(net: Any, rows: int, cond: Cond) -> None:
    """Run the network on `rows` latents on the meta device."""
    kind = kind_of(net)
    x = torch.empty(rows, *kind.latent_shape(net.config), device="meta", requires_grad=True)
    many = cond.expand(rows).contiguous()
    kind.denoise(net, x, torch.empty(rows, dtype=torch.long, device="meta"), many)


def forward_flops(denoiser: Any, cond: Cond) -> int:
    """Return the operations of a forward pass of one latent. Equal passes are counted once per process."""
    key = repr(dict(denoiser.config)), cond.shapes
    if key not in FLOPS:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(denoiser, 1, cond)
        FLOPS[key] = counter.get_total_flops()
    return FLOPS[key]


def count_weights(values: Any) -> int:
    return sum(value.numel() for value in values)


def trained_weights(denoiser: Any, role: Role) -> int:
    """Return the number of weights of a denoiser that are trained in a role: all, or those of its adapters and its head."""
    if not role.lora and not role.head:
        return count_weights(denoiser.parameters())
    key = repr(dict(denoiser.config)), role.lora, role.head
    if key not in TRAINED:
        with torch.device("meta"):
            net, kind = copy.deepcopy(denoiser).requires_grad_(not role.lora), kind_of(denoiser)
            if role.lora:
                kind.add_adapters(net, role.lora)
            if role.head:
                kind.add_head(net)
        TRAINED[key] = count_weights(value for value in net.parameters() if value.requires_grad)
    return TRAINED[key]


MAX_MICRO_BATCH = 32
"""Largest micro-batch that `choose` selects. Larger kernels are not faster."""
PEAK_SHARE = 0.19
"""Fraction of the data sheet bf16 throughput that the engine reached on an H200, without counting recomputation as work."""
LAUNCH_SECONDS = 1.06e-3
"""Minimum seconds of a micro-batch per weight tensor of the denoiser, measured on an H200: the time to launch its kernels."""
RECOMPUTED, WITH_LORA = 1.5, 1.35
"""Factors by which recomputation in the backward pass, and LoRA layers, increase both the minimum time and the work."""


def estimated_seconds(gpu: Gpu, config: DistillConfig, processes: int, flops_per_image: int, tensors: int) -> float:
    """Return the seconds of a run, estimated from H200 measurements: the larger of arithmetic time and kernel launch time."""
    heavier = (RECOMPUTED if config.gradient_checkpointing else 1.0) * (
        WITH_LORA if config.fake_lora or config.student_lora else 1.0
    )
    pieces = config.steps * -(-config.batch_size // (config.micro_batch * processes))
    arithmetic = config.micro_batch * flops_per_image * heavier / (PEAK_SHARE * gpu.tflops * 1e12)
    return pieces * max(arithmetic, LAUNCH_SECONDS * tensors * heavier)


@dataclass(frozen=True)
class Plan:
    """Resources of a run. Sizes are bytes: `device_memory` by component, `main_memory` on the CPU, `peak` the maximum on the
    device.

    `seconds` follows from the rate in this run folder. `estimates` maps titles of GPUs that the plan fits on to estimated seconds.
    """

    config: DistillConfig
    output: str
    device: str
    processes: int
    parameters: dict[str, int]
    device_memory: dict[str, int]
    main_memory: int
    peak: int
    flops_per_image: int
    drawing_flops: int
    """FLOP for the images that the teacher draws before the training; 0 if it draws none."""
    disk: int
    seconds: float | None
    estimates: dict[str, float]
    downloads: dict[str, int]
    card: Gpu | None = None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return a config.toml with the settings, followed by the other fields as comments."""
        c = self.config
        accumulation = -(-c.batch_size // (c.micro_batch * self.processes))
        rows = [("output", self.output), ("device", self.device)]
        rows += [("parameters", f"{name} {count / 1e6:.1f} M") for name, count in self.parameters.items()]
        rows += [("memory", f"{name} {gigabytes(size)}") for name, size in self.device_memory.items()]
        rows += [("memory", f"at the peak {gigabytes(self.peak)}, off the device {gigabytes(self.main_memory)}")]
        if self.card:
            rows += [("fits", self.verdict(self.card))]
        processes = counted(self.processes, "process")
        rows += [("batch", f"{c.batch_size} = micro-batch {c.micro_batch} x accumulation {accumulation} x {processes}")]
        rows += [
            (
                "work",
                f"{counted(c.steps, 'step')}, {counted(c.steps * c.batch_size, 'image')}, {self.flops_per_image / 1e12:.3g} TFLOP an image",
            )
        ]
        if self.drawing_flops:
            count = counted(self.sheets, "sheet") if self.sheets else counted(c.data_num or TEACHER_IMAGES, "image")
            rows += [("data", f"{count} that the teacher draws first, {self.drawing_flops / 1e12:.3g} TFLOP")]
        if c.references:
            rows += [("references", f"drawn by {c.references} during the training")]
        elif c.data and takes_reference(c.teacher):
            rows += [("references", f"images of the pairs in {c.data}")]
        left_out = f"without {self.left_out}"
        rows += [
            ("time", f"{about_seconds(seconds)} on {title} (estimate, {left_out})") for title, seconds in self.estimates.items()
        ]
        if self.seconds is not None or not self.estimates:
            rows += [("time", about_seconds(self.seconds) + (f" ({left_out})" if self.seconds is not None else ""))]
        rows += [("disk", f"{gigabytes(self.disk)} for checkpoints and the student")]
        rows += [("download", f"{name} {gigabytes(size)}") for name, size in self.downloads.items()]
        return [*tomli_w.dumps(dataclasses.asdict(c)).splitlines(), "", *(f"# {name:<13} {text}" for name, text in rows)]

    @property
    def left_out(self) -> str:
        """What the seconds do not include, in words."""
        if self.sheets:
            return "sheets, curation and samples"
        return "the teacher's images and samples" if self.drawing_flops else "samples"

    @property
    def sheets(self) -> int:
        """Number of sheets that the teacher draws before the training."""
        objective = self.config.objective
        return objective.sheets if isinstance(objective, SelfDistillationSettings) and self.drawing_flops else 0

    def verdict(self, gpu: Gpu) -> str:
        usable = (1 - RESERVE) * gpu.memory * 1e9
        if self.peak <= usable:
            return f"yes: {gigabytes(self.peak)} of {gigabytes(int(usable))} usable on {gpu.title}"
        return f"no: {gigabytes(self.peak)} needed, {gigabytes(int(usable))} usable on {gpu.title}; try a smaller --memory recipe"


def about_seconds(seconds: float | None) -> str:
    return "not known until the run has taken some steps" if seconds is None else f"about {duration(seconds)}"


def recorded_rate(output: Path) -> float | None:
    """Return the images per second of the last record in the run folder, or None."""
    try:
        last = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return float(json.loads(last)["images_per_second"]) or None
    except (OSError, ValueError, KeyError, IndexError):
        return None


def phases(config: DistillConfig, known: Description) -> list[Phase]:
    """Return the phases of the last training step, which trains every network, with the rows that a teacher's kind needs for guidance."""

    def counted(one: Pass) -> Pass:
        return dataclasses.replace(one, branches=known.kind.rows(known.denoiser_config, one.scales)) if one.scales else one

    made = objectives.find(config.objective.name)(config, known.path.steps).phases(config.steps - 1)
    return [dataclasses.replace(phase, passes=tuple(map(counted, phase.passes))) for phase in made]


def forwards_per_image(config: DistillConfig, known: Description) -> int:
    """Return the forward passes per image and step, without recomputation: for SiD 18 with guidance, 11 without."""
    return sum(one.forwards for phase in phases(config, known) for one in phase.passes)


def forwards_to_draw(config: DistillConfig, known: Description) -> int:
    """Return the forward passes for the images that the teacher draws before the training; 0 if it draws none."""
    objective = config.objective
    if isinstance(objective, SelfDistillationSettings) and not config.data:
        rows = known.kind.rows(known.denoiser_config, (objective.sheet_guidance,))
        return objective.sheets * objective.panels * objective.sheet_steps * rows
    plan = plan_for(known, guidance=objective.drawing_guidance)
    rows = known.kind.rows(known.denoiser_config, (plan.guidance,))
    return (config.data_num or TEACHER_IMAGES) * plan.steps * rows if config.data == TEACHER_DRAWS else 0


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights of the networks of a run, and the denoiser on the meta device."""

    denoiser: Any
    weights: int
    """Number of weights of the denoiser."""
    roles: dict[str, tuple[Role, int]]
    """Trained networks by name, each with its number of trained weights."""
    text: int
    language: int
    """Number of weights of the language model among the text encoders."""
    vae: int

    @classmethod
    def of(cls, known: Description, config: DistillConfig) -> Sizes:
        with torch.device("meta"):
            nets = {name: known.kind.build(name, settings) for name, settings in known.networks.items()}
        denoiser = nets[known.kind.component]
        asked = objectives.find(config.objective.name)(config, known.path.steps).roles
        for layout in {role.layout for role in asked.values() if role.layout}:
            known.kind.take_reference(denoiser, LAYOUTS[layout])
        weights = count_weights(denoiser.parameters())
        roles = {name: (role, trained_weights(denoiser, role)) for name, role in asked.items()}
        text = sum(count_weights(nets[name].parameters()) for name in known.texts)
        language = count_weights(nets[name].parameters()) if (name := known.kind.language_model) in nets else 0
        return cls(denoiser, weights, roles, text, language, count_weights(nets["vae"].parameters()))

    def state(self, config: DistillConfig) -> int:
        """Return the size of a checkpoint in bytes."""
        return state_bytes(config, list(self.roles.values()))

    def text_bytes(self, config: DistillConfig) -> int:
        """Return the size of the text encoders in memory in bytes."""
        return 4 * self.text - (2 * self.language if config.text_precision == "bf16" else 0)

    @property
    def student(self) -> int:
        """Size of the student's folder in bytes."""
        return 4 * (self.weights + self.text + self.vae)


@dataclass(frozen=True)
class Drawer:
    """What the student of `--references` adds to a plan; nothing without one."""

    weights: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of weights of its denoiser, by the name of the student in the plan."""
    text: int = 0
    """Number of weights of its text encoders."""
    flops_per_image: int = 0
    """Operations for the reference images of one training image."""
    downloads: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: DistillConfig, teacher: Description, listener: Listener) -> Drawer:
        """Return that of a run. Raises what `describe_student` raises."""
        if not config.references:
            return cls()
        known = describe_student(config, teacher, listener)
        with torch.device("meta"):
            nets = {name: known.kind.build(name, known.networks[name]) for name in (known.kind.component, *known.texts)}
        denoiser = nets[known.kind.component]
        steps = plan_for(known).steps * len(phases(config, teacher))  # each phase of a training step draws its own
        text = sum(count_weights(nets[name].parameters()) for name in known.texts)
        flops = steps * forward_flops(denoiser, known.kind.meta_cond(known.networks))
        missing = {f"{known.source.name}/{file}": size for file, size in known.source.missing}
        return cls({"reference student": count_weights(denoiser.parameters())}, text, flops, missing)


def describe_teacher(config: DistillConfig, listener: Listener) -> Description:
    """Return the teacher's description after a check against the settings and the model of `--init`. Reads no weights."""
    source = find(config.teacher, descriptions_only=True)
    known = describe(source, config.overrides, listener)
    check_teacher(known, config)
    if config.init:
        first, *_ = initial.check(config.init, known, listener)
        objective = objectives.find(config.objective.name)(config, known.path.steps)
        for remark in initial.remarks(config.init, first, objective, objective.sampling | known.path.sampling):
            listener.note(remark)
    return known


def described(config: DistillConfig, listener: Listener) -> Description:
    """Return the description of the teacher, on which defaults of settings depend. The listener is told where it is found.

    Reads no weights. Raises InputError if the teacher, or the model of the judge of its pairs, is missing.
    """
    quiet_libraries()
    known = describe(find(config.teacher, listener, descriptions_only=True), config.overrides)
    objective = config.objective
    if isinstance(objective, SelfDistillationSettings) and not config.data:
        check_model(objective.judge, known, **objective.judge_options)
    return known


def title_of(role: str, config: DistillConfig) -> str:
    """Return what a trained network is called in the plan."""
    return objectives.find(config.objective.name).second if role == FAKE else role


def is_large(known: Description) -> bool:
    """Return whether the denoiser has more weights than its kind trains by default; see `Kind.lora_above`."""
    kind = known.kind
    if kind.lora_above == math.inf:
        return False
    with torch.device("meta"):
        return count_weights(kind.build(kind.component, known.denoiser_config).parameters()) > kind.lora_above


def check(config: DistillConfig, output: Path, keep: int, listener: Listener) -> None:
    """Check a run before any weight is read.

    Raises InputError or UsageError if the teacher or the settings do not fit, EnvironmentProblem if a library is not installed or
    the disk lacks space for the checkpoints.
    """
    check_libraries(config)
    check_split(config.batch_size, count())
    known = describe_teacher(config, listener)
    if config.references:
        describe_student(config, known, listener)
    sizes = Sizes.of(known, config)
    checkpoint.check_room(output / "checkpoints", sizes.state(config), keep, sizes.student)


def check_libraries(config: DistillConfig) -> None:
    """Raises EnvironmentProblem if a library that the settings need is not installed."""
    for option, rank in (("--fake-lora", config.fake_lora), ("--student-lora", config.student_lora)):
        if rank:
            require(("peft",), option)
    if config.optimizer == "adam8bit":
        require(("bitsandbytes",), "--optimizer adam8bit")


def phase_activations(phase: Phase, sizes: Sizes, config: DistillConfig, cond: Cond, device_type: str) -> int:
    """Return the bytes of the graphs of a phase at the peak of its backward passes. Passes without a gradient have no graph."""
    graphs = []
    for one in phase.passes:
        if one.gradient != "none":
            rows, lora = config.micro_batch * one.branches, 0 if one.role == TEACHER else sizes.roles[one.role][0].lora
            own = config if one.role == TEACHER or lora else dataclasses.replace(config, teacher_bf16=False)
            graphs.append(activations(sizes.denoiser, rows, own, cond, one.gradient == "weights", device_type, lora))
    if phase.split and config.split_backward:
        return max(map(sum, graphs))
    return sum(kept for kept, _ in graphs) + max(alive for _, alive in graphs)


def make(
    config: DistillConfig, output: Path, device: str, processes: int, listener: Listener, keep: int = 2, gpu: Gpu | None = None
) -> Plan:
    """Return the plan of a run from the JSON files of the teacher. A GPU does not have to be present.

    Raises InputError if the files cannot be read, EnvironmentProblem if a library is missing.
    """
    kind = "cuda" if gpu or device.startswith("cuda") else pick_device(device).type
    if kind == "cuda" and config.precision == "auto":
        config = dataclasses.replace(config, precision="bf16")
    check_libraries(config)
    check_split(config.batch_size, processes)
    config = dataclasses.replace(config, micro_batch=min(config.micro_batch, config.batch_size // processes))
    known = describe_teacher(config, listener)
    sizes, drawer = Sizes.of(known, config), Drawer.of(config, known, listener)
    cond, weights = known.kind.meta_cond(known.networks), sizes.weights
    moments = sum(optimizer_bytes(config, role, trained) for role, trained in sizes.roles.values())
    frozen = 2 if config.teacher_bf16 and config.precision == "bf16" else 4
    averages = sum(4 * trained for role, trained in sizes.roles.values() if role.average)
    memory = {
        "teacher": weights * frozen,
        **{name: count * frozen + (0 if config.offload_text else 4 * drawer.text) for name, count in drawer.weights.items()},
        "text encoder": 0 if config.offload_text else sizes.text_bytes(config),
        **{title_of(name, config): 4 * trained for name, (_, trained) in sizes.roles.items()},
        "gradients": max(4 * trained for _, trained in sizes.roles.values()),
        "optimizers": 0 if config.offload_optimizer else moments,
        "average": 0 if config.offload_average else averages,
        "activations": max(phase_activations(phase, sizes, config, cond, kind) for phase in phases(config, known)),
    }
    memory |= {"libraries": WORKSPACES} if kind == "cuda" else {"this program": psutil.Process().memory_info().rss}
    away = (averages if config.offload_average else 0) + (moments if config.offload_optimizer else 0)
    away += sizes.text_bytes(config) + 4 * drawer.text if config.offload_text else 0
    pace, peak = recorded_rate(output), sum(memory.values())
    once = forward_flops(sizes.denoiser, cond)
    flops = once * forwards_per_image(config, known) + drawer.flops_per_image
    tensors = len(list(sizes.denoiser.parameters()))
    alike = [one for one in GPUS.values() if gpu is None or one.memory == gpu.memory]
    gpus = [] if kind == "cpu" else [gpu] if gpu and gpu.tflops else alike
    return Plan(
        config=config,
        output=str(output),
        device=kind if gpu else device if device.startswith("cuda") else str(pick_device(device)),
        processes=processes,
        parameters={"teacher": weights, **drawer.weights}
        | {title_of(name, config): trained for name, (_, trained) in sizes.roles.items()},
        device_memory=memory,
        main_memory=away,
        peak=peak,
        flops_per_image=flops,
        drawing_flops=once * forwards_to_draw(config, known),
        disk=(keep + 1) * sizes.state(config) + sizes.student,
        seconds=config.steps * config.batch_size / pace if pace else None,
        estimates={
            one.title: estimated_seconds(one, config, processes, flops, tensors)
            for one in gpus
            if one is gpu or peak <= (1 - RESERVE) * one.memory * 1e9
        },
        downloads={**dict(known.source.missing), **drawer.downloads},
        card=gpu,
    )


def choose(
    candidates: dict[str, DistillConfig], device: str, listener: Listener, gpu: Gpu | None = None, grows: bool = True
) -> DistillConfig:
    """Return the first candidate whose plan fits the free memory of the GPU, or of `gpu`, with the largest micro-batch that fits, or
    its own one if `grows` is False.

    If none fits, return the last candidate and send the listener a warning.
    """
    if gpu:
        free = (1 - RESERVE) * gpu.memory * 1e9
    else:
        unused, total = torch.cuda.mem_get_info(pick_device(device))
        free = unused - RESERVE * total

    def needs(config: DistillConfig) -> int:
        return make(config, Path(), device, 1, Silence(), gpu=gpu).peak

    for name, config in candidates.items():
        needed = needs(config)
        if needed >= free:
            continue
        while grows and config.micro_batch < min(MAX_MICRO_BATCH, config.batch_size):
            larger = dataclasses.replace(config, micro_batch=min(2 * config.micro_batch, config.batch_size))
            if (more := needs(larger)) >= free:
                break
            config, needed = larger, more
        listener.note(
            f"memory: recipe {name}, micro-batch {config.micro_batch} ({gigabytes(needed)} of {gigabytes(free)} usable); "
            "--memory and --micro-batch override"
        )
        return config
    listener.note(
        f"memory: no recipe fits: {name}, the smallest, needs {gigabytes(needed)}, and {gigabytes(free)} are usable; it is used"
    )
    return config
