"""A ComfyUI workflow for a single file or a LoRA, and settings for transformers of flow matching.

A KSampler node would start at a noise level that the student was not trained at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sidcli.formats.card import call_options
from sidcli.models.loading import Model
from sidcli.models.sampler import plan_for

COLUMN, ROW = 380, 200
"""Distance between neighboring nodes in pixels."""
TYPES = {"output": "LATENT", "denoised_output": "LATENT"}
"""Name -> type of the outputs that are not named after their type."""


FLOW = """Use the text encoders and the VAE of the teacher, and the nodes SamplerCustom (cfg 1), KSamplerSelect (euler) and
  ManualSigmas (`{sigmas}`){guidance}. ComfyUI can fill up prompts for T5 to another length than
  that of the training, which changes the image."""


def flow_settings(model: Model) -> str:
    """Return Markdown with the settings for a student of flow matching, whose noise levels in ComfyUI are its times t / 1000."""
    sigmas = ", ".join([*(f"{float(model.path.scale(t)[1]):.6f}" for t in plan_for(model).grid), "0"])
    scale = call_options(model)["guidance_scale"]
    return FLOW.format(sigmas=sigmas, guidance=f", and FluxGuidance ({scale})" if scale else "")


def workflow(
    checkpoint: str,
    sigmas: Sequence[float],
    width: int,
    height: int,
    prompt: str,
    seed: int,
    prediction: str = "epsilon",
    zero_snr: bool = False,
    lora: str = "",
) -> dict[str, Any]:
    """Return a workflow of core nodes for ComfyUI's editor: Euler without guidance, from sigmas[0] through the other sigmas to 0.

    `lora` is the name of a LoRA file to apply to the checkpoint.

    ComfyUI guesses the prediction type of a Stable Diffusion 2 model from its weights and assumes epsilon for every
    Stable Diffusion 1 model; the node ModelSamplingDiscrete sets the prediction type. ManualSigmas reads plain decimal
    numbers only.
    """
    steps = ", ".join([*(f"{sigma:.6f}" for sigma in sigmas), "0"])
    sampling = "eps" if prediction == "epsilon" else prediction
    sources = [("model", 2, 0), ("positive", 3, 0), ("negative", 4, 0), ("sampler", 6, 0), ("sigmas", 7, 0), ("latent_image", 5, 0)]
    loader = [(0, "LoraLoaderModelOnly", [lora, 1.0], [("model", 1, 0)], ["MODEL"])] if lora else []
    return graph(
        # column, type, widget values, inputs as (name, number of the source node, output of the source node), outputs
        (0, "CheckpointLoaderSimple", [checkpoint], [], ["MODEL", "CLIP", "VAE"]),
        (1, "ModelSamplingDiscrete", [sampling, zero_snr], [("model", 11 if lora else 1, 0)], ["MODEL"]),
        (1, "CLIPTextEncode", [prompt], [("clip", 1, 1)], ["CONDITIONING"]),
        (1, "CLIPTextEncode", [""], [("clip", 1, 1)], ["CONDITIONING"]),
        (0, "EmptyLatentImage", [width, height, 1], [], ["LATENT"]),
        (0, "KSamplerSelect", ["euler"], [], ["SAMPLER"]),
        (0, "ManualSigmas", [steps], [], ["SIGMAS"]),
        # add_noise, noise_seed, control_after_generate ("fixed" keeps the seed), cfg
        (2, "SamplerCustom", [True, seed, "fixed", 1.0], sources, ["output", "denoised_output"]),
        (3, "VAEDecode", [], [("samples", 8, 0), ("vae", 1, 2)], ["IMAGE"]),
        (4, "SaveImage", ["sid"], [("images", 9, 0)], []),
        *loader,
    )


def graph(*specifications: tuple[int, str, list[Any], list[tuple[str, int, int]], list[str]]) -> dict[str, Any]:
    """Return a graph in the format of ComfyUI's editor (version 0.4).

    A link is [number, source node, source output, target node, target input, type].
    """
    nodes: list[dict[str, Any]] = []
    links: list[list[Any]] = []
    heights = [0] * (1 + max(column for column, *_ in specifications))
    for number, (column, kind, widgets, inputs, outputs) in enumerate(specifications, 1):
        slots = []
        for slot, (name, source, output) in enumerate(inputs):
            what = specifications[source - 1][4][output]
            what = TYPES.get(what, what)
            links.append([len(links) + 1, source, output, number, slot, what])
            slots.append({"name": name, "type": what, "link": len(links)})
        nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [COLUMN * column, ROW * heights[column]],
                "size": [320, 120],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": slots,
                "outputs": [
                    {"name": name, "type": TYPES.get(name, name), "links": [], "slot_index": slot}
                    for slot, name in enumerate(outputs)
                ],
                "properties": {"Node name for S&R": kind},
                "widgets_values": widgets,
            }
        )
        heights[column] += 1
    for link, source, output, *_ in links:
        nodes[source - 1]["outputs"][output]["links"].append(link)
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }
