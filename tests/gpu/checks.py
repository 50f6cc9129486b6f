"""Is it right on a GPU? Each check compares a step on the device with the same step on the CPU, or two ways of computing it.

    python -m tests.gpu.checks FILE DEVICE SIZE NAME [NAME ...]

Bounds are on the relative distance of whole gradients, |a - b| / |b|.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine
from sidcli.models.loading import load, quiet_libraries
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find
from sidcli.settings import MEMORY, DistillConfig
from tests import tiny, tiny_families
from tests.gpu.graphs import attach
from tests.gpu.record import Check, Outcome, Skipped, run_checks
from tests.gradients import gradient, perturbed

CPU = torch.device("cpu")
FLOAT32 = 1e-3
"""Two float32 computations of one gradient by different kernels."""
BF16 = 0.1
"""bf16 has 8 bits; a gradient through three networks loses some more."""


class Place:
    """What the checks run on: the device, the number of images, a folder for models."""

    def __init__(self, device: str, smoke: bool):
        self.device, self.smoke = torch.device(device), smoke
        self.folder = Path(tempfile.mkdtemp())
        self.batch = 2 if smoke else 8

    def path(self, kind: str) -> str:
        """A model of this kind, written at its first use."""
        if kind == "emoji":
            return "emoji-teacher"
        makers: dict[str, Any] = {
            "sd": tiny.write_sd,
            "sd-v": lambda folder: tiny.write_sd(folder, "v_prediction"),
            "sd2-v": tiny_families.write_sd2,
            "sdxl": tiny_families.write_sdxl,
        }
        return str(self.folder / kind if (self.folder / kind).exists() else makers[kind](self.folder / kind))

    def engine(self, kind: str, device: torch.device, **settings: Any) -> Engine:
        base = {"precision": "fp32", "compile": "off", "batch_size": self.batch, "micro_batch": self.batch}
        base |= {"lr_fake": 1e-4, "lr_generator": 1e-4, "prompts": "emoji" if kind == "emoji" else "general"}
        config = DistillConfig(teacher=kind, **(base | settings))
        return perturbed(Engine(load(find(self.path(kind))), config, open_prompts(config.prompts), device))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """|one - other| / |other|, in float64 on the CPU."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return float((one - other).norm() / other.norm())


def both(place: Place, kind: str, other: dict[str, Any], **settings: Any) -> dict[str, float]:
    """Distances of the gradients of both phases on the device, with `other` settings and without."""
    found = {}
    for phase in ("fake_score", "generator"):
        plain = gradient(place.engine(kind, place.device, **settings), phase)
        found[phase] = distance(gradient(place.engine(kind, place.device, **(settings | other)), phase), plain)
    return found


def judged(values: dict[str, float], bound: float) -> Outcome:
    return Outcome(values, all(value < bound for value in values.values()), f"< {bound:g}")


def against_the_cpu(place: Place, kind: str, **settings: Any) -> Outcome:
    found = {}
    for phase in ("fake_score", "generator"):
        on_cpu = gradient(place.engine(kind, CPU, **settings), phase)
        found[phase] = distance(gradient(place.engine(kind, place.device, **settings), phase), on_cpu)
    return judged(found, FLOAT32)


def optimizer_step(place: Place) -> Outcome:
    """Weights after two whole steps with a large epsilon, with which a step follows its gradient instead of the gradient's sign."""
    engines = [place.engine("emoji", where, adam_eps=0.1) for where in (CPU, place.device)]
    start = torch.cat([value.detach().cpu().flatten() for value in engines[0].roles["generator"].net.parameters()])
    for engine in engines:
        engine.train_step()
        engine.train_step()
    moved = {}
    for name in ("generator", "average", "fake_score"):
        rows = [torch.cat([value.flatten() for value in engine.tensors()[name].values()]) for engine in engines]
        moved[name] = float((rows[1] - rows[0]).norm() / (rows[0] - start).norm())
    return judged(moved, 1e-2)


def offloads(place: Place) -> Outcome:
    """Weights and average after two steps, state in main memory and not."""
    engines = [place.engine("emoji", place.device, offload_average=away, offload_optimizer=away) for away in (False, True)]
    for engine in engines:
        engine.train_step()
        engine.train_step()
    one, other = (engine.tensors() for engine in engines)
    found = {}
    for name in ("generator", "average"):
        keep, away = (torch.cat([value.flatten() for value in tensors[name].values()]) for tensors in (one, other))
        found[name] = distance(away, keep)
    return judged(found, FLOAT32)


def compiled(place: Place) -> Outcome:
    started = time.monotonic()
    values: dict[str, float] = both(place, "emoji", {"compile": "on"})
    outcome = judged(values, FLOAT32)
    return dataclasses.replace(outcome, values=values | {"seconds_with_compilation": round(time.monotonic() - started, 1)})


