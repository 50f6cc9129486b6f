"""Export of a student as graphs without options: token ids -> states, and (noise, states) -> images. All constants are inside.
A student that takes a reference image gets it as a third input.

The formats onnx, openvino and torch-export write these graphs. A program that runs them needs a tokenizer and standard normal
noise, but no diffusion library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sidcli.diffusion.path import DiscretePath
from sidcli.diffusion.sampling import few_steps
from sidcli.formats.card import PROMPT, write_card
from sidcli.formats.diffusers_folder import save_tokenizer
from sidcli.formats.order import DTYPES, Order
from sidcli.formats.runtime import GENERATOR
from sidcli.models.codec import Codec
from sidcli.models.drawing import Plan, sizes
from sidcli.models.kind import Cond, tokenizer_of
from sidcli.models.loading import Model
from sidcli.models.reference import layout_of
from sidcli.models.sampler import plan_for

USAGE = """```python
import numpy as np
{imports}
from PIL import Image
from transformers import CLIPTokenizer


def run(name, **inputs):
{run}


def tokens(name, length):
    tokenizer = CLIPTokenizer.from_pretrained(f"FOLDER/{{name}}")
    ids = tokenizer(["{prompt}"], padding="max_length", truncation=True, max_length=length).input_ids
    return np.array(ids, np.int64)


noise = np.random.default_rng(0).standard_normal({noise}, np.float32)
{draw}
pixels = (255 * images[0].transpose(1, 2, 0)).round().astype(np.uint8)
Image.fromarray(pixels).save("cat.png")
```

`FOLDER` is this folder. The graphs take any batch size. {sizes} Timesteps, noise schedule and VAE scale are inside. {precision}

As noise, `torch.randn({noise}, generator=torch.Generator().manual_seed(SEED)).numpy()` gives the image that `sid sample` draws for
`SEED`.{sid}"""
SID = """ It also runs these graphs: `sid sample "{prompt}" --model FOLDER`"""
DRAW = """states, = run("text_encoder", tokens=tokens("tokenizer", {lengths[0]}))
images, = run("generator", noise=noise, states=states)"""
DRAW_XL = """first, = run("text_encoder", tokens=tokens("tokenizer", {lengths[0]}))
second, text_embeds = run("text_encoder_2", tokens=tokens("tokenizer_2", {lengths[1]}))
states = np.concatenate([first, second], axis=-1)
# original height and width, crop from top and left, height and width
time_ids = np.array([{time_ids}], np.float32)
images, = run("generator", noise=noise, states=states, text_embeds=text_embeds, time_ids=time_ids)"""


READ_REFERENCE = """reference = Image.open("reference.png").convert("RGB").resize({size})
reference = np.asarray(reference, np.float32).transpose(2, 0, 1)[None] / 255
"""


class Drawing(nn.Module):
    """A module that computes images [B, 3, H, W] in 0..1 from noise [B, C, h, w] and states [B, tokens, width].

    For SDXL it also takes text_embeds [B, P] and time_ids [B, 6].
    """

    def __init__(self, model: Model, plan: Plan, dtype: torch.dtype):
        super().__init__()
        self.denoiser, self.vae = copy.deepcopy(model.denoiser).to(dtype), copy.deepcopy(model.vae)
        self.vae.to(torch.float32 if stays_float32(model, dtype) else dtype)
        self.kind, self.path, self.plan = model.kind, model.path, plan
        assert isinstance(self.path, DiscretePath) and self.path.values  # computed before the graph is traced

    def forward(self, noise: Tensor, states: Tensor, text_embeds: Tensor | None = None, time_ids: Tensor | None = None) -> Tensor:
        return self.drawn(noise, states, None, text_embeds, time_ids)

    def drawn(
        self, noise: Tensor, states: Tensor, reference: Tensor | None, text_embeds: Tensor | None, time_ids: Tensor | None
    ) -> Tensor:
        """Return the images. `reference` are the latents [B, C, h, w] of reference images, if the denoiser takes them."""
        # text_embeds stay float32: the UNet concatenates them with an embedding of time_ids that is always float32 and converts the
        # result, and ONNX cannot concatenate tensors of different types.
        added = {} if text_embeds is None or time_ids is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        known = None if reference is None else reference.to(self.denoiser.dtype)
        cond = Cond(states.to(self.denoiser.dtype), added, known)
        latents = few_steps(
            lambda x, t: self.kind.denoise(self.denoiser, x.to(self.denoiser.dtype), t, cond),
            lambda _: noise,
            self.path,
            self.plan.grid,
            self.plan.renoise,
        )
        layout = layout_of(self.denoiser.config)
        return Codec(self.vae).decode(layout.target(latents) if layout else latents)


class ReferenceDrawing(Drawing):
    """The same for a student that takes reference images: float32 [B, 3, H, W] in 0..1 after the states."""

    def forward(  # type: ignore[override]
        self,
        noise: Tensor,
        states: Tensor,
        reference: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        return self.drawn(noise, states, Codec(self.vae).encode(2.0 * reference - 1.0), text_embeds, time_ids)


def example_references(model: Model) -> np.ndarray | None:
    """Return a reference image uint8 [1, H, W, 3] for the verification of an export; None if the model takes none."""
    if model.layout is None:
        return None
    rows, columns = np.indices(model.size)
    return np.stack([rows * 5 % 256, columns * 3 % 256, (rows + columns) % 256], -1).astype(np.uint8)[None]


def stays_float32(model: Model, dtype: torch.dtype) -> bool:
    """Return whether the VAE stays in float32 because it overflows in float16, like SDXL's. diffusers decodes in float32, too."""
    return dtype == torch.float16 and bool(model.vae.config.force_upcast)


