"""Denoisers that take a reference image: layouts, their start at the teacher, guidance, and their files."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sidcli.errors import InputError
from sidcli.formats.diffusers_folder import write_student
from sidcli.models.kind import Cond, doubly_guided, guided_predictions
from sidcli.models.loading import Model, load
from sidcli.models.reference import LAYOUTS, layout_of
from sidcli.models.sources import find
from sidcli.models.unet import UNET
from sidcli.objectives import self_distillation

T = torch.tensor([300, 700])


def widened(model: Model, layout: str) -> Model:
    UNET.take_reference(model.denoiser, LAYOUTS[layout])
    return model


def write_reference(folder: Path, model: Model) -> Path:
    write_student(folder, model, {"kind": "teacher", "guidance": 2.0})
    return folder


def canvas_and_reference(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    channels, height, width = UNET.frame_shape(model.denoiser.config)
    return torch.randn(2, *model.latent_shape), torch.randn(2, channels, height, width)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_that_begins_to_take_a_reference_predicts_what_the_teacher_predicts(sd_folder: Path, layout: str) -> None:
    teacher, model = load(find(str(sd_folder))), widened(load(find(str(sd_folder))), layout)
    x, reference = canvas_and_reference(model)
    cond = Cond(torch.randn(2, 5, 32))
    with torch.no_grad():
        predicted = UNET.denoise(model.denoiser, x, T, cond.with_reference(reference))
        if layout == "frames":  # with a shared attention, equal frames see themselves twice
            x = torch.cat([x[..., : x.shape[-1] // 2]] * 2, -1)
            predicted = UNET.denoise(model.denoiser, x, T, cond.with_reference(reference))
            alone = UNET.denoise(teacher.denoiser, x.chunk(2, -1)[0], T, cond)
            expected = torch.cat([alone, alone], -1)
        else:
            expected = UNET.denoise(teacher.denoiser, x, T, cond)
    assert predicted.shape == x.shape
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_drawn_frame_depends_on_the_reference_once_its_weights_are_trained(sd_folder: Path, layout: str) -> None:
    model = widened(load(find(str(sd_folder))), layout)
    torch.nn.init.normal_(model.denoiser.conv_in.weight, std=0.1)
    x, reference = canvas_and_reference(model)
    cond = Cond(torch.randn(2, 5, 32))
    found = LAYOUTS[layout]
    with torch.no_grad():
        one, other, none = (
            found.target(UNET.denoise(model.denoiser, x, T, cond.with_reference(shown)))
            for shown in (reference, reference.flip(0), None)
        )
        zeros = found.target(UNET.denoise(model.denoiser, x, T, cond.with_reference(torch.zeros_like(reference))))
    assert (one - other).abs().max() > 1e-3
    assert torch.equal(none, zeros), "no reference is a reference of zeros"


def test_several_references_are_frames_of_their_own_whose_order_does_not_matter(sd_folder: Path) -> None:
    model = widened(load(find(str(sd_folder))), "frames")
    torch.nn.init.normal_(model.denoiser.conv_in.weight, std=0.1)
    _, first = canvas_and_reference(model)
    second, cond = torch.randn_like(first), Cond(torch.randn(2, 5, 32))
    UNET.set_references(model.denoiser, 2)
    channels, height, width = UNET.frame_shape(model.denoiser.config)
    assert model.latent_shape == (channels, height, 3 * width) and model.layout and model.layout.several
    noise = torch.randn(3, 2, channels, height, width)

    def drawn(noise: Sequence[torch.Tensor], shown: Sequence[torch.Tensor]) -> torch.Tensor:
        assert model.layout
        x = torch.cat(list(noise), -1)
        return model.layout.target(UNET.denoise(model.denoiser, x, T, cond.with_reference(torch.cat(list(shown), -1))))

    with torch.no_grad():
        both = drawn(noise, (first, second))
        swapped = drawn(noise[[1, 0, 2]], (second, first))
        other = drawn(noise, (first, second.flip(0)))
        zeros = drawn(noise, (torch.zeros_like(first),) * 2)
        none = model.layout.target(UNET.denoise(model.denoiser, torch.cat(list(noise), -1), T, cond))
    torch.testing.assert_close(both, swapped, rtol=1e-3, atol=1e-4)
    assert (both - other).abs().max() > 1e-3
    assert torch.equal(none, zeros), "no references are references of zeros"


def test_guidance_on_both_is_guidance_on_the_prompt_where_the_reference_has_scale_1(sd_folder: Path) -> None:
    model = widened(load(find(str(sd_folder))), "frames")
    torch.nn.init.normal_(model.denoiser.conv_in.weight, std=0.1)
    x, reference = canvas_and_reference(model)
    cond, empty = Cond(torch.randn(2, 5, 32)).with_reference(reference), Cond(torch.randn(1, 5, 32))

    def denoise(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return UNET.denoise(model.denoiser, x, t, cond)

    with torch.no_grad():
        (usual,) = guided_predictions(denoise, x, T, cond, empty, (2.5,))
        torch.testing.assert_close(doubly_guided(denoise, x, T, cond, empty, 2.5, 1.0), usual, rtol=1e-4, atol=1e-4)
        seen = denoise(x, T, empty.expand(2).with_reference(reference))
        blind = denoise(x, T, empty.expand(2))
        stronger = doubly_guided(denoise, x, T, cond, empty, 2.5, 3.0)
    torch.testing.assert_close(stronger, usual + 2.0 * (seen - blind), rtol=1e-3, atol=1e-3)


def test_the_objective_and_the_models_know_the_same_layouts() -> None:
    assert tuple(LAYOUTS) == self_distillation.LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_with_a_reference_is_read_back_with_its_layout_and_predicts_the_same(
    sd_folder: Path, tmp_path: Path, layout: str
) -> None:
    model = widened(load(find(str(sd_folder))), layout)
    torch.nn.init.normal_(model.denoiser.conv_in.weight, std=0.1)
    back = load(find(str(write_reference(tmp_path / "model", model))))
    assert layout_of(back.denoiser.config) == LAYOUTS[layout] and back.size == model.size
    x, reference = canvas_and_reference(model)
    cond = Cond(torch.randn(2, 5, 32)).with_reference(reference)
    with torch.no_grad():
        assert torch.equal(UNET.denoise(back.denoiser, x, T, cond), UNET.denoise(model.denoiser, x, T, cond))


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("reference_layout", "side by side", 'reference_layout is "side by side"; it must be one of diptych, frames, channels'),
        ("reference_layout", 3, "reference_layout is 3; it must be one of diptych"),
        ("reference_layout", "channels", "in_channels is 9; layout channels has 8"),
        ("reference_count", 2, "reference_count is 2; it must be 1 in a file"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_by_its_file(
    sd_folder: Path, tmp_path: Path, entry: str, value: object, said: str
) -> None:
    folder = write_reference(tmp_path / "model", widened(load(find(str(sd_folder))), "frames"))
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
    with pytest.raises(InputError) as caught:
        load(find(str(folder)))
    assert said in caught.value.message and str(file) in caught.value.message
