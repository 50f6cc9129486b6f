"""What an export is asked for, the same for every format."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sidcli.errors import UsageError
from sidcli.teachers import Model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Order:
    """`dtype` of the written weights; `variant` in the names of diffusers' files; `rank` and `teacher` of a LoRA."""

    dtype: str = "fp32"
    variant: str | None = None
    rank: int = 64
    teacher: Model | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown --dtype {self.dtype!r}", f"one of {', '.join(DTYPES)}")
        if self.variant not in (None, "fp16"):
            raise UsageError(f"--variant must be fp16, the one that is read back everywhere, not {self.variant!r}", "leave it out")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
