"""Metric weights that no library downloads (Inception): read from the cache, or downloaded once and verified."""

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
"""Seconds without a response after which a download fails."""


@dataclass(frozen=True)
class Weights:
    """A published file: its name, URL, size in bytes and SHA-256, and the option that takes a local file instead."""

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
    """Return the path of the file in the cache; download it if it is missing. An incomplete or wrong download is not kept.

    Raises InputError if the file cannot be downloaded; the message says which file to put where.
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
