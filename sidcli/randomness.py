"""The only source of randomness: every random value is a pure function of (seed, stream, step, sample).

This module keeps no state and no other module seeds a global generator, so a result does not depend on the micro-batch, the number
of processes, an interruption, or earlier draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key(seed: int, stream: str, step: int = 0, sample: int = 0) -> int:
    """Return a 63-bit integer that depends only on the four arguments (blake2b, the same on every machine and Python version)."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, stream: str, step: int = 0, sample: int = 0) -> np.random.Generator:
    """Return a numpy generator for small discrete draws: scenes, captions, orders."""
    return np.random.Generator(np.random.Philox(key=key(seed, stream, step, sample)))


def torch_generator(seed: int, stream: str, step: int = 0, sample: int = 0) -> torch.Generator:
    """Return a torch generator on the CPU. Noise is always drawn on the CPU so that a seed gives the same image on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(key(seed, stream, step, sample))


def normal(shape: Sequence[int], seed: int, stream: str, step: int, samples: Sequence[int]) -> torch.Tensor:
    """Return standard normal noise, float32 [len(samples), *shape]. Row i is a function of samples[i], not of the other samples."""
    import torch

    return torch.stack([torch.randn(*shape, generator=torch_generator(seed, stream, step, sample)) for sample in samples])


def integers(low: int, high: int, seed: int, stream: str, step: int, samples: Sequence[int]) -> torch.Tensor:
    """Return uniform integers in [low, high), int64 [len(samples)]. Element i is a function of samples[i], not of other samples."""
    import torch

    return torch.tensor([int(numpy_generator(seed, stream, step, sample).integers(low, high)) for sample in samples])


def uniform(seed: int, stream: str, step: int, samples: Sequence[int]) -> torch.Tensor:
    """Return uniform reals in [0, 1), float32 [len(samples)]. Element i is a function of samples[i], not of the other samples."""
    import torch

    draws = [numpy_generator(seed, stream, step, sample).random() for sample in samples]
    return torch.tensor(draws, dtype=torch.float32)
