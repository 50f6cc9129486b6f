"""Plan the training of published models with two LoRAs on several GPUs, from their configurations alone, and print a table.

    python -m tests.benchmarks.plans

Nothing is trained and no weights are read: this is `sid distill --dry-run --plan-for`. The configurations are those of the published
folders; tokenizers are small, as the plan only needs the number of tokens that the models read. Writes results/plans.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sidcli.files import write_json
from sidcli.models.families import BETAS, CLIP_L, FAMILIES, clip_tokenizer
from tests.benchmarks.leaderboard import sid
from tests.tiny_sd3 import t5_tokenizer

RESULT = Path(__file__).parent / "results" / "plans.json"
GPUS = ("16gb", "24gb", "48gb", "80gb")
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
    "PixArt-Sigma": "PixArtSigmaPipeline",
}


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
            words = t5_tokenizer() if kind.startswith("T5") else clip_tokenizer("<|endoftext|>")
            index[tokenizer] = ["transformers", type(words).__name__]
            words.save_pretrained(folder / tokenizer)
    write_json(folder / "model_index.json", index)
    return folder


def planned(teacher: Path, gpu: str) -> dict[str, Any]:
    """Return the plan of two LoRAs of rank 64 on a GPU, with the memory recipe that `--memory auto` chooses."""
    more = ("--guidance-strategy", "long", "--guidance", 3.5) if "FLUX" in teacher.name else ()
    found = sid("distill", "--teacher", teacher, *LORAS, *more, "--dry-run", "--plan-for", gpu)
    config = {name: found["config"][name] for name in ("micro_batch", "offload_optimizer", "teacher_bf16", "width", "height")}
    return {"peak_gb": round(found["peak"] / 1e9, 1), "memory": found["device_memory"], **config}


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        print(f"| model | parameters | {' | '.join(GPUS)} |\n| --- | ---: |{' ---: |' * len(GPUS)}")
        for name in MODELS:
            teacher = write_description(Path(temporary) / name.replace(" ", "-"), name)
            plans = {gpu: planned(teacher, gpu) for gpu in GPUS}
            rows += [{"model": name, "gpu": gpu, **plan} for gpu, plan in plans.items()]
            cells = [f"{plan['peak_gb']:.1f} GB" for plan in plans.values()]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    write_json(RESULT, {"rows": rows})


if __name__ == "__main__":
    main()
