"""The one file of metric weights that no library fetches for us: found in the cache, or downloaded once, whole and checked."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from sidcli.environment import cache_folder, flag
from sidcli.errors import InputError
from sidcli.files import atomic_file, sha256
from sidcli.progress import Listener

SECONDS = 30
"""Without an answer for so long, a download is given up."""


@dataclass(frozen=True)
class Weights:
    """A published file: where it lies, how many bytes it has, and their SHA-256."""

    name: str
    url: str
    bytes: int
    sha256: str
    option: str


INCEPTION = Weights(
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    95_607_719,
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    "--inception",
)


def fetch(weights: Weights, listener: Listener) -> Path:
    """The file in the cache, downloaded if it is not there yet. A cut or wrong download is never kept.

    Raises InputError, which says what to put where, where it cannot be had.
    """
    file = cache_folder() / "weights" / weights.name
    if file.is_file():
        return file
    ways_out = f"fetch {weights.url} elsewhere and put it at {file}, or pass {weights.option} FILE"
    if flag("HF_HUB_OFFLINE"):
        raise InputError(f"the network {weights.name} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it", ways_out)
    with (
        atomic_file(file) as temporary,
        temporary.open("wb") as stream,
        listener.progress(f"download {weights.name}", weights.bytes, "bytes") as advance,
    ):
        try:
            with urllib.request.urlopen(weights.url, timeout=SECONDS) as answer:
                while block := answer.read(1 << 20):
                    stream.write(block)
                    advance(len(block))
        except (OSError, HTTPException) as error:
            raise InputError(f"cannot fetch the network {weights.name}: {getattr(error, 'reason', error)}", ways_out) from error
        stream.flush()
        found = sha256(temporary)
        if found != weights.sha256:
            raise InputError(f"{weights.url} brought {stream.tell()} bytes of another content (SHA-256 {found})", ways_out)
    return file
