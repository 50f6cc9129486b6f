"""The text encoder T5 (arXiv 1910.10683) of transformers that draw: its configuration and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidcli.errors import InputError, first_line
from sidcli.files import read_bytes
from sidcli.models import spiece, tokenizers
from sidcli.models.compatibility import OTHER_COPY

CLASSES = ("T5Tokenizer", "T5TokenizerFast")
VALUES: dict[str, tuple[tuple[Any, ...], str]] = {"model_type": (("t5", None), "this text encoder of the family is T5")}
"""Supported values of its configuration; see `compatibility.SUPPORTED_VALUES`."""
EXTRA = 100
"""Tokens behind those of spiece.model, which mark the gaps in the texts that T5 was trained on."""
KEYS = frozenset(
    {
        *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets"),
        *("relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "initializer_factor", "feed_forward_proj"),
        *("pad_token_id", "eos_token_id"),
    }
)
"""Entries of its configuration that are used. Others select an implementation, which can be downloaded code."""


def text_config(config: Mapping[str, Any]) -> Any:
    """Return its configuration without the entries that select an implementation."""
    from transformers import T5Config

    return T5Config(**{key: value for key, value in config.items() if key in KEYS})


def read_tokenizer(folder: Path, config: Mapping[str, Any], place: str) -> Any:
    """Return the tokenizer in a folder, read from its tokenizer.json or, if there is none, its spiece.model.

    `config` is the configuration of the text encoder in the file `place`. Raises InputError if the file is missing or damaged, if the
    tokenizer is not T5's, or if it does not match the text encoder.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise InputError(f"{folder} has neither a tokenizer.json nor a spiece.model", OTHER_COPY)
    tokenizers.check_class(folder, CLASSES)
    try:
        tokenizer = _opened(folder)
        words, empty = tokenizer.get_vocab(), tokenizer("").input_ids
    except Exception as error:  # libraries raise any kind of error for an invalid file
        raise InputError(f"{folder} holds no tokenizer of T5: {first_line(error)}", OTHER_COPY) from error
    tokenizers.check_rows(folder, words, config, place)
    if empty != [tokenizer.eos_token_id]:
        raise InputError(f"{folder} does not put its end mark behind a prompt", OTHER_COPY)
    return tokenizer


def _opened(folder: Path) -> Any:
    from transformers import T5Tokenizer

    if (folder / "tokenizer.json").is_file():
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    # transformers reads this file with two packages that sid does not depend on.
    pieces, charsmap = spiece.parse(read_bytes(folder / "spiece.model"))
    marks = [f"<extra_id_{index}>" for index in reversed(range(EXTRA))]
    return T5Tokenizer(
        vocab=[*pieces, *((mark, 0.0) for mark in marks)],
        _spm_precompiled_charsmap=charsmap or None,
        extra_ids=EXTRA,
        additional_special_tokens=marks,
    )
