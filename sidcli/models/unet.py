"""UNets of Stable Diffusion 1, 2 and XL. Stable Diffusion 1 and 2 have one text encoder, SDXL has two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sidcli.diffusion.path import DiscretePath
from sidcli.errors import InputError, first_line
from sidcli.models import compatibility, families, reference, tokenizers
from sidcli.models.compatibility import (
    OTHER_COPY,
    OTHER_MODEL,
    SCHEDULE,
    check_scale,
    positive_integer,
    sides_of,
    value_text,
)
from sidcli.models.drawing import sizes
from sidcli.models.kind import Cond, Head, Kind
from sidcli.models.reference import Layout, layout_of, share_attention
from sidcli.printable import with_article


class Unet(Kind):
    component, title, models = "unet", "UNet", "a Stable Diffusion 1, 2 or XL model"
    texts = ("text_encoder", "text_encoder_2")
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2"), tokenizers.CLASSES)
    rules = compatibility.DISCRETE
    architecture = ("block_out_channels", "cross_attention_dim", "down_block_types", "layers_per_block")
    formats = ("diffusers", "single-file", "onnx", "openvino", "torch-export", "lora")
    is_ldm = True
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv", "conv_shortcut", "time_emb_proj"),
    )  # attention, feed-forward and convolutions

    def network_class(self, component: str) -> Any:
        return families.network_class(component)

    def text_config(self, component: str, config: Mapping[str, Any]) -> Any:
        return families.text_config(config)

    def pipeline(self, texts: Sequence[str]) -> Any:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        return StableDiffusionXLPipeline if len(texts) == 2 else StableDiffusionPipeline

    def index_entries(self, model: Any) -> dict[str, Any]:
        if model.is_xl:
            return {"force_zeros_for_empty_prompt": model.empty_is_zero}
        return {"requires_safety_checker": False, "safety_checker": [None, None]}

    def text_names(self, index: Mapping[str, Any], place: str) -> list[str]:
        names = [name for name in self.texts if name in (self.texts[0], *index)]
        if str(index["_class_name"]).startswith("StableDiffusionXL") and len(names) == 1:
            raise InputError(f"{place} is of {with_article(index['_class_name'])} and names no text_encoder_2", OTHER_MODEL)
        return names

    def read_path(self, scheduler: Mapping[str, Any], config: Mapping[str, Any]) -> DiscretePath:
        return read_path(scheduler)

    def check_schedule(self, place: str, scheduler: Mapping[str, Any]) -> None:
        compatibility.check_schedule(place, scheduler)

    def check_fit(self, name: str, networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str]) -> None:
        """Raises InputError if the inputs and outputs of a model's networks do not match each other."""
        unet, vae, text = networks["unet"], networks["vae"], networks["text_encoder"]
        channels = input_channels(unet, places["unet"])
        latent = positive_integer({"latent_channels": 4, **vae}, "latent_channels", places["vae"])
        if channels > latent:
            raise InputError(f"{name} takes {channels} channels in: an inpainting or editing model", OTHER_MODEL)
        if channels < latent:
            raise InputError(f"{name}: the UNet takes latents of {channels} channels, its VAE gives {latent}", OTHER_COPY)
        if unet.get("out_channels", 4) != channels:
            raise InputError(
                f"{places['unet']}: out_channels is {unet['out_channels']} where in_channels is {channels}: "
                "a learned variance is an output that sid does not use",
                OTHER_MODEL,
            )
        check_scale(places["vae"], vae)
        if "sample_size" in vae and sides_of(vae) is None:
            raise InputError(
                f"{places['vae']}: sample_size is {value_text(vae['sample_size'])}, which is not an image size", OTHER_COPY
            )
        second = networks.get("text_encoder_2")
        width = positive_integer(text, "hidden_size", places["text_encoder"])
        if second:
            width += positive_integer(second, "hidden_size", places["text_encoder_2"])
        heard = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim")
        widths = set(heard) if isinstance(heard, list) else {heard}
        if widths != {width}:
            raise InputError(
                f"{name}: the UNet's cross_attention_dim {heard} does not match the text encoders' width {width}", OTHER_COPY
            )
        added = unet.get("addition_embed_type") == "text_time"
        if added != bool(second):
            have = "has no text_encoder_2" if added else "has a text_encoder_2"
            raise InputError(
                f"{places['unet']}: addition_embed_type is {value_text(unet.get('addition_embed_type'))}, but the model {have}",
                OTHER_COPY,
            )
        if second:
            pooled, each = (
                positive_integer(second, "projection_dim", places["text_encoder_2"]),
                positive_integer(unet, "addition_time_embed_dim", places["unet"]),
            )
            wanted = positive_integer(unet, "projection_class_embeddings_input_dim", places["unet"])
            if wanted != pooled + 6 * each:
                raise InputError(
                    f"{places['unet']}: projection_class_embeddings_input_dim is {wanted}; prompt and image sizes give {pooled + 6 * each}"
                    + (": an aesthetic score is an input that sid cannot give" if wanted == pooled + 5 * each else ""),
                    OTHER_MODEL,
                )

    def read_tokenizer(self, component: str, folder: Path, config: Mapping[str, Any], place: str) -> CLIPTokenizer:
        return tokenizers.read_tokenizer(folder, config, place)

    def patch(self, config: Mapping[str, Any], place: str) -> int:
        return 1

    def encoder(self, model: Any, device: torch.device) -> ClipEncoder:
        return ClipEncoder(model.text_encoders, model.tokenizers, model.size, model.empty_is_zero, device)

    def rehearsed_cond(self, built: Mapping[str, Any], length: int) -> Cond:
        encoders = [built[name] for name in self.texts if name in built]
        tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
        return text_cond(encoders, [tokens] * len(encoders), (0, 0))

    def meta_cond(self, networks: Mapping[str, Mapping[str, Any]]) -> Cond:
        texts = [networks[name] for name in self.texts if name in networks]
        states = torch.empty(1, texts[0]["max_position_embeddings"], sum(text["hidden_size"] for text in texts), device="meta")
        if len(texts) == 1:
            return Cond(states)
        pooled = torch.empty(1, texts[-1]["projection_dim"], device="meta")
        return Cond(states, {"text_embeds": pooled, "time_ids": torch.empty(1, len(sizes(0, 0)), device="meta")})

    def build(self, component: str, config: Mapping[str, Any]) -> nn.Module:
        network = super().build(component, config)
        if component == self.component:
            self.prepare(network)
        return network

    def share_attention(self, net: Any, count: int) -> None:
        share_attention(net, count)

    def prepare(self, net: Any) -> None:
        layout = layout_of(net.config)
        if layout and layout.name == "frames":
            share_attention(net, layout.frames)

    def take_reference(self, net: Any, layout: Layout) -> None:
        net.register_to_config(in_channels=layout.channels(net.config.in_channels), **{reference.ENTRY: layout.name})
        net.conv_in = reference.widen(net.conv_in, net.config.in_channels)
        self.prepare(net)

    def denoise(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        inner: Any = getattr(net, "module", net)  # DistributedDataParallel has the network in `module`
        layout = layout_of(inner.config)
        if layout is None:
            return self._predict(net, x, t, cond, lambda value: value)
        given = layout.nothing(x) if cond.reference is None else cond.reference
        return layout.run(lambda inputs, repeated: self._predict(net, inputs, t, cond, repeated), x, given)

    def _predict(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond, repeated: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the UNet's output for its input, with timesteps and cond `repeated` for the rows of the input."""
        added = {name: repeated(value) for name, value in cond.added.items()}
        more: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
        return net(x, repeated(t), repeated(cond.states), **more).sample

    def blocks(self, net: Any) -> list[nn.Module]:
        return [*net.down_blocks, net.mid_block, *net.up_blocks]

    def recomputed(self) -> tuple[type[nn.Module], ...]:
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        return ResnetBlock2D, BasicTransformerBlock

    def middle(self, net: Any) -> nn.Module:
        return net.mid_block

    def feature_map(self, net: Any, output: Any) -> Tensor:
        return output

    def head(self, config: Mapping[str, Any]) -> Head:
        _, height, width = self.frame_shape(config)
        channels = config["block_out_channels"]
        shrunk = 2 ** (len(channels) - 1)
        return Head(channels[-1], -(-height // shrunk), -(-width // shrunk), config["norm_num_groups"])


UNET = Unet()


def input_channels(unet: Mapping[str, Any], place: str) -> int:
    """Return the channels of the latents that a UNet takes. Those of a reference do not count.

    Raises InputError if its layout is unknown or does not have its number of input channels.
    """
    channels = positive_integer(unet, "in_channels", place)
    name = unet.get(reference.ENTRY)
    if name is None:
        return channels
    if name not in reference.LAYOUTS:
        raise InputError(
            f"{place}: {reference.ENTRY} is {value_text(name)}; it must be one of {', '.join(reference.LAYOUTS)}", OTHER_COPY
        )
    latent = positive_integer({"out_channels": 4, **unet}, "out_channels", place)
    if channels != (wanted := reference.LAYOUTS[name].channels(latent)):
        raise InputError(f"{place}: in_channels is {channels}; layout {name} has {wanted}", OTHER_COPY)
    if unet.get(reference.COUNT, 1) != 1:
        raise InputError(f"{place}: {reference.COUNT} is {value_text(unet[reference.COUNT])}; it must be 1 in a file", OTHER_COPY)
    return latent


def read_path(scheduler_config: Mapping[str, Any]) -> DiscretePath:
    """Return a scheduler configuration's diffusion path. Raises InputError for an unsupported prediction type or invalid betas."""
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"prediction type {prediction!r} is not supported", "teachers predict epsilon or v_prediction")
    try:
        scheduler = DDPMScheduler(**{key: value for key, value in scheduler_config.items() if key in SCHEDULE})
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"the scheduler does not describe a noise schedule: {first_line(error)}", OTHER_COPY) from error
    if not ((scheduler.betas >= 0) & (scheduler.betas <= 1)).all():  # also rejects NaN
        raise InputError("the scheduler does not describe a noise schedule: betas must lie between 0 and 1", OTHER_COPY)
    path = DiscretePath.from_betas(scheduler.betas, prediction)
    if prediction == "epsilon" and path.abar[-1] == 0:
        raise InputError(
            "a schedule with zero terminal SNR needs a teacher that predicts v: noise says nothing where no signal is left",
            "--prediction-type v_prediction, if that is what it predicts",
        )
    return path


class ClipEncoder:
    """The text encoders of a model on a device. `truncated` counts prompts that exceed the encoders' maximum length.

    With two encoders (SDXL, arXiv 2307.01952) the hidden states before the last layer of both are concatenated, and the second
    encoder's pooled projection of the prompt is added to the cond. `empty_is_zero`: the empty prompt is encoded as zeros, as in the
    published SDXL.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        tokenizers: Sequence[CLIPTokenizer],
        size: tuple[int, int],
        empty_is_zero: bool,
        device: torch.device,
    ):
        self.encoders = [encoder.to(device) for encoder in encoders]
        self.tokenizers, self.size, self.empty_is_zero, self.device = tokenizers, size, empty_is_zero, device
        self.truncated = 0

    def tokens(self, prompts: Sequence[str], index: int) -> Tensor:
        """Return the token ids int64 [B, length] for the encoder `index`."""
        tokenizer: Any = self.tokenizers[index]
        config: Any = self.encoders[index].config
        length = min(tokenizer.model_max_length, config.max_position_embeddings)
        if index == 0:
            self.truncated += sum(len(row) > length for row in tokenizer(list(prompts)).input_ids)
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(prompts), **options).input_ids.to(self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Cond:
        cond = text_cond(self.encoders, [self.tokens(prompts, index) for index in range(len(self.encoders))], self.size)
        if not (self.empty_is_zero and cond.added):
            return cond
        said = torch.tensor([float(bool(prompt)) for prompt in prompts], device=self.device)
        pooled = cond.added["text_embeds"] * said[:, None]
        return Cond(cond.states * said[:, None, None], {**cond.added, "text_embeds": pooled})


def text_cond(encoders: Sequence[Any], tokens: Sequence[Tensor], size: tuple[int, int]) -> Cond:
    """Return the cond of B prompts from their token ids int64 [B, length] for each encoder; `size` is height and width in pixels."""
    if len(encoders) == 1:
        return Cond(encoders[0](tokens[0]).last_hidden_state)
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    ids = torch.tensor(sizes(*size), device=states.device).expand(len(states), -1)
    return Cond(states, {"text_embeds": outputs[-1].text_embeds, "time_ids": ids})
