"""Train the models of the emoji world from scratch. Anyone can run this again; each part resumes where it stopped.

    python -m sidcli.emoji.train vae        --output build/emoji
    python -m sidcli.emoji.train decoder    --output build/emoji    (the VAE's decoder, further)
    python -m sidcli.emoji.train text       --output build/emoji
    python -m sidcli.emoji.train teacher    --output build/emoji
    python -m sidcli.emoji.train teacher-v  --output build/emoji    (the teacher, tuned to predict v; for tests of that path)
    python -m sidcli.emoji.train classifier --output build/emoji
    python -m sidcli.emoji.train clip       --output build/emoji
    python -m sidcli.emoji.train teacher-more --output build/emoji --device cuda --seconds 330    (the shipped teacher, further)
    python -m sidcli.emoji.train flow       --output build/emoji    (a transformer of flow matching, on the shipped VAE and text encoder)
    python -m sidcli.emoji.train reader     --output build/emoji    (the reader of identities)
    python -m sidcli.emoji.train sheets     --output build/emoji    (the shipped teacher, trained to draw identities and sheets)

A batch is a pure function of its step, so a resumed training sees what an uninterrupted one would have seen. Weights are kept in
float32 while training; `sidcli.emoji.pack` halves them and writes the folders that ship.
"""

from __future__ import annotations

import argparse
import inspect
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from sidcli.emoji import models, train_flow, train_identities, world
from sidcli.emoji.classifier import Classifier
from sidcli.emoji.examples import FILLERS, Examples, draw_batch, encoded_empty, loose_caption, make_examples
from sidcli.emoji.fit import HALF_LIFE, Fit, Loss, bf16_on_gpu, check_same, degraded, half_precision
from sidcli.errors import InputError
from sidcli.files import atomic_folder, write_json
from sidcli.formats.diffusers_folder import write_pipeline
from sidcli.formats.order import Order
from sidcli.models.codec import Codec
from sidcli.models.loading import load, quiet_libraries
from sidcli.models.sources import WEIGHTS, Source, fingerprint
from sidcli.randomness import normal, torch_generator, uniform


