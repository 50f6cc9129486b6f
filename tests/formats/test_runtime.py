"""The tokens of exported graphs, which are read without transformers."""

import json
from pathlib import Path

import numpy as np
import pytest

from sidcli.errors import InputError
from sidcli.formats.diffusers_folder import save_tokenizer
from sidcli.formats.runtime import GraphTokenizer
from sidcli.models.families import END, clip_tokenizer

PROMPTS = [
    *(
        "",
        " ",
        "a cat",
        "A  Cute\tCAT\n",
        "a key's ring, it's 1234 o'clock!!",
        "\u00e9t\u00e9 e\u0301t\u00e9 \ufb01n \u00c5ngstr\u00f6m",
    ),
    *(
        "\U0001f431\u200d\U0001f464 \u306d\u3053",
        "<|endoftext|> a cat <|startoftext|>",
        "\u0000 \ufffd",
        "a cat " * 12,
        "a cat " * 40,
    ),
]


@pytest.mark.parametrize("pad", [END, "!"])
@pytest.mark.parametrize("length", [24, 77])
def test_the_tokens_of_graphs_are_those_of_transformers(pad: str, length: int, tmp_path: Path) -> None:
    theirs = clip_tokenizer(pad)
    save_tokenizer(theirs, tmp_path)
    found, truncated = GraphTokenizer(tmp_path, length)(PROMPTS)
    wanted = theirs(PROMPTS, padding="max_length", truncation=True, max_length=length, return_tensors="np").input_ids
    assert found.dtype == np.int64 and np.array_equal(found, wanted)
    assert truncated == sum(len(row) > length for row in theirs(PROMPTS).input_ids) > 0


def test_damaged_tokenizers_of_graphs_are_named(tmp_path: Path) -> None:
    save_tokenizer(clip_tokenizer(), tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for entry in ({}, {"pad_token": "no such token"}, {"pad_token": 5}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None} | entry))
        with pytest.raises(InputError, match=f"{tmp_path} holds no tokenizer"):
            GraphTokenizer(tmp_path, 77)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer_config\.json cannot be read"):
        GraphTokenizer(tmp_path, 77)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for content in (b"", b"{}", b"\xff"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(InputError, match=f"{tmp_path} holds no tokenizer"):
            GraphTokenizer(tmp_path, 77)
