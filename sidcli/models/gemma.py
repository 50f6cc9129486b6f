"""The text encoder Gemma 2 (arXiv 2408.00118) of transformers that draw: its configuration and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidcli.errors import InputError, first_line
from sidcli.models import tokenizers
from sidcli.models.compatibility import OTHER_COPY

CLASSES = ("GemmaTokenizer", "GemmaTokenizerFast")
VALUES: dict[str, tuple[tuple[Any, ...], str]] = {"model_type": (("gemma2", None), "the text encoder of this family is Gemma 2")}
"""Supported values of its configuration; see `compatibility.SUPPORTED_VALUES`."""
KEYS = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "hidden_activation", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta"),
        *("attention_bias", "attention_dropout", "query_pre_attn_scalar", "sliding_window", "layer_types"),
        *("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "initializer_range"),
        *("pad_token_id", "bos_token_id", "eos_token_id"),
    }
)
"""Entries of its configuration that are used. Others select an implementation, which can be downloaded code."""


def text_config(config: Mapping[str, Any]) -> Any:
    """Return its configuration without the entries that select an implementation."""
    from transformers import Gemma2Config

    return Gemma2Config(**{key: value for key, value in config.items() if key in KEYS})


def read_tokenizer(folder: Path, config: Mapping[str, Any], place: str) -> Any:
    """Return the tokenizer in a folder, read from its tokenizer.json. It fills rows up behind their text.

    `config` is the configuration of the text encoder in the file `place`. Raises InputError if the file is missing or damaged, if the
    tokenizer is not Gemma's, or if it does not match the text encoder.
    """
    from transformers import GemmaTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json", OTHER_COPY)
    tokenizers.check_class(folder, CLASSES)
    try:
        tokenizer = GemmaTokenizer.from_pretrained(folder, local_files_only=True)
        words, empty = tokenizer.get_vocab(), tokenizer("").input_ids
    except Exception as error:  # libraries raise any kind of error for an invalid file
        raise InputError(f"{folder} holds no tokenizer of Gemma: {first_line(error)}", OTHER_COPY) from error
    tokenizers.check_rows(folder, words, config, place)
    if empty != [tokenizer.bos_token_id]:
        raise InputError(f"{folder} does not put its begin mark before a prompt", OTHER_COPY)
    tokenizer.padding_side = "right"  # as the stock pipeline does; published files say left
    return tokenizer
