"""GPUs that a dry run plans for, and the values of --plan-for. This module imports no large library."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sidcli.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """A GPU with data sheet values: memory in GB (10^9 bytes), dense bf16 matrix throughput in TFLOP/s."""

    title: str
    memory: float
    tflops: float


GPUS = {
    "rtx-3090": Gpu("RTX 3090", 24, 71),
    "rtx-4090": Gpu("RTX 4090", 24, 165),
    "rtx-5090": Gpu("RTX 5090", 32, 209),
    "l4": Gpu("L4", 24, 121),
    "l40s": Gpu("L40S", 48, 362),
    "a100": Gpu("A100 80 GB", 80, 312),
    "h100": Gpu("H100", 80, 989),
    "h200": Gpu("H200", 141, 989),
}
LARGEST_MEMORY = 10_000
"""Maximum of --plan-for in GB. A larger number is probably a typing error."""


def parse_gpu(text: str) -> Gpu:
    """Return the GPU of a name in GPUS or of an amount of memory such as `24gb`. Raises UsageError for other text."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gb", text.lower())
    if not amount:
        raise UsageError(f"--plan-for: unknown GPU {text!r}", f"an amount of memory such as 24gb, or one of {', '.join(GPUS)}")
    memory = float(amount[1])
    if not 0 < memory <= LARGEST_MEMORY:
        raise UsageError(f"--plan-for must be more than 0 GB and at most {LARGEST_MEMORY} GB, not {text}", "such as 24gb")
    return Gpu(f"a GPU of {memory:g} GB", memory, 0.0)
