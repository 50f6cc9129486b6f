"""The judge `vlm`: a vision language model of transformers on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from sidcli.curation.judge import Pair, Verdict, in_batches
from sidcli.curation.questions import Reading, content_of, verdict_of
from sidcli.errors import InputError, first_line
from sidcli.files import read_json, readable
from sidcli.models.sources import check_links
from sidcli.progress import Progress, silent

LONGEST = 768
"""Maximum number of tokens of an answer."""
HINT = "--set judge_model=FOLDER of an image-text-to-text model of transformers in safetensors, or the id of one in the hub's cache"


def folder_of(model: str) -> Path:
    """Return the folder of a model: a path, or the snapshot of a hub id in the cache.

    Raises InputError if there is none, or if it lacks a file, or has code or an adapter of its own, which are never used.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, _, revision = model.partition("@")
    try:
        folder = (
            Path(model) if Path(model).is_dir() else Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
        )
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(f"no vision language model {model}: neither a folder nor in the hub's cache", HINT) from error
    with readable(folder):
        check_links(folder, parts=())
        for pattern in ("config.json", "*.safetensors"):
            if not any(folder.glob(pattern)):
                raise InputError(f"{model} is no vision language model that can be read: it has no {pattern}", HINT)
        if (folder / "adapter_config.json").exists():
            raise InputError(
                f"{folder / 'adapter_config.json'} would change the weights beside it", "merge the adapter into the model"
            )
        for file in sorted(folder.glob("*.json")):
            if file.name.endswith("config.json") and "auto_map" in read_json(file):
                raise InputError(f"{file} brings code of its own, which is never run", "use a model of transformers' own classes")
    return folder


class Vlm:
    """A model and its processor. `ask` returns its words about images, chosen greedily.

    `model` is a folder or a hub id in the cache; see `folder_of`. Weights are float32 on the CPU and bfloat16 on a GPU. Raises
    InputError if transformers cannot read it as an image-text-to-text model in safetensors.
    """

    def __init__(self, model: str, device: torch.device):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder, self.device = folder_of(model), device
        # Without the second option, code of the model would be offered to the user on the terminal.
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        kind = torch.float32 if device.type == "cpu" else torch.bfloat16
        weights: dict[str, Any] = {"use_safetensors": True, "dtype": kind, "attn_implementation": "sdpa"}
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder, **local)
            network: Any = AutoModelForImageTextToText.from_pretrained(folder, **local, **weights)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError) as error:
            raise InputError(f"{model} is no vision language model that can be read: {first_line(error)}", HINT) from error
        if not getattr(self.processor, "chat_template", None):
            raise InputError(f"{model} has no chat template, so that it cannot be asked", HINT)
        self.network = network.eval().to(device)

    @torch.no_grad()
    def ask(self, images: Sequence[np.ndarray], question: str) -> str:
        """Return the model's words about images uint8 [H, W, 3]."""
        shown = [{"type": "image", "image": Image.fromarray(image)} for image in images]
        messages = [{"role": "user", "content": content_of(shown, question)}]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.device, self.network.dtype)
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        tokens = self.network.generate(**inputs, **greedy, max_new_tokens=LONGEST)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


class VlmJudge:
    """Asks a vision language model the questions of `questions`. `judge` raises InputError if it answers none of the first ones."""

    name = "vlm"
    unit = 4
    same_threshold = 1.0
    caption_threshold = 1.0

    def __init__(self, model: str, device: torch.device):
        self.vlm, self.reading = Vlm(model, device), Reading(model)

    def judge(self, pairs: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        verdicts = in_batches(pairs, 1, lambda some: [verdict_of(pair, self.vlm.ask) for pair in some], advance)
        return self.reading.check(verdicts)
