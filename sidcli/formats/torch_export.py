"""Export of a student as graphs in torch.export programs (.pt2), which torch loads without this package."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sidcli.formats.graph import example_references, write_graphs
from sidcli.formats.order import Order
from sidcli.formats.runtime import GENERATOR, GraphSampler, Run, open_tokenizers, text_graphs
from sidcli.models.card import read_file
from sidcli.models.loading import Model
from sidcli.models.sampler import plan_for

IMPORTS = "import torch"
RUN = """    program = torch.export.load(f"FOLDER/{name}.pt2").module()
    outputs = program(*(torch.from_numpy(value) for value in inputs.values()))
    return [value.detach().numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]"""


def write_one(
    module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], file: Path, axes: dict[str, dict[int, str]]
) -> None:
    shapes = {name: dict.fromkeys(axes.get(name, {}), torch.export.Dim.AUTO) for name in inputs}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), tuple(inputs.values()), dynamic_shapes=tuple(shapes.values()))
        torch.export.save(program, file.with_suffix(".pt2"))


def write(folder: Path, model: Model, order: Order) -> None:
    write_graphs(folder, model, order, write_one, "torch-export", IMPORTS, RUN)


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """Draw one image, uint8 [H, W, 3], with torch only."""

    def opened(name: str) -> Run:
        module = torch.export.load(folder / f"{name}.pt2").module()

        def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            with torch.no_grad():
                outputs = module(*(torch.from_numpy(value) for value in inputs.values()))
            return [value.numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]

        return run

    card = read_file(folder / "sid.json")
    graphs = {name: opened(name) for name in [*text_graphs(folder, card), GENERATOR]}
    sampler = GraphSampler(card, open_tokenizers(folder, card), graphs)
    return sampler.images([prompt], [seed], plan_for(model), references=example_references(model))[0]
