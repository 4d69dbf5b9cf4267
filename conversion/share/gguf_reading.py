# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 - full-width forms are among the texts
"""Check that llama.cpp reads texts and chats as transformers does, before a file is written.

llama.cpp says nothing when a file lacks what a tokenizer does. So the fields of a file are read
here as it reads them (`src/llama-vocab.cpp`, `common/chat.cpp`), and both readings are compared.
"""

import logging
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import RequestError
from .gguf_vocabulary import (
    CONTROL,
    END_NAMES,
    KEY,
    PRE_TOKENIZERS,
    UNKNOWN,
    USER_DEFINED,
)

logger = logging.getLogger(__name__)
TEXTS = {
    "an empty text": ("",),
    "words": ("a", "The class statement", " leading and trailing ", "don't I'LL we've it's x's'"),
    "case": ("ALL CAPS", "mixedCase CamelCase", "ÉCOLE École ÄÖÜ ЯБЛОКО Яблоко ΣΊΣΥΦΟΣ ǅ"),
    "digits": ("1234567890", "3.14 1,000 x86_64 2x4", "１２３ ٣٤٥ Ⅷ ½ x²"),
    "spaces": ("  two", "a  b   c    d", "a\tb\t\tc", "tail   ", "a\u00a0b\u3000c\u2009d", "    "),
    "line breaks": ("a\nb", "a\n\nb\r\nc\n", "\n", " \n \n  x", "end.\n\n\n", "a \n\tb"),
    "code": ("def f(x):\n    return x**2  # {'a': [1]}\n", '<p class="x">&amp;</p> a/b//c\\d;'),
    "punctuation": ("«Why?!» — “so…” ``x'' ¿no? (a)[b]{c} $5 50% #1 @me a_b~c|d^e`f`", "...!!\n/"),
    "full-width forms": ("ＡＢＣ ａｂｃ ！？ ｶﾞ",),
    "ligatures": ("ﬁne oﬃce ﬂow ĳ æ œ ß ẞ",),
    "accents": ("naïve façade Grüße", "Ångström \u212b Ω \u2126"),
    "decomposed accents": ("nai\u0308ve fac\u0327ade A\u030angstro\u0308m",),
    "other scripts": ("日本語の文 中文 한국어", "हिन्दी العربية עברית ไทย ქართული"),
    "emoji": ("🎉", "👩\u200d💻 🇩🇪 👍🏽 ❤\ufe0f", "a🎉b"),
    "control characters": ("a\x00b\x07c\x7f\u200b\ufeffd\u00add",),
    "SentencePiece's space": ("a▁b ▁c <0x41>",),
}
"""Texts of which each has something that tokenizers treat differently."""
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
CHATS = [[{"role": "user", "content": " Hi! "}]]
CHATS.append([{"role": "system", "content": "Be brief."}, *CHATS[0]])
CHATS.append([*CHATS[1], {"role": "assistant", "content": "Yes?\n"}, *CHATS[0]])
SHOWN = 12
"""Differences that a message names."""


