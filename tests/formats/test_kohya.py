"""The LoRA of a student under kohya's names, as ComfyUI, AUTOMATIC1111 and diffusers read it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from sidcli.formats import export, lora
from sidcli.formats.diffusers_folder import run_pipeline, stock
from sidcli.formats.order import Order
from sidcli.models import ldm
from sidcli.models.families import family_of
from sidcli.models.loading import Model
from sidcli.models.sampler import plan_for
from tests import tiny, tiny_students

KNOWN = {
    "sd1": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "up_blocks.1.resnets.2.conv_shortcut": "up_blocks_1_resnets_2_conv_shortcut",
    },
    "sdxl": {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0": "input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
        "down_blocks.0.resnets.0.time_emb_proj": "input_blocks_1_0_emb_layers_1",
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    },
}
"""Layer of a UNet of full size -> its name in LoRAs that kohya's scripts write, after lora_unet_."""
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "layers_per_block": 2,
}


@pytest.mark.parametrize("family", KNOWN)
def test_layers_have_the_names_of_kohyas_scripts(family: str) -> None:
    config = tiny.SD15_UNET | {"layers_per_block": 2} if family == "sd1" else SDXL
    assert family_of(config) == family
    pair = {"lora_A.weight": torch.zeros(4, 8), "lora_B.weight": torch.zeros(8, 4)}
    weights = {f"{layer}.{name}": value for layer in KNOWN[family] for name, value in pair.items()}
    names = {f"lora_unet_{name}" for name in KNOWN[family].values()}
    found = lora.kohya(weights, config)
    assert found.keys() == {f"{name}.{part}" for name in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert {float(value) for name, value in found.items() if name.endswith("alpha")} == {4.0}


def changes(unet: UNet2DConditionModel, file: Path) -> dict[str, torch.Tensor]:
    """Return what a program adds to each weight of a UNet, found by the rule of programs: dots of a name become underscores."""
    content = load_file(file)
    table = ldm.places_of(family_of(unet.config), "unet", unet.config, "")
    found = {}
    for name, value in unet.named_parameters():
        layer = name.removesuffix(".weight")
        place = ldm.locate(table, f"{layer}.")
        for key in {layer, place.key.removesuffix(".") if place else layer}:
            start = f"lora_unet_{key.replace('.', '_')}"
            if f"{start}.lora_down.weight" in content:
                down, up = content.pop(f"{start}.lora_down.weight"), content.pop(f"{start}.lora_up.weight")
                scale = float(content.pop(f"{start}.alpha")) / len(down)
                found[name] = scale * (up.flatten(1) @ down.flatten(1)).view_as(value)
    assert not content, "every tensor of the file belongs to a layer"
    return found


@pytest.mark.parametrize("family", tiny_students.FAMILIES)
def test_the_file_changes_the_teacher_as_the_lora_of_diffusers_does(family: str, tmp_path: Path) -> None:
    teacher, student = tiny_students.make(tmp_path, family)
    export.run(student, "lora", tmp_path / "out", Order(rank=4, teacher=teacher), False, lambda count: None)
    added = changes(teacher.denoiser, tmp_path / "out" / lora.FILE)
    merged, before = dict(lora.merged(student, teacher, 4).denoiser.named_parameters()), dict(teacher.denoiser.named_parameters())
    assert added.keys() == lora.fitting(teacher.denoiser).keys()
    for name, value in added.items():
        assert torch.allclose(before[name] + value, merged[name], atol=1e-6)
    with safe_open(tmp_path / "out" / lora.FILE, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "4" and file.metadata()["ss_base_model_version"] == lora.BASES[family]
    nodes = {node["id"]: node for node in json.loads((tmp_path / "out" / "comfyui_workflow.json").read_text())["nodes"]}
    assert nodes[11]["widgets_values"] == [lora.FILE, 1.0] and nodes[2]["type"] == "ModelSamplingDiscrete"
    assert lora.FILE in (tmp_path / "out" / "README.md").read_text()


def attention(model: Model, teacher: Model) -> Model:
    """The student with the teacher's weights in every layer but those that diffusers reads under kohya's names."""
    unet = model.denoiser
    kept = {name: value for name, value in unet.state_dict().items() if ".attn" in name and name.endswith(".weight")}
    unet.load_state_dict(teacher.denoiser.state_dict() | kept)
    return model


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_draws_the_same_with_the_file(family: str, tmp_path: Path) -> None:
    teacher, student = tiny_students.make(tmp_path, family)
    student = attention(student, teacher)
    export.run(student, "lora", tmp_path / "out", Order(rank=100, teacher=teacher), False, lambda count: None)
    pipe = stock(student).from_pretrained(tmp_path / "teacher")
    ours = export.picture(student)
    pipe.scheduler = type(pipe.scheduler).from_pretrained(tmp_path / "out" / "scheduler")
    before = run_pipeline(pipe, plan_for(student), export.PROMPT, 0, guidance_scale=0)
    pipe.load_lora_weights(tmp_path / "out", weight_name=lora.FILE)
    after = run_pipeline(pipe, plan_for(student), export.PROMPT, 0, guidance_scale=0)
    assert np.abs(after.astype(int) - ours.astype(int)).max() <= 2 < np.abs(before.astype(int) - ours.astype(int)).max()
