"""Plan the training of published models, two LoRAs of rank 64, with each memory recipe, from their configurations alone.

    python -m tests.benchmarks.plans

Nothing is trained and no weights are read: this is `sid distill --dry-run --plan-for`. The configurations are those of the published
folders; tokenizers are small, as the plan only needs the number of tokens that the models read. Writes results/plans.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import Gemma2Config

from sidcli.files import write_json
from sidcli.models.families import BETAS, CLIP_L, FAMILIES, clip_tokenizer
from sidcli.settings import MEMORY
from tests.benchmarks.leaderboard import sid
from tests.tiny_sana import gemma_tokenizer
from tests.tiny_sd3 import t5_tokenizer

RESULT = Path(__file__).parent / "results" / "plans.json"
LORAS = ("--student-lora", 64, "--fake-lora", 64, "--batch-size", 32)
CLIP_G = {**CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_G |= {"hidden_act": "gelu", "projection_dim": 1280}
T5_XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
}
VAE = FAMILIES["sd1"].components["vae"]
VAE_16 = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}
MODELS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "SDXL": {
        "unet": ("UNet2DConditionModel", FAMILIES["sdxl"].components["unet"]),
        "vae": ("AutoencoderKL", FAMILIES["sdxl"].components["vae"]),
        "text_encoder": ("CLIPTextModel", FAMILIES["sdxl"].components["text_encoder"]),
        "text_encoder_2": ("CLIPTextModelWithProjection", FAMILIES["sdxl"].components["text_encoder_2"]),
        "scheduler": ("EulerDiscreteScheduler", {**BETAS, "prediction_type": "epsilon", "steps_offset": 1}),
    },
    "SD 3.5 medium": {
        "transformer": (
            "SD3Transformer2DModel",
            {
                "sample_size": 128,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "in_channels": 16,
                "out_channels": 16,
                "pos_embed_max_size": 384,
                "dual_attention_layers": list(range(13)),
                "qk_norm": "rms_norm",
                "patch_size": 2,
            },
        ),
        "vae": ("AutoencoderKL", {**VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        "text_encoder_3": ("T5EncoderModel", T5_XXL),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}),
    },
    "FLUX.1 dev": {
        "transformer": (
            "FluxTransformer2DModel",
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": [16, 56, 56],
            },
        ),
        "vae": ("AutoencoderKL", {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "text_encoder_2": ("T5EncoderModel", T5_XXL),
        "scheduler": (
            "FlowMatchEulerDiscreteScheduler",
            {
                "num_train_timesteps": 1000,
                "shift": 3.0,
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 1.15,
                "base_image_seq_len": 256,
                "max_image_seq_len": 4096,
            },
        ),
    },
    "SANA 1.6B": {
        "transformer": (
            "SanaTransformer2DModel",
            {
                "in_channels": 32,
                "out_channels": 32,
                "num_layers": 20,
                "num_attention_heads": 70,
                "attention_head_dim": 32,
                "num_cross_attention_heads": 20,
                "cross_attention_head_dim": 112,
                "cross_attention_dim": 2240,
                "caption_channels": 2304,
                "mlp_ratio": 2.5,
                "attention_bias": False,
                "sample_size": 32,
                "patch_size": 1,
                "norm_elementwise_affine": False,
                "norm_eps": 1e-6,
            },
        ),
        "vae": (
            "AutoencoderDC",
            {
                "latent_channels": 32,
                "attention_head_dim": 32,
                "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
                "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
                "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
                "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
                "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
                "decoder_layers_per_block": [3] * 6,
                "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                "upsample_block_type": "interpolate",
                "downsample_block_type": "Conv",
                "scaling_factor": 0.41407,
            },
        ),
        "text_encoder": ("Gemma2Model", Gemma2Config().to_dict()),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}),
    },
    "PixArt-Sigma": {
        "transformer": (
            "PixArtTransformer2DModel",
            {
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 28,
                "caption_channels": 4096,
                "cross_attention_dim": 1152,
                "attention_bias": True,
                "sample_size": 128,
                "patch_size": 2,
                "norm_type": "ada_norm_single",
                "norm_elementwise_affine": False,
                "use_additional_conditions": False,
            },
        ),
        "vae": ("AutoencoderKL", {**VAE, "scaling_factor": 0.13025, "sample_size": 1024}),
        "text_encoder": ("T5EncoderModel", T5_XXL),
        "scheduler": ("DPMSolverMultistepScheduler", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    },
}
"""Model -> component -> (class, published configuration). The pipeline's class is in PIPELINES."""
PIPELINES = {
    "SDXL": "StableDiffusionXLPipeline",
    "SD 3.5 medium": "StableDiffusion3Pipeline",
    "FLUX.1 dev": "FluxPipeline",
    "SANA 1.6B": "SanaPipeline",
    "PixArt-Sigma": "PixArtSigmaPipeline",
}


TOKENIZERS: dict[str, Callable[[], Any]] = {"T5EncoderModel": t5_tokenizer, "Gemma2Model": gemma_tokenizer}


def write_description(folder: Path, name: str) -> Path:
    """Write the folder of a pipeline with files without a tensor in the place of its weights."""
    index: dict[str, Any] = {"_class_name": PIPELINES[name]}
    for component, (kind, config) in MODELS[name].items():
        library = "transformers" if component.startswith("text") else "diffusers"
        index[component] = [library, kind]
        place = folder / component
        place.mkdir(parents=True)
        if component == "scheduler":
            write_json(place / "scheduler_config.json", {"_class_name": kind, **config})
            continue
        write_json(place / "config.json", {"_class_name": kind, **config})
        save_file({}, place / ("model.safetensors" if library == "transformers" else "diffusion_pytorch_model.safetensors"))
        if library == "transformers":
            tokenizer = component.replace("text_encoder", "tokenizer")
            words = TOKENIZERS.get(kind, lambda: clip_tokenizer("<|endoftext|>"))()
            index[tokenizer] = ["transformers", type(words).__name__]
            words.save_pretrained(folder / tokenizer)
    write_json(folder / "model_index.json", index)
    return folder


def planned(teacher: Path, memory: str) -> dict[str, Any]:
    """Return the plan of two LoRAs of rank 64 with a memory recipe, for a GPU that is not here."""
    more = ("--guidance-strategy", "long", "--guidance", 3.5) if teacher.name == "FLUX.1-dev" else ()
    place = ("--memory", memory, "--micro-batch", 1, "--dry-run", "--plan-for", "h100")
    found = sid("distill", "--teacher", teacher, *LORAS, *more, *place)
    return {"peak": found["peak"], "gpu": found["device_memory"], "main_memory": found["main_memory"]}


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        print(f"| model | {' | '.join(f'--memory {name}' for name in MEMORY)} | in CPU memory |")
        print(f"| --- |{' ---: |' * (len(MEMORY) + 1)}")
        for name in MODELS:
            teacher = write_description(Path(temporary) / name.replace(" ", "-"), name)
            plans = {memory: planned(teacher, memory) for memory in MEMORY}
            rows += [{"model": name, "memory": memory, **plan} for memory, plan in plans.items()]
            sizes = [*(plan["peak"] for plan in plans.values()), list(plans.values())[-1]["main_memory"]]
            cells = [f"{size / 1e9:.1f} GB" for size in sizes]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    write_json(RESULT, {"rows": rows})


if __name__ == "__main__":
    main()
