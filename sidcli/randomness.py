"""The only source of randomness: every random value is a pure function of (seed, stream, step, sample).

This module keeps no state and no other module seeds a global generator, so a result does not depend on the micro-batch, the number
of processes, an interruption, or earlier draws. `torch_noise` is the noise of images, a function of the seed of the image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


# The polynomials of log, cosine and sine in the Cephes library, which torch uses in avx_mathfun.h.
LOG = np.array(
    [
        *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
        *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    ],
    np.float32,
)
LOG_2 = np.array([-2.12194440e-4, 0.693359375], np.float32)
COSINE = np.array([2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2], np.float32)
SINE = np.array([-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1], np.float32)
QUARTER_PI = np.array([0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8], np.float32)
"""LOG_2, QUARTER_PI: log(2) and pi / 4 as sums of numbers, which together are more precise than float32."""
Value = np.ndarray | np.float32


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


@dataclass(frozen=True)
class Draws:
    """Random values of some samples, which depend on these fields only."""

    seed: int
    stream: str
    step: int
    samples: Sequence[int]

    def integers(self, low: int, high: int) -> torch.Tensor:
        """Return uniform integers in [low, high), int64 [B]."""
        return integers(low, high, self.seed, self.stream, self.step, self.samples)

    def uniform(self) -> list[float]:
        """Return B uniform numbers in [0, 1)."""
        return [numpy_generator(self.seed, self.stream, self.step, sample).random() for sample in self.samples]


def torch_noise(shape: Sequence[int], seed: int) -> np.ndarray:
    """Return `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` as float32, computed without torch.

    The values are equal bit for bit to those of torch on an x86 processor with AVX2. On other processors torch uses other
    implementations of the logarithm, sine and cosine, and its own values differ from these by up to 3e-6.
    """
    count, bits = math.prod(shape), np.random.RandomState(seed & 0xFFFFFFFF)  # MT19937; torch uses 32 bits of a seed, too
    if count < 16:
        return _few_normals(count, bits).reshape(shape)
    drawn = _uniforms(count, bits)
    whole = count - count % 16
    drawn[:whole] = _box_muller(drawn[:whole])
    if count % 16:  # torch draws the last 16 numbers again
        drawn[-16:] = _box_muller(_uniforms(16, bits))
    return drawn.reshape(shape)


def _uniforms(count: int, bits: np.random.RandomState) -> np.ndarray:
    """Return uniform reals in [0, 1), float32 [count], from the lower 24 bits of 32-bit words."""
    words = bits.randint(0, 1 << 32, count, np.uint32)
    return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _few_normals(count: int, bits: np.random.RandomState) -> np.ndarray:
    """Return standard normal numbers, float32 [count]. torch computes fewer than 16 numbers in float64, in pairs."""
    words = bits.randint(0, 1 << 32, (count + count % 2, 2), np.uint32).astype(np.uint64)
    angle, height = (((words[:, 0] << 32 | words[:, 1]) & ((1 << 53) - 1)) * 2.0**-53).reshape(-1, 2).T
    radius = np.sqrt(-2 * np.log1p(-height))
    pairs = [radius * np.cos(2 * np.pi * angle), radius * np.sin(2 * np.pi * angle)]
    return np.stack(pairs, 1).ravel()[:count].astype(np.float32)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Return standard normal numbers, float32, from uniform ones: 8 pairs in each block of 16."""
    height, angle = uniforms.reshape(-1, 2, 8).swapaxes(0, 1)
    radius = np.sqrt(-2 * _log(1 - height))
    sine, cosine = _sine_and_cosine(np.float32(2 * np.pi) * angle)
    return np.stack([radius * cosine, radius * sine], 1).ravel()


def _fused(x: Value, y: Value, z: Value) -> np.ndarray:
    """Return x y + z with one rounding to float32, like the instruction of the processor. The product is exact in float64."""
    return (np.multiply(x, y, dtype=np.float64) + z).astype(np.float32)


def _polynomial(coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return a polynomial of x by Horner's rule. The coefficient of the highest power is the first."""
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = _fused(value, x, coefficient)
    return value


def _log(u: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of u in (0, 1], float32."""
    fraction, exponent = np.frexp(u)
    is_small = fraction < np.float32(math.sqrt(0.5))
    power = (exponent - is_small).astype(np.float32)
    x = fraction - 1 + np.where(is_small, fraction, 0)
    square = x * x
    value = _fused(_polynomial(LOG, x) * x, square, power * LOG_2[0])
    return _fused(power, LOG_2[1], x + _fused(square, np.float32(-0.5), value))


def _sine_and_cosine(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sine and cosine of angles in [0, 2 pi), float32."""
    octant = ((angle * np.float32(4 / np.pi)).astype(np.int32) + 1) & ~1
    x = angle
    for part in QUARTER_PI:
        x = _fused(octant.astype(np.float32), -part, x)
    square = x * x
    cosine = _fused(_polynomial(COSINE, square) * square, square, square * np.float32(-0.5)) + 1
    sine = _fused(_polynomial(SINE, square) * square, x, x)
    swapped = octant & 2 != 0
    sines = np.where(octant & 4, -1, 1) * np.where(swapped, cosine, sine)
    cosines = np.where(octant + 2 & 4, -1, 1) * np.where(swapped, sine, cosine)
    return sines.astype(np.float32), cosines.astype(np.float32)
