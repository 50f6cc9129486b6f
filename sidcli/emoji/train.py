"""Train the models of the emoji world from scratch. Anyone can run this again; each part resumes where it stopped.

    python -m sidcli.emoji.train vae        --output build/emoji
    python -m sidcli.emoji.train decoder    --output build/emoji    (the VAE's decoder, further)
    python -m sidcli.emoji.train text       --output build/emoji
    python -m sidcli.emoji.train teacher    --output build/emoji
    python -m sidcli.emoji.train teacher-v  --output build/emoji    (the teacher, tuned to predict v; for tests of that path)
    python -m sidcli.emoji.train classifier --output build/emoji
    python -m sidcli.emoji.train clip       --output build/emoji
    python -m sidcli.emoji.train teacher-more --output build/emoji --device cuda --seconds 330    (the shipped teacher, further)
    python -m sidcli.emoji.train reader     --output build/emoji    (the reader of identities)
    python -m sidcli.emoji.train sheets     --output build/emoji    (the shipped teacher, trained to draw identities and sheets)

A batch is a pure function of its step, so a resumed training sees what an uninterrupted one would have seen. Weights are kept in
float32 while training; `sidcli.emoji.pack` halves them and writes the folders that ship.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from sidcli.emoji import models, train_identities, world
from sidcli.emoji.classifier import Classifier
from sidcli.emoji.fit import Fit, Loss, check_same, degraded, half_precision
from sidcli.errors import InputError
from sidcli.files import atomic_folder, write_json
from sidcli.formats.diffusers_folder import write_pipeline
from sidcli.formats.order import Order
from sidcli.models.codec import Codec
from sidcli.models.loading import Model, load
from sidcli.models.sources import WEIGHTS, Source, fingerprint
from sidcli.randomness import key, normal, numpy_generator, torch_generator, uniform

HALF_LIFE = 200_000
"""Half-life in images of the averaged weights of a teacher that is trained further."""


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


FILLERS = (
    "very",
    "photo",
    "sitting",
    "please",
    "there",
    "is",
    "and",
    "in",
    "of",
    "really",
    "near",
    "under",
    "portrait",
    "style",
    "4k",
)


def loose_caption(picture: world.Scene, index: int) -> world.Caption:
    """Return a training caption. 30 % of the captions contain filler words, so that models learn to ignore additional words."""
    text, color = world.caption(picture, world.TEACHER_SEED, index, "train")
    rng = numpy_generator(world.TEACHER_SEED, "fillers", index)
    if rng.random() < 0.3:
        words = text.split(" ")
        for _ in range(rng.integers(1, 4)):
            words.insert(rng.integers(len(words) + 1), FILLERS[rng.integers(len(FILLERS))])
        text = " ".join(words)
    return world.Caption(text, color)


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


def bf16_on_gpu(device: torch.device) -> torch.autocast:
    """Return a bf16 autocast that has no effect on a CPU, where bf16 is 20 times slower than float32 without instructions for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


class Examples(NamedTuple):
    """Scenes and captions as networks see them: latents float16 [N, 4, 16, 16], and states of the captions float16 [N, 24, 128]."""

    latents: Tensor
    states: Tensor


