"""The protocols step by step: what happens to an image and to a caption before a network sees it, and where networks come from."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import Compose, Normalize, ToTensor

from sidcli.data.imagesets import SceneSet
from sidcli.data.prompts import read_list
from sidcli.distributed import Distributed
from sidcli.emoji import world
from sidcli.errors import InputError, UsageError
from sidcli.evaluation.candidates import Candidate, Drawing, resolve, to_measure
from sidcli.evaluation.protocols import COCO_CAPTIONS, DINO, PHOTO_CLIP, Networks, coco, custom, emoji, read_statistics
from sidcli.evaluation.scores import Evaluation, chosen
from sidcli.evaluation.spec import ModelSpec
from sidcli.metrics import weights
from sidcli.metrics.clip import PREFIX, Clip
from sidcli.metrics.features import DinoFeatures, InceptionFeatures
from sidcli.metrics.fid import Statistics, frechet_distance
from sidcli.progress import Silence
from tests.coco import write_coco
from tests.commands import sid
from tests.inprocess import sid as in_process

CPU = torch.device("cpu")
IMAGES = 40


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), IMAGES)


@pytest.fixture
def networks(stand_ins: dict[str, Path]) -> Networks:
    clip = str(stand_ins["clip"])
    return Networks(CPU, Silence(), stand_ins["inception"], clip, clip, str(stand_ins["dino"]))


def test_an_image_of_coco_is_cropped_shrunk_by_lanczos_resized_as_clean_fid_does_and_centered_in_that_order(
    coco_folder: Path, networks: Networks
) -> None:
    rules = coco(networks, coco_folder, None)
    first = sorted((coco_folder / "val2014").iterdir())[0]
    pixels = np.asarray(Image.open(first).convert("RGB"))
    # By hand, from another library's words: the square of the short side at the center, ...
    height, width = pixels.shape[:2]
    side, left, top = min(height, width), max(0, width - height) // 2, max(0, height - width) // 2
    # ... PIL's Lanczos filter to 256, rounded to bytes, ...
    small = Image.fromarray(pixels[top : top + side, left : left + side]).resize((256, 256), Image.Resampling.LANCZOS)
    # ... each channel as floats by PIL's bicubic filter to 299, not rounded, ...
    channels = [Image.fromarray(np.asarray(small)[..., c].astype(np.float32)) for c in range(3)]
    resized = np.stack([np.asarray(one.resize((299, 299), Image.Resampling.BICUBIC)) for one in channels]).clip(0, 255)
    # ... and around zero.
    look = rules.extractors.features
    assert isinstance(look, InceptionFeatures)
    expected = look.net.layers((torch.from_numpy(resized)[None] - 128) / 128).detach().numpy()
    assert rules.reference is not None
    seen = rules.prepare(rules.reference.images.read(range(1))[0])  # type: ignore[union-attr]
    np.testing.assert_array_equal(seen, np.asarray(small))
    np.testing.assert_allclose(look([seen]), expected, atol=1e-6)


def test_a_caption_of_coco_gets_the_tokens_of_a_photo_depicts_between_its_start_and_its_words(networks: Networks) -> None:
    _, _, tokenizer = Clip(str(networks.clip), CPU, "").opened
    # Start, "a", "photo", "depicts", "a", "cat", end, in the vocabulary that all of CLIP's models share.
    assert tokenizer([PREFIX + "a cat"])[0, :8].tolist() == [49406, 320, 1125, 29340, 320, 2368, 49407, 0]
    # GigaGAN's code puts the three tokens behind the start of the finished row and cuts that at 77, its last one being the end.
    for caption in ("a cat", "A man, riding a wave on top of a surfboard.", "many words " * 60, "word " * 73, "word " * 75):
        alone = tokenizer([caption])[0].tolist()
        inserted = [alone[0], 320, 1125, 29340, *alone[1:]][:77]
        inserted[76] = 49407 if inserted[76] > 0 else 0
        assert tokenizer([PREFIX + caption])[0].tolist() == inserted


def test_the_clip_score_of_coco_is_computed_as_gigagans_code_does_and_others_see_the_pixels_as_they_are(
    coco_folder: Path, networks: Networks, tmp_path: Path
) -> None:
    rules = coco(networks, coco_folder, None)
    image = rules.prepare(rules.reference.images.read(range(1))[0])  # type: ignore[union-attr]
    net, preprocess, tokenizer = Clip(str(networks.clip), CPU, "").opened
    caption = "A man riding a wave."

    def score(picture: Image.Image, text: str) -> float:
        seen, said = net.encode_image(preprocess(picture)[None]), net.encode_text(tokenizer([text]))
        return torch.nn.functional.cosine_similarity(seen, said).item()

    tensor = Compose([ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])(Image.fromarray(image))
    theirs = ((tensor + 1.0) * 127.5).clamp(0.0, 255.0).byte().permute(1, 2, 0).numpy()
    with torch.no_grad():
        truncated, exact = score(Image.fromarray(theirs), PREFIX + caption), score(Image.fromarray(image), caption)
    assert rules.extractors.clip([image], [caption])[0, 0] == pytest.approx(truncated, abs=1e-6)
    assert custom(networks, None, None).extractors.clip([image], [caption])[0, 0] == pytest.approx(exact, abs=1e-6)
    assert abs(truncated - score(Image.fromarray(image), PREFIX + caption)) > 1e-6, "the difference can be seen"


def test_captions_are_cocos_own_one_for_each_image_in_the_order_of_ids(coco_folder: Path, networks: Networks) -> None:
    content = json.loads((coco_folder / COCO_CAPTIONS).read_text())
    first = min(one["id"] for one in content["images"])
    text = min((one for one in content["annotations"] if one["image_id"] == first), key=lambda one: one["id"])["caption"]
    captions = coco(networks, coco_folder, None).captions
    assert captions is not None and captions.limit == IMAGES
    assert captions.first(2)[0] == " ".join(text.split())


def test_models_without_a_reference_are_measured_by_clip_score_and_distance_to_their_teacher(
    stand_ins: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["eval", "emoji", "emoji-teacher", "--protocol", "custom", "--steps", 1, "--num", 20, "--json"]
    assert in_process(*asked, "--inception", stand_ins["inception"], "--clip-model", stand_ins["clip"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"]["captions"]["name"] == "general" and result["protocol"]["name"] == "custom"
    assert [sorted(one["metrics"]) for one in result["models"]] == [["clip", "fid_teacher"], ["clip"]]


def test_a_list_of_captions_can_stand_in_for_cocos(coco_folder: Path, networks: Networks, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("one\ntwo\n")
    captions = coco(networks, coco_folder, tmp_path / "captions.txt").captions
    assert captions is not None and captions.first(9) == ["one", "two"]
    assert captions.key == read_list(tmp_path / "captions.txt").digest


def test_the_whole_coco_protocol_runs_from_annotations_to_a_table(
    coco_folder: Path, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    clip = str(stand_ins["clip"])
    asked = ["eval", "emoji", str(coco_folder / "val2014"), "--all", "--protocol", "coco2014-30k", "--reference", str(coco_folder)]
    asked += [
        "--inception",
        str(stand_ins["inception"]),
        "--clip-model",
        clip,
        "--cmmd-model",
        clip,
        "--dino-model",
        str(stand_ins["dino"]),
    ]
    done = sid(*asked, "--num", "30", "--json", cwd=tmp_path, SID_CACHE_DIR=str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    student, photos = (one["metrics"] for one in result["models"])
    assert set(student) == {"fid", "kid", "precision", "recall", "density", "coverage", "fd_dinov2", "cmmd", "clip"}
    assert all(low["low"] <= low["value"] <= low["high"] for low in student.values())
    assert photos["fid"]["value"] < student["fid"]["value"] and photos["precision"]["value"] == 1.0
    recorded = result["protocol"]
    assert recorded["name"] == "coco2014-30k" and recorded["prepared"] == "center square, Lanczos to 256"
    assert "A photo depicts" in recorded["networks"]["clip"] and "GigaGAN" in recorded["networks"]["clip"]
    assert any("not the Inception of published numbers" in warning for warning in result["warnings"])


def test_the_clip_score_of_coco_is_read_through_an_architecture_and_a_file_as_vit_g_is(stand_ins: dict[str, Path]) -> None:
    """ViT-g-14 itself goes the same way, by a tag in place of the file; its 5 GB are not for a test."""
    by_name = Clip(f"tiny-clip:{stand_ins['clip'] / 'open_clip_model.safetensors'}", CPU, "")
    image = world.render(world.scene(0, 0))
    ours = by_name.see([image])
    model = open_clip.create_model("tiny-clip")
    model.load_state_dict(load_file(stand_ins["clip"] / "open_clip_model.safetensors"))
    _, preprocess, tokenizer = by_name.opened
    theirs = model.eval().encode_image(preprocess(Image.fromarray(image))[None])
    torch.testing.assert_close(ours, torch.nn.functional.normalize(theirs, dim=1))
    assert tokenizer.context_length == 77
    assert tuple(PHOTO_CLIP.split(":")) in open_clip.list_pretrained()


def test_a_reference_of_statistics_is_that_of_its_images(coco_folder: Path, networks: Networks, tmp_path: Path) -> None:
    def measured(reference: Path) -> Evaluation:
        evaluation = Evaluation(
            custom(networks, reference, None), [Candidate("scenes", "", SceneSet(0))], ["fid"], 20, Distributed(CPU)
        )
        evaluation.fill(Silence())
        return evaluation

    images = measured(coco_folder / "val2014")
    kept = images.statistics["features"]
    np.savez(tmp_path / "coco.npz", mu=kept.mean, sigma=kept.covariance)
    statistics = measured(tmp_path / "coco.npz").statistics["features"]
    assert statistics.covariance.shape == (2048, 2048)
    np.testing.assert_array_equal(statistics.mean, kept.mean)
    np.testing.assert_array_equal(statistics.covariance, kept.covariance)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, "do not fit"),
        ({"mu": np.array([object()]), "sigma": np.eye(1)}, "holds no statistics"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "values that are not finite"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "not a covariance"),
        ({"mu": np.zeros(2), "sigma": np.diag([1, -1e-3])}, "not a covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0, 1]])}, "not a covariance"),
        ({"mu": np.zeros(2), "sigma": np.eye(2) * 1j}, "holds no statistics"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "do not fit"),
    ],
)
def test_statistics_that_are_none_are_refused(
    content: dict[str, np.ndarray], said: str, networks: Networks, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **content)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=said):
        custom(networks, tmp_path / "x.npz", None)


def test_statistics_with_the_rounding_of_float32_are_read(tmp_path: Path) -> None:
    covariance = np.diag([-1.5e-8, 1.0, 1.0])
    np.savez(tmp_path / "x.npz", mu=np.zeros(3, np.float32), sigma=covariance)
    given = read_statistics(tmp_path / "x.npz")
    assert frechet_distance(given, Statistics(np.zeros(3), np.diag([0.0, 1.0, 4.0]), 0)) == pytest.approx(1.0)


def test_statistics_whose_products_overflow_give_no_distance_instead_of_an_error() -> None:
    huge = Statistics(np.zeros(3), np.eye(3) * 1e300, 0)
    assert np.isnan(frechet_distance(huge, huge))


@pytest.mark.check(25)
def test_statistics_that_would_unpack_to_more_than_memory_or_are_no_archive_are_refused(networks: Networks, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mu.npy", "w") as member:
        for _ in range(1100):
            member.write(bytes(1 << 20))
    (tmp_path / "text.npz").write_text("mu sigma")
    for name, said in (
        ("bomb.npz", "1153433600 bytes, unpacked"),
        ("text.npz", "holds no statistics"),
        ("gone.npz", "No such file"),
    ):
        with pytest.raises(InputError, match=said):
            custom(networks, tmp_path / name, None)


def test_statistics_of_another_network_and_a_reference_too_small_are_refused_before_any_drawing(
    networks: Networks, coco_folder: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(128), sigma=np.eye(128))
    evaluation = Evaluation(
        custom(networks, tmp_path / "narrow.npz", None), [Candidate("a", "", SceneSet(0))], ["fid"], 20, Distributed(CPU)
    )
    with pytest.raises(UsageError, match=r"statistics have 128 dimensions, inception .* has 2048"):
        evaluation.fill(Silence())
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a.png")
    with pytest.raises(UsageError, match="KID needs at least 2 images; the reference has 1"):
        Evaluation(custom(networks, tmp_path / "one", None), [Candidate("a", "", SceneSet(0))], ["kid"], 20, Distributed(CPU))


def test_a_network_described_or_weighed_differently_is_another_network(stand_ins: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(stand_ins["clip"], tmp_path / "clip")
    before = Clip(str(tmp_path / "clip"), CPU, "").name
    config = tmp_path / "clip" / "open_clip_config.json"
    config.write_text(config.read_text().replace("0.48", "0.5"))
    assert Clip(str(tmp_path / "clip"), CPU, "").name != before
    weights_file = tmp_path / "clip" / "open_clip_model.safetensors"
    by_file = Clip(f"tiny-clip:{weights_file}", CPU, "").name
    weights_file.write_bytes(weights_file.read_bytes() + b" ")
    assert Clip(f"tiny-clip:{weights_file}", CPU, "").name != by_file
    shutil.copytree(stand_ins["dino"], tmp_path / "dino")
    dino = DinoFeatures(str(tmp_path / "dino"), CPU).name
    (tmp_path / "dino" / "config.json").write_text("{}")
    assert DinoFeatures(str(tmp_path / "dino"), CPU).name != dino


def test_coco_without_its_folder_or_with_another_is_told_what_to_unpack(networks: Networks, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs COCO's validation set"):
        coco(networks, None, None)
    with pytest.raises(InputError, match=r"val2014 is missing"):
        coco(networks, tmp_path, None)


def test_a_custom_protocol_asks_its_captions_of_a_model(networks: Networks, tmp_path: Path) -> None:
    found = resolve(ModelSpec("emoji"), 0, Silence())
    np.savez(tmp_path / "some.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UsageError, match="emoji needs captions to draw"):
        to_measure(found, custom(networks, tmp_path / "some.npz", None), 10, Drawing(CPU, 0, 10, None))
    (tmp_path / "three.txt").write_text("a cat\na dog\na bus\n")
    rules = custom(networks, None, tmp_path / "three.txt")
    candidates = to_measure(found, rules, None, Drawing(CPU, 0, 10, None))
    metrics = chosen([], rules, False, candidates)
    assert metrics == ["clip"]
    assert Evaluation(rules, candidates, metrics, None, Distributed(CPU)).count(candidates[0]) == 3


def test_networks_that_are_not_there_are_errors_that_say_what_to_put_where(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plain = replace(networks, inception=None, clip=None, cmmd=None, dino=None)
    photo = custom(plain, None, None).extractors
    with pytest.raises(InputError) as caught:
        _ = photo.features
    assert "inception-2015-12-05.pt" in caught.value.message and "HF_HUB_OFFLINE forbids" in caught.value.message
    assert (
        weights.INCEPTION.url in caught.value.hint
        and str(tmp_path / "cache" / "weights") in caught.value.hint
        and "--inception" in caught.value.hint
    )
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(InputError) as caught:
        photo.clip([image], ["a"])
    assert "laion/CLIP-ViT-g-14-laion2B-s12B-b42K" in caught.value.hint and "--clip-model" in caught.value.hint
    with pytest.raises(InputError) as caught:
        photo.dino([image], [])
    assert DINO in caught.value.message and "--dino-model FOLDER" in caught.value.hint
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is not the Inception network in TorchScript"):
        InceptionFeatures(tmp_path / "no.pt", CPU)([image])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no open_clip_config.json"):
        _ = emoji(replace(plain, clip=str(tmp_path / "empty"))).extractors.clip


@pytest.mark.parametrize(
    ("model", "said", "hint"),
    [
        ("nowhere", "no CLIP model nowhere: it is not a folder", "--clip-model FOLDER"),
        ("ViT-g-14x:openai", "open_clip has no architecture 'ViT-g-14x'", "ViT-g-14, "),
        ("ViT-g-14:openai", "'openai' is neither a file nor one of laion2b_s12b_b42k, ", "--clip-model FOLDER"),
    ],
)
def test_a_clip_model_that_there_is_not_is_refused_by_what_is_wrong_with_its_name(model: str, said: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        Clip(model, CPU, "--clip-model FOLDER")
    assert said in caught.value.message and caught.value.hint.startswith(hint)


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server with a folder of files; its address."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, directory=str(folder), **options)  # type: ignore[arg-type]

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def test_a_published_network_is_fetched_once_checked_by_its_hash_and_otherwise_not_kept(
    published: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    address, folder = published
    content = bytes(range(256)) * 20
    (folder / "net.pt").write_bytes(content)
    right = weights.Weights("net.pt", f"{address}/net.pt", len(content), hashlib.sha256(content).hexdigest(), "--inception")
    with pytest.raises(InputError, match="brought 5120 bytes of another content"):
        weights.fetch(replace(right, sha256="0" * 64), Silence())
    assert not list((weights.cache_folder() / "weights").iterdir()), "nothing is kept of what is wrong"
    file = weights.fetch(right, Silence())
    (folder / "net.pt").unlink()
    assert weights.fetch(right, Silence()).read_bytes() == content and file.name == "net.pt"
    with pytest.raises(InputError, match="cannot fetch the network gone"):
        weights.fetch(replace(right, name="gone.pt", url=f"{address}/gone.pt"), Silence())
