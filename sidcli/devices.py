"""Selection of the device by its name on the command line."""

from __future__ import annotations

import os
import platform
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidcli.errors import EnvironmentProblem, UsageError
from sidcli.progress import Listener

if TYPE_CHECKING:
    import torch


def check_name(wanted: str) -> None:
    """Raises UsageError if `wanted` is not a device name. Does not check whether this machine has the device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", wanted):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:INDEX, not {wanted!r}")


def pick_device(wanted: str) -> torch.device:
    """Return the device `auto`, `cpu`, `cuda` or `cuda:INDEX`.

    Raises UsageError for another name, EnvironmentProblem if this machine does not have the device.
    """
    check_name(wanted)
    import torch  # imported after the check, because the import takes seconds

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(f"no device {wanted}: {torch.cuda.device_count()} CUDA devices here", "use --device cpu or auto")
    return device


def choose_device(name: str, listener: Listener) -> torch.device:
    """Return the device as `pick_device` does, and send the listener a note on which device `auto` selected."""
    device = pick_device(name)
    if name == "auto":
        listener.note(f"--device auto: {device}")
    return device


def attention_kernels(math: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which attention runs in PyTorch's own kernels, or with `math` in plain matrix products.

    It leaves out the kernel of cuDNN, which torch 2.11 prefers on an H100: its backward pass in bf16 returns NaN for logits below about
    -88 (pytorch/pytorch#196678, #7181 of huggingface/trl).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return sdpa_kernel([SDPBackend.MATH] if math else [*fused, SDPBackend.MATH])


def half_precision(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return a context in which networks compute in bf16 if `precision` is "bf16", and otherwise as they do outside of it."""
    import torch

    # autocast(enabled=False) would turn off the autocast of a training, in which its teacher draws.
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def warn_of_slow_bf16(device: torch.device, precision: str, listener: Listener) -> None:
    """Send the listener a note if the device has no units for bf16."""
    if precision == "bf16" and device.type == "cpu" and not has_bf16_units():
        listener.note("note: this CPU has no instructions for bf16 (AMX or AVX512-BF16), so that --precision fp32 is much faster")


def has_bf16_units() -> bool:
    """Return whether the CPU multiplies bf16 matrices in hardware (AMX or AVX512-BF16)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def processor() -> str:
    """Return the model name of the CPU, as far as the system reports it."""
    try:
        named = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
