"""The engine beside a naive loop, on the same machine in the same run: images a second, memory, share of the machine's peak.

    python tests/benchmarks/throughput.py                   # emoji size, on the CPU
    python tests/benchmarks/throughput.py --size sd15       # random weights at the size of SD 1.5 and 512 px, on a GPU
    python tests/benchmarks/throughput.py --profile         # also the operators that take most of the time

The naive loop is written by us and behaves as the published one does: float32 without TF32, the text encoded again at each use, clean
latents by a scheduler call per sample, micro-batch 1, both moments of Adam. A result is written to tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from sidcli.data.prompts import open_prompts
from sidcli.devices import processor
from sidcli.engine import FP32, Arithmetic, Engine
from sidcli.models.loading import Model, load, quiet_libraries
from sidcli.models.sources import find
from sidcli.progress import Silence
from sidcli.settings import MEMORY, PRESETS, DistillConfig
from sidcli.training import plan, precision

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from tests import tiny

RESULTS = Path(__file__).parent / "results"
OPERATORS = 12
"""Operators of a profile."""


class Naive:
    """SiD-LSG as its authors' loop computes it (arXiv 2406.01561), at guidance 2 everywhere."""

    def __init__(self, teacher: Model, config: DistillConfig, device: torch.device):
        self.config, self.device, self.model = config, device, teacher
        self.text = teacher.text_encoders[0].to(device)
        self.phi = teacher.denoiser.to(device)
        self.psi, self.theta = (copy.deepcopy(self.phi).requires_grad_(True) for _ in range(2))
        self.average = copy.deepcopy(self.phi)
        self.adams = [torch.optim.Adam(net.parameters(), 1e-6, betas=(0.0, 0.999)) for net in (self.psi, self.theta)]
        self.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
        self.scheduler.set_timesteps(1000)
        self.prompts, self.position = open_prompts(config.prompts), 0

    def encode(self, prompts: list[str]) -> torch.Tensor:
        tokenizer = self.model.tokenizers[0]
        ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return self.text(ids.input_ids.to(self.device)).last_hidden_state

    def clean(self, predicted: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [self.scheduler.step(predicted[i], t[i].cpu(), x_t[i]).pred_original_sample for i in range(len(predicted))]
        )

    def score(self, net: Any, x_t: torch.Tensor, t: torch.Tensor, prompts: list[str], kappa: float = 2.0) -> torch.Tensor:
        states = torch.cat([self.encode([""] * len(prompts)), self.encode(prompts)])
        empty, given = net(torch.cat([x_t, x_t]), torch.cat([t, t]), states).sample.chunk(2)
        return empty + kappa * (given - empty)

    def generate(self, prompts: list[str]) -> torch.Tensor:
        z = torch.randn(len(prompts), *self.model.latent_shape, device=self.device)
        t = torch.full((len(prompts),), self.config.t_init, device=self.device)
        x_t = self.scheduler.add_noise(torch.zeros_like(z), z, t)
        return self.clean(self.theta(x_t, t, self.encode(prompts)).sample, t, x_t)

    def chance(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        noise, t = torch.randn_like(x), torch.randint(20, 980, (len(x),), device=self.device)
        return noise, t, self.scheduler.add_noise(x, noise, t)

    def next_prompt(self) -> list[str]:
        self.position += 1
        return [self.prompts.at(0, self.position)]

    def advance(self) -> None:
        size = self.config.batch_size
        self.psi.requires_grad_(True)
        self.theta.requires_grad_(False)
        for _ in range(size):
            prompts = self.next_prompt()
            with torch.no_grad():
                x = self.generate(prompts)
            noise, t, x_t = self.chance(x)
            ((self.score(self.psi, x_t, t, prompts) - noise).square().sum() / size).backward()
        self.update(self.psi, self.adams[0])
        self.psi.requires_grad_(False)
        self.theta.requires_grad_(True)
        for _ in range(size):
            prompts = self.next_prompt()
            x = self.generate(prompts)
            _, t, x_t = self.chance(x)
            fake = self.clean(self.score(self.psi, x_t, t, prompts), t, x_t)
            real = self.clean(self.score(self.phi, x_t, t, prompts), t, x_t)
            weight = (x - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5).detach()
            ((real - fake) * (fake - x) / weight).sum().div(size).backward()
        self.update(self.theta, self.adams[1])
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.theta.parameters(), strict=True):
                mean.copy_(value.lerp(mean, 0.99))

    def update(self, net: Any, adam: torch.optim.Optimizer) -> None:
        for value in net.parameters():
            torch.nan_to_num(value.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=value.grad)
        adam.step()
        adam.zero_grad(set_to_none=False)


