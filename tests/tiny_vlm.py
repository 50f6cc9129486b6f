"""A tiny vision language model of transformers' own classes, whose words are chosen in advance."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = ("Assistant:", "Both", "are", "keys.", "ANSWER:", "YES", "NO")
SIDE, PATCH = 32, 16
TEMPLATE = """{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %} <image> {% else %}\
 {{ part['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} Assistant:{% endif %}"""


def write_vlm(folder: Path, words: str) -> Path:
    """Write a LLaVA model that answers every question with `words`, which are among WORDS.

    Its layers add nothing to the embedding of the last token, which alone decides on the next one.
    """
    torch.manual_seed(0)
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    count = len(vocabulary)
    width = count + count % 2
    network = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
            ),
            text_config=LlamaConfig(
                vocab_size=count,
                hidden_size=width,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                eos_token_id=vocabulary["</s>"],
                pad_token_id=0,
                bos_token_id=1,
            ),
            image_token_id=vocabulary["<image>"],
        )
    )
    text = network.model.language_model
    for name, value in text.layers.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.zeros_(value)
    torch.nn.init.eye_(text.embed_tokens.weight)
    torch.nn.init.zeros_(network.lm_head.weight)
    said = ["Assistant:", *words.split(), "</s>"]
    with torch.no_grad():
        for word, following in pairwise(said):
            network.lm_head.weight[vocabulary[following], vocabulary[word]] = 1.0
    network.generation_config.eos_token_id = vocabulary["</s>"]
    network.save_pretrained(folder)
    return folder
