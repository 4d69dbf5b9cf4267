# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as the fields of a GGUF file, from its own structure, not from the model's name."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Steps
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitting(expression: str) -> PreTokenizer:
    """Return a pre-tokenizer that splits a text by an expression."""
    split = Split(Regex(expression), "isolated")
    return Steps([split, ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: dict[str, tuple[PreTokenizer, bool]] = {
    "gpt-2": (ByteLevel(add_prefix_space=False), False),
    "smollm": (Steps([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), False),
    "qwen2": (splitting(CONTRACTIONS + WORDS + r"\p{N}|" + REST), False),
    "dbrx": (splitting(CONTRACTIONS + WORDS + r"\p{N}{1,3}|" + REST), False),
    "llama-bpe": (splitting(CONTRACTIONS + WORDS + r"\p{N}{1,3}|" + REST), True),
    "tekken": (splitting(TEKKEN), True),
}
"""What llama.cpp's names of pre-tokenizers mean, and whether words that are tokens stay whole."""


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, ends: Sequence[int]
) -> dict[str, Any]:
    """Return what a file says of a tokenizer.

    Args:
        tokenizer: With a `tokenizer.json`.
        size: Rows of the embedding, to which the tokens are filled up.
        ends: Tokens that end a generation.

    Raises:
        RequestError: llama.cpp could not read a file with this tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(f"a {type(tokenizer).__name__} has no tokenizer.json to read.")
    stored = json.loads(backend.to_str())
    model = stored["model"]
    if model["type"] != "BPE":
        raise RequestError(f"the tokenizer is a {model['type']} model; GGUF files get BPE only.")
    tokens, kinds = listed_tokens(stored, size)
    merges = [
        tuple(it.split(" ", 1)) if isinstance(it, str) else tuple(it) for it in model["merges"]
    ]
    fields: dict[str, Any] = {KEY + "tokens": tokens, KEY + "token_type": kinds}
    if model.get("byte_fallback"):
        fields[KEY + "model"], fields[KEY + "pre"] = "llama", "default"
        fields[KEY + "scores"] = sentencepiece_scores(tokens, model["vocab"], merges)
        fields[KEY + "add_space_prefix"] = adds_space(stored)
        for byte in range(256):
            if (token := f"<0x{byte:02X}>") not in model["vocab"]:
                raise RequestError(f"the tokenizer has byte fallback, but no token {token}.")
            kinds[model["vocab"][token]] = BYTE
        if model.get("unk_token") in model["vocab"]:
            kinds[model["vocab"][model["unk_token"]]] = UNKNOWN
    elif merges:
        fields[KEY + "model"], fields[KEY + "pre"] = "gpt2", pre_tokenizer(stored)
        fields[KEY + "merges"] = [" ".join(pair) for pair in merges]
    else:
        raise RequestError("the tokenizer has no merges: llama.cpp reads no file without them.")
    return fields | special_tokens(tokenizer, tokens, ends) | chat_templates(tokenizer)


def listed_tokens(stored: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return all tokens by id, and their types."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    try:
        for token, index in stored["model"]["vocab"].items():
            tokens[index], kinds[index] = token, NORMAL
        for added in stored["added_tokens"]:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    except IndexError:
        raise RequestError(f"the tokenizer has tokens beyond the embedding's {size}.") from None
    return tokens, kinds


END_NAMES = frozenset(
    (
        *("</s>", "<eos>", "[EOS]", "[EOT]", "<EOT>", "_<EOT>", "<|eot_id|>", "<|eom_id|>"),
        *("<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"),
        *(
            "<end_of_utterance>",
            "<\uff5cend▁of▁sentence\uff5c>",
            "<turn|>",
            "<|tool_response>",
            "[e~[",
        ),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|fim_pad|>", "<fim-pad>", "[PAD]"),
        *("<fim_pad>", "<PAD>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>"),
        *("<reponame>", "<|file_sep|>"),
    )
)
"""Tokens that end a generation in llama.cpp because of their names."""


def special_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], ends: Sequence[int]
) -> dict[str, Any]:
    """Return the ids of special tokens, and which of them every text gets.

    A file can say two tokens that end a generation, beside `eos` and those of `END_NAMES`.
    """
    ids = tokenizer("a")["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is None and ends:
        eos = ends[0]
    further = sorted(set(ends) - {eos}, key=lambda it: tokens[it] in END_NAMES)
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": eos,
        **dict(zip(("eot", "eom"), further, strict=False)),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {
        KEY + "add_bos_token": ids[:1] == [tokenizer.bos_token_id],
        KEY + "add_eos_token": ids[-1:] == [eos],
        **{f"{KEY}{name}_token_id": it for name, it in found.items() if it is not None},
    }


def chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the chat template, and further ones by name. Raises `RequestError` without default."""
    given = tokenizer.chat_template
    named = dict(given) if isinstance(given, Mapping) else {"default": given} if given else {}
    if named and "default" not in named:
        raise RequestError(
            f"of the chat templates {', '.join(named)} none is called default: llama.cpp would "
            "make up prompts of its own. Call one of them default."
        )
    fields = {"tokenizer.chat_template": named.pop("default")} if named else {}
    if named:
        fields["tokenizer.chat_templates"] = list(named)
    return fields | {f"tokenizer.chat_template.{name}": text for name, text in named.items()}


def pre_tokenizer(stored: dict[str, Any]) -> str:
    """Return llama.cpp's name of how a text is split into words. Raises `RequestError`."""
    whole_words = bool(stored["model"].get("ignore_merges"))
    steps = steps_of(stored)
    for name, (known, keeps_words) in PRE_TOKENIZERS.items():
        twin = Tokenizer(BPE())
        twin.pre_tokenizer = known
        if steps_of(json.loads(twin.to_str())) == steps and keeps_words == whole_words:
            return name
    raise RequestError(
        f"the tokenizer splits texts ({' + '.join(str(it.get('type')) for it in steps)}) in a way "
        "that has no name in llama.cpp, as far as is known here."
    )


def steps_of(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer, without what concerns only offsets."""
    steps = stored["pre_tokenizer"] or {}
    return [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in steps.get("pretokenizers", [steps])
    ]


def adds_space(stored: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front of a text."""
    steps = [stored["normalizer"] or {}, stored["pre_tokenizer"] or {}]
    parts = [part for step in steps for part in step.get("normalizers", [step])]
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def sentencepiece_scores(
    tokens: list[str], vocabulary: dict[str, int], merges: list[tuple[str, ...]]
) -> list[float]:
    """Return scores by which SentencePiece makes the same merges: the later a token, the lower.

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