class FileTokenizer:
    """The tokenizer that llama.cpp makes of the fields of a file."""

    def __init__(
        self, fields: dict[str, Any], *, composes: bool = False, metaspace: str | None = None
    ) -> None:
        """Read the fields.

        Args:
            fields: See `vocabulary`.
            composes, metaspace: Whether accents are composed, and before which texts a space is
                put ("first" or "always", never in front of another): what no file can say.
        """
        self.composes, self.metaspace = composes, metaspace
        self.tokens: list[str] = fields[KEY + "tokens"]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        kinds = zip(self.tokens, fields[KEY + "token_type"], strict=True)
        special = [token for token, kind in kinds if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
        self.special = sorted(special, key=lambda token: -len(token.encode()))
        self.is_bytes = fields[KEY + "model"] == "gpt2"
        self.bos, self.eos = (  # what llama.cpp takes where the file says nothing
            fields.get(f"{KEY}{name}_token_id", 11 if self.is_bytes else number)
            for name, number in (("bos", 1), ("eos", 2))
        )
        self.adds_bos, self.adds_eos = fields[KEY + "add_bos_token"], fields[KEY + "add_eos_token"]
        self.rank: Callable[[str, str], float | None]
        if self.is_bytes:
            self.pre_tokenizer, self.keeps_words = PRE_TOKENIZERS[fields[KEY + "pre"]]
            merges = [tuple(it.split(" ", 1)) for it in fields[KEY + "merges"]]
            ranks = {pair: rank for rank, pair in reversed([*enumerate(merges)])}
            self.rank = lambda left, right: ranks.get((left, right))
        else:
            self.space = "▁" * fields[KEY + "add_space_prefix"]
            costs = dict(zip(self.tokens, (-it for it in fields[KEY + "scores"]), strict=True))
            self.rank = lambda left, right: costs.get(left + right)

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text, in which special tokens are read as such."""
        text = unicodedata.normalize("NFC", text) if self.composes else text
        parts: list[str | int] = [text] if text else []
        for token in (it for it in self.special if it in text):
            parts = [piece for part in parts for piece in self.cut(part, token)]
        ids = [self.bos] * self.adds_bos
        for place, part in enumerate(parts):
            ids += [part] if isinstance(part, int) else self.of_plain(part, is_first=not place)
        return ids + [self.eos] * self.adds_eos

    def cut(self, part: str | int, token: str) -> Iterator[str | int]:
        """Take a special token out of a part of a text."""
        if isinstance(part, int):
            yield part
            return
        for number, piece in enumerate(part.split(token)):
            if number:
                yield self.ids[token]
            if piece:
                yield piece

    def of_plain(self, text: str, *, is_first: bool) -> Iterator[int]:
        """Return the ids of a text without special tokens."""
        if self.is_bytes:
            for word, _ in self.pre_tokenizer.pre_tokenize_str(text):
                if self.keeps_words and word in self.ids:
                    yield self.ids[word]
                else:  # bytes that are no tokens are dropped
                    yield from (self.ids[it] for it in self.merged(word) if it in self.ids)
            return
        text = text.replace(" ", "▁")
        if not self.metaspace or (
            (is_first or self.metaspace == "always") and not text.startswith("▁")
        ):
            text = self.space + text
        for part in self.merged(text):
            if part in self.ids:
                yield self.ids[part]
            else:
                yield from (self.ids[f"<0x{byte:02X}>"] for byte in part.encode())

    def merged(self, word: str) -> list[str]:
        """Merge what ranks first until nothing does."""
        parts = [*word]
        while True:
            ranks = [self.rank(*pair) for pair in pairwise(parts)]
            ranked = [(rank, place) for place, rank in enumerate(ranks) if rank is not None]
            if not ranked:
                return parts
            _, place = min(ranked)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]


def check_reading(
    tokenizer: PreTrainedTokenizerBase,
    fields: dict[str, Any],
    ends: Sequence[int],
    *,
    force: bool = False,
) -> None:
    """Compare what llama.cpp reads from a file with what transformers reads from the model.

    What no file can say, and many models have, is a warning. Raises `RequestError` for the rest,
    which `force` turns into a warning too.
    """
    reader = FileTokenizer(fields)
    prompts = [*rendered_chats(tokenizer, fields, reader)]
    texts = {**TEXTS, **around_added_tokens(tokenizer), **sampled_tokens(tokenizer)}
    texts["chats"] = tuple(ours for _, ours, _ in prompts)
    usual, remarks = usual_reader(tokenizer, fields)
    differences = dict(differing_texts(texts, tokenizer, usual))
    for name, ours, theirs in prompts:
        if ours != theirs:
            differences[f"the chat template {name!r}"] = f"it gives {theirs!r}, not {ours!r}"
    stops = {reader.eos, *(reader.ids[name] for name in END_NAMES & reader.ids.keys())}
    stops |= {
        it for key, it in fields.items() if key in (KEY + "eot_token_id", KEY + "eom_token_id")
    }
    if lacking := [reader.tokens[it] for it in ends if it not in stops]:
        shown = ", ".join(map(repr, lacking))
        differences["ends of generations"] = f"it would go on after {shown}"
    if further := sorted(stops - {*ends}):
        shown = ", ".join(repr(reader.tokens[it]) for it in further)
        remarks.append(f"ends a generation at {shown} too, where transformers goes on")
    remarks += added_to_chats(prompts, reader)
    for remark in remarks:
        logger.warning("llama.cpp %s.", remark)
    if not differences:
        return
    names = ", ".join([*differences][:SHOWN]) + ", …" * (len(differences) > SHOWN)
    example = min(differences.values(), key=len)
    message = f"llama.cpp reads this model otherwise: {names}: for example {example}."
    if not force:
        raise RequestError(f"{message} Pass --force to write the file nevertheless.")
    logger.warning("%s", message)


def usual_reader(
    tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]
) -> tuple[FileTokenizer, list[str]]:
    """Return a reader that does what every llama.cpp omits for such a tokenizer; say what it is."""
    backend, remarks = tokenizer.backend_tokenizer, []
    composes = isinstance(backend.normalizer, NFC)
    scheme = getattr(backend.pre_tokenizer, "prepend_scheme", "never")
    if composes:
        remarks.append("does not compose accents, as the tokenizer does (NFC)")
    if scheme != "never":
        remarks.append(
            "puts a space in front of every text, also of one that begins with a space"
            + (" or follows a special token" if scheme == "first" else "")
        )
    if fields[KEY + "pre"] == "tekken":
        remarks.append("splits words otherwise at combining marks and capitals beyond A to Z")
    metaspace = None if scheme == "never" else scheme
    return FileTokenizer(fields, composes=composes, metaspace=metaspace), remarks


def around_added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[str, ...]]:
    """Return texts with every added token between different neighbours."""
    texts: dict[str, tuple[str, ...]] = {}
    for token in tokenizer.added_tokens_decoder.values():
        flags = [it for it in ("lstrip", "rstrip", "single_word") if getattr(token, it)]
        label = f"the added token {token.content!r}" + (f" ({', '.join(flags)})" if flags else "")
        it = token.content
        texts[label] = (f"a{it}b", f"a {it} b", f"a \n{it}\n b", f"{it}{it}x", it.swapcase())
    return texts


def sampled_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[str, ...]]:
    """Return the texts of tokens all over the vocabulary."""
    places = range(0, len(tokenizer), len(tokenizer) // 256 + 1)
    return {"tokens": tuple(str(tokenizer.decode([place])) for place in places)}


def differing_texts(
    texts: Mapping[str, tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, reader: FileTokenizer
) -> Iterator[tuple[str, str]]:
    """Say which kinds of texts are read otherwise, with the shortest example of each."""
    for label, examples in texts.items():
        for text in sorted(examples, key=len):
            ours, theirs = tokenizer(text)["input_ids"], reader(text)
            if ours != theirs:
                yield label, f"{text!r} becomes {theirs}, not {ours}"
                break


def rendered_chats(
    tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], reader: FileTokenizer
) -> Iterator[tuple[str, str, str]]:
    """Name a template, and render chats by it as transformers and as llama.cpp do.

    llama.cpp gives other variables to a template.
    """
    variables = {
        "bos_token": reader.tokens[reader.bos],
        "eos_token": reader.tokens[reader.eos],
        "enable_thinking": True,
    }
    key = "tokenizer.chat_template"
    for field, template in fields.items():
        if field != key and not field.startswith(key + "."):
            continue
        name = field.removeprefix(key).removeprefix(".") or "default"
        tools = [TOOL] if name == "tool_use" else None
        for chat in CHATS:
            ours, theirs = (
                outcome(template, chat, tools, **known)
                for known in (tokenizer.special_tokens_map, variables)
            )
            yield name, ours, theirs


def outcome(template: str, chat: list[dict[str, str]], tools: Any, **variables: Any) -> str:
    """Return a chat's prompt, or why the template refuses the chat."""
    try:
        options = {"tools": tools, "add_generation_prompt": True, **variables}
        return str(render_jinja_template([chat], chat_template=template, **options)[0][0])
    except (TemplateError, TypeError, ValueError) as error:
        return f"refused: {error}"


def added_to_chats(prompts: Sequence[tuple[str, str, str]], reader: FileTokenizer) -> Iterator[str]:
    """Say what llama.cpp adds to a chat that its template does not have."""
    if not prompts:
        yield "has no chat template of this model and makes up prompts of its own for chats"
        return
    _, prompt, _ = prompts[0]
    bos, eos = reader.tokens[reader.bos], reader.tokens[reader.eos]
    if reader.adds_bos and not prompt.startswith(bos):
        yield f"puts {bos!r} in front of chats, which their template does not"
    if reader.adds_eos and not prompt.endswith(eos):
        yield f"puts {eos!r} behind chats, which their template does not"
