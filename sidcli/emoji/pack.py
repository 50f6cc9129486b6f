"""Turn trained parts into the folders that ship inside the package, in half precision.

python -m sidcli.emoji.pack nets --build build/emoji --guidance 2    (teacher, classifier, open_clip)
python -m sidcli.emoji.pack student --run runs/emoji-teacher-g2
python -m sidcli.emoji.pack reader --build build/emoji
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from sidcli.emoji import models
from sidcli.emoji.clip import CONFIG
from sidcli.errors import InputError
from sidcli.files import atomic_folder, write_json
from sidcli.formats.diffusers_folder import write_pipeline, write_student
from sidcli.formats.order import Order
from sidcli.models.loading import load
from sidcli.models.sources import WEIGHTS, Source


def half(source: Path, target: Path) -> None:
    """Save a copy of a safetensors file in half precision."""
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() if value.is_floating_point() else value for name, value in load_file(source).items()}, target)


def pack_nets(build: Path, guidance: float) -> None:
    """Write the teacher pipeline with its card and the build folder's current VAE, and the two metric networks."""
    model = load(Source("teacher", build / "teacher", str(build)))
    model.vae = AutoencoderKL.from_pretrained(build / "vae").eval()
    trained = json.loads((build / "teacher.log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    card = {"kind": "teacher", "world": "emoji", "guidance": guidance, "steps_trained": trained["step"]}
    card["license"] = "apache-2.0"
    with atomic_folder(WEIGHTS / "teacher") as folder:
        write_pipeline(folder, model, models.new_scheduler(), card, Order("fp16"))
    half(build / "classifier.safetensors", WEIGHTS / "classifier.safetensors")
    half(build / "clip.safetensors", WEIGHTS / "clip" / "open_clip_model.safetensors")
    write_json(WEIGHTS / "clip" / "open_clip_config.json", CONFIG)


def pack_student(run: Path) -> None:
    """Write the student of a run, without the parts that it shares with the teacher.

    Raises InputError if its VAE or text encoder differs from that of the packed teacher.
    """
    model = load(Source("student", run / "student", str(run)))
    write_student(WEIGHTS / "student", model, model.card, "fp16")
    for name in ("vae", "text_encoder"):
        own, shared = (load_file(next((WEIGHTS / kind / name).glob("*.safetensors"))) for kind in ("student", "teacher"))
        if own.keys() != shared.keys() or any(not torch.equal(value, shared[key]) for key, value in own.items()):
            raise InputError(
                f"the {name} of {run} is not that of the packed teacher", "pack nets first, and distill from that teacher"
            )
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(WEIGHTS / "student" / name)
    (WEIGHTS / "student" / "README.md").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("nets", "student", "reader"))
    parser.add_argument("--build", type=Path, default=Path("build/emoji"))
    parser.add_argument("--run", type=Path)
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    if options.what == "nets":
        pack_nets(options.build, options.guidance)
    elif options.what == "reader":
        half(options.build / "reader.safetensors", WEIGHTS / "reader.safetensors")
    elif options.run is None:
        parser.error("student needs --run")
    else:
        pack_student(options.run)


if __name__ == "__main__":
    main()
