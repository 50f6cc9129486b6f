"""Check that sid computes a model's configuration as stock diffusers does. Any other entry raises InputError with its name.

An entry is accepted if (1) the network's class implements it when the network is built from the configuration, (2) it only selects
how diffusers samples, because sid samples with DDIM, or (3) it is in SUPPORTED_VALUES and has one of the values listed there. An entry
that the installed diffusers knows but this file does not list is accepted only at its default value.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidcli.errors import InputError
from sidcli.printable import with_article

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
"""Pipelines whose networks support text-to-image. UNets with more input channels than a latent has are rejected later."""
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of these pipelines that do not affect text-to-image generation."""
SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers for discrete variance-preserving diffusion with betas. They differ only in how they sample."""

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""Entries of a scheduler's configuration that define the noise schedule."""
# fmt: off
ACCEPTED: dict[str, frozenset[str]] = {
    "unet": frozenset({
        "sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift", "down_block_types",
        "mid_block_type", "up_block_types", "only_cross_attention", "block_out_channels", "layers_per_block",
        "downsample_padding", "mid_block_scale_factor", "dropout", "act_fn", "norm_num_groups", "norm_eps",
        "cross_attention_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block", "encoder_hid_dim",
        "attention_head_dim", "use_linear_projection", "addition_time_embed_dim", "upcast_attention", "resnet_time_scale_shift",
        "resnet_skip_time_act", "resnet_out_scale_factor", "time_embedding_type", "time_embedding_dim", "time_embedding_act_fn",
        "timestep_post_act", "conv_in_kernel", "conv_out_kernel", "projection_class_embeddings_input_dim",
        "mid_block_only_cross_attention", "cross_attention_norm", "addition_embed_type_num_heads",
    }),
    "vae": frozenset({
        "in_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "act_fn",
        "latent_channels", "norm_num_groups", "sample_size", "scaling_factor", "force_upcast", "use_quant_conv",
        "use_post_quant_conv", "mid_block_add_attention",
    }),
    # sid uses the noise schedule and the prediction type. The other entries configure the samplers of diffusers.
    "scheduler": frozenset({
        *SCHEDULE,
        "prediction_type", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "clip_sample", "clip_sample_range",
        "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "solver_order", "algorithm_type",
        "solver_type", "solver_p", "lower_order_final", "euler_at_final", "final_sigmas_type", "use_karras_sigmas",
        "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "flow_shift", "time_shift_type", "lambda_min_clipped",
        "interpolation_type", "sigma_min", "sigma_max", "original_inference_steps", "timestep_scaling", "predict_x0",
        "disable_corrector", "predictor_order", "corrector_order", "tau_func", "noise_sampler_seed",
    }),
}
# fmt: on
"""Component -> entries that are accepted with any value that the component's class accepts."""

MAX_TIMESTEPS = 100_000
BETAS: dict[str, tuple[tuple[type, ...], str]] = {
    "beta_schedule": ((str,), "name"),
    "beta_start": ((int, float), "number"),
    "beta_end": ((int, float), "number"),
}

MAX_LAYERS = {
    "num_hidden_layers": 100,
    "num_layers": 120,
    "num_single_layers": 120,
    "layers_per_block": 10,
    "encoder_layers_per_block": 30,
    "decoder_layers_per_block": 30,
    "transformer_layers_per_block": 40,
    "reverse_transformer_layers_per_block": 40,
}
"""Entry -> maximum number of layers: 3 times the largest published network. A mistyped number could exhaust the memory."""
MAX_LEVELS = 16
"""Maximum length of a list in a configuration. Published networks have four levels."""

