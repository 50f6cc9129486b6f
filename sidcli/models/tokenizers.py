"""Read the tokenizer of a diffusers folder and check that it matches the text encoder.

transformers replaces a missing vocabulary by an empty one and accepts any other vocabulary. Every prompt then gives the same image.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from sidcli.errors import InputError, first_line
from sidcli.files import read_bytes, read_json
from sidcli.models.compatibility import OTHER_COPY, OTHER_MODEL, positive_integer, value_text
from sidcli.models.families import MAX_TOKENS
from sidcli.models.hub import has_vocabulary
from sidcli.printable import with_article

CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
UNSPECIFIC = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Values of tokenizer_class that do not determine the class; model_index.json then determines it."""
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that a tokenizer is read from."""
MOST_PARSED = 8
_PARSED: dict[bytes, CLIPTokenizer] = {}
"""Hash of a tokenizer's files -> tokenizer."""
PADDING = 128
"""A text encoder has fewer than this many rows without a token: sizes are rounded up to multiples of at most 128."""
LETTERS = 512
"""Number of single-byte tokens in CLIP's vocabulary: each byte inside a word and at its end."""
PUBLISHED_MARKS = {"bos_token_id": 0, "eos_token_id": 2}
"""Wrong ids of the begin and end tokens in the published configurations of CLIP's text encoders. transformers handles them."""


def read_tokenizer(folder: Path, text_config: Mapping[str, Any], text_place: str) -> CLIPTokenizer:
    """Return the tokenizer in a folder. Its maximum length is limited to that of the text encoder.

    `text_place` names the text encoder's configuration in errors. Raises InputError if files are missing or damaged, if the
    tokenizer is not CLIP's, or if it does not match the text encoder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: the model has no tokenizer", OTHER_COPY)
    files = {file.name for file in folder.iterdir() if file.exists()}
    check_class(folder, CLASSES)
    if "tokenizer_config.json" in files:
        length = read_json(folder / "tokenizer_config.json").get("model_max_length", MAX_TOKENS)
        if not isinstance(length, int | float) or not length >= 3:
            raise InputError(f"{folder}: model_max_length is {value_text(length)}; it must be a number of tokens", OTHER_COPY)
    if not has_vocabulary(files):
        raise InputError(f"{folder} has no vocabulary: neither tokenizer.json nor both vocab.json and merges.txt", OTHER_COPY)
    try:
        tokenizer = _opened(folder)
        check_tokenizer(tokenizer, str(folder), text_config, text_place)
    except InputError:
        raise
    except Exception as error:  # libraries raise any kind of error for an invalid file
        raise InputError(f"{folder} holds no tokenizer of CLIP: {first_line(error)}", OTHER_COPY) from error
    return tokenizer


def check_class(folder: Path, classes: Sequence[str]) -> None:
    """Raises InputError if tokenizer_config.json names another class of the tokenizer in a folder than those in `classes`."""
    file = folder / "tokenizer_config.json"
    found = read_json(file).get("tokenizer_class") if file.is_file() else None
    if found not in (*classes, *UNSPECIFIC):
        raise InputError(f"{folder} holds {with_article(str(found))}, not a {classes[0]}", OTHER_MODEL)


def check_rows(folder: Path, words: Mapping[str, int], config: Mapping[str, Any], place: str) -> None:
    """Raises InputError if a token of the vocabulary in a folder has no row in a text encoder, whose configuration is in `place`."""
    rows, last = positive_integer(config, "vocab_size", place), max(words.values())
    if last >= rows:
        raise InputError(f"{folder} has the id {last}; {place} has vocab_size {rows}", OTHER_COPY)


def _opened(folder: Path) -> CLIPTokenizer:
    """Return a tokenizer from its files. Files with equal content are parsed once: a command reads them to plan and to sample."""
    present = [folder / name for name in FILES if (folder / name).exists()]
    content = hashlib.sha256(b"".join(file.name.encode() + hashlib.sha256(read_bytes(file)).digest() for file in present)).digest()
    if content not in _PARSED:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        check_merges(tokenizer, str(folder))
        if len(_PARSED) >= MOST_PARSED:
            _PARSED.clear()
        _PARSED[content] = tokenizer
    return copy.copy(_PARSED[content])


def check_merges(tokenizer: Any, place: str) -> None:
    """Raises InputError if merges are missing, because words would be split into letters.

    The tokens of a byte-pair vocabulary are letters, one pair of tokens per merge, and added tokens.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise InputError(
            f"{place} holds {with_article(str(model['type']))} tokenizer, not the byte-pair encoding of CLIP", OTHER_COPY
        )
    lost = len(model["vocab"]) - LETTERS - len(content["added_tokens"]) - len(model["merges"])
    if lost > len(model["vocab"]) / 100:
        raise InputError(f"{place} lacks merges: no merge makes {lost} of its {len(model['vocab'])} tokens", OTHER_COPY)


def check_tokenizer(tokenizer: Any, place: str, text_config: Mapping[str, Any], text_place: str) -> None:
    """Raises InputError if the vocabulary or the begin and end tokens do not match the text encoder. Sets model_max_length to the
    smaller maximum length of both."""
    words, rows = tokenizer.get_vocab(), positive_integer(text_config, "vocab_size", text_place)
    last = max(words, key=words.__getitem__)
    if words[last] >= rows:
        raise InputError(f"{place} has a token {last!r} with the id {words[last]}; {text_place} has vocab_size {rows}", OTHER_COPY)
    if len(words) <= rows - PADDING:
        raise InputError(f"{place} has {len(words)} tokens; {text_place} has vocab_size {rows}", OTHER_COPY)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if tokenizer("").input_ids != [begin, end]:
        raise InputError(f"{place} does not put its begin and end marks around a prompt", OTHER_COPY)
    for entry, mark in {"bos_token_id": begin, "eos_token_id": end}.items():
        if text_config.get(entry) not in (None, mark, PUBLISHED_MARKS[entry]):
            raise InputError(f"{place} has the mark {mark}; {text_place} has {entry} {value_text(text_config[entry])}", OTHER_COPY)
    tokenizer.model_max_length = int(
        min(tokenizer.model_max_length, positive_integer(text_config, "max_position_embeddings", text_place))
    )
