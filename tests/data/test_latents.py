"""Latents of images: what is encoded, what is left out, and that work is done once."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sidcli.data import latents
from sidcli.data.captioned import open_captioned
from sidcli.data.latents import EncodedImages, Latents, TeacherImages, prepare
from sidcli.data.prompts import open_prompts
from sidcli.distributed import Distributed
from sidcli.errors import InputError
from sidcli.metrics.transforms import crop_and_resize
from sidcli.models.loading import Model
from sidcli.models.sampler import Plan, Sampler
from sidcli.progress import Silence
from tests.data.test_captioned import encoded, picture, shard

CPU = torch.device("cpu")
ALONE = Distributed(CPU)


class Heard(Silence):
    def __init__(self) -> None:
        self.bars: list[tuple[str, int]] = []

    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Any]:
        self.bars.append((what, total))
        return super().progress(what, total, unit)


def images(folder: Path, count: int) -> Path:
    """Images of 96 x 80 pixels, number i with the caption `image i`."""
    folder.mkdir()
    for number in range(count):
        picture(number, (96, 80)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")
    return folder


def source(place: Path, sd: Model, count: int = 10**9) -> EncodedImages:
    return EncodedImages(open_captioned(str(place)), count, sd, CPU)


def prepared(place: Path, sd: Model, count: int = 10**9, listener: Silence | None = None) -> Latents:
    return prepare(source(place, sd, count), ALONE, listener or Silence())


def test_a_latent_is_the_scaled_mean_of_the_vae_for_the_center_of_the_image(tmp_path: Path, sd: Model) -> None:
    found = prepared(images(tmp_path / "set", 3), sd)
    for position in range(3):
        latent, caption = found.at(0, position)
        pixels = crop_and_resize(np.asarray(picture(int(caption.split()[1]), (96, 80))), 64, 64)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            wanted = sd.vae.encode(image).latent_dist.mean * sd.vae.config.scaling_factor
        torch.testing.assert_close(latent[None], wanted)


def test_each_pass_over_the_images_is_a_new_order_that_depends_on_the_seed_alone(tmp_path: Path, sd: Model) -> None:
    found = prepared(images(tmp_path / "set", 5), sd)
    passes = [[found.at(seed, position)[1] for position in range(start, start + 5)] for seed in (0, 1) for start in (0, 5)]
    assert all(sorted(one) == [f"image {number}" for number in range(5)] for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert [found.at(0, position)[1] for position in (7, 2)] == [passes[1][2], passes[0][2]]


def test_images_are_encoded_once_whatever_the_number_in_use(tmp_path: Path, sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "UNIT", 2)
    folder, heard = images(tmp_path / "set", 6), Heard()
    first = prepared(folder, sd, 4, heard)
    again = prepared(folder, sd, 4, heard)
    assert heard.bars == [("encode images", 4)] and first.digest == again.digest and len(first) == 4
    whole = prepared(folder, sd, listener=heard)
    assert heard.bars[1:] == [("encode images", 2)] and len(whole) == 6 and whole.digest != first.digest


def test_the_digest_is_of_pixels_and_captions_and_not_of_names_and_times(tmp_path: Path, sd: Model) -> None:
    first = prepared(images(tmp_path / "set", 3), sd)
    other = prepared(images(tmp_path / "copy", 3), sd)
    assert first.digest == other.digest
    members = {f"{number}.png": (tmp_path / "set" / f"{number}.png").read_bytes() for number in range(3)}
    members |= {f"{number}.txt": f"image {number}".encode() for number in range(3)}
    assert prepared(shard(tmp_path / "a.tar", members), sd).digest == first.digest
    heard = Heard()
    (tmp_path / "set" / "1.txt").write_text("another caption")
    assert prepared(tmp_path / "set", sd, listener=heard).digest != first.digest and not heard.bars, "nothing is encoded again"
    picture(9, (96, 80)).save(tmp_path / "copy" / "1.png")
    assert prepared(tmp_path / "copy", sd).digest != first.digest


def test_a_damaged_file_of_the_cache_is_computed_again(tmp_path: Path, sd: Model) -> None:
    folder, heard = images(tmp_path / "set", 2), Heard()
    first = prepared(folder, sd).at(0, 0)[0]
    (file,) = (tmp_path / "cache" / "latents").rglob("*.safetensors")
    whole = file.read_bytes()
    flipped, other_order = whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"[0, 1]", b"[1, 0]")
    for broken in (flipped, whole[:40], b"", whole.replace(b"kept", b"Kept"), other_order):
        file.write_bytes(broken)
        assert torch.equal(prepared(folder, sd, listener=heard).at(0, 0)[0], first)
    assert len(heard.bars) == 5


def test_images_that_cannot_be_used_are_counted_and_named_and_stop_nothing(tmp_path: Path, sd: Model) -> None:
    folder = images(tmp_path / "set", 2)
    colors = picture(3, (96, 80))
    colors.convert("CMYK").save(folder / "2.jpg")
    colors.putalpha(100)
    colors.save(folder / "3.png")
    Image.fromarray(np.full((80, 96), 40_000, np.uint16)).save(folder / "4.png")
    picture(4, (20, 200)).save(folder / "5.png")
    (folder / "6.png").write_bytes(encoded(0)[:60])
    (folder / "7.jpg").write_text("not an image")
    for number in range(2, 8):
        (folder / f"{number}.txt").write_text("a caption")
    picture(5, (96, 80)).save(folder / "8.png")
    found = prepared(folder, sd)
    lines = found.notes(open_captioned(str(folder)).skipped)
    assert lines == [f"{folder}: 5 images to train on", lines[1], lines[2]] and len(found) == 5
    assert lines[1].startswith("4 images not used: 8.png (no caption), 5.png (20 x 200 pixels, too small for 64 x 64), 6.png (")
    assert "7.jpg (is not a PNG" in lines[1] and "\n" not in lines[1]
    assert lines[2] == "3 images converted to RGB: 2.jpg (CMYK), 3.png (RGBA), 4.png (I;16)"
    assert prepared(folder, sd).notes() == found.notes(), "the cache knows the reasons"


def test_many_images_are_counted_and_the_first_are_named(tmp_path: Path, sd: Model) -> None:
    folder = images(tmp_path / "set", 8)
    for number in range(1, 8):
        (folder / f"{number}.png").write_bytes(b"")
    assert prepared(folder, sd).notes()[1].endswith(" and 2 more")
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 8 images can be used: 0.png \("):
        prepared(folder, sd)


def test_an_image_whose_latent_is_not_finite_is_not_used(tmp_path: Path, sd: Model) -> None:
    folder = images(tmp_path / "set", 2)
    with torch.no_grad():
        sd.vae.quant_conv.bias.fill_(float("inf"))
    with pytest.raises(InputError, match=r"0.png \(the VAE's output is not finite"):
        prepared(folder, sd)


# The teacher's own images


class Teacher:
    """Draws with a model and counts the denoising steps; `stop_at` raises KeyboardInterrupt at that batch."""

    def __init__(self, model: Model, stop_at: int = -1):
        self.model, self.stop_at, self.calls = model, stop_at, 0

    def draw(self, prompts: Sequence[str], noise: Tensor, stepped: Callable[[], None]) -> Tensor:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return Sampler(self.model, CPU).latents(prompts, [noise], Plan(2, 3.0), stepped)

    def source(self, count: int, batch_size: int = 2, prompts: str = "general") -> TeacherImages:
        given = Plan(2, 3.0), open_prompts(prompts)
        return TeacherImages(self.model, "digest", *given, count, batch_size, "fp32", self.draw)


def test_drawing_with_the_teacher_resumes_where_it_stopped(tmp_path: Path, sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "UNIT", 2)
    stopped, again, whole = Teacher(sd, stop_at=2), Teacher(sd), Teacher(sd)
    with pytest.raises(KeyboardInterrupt):
        prepare(stopped.source(6), ALONE, Silence())
    heard = Heard()
    found = prepare(again.source(6), ALONE, heard)
    assert again.calls == 1 and heard.bars == [("teacher images to train on", 2)]
    monkeypatch.setenv("SID_CACHE_DIR", str(tmp_path / "other"))
    other = prepare(whole.source(6), ALONE, Silence())
    assert whole.calls == 3 and other.digest == found.digest
    assert all(torch.equal(found.at(0, index)[0], other.at(0, index)[0]) for index in range(6))


def test_an_image_of_the_teacher_has_the_prompt_it_was_drawn_from(sd: Model) -> None:
    found = prepare(Teacher(sd).source(3), ALONE, Silence())
    prompts = open_prompts("general")
    assert sorted(found.at(5, position)[1] for position in range(3)) == sorted(prompts.at(0, index) for index in range(3))
    assert found.name.endswith("2 steps, guidance 3")
    latent, caption = found.at(0, 0)
    index = [prompts.at(0, number) for number in range(3)].index(caption)
    noise = latents.randomness.normal(sd.latent_shape, 0, "teacher image", 0, [index])
    torch.testing.assert_close(Teacher(sd).draw([caption], noise, lambda: None)[0], latent, rtol=1e-4, atol=1e-4)


def test_other_prompts_plans_and_teachers_have_other_images(sd: Model) -> None:
    given = Teacher(sd).source(3)
    other = [
        dataclasses.replace(given, fingerprint="other"),
        dataclasses.replace(given, plan=Plan(3, 3.0)),
        dataclasses.replace(given, prompts=open_prompts("emoji")),
        dataclasses.replace(given, precision="bf16"),
    ]
    assert len({one.key for one in [given, *other]}) == 5
    assert given.key == dataclasses.replace(given, count=5, batch_size=3).key


def test_processes_share_the_work(tmp_path: Path, sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes one after the other: the first finds its half done by itself and does the rest, as without a shared cache."""
    monkeypatch.setattr(latents, "UNIT", 1)
    group = Distributed(CPU)
    group.rank, group.count = 1, 2
    heard = Heard()
    assert len(prepare(Teacher(sd).source(5), group, heard)) == 5
    assert [count for _, count in heard.bars] == [2, 3]


def test_a_file_that_is_gone_in_the_middle_of_a_run_is_named(tmp_path: Path, sd: Model) -> None:
    found = prepared(images(tmp_path / "set", 2), sd)
    (file,) = (tmp_path / "cache" / "latents").rglob("*.safetensors")
    os.unlink(file)
    with pytest.raises(InputError, match="cannot be read"):
        found.at(0, 0)