LABELS = "class labels are an input that sid cannot give"
EMBEDDINGS = "image embeddings are an input that sid cannot give"
FLOW = "flow matching is not the diffusion that is distilled here"
STATISTICS = "latents are only scaled by scaling_factor"
SUPPORTED_VALUES: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "unet": {
        "class_embed_type": ((None,), LABELS),
        "num_class_embeds": ((None,), LABELS),
        "class_embeddings_concat": ((False, None), LABELS),
        "addition_embed_type": ((None, "text", "text_time"), EMBEDDINGS),
        "encoder_hid_dim_type": ((None, "text_proj"), EMBEDDINGS),
        "dual_cross_attention": ((False, None), EMBEDDINGS),
        "attention_type": (("default", None), "boxes and phrases are inputs that sid cannot give"),
        "time_cond_proj_dim": ((None,), "the guidance scale is an input of a guidance-distilled model, which sid cannot give"),
        "num_attention_heads": ((None,), "diffusers builds no such UNet"),
    },
    "vae": {
        "out_channels": ((3,), "sid draws RGB images"),
        "latents_mean": ((None,), STATISTICS),
        "latents_std": ((None,), STATISTICS),
        "shift_factor": ((None, 0), STATISTICS),
    },
    "text_encoder": {
        "model_type": (("clip_text_model", None), "the text encoder of this family is CLIP's"),
        "use_attention_mask": ((False, None), "prompts are encoded without an attention mask"),
    },
    "scheduler": {
        "use_flow_sigmas": ((False, None), FLOW),
        "use_dynamic_shifting": ((False, None), FLOW),
        "shift_terminal": ((None,), FLOW),
        "timestep_type": (("discrete", None), "the timesteps of sid are discrete"),
        "variance_type": (
            (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
            "a learned variance is an output that sid does not use",
        ),
    },
}
"""Component -> entry -> (supported values, reason why other values are not supported)."""


@dataclass(frozen=True)
class Rules:
    """What is supported of the files of a family: its pipelines, its schedulers, and the entries of its components' configurations."""

    pipelines: tuple[str, ...]
    schedulers: tuple[str, ...]
    scheduler_hint: str
    """What to use in place of a model with another scheduler."""
    classes: Mapping[str, str]
    """Component -> its class in diffusers, whose parameters are the entries that diffusers knows."""
    accepted: Mapping[str, frozenset[str]]
    """Component -> entries that are accepted with any value that the component's class accepts."""
    values: Mapping[str, Mapping[str, tuple[tuple[Any, ...], str]]]
    """Component -> entry -> (supported values, reason why other values are not supported)."""


