"""Transformers of Stable Diffusion 3 and 3.5 (arXiv 2403.03206), trained by flow matching, with two CLIP text encoders and a T5.

Each of the three text encoders can be missing. As in the published code, its part of the conditioning is then zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sidcli.diffusion.path import FlowPath
from sidcli.errors import InputError, first_line
from sidcli.files import read_json
from sidcli.models import families, tokenizers
from sidcli.models.card import MAX_SHIFT
from sidcli.models.compatibility import (
    ACCEPTED,
    MAX_TIMESTEPS,
    OTHER_COPY,
    OTHER_MODEL,
    SUPPORTED_VALUES,
    Rules,
    check_scale,
    is_number,
    positive_integer,
    sides_of,
    value_text,
)
from sidcli.models.kind import Cond, Head, Kind, tokenizer_of
from sidcli.printable import with_article

CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
CLIP_TOKENS, T5_TOKENS = 77, 256
"""Tokens of each CLIP encoder, if there is none, and of T5, as the stock pipeline reads them."""
MAX_POSITIONS = 1024
"""Maximum positions on a side. Published models have 192 and 384; a mistyped number could exhaust the memory."""
T5_CLASSES = ("T5Tokenizer", "T5TokenizerFast")
T5_KEYS = frozenset(
    {
        *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets"),
        *("relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "initializer_factor", "feed_forward_proj"),
        *("pad_token_id", "eos_token_id"),
    }
)
"""Entries of the configuration of T5 that are used. Others select an implementation, which can be downloaded code."""
SIGMAS = "only the shift of the timesteps is supported"
RULES = Rules(
    ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    ("FlowMatchEulerDiscreteScheduler",),
    "use a model with FlowMatchEulerDiscreteScheduler",
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
        "scheduler": frozenset(
            {
                *("num_train_timesteps", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
                "time_shift_type",
            }
        ),
    },
    {
        "transformer": {},
        "vae": {entry: rule for entry, rule in SUPPORTED_VALUES["vae"].items() if entry != "shift_factor"},
        "text_encoder": SUPPORTED_VALUES["text_encoder"],
        T5: {"model_type": (("t5", None), "the third text encoder of this family is T5")},
        "scheduler": {
            **{entry: ((False, None), SIGMAS) for entry in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling")},
            **{entry: ((False, None), SIGMAS) for entry in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")},
            "shift_terminal": ((None,), SIGMAS),
        },
    },
)


class Sd3(Kind):
    component, title, models = "transformer", "transformer", "a Stable Diffusion 3 model"
    texts = (*CLIPS, T5)
    tokenizers: ClassVar = {**dict.fromkeys(map(tokenizer_of, CLIPS), tokenizers.CLASSES), tokenizer_of(T5): T5_CLASSES}
    rules = RULES
    architecture = (
        *("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim"),
        *("in_channels", "patch_size", "pos_embed_max_size", "dual_attention_layers", "qk_norm"),
    )
    formats = ("diffusers",)
    is_square = True
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )  # attention and feed-forward

    def network_class(self, component: str) -> Any:
        if component in self.texts:
            from transformers import CLIPTextModelWithProjection, T5EncoderModel

            return CLIPTextModelWithProjection if component in CLIPS else T5EncoderModel
        from diffusers import AutoencoderKL, SD3Transformer2DModel

        return {self.component: SD3Transformer2DModel, "vae": AutoencoderKL}[component]

    def text_config(self, component: str, config: Mapping[str, Any]) -> Any:
        if component in CLIPS:
            return families.text_config(config)
        from transformers import T5Config

        return T5Config(**{key: value for key, value in config.items() if key in T5_KEYS})

    def pipeline(self, texts: Sequence[str]) -> Any:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline

    def stock_problem(self, texts: Sequence[str]) -> str:
        missing = [name for name in CLIPS if name not in texts]
        return f"the stock pipeline cannot read prompts without {' and '.join(missing)}" if missing else ""

    def absent(self, texts: Sequence[str]) -> list[str]:
        return [part for name in self.texts if name not in texts for part in (name, tokenizer_of(name))]

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

    def read_path(self, scheduler: Mapping[str, Any]) -> FlowPath:
        if scheduler.get("prediction_type", "flow") != "flow":
            raise InputError(
                f"prediction type {scheduler['prediction_type']!r} is not supported: {self.models} predicts the velocity of its flow",
                "leave --prediction-type out",
            )
        return FlowPath(scheduler.get("num_train_timesteps", 1000), float(scheduler.get("shift", 1.0)))

    def check_schedule(self, place: str, scheduler: Mapping[str, Any]) -> None:
        steps = positive_integer({"num_train_timesteps": 1000, **scheduler}, "num_train_timesteps", place)
        if steps > MAX_TIMESTEPS:
            raise InputError(f"{place}: num_train_timesteps is {steps}, more than {MAX_TIMESTEPS}", OTHER_COPY)
        shift = scheduler.get("shift", 1.0)
        if not (is_number(shift) and 0 < shift <= MAX_SHIFT):
            raise InputError(f"{place}: shift is {value_text(shift)}; it must be above 0 and at most {MAX_SHIFT}", OTHER_COPY)

    def check_fit(self, name: str, networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str]) -> None:
        net, vae, place = networks[self.component], networks["vae"], places[self.component]
        channels = positive_integer(net, "in_channels", place)
        latent = positive_integer({"latent_channels": 4, **vae}, "latent_channels", places["vae"])
        if channels != latent:
            raise InputError(f"{name}: the transformer takes latents of {channels} channels, its VAE gives {latent}", OTHER_COPY)
        if net.get("out_channels", channels) not in (channels, None):
            raise InputError(f"{place}: out_channels is {net['out_channels']} where in_channels is {channels}", OTHER_MODEL)
        check_scale(places["vae"], vae)
        shift = vae.get("shift_factor")
        if shift is not None and not is_number(shift):
            raise InputError(f"{places['vae']}: shift_factor is {value_text(shift)}; it must be a number", OTHER_COPY)
        height, width = sides_of(net) or (0, 0)
        if height != width:
            raise InputError(
                f"{name} draws square images; sample_size is {value_text(net['sample_size'])}", "--width equal to --height"
            )
        if (most := positive_integer({"pos_embed_max_size": 96, **net}, "pos_embed_max_size", place)) > MAX_POSITIONS:
            raise InputError(f"{place}: pos_embed_max_size is {most}, more than {MAX_POSITIONS}", OTHER_COPY)
        joint = positive_integer(net, "joint_attention_dim", place)
        if T5 in networks and (width := positive_integer(networks[T5], "d_model", places[T5])) != joint:
            raise InputError(f"{name}: joint_attention_dim is {joint}, and the states of T5 have width {width}", OTHER_COPY)
        pooled = positive_integer(net, "pooled_projection_dim", place)
        given = [positive_integer(networks[text], "projection_dim", places[text]) for text in CLIPS if text in networks]
        if sum(given) > pooled or (len(given) == len(CLIPS) and sum(given) != pooled):
            raise InputError(
                f"{name}: pooled_projection_dim is {pooled}, and the CLIP text encoders give {' + '.join(map(str, given))}",
                OTHER_COPY,
            )

    def read_tokenizer(self, component: str, folder: Path, config: Mapping[str, Any], place: str) -> Any:
        reader = tokenizers.read_tokenizer if component in CLIPS else read_t5_tokenizer
        return reader(folder, config, place)

    def patch(self, config: Mapping[str, Any], place: str) -> int:
        return positive_integer({"patch_size": 2, **config}, "patch_size", place)

    def largest(self, config: Mapping[str, Any], place: str) -> float:
        return self.patch(config, place) * positive_integer({"pos_embed_max_size": 96, **config}, "pos_embed_max_size", place)

    def encoder(self, model: Any, device: torch.device) -> Sd3Encoder:
        encoders = dict(zip(model.texts, model.text_encoders, strict=True))
        return Sd3Encoder(encoders, dict(zip(model.texts, model.tokenizers, strict=True)), model.denoiser.config, device)

    def rehearsed_cond(self, built: Mapping[str, Any], length: int) -> Cond:
        encoders = {name: built[name] for name in self.texts if name in built}
        lengths = {name: T5_TOKENS if name == T5 else length for name in encoders}
        tokens = {name: torch.zeros(1, count, dtype=torch.long, device="meta") for name, count in lengths.items()}
        return joint_cond(encoders, tokens, built[self.component].config)

    def meta_cond(self, networks: Mapping[str, Mapping[str, Any]]) -> Cond:
        config = networks[self.component]
        length = next((networks[name]["max_position_embeddings"] for name in CLIPS if name in networks), CLIP_TOKENS)
        states = torch.empty(1, length + T5_TOKENS, config["joint_attention_dim"], device="meta")
        return Cond(states, {"pooled_projections": torch.empty(1, config["pooled_projection_dim"], device="meta")})

    def denoise(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(x, cond.states, timestep=t, **cond.added).sample

    def blocks(self, net: Any) -> list[nn.Module]:
        return list(net.transformer_blocks)

    def recomputed(self) -> tuple[type[nn.Module], ...]:
        from diffusers.models.attention import JointTransformerBlock

        return (JointTransformerBlock,)

    def middle(self, net: Any) -> nn.Module:
        return net.transformer_blocks[len(net.transformer_blocks) // 2]

    def feature_map(self, net: Any, output: Any) -> Tensor:
        _, height, width = self.latent_shape(net.config)
        patch = self.patch(net.config, self.title)
        states: Tensor = output[1]  # the first output is that of the text
        return states.transpose(1, 2).unflatten(2, (height // patch, width // patch))

    def head(self, config: Mapping[str, Any]) -> Head:
        _, height, width = self.latent_shape(config)
        patch, heads = self.patch(config, self.title), config["num_attention_heads"]
        return Head(heads * config["attention_head_dim"], height // patch, width // patch, heads)


SD3 = Sd3()


class Sd3Encoder:
    """The text encoders of a model on a device, by name. `truncated` counts prompts that are longer than the last of them reads."""

    def __init__(self, encoders: Mapping[str, Any], tokenizers: Mapping[str, Any], config: Mapping[str, Any], device: torch.device):
        self.encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
        self.tokenizers, self.config, self.device, self.truncated = tokenizers, config, device, 0

    def tokens(self, name: str, prompts: Sequence[str]) -> Tensor:
        """Return the token ids int64 [B, length] for the encoder `name`."""
        tokenizer = self.tokenizers[name]
        length = T5_TOKENS if name == T5 else tokenizer.model_max_length
        if name == list(self.encoders)[-1]:
            self.truncated += sum(len(row) > length for row in tokenizer(list(prompts)).input_ids)
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(prompts), **options).input_ids.to(self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Cond:
        return joint_cond(self.encoders, {name: self.tokens(name, prompts) for name in self.encoders}, self.config)


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
    last = encoders[T5](tokens[T5])[0] if T5 in encoders else torch.zeros(count, T5_TOKENS, width, device=device)
    return Cond(torch.cat([states, last], 1), {"pooled_projections": torch.cat(pooled, -1)})


def read_t5_tokenizer(folder: Path, text_config: Mapping[str, Any], text_place: str) -> Any:
    """Return the tokenizer of T5 in a folder, read from its tokenizer.json.

    Raises InputError if the file is missing or damaged, if the tokenizer is not T5's, or if it does not match the text encoder.
    """
    from transformers import T5Tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json", OTHER_COPY)
    found = None
    if (folder / "tokenizer_config.json").is_file():
        found = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    if found not in (*T5_CLASSES, *tokenizers.UNSPECIFIC):
        raise InputError(f"{folder} holds {with_article(str(found))}, not a T5Tokenizer", OTHER_MODEL)
    try:
        tokenizer: Any = T5Tokenizer.from_pretrained(folder, local_files_only=True)
        words, empty = tokenizer.get_vocab(), tokenizer("").input_ids
    except Exception as error:  # libraries raise any kind of error for an invalid file
        raise InputError(f"{folder} holds no tokenizer of T5: {first_line(error)}", OTHER_COPY) from error
    rows = positive_integer(text_config, "vocab_size", text_place)
    if max(words.values()) >= rows:
        raise InputError(f"{folder} has the id {max(words.values())}; {text_place} has vocab_size {rows}", OTHER_COPY)
    if empty != [tokenizer.eos_token_id]:
        raise InputError(f"{folder} does not put its end mark behind a prompt", OTHER_COPY)
    return tokenizer
