# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as GGUF files have it: read from its own structure, not from the model's name."""

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import RequestError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens."""
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    CONTRACTIONS + WORDS + r"\p{N}{1,3}|" + REST: ("dbrx", "llama-bpe"),
    CONTRACTIONS + WORDS + r"\p{N}|" + REST: ("qwen2", None),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": (None, "tekken"),
}
"""llama.cpp's names of how a text is split before merging, by the expression: where merges always
apply, and where whole words that are tokens stay whole."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of the tokenizer, by key."""

    strings: dict[str, str]
    numbers: dict[str, int]
    switches: dict[str, bool]
    lists: dict[str, list[Any]]


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to `size` tokens.

    Raises `RequestError` for one that llama.cpp would run in another way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(f"a {type(tokenizer).__name__} has no tokenizer.json to read.")
    made = json.loads(backend.to_str())
    model = made["model"]
    if model["type"] != "BPE":
        raise RequestError(f"the tokenizer is a {model['type']} model; GGUF files get BPE only.")
    tokens, kinds = listed_tokens(made, size)
    lists: dict[str, list[Any]] = {"tokenizer.ggml.tokens": tokens}
    merges = [
        tuple(it.split(" ", 1)) if isinstance(it, str) else tuple(it) for it in model["merges"]
    ]
    strings, switches = {}, {"tokenizer.ggml.add_bos_token": adds_bos(tokenizer)}
    switches["tokenizer.ggml.add_eos_token"] = False
    if model.get("byte_fallback"):
        strings["tokenizer.ggml.model"] = "llama"
        strings["tokenizer.ggml.pre"] = "default"
        lists["tokenizer.ggml.scores"] = sentencepiece_scores(tokens, model["vocab"], merges)
        switches["tokenizer.ggml.add_space_prefix"] = adds_space(made)
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x"):
                kinds[index] = BYTE
        if model.get("unk_token") in model["vocab"]:
            kinds[model["vocab"][model["unk_token"]]] = UNKNOWN
    else:
        strings["tokenizer.ggml.model"] = "gpt2"
        strings["tokenizer.ggml.pre"] = pre_tokenizer(made)
        lists["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    lists["tokenizer.ggml.token_type"] = kinds
    if isinstance(tokenizer.chat_template, str):
        strings["tokenizer.chat_template"] = tokenizer.chat_template
    return Vocabulary(strings, special_ids(tokenizer), switches, lists)


def listed_tokens(made: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """All tokens by number, and of which kind each is."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    try:
        for token, index in made["model"]["vocab"].items():
            tokens[index], kinds[index] = token, NORMAL
        for added in made["added_tokens"]:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    except IndexError:
        raise RequestError(f"the tokenizer has tokens beyond the embedding's {size}.") from None
    return tokens, kinds


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Numbers of the special tokens that there are."""
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {f"tokenizer.ggml.{name}_token_id": it for name, it in found.items() if it is not None}


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every text begins with the token for that."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def pre_tokenizer(made: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits a text. Raises `RequestError`."""
    normalizer = (made["normalizer"] or {}).get("type")
    steps = made["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    whole_words = bool(made["model"].get("ignore_merges"))
    kinds = [step.get("type") for step in steps]
    name = None
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        uses_expression = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and uses_expression and not whole_words:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and uses_expression and not whole_words:
            name = "smollm" if steps[0]["individual_digits"] else None
        elif kinds == ["Split", "ByteLevel"] and not uses_expression:
            pattern = steps[0]["pattern"].get("Regex")
            name = SPLITS.get(pattern, (None, None))[whole_words]
    if name is None or normalizer not in (None, "NFC"):
        described = " + ".join([*([normalizer] if normalizer else []), *map(str, kinds)])
        raise RequestError(
            f"the tokenizer splits texts ({described}) in a way that has no name in llama.cpp, as "
            "far as is known here."
        )
    return name


def adds_space(made: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front of a text."""
    steps = [made["normalizer"] or {}, made["pre_tokenizer"] or {}]
    parts = [part for step in steps for part in step.get("normalizers", [step])]
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def sentencepiece_scores(
    tokens: list[str], vocabulary: dict[str, int], merges: list[tuple[str, ...]]
) -> list[float]:
    """Scores by which SentencePiece makes the same merges: the later a token, the lower.

    Raises `RequestError` if it would also merge what these merges do not.
    """
    rank = {left + right: place for place, (left, right) in reversed([*enumerate(merges)])}
    pairs = defaultdict(set)
    for left, right in merges:
        pairs[left + right].add(left)
    for token in rank:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary and left not in pairs[token]:
                raise RequestError(
                    f"the tokenizer has byte fallback, but {left!r} and {right!r} do not merge to "
                    f"the token {token!r}: SentencePiece, as which llama.cpp runs it, merges them."
                )
    return [-float(rank.get(token, len(merges))) for token in tokens]
