"""The only source of randomness: every draw is a pure function of (seed, stream, step, sample).

Nothing here keeps state and nothing else seeds a global generator, so a result cannot depend on the micro-batch, on the number of
processes, on an interruption, or on what was drawn before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key(seed: int, stream: str, step: int = 0, sample: int = 0) -> int:
    """A 63-bit integer that is a function of its four arguments alone (blake2b, so the same on every machine and Python)."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, stream: str, step: int = 0, sample: int = 0) -> np.random.Generator:
    """A numpy generator for small discrete draws: scenes, captions, orders."""
    return np.random.Generator(np.random.Philox(key=key(seed, stream, step, sample)))


def torch_generator(seed: int, stream: str, step: int = 0, sample: int = 0) -> torch.Generator:
    """A CPU torch generator; noise is always drawn on the CPU so that a seed means the same image on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(key(seed, stream, step, sample))


def normal(shape: Sequence[int], seed: int, stream: str, step: int, samples: Sequence[int]) -> torch.Tensor:
    """Standard normal noise [len(samples), *shape] in float32, row i drawn for samples[i] alone."""
    import torch

    return torch.stack([torch.randn(*shape, generator=torch_generator(seed, stream, step, sample)) for sample in samples])


def integers(low: int, high: int, seed: int, stream: str, step: int, samples: Sequence[int]) -> torch.Tensor:
    """Uniform integers in [low, high), int64 [len(samples)], element i drawn for samples[i] alone."""
    import torch

    return torch.tensor([int(numpy_generator(seed, stream, step, sample).integers(low, high)) for sample in samples])


def uniform(seed: int, stream: str, step: int, samples: Sequence[int]) -> torch.Tensor:
    """Uniform reals in [0, 1), float32 [len(samples)], element i drawn for samples[i] alone."""
    import torch

    draws = [numpy_generator(seed, stream, step, sample).random() for sample in samples]
    return torch.tensor(draws, dtype=torch.float32)
