"""Transformers of Stable Diffusion 3 and 3.5 (arXiv 2403.03206), trained by flow matching, with two CLIP text encoders and a T5.

Each of the three text encoders can be missing. As in the published code, its part of the conditioning is then zeros.

T5, or its zeros, has 256 tokens. A model that was trained with another number has it as the entry `max_sequence_length` of its
transformer's configuration, and the stock pipeline needs it as the argument of that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sidcli.diffusion.path import FlowPath
from sidcli.errors import InputError
from sidcli.models import flow, t5, tokenizers
from sidcli.models.compatibility import ACCEPTED, OTHER_COPY, OTHER_MODEL, SUPPORTED_VALUES, Rules, positive_integer, value_text
from sidcli.models.kind import Cond, tokenizer_of
from sidcli.models.ldm import Place, Places, block_places
from sidcli.models.transformer import Tokens, Transformer, check_latents, check_outputs, check_square, check_states

CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
CLIP_TOKENS, T5_TOKENS = 77, 256
"""Tokens of each CLIP encoder, if there is none, and of T5, as the stock pipeline reads them."""
LENGTH, MAX_LENGTH = "max_sequence_length", 512
"""Entry of a transformer's configuration with another number of tokens of T5, and the largest number that the stock pipeline takes."""
MAX_POSITIONS = 1024
"""Maximum positions on a side. Published models have 192 and 384; a mistyped number could exhaust the memory."""
PREFIX = "model.diffusion_model."
"""Prefix of the transformer's tensors in published single files."""
LAYERS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "context_embedder.": "context_embedder.",
    "proj_out.": "final_layer.linear.",
}
"""Layer outside of the blocks -> its name in the original code (mmdit.py of Stability AI)."""
BLOCK = {
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
}
"""Layer of a block -> its name in the original code."""
JOINED = {
    "x_block.attn.qkv.": ("attn.to_q.", "attn.to_k.", "attn.to_v."),
    "context_block.attn.qkv.": ("attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."),
    "x_block.attn2.qkv.": ("attn2.to_q.", "attn2.to_k.", "attn2.to_v."),
}
"""Layer of a block in the original code -> the layers of which it has the rows, in order."""
RULES = Rules(
    ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    flow.SCHEDULERS,
    flow.HINT,
    {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"},
    {
        "transformer": frozenset(
            {
                *("sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads"),
                *("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size"),
                *("dual_attention_layers", "qk_norm"),
            }
        ),
        "vae": ACCEPTED["vae"] | {"shift_factor"},
        "scheduler": flow.ACCEPTED,
    },
    {
        "transformer": {},
        "vae": {entry: rule for entry, rule in SUPPORTED_VALUES["vae"].items() if entry != "shift_factor"},
        "text_encoder": SUPPORTED_VALUES["text_encoder"],
        T5: t5.VALUES,
        "scheduler": flow.VALUES,
    },
)


class Sd3(Transformer):
    models = "a Stable Diffusion 3 model"
    formats = ("diffusers", "single-file", "lora")
    texts = (*CLIPS, T5)
    text_classes: ClassVar = {**dict.fromkeys(CLIPS, "CLIPTextModelWithProjection"), T5: "T5EncoderModel"}
    tokenizers: ClassVar = {**dict.fromkeys(map(tokenizer_of, CLIPS), tokenizers.CLASSES), tokenizer_of(T5): t5.CLASSES}
    rules = RULES
    architecture = (
        *("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim"),
        *("in_channels", "patch_size", "pos_embed_max_size", "dual_attention_layers", "qk_norm"),
    )
    is_square = True
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )  # attention and feed-forward

    def pipeline(self, texts: Sequence[str]) -> Any:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline

    def stock_problem(self, texts: Sequence[str]) -> str:
        missing = [name for name in CLIPS if name not in texts]
        return f"the stock pipeline cannot read prompts without {' and '.join(missing)}" if missing else ""

    def absent(self, texts: Sequence[str]) -> list[str]:
        return [part for name in self.texts if name not in texts for part in (name, tokenizer_of(name))]

    def call_options(self, config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        tokens = t5_tokens(config)
        return super().call_options(config, size) | ({} if tokens == T5_TOKENS else {LENGTH: tokens})

    def index_entries(self, model: Any) -> dict[str, Any]:
        return {part: [None, None] for part in self.absent(model.texts)}

    def text_names(self, index: Mapping[str, Any], place: str) -> list[str]:
        names = []
        for name in self.texts:
            match index.get(name):
                case [str(), str()]:
                    names.append(name)
                case None | [None, None]:
                    continue
                case other:
                    raise InputError(
                        f"{place}: {name} is {value_text(other)}; it must be a library and a class, or [null, null]", OTHER_COPY
                    )
        if not names:
            raise InputError(f"{place} names no text encoder", OTHER_MODEL)
        return names

    def read_path(self, scheduler: Mapping[str, Any], config: Mapping[str, Any]) -> FlowPath:
        flow.check_prediction(scheduler, self.models)
        return FlowPath(scheduler.get("num_train_timesteps", 1000), float(scheduler.get("shift", 1.0)))

    def check_schedule(self, place: str, scheduler: Mapping[str, Any]) -> None:
        flow.check_schedule(place, scheduler)

    def check_fit(self, name: str, networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str]) -> None:
        net, place = networks[self.component], places[self.component]
        channels = positive_integer(net, "in_channels", place)
        check_latents(name, channels, networks["vae"], places["vae"])
        check_outputs(net, place, channels)
        check_square(name, net)
        if (most := positive_integer({"pos_embed_max_size": 96, **net}, "pos_embed_max_size", place)) > MAX_POSITIONS:
            raise InputError(f"{place}: pos_embed_max_size is {most}, more than {MAX_POSITIONS}", OTHER_COPY)
        if (tokens := positive_integer({LENGTH: T5_TOKENS, **net}, LENGTH, place)) > MAX_LENGTH:
            raise InputError(f"{place}: {LENGTH} is {tokens}, more than {MAX_LENGTH}", OTHER_COPY)
        if T5 in networks:
            check_states(name, net, "joint_attention_dim", networks[T5], (place, places[T5]))
        pooled = positive_integer(net, "pooled_projection_dim", place)
        given = [positive_integer(networks[text], "projection_dim", places[text]) for text in CLIPS if text in networks]
        if sum(given) > pooled or (len(given) == len(CLIPS) and sum(given) != pooled):
            raise InputError(
                f"{name}: pooled_projection_dim is {pooled}, and the CLIP text encoders give {' + '.join(map(str, given))}",
                OTHER_COPY,
            )

    def places(self, config: Mapping[str, Any]) -> Places:
        return {name: replace(place, key=PREFIX + place.key) for name, place in original_places(config["num_layers"]).items()}

    def in_comfyui(self, config: Mapping[str, Any]) -> bool:
        """Return whether the transformer has heads of 64 channels and a head for each block, as ComfyUI assumes."""
        return config["attention_head_dim"] == 64 and config["num_attention_heads"] == config["num_layers"]

    def text_tokens(self, config: Mapping[str, Any]) -> int:
        return t5_tokens(config)

    def largest(self, config: Mapping[str, Any], place: str) -> float:
        return self.patch(config, place) * positive_integer({"pos_embed_max_size": 96, **config}, "pos_embed_max_size", place)

    def usual_guidance(self, config: Mapping[str, Any]) -> float:
        return 7.0

    def cond(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tokens], config: Mapping[str, Any]) -> Cond:
        return joint_cond(encoders, {name: found.ids for name, found in tokens.items()}, config)

    def meta_cond(self, networks: Mapping[str, Mapping[str, Any]]) -> Cond:
        config = networks[self.component]
        length = next((networks[name]["max_position_embeddings"] for name in CLIPS if name in networks), CLIP_TOKENS)
        states = torch.empty(1, length + t5_tokens(config), config["joint_attention_dim"], device="meta")
        return Cond(states, {"pooled_projections": torch.empty(1, config["pooled_projection_dim"], device="meta")})

    def denoise(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(x, cond.states, timestep=t, **cond.added).sample

    def recomputed(self) -> tuple[type[nn.Module], ...]:
        from diffusers.models.attention import JointTransformerBlock

        return (JointTransformerBlock,)


SD3 = Sd3()


def t5_tokens(config: Mapping[str, Any]) -> int:
    """Return the number of tokens of T5 for a transformer with this configuration."""
    return config.get(LENGTH, T5_TOKENS)  # type: ignore[no-any-return]


def joint_cond(encoders: Mapping[str, Any], tokens: Mapping[str, Tensor], config: Mapping[str, Any]) -> Cond:
    """Return the cond of B prompts from their token ids int64 [B, length] by encoder; `config` is the transformer's configuration.

    The states of both CLIP encoders, side by side and filled up with zeros, come before those of T5. `pooled_projections` [B, P] are
    the projections of both CLIP encoders. The width of a missing CLIP encoder is what the other one leaves of P.
    """
    width, pooled_width = config["joint_attention_dim"], config["pooled_projection_dim"]
    outputs = {name: encoders[name](tokens[name], output_hidden_states=True) for name in CLIPS if name in encoders}
    some = next(iter(tokens.values()))
    count, device = len(some), some.device
    rest = pooled_width - sum(output.text_embeds.shape[-1] for output in outputs.values())
    length = next((output.hidden_states[-2].shape[1] for output in outputs.values()), CLIP_TOKENS)
    clip, pooled = [], []
    for name in CLIPS:
        if name in outputs:
            clip.append(outputs[name].hidden_states[-2])
            pooled.append(outputs[name].text_embeds)
        elif outputs or name == CLIPS[0]:  # without any CLIP encoder, one block of zeros stands for both
            clip.append(torch.zeros(count, length, rest if outputs else width, device=device))
            pooled.append(torch.zeros(count, rest, device=device))
    states = torch.cat(clip, -1)
    states = nn.functional.pad(states, (0, width - states.shape[-1]))
    last = encoders[T5](tokens[T5])[0] if T5 in encoders else torch.zeros(count, t5_tokens(config), width, device=device)
    return Cond(torch.cat([states, last], 1), {"pooled_projections": torch.cat(pooled, -1)})


def original_places(blocks: int) -> Places:
    """Return where the original code has the tensors of a transformer with this many blocks."""
    places = {name: Place(key) for name, key in LAYERS.items()}
    places["norm_out.linear."] = Place("final_layer.adaLN_modulation.1.", swapped=True)
    for block in range(blocks):
        places |= block_places(f"transformer_blocks.{block}.", f"joint_blocks.{block}.", BLOCK, JOINED)
    last = f"transformer_blocks.{blocks - 1}.norm1_context.linear."  # it has a scale and a shift only, as the layer at the end
    return places | {last: replace(places[last], swapped=True)}