def graphs(place: Place) -> Outcome:
    """Gradients of both phases in bf16 with the networks' passes recorded as CUDA graphs, and replayed a second time."""
    if place.device.type != "cuda":
        raise Skipped("needs a GPU")
    found = {}
    for phase in ("fake_score", "generator"):
        plain, recorded = (place.engine("emoji", place.device, precision="bf16") for _ in range(2))
        recorder = attach(recorded)
        found[phase] = distance(gradient(recorded, phase), gradient(plain, phase))
        recorded.step = plain.step = 1
        found[f"{phase}, again"] = distance(gradient(recorded, phase), gradient(plain, phase))
        found[f"{phase}, graphs"] = len(recorder.recorded)
    apart = [value for name, value in found.items() if not name.endswith("graphs")]
    return Outcome(found, all(value < BF16 for value in apart) and found["generator, graphs"] > 0, f"< {BF16:g}")


def recipes(place: Place) -> Outcome:
    """One step of each memory recipe in bf16; the fake score's LoRA has rank 4."""
    found = {}
    for name, recipe in MEMORY.items():
        settings = recipe | {"precision": "bf16", "fake_lora": min(4, recipe.get("fake_lora", 0)), "micro_batch": 2}
        numbers = place.engine("emoji", place.device, **settings).train_step().numbers()
        found[name] = {key: round(value, 5) for key, value in numbers.items()}
    return Outcome(found, all(row["skipped"] == 0 for row in found.values()), "no update skipped")


def two_processes(place: Place, shard: bool = False) -> Outcome:
    """Two processes on one device, over gloo, because NCCL refuses to have both on one card; sharded, on two GPUs over NCCL."""
    if shard and place.device.type == "cuda" and torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs: FSDP2 over gloo on one GPU ends with a segmentation fault in torch 2.11")
    alone = {phase: gradient(place.engine("emoji", place.device), phase).cpu() for phase in ("fake_score", "generator")}
    file = place.folder / f"two-{shard}.pt"
    port = str(29500 + os.getpid() % 500 + shard)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [
        sys.executable,
        "-m",
        "tests.gpu.checks",
        "--worker",
        str(file),
        str(place.device),
        str(place.batch),
        str(int(shard)),
    ]
    team = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank if shard else "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=150)[1] for process in team]
    if any(process.returncode for process in team):
        last = [text.strip()[-1500:] or "no message" for text in said]
        raise RuntimeError("; ".join(f"exit {process.returncode}: {text}" for process, text in zip(team, last, strict=True)))
    together = torch.load(file, weights_only=True)
    return judged({phase: distance(together[phase], alone[phase]) for phase in alone}, FLOAT32)


def worker(file: str, device: str, batch: str, shard: str) -> None:
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") and shard == "1" else "gloo")
    place = Place(device, False)
    place.batch = int(batch)
    found = {}
    for phase in ("fake_score", "generator"):
        engine = place.engine("emoji", place.device, shard=shard == "1")
        found[phase] = gradient(engine, phase).cpu()
    if os.environ["RANK"] == "0":
        torch.save(found, file)
    torch.distributed.barrier()


def sid(*arguments: object, before: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """A `sid` command in a process of its own; `before` is Python that runs first."""
    code = f"import sys; sys.argv = ['sid', *{[str(argument) for argument in arguments]!r}]\n{before}\nfrom sidcli.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-1500:]}")
    return done