def teacher_of(size: str) -> Model:
    if size == "emoji":
        return load(find("emoji-teacher"))
    return tiny.sd15()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, bf16: bool) -> float:
    """Multiply-add rate of one large matrix product on this device, in FLOP/s."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def profiled(advance: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the share of the time of two steps that each operator takes itself, largest first."""
    with torch.profiler.profile() as found:
        advance()
        advance()
        wait(device)
    one = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, one) for event in found.key_averages()}
    return {name: spent[name] / sum(spent.values()) for name in sorted(spent, key=lambda name: -spent[name])[:OPERATORS]}


def measure(name: str, size: str, device: torch.device, config: DistillConfig, steps: int, profile: bool) -> dict[str, Any]:
    """One loop, in a process of its own so that memory is its own."""
    quiet_libraries()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        named = dataclasses.replace(
            config, teacher="emoji-teacher" if size == "emoji" else str(tiny.write_sd15_configs(Path(folder)))
        )
        planned = plan.make(named, Path(folder), str(device), 1, print)
    teacher = teacher_of(size)
    advance: Callable[[], Any]
    arithmetic: Arithmetic
    if name == "naive":
        arithmetic, advance = FP32, Naive(teacher, config, device).advance
    else:
        arithmetic, _ = precision.choose(teacher, config, device, Path(folder) / "run.json", Silence())
        engine = Engine(teacher, config, open_prompts(config.prompts), device, arithmetic)
        advance = engine.train_step
    advance()
    advance()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, cpu_seconds = time.perf_counter(), time.process_time()
    for _ in range(steps):
        advance()
    wait(device)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_seconds
    peak = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        **({"profile": profiled(advance, device)} if profile else {}),
        "loop": name,
        "images_per_second": steps * config.batch_size / seconds,
        "peak_memory_gb": peak / 1e9,
        "planned_gb": planned.peak / 1e9 if name != "naive" else None,
        "flop_per_image": planned.flops_per_image,
        "processors_busy": cpu_seconds / seconds,
        "matrix_peak_tflops": matrix_peak(device, arithmetic.bf16) / 1e12,
        "micro_batch": config.micro_batch,
        "precision": arithmetic.name,
    }


def configs(size: str, device: torch.device, batch: int) -> dict[str, DistillConfig]:
    if size == "emoji":
        base = DistillConfig(**(PRESETS["emoji"] | {"prompts": "emoji", "batch_size": batch, "micro_batch": batch}))
        return {
            "naive": base,
            "engine fp32": dataclasses.replace(base, precision="fp32"),
            "engine bf16": dataclasses.replace(base, precision="bf16"),
            "engine auto": base,
        }
    base = DistillConfig(teacher="sd15", prompts="general", batch_size=batch)
    made = {"naive": base, "engine fast": dataclasses.replace(base, micro_batch=8, tf32=True)}
    for name in ("24gb", "12gb"):
        made[f"engine {name}"] = dataclasses.replace(base, **MEMORY[name])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("emoji", "sd15"), default="emoji")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="also measure the time of each operator")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = torch.device(given.device)
    loops = configs(given.size, device, given.batch)
    if given.only:
        print(json.dumps(measure(given.only, given.size, device, loops[given.only], given.steps, given.profile)))
        return
    rows = []
    for name in loops:
        done = subprocess.run([sys.executable, *sys.argv, "--only", name], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed with exit code {done.returncode}")
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    per_image = rows[0]["flop_per_image"]
    slowest = rows[0]["images_per_second"]
    for row in rows:
        row["ratio"] = row["images_per_second"] / slowest
        row["of_matrix_peak"] = row["images_per_second"] * per_image / (row["matrix_peak_tflops"] * 1e12)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    header = ("loop", "images/s", "ratio", "peak GB", "planned GB", "busy CPUs", "of matrix peak")
    print(
        f"{given.size} size, batch {given.batch}, {hardware}, {torch.get_num_threads()} threads, {per_image / 1e12:.4g} TFLOP an image"
    )
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for row in rows:
        print(
            f"| {row['loop']} | {row['images_per_second']:.2f} | {row['ratio']:.2f} | {row['peak_memory_gb']:.2f} | "
            f"{row['planned_gb'] or 0:.2f} | "
            f"{row['processors_busy']:.1f} | {row['of_matrix_peak']:.1%} |"
        )
    for row in rows:
        if "profile" in row:
            print(f"{row['loop']}: " + ", ".join(f"{name} {share:.1%}" for name, share in row["profile"].items()))
    RESULTS.mkdir(exist_ok=True)
    record = {"hardware": hardware, "torch": torch.__version__, "batch": given.batch, "flop_per_image": per_image, "rows": rows}
    (RESULTS / f"throughput-{given.size}-{device.type}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
