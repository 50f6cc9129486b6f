"""Transformers of SANA (arXiv 2410.10629), trained by flow matching, with the language model Gemma 2 as the only text encoder.

Their VAE, AutoencoderDC (arXiv 2410.10733), makes one latent of 32 x 32 pixels. Gemma reads an instruction before each prompt, that of
the stock pipeline, and nothing before the empty prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sidcli.diffusion.path import FlowPath
from sidcli.errors import InputError
from sidcli.models import compatibility, flow, gemma
from sidcli.models.compatibility import SUPPORTED_VALUES, Rules, positive_integer, value_text
from sidcli.models.kind import Cond
from sidcli.models.transformer import (
    TextEncoders,
    Tokens,
    Transformer,
    check_latents,
    check_outputs,
    check_square,
    check_states,
    keep_positions,
)

TEXT = "text_encoder"
TOKENS = 300
"""Tokens of a prompt that the transformer reads."""
STOCK_SIDE = 1024
"""Height and width in pixels of the stock pipeline, which do not depend on the model."""
MULTISTEP = "DPMSolverMultistepScheduler"
FLOW_ENTRIES: Mapping[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""Entries that make a multistep scheduler one of flow matching."""
RULES = Rules(
    ("SanaPipeline",),
    (*flow.SCHEDULERS, MULTISTEP),
    f"{flow.HINT} or {MULTISTEP}",
    {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC"},
    {
        "transformer": frozenset(
            {
                *("sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads"),
                *("attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim", "cross_attention_dim"),
                *("caption_channels", "mlp_ratio", "dropout", "attention_bias", "norm_elementwise_affine", "norm_eps", "qk_norm"),
                *("interpolation_scale", "guidance_embeds_scale"),
            }
        ),
        "vae": frozenset(
            {
                *("latent_channels", "attention_head_dim", "scaling_factor", "upsample_block_type", "downsample_block_type"),
                *("encoder_block_types", "encoder_block_out_channels", "encoder_layers_per_block", "encoder_qkv_multiscales"),
                *("decoder_block_types", "decoder_block_out_channels", "decoder_layers_per_block", "decoder_qkv_multiscales"),
                *("decoder_norm_types", "decoder_act_fns", "decoder_conv_act_fn", "encoder_out_shortcut", "decoder_in_shortcut"),
            }
        ),
        "scheduler": (flow.ACCEPTED | compatibility.ACCEPTED["scheduler"] | {"use_flow_sigmas"}) - flow.VALUES.keys(),
    },
    {
        "transformer": {
            "guidance_embeds": ((False, None), "the guidance scale is an input of SANA-Sprint, which sid cannot give"),
            "timestep_scale": ((1, None), "the timesteps of SANA are not scaled"),
        },
        "vae": {"in_channels": SUPPORTED_VALUES["vae"]["out_channels"]},
        TEXT: gemma.VALUES,
        "scheduler": flow.VALUES | {"variance_type": SUPPORTED_VALUES["scheduler"]["variance_type"]},
    },
)


class Sana(Transformer):
    models = "a SANA model"
    texts = (TEXT,)
    text_classes: ClassVar = {TEXT: "Gemma2Model"}
    tokenizers: ClassVar = {"tokenizer": gemma.CLASSES}
    language: ClassVar = gemma
    text_attention = "eager"  # the others do not limit the scores, which Gemma 2 does
    rules = RULES
    architecture = (
        *("num_layers", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim"),
        *("cross_attention_dim", "caption_channels", "mlp_ratio", "in_channels", "patch_size", "qk_norm"),
    )
    missing_formats: ClassVar = {"single-file": "files of the original code have tensors that a folder of diffusers lacks"}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point")  # attention and feed-forward
    size_entries = ("sample_size", "interpolation_scale")
    is_square = True

    def pipeline(self, texts: Sequence[str]) -> Any:
        from diffusers import SanaPipeline

        return SanaPipeline

    def call_options(self, config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """Return the arguments of the stock pipeline, which by default draws published sizes only."""
        sides = {} if size == (STOCK_SIDE, STOCK_SIDE) else dict(zip(("height", "width"), size, strict=True))
        return sides | {"guidance_scale": 0, "use_resolution_binning": False}

    def index_entries(self, model: Any) -> dict[str, Any]:
        return {}

    def text_names(self, index: Mapping[str, Any], place: str) -> list[str]:
        return [TEXT]

    def read_path(self, scheduler: Mapping[str, Any], config: Mapping[str, Any]) -> FlowPath:
        flow.check_prediction(scheduler, self.models)
        return FlowPath(scheduler.get("num_train_timesteps", 1000), float(scheduler.get("shift", 1.0)))

    def check_schedule(self, place: str, scheduler: Mapping[str, Any]) -> None:
        if scheduler["_class_name"] != MULTISTEP:
            flow.check_schedule(place, scheduler)
            return
        for entry, wanted in FLOW_ENTRIES.items():
            if scheduler.get(entry) != wanted:
                said = f"{entry} is {value_text(scheduler.get(entry))}; it is {value_text(wanted)} for flow matching"
                raise InputError(f"{place}: {said}", self.rules.scheduler_hint)
        flow.check_schedule(place, scheduler, "flow_shift")

    def known_schedule(self, scheduler: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of FlowMatchEulerDiscreteScheduler; a multistep scheduler has the same shift under another name."""
        if scheduler["_class_name"] != MULTISTEP:
            return dict(scheduler)
        steps, shift = scheduler.get("num_train_timesteps", 1000), scheduler.get("flow_shift", 1.0)
        return {"_class_name": flow.SCHEDULERS[0], "num_train_timesteps": steps, "shift": shift}

    def check_fit(self, name: str, networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str]) -> None:
        net, place = networks[self.component], places[self.component]
        channels = positive_integer(net, "in_channels", place)
        check_latents(name, channels, {"latent_channels": 32, **networks["vae"]}, places["vae"])
        check_outputs(net, place, channels)
        check_square(name, net)
        check_states(name, net, "caption_channels", networks[TEXT], (place, places[TEXT]), "Gemma", "hidden_size")

    def usual_guidance(self, config: Mapping[str, Any]) -> float:
        return 4.5

    # Sizes

    def patch(self, config: Mapping[str, Any], place: str) -> int:
        return positive_integer({"patch_size": 1, **config}, "patch_size", place)

    def resized(self, config: Mapping[str, Any], size: int | list[int]) -> dict[str, Any]:
        """Return the configuration for another size. Models of 2048 and 4096 pixels have positions, the others have none."""
        return keep_positions(config, super().resized(config, size), None)

    # Text

    def text_tokens(self, config: Mapping[str, Any]) -> int:
        return TOKENS

    def prepared(self, prompt: str) -> str:
        return prompt.lower().strip()

    def encoder(self, model: Any, device: torch.device) -> InstructedText:
        return InstructedText(self, model, device)

    def cond(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tokens], config: Mapping[str, Any]) -> Cond:
        """Return the states of the first and the last 299 tokens, and the mask of the tokens of the text among them."""
        ids, mask = tokens[TEXT]
        states = encoders[TEXT](ids, attention_mask=mask, use_cache=False)[0]
        read = [0, *range(1 - TOKENS, 0)]
        return Cond(states[:, read], {"encoder_attention_mask": mask[:, read]})

    def meta_cond(self, networks: Mapping[str, Mapping[str, Any]]) -> Cond:
        states = torch.empty(1, TOKENS, networks[self.component]["caption_channels"], device="meta")
        return Cond(states, {"encoder_attention_mask": torch.empty(1, TOKENS, device="meta")})

    # The denoiser

    def prepare(self, net: Any) -> None:
        for block in net.transformer_blocks:
            block.attn1.set_processor(LinearAttention())

    def denoise(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(x, cond.states, timestep=t, **cond.added).sample

    def recomputed(self) -> tuple[type[nn.Module], ...]:
        from diffusers.models.transformers.sana_transformer import SanaTransformerBlock

        return (SanaTransformerBlock,)


class LinearAttention:
    """The linear attention of a SANA block, relu(q) (relu(k)^T v) / (relu(q) sum relu(k)), with its sums over the tokens in float32.

    Under autocast SanaLinearAttnProcessor2_0 of diffusers computes these sums in bf16, with 8 bits for a sum of hundreds of tokens.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, **unused: Any) -> Tensor:
        """Return the attention of the states [B, tokens, width] to themselves; `attn` is the layer with the projections."""
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        with torch.autocast(hidden_states.device.type, enabled=False):
            query, key, value = (each.float().unflatten(2, (attn.heads, -1)).transpose(1, 2) for each in (query, key, value))
            query, key = query.relu(), key.relu()
            states = query @ (key.transpose(2, 3) @ value) / (query @ key.sum(2)[..., None] + 1e-15)
        projected: Tensor = attn.to_out[0](states.transpose(1, 2).flatten(2).to(hidden_states.dtype))
        return attn.to_out[1](projected)  # type: ignore[no-any-return]


class InstructedText(TextEncoders):
    """Gemma 2 on a device. It reads the instruction of the stock pipeline before a prompt, and nothing before the empty prompt."""

    def __init__(self, kind: Transformer, model: Any, device: torch.device):
        super().__init__(kind, model, device)
        self.instruction = instruction()
        # The transformer reads 300 tokens, the first of which begins the instruction and the second ends it.
        self.length = len(self.tokenizers[TEXT].encode(self.instruction)) + TOKENS - 2

    def tokens(self, name: str, prompts: Sequence[str]) -> Tokens:
        """Return the tokens of B prompts, all of which are empty or none."""
        before, length = (self.instruction, self.length) if prompts[0] else ("", TOKENS)
        return self.padded(name, [before + self.kind.prepared(prompt) for prompt in prompts], length)

    def __call__(self, prompts: Sequence[str]) -> Cond:
        order = sorted(range(len(prompts)), key=lambda row: not prompts[row])
        full, empty = [prompt for prompt in prompts if prompt], [prompt for prompt in prompts if not prompt]
        cond = reduce(Cond.cat, (super(InstructedText, self).__call__(part) for part in (full, empty) if part))
        rows = torch.tensor(order, device=self.device).argsort()
        return Cond(cond.states[rows], {name: value[rows] for name, value in cond.added.items()})


def instruction() -> str:
    """Return the text that the stock pipeline puts before a prompt by default."""
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


SANA = Sana()
