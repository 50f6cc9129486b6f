"""Draw with exported graphs, in onnxruntime or OpenVINO. The libraries are imported only when they are needed, and torch never is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sidcli.errors import EnvironmentProblem, InputError, UsageError, first_line, out_of_memory
from sidcli.files import read_bytes, read_json
from sidcli.formats.order import require
from sidcli.models.card import read_file
from sidcli.models.drawing import Plan, check_finite, sizes
from sidcli.progress import Progress, silent
from sidcli.randomness import torch_noise

GENERATOR = "generator"
"""Name of the graph that computes images from noise and states."""
SUFFIXES = {"onnx": (".onnx",), "openvino": (".xml", ".onnx")}
"""Runtime -> suffixes of the files that it reads, in order of preference."""


Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
"""A loaded graph: a function from inputs by name to the outputs in order."""


class GraphTokenizer:
    """The tokenizer in a folder of an export. It is read with the library on which the tokenizers of transformers are built.

    Raises InputError if a file of the folder is missing or damaged.
    """

    def __init__(self, folder: Path, length: int):
        import tokenizers

        settings = read_json(folder / "tokenizer_config.json")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(read_bytes(folder / "tokenizer.json"))
            pad = settings["pad_token"]
            self.tokenizer.enable_truncation(length)
            self.tokenizer.enable_padding(length=length, pad_id=self.tokenizer.token_to_id(pad), pad_token=pad)
        except Exception as error:  # the library raises plain Exception for an invalid file
            raise InputError(f"{folder} holds no tokenizer: {first_line(error)}", "export the model again") from error

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Return the tokens int64 [B, length] of prompts, and the number of prompts that were truncated."""
        encoded = self.tokenizer.encode_batch(list(prompts))
        return np.array([one.ids for one in encoded], np.int64), sum(bool(one.overflowing) for one in encoded)


