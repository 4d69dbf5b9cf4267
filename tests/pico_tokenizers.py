# SPDX-License-Identifier: Apache-2.0
"""Pico tokenizers of every kind that a GGUF file can hold, trained on our text."""

import json
from functools import partial

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from cmoe_hf.conversion.embedded import CALIBRATION
from cmoe_hf.conversion.share.gguf_vocabulary import PRE_TOKENIZERS


def byte_level(splitter, **options):
    """A tokenizer that splits texts like this, trained on our text."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>"],
    )
    tokenizer.train([str(CALIBRATION)], trainer)
    return tokenizer


def sentencepiece():
    """A tokenizer as Llama 2 has it: all pairs of tokens that make a token merge."""
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    first = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    first.normalizer = normalizers.Sequence(spaces)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=special)
    first.train([str(CALIBRATION)], trainer)
    made = json.loads(first.to_str())
    vocabulary = made["model"]["vocab"]
    ordered = sorted(vocabulary, key=vocabulary.get)[len(special) :]
    made["model"]["merges"] = [
        [token[:cut], token[cut:]]
        for token in ordered
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    made["added_tokens"] = made["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(made))


def with_added_tokens(make):
    """Its vocabulary has tokens that overlap, and ordinary words."""
    tokenizer = make()
    tokenizer.add_special_tokens(["<|a|>", "<|a|>b"])
    tokenizer.add_tokens([AddedToken("wörd", normalized=False)])
    return tokenizer


TOKENIZERS = {
    **{
        name: partial(byte_level, splitter, ignore_merges=whole_words)
        for name, (splitter, whole_words) in PRE_TOKENIZERS.items()
    },
    "default": sentencepiece,
    "gpt-2, added tokens": lambda: with_added_tokens(TOKENIZERS["gpt-2"]),
    "default, added tokens": lambda: with_added_tokens(sentencepiece),
}
"""By llama.cpp's names of how they split texts."""
