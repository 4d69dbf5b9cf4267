# SPDX-License-Identifier: Apache-2.0
"""Pico tokenizers of every kind that a GGUF file can hold, trained on our text."""

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from cmoe_hf.conversion.demo import CALIBRATION
from cmoe_hf.conversion.share.gguf_vocabulary import CONTRACTIONS, REST, TEKKEN, WORDS


def byte_level(*steps, **options):
    """A tokenizer that splits texts like this, trained on our text."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps]) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>"],
    )
    tokenizer.train([str(CALIBRATION)], trainer)
    return tokenizer


def split(expression):
    """What Llama 3 and Qwen2 do before they merge."""
    return (
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


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


ENGLISH = pre_tokenizers.ByteLevel(add_prefix_space=False)
GROUPS_OF_THREE = split(CONTRACTIONS + WORDS + r"\p{N}{1,3}|" + REST)


def with_added_tokens(make):
    """Its vocabulary has tokens that overlap, and ordinary words."""
    tokenizer = make()
    tokenizer.add_special_tokens(["<|a|>", "<|a|>b"])
    tokenizer.add_tokens([AddedToken("wörd", normalized=False)])
    return tokenizer


TOKENIZERS = {
    "gpt-2": lambda: byte_level(ENGLISH),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), ENGLISH),
    "qwen2": lambda: byte_level(*split(CONTRACTIONS + WORDS + r"\p{N}|" + REST)),
    "dbrx": lambda: byte_level(*GROUPS_OF_THREE),
    "llama-bpe": lambda: byte_level(*GROUPS_OF_THREE, ignore_merges=True),
    "tekken": lambda: byte_level(*split(TEKKEN), ignore_merges=True),
    "default": sentencepiece,
    "gpt-2, added tokens": lambda: with_added_tokens(TOKENIZERS["gpt-2"]),
    "default, added tokens": lambda: with_added_tokens(sentencepiece),
}
"""By llama.cpp's names of how they split texts."""
