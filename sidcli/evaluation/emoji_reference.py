"""The statistics of the emoji world's reference scenes that ship with the package.

python -m sidcli.evaluation.emoji_reference    (write them, after the classifier or the scenes have changed)
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors import safe_open

from sidcli.emoji import world
from sidcli.files import atomic_file, save_tensors, sha256
from sidcli.metrics.features import CLASSIFIER, EmojiFeatures
from sidcli.metrics.fid import Statistics, statistics
from sidcli.models.sources import WEIGHTS

SCENES = 10_000
FILE = WEIGHTS / "reference.safetensors"
PIECE = 100


def key(scenes: int) -> dict[str, str]:
    """Return everything that the statistics depend on."""
    return {"scenes": str(scenes), "world": world.digest(), "classifier": sha256(CLASSIFIER)}


def shipped(scenes: int) -> Statistics | None:
    """Return the shipped statistics, None if they are of another number of scenes, other scenes or another classifier."""
    with safe_open(FILE, "np") as content:
        if content.metadata() != key(scenes):
            return None
        return Statistics(content.get_tensor("mean"), content.get_tensor("covariance"), scenes)


def compute(scenes: int) -> Statistics:
    """Return the statistics of the classifier's features of the first scenes of the reference."""
    extractor = EmojiFeatures()
    pieces = [range(start, min(start + PIECE, scenes)) for start in range(0, scenes, PIECE)]
    return statistics(np.concatenate([extractor(list(world.render_many(world.REFERENCE_SEED, piece))) for piece in pieces]))


def main() -> None:
    found = compute(SCENES)
    tensors = {"mean": torch.from_numpy(found.mean), "covariance": torch.from_numpy(found.covariance)}
    with atomic_file(FILE) as temporary:
        save_tensors(tensors, temporary, key(SCENES))


if __name__ == "__main__":
    main()
