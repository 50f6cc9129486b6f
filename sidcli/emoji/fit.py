"""The loop that trains the models of the emoji world, and what several of these trainings use."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sidcli.devices import attention_kernels
from sidcli.errors import InputError, SidError
from sidcli.files import read_json, write_json
from sidcli.randomness import normal, uniform

Loss = Callable[[int], tuple[Tensor, dict[str, Tensor]]]
SAVE_SECONDS = 120.0
LOG_STEPS = 50
WARM_STEPS = 50
"""Least number of steps of the warm-up of a training whose length is a time."""
HALF_LIFE = 200_000
"""Half-life in images of the averaged weights of trainings for any device."""


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up over 2 % of the steps, constant, linear decay over the last 40 %."""
    warm, decay = max(1, steps // 50), max(1, steps * 2 // 5)
    return peak * min(1.0, (step + 1) / warm, (steps - step) / decay)


@contextmanager
def weights_of(net: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """Load the averaged weights into the network for the duration of the block, then restore its own weights."""
    own = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict({**own, **average})
    try:
        yield
    finally:
        net.load_state_dict(own)


class Fit:
    """A training run with AdamW and averaged weights, on the device of the network. It saves every two minutes and at the end, and
    resumes from its file.

    It ends after `steps` or, if `seconds` are given, after that time, which the learning rate then follows. The time of earlier
    runs that are resumed counts.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        loss: Loss,
        output: Path,
        steps: int,
        lr: float,
        decay: float = 0.999,
        seconds: float | None = None,
    ):
        self.name, self.net, self.loss, self.output, self.steps, self.lr = name, net, loss, output, steps, lr
        self.seconds, self.spent = seconds, 0.0
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {name: value.detach().clone() for name, value in net.named_parameters()}
        self.decay = decay
        self.step = 0
        output.mkdir(parents=True, exist_ok=True)
        if self.state_file.exists():
            self.resume()

    @property
    def state_file(self) -> Path:
        return self.output / f"{self.name}.state.safetensors"

    @property
    def ended(self) -> bool:
        return self.step >= self.steps if self.seconds is None else self.spent >= self.seconds

    def rate(self) -> float:
        """Return the learning rate of the next step."""
        if self.seconds is None:
            return learning_rate(self.step, self.steps, self.lr)
        by_time = learning_rate(int(1000 * self.spent / self.seconds), 1000, self.lr)
        return by_time * min(1.0, (self.step + 1) / WARM_STEPS)  # the first steps on a GPU take seconds each

    def save(self) -> None:
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        tensors |= {"step": torch.tensor(self.step), "spent": torch.tensor(self.spent, dtype=torch.float64)}
        temporary = self.state_file.with_suffix(".tmp")
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        temporary.replace(self.state_file)

    def resume(self) -> None:
        tensors = load_file(self.state_file, str(next(self.net.parameters()).device))
        self.step = int(tensors["step"])
        self.spent = float(tensors.get("spent", 0.0))
        self.net.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("net.")})
        # The file's order is alphabetical; `run` needs the averages in the order of the parameters.
        self.average = {name: tensors[f"average.{name}"] for name in self.average}
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, part = name.split(".", 2)
                state.setdefault(int(index), {})[part] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        print(f"{self.name}: continues at step {self.step}", flush=True)

    def run(self, probe: Callable[[], str] | None = None, probe_steps: int = 500) -> nn.Module:
        """Train to the end, then return the network with its averaged weights."""
        started = saved = time.monotonic()
        first, before = self.step, self.spent
        totals: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        with (self.output / f"{self.name}.log.jsonl").open("a") as log:
            while not self.ended:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate()
                self.net.train()
                with attention_kernels():
                    loss, parts = self.loss(self.step)
                    loss.backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                self.spent = before + time.monotonic() - started
                beta = min(self.decay, self.step / (self.step + 9))
                torch._foreach_lerp_(list(self.average.values()), [value.detach() for value in self.net.parameters()], 1.0 - beta)
                for part, value in parts.items():  # a number on the host at each step would make the CPU wait for the GPU
                    totals[part] = totals.get(part, torch.zeros((), device=value.device)) + value.double()
                    counts[part] += 1
                if self.step % LOG_STEPS == 0 or self.ended:
                    rate = (time.monotonic() - started) / (self.step - first)
                    record: dict[str, object] = {"step": self.step, "seconds_per_step": round(rate, 4)}
                    record |= {part: round(float(value) / counts[part], 5) for part, value in totals.items()}
                    if not math.isfinite(float(loss.detach())):
                        raise SidError(f"{self.name}: the loss is not finite at step {self.step}", "start again with a lower --lr")
                    if probe and (self.step % probe_steps == 0 or self.ended):
                        with weights_of(self.net, self.average):
                            record["probe"] = probe()
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    print(self.name, record, flush=True)
                    totals, counts = {}, Counter()
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()
        self.net.load_state_dict({**self.net.state_dict(), **self.average})
        return self.net.eval()


def half_precision() -> torch.autocast:
    """Return a bf16 autocast. It halves the time of a convolution on a CPU with AVX512-BF16; CUDA GPUs since 2020 support bf16."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def bf16_on_gpu(device: torch.device) -> torch.autocast:
    """Return a bf16 autocast that has no effect on a CPU, where bf16 is 20 times slower than float32 without instructions for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def degraded(x: Tensor, step: int) -> Tensor:
    """Degrade images in 0..255 to resemble generated images: half of them are blurred, all of them get a little noise."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    amount = uniform(0, "soften", step, range(len(x))).view(-1, 1, 1, 1)
    x = torch.where(amount < 0.5, x, torch.lerp(x, soft, 2 * amount - 1))
    return (x + 4.0 * normal(x.shape[1:], 0, "grain", step, range(len(x)))).clamp(0, 255)


def check_same(file: Path, settings: dict[str, object]) -> None:
    """Write the settings of a training to `file`. Raises InputError if there are others: the training of others would be resumed."""
    if file.exists() and (before := read_json(file)) != settings:
        changed = ", ".join(f"{key}: {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value)
        raise InputError(f"{file.parent} holds a training with other settings: {changed}", "choose another --output")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)