DISCRETE = Rules(
    PIPELINES,
    SCHEDULERS,
    "use a model for DDIM, DDPM, PNDM, Euler, DPM-Solver, UniPC, LCM and the like: a diffusion of discrete timesteps with betas",
    {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"},
    ACCEPTED,
    SUPPORTED_VALUES,
)
"""Stable Diffusion 1, 2 and XL."""
OTHER_MODEL = "use a Stable Diffusion 1, 2, XL or 3, PixArt-Sigma, FLUX.1 or SANA model that draws from text alone"
OTHER_COPY = "take another copy of the model"


def check_parts(name: str, index: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Raises InputError if model_index.json names a component, not in `parts`, that affects images."""
    for part, entry in index.items():
        if part not in (*parts, *UNUSED_PARTS) and isinstance(entry, list) and entry and entry[-1] is not None:
            raise InputError(f"{name} has a part that sid cannot use: {part}, {with_article(str(entry[-1]))}", OTHER_MODEL)


def check_scheduler_class(name: str, found: Any, rules: Rules = DISCRETE) -> None:
    if found not in rules.schedulers:
        reason = f": {FLOW}" if "Flow" in str(found) else ""
        raise InputError(f"{name}: the scheduler {value_text(found)} is not supported{reason}", rules.scheduler_hint)


def check_entries(component: str, place: str, config: Mapping[str, Any], rules: Rules = DISCRETE) -> None:
    """Raises InputError for the first entry of a component's configuration that sid does not support; `place` names the file."""
    is_text = component.startswith("text_encoder")
    kind = "text_encoder" if is_text and component not in rules.values else component
    for entry, (allowed, reason) in rules.values[kind].items():
        if entry in config and not any(config[entry] is value or config[entry] == value for value in allowed):
            raise InputError(f"{place}: {entry} is {value_text(config[entry])}, which is not supported: {reason}", OTHER_MODEL)
    for entry, most in MAX_LAYERS.items():
        if any(type(number) is int and number > most for number in flattened(config.get(entry))):
            raise InputError(f"{place}: {entry} is {value_text(config[entry])}; {most} layers at most are built", OTHER_COPY)
    for entry in rules.accepted.get(kind, ()):
        if entry != "trained_betas" and isinstance(config.get(entry), list) and len(config[entry]) > MAX_LEVELS:
            raise InputError(f"{place}: {entry} has {len(config[entry])} values, {MAX_LEVELS} at most are read", OTHER_COPY)
    if is_text:  # only the entries that `Kind.text_config` selects are read
        return
    for entry, default in defaults(rules.classes.get(component) or config.get("_class_name", "DDIMScheduler")).items():
        known = entry in rules.accepted[kind] or entry in rules.values[kind]
        if not known and config.get(entry, default) not in (default, list(default) if isinstance(default, tuple) else default):
            raise InputError(f"{place}: {entry} is {value_text(config[entry])}, which is not supported", OTHER_MODEL)


def flattened(value: Any) -> list[Any]:
    """Return the values of nested lists as one list. A value that is not a list gives a list of length 1."""
    return [one for inner in value for one in flattened(inner)] if isinstance(value, list | tuple) else [value]


def defaults(name: str) -> dict[str, Any]:
    """Return the entries that diffusers knows for the configuration of its class `name`, with their default values."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not inspect.Parameter.empty}


def check_schedule(place: str, config: Mapping[str, Any]) -> None:
    """Raises InputError if the noise schedule is missing or invalid. The defaults of diffusers fit no Stable Diffusion model."""
    steps = positive_integer({"num_train_timesteps": 1000} | dict(config), "num_train_timesteps", place)
    betas = config.get("trained_betas")
    if steps > MAX_TIMESTEPS:
        raise InputError(f"{place}: num_train_timesteps is {steps}, more than {MAX_TIMESTEPS}", OTHER_COPY)
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != steps:
            raise InputError(f"{place}: trained_betas is not a list of {steps} numbers, one per timestep", OTHER_COPY)
        return
    for entry, (kinds, what) in BETAS.items():
        if config.get(entry) is None:
            raise InputError(f"{place}: {entry} is missing: nothing says which noise the model was trained with", OTHER_COPY)
        if not isinstance(config[entry], kinds):
            raise InputError(f"{place}: {entry} is {value_text(config[entry])}; it must be a {what}", OTHER_COPY)
        if entry != "beta_schedule" and not 0 <= config[entry] <= 1:
            raise InputError(f"{place}: {entry} is {value_text(config[entry])}; it must be between 0 and 1", OTHER_COPY)


def positive_integer(config: Mapping[str, Any], entry: str, place: str) -> int:
    """Return an entry that is a positive integer. Raises InputError, naming the entry, for any other value."""
    value = config.get(entry)
    if type(value) is not int or value < 1:
        found = f"{entry} is {value_text(value)}" if entry in config else f"{entry} is missing"
        raise InputError(f"{place}: {found}; it must be a positive whole number", OTHER_COPY)
    return value


def positive_integers(config: Mapping[str, Any], entry: str, place: str) -> list[int]:
    """Return an entry that is a list of positive integers. Raises InputError, naming the entry, for any other value."""
    value = config.get(entry)
    if not isinstance(value, list | tuple) or not value or not all(type(one) is int and one > 0 for one in value):
        found = f"{entry} is {value_text(value)}" if entry in config else f"{entry} is missing"
        raise InputError(f"{place}: {found}; it must be a list of positive whole numbers", OTHER_COPY)
    return list(value)


def value_text(value: Any) -> str:
    """Return a value as JSON text, truncated to 80 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a finite number."""
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def check_scale(place: str, config: Mapping[str, Any]) -> None:
    value = config.get("scaling_factor", 1.0)
    if not is_number(value) or value <= 0:
        raise InputError(f"{place}: scaling_factor is {value_text(value)}; it must be a positive number", OTHER_COPY)


def sides_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the two sides that sample_size defines, or None if it is invalid."""
    value = config.get("sample_size")
    sides: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        return None
    return sides[0], sides[1]
