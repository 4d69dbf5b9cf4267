# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as the fields of a GGUF file, from its own structure, not from the model's name."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex
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


END_NAMES = frozenset(
    (
        *("</s>", "<eos>", "[EOS]", "[EOT]", "<EOT>", "_<EOT>", "<|eot_id|>", "<|eom_id|>"),
        *("<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>"),
        *("<end_of_utterance>", "<\uff5cend▁of▁sentence\uff5c>", "<|tool_response>", "[e~["),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|fim_pad|>", "<fim-pad>", "[PAD]"),
        *("<fim_pad>", "<PAD>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>"),
        *("<reponame>", "<|file_sep|>"),
    )
)
"""Tokens that end a generation in llama.cpp because of their names."""


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, ends: Sequence[int]
) -> dict[str, Any]:
    """Return what a file says of a tokenizer, filled up to `size` tokens.

    `ends` are the tokens that end a generation. Raises `RequestError` if llama.cpp could not read
    a file with this tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(f"a {type(tokenizer).__name__} has no tokenizer.json to read.")
    stored = json.loads(backend.to_str())
    model = stored["model"]
    if model["type"] != "BPE":
        raise RequestError(f"the tokenizer is a {model['type']} model; GGUF files get BPE only.")
    ids = model["vocab"]
    listed = [(token, index, NORMAL) for token, index in ids.items()]
    for it in stored["added_tokens"]:
        listed.append((it["content"], it["id"], CONTROL if it["special"] else USER_DEFINED))
    if max(index for _, index, _ in listed) >= size:
        raise RequestError(f"the tokenizer has tokens beyond the embedding's {size}.")
    tokens, kinds = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    for token, index, kind in listed:
        tokens[index], kinds[index] = token, kind
    merges = [tuple(it.split(" ", 1) if isinstance(it, str) else it) for it in model["merges"]]
    if model.get("byte_fallback"):
        own = {"model": "llama", "pre": "default", "add_space_prefix": adds_space(stored)}
        own["scores"] = sentencepiece_scores(tokens, ids, merges)
        for byte in range(256):
            if (token := f"<0x{byte:02X}>") not in ids:
                raise RequestError(f"the tokenizer has byte fallback, but no token {token}.")
            kinds[ids[token]] = BYTE
        if model.get("unk_token") in ids:
            kinds[ids[model["unk_token"]]] = UNKNOWN
    elif merges:
        own = {"model": "gpt2", "pre": pre_tokenizer(stored), "merges": [*map(" ".join, merges)]}
    else:
        raise RequestError("the tokenizer has no merges: llama.cpp reads no file without them.")
    own |= {"tokens": tokens, "token_type": kinds, **special_tokens(tokenizer, tokens, ends)}
    return {KEY + key: it for key, it in own.items()} | chat_templates(tokenizer)


def special_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], ends: Sequence[int]
) -> dict[str, Any]:
    """Return the ids of special tokens, and which of them every text gets.

    A file can say two tokens that end a generation, beside `eos` and those of `END_NAMES`.
    """
    ids, eos = tokenizer("a")["input_ids"], tokenizer.eos_token_id
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
        "add_bos_token": ids[:1] == [tokenizer.bos_token_id],
        "add_eos_token": ids[-1:] == [eos],
        **{f"{name}_token_id": it for name, it in found.items() if it is not None},
    }


def chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the chat templates by name. Raises `RequestError` without default."""
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
    steps = steps_of(stored["pre_tokenizer"])
    whole_words = bool(stored["model"].get("ignore_merges"))
    for name, (known, keeps_words) in PRE_TOKENIZERS.items():
        if steps_of(json.loads(known.__getstate__())) == steps and keeps_words == whole_words:
            return name
    raise RequestError(
        f"the tokenizer splits texts ({' + '.join(str(it.get('type')) for it in steps)}) in a way "
        "that has no name in llama.cpp, as far as is known here."
    )


def steps_of(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, without what concerns only offsets."""
    step = step or {}
    steps = step.get("pretokenizers") or step.get("normalizers") or [step]
    return [{key: it for key, it in one.items() if key != "trim_offsets"} for one in steps]


def adds_space(stored: dict[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer puts a space in front of a text."""
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in (*steps_of(stored["normalizer"]), *steps_of(stored["pre_tokenizer"]))
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