class Text(nn.Module):
    """A module that computes states [B, tokens, width] from token ids int64 [B, tokens] with one text encoder of a model.

    For the second text encoder of SDXL it also returns the pooled text_embeds [B, P].
    """

    def __init__(self, encoder: nn.Module, beside_another: bool):
        super().__init__()
        self.encoder, self.beside_another = encoder, beside_another

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.beside_another:
            return self.encoder(tokens).last_hidden_state
        output = self.encoder(tokens, output_hidden_states=True)
        states = output.hidden_states[-2]
        return (states, output.text_embeds) if "text_embeds" in output else states


Writer = Callable[[nn.Module, dict[str, Tensor], list[str], Path, dict[str, dict[int, str]]], None]
"""(module, example inputs by name, output names, file without suffix, dynamic axes by input) -> None."""


def write_graphs(folder: Path, model: Model, order: Order, write_one: Writer, kind: str, imports: str, run: str) -> None:
    """Write one graph for each text encoder, one graph for the UNet and the VAE decoder, and the tokenizers.

    `kind` is the value of --format. `imports` and `run` are Python code for the example in the model card: `run` is the body of a
    function that runs the graph `name` with numpy `inputs` and returns a list of outputs.
    """
    plan = plan_for(model)
    inputs: dict[str, Tensor] = {"noise": torch.zeros(2, *model.latent_shape)}
    states, lengths = [], []
    for name, encoder, tokenizer in zip(model.texts, model.text_encoders, model.tokenizers, strict=True):
        text = Text(encoder, model.is_xl)
        lengths.append(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))
        tokens = torch.zeros(2, lengths[-1], dtype=torch.long)
        outputs = text(tokens)
        states.append(outputs if isinstance(outputs, Tensor) else outputs[0])
        titles = ["states"] if isinstance(outputs, Tensor) else ["states", "text_embeds"]
        write_one(text, {"tokens": tokens}, titles, folder / name, {"tokens": {0: "batch"}})
        save_tokenizer(tokenizer, folder / tokenizer_of(name))
        if not isinstance(outputs, Tensor):
            pooled = outputs[1]
    inputs["states"] = torch.cat(states, dim=-1)
    if model.layout:
        inputs["reference"] = torch.zeros(2, 3, *model.size)
    if model.is_xl:
        inputs |= {"text_embeds": pooled, "time_ids": torch.tensor(sizes(*model.size)).repeat(2, 1)}
    axes = {name: {0: "batch"} for name in inputs}
    multiple = size_step(model)
    if multiple:
        axes["noise"] |= {2: "height", 3: "width"}
    drawing = (ReferenceDrawing if model.layout else Drawing)(model, plan, order.torch_dtype)
    write_one(drawing, inputs, ["images"], folder / GENERATOR, axes)
    facts = {
        "format": kind,
        "latent_shape": model.latent_shape,
        "size": model.size,
        "multiple": multiple,
        "tokens": lengths,
        **({"reference": True} if model.layout else {}),
    }
    draw = (DRAW_XL if model.is_xl else DRAW).format(lengths=lengths, time_ids=[int(side) for side in sizes(*model.size)])
    if model.layout:
        draw = READ_REFERENCE.format(size=model.size[::-1]) + draw.replace("states=states", "states=states, reference=reference")
    usage = USAGE.format(
        imports=imports,
        run=run,
        prompt=PROMPT,
        noise=(1, *model.latent_shape),
        draw=draw,
        sizes=_sizes(model, multiple),
        precision=_precision(model, order),
        sid="" if kind == "torch-export" else SID.format(prompt=PROMPT),
    )
    write_card(folder, model, model.card | {"format": kind, "dtype": order.dtype, "graph": facts}, usage)


def size_step(model: Model) -> int:
    """Return the pixel step of a graph: width and height of its images must be multiples of it; 0 if the size is fixed.

    A UNet halves its latent at every level. The size is fixed if a side becomes 1 or odd, because tracing treats a side of 1 as a
    constant and an odd side as a special case.
    """
    if model.layout:  # the shape of the reference follows from that of the noise
        return 0
    step = 2 ** (len(model.denoiser.config.block_out_channels) - 1)
    sides = model.latent_shape[1:]
    return step * model.codec.factor if all(side % step == 0 and side > step for side in sides) else 0


def _sizes(model: Model, multiple: int) -> str:
    height, width = model.size
    if not multiple:
        return f"The size is fixed: {width} x {height} pixels."
    factor = model.codec.factor
    ids = ", and `time_ids` says both in pixels" if model.is_xl else ""
    return (
        f"Width and height may be any multiples of {multiple} pixels: the last two sides of `noise` are height and width divided by"
        f" {factor}{ids}. The model was trained at {width} x {height}."
    )


def _precision(model: Model, order: Order) -> str:
    if order.dtype == "fp32":
        return "They compute in float32."
    kept = "text encoders and the VAE" if stays_float32(model, order.torch_dtype) else "text encoders"
    return f"Inputs and outputs are float32. The generator computes in {DTYPES[order.dtype]}, the {kept} in float32."
