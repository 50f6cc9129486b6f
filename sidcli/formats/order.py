"""The formats and options of an export, and all checks that run before a heavy library is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sidcli.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    import torch

    from sidcli.models.loading import Model

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Value of --dtype -> name of the dtype in torch."""


DEFAULT_RANK = 64


@dataclass(frozen=True)
class Format:
    """An export format: one value of --format.

    `module` is the name of a module in sidcli.formats with write() and draw(). `packages` are the packages that the format needs
    and that sid does not depend on. `in_diffusers` is True if a stock pipeline draws with the export, `has_scheduler` if the export
    includes the scheduler with which it does.
    """

    module: str
    dtypes: tuple[str, ...] = tuple(DTYPES)
    packages: tuple[str, ...] = ()
    in_diffusers: bool = False
    has_scheduler: bool = False


FORMATS = {
    "diffusers": Format("diffusers_folder", in_diffusers=True, has_scheduler=True),
    "single-file": Format("single_file_folder", in_diffusers=True),
    "onnx": Format("onnx", ("fp32", "fp16"), ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Format("openvino", ("fp32", "fp16"), ("onnx", "onnxscript", "openvino")),
    "torch-export": Format("torch_export"),
    "lora": Format("lora", packages=("peft",), in_diffusers=True, has_scheduler=True),
}


@dataclass(frozen=True)
class Order:
    """Options of an export: `dtype` of the weights, `variant` in the names of diffusers' files, `rank` and `teacher` of a LoRA.

    Raises UsageError if the dtype or the variant is unknown.
    """

    dtype: str = "fp32"
    variant: str | None = None
    rank: int = DEFAULT_RANK
    teacher: Model | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown --dtype {self.dtype!r}", f"one of {', '.join(DTYPES)}")
        if self.variant not in (None, "fp16"):
            raise UsageError(
                f"--variant must be fp16, the only one that other programs look for, not {self.variant!r}", "leave it out"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype


def check(name: str, order: Order) -> None:
    """Raises UsageError if the format does not exist or does not support the order, and EnvironmentProblem if a package that the
    format needs is not installed."""
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}", f"one of {', '.join(FORMATS)}")
    form = FORMATS[name]
    if order.dtype not in form.dtypes:
        raise UsageError(f"--format {name} does not support --dtype {order.dtype}", f"--dtype {' or '.join(form.dtypes)}")
    if order.variant and name != "diffusers":
        raise UsageError(f"--variant applies to --format diffusers only, not to {name}", "leave it out")
    if order.variant and order.dtype != order.variant:
        raise UsageError(
            f"--variant {order.variant} is the name of weights in half precision, and --dtype is {order.dtype}",
            f"--dtype {order.variant}, or leave --variant out",
        )
    require(form.packages, f"--format {name}")


def check_used(name: str, is_released: bool, teacher: object, rank: int | None, public: bool, repository: str | None) -> None:
    """Raises UsageError for an option that an export does not use. `is_released`: the model is a .pkl file of a UNet."""
    if name != "lora" and rank is not None:
        raise UsageError(f"--rank {rank} is the rank of a LoRA, which --format {name} does not write", "--format lora")
    if name != "lora" and not is_released and teacher is not None:
        raise UsageError(f"--teacher {teacher}: only --format lora and a model in a .pkl use a teacher", "leave --teacher out")
    if public and not repository:
        raise UsageError("--public applies to --push-to-hub, which is not given", "--push-to-hub OWNER/NAME --public")


def require(packages: Sequence[str], what: str) -> None:
    """Raises EnvironmentProblem if one of these packages is not installed. Does not import the packages."""
    # A package whose entry in sys.modules is None is hidden and counts as missing; find_spec is not called for it.
    missing = [package for package in packages if sys.modules.get(package, package) is None or find_spec(package) is None]
    if missing:
        raise EnvironmentProblem(
            f"{what} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            f"pip install {' '.join(packages)}",
        )
