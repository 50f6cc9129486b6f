"""The statistics of the emoji world's reference scenes that ship with the package.

python -m sidcli.evaluation.emoji_reference    (write them, after the classifier or the scenes have changed)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sidcli.emoji import world
from sidcli.files import atomic_file, sha256
from sidcli.metrics.features import CLASSIFIER, EmojiFeatures
from sidcli.metrics.fid import Statistics, statistics
from sidcli.models.sources import WEIGHTS

SCENES = 10_000
FILE = WEIGHTS / "reference.npz"
PIECE = 100


def key(scenes: int) -> dict[str, Any]:
    """Return everything that the statistics depend on."""
    return {"scenes": scenes, "world": world.digest(), "classifier": sha256(CLASSIFIER)}


def shipped(scenes: int) -> Statistics | None:
    """Return the shipped statistics, None if they are of another number of scenes, other scenes or another classifier."""
    with np.load(FILE, allow_pickle=False) as content:
        if {name: content[name].item() for name in key(scenes)} != key(scenes):
            return None
        return Statistics(content["mean"], content["covariance"], scenes)


def compute(scenes: int) -> Statistics:
    """Return the statistics of the classifier's features of the first scenes of the reference."""
    extractor = EmojiFeatures()
    pieces = [range(start, min(start + PIECE, scenes)) for start in range(0, scenes, PIECE)]
    return statistics(np.concatenate([extractor(list(world.render_many(world.REFERENCE_SEED, piece))) for piece in pieces]))


def main() -> None:
    found = compute(SCENES)
    with atomic_file(FILE) as temporary, temporary.open("wb") as stream:
        np.savez(stream, mean=found.mean, covariance=found.covariance, **key(SCENES))


if __name__ == "__main__":
    main()
