"""The core: the four roles of a distillation and the two updates that make a step. Knows no files, no terminal, no arguments.

paper        here           what it is
phi          teacher        the pretrained network, frozen
psi          fake_score     starts as the teacher, follows the score of what the generator draws
G_theta      generator      starts as the teacher, draws in one denoising at t_init, or in a few from there
G_ema        average        the generator's weights averaged over time; this is the student
kappa1..4    kappa1..4      guidance scales, see config.DistillConfig
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidcli import randomness
from sidcli.config import DistillConfig
from sidcli.diffusion.sampling import exit_grid, few_steps
from sidcli.errors import EnvironmentProblem, InputError, UsageError
from sidcli.families import build
from sidcli.models.unet import Cond, add_adapters, denoise, guided_predictions
from sidcli.objectives import sid
from sidcli.optimizer import SecondMomentAdam, local
from sidcli.parallel import Team, assign, count, whole
from sidcli.progress import Progress, silent
from sidcli.prompts import Prompts
from sidcli.sampler import Plan, Sampler
from sidcli.teachers import Model

FAKE, GENERATOR = "fake", "generator"


def pick_bf16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


@dataclass(frozen=True)
class StepResult:
    """What a step measured over the global batch, as tensors on the device: reading them waits for the device, so that is left to
    whoever logs. A warm-up step of the fake score measures its loss alone.

    `skipped` counts updates left out so far because a loss or a gradient was not finite, `skipped_in_row` the current series.
    """

    fake_loss: Tensor
    skipped: Tensor
    skipped_in_row: Tensor
    generator_loss: Tensor | None = None
    ratio: Tensor | None = None
    sample_std: Tensor | None = None

    def numbers(self) -> dict[str, float]:
        return {name: float(value) for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Draw:
    """Random inputs of one micro-batch: prompts, generator noise per step, score noise [b, C, h, w] and timesteps [b]."""

    prompts: list[str]
    latents: list[Tensor]
    noise: Tensor
    t: Tensor


class Engine:
    """The networks, optimizers and average of one distillation. A step is a pure function of the state and the step number.

    Raises UsageError where the batch does not split over the processes, EnvironmentProblem where an extra is not installed.
    """

    def __init__(self, teacher: Model, config: DistillConfig, prompts: Prompts, device: torch.device):
        self.config, self.prompts = config, prompts
        check_split(config.batch_size, count())
        self.team = Team(device, config.shard)
        self.device = self.team.device
        self.bf16 = pick_bf16(config.precision, self.device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
        self.sampler = Sampler(teacher, self.device)
        self.path = teacher.path
        self.teacher = self.sampler.unet
        self.generator = self._trained_copy(self.teacher)
        self.fake_score = self._with_lora(self.teacher) if config.fake_lora else self._trained_copy(self.teacher)
        if config.teacher_bf16 and self.bf16:
            for value in self.teacher.parameters():
                value.data = value.data.bfloat16()
        for net in (self.teacher, self.generator, self.fake_score):
            self._arrange(net)
        self.team.split(self.generator)
        if not config.fake_lora:  # whose weights are the teacher's own, whole in every process
            self.team.split(self.fake_score)
        self.fake_call, self.optimizer_fake = self.team.prepare(self.fake_score, self._optimizer(self.fake_score, config.lr_fake))
        self.generator_call, self.optimizer_generator = self.team.prepare(
            self.generator, self._optimizer(self.generator, config.lr_generator)
        )
        self.average = [self._averaged(value.detach().clone()) for value in self.generator.parameters()]
        self.empty = self.sampler.encode([""])
        self.skipped = torch.zeros((), device=self.device)
        self.skipped_in_row = torch.zeros((), device=self.device)
        self.step = 0
        self._drawer = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._drawn: dict[tuple[str, int, int, range], Future[Draw]] = {}

    # Building

    @staticmethod
    def _trained_copy(net: Any) -> Any:
        return copy.deepcopy(net).requires_grad_(True)

    def _with_lora(self, net: Any) -> Any:
        """A second network on the teacher's own weights, with adapters of its own beside them."""
        shared: dict[int, Any] = {id(value): value for value in net.parameters()}
        twin = copy.deepcopy(net, shared)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(randomness.key(self.config.seed, "lora"))
            add_adapters(twin, self.config.fake_lora)
        return twin

    def _arrange(self, net: Any) -> None:
        """Layout, recomputation and compilation as configured; none of them changes what is computed."""
        if self.config.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        if self.device.type == "cuda" and not self.team.sharded:  # FSDP2 takes contiguous parameters alone
            net.to(memory_format=torch.channels_last)
        if self.config.compile == "on":
            net.compile()

    def _optimizer(self, net: nn.Module, lr: float) -> torch.optim.Optimizer:
        values = [value for value in net.parameters() if value.requires_grad]
        if self.config.optimizer == "adam":
            return SecondMomentAdam(values, lr, eps=self.config.adam_eps, offload=self.config.offload_optimizer)
        try:
            from bitsandbytes.optim import Adam8bit
        except ImportError as error:
            raise EnvironmentProblem("--optimizer adam8bit needs bitsandbytes", "pip install bitsandbytes") from error
        return Adam8bit(values, lr=lr, betas=(0.0, 0.999), eps=self.config.adam_eps)

    def _averaged(self, value: Tensor) -> Tensor:
        return value.cpu() if self.config.offload_average else value

    @property
    def images(self) -> int:
        """Training images per network so far, steps x batch size, as papers count them; warm-up and extra updates change nothing."""
        return self.step * self.config.batch_size

    # A step

    def advance(self) -> StepResult:
        """One training step: update the fake score, then, after its warm-up, the generator and its average."""
        for update in range(self.config.fake_updates):
            fake_loss = self.fake_score_step(update)
        measured: dict[str, Tensor] = {}
        if self.step >= self.config.fake_warmup:
            loss, ratio, sample_std = self.generator_step()
            self.update_average()
            measured = {"generator_loss": loss, "ratio": ratio, "sample_std": sample_std}
        self.step += 1
        return StepResult(fake_loss, self.skipped.clone(), self.skipped_in_row.clone(), **measured)

    def fake_score_step(self, update: int = 0) -> Tensor:
        """One Adam update of psi towards the score of the generator's samples (method 1.4). Returns the loss."""
        config = self.config
        total = torch.zeros((), device=self.device)
        for samples, last in self._micro_batches():
            draw = self._draw(FAKE, update, samples)
            cond = self.sampler.encode(draw.prompts)
            with torch.no_grad():
                x = self._generate(self.generator, draw, cond)
            x_t = self.path.noised(x, draw.noise, draw.t)
            with self.team.gradients(self.fake_call, last):
                predicted = self._predict(self.fake_call, x_t, draw.t, cond, (config.kappa1,))[0]
                loss = sid.fake_score_loss(self.path.noise(predicted, x_t, draw.t), draw.noise, config.batch_size)
                # Processes average their gradients; the loss is normalized by the global batch already.
                (loss * self.team.count).backward()
            total += loss.detach()
        return self._update(self.optimizer_fake, self.team.sum(total))

    def generator_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """One Adam update of theta (method 1.5). Returns the loss, the health ratio and the spread of the samples."""
        totals = torch.zeros(3, device=self.device)
        own = [value for value in self.fake_score.parameters() if value.requires_grad]
        for value in own:
            value.requires_grad_(False)
        for samples, last in self._micro_batches():
            draw = self._draw(GENERATOR, 0, samples)
            cond = self.sampler.encode(draw.prompts)
            with self.team.gradients(self.generator_call, last):
                with torch.set_grad_enabled(not self.config.split_backward):
                    x = self._generate(self.generator_call, draw, cond)
                gradient, measured = self._score_gradient(x.detach(), draw, cond)
                if self.config.split_backward:
                    x = self._generate(self.generator_call, draw, cond)
                x.backward(gradient * self.team.count)
            totals += measured
        for value in own:
            value.requires_grad_(True)
        totals = self.team.sum(totals)
        self._update(self.optimizer_generator, totals[0])
        return totals[0], totals[1], totals[2]

    def _score_gradient(self, x: Tensor, draw: Draw, cond: Cond) -> tuple[Tensor, Tensor]:
        """d loss / d x of the generator loss, through both score networks, and (loss, ratio, spread) of these samples.

        The chain rule is taken apart at the clean predictions: d loss / d y first, then one pull-back through each network. With
        `split_backward` each network is run again for its own, so that one graph lives at a time (method 1.8).
        """
        config, x = self.config, x.requires_grad_()

        def clean(net: nn.Module, scales: tuple[float, ...]) -> list[Tensor]:
            x_t = self.path.noised(x, draw.noise, draw.t)
            return [self.path.clean(value, x_t, draw.t) for value in self._predict(net, x_t, draw.t, cond, scales)]

        networks: list[Callable[[], list[Tensor]]] = [
            lambda: clean(self.fake_score, (config.kappa2, config.kappa3)),
            lambda: clean(self.teacher, (config.kappa4,)),
        ]
        with torch.set_grad_enabled(not config.split_backward):
            outputs = [network() for network in networks]
        leaves = [[y.detach().requires_grad_() for y in ys] for ys in outputs]
        (y_fake, y_fake_target), (y_real,) = leaves
        loss = sid.generator_loss(x, y_real, y_fake, y_fake_target, config.alpha, config.batch_size)
        gradient, *pulls = torch.autograd.grad(loss, [x, y_fake, y_fake_target, y_real])
        for network, ys, pull in zip(networks, outputs, (pulls[:2], pulls[2:]), strict=True):
            gradient = gradient + torch.autograd.grad(network() if config.split_backward else ys, x, pull)[0]
        x = x.detach()
        share = len(x) / config.batch_size
        ratio = share * sid.health(x, y_real.detach(), y_fake.detach())
        return gradient, torch.stack([loss.detach(), ratio, share * x.std((1, 2, 3)).mean()])

    def _update(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Step the optimizer unless the loss or a gradient is not finite; decided on the device, so nothing waits. Returns `loss`."""
        gradients = [local(value.grad) for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).sum()
        broken = (self.team.sum((~torch.isfinite(norm + loss)).float()) > 0).float()
        self.skipped += broken
        self.skipped_in_row = (self.skipped_in_row + broken) * broken
        inner = getattr(optimizer, "optimizer", optimizer)
        if isinstance(inner, SecondMomentAdam):
            inner.found_inf = broken
            optimizer.step()
        elif not bool(broken):  # an optimizer of another library cannot be told on the device
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def update_average(self) -> None:
        """G_ema <- beta G_ema + (1 - beta) G, beta by half-life in images with a ramp-up (method 1.7)."""
        beta = ema_beta((self.step - self.config.fake_warmup) * self.config.batch_size, self.config)
        values = [self._averaged(local(value.detach())) for value in self.generator.parameters()]
        torch._foreach_lerp_([local(value) for value in self.average], values, 1.0 - beta)

    # Chance

    def _micro_batches(self) -> Iterator[tuple[range, bool]]:
        """This process's samples of the global batch in pieces, and whether a piece is the last."""
        samples, size = self.team.share(range(self.config.batch_size)), self.config.micro_batch
        for start in range(0, len(samples), size):
            yield samples[start : start + size], start + size >= len(samples)

    def _draw(self, phase: str, update: int, samples: range) -> Draw:
        """This micro-batch's draws, moved to the device, while a thread makes those of the next one."""
        key = (phase, self.step, update, samples)
        draw = (self._drawn.pop(key, None) or self._drawer.submit(self.chance, *key)).result()
        self._drawn.clear()
        following = self._next(key)
        self._drawn[following] = self._drawer.submit(self.chance, *following)
        on = self.device
        return Draw(draw.prompts, [value.to(on) for value in draw.latents], draw.noise.to(on), draw.t.to(on))

    def _next(self, key: tuple[str, int, int, range]) -> tuple[str, int, int, range]:
        """The micro-batch after this one in the order of `advance`."""
        phase, step, update, samples = key
        pieces = [piece for piece, _ in self._micro_batches()]
        index = pieces.index(samples) + 1 if samples in pieces else 0
        if index < len(pieces):
            return phase, step, update, pieces[index]
        if phase == FAKE and update + 1 < self.config.fake_updates:
            return FAKE, step, update + 1, pieces[0]
        if phase == FAKE and step >= self.config.fake_warmup:
            return GENERATOR, step, 0, pieces[0]
        return FAKE, step + 1, 0, pieces[0]

    def chance(self, phase: str, step: int, update: int, samples: Sequence[int]) -> Draw:
        """Prompts, noises and timesteps of some samples of a step: a function of the seed and the arguments, of nothing else.

        Timesteps are uniform in t_min .. t_max - 1. In the fake score's step some captions are emptied, for generator and score
        alike. A few-step student stops after the same random number of steps in the whole batch, in every process and for both
        networks, as in the published code of few-step SiD.
        """
        config, shape = self.config, self.sampler.model.latent_shape
        turn = step * config.fake_updates + update
        first = ((config.fake_updates + 1) * step + (update if phase == FAKE else config.fake_updates)) * config.batch_size
        prompts = [self.prompts.at(config.seed, first + sample) for sample in samples]
        if phase == FAKE and (config.kappa1 != 1.0 or config.kappa2 != 1.0 or config.kappa3 != 1.0):
            drops = randomness.uniform(config.seed, "caption dropout", turn, samples) < config.dropout
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, drops.tolist(), strict=True)]
        visits = 1
        if config.student_steps > 1:
            visits = int(randomness.integers(1, config.student_steps + 1, config.seed, "exit", step, [0]))
        streams = [f"{phase} latent"] + [f"{phase} latent {visit}" for visit in range(1, visits)]
        latents = [randomness.normal(shape, config.seed, stream, turn, samples) for stream in streams]
        noise = randomness.normal(shape, config.seed, f"{phase} noise", turn, samples)
        t = randomness.integers(config.t_min, config.t_max, config.seed, f"{phase} timestep", turn, samples)
        return Draw(prompts, latents, noise, t)

    # Networks

    def _generate(self, net: nn.Module, draw: Draw, cond: Cond) -> Tensor:
        """Samples [b, C, h, w] of the generator, which stops where the draw says."""
        grid = exit_grid(self.config.t_init, self.config.student_steps)[: len(draw.latents)]
        return few_steps(
            lambda x, t: self.denoise(net, x, t, cond),
            lambda visit: draw.latents[visit],
            self.path,
            grid,
            self.config.renoise,  # type: ignore[arg-type]
        )

    def denoise(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's prediction in float32, computed in bf16 where that was chosen."""
        with self._autocast():
            return denoise(net, x, t, cond).float()

    def _autocast(self) -> AbstractContextManager[Any]:
        # A weight is used once a forward: caching its bf16 copy would cost its memory and save nothing.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False) if self.bf16 else nullcontext()

    def _predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, scales: tuple[float, ...]) -> list[Tensor]:
        """Guided predictions for each scale from one call."""
        return guided_predictions(lambda x, t, cond: self.denoise(net, x, t, cond), x_t, t, cond, self.empty, scales)

    # State

    @torch.no_grad()
    def teacher_images(self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent) -> Tensor:
        """uint8 [B, H, W, 3] that the teacher itself draws, in the precision of the run."""
        with self._autocast():
            images = self.sampler.images(prompts, seeds, plan, advance)
        self.sampler.model.vae.to("cpu")  # training never decodes
        return images

    def student(self) -> Model:
        """The model the run is about: the teacher's text encoder and VAE around the averaged generator, on the CPU.

        Every process must ask: where weights are sharded, each holds a part.
        """
        with torch.device("meta"):
            unet = build("unet", self.generator.config)
        names = [name for name, _ in self.generator.named_parameters()]
        weights = {name: whole(value) for name, value in zip(names, self.average, strict=True)}
        unet.load_state_dict(weights, assign=True)
        return self.sampler.model.with_unet(unet.eval().requires_grad_(False))

    @property
    def state_bytes(self) -> int:
        """Size of `tensors()`, but for some scalars."""
        trained = sum(value.numel() for value in self.fake_score.parameters() if value.requires_grad)
        return state_bytes(self.config, sum(value.numel() for value in self.generator.parameters()), trained)

    def tensors(self, copy: bool = False) -> dict[str, dict[str, Tensor]]:
        """The state by file, whole and on the CPU: three networks and two optimizers. Every process must ask where it is sharded.

        With `copy` the next step does not change it, wherever the networks are.
        """
        names = [name for name, _ in self.generator.named_parameters()]
        return {
            "generator": {name: whole(value, copy) for name, value in self.generator.named_parameters()},
            "average": {name: whole(value, copy) for name, value in zip(names, self.average, strict=True)},
            "fake_score": {name: whole(value, copy) for name, value in self.fake_score.named_parameters() if value.requires_grad},
            "optimizer_generator": _optimizer_tensors(self.optimizer_generator, copy),
            "optimizer_fake": _optimizer_tensors(self.optimizer_fake, copy),
        }

    def load(self, step: int, files: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `tensors()` of an engine with the same config. Raises KeyError or RuntimeError where names or shapes differ."""
        for name, value in self.generator.named_parameters():
            assign(value, files["generator"][name])
        for (name, _), value in zip(self.generator.named_parameters(), self.average, strict=True):
            assign(value, files["average"][name])
        for name, value in self.fake_score.named_parameters():
            if value.requires_grad:
                assign(value, files["fake_score"][name])
        _load_optimizer(self.optimizer_generator, files["optimizer_generator"])
        _load_optimizer(self.optimizer_fake, files["optimizer_fake"])
        self.skipped_in_row.zero_()
        self.step = step


def optimizer_bytes(config: DistillConfig, trained: int) -> int:
    """Memory of the moments of `trained` weights."""
    return {"adam": 4, "adam8bit": 2}[config.optimizer] * trained


def state_bytes(config: DistillConfig, weights: int, trained: int) -> int:
    """Size of the state of a run, with `weights` in the generator and `trained` in the fake score: what a checkpoint holds."""
    return 8 * weights + 4 * trained + optimizer_bytes(config, weights + trained)


def check_split(batch_size: int, processes: int) -> None:
    """Raises UsageError where a batch does not give each process the same number of images."""
    if batch_size % processes:
        raise UsageError(f"--batch-size {batch_size} does not split over {processes} processes evenly")


def check_teacher(name: str, is_student: bool, timesteps: int, config: DistillConfig) -> None:
    """Raises InputError for a model that cannot teach, UsageError for settings that its schedule has no room for."""
    if is_student:
        raise InputError(f"{name} is a one-step student already", "pass the teacher it came from")
    if config.t_init >= timesteps or config.t_max > timesteps:
        raise UsageError(f"the teacher's schedule has {timesteps} timesteps; --t-init and --t-max must fit in it")


def _states(optimizer: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Each trained tensor and what the optimizer remembers about it; accelerate may have wrapped the optimizer."""
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
        else:  # the 8-bit optimizer counts steps in a plain number, and makes its state only when it first steps
            state[entry] = saved.item() if saved.ndim == 0 else saved.to(value.device)


def ema_beta(images: int, config: DistillConfig) -> float:
    """Weight of the old average after `images` images: half-life config.ema_images, at most a share of the images seen."""
    half_life = min(config.ema_images, config.ema_rampup * images)
    return 0.5 ** (config.batch_size / half_life) if half_life > 0 else 0.0
