"""The core: the networks of a distillation and its training step, independent of files, terminal, arguments and specific
objectives.

An objective defines which networks are trained (its roles) and the phases of a training step. In each phase one network computes an
output, the objective returns the gradient of its loss with respect to that output, and the engine handles micro-batches, processes,
memory, optimizer and weight average.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sidcli import objectives, randomness
from sidcli.data.drawn_references import DrawnReferences
from sidcli.data.latents import Latents
from sidcli.data.prompts import Prompts
from sidcli.devices import attention_kernels
from sidcli.diffusion.path import DiscretePath
from sidcli.diffusion.sampling import few_steps
from sidcli.distributed import Distributed, assign, count, whole
from sidcli.errors import EnvironmentProblem, InputError, UsageError
from sidcli.models.drawing import Plan, student_plan
from sidcli.models.kind import Cond
from sidcli.models.kinds import kind_of
from sidcli.models.loading import Description, Model
from sidcli.models.overrides import STOCK_STEP
from sidcli.models.reference import LAYOUTS, layout_of
from sidcli.models.sampler import Sampler
from sidcli.objectives.base import GENERATOR, TEACHER, Batch, Drawing, Inputs, Phase, Role, Values
from sidcli.optimizer import Adam, local
from sidcli.progress import Progress, silent
from sidcli.settings import DistillConfig


@dataclass(frozen=True)
class Arithmetic:
    """How networks compute: in float32, or with `bf16` under autocast over float32 weights.

    `attention`: `auto` leaves the choice of the attention kernel to PyTorch, `math` selects plain matrix products, whose backward pass
    in bf16 is faster than the fused kernel's on CPUs with AMX.
    """

    bf16: bool = False
    attention: Literal["auto", "math"] = "auto"

    @property
    def name(self) -> str:
        return ("bf16" if self.bf16 else "fp32") + (f", {self.attention} attention" if self.attention != "auto" else "")

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """Return a context for forward passes."""
        # Each weight is used once per forward pass, so a cached bf16 copy would cost memory and save no time.
        return torch.autocast(device_type, torch.bfloat16, cache_enabled=False) if self.bf16 else nullcontext()

    def kernels(self) -> AbstractContextManager[Any]:
        """Return a context for forward and backward passes together: a backward pass that recomputes activations runs the forward
        pass again, and must use the same kernels."""
        return attention_kernels(math=self.attention == "math")


FP32 = Arithmetic()


def default_arithmetic(precision: str, device: torch.device) -> Arithmetic:
    """Return the arithmetic for `--precision` without a measurement: `auto` is bf16 on a GPU that has it."""
    if precision == "auto":
        return Arithmetic(device.type == "cuda" and torch.cuda.is_bf16_supported())
    return Arithmetic(precision == "bf16")


TUNED_STEPS = 25
"""Denoising steps of the samples of a model of many steps."""


@dataclass(frozen=True)
class Measurements:
    """Measurements of one training step over the global batch, as scalar tensors on the device.

    Reading them waits for the device, so only the code that logs reads them. `values` are named by the objective. `skipped` counts
    all updates that were skipped because a loss or a gradient was not finite, `skipped_in_row` the latest consecutive ones of the
    network that has most of them.
    """

    values: Values
    skipped: Tensor
    skipped_in_row: Tensor

    def numbers(self) -> dict[str, float]:
        found = self.values | {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        return {name: float(value) for name, value in found.items()}


class TrainedNetwork:
    """A network in training with its optimizer and weight average.

    `net` is the network itself, `call` the module to call in forward passes whose gradients are averaged over the processes.
    """

    def __init__(self, role: Role, net: Any, config: DistillConfig, distributed: Distributed):
        self.role, self.net, self.config, self.distributed = role, net, config, distributed
        if not role.lora:  # a LoRA network shares the teacher's weights, which are not sharded
            distributed.split(net, kind_of(net).blocks(net))
        self.weights = [(name, value) for name, value in net.named_parameters() if value.requires_grad]
        """Pairs (name, parameter) of the trained weights."""
        self.call, self.optimizer = distributed.prepare(net, self._optimizer())
        self.average = {name: self._average_place(value.detach().clone()) for name, value in self.weights} if role.average else {}

    def _optimizer(self) -> torch.optim.Optimizer:
        config, role = self.config, self.role
        values = [value for _, value in self.weights]
        if config.optimizer == "adam":
            return Adam(values, role.lr, role.betas, config.adam_eps, role.weight_decay, config.offload_optimizer)
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise EnvironmentProblem("--optimizer adam8bit needs bitsandbytes", "pip install bitsandbytes") from error
        return AdamW8bit(values, lr=role.lr, betas=role.betas, eps=config.adam_eps, weight_decay=role.weight_decay)

    def _average_place(self, value: Tensor) -> Tensor:
        return value.cpu() if self.config.offload_average else value

    def step(self, loss: Tensor) -> Tensor:
        """Update the weights unless the loss or a gradient is not finite. Returns 1 if the update was skipped, else 0.

        With `Adam` the device makes this decision, so the host does not wait.
        """
        gradients = [local(value.grad) for _, value in self.weights if value.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        broken = (self.distributed.sum((~torch.isfinite(norms.sum() + loss)).float()) > 0).float()
        if self.role.clip:
            squares = norms.square().sum()
            norm = (self.distributed.sum(squares) if self.distributed.sharded and not self.role.lora else squares).sqrt()
            torch._foreach_mul_(gradients, (self.role.clip / (norm + 1e-6)).clamp(max=1.0))
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(inner, Adam):
            inner.found_inf = broken
            self.optimizer.step()
        elif not bool(broken):  # an optimizer of another library cannot skip an update on the device
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return broken

    def update_average(self, update: int) -> None:
        """Apply average <- beta average + (1 - beta) weights, with `ema_beta` after `update` updates before this one."""
        beta = ema_beta(update * self.config.batch_size, self.config)
        values = [self._average_place(local(value.detach())) for _, value in self.weights]
        torch._foreach_lerp_([local(value) for value in self.average.values()], values, 1.0 - beta)

    def tensors(self, name: str, copy: bool) -> dict[str, dict[str, Tensor]]:
        """Return the state as {file: {name: tensor}}, full tensors on the CPU; see `Engine.tensors`."""
        files = {name: dict(self.weights)}
        if self.role.average:
            files["average"] = self.average  # type: ignore[assignment]
        found = {file: {key: whole(value, copy) for key, value in tensors.items()} for file, tensors in files.items()}
        return found | {f"optimizer_{name}": _optimizer_tensors(self.optimizer, copy)}

    def load(self, name: str, files: dict[str, dict[str, Tensor]]) -> None:
        """Load the state from `tensors`. Raises KeyError or RuntimeError if names or shapes differ."""
        for key, value in self.weights:
            assign(value, files[name][key])
        for key, average in self.average.items():
            assign(average, files["average"][key])
        _load_optimizer(self.optimizer, files[f"optimizer_{name}"])


class Follower:
    """The exponential average of a trained network, as a network that an objective can run. It is not trained itself."""

    def __init__(self, role: Role, net: Any, followed: TrainedNetwork, distributed: Distributed):
        self.role, self.net, self.followed, self.distributed = role, net, followed, distributed
        if not role.lora:
            distributed.split(net, kind_of(net).blocks(net))
        self.weights = [(name, value) for name, value in net.named_parameters() if value.requires_grad]
        for _, value in self.weights:
            value.requires_grad_(False)

    def update(self) -> None:
        """Apply average <- decay average + (1 - decay) weights of the followed network."""
        self.distributed.reshard(self.net)
        values = [local(value.detach()) for _, value in self.followed.weights]
        torch._foreach_lerp_([local(value) for _, value in self.weights], values, 1.0 - self.role.decay)

    def tensors(self, name: str, copy: bool) -> dict[str, dict[str, Tensor]]:
        """Return the state as {file: {name: tensor}}, full tensors on the CPU; see `Engine.tensors`."""
        return {name: {key: whole(value, copy) for key, value in self.weights}}

    def load(self, name: str, files: dict[str, dict[str, Tensor]]) -> None:
        """Load the state from `tensors`. Raises KeyError or RuntimeError if names or shapes differ."""
        self.distributed.reshard(self.net)
        for key, value in self.weights:
            assign(value, files[name][key])


class Networks:
    """The networks for an objective; implements `objectives.base.Networks`."""

    def __init__(self, engine: Engine):
        self._engine, self.path = engine, engine.path
        self.training = ""
        """The role in training, whose outputs carry gradients."""

    def _call(self, role: str) -> nn.Module:
        if role == TEACHER:
            return self._engine.teacher
        if role in self._engine.followers:
            return self._engine.followers[role].net
        trained = self._engine.roles[role]
        return trained.call if role == self.training and torch.is_grad_enabled() else trained.net

    def generate(self, batch: Batch) -> Tensor:
        engine, net = self._engine, self._call(GENERATOR)
        grid = self.path.student_grid(engine.config.t_init, engine.config.student_steps)[: len(batch.latents)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training == GENERATOR):
            return few_steps(
                lambda x, t: engine.denoise(net, x, t, batch.cond),
                lambda visit: batch.latents[visit],
                self.path,
                grid,
                engine.config.renoise,  # type: ignore[arg-type]
            )

    def predict(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        """Return raw predictions [B, C, h, w] of a network under guidance, one for each guidance scale, from one forward pass."""
        engine, net = self._engine, self._call(role)
        return engine.kind.guided(
            lambda x, t, cond: engine.denoise(net, x, t, cond), x_t, batch.t, batch.cond, engine.empty, scales
        )

    def features(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> tuple[list[Tensor], Tensor]:
        with self._engine.kind.features(self._engine.roles[role].net) as found:
            predictions = self.predict(role, x_t, batch, *scales)
        return predictions, found[0][: len(x_t)].float()

    def noise(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        return [self.path.noise(value, x_t, batch.t) for value in self.predict(role, x_t, batch, *scales)]

    def clean(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        return [self.path.clean(value, x_t, batch.t) for value in self.predict(role, x_t, batch, *scales)]

    def weights(self, reference: float) -> Tensor:
        engine = self._engine
        one = torch.ones(1, 1, 1, engine.frame_width, device=engine.device)
        return one if engine.layout is None else engine.layout.join(reference * one, one)

    @torch.enable_grad()
    def gradient_through(
        self, x: Tensor, networks: Sequence[Callable[[Tensor], list[Tensor]]], loss: Callable[..., tuple[Tensor, Values]]
    ) -> tuple[Tensor, Values]:
        """Return d loss / d x, computed with one backward pass through each network, and measurements.

        The gradient with respect to the networks' outputs is computed first and then passed to these backward passes. With
        `split_backward` each network is run again for its backward pass, so that only one graph exists at a time.
        """
        split, x = self._engine.config.split_backward, x.detach().requires_grad_()
        with self._frozen():
            with torch.set_grad_enabled(not split):
                outputs = [network(x) for network in networks]
            leaves = [[y.detach().requires_grad_() for y in ys] for ys in outputs]
            value, measured = loss(x, *(y for ys in leaves for y in ys))
            inputs = [x, *(y for ys in leaves for y in ys)]
            gradient, *output_gradients = torch.autograd.grad(value, inputs, allow_unused=True)
            gradient = torch.zeros_like(x) if gradient is None else gradient
            for network, ys in zip(networks, outputs, strict=True):
                own, output_gradients = output_gradients[: len(ys)], output_gradients[len(ys) :]
                # An output that the loss does not depend on is left out: its backward pass would only carry zeros.
                pairs = [(y, grad) for y, grad in zip(network(x) if split else ys, own, strict=True) if grad is not None]
                gradient = gradient + torch.autograd.grad([y for y, _ in pairs], x, [grad for _, grad in pairs])[0]
        return gradient, {name: value.detach() for name, value in measured.items()}

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Context in which only the network in training requires gradients, so that graphs save nothing for other weights."""
        roles = self._engine.roles
        others = [value for name, trained in roles.items() if name != self.training for _, value in trained.weights]
        for value in others:
            value.requires_grad_(False)
        try:
            yield
        finally:
            for value in others:
                value.requires_grad_(True)


