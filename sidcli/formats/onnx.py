"""Export of a student as ONNX graphs, which onnxruntime and OpenVINO can run."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidcli.formats.graph import example_references, write_graphs
from sidcli.formats.order import Order
from sidcli.formats.runtime import open_graphs
from sidcli.models.loading import Model
from sidcli.models.sampler import plan_for

IMPORTS = "import onnxruntime"
RUN = """    return onnxruntime.InferenceSession(f"FOLDER/{name}.onnx").run(None, inputs)"""


def write_one(
    module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], file: Path, axes: dict[str, dict[int, str]]
) -> None:
    """Write one module as FILE.onnx. Weights of more than 1.5 GB go to a separate file, because a protobuf holds at most 2 GB."""
    symbols: dict[str, torch.export.Dim] = {}
    for name in {name for axis in axes.values() for name in axis.values()}:
        symbols[name] = torch.export.Dim.DYNAMIC
    shapes = {name: {axis: symbols[title] for axis, title in axes.get(name, {}).items()} for name in inputs}
    weights = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            program: Any = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=tuple(shapes.values()),
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        finally:
            logging.disable(before)
    program.save(file.with_suffix(".onnx"), external_data=weights > 1.5e9)


def write(folder: Path, model: Model, order: Order) -> None:
    write_graphs(folder, model, order, write_one, "onnx", IMPORTS, RUN)


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """Draw one image, uint8 [H, W, 3], with onnxruntime."""
    sampler = open_graphs(folder, "onnx")
    return sampler.images([prompt], [seed], plan_for(model), references=example_references(model))[0]
