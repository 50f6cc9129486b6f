"""How fast and how large is it on a GPU? SD 1.5 and SDXL at their full size with random weights, and the emoji teacher.

    python -m tests.gpu.speed FILE DEVICE SIZE NAME [NAME ...]

Rates are training images a second of one network (a step of batch B counts B images). Shares are of the matrix product measured here.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine
from sidcli.models.drawing import Plan
from sidcli.models.families import FAMILIES, build, clip_tokenizer
from sidcli.models.loading import Model, load, quiet_libraries
from sidcli.models.sampler import Sampler
from sidcli.models.sources import Source, find
from sidcli.models.unet import read_path
from sidcli.progress import Silence
from sidcli.settings import MEMORY, PRESETS, DistillConfig
from sidcli.training import plan
from tests import tiny, tiny_families
from tests.benchmarks.throughput import Naive, matrix_peak, wait
from tests.gpu.graphs import attach
from tests.gpu.record import Check, Outcome, Skipped, append, run_checks

PRECISION = "bf16" if torch.cuda.is_available() else "fp32"
"""bf16 convolutions take seconds on a CPU without AMX."""


class Lab:
    """The device, the size of everything, and what was measured once for all checks."""

    def __init__(self, file: Path, device: str, smoke: bool):
        self.file, self.device, self.smoke = file, torch.device(device), smoke
        self.folder = Path(tempfile.mkdtemp())
        self.peaks: dict[bool, float] = {}

    def peak(self, bf16: bool) -> float:
        """FLOP/s of the largest matrix product."""
        if bf16 not in self.peaks:
            self.peaks[bf16] = matrix_peak(self.device, bf16)
        return self.peaks[bf16]

    def teacher(self, kind: str) -> Model:
        """Random weights at full size, made on the device; tiny ones in a smoke test."""
        if kind == "emoji":
            return load(find("emoji-teacher"))
        if self.smoke:
            path = self.folder / kind
            if not path.exists():
                tiny.write_sd(path) if kind == "sd15" else tiny_families.write_sdxl(path)
            return load(find(str(path)))
        family = FAMILIES["sdxl" if kind == "sdxl" else "sd1"]
        torch.manual_seed(0)
        with self.device:
            nets: dict[str, Any] = {name: build(name, config) for name, config in family.components.items()}
        for net in nets.values():
            net.eval().requires_grad_(False)
        texts = tuple(nets[name] for name in ("text_encoder", "text_encoder_2") if name in nets)
        tokenizers = tuple(clip_tokenizer(entry["pad_token"]) for entry in family.tokenizers.values())
        source = Source(kind, Path(), "random weights")
        path = read_path(family.scheduler)
        empty = bool(family.pipeline)
        return Model(source, nets["unet"], nets["vae"], texts, tokenizers, path, family.scheduler, {}, empty)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {
            "peak_gb": round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2),
            "reserved_gb": round(torch.cuda.max_memory_reserved(self.device) / 1e9, 2),
        }


def forward_flops(model: Model) -> int:
    """FLOP of one forward of one latent, counted on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(model.denoiser.config)
    cond = plan.Cond(torch.empty(1, 77, int(unet.config["cross_attention_dim"]), device="meta"))
    if model.is_xl:
        projection = int(model.text_encoders[1].config.projection_dim)
        cond = plan.Cond(
            cond.states, {"text_embeds": torch.empty(1, projection, device="meta"), "time_ids": torch.empty(1, 6, device="meta")}
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plan.forward(unet, 1, cond)
    return counter.get_total_flops()


def timed(lab: Lab, advance: Callable[[], Any], steps: int, warm: int = 1) -> tuple[float, float]:
    """Seconds of the warm-up and of one step after it."""
    started = time.perf_counter()
    for _ in range(warm):
        advance()
    wait(lab.device)
    warmed = time.perf_counter()
    for _ in range(steps):
        advance()
    wait(lab.device)
    return warmed - started, (time.perf_counter() - warmed) / max(1, steps)


def rated(lab: Lab, model: Model, batch: int, seconds: float, warm: float, bf16: bool, forwards: int = 18) -> dict[str, Any]:
    """A row: images a second, share of the matrix peak by the work without recomputation, memory."""
    rate = batch / seconds
    work = forward_flops(model) * forwards
    return {
        "images_per_second": round(rate, 3),
        "of_matrix_peak": round(rate * work / lab.peak(bf16), 4),
        "tflop_per_image": round(work / 1e12, 3),
        "seconds_of_first_step": round(warm, 2),
        "batch": batch,
        **lab.memory(),
    }


def settings(kind: str, **more: Any) -> DistillConfig:
    base: dict[str, Any] = {"compile": "off", "precision": PRECISION, "prompts": "general", "lr_fake": 1e-6, "lr_generator": 1e-6}
    if kind == "emoji":
        base |= PRESETS["emoji"] | {"prompts": "emoji"}
    return DistillConfig(teacher=kind, **(base | more))


def engine(
    lab: Lab, kind: str, steps: int = 2, arrange: Callable[[Engine], object] | None = None, context: Any = None, **more: Any
) -> Outcome:
    """The engine with these settings. Updates are timed apart: at the paper's batch of 512 they weigh less than in a small step here."""
    lab.free()
    config = settings(kind, **more)
    with context or nullcontext():
        built = Engine(lab.teacher(kind), config, open_prompts(config.prompts), lab.device)
        if arrange:
            arrange(built)
        clock = Clock(lab)
        for role in built.roles.values():
            role.step, role.update_average = clock.wrap(role.step), clock.wrap(role.update_average)  # type: ignore[method-assign]
        warm, _ = timed(lab, built.train_step, 0)
        clock.seconds = 0.0
        _, seconds = timed(lab, built.train_step, steps, 0)
    updates = clock.seconds / steps
    row = rated(lab, built.sampler.model, config.batch_size, seconds, warm, built.arithmetic.bf16)
    per_image = (seconds - updates) / config.batch_size
    row |= {"micro_batch": config.micro_batch, "seconds_of_updates": round(updates, 4)}
    row |= {"images_per_second_at_512": round(512 / (512 * per_image + updates), 3)}
    return Outcome(row, float(built.skipped) == 0, "no update skipped")


class Clock:
    """Adds up the device's time in what it wraps."""

    def __init__(self, lab: Lab):
        self.lab, self.seconds = lab, 0.0

    def wrap(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            wait(self.lab.device)
            started = time.perf_counter()
            result = work(*arguments)
            wait(self.lab.device)
            self.seconds += time.perf_counter() - started
            return result

        return run


def compiled(lab: Lab, kind: str, batch: int) -> Outcome:
    """The engine under torch.compile: the time that compilation takes, then, when the device is quiet, its rate beside the plain one.

    Compilation needs the processor, so it goes on beside other work; $SID_VISIT_QUIET names a file that appears when that has ended.
    """
    lab.free()
    config = settings(kind, batch_size=batch, micro_batch=batch, compile="on")
    built = Engine(lab.teacher(kind), config, open_prompts(config.prompts), lab.device)
    first, _ = timed(lab, built.train_step, 0)
    second, _ = timed(lab, built.train_step, 0)
    append(
        lab.file,
        {
            "part": "fast",
            "name": f"{kind} compilation",
            "event": "done",
            "ok": None,
            "values": {"seconds_of_steps": [first, second]},
        },
    )
    quiet = Path(os.environ["SID_VISIT_QUIET"])
    while not quiet.exists():
        time.sleep(0.1)
    lab.free()
    _, seconds = timed(lab, built.train_step, 3)
    row = rated(lab, built.sampler.model, batch, seconds, first, True)
    del built  # two engines at once would not leave room for the other work
    plain = engine(lab, kind, 2, batch_size=batch, micro_batch=batch).values
    return Outcome(row | {"ratio_to_plain": round(row["images_per_second"] / plain["images_per_second"], 3)})


@contextmanager
def channels_last() -> Iterator[None]:
    """Engines built in this block keep their networks in the channels-last layout, from before their optimizers are made."""
    with mock.patch.object(Engine, "_arrange", lambda _, net: net.to(memory_format=torch.channels_last)):
        yield


def naive(lab: Lab, kind: str, batch: int) -> Outcome:
    lab.free()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config = settings(kind, batch_size=batch)
    model = lab.teacher(kind)
    loop = Naive(model, config, lab.device)
    warm, seconds = timed(lab, loop.advance, 1)
    row = rated(lab, model, batch, seconds, warm, False)
    return Outcome(row)


def peaks(lab: Lab) -> Outcome:
    """Rates of one large matrix product and of a copy."""
    found = {"bf16_tflops": lab.peak(True) / 1e12}
    torch.backends.cuda.matmul.allow_tf32 = False
    found["fp32_tflops"] = lab.peak(False) / 1e12
    if lab.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32_tflops"] = matrix_peak(lab.device, False) / 1e12
        torch.backends.cuda.matmul.allow_tf32 = False
        one, other = (torch.empty(1 << 32, dtype=torch.uint8, device=lab.device) for _ in range(2))
        other.copy_(one)
        _, seconds = timed(lab, lambda: other.copy_(one), 5)
        found["copy_tb_per_second"] = 2 * one.numel() / seconds / 1e12
        found["name"] = torch.cuda.get_device_name(lab.device)
        found["memory_gb"] = torch.cuda.get_device_properties(lab.device).total_memory / 1e9
    return Outcome({name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()})


def profile(lab: Lab, kind: str, **more: Any) -> Outcome:
    """Where one step's time goes: kernels by kind and the longest ones, in percent of the device's busy time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    lab.free()
    config = settings(kind, **more)
    built = Engine(lab.teacher(kind), config, open_prompts(config.prompts), lab.device)
    built.train_step()
    wait(lab.device)
    on_gpu = lab.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    started = time.perf_counter()
    with profiler(activities=activities) as seen:
        built.train_step()
        wait(lab.device)
    seconds = time.perf_counter() - started
    by_kind: dict[str, float] = defaultdict(float)
    longest = []
    for event in seen.key_averages():
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if spent and (not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA):
            by_kind[kernel_kind(event.key)] += spent
            longest.append((spent, event.count, event.key[:110]))
    busy = sum(by_kind.values())
    return Outcome(
        {
            "seconds": round(seconds, 3),
            "busy": round(busy / seconds, 3),
            "kinds": {name: round(100 * spent / busy, 1) for name, spent in sorted(by_kind.items(), key=lambda item: -item[1])},
            "longest": [[round(100 * spent / busy, 1), count, name] for spent, count, name in sorted(longest, reverse=True)[:40]],
        }
    )


KINDS = {
    "attention": ("flash", "fmha", "attention", "softmax"),
    "convolution": ("conv", "wgrad", "dgrad", "fprop", "implicit", "nchwtonhwc", "nhwctonchw", "cudnn"),
    "matrix product": ("gemm", "cutlass", "cublas", "nvjet", "matmul", "splitk"),
    "normalization": ("norm", "welford", "rowwisemoments", "gammabeta", "computefusedparams", "computeinternalgradients"),
    "optimizer": ("adam", "foreach", "multi_tensor", "lerp"),
    "copy and cast": ("copy", "memcpy", "memset", "cat", "fill", "to_copy"),
    "elementwise": ("elementwise", "silu", "gelu", "add", "mul", "reduce", "vectorized", "triton"),
}


def kernel_kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other")


def sampling(lab: Lab, kind: str, batch: int, bf16: bool) -> Outcome:
    """One-step images a second, text encoder and VAE included, and of the UNet alone."""
    lab.free()
    model = lab.teacher(kind)
    sampler = Sampler(model, lab.device)
    one_step, prompts, seeds = Plan(1, grid=(625,)), ["a photo of a cat"] * batch, list(range(batch))

    def with_precision(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast(lab.device.type, torch.bfloat16, enabled=bf16):
                return work()

        return run

    _, seconds = timed(lab, with_precision(lambda: sampler.images(prompts, seeds, one_step)), 3)
    noise = sampler.noise(seeds)
    _, unet = timed(lab, with_precision(lambda: sampler.latents(prompts, noise, one_step)), 3)
    row = {"images_per_second": round(batch / seconds, 2), "ms_per_image": round(1000 * seconds / batch, 2)}
    row |= {"ms_without_vae": round(1000 * unet / batch, 2), "batch": batch, **lab.memory()}
    return Outcome(row)


def planned(lab: Lab) -> Outcome:
    """Peaks that `sid distill --dry-run` plans for the recipes, in GB; needs no GPU."""
    folder = tiny.write_sd15_configs(lab.folder / "configs")
    found = {}
    for name, recipe in MEMORY.items():
        config = settings(str(folder), **recipe)
        made = plan.make(config, Path("out"), "cpu", 1, Silence())
        found[name] = round((made.peak - made.device_memory.get("this program", 0)) / 1e9, 2)
    return Outcome(found)


def make_checks(lab: Lab) -> dict[str, Check]:
    big, small = (2, 1) if lab.smoke else (32, 8)
    memory = {name: {key: value for key, value in recipe.items()} for name, recipe in MEMORY.items()}
    if lab.smoke:
        memory["12gb"]["fake_lora"] = 4
    loras = {"student_lora": memory["12gb"]["fake_lora"], "offload_average": False, "offload_optimizer": False}

    def only_gpu(check: Check) -> Check:
        def run() -> Outcome:
            if lab.device.type != "cuda":
                raise Skipped("needs a GPU")
            return check()

        return run

    def emoji(batch: int, **more: Any) -> Check:
        return lambda: engine(lab, "emoji", steps=2 if lab.smoke else 4, batch_size=batch, micro_batch=batch, **more)

    one_piece = min(16, big)
    checks: dict[str, Check] = {
        "peaks": lambda: peaks(lab),
        "sd15 fast": lambda: engine(lab, "sd15", batch_size=big, micro_batch=small),
        "sd15 two LoRAs": lambda: engine(lab, "sd15", 1, **memory["12gb"] | loras, batch_size=small),
        "sdxl two LoRAs": lambda: engine(lab, "sdxl", 1, **memory["12gb"] | loras, batch_size=min(4, small)),
        "emoji 256": emoji(4 if lab.smoke else 256),
        "emoji 256, graphs": only_gpu(emoji(256, arrange=attach)),
        "sd15 fast, channels-last": only_gpu(
            lambda: engine(lab, "sd15", context=channels_last(), batch_size=big, micro_batch=small)
        ),
        "sdxl 24gb": lambda: engine(lab, "sdxl", 1, **memory["24gb"], batch_size=4 if not lab.smoke else 2),
        "sd15 naive": lambda: naive(lab, "sd15", 1 if lab.smoke else 4),
        "sd15 sample 1 bf16": lambda: sampling(lab, "sd15", 1, True),
        "sd15 fast, cudnn attention": only_gpu(
            lambda: engine(lab, "sd15", 1, context=sdpa_kernel(SDPBackend.CUDNN_ATTENTION), batch_size=big, micro_batch=small)
        ),
        "sd15 24gb": lambda: engine(lab, "sd15", 1, **memory["24gb"], batch_size=small),
        "sdxl fast": only_gpu(lambda: engine(lab, "sdxl", 1, micro_batch=1, teacher_bf16=True, batch_size=4)),
        "sd15 12gb": lambda: engine(lab, "sd15", 1, **memory["12gb"], batch_size=2),
        "sd15 fast, micro-batch 16": lambda: engine(lab, "sd15", batch_size=big, micro_batch=one_piece),
        "sd15 fast, micro-batch 32": lambda: engine(lab, "sd15", batch_size=big, micro_batch=big),
        "sd15 profile": lambda: profile(lab, "sd15", batch_size=small, micro_batch=small),
        "sd15 sample 1": lambda: sampling(lab, "sd15", 1, False),
        "sd15 sample 16 bf16": lambda: sampling(lab, "sd15", one_piece, True),
        "emoji profile": lambda: profile(lab, "emoji", batch_size=4 if lab.smoke else 256, micro_batch=4 if lab.smoke else 256),
        "sd15 fast, tf32": lambda: engine(lab, "sd15", 1, batch_size=big // 2, micro_batch=small, precision="fp32", tf32=True),
        "emoji 64": emoji(4 if lab.smoke else 64),
        "emoji 1024": emoji(4 if lab.smoke else 1024),
        "sd15 compiled": only_gpu(lambda: compiled(lab, "sd15", 16)),
    }
    return checks | {"planned": lambda: planned(lab)}


def main() -> None:
    quiet_libraries()
    file, device, size, *names = sys.argv[1:]
    run_checks(Path(file), "fast", make_checks(Lab(Path(file), device, size == "smoke")), names)


if __name__ == "__main__":
    main()
