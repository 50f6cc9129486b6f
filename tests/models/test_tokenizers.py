"""Tokenizers that are there, whole, and those of their text encoders; others are refused before a weight is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from sidcli.errors import InputError
from sidcli.formats.diffusers_folder import save_tokenizer
from sidcli.models.drawing import Plan
from sidcli.models.families import clip_tokenizer
from sidcli.models.loading import describe, load
from sidcli.models.sampler import Sampler
from sidcli.models.sources import find
from sidcli.models.tokenizers import read_tokenizer
from tests import REPOSITORY
from tests.models.test_compatibility import change

EMOJI = REPOSITORY / "sidcli" / "emoji" / "weights" / "teacher"
TEXT = json.loads((EMOJI / "text_encoder" / "config.json").read_text())
OWN = {"vocab_size": 49408, "max_position_embeddings": 77}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The emoji world's tokenizer: 1260 tokens, 24 of them at most in a prompt."""
    return Path(shutil.copytree(EMOJI / "tokenizer", tmp_path / "tokenizer"))


def keep(folder: Path, *names: str) -> None:
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()


def refusal(folder: Path, **text: object) -> str:
    with pytest.raises(InputError) as caught:
        read_tokenizer(folder, TEXT | text, "text_encoder/config.json")
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value.message


def test_an_unharmed_tokenizer_is_read_from_either_kind_of_files(folder: Path) -> None:
    ids = read_tokenizer(folder, TEXT, "")("a red cat on blue").input_ids
    for names in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
        copy = Path(shutil.copytree(folder, folder.with_name(names[0])))
        keep(copy, *names)
        assert read_tokenizer(copy, TEXT, "")("a red cat on blue").input_ids == ids


def test_the_marks_of_published_text_encoders_pass_although_they_are_wrong(folder: Path) -> None:
    for text in ({"bos_token_id": 0, "eos_token_id": 2}, {"bos_token_id": None, "eos_token_id": 2}):
        read_tokenizer(folder, TEXT | text, "")
    save_tokenizer(clip_tokenizer("!"), folder.with_name("clip"))
    read_tokenizer(folder.with_name("clip"), OWN | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}, "")


@pytest.mark.parametrize(
    "names", [["tokenizer_config.json"], ["tokenizer_config.json", "vocab.json"], ["tokenizer_config.json", "merges.txt"], []]
)
def test_a_vocabulary_that_is_missing_is_named(names: list[str], folder: Path) -> None:
    keep(folder, *names)
    assert "has no vocabulary: neither tokenizer.json nor both vocab.json and merges.txt" in refusal(folder)


def test_other_tokenizers_and_damaged_ones_are_refused(folder: Path) -> None:
    for name, content, said in [
        ("tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}', "holds a T5Tokenizer, not a CLIPTokenizer"),
        ("tokenizer_config.json", '{"model_max_length": "24"}', 'model_max_length is "24"'),
        ("tokenizer.json", "{", "holds no tokenizer of CLIP"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}', "has 2 tokens"),
    ]:
        copy = Path(shutil.copytree(folder, folder.with_name("copy")))
        (copy / name).write_text(content)
        assert said in refusal(copy)
        shutil.rmtree(copy)
    shutil.rmtree(folder)
    assert "is missing" in refusal(folder)


def test_a_list_of_merges_that_is_cut_is_refused(folder: Path) -> None:
    keep(folder, "vocab.json", "merges.txt", "tokenizer_config.json")
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[: len(lines) // 2]))
    assert "lacks merges: no merge makes 374 of its 1260 tokens" in refusal(folder)


def test_the_tokenizer_of_another_text_encoder_is_refused(folder: Path) -> None:
    assert "the id 1259; text_encoder/config.json has vocab_size 1259" in refusal(folder, vocab_size=1259)
    assert "has 1260 tokens; text_encoder/config.json has vocab_size 49408" in refusal(folder, vocab_size=49408)
    assert "has the mark 1259; text_encoder/config.json has eos_token_id 49407" in refusal(folder, eos_token_id=49407)
    assert "has the mark 1258; text_encoder/config.json has bos_token_id 1259" in refusal(folder, bos_token_id=1259)
    assert "text_encoder/config.json: max_position_embeddings is null" in refusal(folder, max_position_embeddings=None)
    read_tokenizer(folder, TEXT | {"vocab_size": 1280}, "")  # rounded up to a multiple of 64


def test_a_model_without_its_words_is_refused_by_its_descriptions_alone(sd_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    describe(find(str(copy)))
    keep(copy / "tokenizer", "tokenizer_config.json")
    with pytest.raises(InputError, match="tokenizer has no vocabulary"):
        describe(find(str(copy)))


def test_a_length_that_nobody_wrote_down_is_saved_as_it_was_used(sd_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd_folder, tmp_path / "model"))
    keep(copy / "tokenizer", "tokenizer.json")
    change(copy / "text_encoder" / "config.json", max_position_embeddings=77)
    model = load(find(str(copy)))
    assert model.tokenizers[0].model_max_length == 77
    save_tokenizer(model.tokenizers[0], tmp_path / "saved")
    assert CLIPTokenizer.from_pretrained(tmp_path / "saved").model_max_length == 77
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(tmp_path / "saved", copy / "tokenizer")
    ours = Sampler(model, torch.device("cpu")).images(["a cat"], [0], Plan(1, grid=(625,)))
    assert ours.shape == (1, 64, 64, 3)
    pipe = StableDiffusionPipeline.from_pretrained(copy)
    assert pipe.tokenizer.model_max_length == 77
    prompt = " ".join(["cat"] * 200)
    theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    assert torch.equal(theirs, Sampler(model, torch.device("cpu")).encode([prompt]).states)
