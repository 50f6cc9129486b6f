"""sid: distillation of text-to-image diffusion models into one-step students. Importing this package does not import torch.

The Python API is `load`, `sample`, `distill`, `evaluate` and `export`; see `sidcli.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidcli.api import distill, evaluate, export, load, sample

__all__ = ["distill", "evaluate", "export", "load", "sample"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sidcli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