def killed(place: Place) -> Outcome:
    """`sid distill`, uninterrupted twice, and killed with SIGKILL after a checkpoint and run again."""
    steps, options = (
        12,
        ["--batch-size", "4", "--save-every", "4", "--sample-every", "100", "--seed", "3", "--device", place.device],
    )
    command = ["distill", "--teacher", "emoji-teacher", "--steps", steps, *options, "--precision", "fp32", "--compile", "off", "-q"]
    runs = [place.folder / f"killed-{index}" for index in range(3)]
    with contextlib.ExitStack():
        code = [sys.executable, "-m", "sidcli", *map(str, command), "--output"]
        whole = [
            subprocess.Popen([*code, str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for run in runs[:2]
        ]
        victim = subprocess.Popen([*code, str(runs[2])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (runs[2] / "checkpoints/step-00000004/manifest.json").exists() and victim.poll() is None:
            time.sleep(0.02)
        alive = victim.poll() is None
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        sid(*command, "--output", runs[2])
        for process in whole:
            _, said = process.communicate()
            if process.returncode:
                raise RuntimeError(said.strip()[-1500:])
    first, again, resumed = (
        torch.cat(
            [value.flatten() for _, value in sorted(load_file(run / "student/unet/diffusion_pytorch_model.safetensors").items())]
        )
        for run in runs
    )
    found = {"repeat": distance(again, first), "resumed": distance(resumed, first), "was_killed": alive}
    return Outcome(found, alive and found["resumed"] < 1e-2, "resumed < 0.01")


def out_of_memory(place: Place) -> Outcome:
    if place.device.type != "cuda":
        raise Skipped("needs a GPU")
    share = 1.2e9 / torch.cuda.get_device_properties(place.device).total_memory
    before = f"import torch; torch.cuda.set_per_process_memory_fraction({share})"
    arguments = ["distill", "--device", place.device, "--steps", 2, "--batch-size", 512, "--micro-batch", 512, "--compile", "off"]
    done = sid(*arguments, "--memory", "fast", "--output", place.folder / "oom", before=before, check=False)
    said = done.stderr.strip().splitlines()[-3:]
    ok = done.returncode == 4 and "out of memory" in done.stderr and "--micro-batch 1" in done.stderr
    return Outcome({"exit": done.returncode, "said": said}, ok, "exit 4 and advice")


def too_many_processes(place: Place) -> Outcome:
    if place.device.type != "cuda":
        raise Skipped("needs a GPU")
    count = torch.cuda.device_count() + 1
    options = ["--processes", count, "--device", "cuda", "--steps", 1, "--batch-size", count * 2, "--output", place.folder / "many"]
    done = sid("distill", *options, check=False)
    return Outcome(
        {"exit": done.returncode, "said": done.stderr.strip().splitlines()[-2:]},
        done.returncode == 4,
        "exit 4, before a process starts",
    )


def images(place: Place) -> Outcome:
    """The shipped student and teacher on both devices: largest difference of a pixel, of 255."""
    found = {}
    for name in ("emoji", "emoji-teacher"):
        rows = []
        for where in (CPU, place.device):
            model = load(find(name))
            plan = plan_for(model, None if name == "emoji" else 10)
            rows.append(Sampler(model, where).images(["a cat", "a red apple"], [0, 1], plan).astype(int))
        found[name] = int(np.abs(rows[0] - rows[1]).max())
    return Outcome(found, all(value <= 2 for value in found.values()), "<= 2/255")


def evaluation(place: Place) -> Outcome:
    """CLIP score and accuracy on the device and on the CPU, of images drawn on each."""
    num = 20 if place.smoke else 100
    rows = []
    for where in ("cpu", str(place.device)):
        os.environ["SID_CACHE_DIR"] = str(place.folder / f"cache-{where}")
        done = sid("eval", "emoji", "--clip", "--accuracy", "--num", num, "--device", where, "--json")
        rows.append(json.loads(done.stdout)["models"][-1]["metrics"])
    apart = {name: abs(rows[0][name]["value"] - rows[1][name]["value"]) for name in rows[0]}
    return Outcome(apart, all(value <= 0.01 for value in apart.values()), "within 0.01")


def chosen(place: Place) -> Outcome:
    """What the engine chose on this device."""
    engine = place.engine("emoji", place.device, precision="auto")
    kinds = {
        name: str(next(net.parameters()).dtype)
        for name, net in (("teacher", engine.teacher), ("generator", engine.roles["generator"].net))
    }
    return Outcome(kinds | {"bf16": engine.arithmetic.bf16})


def make_checks(place: Place) -> dict[str, Check]:
    checks: dict[str, Check] = {
        "chosen": lambda: chosen(place),
        "images": lambda: images(place),
        "optimizer": lambda: optimizer_step(place),
        "four steps": lambda: against_the_cpu(place, "sd", student_steps=4),
        "lora fake": lambda: against_the_cpu(place, "emoji", fake_lora=4),
        "bf16": lambda: judged(both(place, "emoji", {"precision": "bf16"}), BF16),
        "bf16 teacher": lambda: judged(both(place, "emoji", {"precision": "bf16", "teacher_bf16": True}), BF16),
        "tf32": lambda: judged(both(place, "emoji", {"tf32": True}), 2e-2),
        "micro-batches": lambda: judged(both(place, "emoji", {"micro_batch": 1}), FLOAT32),
        "recomputation": lambda: judged(both(place, "emoji", {"gradient_checkpointing": True}), FLOAT32),
        "split backward": lambda: judged(both(place, "emoji", {"split_backward": True}), FLOAT32),
        "offloads": lambda: offloads(place),
        "recipes": lambda: recipes(place),
        "compile": lambda: compiled(place),
        "graphs": lambda: graphs(place),
        "two processes": lambda: two_processes(place),
        "two processes, sharded": lambda: two_processes(place, shard=True),
        "killed": lambda: killed(place),
        "out of memory": lambda: out_of_memory(place),
        "processes": lambda: too_many_processes(place),
        "evaluation": lambda: evaluation(place),
    }
    return {
        f"float32 {kind}": lambda kind=kind: against_the_cpu(place, kind) for kind in ("emoji", "sd", "sd-v", "sd2-v", "sdxl")
    } | checks


GROUPS = [
    ["chosen", *(f"float32 {kind}" for kind in ("emoji", "sd", "sd-v", "sd2-v", "sdxl")), "images", "optimizer", "four steps"],
    ["bf16", "bf16 teacher", "tf32", "micro-batches", "recomputation", "split backward", "offloads", "recipes", "lora fake"],
    ["graphs"],
    ["two processes", "two processes, sharded"],
    ["processes", "out of memory"],
    ["evaluation"],
    ["killed"],
    ["compile"],
]
"""Checks that share a process; the groups run side by side."""


def main() -> None:
    quiet_libraries()
    if sys.argv[1] == "--worker":
        worker(*sys.argv[2:])
        return
    file, device, size, *names = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):
        run_checks(Path(file), "right", make_checks(Place(device, size == "smoke")), names)


if __name__ == "__main__":
    main()