Key = tuple[Inputs, int, range]
"""Identifies a micro-batch of random inputs: inputs of the phase, training step, samples."""


class Engine:
    """The networks, optimizers and weight averages of one distillation. A step is a pure function of the state and the step number.

    `start` are the initial weights of the student; by default those of the teacher.
    Raises UsageError if the batch does not split evenly over the processes, EnvironmentProblem if an optional library is missing.
    """

    def __init__(
        self,
        teacher: Model,
        config: DistillConfig,
        prompts: Prompts,
        device: torch.device,
        arithmetic: Arithmetic | None = None,
        start: Mapping[str, Tensor] | None = None,
    ):
        self.config, self.prompts = config, prompts
        self.data: Latents | None = None
        """Images, or pairs of images of one subject. Set them before the first step if the objective needs images, or if the student
        takes a reference image."""
        self.references: DrawnReferences | None = None
        """The student that draws the reference images, in place of pairs of images. Set it before the first step."""
        self.objective = objectives.find(config.objective.name)(config, teacher.path.steps)
        check_split(config.batch_size, count())
        self.distributed = Distributed(device, config.shard)
        self.device = self.distributed.device
        self.arithmetic = arithmetic or default_arithmetic(config.precision, self.device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
        bf16 = config.text_precision == "bf16"
        self.sampler = Sampler(dataclasses.replace(teacher, text_on_cpu=config.offload_text, text_bf16=bf16), self.device)
        self.path = teacher.path
        self.kind = teacher.kind
        self.teacher = self.sampler.denoiser
        roles = self.objective.roles
        nets = {name: self._trainable(role) for name, role in roles.items()}
        self.layout = layout_of(nets[GENERATOR].config)
        """How the student takes a reference image; None if it takes none."""
        self.latent_shape = self.kind.latent_shape(nets[GENERATOR].config)
        """Shape of the student's samples: channels, height, width."""
        if start is not None:
            for name, role in roles.items():
                if GENERATOR in (name, role.follows):
                    nets[name].load_state_dict(start)
        if config.teacher_bf16 and self.arithmetic.bf16:
            for value in self.teacher.parameters():
                value.data = value.data.bfloat16()
        for net in (self.teacher, *nets.values()):
            self._configure(net)
        self.roles = {
            name: TrainedNetwork(role, nets[name], config, self.distributed) for name, role in roles.items() if not role.follows
        }
        self.followers = {
            name: Follower(role, nets[name], self.roles[role.follows], self.distributed)
            for name, role in roles.items()
            if role.follows
        }
        self.nets = Networks(self)
        self.empty = self.sampler.encode([""])
        self.skipped = torch.zeros((), device=self.device)
        self.skipped_in_row = {name: torch.zeros((), device=self.device) for name in self.roles}
        self.step = 0
        self._drawer = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._drawn: dict[Key, Future[Batch]] = {}

    # Building

    def _trainable(self, role: Role) -> Any:
        """Return a copy of the teacher or, for a LoRA role, a second network that shares the teacher's weights and has adapters."""
        net = self._copy(role)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(randomness.key(self.config.seed, role.stream))
            if role.lora:
                self.kind.add_adapters(net, role.lora)
                if role.layout:  # the teacher does not have the weights of the reference
                    self.kind.reference_weights(net).requires_grad_(True)
            if role.head:
                self.kind.add_head(net)
        return net

    def _copy(self, role: Role) -> Any:
        """Return a copy of the teacher in the layout of the role. For a LoRA role it shares the teacher's weights."""
        shared: dict[int, Any] = {id(value): value for value in self.teacher.parameters()} if role.lora else {}
        net = copy.deepcopy(self.teacher, shared).requires_grad_(not role.lora)
        if role.layout:
            self.kind.take_reference(net, LAYOUTS[role.layout])
        return net

    def _configure(self, net: Any) -> None:
        """Apply gradient checkpointing and compilation as configured. They do not change the result of a network."""
        if self.config.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        if self.config.compile == "on":
            net.compile()

    @property
    def sampling(self) -> dict[str, Any]:
        """How the student draws: entries of its card, sid.json."""
        return self.objective.sampling | self.path.sampling

    @property
    def plan(self) -> Plan:
        """Sampling settings of the student, or of the model of many steps that the objective makes."""
        if self.objective.makes == "teacher":
            return Plan(TUNED_STEPS, float(self.sampling["guidance"]))
        return student_plan(self.sampling)

    @property
    def frame_width(self) -> int:
        """Width of the latent of one image."""
        return self.kind.frame_shape(self.teacher.config)[2]

    @property
    def images(self) -> int:
        """Training images per network so far: steps x batch size, as in papers. Warm-up and extra updates do not change it."""
        return self.step * self.config.batch_size

    # Training step

    def train_step(self) -> Measurements:
        """Run one training step: the phases of the objective, in order."""
        values: Values = {}
        samples: list[Tensor] = []
        phases = self.objective.phases(self.step)
        for phase, following in zip(phases, [*phases[1:], None], strict=True):
            measured, samples = self.run_phase(phase, samples, keep=following is not None and following.inputs.reuse)
            values |= measured
        self.step += 1
        return Measurements(values, self.skipped.clone(), torch.stack(list(self.skipped_in_row.values())).max())

    def run_phase(self, phase: Phase, samples: Sequence[Tensor] = (), keep: bool = False) -> tuple[Values, list[Tensor]]:
        """Run one update of one network. `samples`: outputs of the previous phase, by micro-batch.

        Returns measurements and, with `keep`, the outputs of this phase, the first tensor of each.
        """
        role, outputs = self.roles[phase.role], []
        rows: list[Tensor] = []
        split = phase.split and self.config.split_backward
        self.nets.training = phase.role
        for batch, last in self._batches(phase, samples):
            with self.distributed.gradients(role.call, last), self.arithmetic.kernels():
                with torch.set_grad_enabled(not split):
                    output = phase.forward(self.nets, batch)
                with torch.no_grad():
                    gradient, values = phase.gradient(self.nets, detached(output), batch)
                if split:
                    output = phase.forward(self.nets, batch)
                # Gradients are averaged over the processes, but the loss is already normalized by the global batch.
                torch.autograd.backward(parts(output), [part * self.distributed.count for part in parts(gradient)])
            rows.append(torch.stack(list(values.values())))
            if keep:
                outputs.append(parts(output)[0].detach())
        totals = self.distributed.sum(sum(rows[1:], rows[0]))
        broken = role.step(totals[0])
        self.skipped += broken
        self.skipped_in_row[phase.role] = (self.skipped_in_row[phase.role] + broken) * broken
        if role.role.average:
            role.update_average(phase.update)
        for follower in self.followers.values():
            if follower.followed is role:
                follower.update()
        return dict(zip(values, totals, strict=True)), outputs

    # Random inputs

    def _micro_batches(self) -> list[range]:
        """Return this process's samples of the global batch, by micro-batch."""
        samples, size = self.distributed.share(range(self.config.batch_size)), self.config.micro_batch
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def _batches(self, phase: Phase, samples: Sequence[Tensor]) -> Iterator[tuple[Batch, bool]]:
        """Yield the micro-batches of a phase, each with whether it is the last."""
        pieces = self._micro_batches()
        for index, piece in enumerate(pieces):
            batch = self._batch((phase.inputs, self.step, piece))
            if phase.inputs.reuse:
                batch = dataclasses.replace(batch, samples=samples[index])
            yield batch, index == len(pieces) - 1

    def _batch(self, key: Key) -> Batch:
        """Return a micro-batch on the device, and start to draw the next micro-batch in a thread."""
        drawn = (self._drawn.pop(key, None) or self._drawer.submit(self._ahead, *key)).result()
        self._drawn.clear()
        following = self._next_key(key)
        if following[1] < self.config.steps:
            self._drawn[following] = self._drawer.submit(self._ahead, *following)
        return self._on_device(drawn)

    def _ahead(self, inputs: Inputs, step: int, samples: Sequence[int]) -> Batch:
        """Draw a micro-batch and, if the text encoders are in CPU memory, encode its prompts, while the device computes another one."""
        drawn = self.draw_batch(inputs, step, samples)
        return self._encoded(drawn) if self.config.offload_text else drawn

    def _encoded(self, drawn: Batch) -> Batch:
        """Return a batch with the cond of its prompts."""
        real = None if drawn.real is None else self._encoded(drawn.real)
        return dataclasses.replace(drawn, cond=self.sampler.encode(drawn.prompts), real=real)

    def _on_device(self, drawn: Batch) -> Batch:
        """Return a batch on the device, with the cond of its prompts."""
        on = self.device
        latents, noise, t = [value.to(on) for value in drawn.latents], drawn.noise.to(on), drawn.t.to(on)
        samples = None if drawn.samples is None else drawn.samples.to(on)
        real = None if drawn.real is None else self._on_device(drawn.real)
        reference = None if drawn.reference is None else drawn.reference.to(on)
        if drawn.drawing is not None:
            reference = self._drawn_references(drawn.drawing)
        cond = self.sampler.encode(drawn.prompts) if drawn.cond is None else drawn.cond
        cond = cond.with_reference(reference)
        span = None if drawn.span is None else drawn.span.to(on)
        return dataclasses.replace(
            drawn, latents=latents, noise=noise, t=t, span=span, cond=cond, reference=reference, samples=samples, real=real
        )

    def _next_key(self, key: Key) -> Key:
        """Return the key of the micro-batch that follows `key` in the order of `train_step`."""
        inputs, step, piece = key
        pieces = self._micro_batches()
        order = [(phase.inputs, piece) for phase in self.objective.phases(step) for piece in pieces]
        index = order.index((inputs, piece)) + 1
        if index < len(order):
            following, piece = order[index]
            return following, step, piece
        return self.objective.phases(step + 1)[0].inputs, step + 1, pieces[0]

    def draw_batch(self, inputs: Inputs, step: int, samples: Sequence[int]) -> Batch:
        """Draw the random inputs of some samples of a step, on the CPU. They depend only on the seed and the arguments.

        A few-step student stops after the same random number of steps in the whole batch, in every process and every phase, as in
        the published code of few-step SiD.
        """
        config, shape = self.config, self.latent_shape
        turn, seed = inputs.turn, config.seed
        prompts, canvas, drawing = self._prompts(inputs, samples)
        drops, blind = self._drops(inputs, samples)
        prompts = emptied(prompts, drops)
        visits = 1
        if inputs.reuse or inputs.source != "prompts":
            visits = 0
        elif config.student_steps > 1:
            visits = int(randomness.integers(1, config.student_steps + 1, seed, "exit", step, [0]))
        streams = [f"{inputs.stream} latent {visit}" if visit else f"{inputs.stream} latent" for visit in range(visits)]
        latents = [randomness.normal(shape, seed, stream, turn, samples) for stream in streams]
        noise = randomness.normal(shape, seed, f"{inputs.stream} noise", turn, samples)
        t = self.path.draw(inputs.t_range, randomness.Draws(seed, f"{inputs.stream} timestep", turn, samples))
        span = randomness.integers(1, inputs.span + 1, seed, f"{inputs.stream} span", turn, samples) if inputs.span else None
        batch = Batch(prompts, latents, noise, t, config.batch_size, span=span, drawing=drawing)
        if self.layout and canvas is not None:
            shown, target = canvas.chunk(2, -1)
            pair = self.layout.join(shown, target) if inputs.source == "images" else None
            reference = torch.where(torch.tensor(blind).view(-1, 1, 1, 1), 0.0, shown)
            return dataclasses.replace(batch, reference=reference, samples=pair)
        if inputs.source == "prompts" and not inputs.real:
            return batch
        assert self.data is not None
        positions = [turn * config.batch_size + sample for sample in samples]
        images, captions = zip(*(self.data.at(seed, position) for position in positions), strict=True)
        # A discriminator must not recognize generated images by their empty captions, so the same samples have one.
        started = config.objective.needs_pairs
        starts = [torch.stack([self.data.noise(seed, position) for position in positions])] if started else []
        real = dataclasses.replace(batch, prompts=emptied(captions, drops), latents=starts, samples=torch.stack(images))
        return dataclasses.replace(batch, real=real) if inputs.real else real

    def _prompts(self, inputs: Inputs, samples: Sequence[int]) -> tuple[list[str], Tensor | None, Drawing | None]:
        """Return the prompts of samples and, if the student takes a reference, the latents [B, C, h, 2 w] of their pairs of images or
        the random inputs of reference images that are drawn."""
        number = inputs.turn if self.layout and inputs.source == "images" else inputs.position
        positions = [number * self.config.batch_size + sample for sample in samples]
        if self.references:
            captions, drawing = self.references.at(self.prompts, self.config.seed, positions)
            return captions, None, drawing
        if self.layout:
            return *self._pairs_at(positions), None
        return [self.prompts.at(self.config.seed, position) for position in positions], None, None

    def subjects_at(self, positions: Sequence[int]) -> tuple[list[str], Tensor]:
        """Return captions and the latents [B, C, h, w] of their reference images, on the CPU."""
        if self.references is None:
            captions, canvas = self._pairs_at(positions)
            return captions, canvas.chunk(2, -1)[0]
        size = self.config.micro_batch
        pieces = [positions[start : start + size] for start in range(0, len(positions), size)]
        drawn = [self.references.at(self.prompts, self.config.seed, piece) for piece in pieces]
        captions = [caption for captions, _ in drawn for caption in captions]
        return captions, torch.cat([self._drawn_references(drawing).cpu() for _, drawing in drawn])

    def _drawn_references(self, drawing: Drawing) -> Tensor:
        """Return the latents [B, C, h, w] of reference images that are drawn now, on the device, in the precision of the run."""
        assert self.references is not None
        with self.arithmetic.autocast(self.device.type), self.arithmetic.kernels():
            return self.references.latents(drawing)

    def _pairs_at(self, positions: Sequence[int]) -> tuple[list[str], Tensor]:
        """Return captions of pairs of images, and their latents [B, C, h, 2 w]: the reference first, then the image of the caption."""
        assert self.data is not None
        images, captions = zip(*(self.data.at(self.config.seed, position) for position in positions), strict=True)
        return list(captions), torch.stack(images)

    def _drops(self, inputs: Inputs, samples: Sequence[int]) -> tuple[list[bool], list[bool]]:
        """Return which samples have the empty prompt, and which have no reference image."""
        alone, no_reference = inputs.dropout, inputs.dropout + inputs.reference_dropout
        if not (most := no_reference + inputs.both_dropout):
            return [False] * len(samples), [False] * len(samples)
        drawn = randomness.uniform(self.config.seed, "caption dropout", inputs.turn, samples)
        text = (drawn < alone) | ((drawn >= no_reference) & (drawn < most))
        return text.tolist(), ((drawn >= alone) & (drawn < most)).tolist()

    # Networks

    def denoise(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the network's raw prediction in float32."""
        with self.arithmetic.autocast(self.device.type):
            return self.kind.denoise(net, x, t, cond).float()

    # The teacher and the state

    @torch.no_grad()
    def teacher_latents(self, plan: Plan, prompts: Sequence[str], noise: Tensor, stepped: Callable[[], None]) -> Tensor:
        """Return the latents float32 [B, C, h, w] that the teacher draws, on the CPU, in the precision of the run."""
        with self.arithmetic.autocast(self.device.type), self.arithmetic.kernels():
            return self.sampler.latents(prompts, [noise.to(self.device)], plan, stepped).float().cpu()

    @torch.no_grad()
    def teacher_images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        plan: Plan,
        advance: Progress = silent,
        references: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return images of the teacher, uint8 [B, H, W, 3], in the precision of the run."""
        with self.arithmetic.autocast(self.device.type), self.arithmetic.kernels():
            images = self.sampler.images(prompts, seeds, plan, advance, references)
        self.sampler.model.vae.to("cpu")  # training does not use the VAE
        return images

    def student(self) -> Model:
        """Return the student on the CPU: the averaged generator with the teacher's text encoder and VAE.

        Every process must call this, because each process has only a part of sharded weights.
        """
        trained = self.roles[GENERATOR]
        average = {name: whole(value) for name, value in trained.average.items()}
        with torch.device("meta"):
            denoiser = self.kind.build(self.kind.component, trained.net.config)
        if trained.role.lora:
            average = self.kind.merged(self._copy(trained.role), average, trained.role.lora)
        buffers = {name: value.cpu() for name, value in self.teacher.named_buffers()}
        stored = buffers.keys() & denoiser.state_dict().keys()
        denoiser.load_state_dict(average | {name: buffers[name] for name in stored}, assign=True)
        for name in buffers.keys() - stored:  # a buffer that is in no file, such as the position embeddings of some transformers
            module, _, buffer = name.rpartition(".")
            setattr(denoiser.get_submodule(module), buffer, buffers[name])
        return self.sampler.model.with_denoiser(denoiser.eval().requires_grad_(False))

    @property
    def state_bytes(self) -> int:
        """Size of `tensors()` in bytes, except for some scalars."""
        return state_bytes(
            self.config, [(net.role, sum(value.numel() for _, value in net.weights)) for net in self._stored.values()]
        )

    @property
    def _stored(self) -> dict[str, TrainedNetwork | Follower]:
        """The networks whose state a checkpoint stores."""
        return {**self.roles, **self.followers}

    def tensors(self, copy: bool = False) -> dict[str, dict[str, Tensor]]:
        """Return the state as {file: {name: tensor}}, full tensors on the CPU. If it is sharded, every process must call this.

        With `copy` the next step does not change the tensors, even if the networks are on the CPU.
        """
        files: dict[str, dict[str, Tensor]] = {}
        for name, net in self._stored.items():
            files |= net.tensors(name, copy)
        return files

    def load(self, step: int, files: dict[str, dict[str, Tensor]]) -> None:
        """Load the state from `tensors()` with the same config. Raises KeyError or RuntimeError if names or shapes differ."""
        for name, net in self._stored.items():
            net.load(name, files)
        for skipped in self.skipped_in_row.values():
            skipped.zero_()
        self.step = step


def parts(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors of an output of a phase."""
    return (output,) if isinstance(output, Tensor) else output


def detached(output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Return an output of a phase without its graph, in the same form."""
    return output.detach() if isinstance(output, Tensor) else tuple(part.detach() for part in output)


def emptied(captions: Sequence[str], drops: Sequence[bool]) -> list[str]:
    """Return captions, those with a true value in `drops` replaced by the empty prompt."""
    return ["" if drop else caption for caption, drop in zip(captions, drops, strict=True)]


def optimizer_bytes(config: DistillConfig, role: Role, trained: int) -> int:
    """Return the bytes of the optimizer's moments for `trained` weights. A network that follows another has none."""
    if role.follows:
        return 0
    if config.optimizer == "adam8bit":  # keeps both moments even if beta1 is 0
        return 2 * trained
    return (8 if role.betas[0] else 4) * trained


def state_bytes(config: DistillConfig, roles: Sequence[tuple[Role, int]]) -> int:
    """Return the bytes of a run's state, which a checkpoint stores, from the roles and their numbers of trained weights."""
    return sum((8 if role.average else 4) * trained + optimizer_bytes(config, role, trained) for role, trained in roles)


def check_split(batch_size: int, processes: int) -> None:
    """Raises UsageError if the batch does not split into the same number of images for each process."""
    if batch_size % processes:
        raise UsageError(f"--batch-size {batch_size} does not split over {processes} processes evenly")


def check_teacher(teacher: Model | Description, config: DistillConfig) -> None:
    """Raises InputError if the teacher is a student or takes a reference image already, UsageError if the settings need timesteps or an
    objective that do not fit its path or its reference image, or a precision of a language model that it does not have."""
    name, path = teacher.source.name, teacher.path
    if teacher.is_student:
        raise InputError(f"{name} is a student already", "pass the teacher it came from")
    if config.text_precision != "fp32" and teacher.kind.language_model not in teacher.texts:
        raise UsageError(
            f"--text-precision {config.text_precision} is the precision of T5 or Gemma, and {name} has neither", "leave it out"
        )
    method, timesteps, (first, last) = objectives.find(config.objective.name), path.steps, path.starts
    if teacher.layout and config.objective.draws_pairs:
        raise InputError(f"{name} takes a reference image already", "pass the teacher that it was tuned from")
    if teacher.layout:
        objectives.check_reference(config.objective, name)
    is_flow = not isinstance(path, DiscretePath)
    if is_flow:
        objectives.check_flow(config.objective, name)
    reason = "pure noise in the time of flow matching" if is_flow else f"as the teacher's schedule has {timesteps} timesteps"
    if first == last != config.t_init and "t_init" not in method.unused:
        said = f"--t-init must be {first}, {reason}, where students of {name} start, not {config.t_init}"
        raise UsageError(said, "leave it out")
    for field, value, most in (("t_init", config.t_init, last), ("t_max", config.t_max, timesteps)):
        if value > most and field not in method.unused:
            raise UsageError(f"--{field.replace('_', '-')} must be at most {most}, {reason}, not {value}")
    for field in ("width", "height"):
        if (side := getattr(config, field)) % STOCK_STEP:
            raise UsageError(f"--{field} must be a multiple of {STOCK_STEP}, in which pipelines of diffusers draw, not {side}")


def _states(optimizer: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return each trained tensor with its optimizer state. accelerate may have wrapped the optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return [(value, inner.state[value]) for group in inner.param_groups for value in group["params"]]


def _optimizer_tensors(optimizer: Any, copy: bool) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": whole(entry if isinstance(entry, Tensor) else torch.tensor(entry), copy)
        for index, (_, state) in enumerate(_states(optimizer))
        for name, entry in state.items()
    }


def _load_optimizer(optimizer: Any, tensors: dict[str, Tensor]) -> None:
    states = _states(optimizer)
    for name, saved in tensors.items():
        index, entry = name.split(".", 1)
        value, state = states[int(index)]
        if isinstance(state.get(entry), Tensor):
            assign(state[entry], saved)
        else:  # the 8-bit optimizer counts steps in an int, and creates its state in its first step
            state[entry] = saved.item() if saved.ndim == 0 else saved.to(value.device)


def ema_beta(images: int, config: DistillConfig) -> float:
    """Return the weight of the old average after `images` images: half-life `ema_images`, at most `ema_rampup` x `images`."""
    half_life = min(config.ema_images, config.ema_rampup * images)
    return 0.5 ** (config.batch_size / half_life) if half_life > 0 else 0.0
