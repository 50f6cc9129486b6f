"""Export of a student as OpenVINO files (.xml and .bin), which are converted from ONNX graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from sidcli.formats import onnx
from sidcli.formats.graph import example_references, write_graphs
from sidcli.formats.order import Order
from sidcli.formats.runtime import library, open_graphs, openvino_core
from sidcli.models.loading import Model
from sidcli.models.sampler import plan_for

IMPORTS = "import openvino"
RUN = """    # By default a CPU with bf16 would compute in it.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    graph = openvino.Core().compile_model(f"FOLDER/{name}.xml", "CPU", options)
    return list(graph(inputs).values())"""


def write_one(
    module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], file: Path, axes: dict[str, dict[int, str]]
) -> None:
    openvino = library("openvino")
    onnx.write_one(module, inputs, outputs, file, axes)
    graph = file.with_suffix(".onnx")
    openvino.save_model(openvino_core().read_model(str(graph)), str(file.with_suffix(".xml")), compress_to_fp16=False)
    for left in graph.parent.glob(f"{graph.name}*"):
        left.unlink()


def write(folder: Path, model: Model, order: Order) -> None:
    write_graphs(folder, model, order, write_one, "openvino", IMPORTS, RUN)


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """Draw one image, uint8 [H, W, 3], with OpenVINO."""
    sampler = open_graphs(folder, "openvino")
    return sampler.images([prompt], [seed], plan_for(model), references=example_references(model))[0]
