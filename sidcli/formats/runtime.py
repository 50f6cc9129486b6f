"""Run exported graphs with onnxruntime or OpenVINO instead of torch. The libraries are imported only when they are needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPTokenizer

from sidcli.errors import EnvironmentProblem, InputError, first_line, out_of_memory
from sidcli.formats.graph import GENERATOR, GraphSampler, Run
from sidcli.formats.order import require
from sidcli.models.card import read_file

SUFFIXES = {"onnx": (".onnx",), "openvino": (".xml", ".onnx")}
"""Runtime -> suffixes of the files that it reads, in order of preference."""


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
    names = [name for name in ("text_encoder", "text_encoder_2") if (folder / name.replace("text_encoder", "tokenizer")).is_dir()]
    if len(card["graph"]["tokens"]) != len(names):
        raise InputError(
            f"{folder / 'sid.json'}: graph.tokens is {card['graph']['tokens']}; it must have one number for each tokenizer in the folder,"
            f" {len(names)}",
            "export the model again",
        )
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
    tokenizers = [
        CLIPTokenizer.from_pretrained(folder / name.replace("text_encoder", "tokenizer"), local_files_only=True) for name in names
    ]
    return GraphSampler(card, tokenizers, opened)


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