def images(seed: int, indices: range) -> Tensor:
    """Return scenes as float32 [B, 3, 64, 64] in -1..1."""
    return torch.from_numpy(world.render_many(seed, indices)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def reconstruction_loss(y: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of L1, squared and edge errors of decoded images y against x, and L1 and MSE for the log.

    Both y and x are [B, 3, 64, 64] in -1..1.
    """

    def edges(image: Tensor) -> tuple[Tensor, Tensor]:
        return image[..., 1:] - image[..., :-1], image[..., 1:, :] - image[..., :-1, :]

    pixels, squares = F.l1_loss(y, x), F.mse_loss(y, x)
    contours = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
    return pixels + 2 * squares + 0.5 * contours, {"l1": pixels.detach(), "mse": squares.detach()}


def train_vae(output: Path, steps: int, batch: int = 16) -> None:
    vae = models.new_vae()

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = images(world.TEACHER_SEED, range(step * batch, (step + 1) * batch))
        with half_precision():
            posterior = vae.encode(x).latent_dist
            noise = normal(posterior.mean.shape[1:], 0, "vae", step, range(batch))
            y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        total, parts = reconstruction_loss(y, x)
        return total + 1e-4 * divergence, parts | {"kl": divergence.detach()}

    Fit("vae", vae, loss, output, steps, lr=2e-3, decay=0.995).run()
    with torch.no_grad():
        latents = torch.cat([vae.encode(images(world.TEACHER_SEED, range(i, i + 50))).latent_dist.mean for i in range(0, 500, 50)])
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    vae.save_pretrained(output / "vae")


def train_decoder(output: Path, steps: int, batch: int = 16) -> None:
    """Train the decoder further, alone. The latents do not change, so networks trained on them need no further training.

    Noise on the latents (5 % of their standard deviation) imitates the errors of generated latents.
    """
    vae = AutoencoderKL.from_pretrained(output / "vae").eval().requires_grad_(False)
    net = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = images(world.TEACHER_SEED, range(step * batch, (step + 1) * batch))
        with torch.no_grad(), half_precision():
            latents = vae.encode(x).latent_dist.mean.float()
        noise = normal(latents.shape[1:], 0, "decoder", step, range(batch))
        with half_precision():
            y = vae.decode(latents + 0.05 / vae.config.scaling_factor * noise).sample.float()
        return reconstruction_loss(y, x)

    Fit("decoder", net, loss, output, steps, lr=1e-3, decay=0.995).run()
    vae.save_pretrained(output / "vae")


def train_text(output: Path, steps: int, batch: int = 96) -> None:
    """Train the text encoder to predict the noun and the background color of a caption; afterwards it is frozen.

    The UNet therefore gets an informative cond from its first step, and captions are encoded without gradients.
    """
    captions = [loose_caption(world.scene(world.TEACHER_SEED, index), index).text for index in range(20000)]
    tokenizer = models.new_tokenizer([*captions, *FILLERS])
    encoder = models.new_text_encoder(tokenizer)
    heads = nn.Linear(models.TEXT_WIDTH, len(world.NOUN_LIST) + len(world.COLOR_LIST) + 1)
    net = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        indices = range(step * batch, (step + 1) * batch)
        scenes = [world.scene(world.TEACHER_SEED, index) for index in indices]
        captions = [loose_caption(picture, index) for picture, index in zip(scenes, indices, strict=True)]
        nouns = torch.tensor([world.NOUN_LIST.index(picture.noun) for picture in scenes])
        asked = [*world.COLOR_LIST, None]
        colors = torch.tensor([asked.index(caption.color) for caption in captions])
        states = encoder(models.tokens(tokenizer, [caption.text for caption in captions])).last_hidden_state
        # The last position is padding, which attends to the whole caption.
        noun_logits, color_logits = heads(states[:, -1]).split([len(world.NOUN_LIST), len(world.COLOR_LIST) + 1], dim=1)
        total = F.cross_entropy(noun_logits, nouns) + F.cross_entropy(color_logits, colors)
        right = (noun_logits.argmax(1) == nouns) & (color_logits.argmax(1) == colors)
        return total, {"loss": total.detach(), "both_right": right.float().mean()}

    Fit("text", net, loss, output, steps, lr=1e-3, decay=0.99).run()
    encoder.save_pretrained(output / "text_encoder")
    tokenizer.save_pretrained(output / "tokenizer")


def cached_latents(output: Path, count: int) -> Tensor:
    """Return scaled latents float16 [count, 4, 16, 16] of the training scenes. They are encoded once and stored on disk."""
    file = output / "latents.safetensors"
    if file.exists():
        return load_file(file)["latents"]
    vae = AutoencoderKL.from_pretrained(output / "vae").eval()
    rows = []
    with torch.no_grad(), half_precision():
        for start in range(0, count, 100):
            rows.append(Codec(vae).encode(images(world.TEACHER_SEED, range(start, start + 100))).half().contiguous())
            if start % 5000 == 0:
                print(f"latents {start}/{count}", flush=True)
    latents = torch.cat(rows).contiguous()
    save_file({"latents": latents}, file)
    return latents


def train_teacher(output: Path, steps: int, batch: int = 32, scenes: int = 40000, v_prediction: bool = False) -> None:
    """Train a teacher: epsilon prediction on cached latents, min-SNR weight 5 (arXiv 2303.09556), a tenth of the captions empty.

    If `v_prediction`, the finished teacher is trained further with v prediction and the same weight on the clean latents' error.
    """
    name = "teacher-v" if v_prediction else "teacher"
    latents = cached_latents(output, scenes)
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(output / "text_encoder").eval()
    unet = UNet2DConditionModel.from_pretrained(output / "teacher" / "unet") if v_prediction else models.new_unet()
    alphas_cumprod = models.new_scheduler().alphas_cumprod
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    weight = snr.clamp(max=5.0) / (snr + 1.0 if v_prediction else snr)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        samples = range(batch)
        indices = [step * batch + sample for sample in samples]
        x = latents[[index % scenes for index in indices]].float()
        texts = [loose_caption(world.scene(world.TEACHER_SEED, index % scenes), index).text for index in indices]
        dropped = uniform(0, "teacher dropout", step, samples) < 0.1
        texts = ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]
        # One timestep from each of `batch` equal intervals: the distribution is still uniform, with less variance.
        offset = uniform(0, "teacher timestep", step, samples)
        t = ((torch.arange(batch) + offset) * (1000 / batch)).long().clamp(max=999)
        t = t[torch.randperm(batch, generator=torch_generator(0, "teacher order", step))]
        noise = normal(x.shape[1:], 0, "teacher noise", step, samples)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        with torch.no_grad():
            states = encoder(models.tokens(tokenizer, texts)).last_hidden_state
        with half_precision():
            predicted = unet(a.sqrt() * x + (1.0 - a).sqrt() * noise, t, states).sample.float()
        target = a.sqrt() * noise - (1.0 - a).sqrt() * x if v_prediction else noise
        error = (predicted - target).square().mean((1, 2, 3))
        return (weight[t] * error).mean(), {"mse": error.mean().detach(), "weighted": (weight[t] * error).mean().detach()}

    def pipeline() -> StableDiffusionPipeline:
        vae = AutoencoderKL.from_pretrained(output / "vae").eval()
        pipe = models.new_pipeline(vae, encoder, tokenizer, unet.eval())
        if v_prediction:
            pipe.scheduler.register_to_config(prediction_type="v_prediction")
        return pipe

    def probe() -> str:
        pipe = pipeline()
        pipe.set_progress_bar_config(disable=True)
        prompts = [world.caption(world.scene(world.PROMPT_SEED, index), 0, index, "eval", 1.0).text for index in range(32)]
        with half_precision():
            pictures = pipe(prompts, num_inference_steps=20, guidance_scale=2.0, generator=torch_generator(0, "probe")).images
        sheet = Image.new("RGB", (8 * 64, 4 * 64))
        for index, picture in enumerate(pictures):
            sheet.paste(picture, (index % 8 * 64, index // 8 * 64))
        file = output / f"{name}-{fit.step:06d}.png"
        sheet.save(file)
        return str(file)

    fit = Fit(name, unet, loss, output, steps, lr=3e-4 if v_prediction else 1e-3)
    fit.run(probe, probe_steps=1000)
    pipeline().save_pretrained(output / name)
    write_json(output / name / "sid.json", {"kind": "teacher", "world": "emoji", "guidance": 3.0, "steps_trained": steps})


def denoising_loss(unet: nn.Module, examples: Examples, empty: tuple[Tensor, ...], batch: int, name: str) -> Loss:
    """Return the loss of epsilon prediction, with min-SNR weight 5 and a tenth of the captions replaced by `empty`.

    All of its inputs are on the device of the examples, and it draws its random numbers there.
    """
    device = examples.latents.device
    alphas_cumprod = models.new_scheduler().alphas_cumprod.to(device)
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    weight = snr.clamp(max=5.0) / snr

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, (states,), shares, noise = draw_batch(examples, empty, batch, step, name)
        t = (1000 * shares).long().clamp(max=999)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        with bf16_on_gpu(device):
            predicted = unet(a.sqrt() * x + (1.0 - a).sqrt() * noise, t, states).sample.float()
        error = (predicted - noise).square().mean((1, 2, 3))
        weighted = (weight[t] * error).mean()
        return weighted, {"mse": error.mean().detach(), "weighted": weighted.detach()}

    return loss


def train_teacher_further(
    output: Path,
    steps: int,
    batch: int = 512,
    seconds: float | None = None,
    device: str = "cpu",
    start: Path = WEIGHTS / "teacher",
    scenes: int = 200_000,
    bare: float = 1 / 3,
    lr: float = 5e-4,
) -> None:
    """Train the teacher in the folder `start` further, for `steps`, or for `seconds` if they are given, and write it in half
    precision to `output`/teacher-more.

    It learns from `scenes` scenes. The captions of a share `bare` of them are nouns alone, so that no background is preferred where
    the prompt names none. A scene takes 8 kB on the device. Raises InputError if `start` is not a teacher of the emoji world that
    predicts epsilon, or if `output` holds a training with other settings.
    """
    name, place = "teacher-more", torch.device(device)
    teacher = load(Source("teacher", start, str(start)))
    if teacher.is_student or not teacher.is_emoji or teacher.path.prediction != "epsilon":
        raise InputError(f"{start} is not a teacher of the emoji world that predicts epsilon", "leave --start out")
    check_same(
        output / f"{name}.json", {"start": fingerprint(teacher.source), "scenes": scenes, "bare": bare, "batch": batch, "lr": lr}
    )
    began = time.monotonic()
    tokenizer, encoder = teacher.tokenizers[0], teacher.text_encoders[0]

    def encode(tokens: Tensor) -> tuple[Tensor, ...]:
        return (encoder(tokens).last_hidden_state,)

    examples = make_examples(teacher, encode, scenes, bare, place)
    print(f"{name}: {scenes} scenes in {time.monotonic() - began:.0f} s", flush=True)
    unet = teacher.denoiser.to(place).requires_grad_(True)
    loss = denoising_loss(unet, examples, encoded_empty(tokenizer, encode, place), batch, name)
    fit = Fit(name, unet, loss, output, steps, lr, decay=0.5 ** (batch / HALF_LIFE), seconds=seconds)
    fit.run()
    card = teacher.card | {"steps_trained": teacher.card.get("steps_trained", 0) + fit.step}
    with atomic_folder(output / name) as folder:
        write_pipeline(folder, teacher, models.new_scheduler(), card, Order("fp16"))


def metric_batch(step: int, batch: int) -> tuple[list[world.Scene], Tensor]:
    """Return scenes for the metric networks, every twentieth with a held-out pair, and their degraded images."""
    indices = range(step * batch, (step + 1) * batch)
    scenes = [world.scene(world.METRIC_SEED, index, held_out=index % 20 == 0) for index in indices]
    pixels = torch.stack([torch.from_numpy(world.render(picture)) for picture in scenes]).permute(0, 3, 1, 2).float()
    return scenes, degraded(pixels, step)


def train_classifier(output: Path, steps: int, batch: int = 64) -> None:
    net = Classifier()

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        scenes, pixels = metric_batch(step, batch)
        nouns = torch.tensor([world.NOUN_LIST.index(picture.noun) for picture in scenes])
        colors = torch.tensor([world.COLOR_LIST.index(picture.color) for picture in scenes])
        with half_precision():
            noun_logits, color_logits = net(pixels)
        total = F.cross_entropy(noun_logits.float(), nouns) + F.cross_entropy(color_logits.float(), colors)
        right = {"noun": noun_logits.argmax(1) == nouns, "color": color_logits.argmax(1) == colors}
        return total, {"loss": total.detach(), **{name: hit.float().mean() for name, hit in right.items()}}

    Fit("classifier", net, loss, output, steps, lr=2e-3, decay=0.99).run()
    save_file(net.state_dict(), output / "classifier.safetensors")


def train_clip(output: Path, steps: int, batch: int = 128) -> None:
    """Train a small open_clip model like CLIP: to predict which caption of the batch belongs to which image."""
    from sidcli.emoji.clip import new_clip

    net, tokenizer = new_clip()

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        scenes, pixels = metric_batch(step, batch)
        indices = range(step * batch, (step + 1) * batch)
        texts = [
            world.caption(picture, world.METRIC_SEED, index, "train", 0.9).text
            for picture, index in zip(scenes, indices, strict=True)
        ]
        # Several images of a batch may match a caption equally well; the target is then uniform over them.
        same = torch.tensor([[a.noun == b.noun and a.color == b.color for a in scenes] for b in scenes]).float()
        target = same / same.sum(1, keepdim=True)
        with half_precision():
            image = F.normalize(net.encode_image(pixels / 127.5 - 1.0).float(), dim=1)
            text = F.normalize(net.encode_text(tokenizer(texts)).float(), dim=1)
        logits = net.logit_scale.exp().clamp(max=50.0) * image @ text.T
        total = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return total, {"loss": total.detach(), "right": right}

    Fit("clip", net, loss, output, steps, lr=1e-3, decay=0.99).run()
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, output / "clip.safetensors")


OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "device": (str, "where to train"),
    "batch": (int, "images per step"),
    "scenes": (int, "scenes to learn from; they stay on the device, with 8 to 9 kB each"),
    "bare": (float, "share of the captions that are a noun alone"),
    "start": (Path, "folder of the teacher to train further"),
    "lr": (float, "highest learning rate"),
}
"""Parameter of a training for any device -> type and help text of its option."""


def main() -> None:
    parts: dict[str, tuple[Callable[..., None], int]] = {
        "vae": (train_vae, 2600),
        "decoder": (train_decoder, 2500),
        "text": (train_text, 900),
        "teacher": (train_teacher, 8600),
        "teacher-v": (partial(train_teacher, v_prediction=True), 1000),
        "teacher-more": (train_teacher_further, 5000),
        "flow": (train_flow.train_flow, 12_000),
        "classifier": (train_classifier, 1000),
        "clip": (train_clip, 450),
        "reader": (train_identities.train_reader, 1500),
        "sheets": (train_identities.train_sheets, 6000),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="part", required=True)
    for name, (train, steps) in parts.items():
        options = names.add_parser(name, argument_default=argparse.SUPPRESS)
        options.add_argument("--output", type=Path, default=Path("build/emoji"))
        length = options.add_mutually_exclusive_group()
        length.add_argument("--steps", type=int, default=steps, help=f"default: {steps}")
        parameters = inspect.signature(train).parameters
        if "device" not in parameters:
            continue
        length.add_argument("--seconds", type=float, help="train for this time instead of --steps")
        for option, (kind, text) in OPTIONS.items():
            if option in parameters:
                options.add_argument(f"--{option}", type=kind, help=f"{text}; default: {parameters[option].default}")
    given = vars(parser.parse_args())
    part = given.pop("part")
    quiet_libraries()
    torch.manual_seed(0)  # for the initial weights; all later random numbers come from sidcli.randomness
    parts[part][0](**given)
    print(ending(part, given["output"]), flush=True)


def ending(part: str, output: Path) -> str:
    """Return where a part was written, and of a teacher the command that distills it."""
    folder = output / part
    is_teacher = (folder / "model_index.json").is_file()
    return (
        f"{part}: wrote {folder}; next: sid distill --teacher {shlex.quote(str(folder))}"
        if is_teacher
        else f"{part}: wrote {output}"
    )


if __name__ == "__main__":
    main()