class GraphSampler:
    """A sampler that draws images with exported graphs in any runtime. It computes tokens and noise; the graphs compute the rest.

    `tokenizers` are those of the text encoders; `opened` maps a graph's name to a function that runs it.
    """

    def __init__(self, card: dict[str, Any], tokenizers: Sequence[GraphTokenizer], opened: dict[str, Run]):
        self.card, self.tokenizers, self.opened = card, tokenizers, opened
        self.shape, self.size = tuple(card["graph"]["latent_shape"]), tuple(card["graph"]["size"])
        self.truncated = 0

    def resize(self, height: int, width: int) -> None:
        """Set the image size in pixels; 0 keeps the current value. Raises UsageError if the graphs cannot draw at this size."""
        factor, multiple = self.size[0] // self.shape[1], self.card["graph"]["multiple"]
        wanted = (height or self.size[0], width or self.size[1])
        if wanted == self.size:
            return
        if not multiple or any(side % multiple for side in wanted):
            possible = f"--width and --height in multiples of {multiple}" if multiple else "leave --width and --height out"
            raise UsageError(f"these graphs do not draw at {wanted[1]}x{wanted[0]}", possible)
        self.size, self.shape = wanted, (self.shape[0], wanted[0] // factor, wanted[1] // factor)

    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        plan: Plan,
        advance: Progress = silent,
        references: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return images uint8 [B, H, W, 3] for prompts and image seeds. A seed gives the same noise as in `Sampler`.

        `references` are images uint8 [B, H, W, 3], if the graphs take them.

        Raises NotFinite if an image has a value that is not finite.
        """
        states, pooled = [], None
        for index, tokenizer in enumerate(self.tokenizers):
            tokens, truncated = tokenizer(prompts)
            self.truncated += 0 if index else truncated
            first, *rest = self.opened["text_encoder" + ("_2" if index else "")]({"tokens": tokens})
            states.append(first)
            pooled = rest[0] if rest else pooled
        noise = np.stack([torch_noise(self.shape, seed) for seed in seeds])
        inputs = {"noise": noise, "states": np.concatenate(states, axis=-1)}
        if references is not None:
            inputs["reference"] = references.transpose(0, 3, 1, 2).astype(np.float32) / 255
        if pooled is not None:
            inputs |= {"text_embeds": pooled, "time_ids": np.tile(np.array(sizes(*self.size), np.float32), (len(prompts), 1))}
        drawn = self.opened[GENERATOR](inputs)[0]
        advance(len(prompts))
        hint = "export the model again with --dtype fp32, or draw with the model that it was made from"
        check_finite([bool(np.isfinite(image).all()) for image in drawn], prompts, seeds, hint)
        return (drawn * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def library(name: str) -> Any:
    """Import a library that sid does not depend on. Raises EnvironmentProblem if it is not installed or cannot be imported."""
    require((name,), "this command")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"{name} is installed but cannot be imported: {error}", f"pip install --force-reinstall {name}"
        ) from error


def open_graphs(folder: Path, backend: str) -> GraphSampler:
    """Open a folder of graphs to draw on the CPU. Raises InputError if the backend cannot read the folder."""
    card = read_file(folder / "sid.json")
    opener = OPENERS[backend]
    opened: dict[str, Run] = {}
    names = text_graphs(folder, card)
    for name in [*names, GENERATOR]:
        found = [file for suffix in SUFFIXES[backend] if (file := folder / f"{name}{suffix}").is_file()]
        if not found:
            raise InputError(f"{folder} has no {name}{SUFFIXES[backend][0]}", f"sid export MODEL --format {backend} writes one")
        try:
            opened[name] = _checked(opener(found[0]), found[0])
        except EnvironmentProblem:
            raise
        except Exception as error:  # each runtime raises its own types of errors
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{found[0]} cannot be opened: {reason}", "export the model again") from error
    return GraphSampler(card, open_tokenizers(folder, card), opened)


def text_graphs(folder: Path, card: dict[str, Any]) -> list[str]:
    """Return the names of the graphs of text encoders in a folder. Raises InputError if its card describes another number."""
    names = [name for name in ("text_encoder", "text_encoder_2") if (folder / name.replace("text_encoder", "tokenizer")).is_dir()]
    if len(card["graph"]["tokens"]) != len(names):
        raise InputError(
            f"{folder / 'sid.json'}: graph.tokens is {card['graph']['tokens']}; it must have one number for each tokenizer in the folder,"
            f" {len(names)}",
            "export the model again",
        )
    return names


def open_tokenizers(folder: Path, card: dict[str, Any]) -> list[GraphTokenizer]:
    """Open the tokenizers in a folder of graphs, one per text encoder. Raises InputError if one cannot be read."""
    folders = [folder / name.replace("text_encoder", "tokenizer") for name in text_graphs(folder, card)]
    return [GraphTokenizer(place, length) for place, length in zip(folders, card["graph"]["tokens"], strict=True)]


def _checked(run: Run, file: Path) -> Run:
    """Return the function `run` of the graph in `file`; it raises InputError if the graph cannot compute its inputs."""

    def checked(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return run(inputs)
        except Exception as error:  # each runtime raises its own types of errors
            if out_of_memory(error):
                raise
            raise InputError(f"{file} cannot be run: {first_line(error)}", "export the model again") from error

    return checked


def _onnxruntime(file: Path) -> Run:
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


@cache
def openvino_core() -> Any:
    """Return the OpenVINO Core object of this process.

    OpenVINO's CPU plugin sets the stack for signal handlers and unmaps it when the plugin is destroyed. With several plugins at
    once, the stack can stay set after it was unmapped; the next signal then kills the process (SIGSEGV).
    """
    return library("openvino").Core()


def _openvino(file: Path) -> Run:
    # By default, OpenVINO computes in bf16 on a CPU that supports it.
    compiled = openvino_core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    order = [output.get_any_name() for output in compiled.outputs]

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = compiled(inputs)
        return [results[name] for name in order]

    return run


OPENERS: dict[str, Callable[[Path], Run]] = {"onnx": _onnxruntime, "openvino": _openvino}