def bare_scene(position: int) -> world.Scene:
    """Return scene `position` of those whose caption is a noun alone: all nouns in turn, each on all its backgrounds in turn.

    The pairs in HELD_OUT_PAIRS are left out.
    """
    count = len(world.NOUN_LIST)
    noun = world.NOUN_LIST[position % count]
    colors = [color for color in world.COLOR_LIST if (noun, color) not in world.HELD_OUT_PAIRS]
    return replace(world.scene(world.TEACHER_SEED, position), noun=noun, color=colors[position // count % len(colors)])


def example(index: int, bare: float) -> tuple[world.Scene, str]:
    """Return scene `index` and its caption. Captions of a share `bare` of the scenes are a noun alone, evenly spread over the list."""
    position = math.floor(index * bare)
    if math.floor((index + 1) * bare) > position:
        return bare_scene(position), world.bare_caption(position)
    picture = world.scene(world.TEACHER_SEED, index)
    return picture, loose_caption(picture, index).text


def draw_examples(indices: range, bare: float, tokenizer: CLIPTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [B, 64, 64, 3] and token ids int64 [B, 24] of examples.

    It computes without torch, whose threads a forked process lacks.
    """
    drawn = [example(index, bare) for index in indices]
    pixels = np.stack([world.render(picture) for picture, _ in drawn])
    return pixels, models.token_ids(tokenizer, [text for _, text in drawn])


def make_examples(teacher: Model, count: int, bare: float, device: torch.device) -> Examples:
    """Return `count` examples on the device. All cores draw them; the device encodes them with the networks of the teacher."""
    parts = [range(start, min(start + 1000, count)) for start in range(0, count, 1000)]
    latents, states = [], []
    with ProcessPoolExecutor() as cores, torch.no_grad():
        drawn = cores.map(partial(draw_examples, bare=bare, tokenizer=teacher.tokenizers[0]), parts)
        codec, encoder = Codec(teacher.vae.to(device)), teacher.text_encoders[0].to(device)  # the processes are older than CUDA
        for pixels, tokens in drawn:
            x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            with bf16_on_gpu(device):
                latents.append(codec.encode(x).half().contiguous())
            states.append(encoder(torch.from_numpy(tokens).to(device)).last_hidden_state.half())
    return Examples(torch.cat(latents), torch.cat(states))


def denoising_loss(unet: nn.Module, examples: Examples, empty: Tensor, batch: int, name: str) -> Loss:
    """Return the loss of epsilon prediction, with min-SNR weight 5 and a tenth of the captions replaced by `empty` [24, 128].

    All of its inputs are on the device of the examples, and it draws its random numbers there.
    """
    device, count = examples.latents.device, len(examples.latents)
    alphas_cumprod = models.new_scheduler().alphas_cumprod.to(device)
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    weight = snr.clamp(max=5.0) / snr
    samples = torch.arange(batch, device=device)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = torch.Generator(device).manual_seed(key(0, name, step))
        rows = (samples + step * batch) % count
        x = examples.latents[rows].float()
        dropped = torch.rand(batch, 1, 1, generator=drawn, device=device) < 0.1
        states = torch.where(dropped, empty, examples.states[rows].float())
        # One timestep from each of `batch` equal intervals, in random order, as in `train_teacher`.
        t = ((samples + torch.rand(batch, generator=drawn, device=device)) * (1000 / batch)).long().clamp(max=999)
        t = t[torch.randperm(batch, generator=drawn, device=device)]
        noise = torch.randn(x.shape, generator=drawn, device=device)
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
    examples = make_examples(teacher, scenes, bare, place)
    print(f"{name}: {scenes} scenes in {time.monotonic() - began:.0f} s", flush=True)
    unet = teacher.denoiser.to(place).requires_grad_(True)
    tokenizer, encoder = teacher.tokenizers[0], teacher.text_encoders[0]
    with torch.no_grad():
        empty = encoder(models.tokens(tokenizer, [""]).to(place)).last_hidden_state[0]
    loss = denoising_loss(unet, examples, empty, batch, name)
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


def main() -> None:
    parts: dict[str, tuple[Callable[..., None], int]] = {
        "vae": (train_vae, 2600),
        "decoder": (train_decoder, 2500),
        "text": (train_text, 900),
        "teacher": (train_teacher, 8600),
        "teacher-v": (partial(train_teacher, v_prediction=True), 1000),
        "teacher-more": (train_teacher_further, 5000),
        "classifier": (train_classifier, 1000),
        "clip": (train_clip, 450),
        "reader": (train_identities.train_reader, 1500),
        "sheets": (train_identities.train_sheets, 6000),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="part", required=True)
    for name, (_, steps) in parts.items():
        options = names.add_parser(name, argument_default=argparse.SUPPRESS)
        options.add_argument("--output", type=Path, default=Path("build/emoji"))
        length = options.add_mutually_exclusive_group()
        length.add_argument("--steps", type=int, default=steps, help=f"default: {steps}")
        if name == "teacher-more":
            length.add_argument("--seconds", type=float, help="train for this time instead of --steps")
            options.add_argument("--device", help="default: cpu")
            options.add_argument("--batch", type=int, help="images per step; default: 512")
            options.add_argument("--scenes", type=int, help="scenes to learn from, 8 kB each on the device; default: 200000")
            options.add_argument("--bare", type=float, help="share of the captions that are a noun alone; default: 1/3")
            options.add_argument("--start", type=Path, help="folder of the teacher; default: the shipped one")
            options.add_argument("--lr", type=float, help="highest learning rate; default: 5e-4")
        if name == "sheets":
            length.add_argument("--seconds", type=float, help="train for this time instead of --steps")
            options.add_argument("--device", help="default: cpu")
            options.add_argument("--batch", type=int, help="panels per step; default: 32")
            options.add_argument("--lr", type=float, help="highest learning rate; default: 1e-3")
    given = vars(parser.parse_args())
    torch.manual_seed(0)  # for the initial weights; all later random numbers come from sidcli.randomness
    parts[given.pop("part")][0](**given)


if __name__ == "__main__":
    main()
