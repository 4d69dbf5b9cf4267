# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 - full-width forms are among the texts
"""Check that llama.cpp reads texts and chats as transformers does, before a file is written.

llama.cpp says nothing when a file lacks what a tokenizer does. So the fields of a file are read
here as it reads them (`src/llama-vocab.cpp`, `common/chat.cpp`), and both readings are compared.
"""

import logging
import unicodedata
from collections.abc import Callable, Iterator, Sequence
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
    """The tokenizer that llama.cpp makes of the fields of a file (see `vocabulary`).

    No file can say the rest: `composes` says whether accents are composed, and `metaspace` before
    which texts a space is put ("first" or "always", never in front of another).
    """

    def __init__(
        self, fields: dict[str, Any], *, composes: bool = False, metaspace: str | None = None
    ) -> None:
        said = {key.removeprefix(KEY): it for key, it in fields.items()}
        self.composes, self.metaspace = composes, metaspace
        self.tokens: list[str] = said["tokens"]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        kinds = zip(self.tokens, said["token_type"], strict=True)
        special = [token for token, kind in kinds if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
        self.special = sorted(special, key=lambda token: -len(token.encode()))
        self.is_bytes = said["model"] == "gpt2"
        # What llama.cpp takes where the file says nothing.
        self.bos = said.get("bos_token_id", 11 if self.is_bytes else 1)
        self.eos = said.get("eos_token_id", 11 if self.is_bytes else 2)
        self.adds_bos, self.adds_eos = said["add_bos_token"], said["add_eos_token"]
        self.stops = {self.eos, *(self.ids[name] for name in END_NAMES & self.ids.keys())}
        self.stops |= {said[key] for key in ("eot_token_id", "eom_token_id") if key in said}
        self.rank: Callable[[str, str], float | None]
        if self.is_bytes:
            self.pre_tokenizer, self.keeps_words = PRE_TOKENIZERS[said["pre"]]
            merges = [tuple(it.split(" ", 1)) for it in said["merges"]]
            ranks = {pair: rank for rank, pair in reversed([*enumerate(merges)])}
            self.rank = lambda left, right: ranks.get((left, right))
        else:
            self.space = "▁" * said["add_space_prefix"]
            costs = dict(zip(self.tokens, (-it for it in said["scores"]), strict=True))
            self.rank = lambda left, right: costs.get(left + right)

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text, in which special tokens are read as such."""
        text = unicodedata.normalize("NFC", text) if self.composes else text
        parts: list[str | int] = [text]
        for token in (it for it in self.special if it in text):
            cuts = [it.split(token) if isinstance(it, str) else [it] for it in parts]
            parts = []
            for cut in cuts:
                parts += [it for piece in cut for it in (self.ids[token], piece)][1:]
        ids = [self.bos] * self.adds_bos
        for place, part in enumerate(it for it in parts if it != ""):
            ids += [part] if isinstance(part, int) else self.of_plain(part, is_first=not place)
        return ids + [self.eos] * self.adds_eos

    def of_plain(self, text: str, *, is_first: bool) -> Iterator[int]:
        """Return the ids of a text without special tokens."""
        if self.is_bytes:
            for word, _ in self.pre_tokenizer.pre_tokenize_str(text):
                whole = self.keeps_words and word in self.ids
                for part in [word] if whole else self.merged(word):
                    if part in self.ids:  # bytes that are no tokens are dropped
                        yield self.ids[part]
            return
        text = text.replace(" ", "▁")
        starts = is_first or self.metaspace == "always"
        if not self.metaspace or (starts and not text.startswith("▁")):
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
    reader, (usual, remarks) = FileTokenizer(fields), usual_reader(tokenizer, fields)
    prompts = [*rendered_chats(tokenizer, fields, reader)]
    texts = texts_for(tokenizer) | {"chats": tuple(prompt for _, prompt, _ in prompts)}
    differences = {}
    for label, examples in texts.items():
        for text in sorted(examples, key=len):
            ours, theirs = tokenizer(text)["input_ids"], usual(text)
            if ours != theirs:
                differences[label] = f"{text!r} becomes {theirs}, not {ours}"
                break
    for name, prompt, other in prompts:
        if prompt != other:
            differences[f"the chat template {name!r}"] = f"it gives {other!r}, not {prompt!r}"
    if lacking := [reader.tokens[it] for it in ends if it not in reader.stops]:
        shown = ", ".join(map(repr, lacking))
        differences["ends of generations"] = f"it would go on after {shown}"
    if further := sorted(reader.stops - {*ends}):
        shown = ", ".join(repr(reader.tokens[it]) for it in further)
        remarks.append(f"ends a generation at {shown} too, where transformers goes on")
    if not prompts:
        remarks.append("has no chat template of this model and makes up prompts of its own")
    else:
        prompt = prompts[0][1]
        bos, eos = reader.tokens[reader.bos], reader.tokens[reader.eos]
        if reader.adds_bos and not prompt.startswith(bos):
            remarks.append(f"puts {bos!r} in front of chats, which their template does not")
        if reader.adds_eos and not prompt.endswith(eos):
            remarks.append(f"puts {eos!r} behind chats, which their template does not")
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


def texts_for(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[str, ...]]:
    """Return texts by what they have, also tokens of this tokenizer with different neighbours."""
    texts = dict(TEXTS)
    for token in tokenizer.added_tokens_decoder.values():
        flags = [it for it in ("lstrip", "rstrip", "single_word") if getattr(token, it)]
        label = f"the added token {token.content!r}" + (f" ({', '.join(flags)})" if flags else "")
        it = token.content
        texts[label] = (f"a{it}b", f"a {it} b", f"a \n{it}\n b", f"{it}{it}x", it.swapcase())
    places = range(0, len(tokenizer), len(tokenizer) // 256 + 1)
    return texts | {"tokens": tuple(str(tokenizer.decode([place])) for place in places)}


def rendered_chats(
    tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], reader: FileTokenizer
) -> Iterator[tuple[str, str, str]]:
    """Name a template, and render chats by it with transformers' variables and llama.cpp's."""
    theirs = {
        "bos_token": reader.tokens[reader.bos],
        "eos_token": reader.tokens[reader.eos],
        "enable_thinking": True,
    }
    for field, template in fields.items():
        key, _, name = field.partition("chat_template")
        if key != "tokenizer." or name[:1] not in ("", "."):
            continue
        name = name.removeprefix(".") or "default"
        for chat in CHATS:
            rendered = []
            for variables in (tokenizer.special_tokens_map, theirs):
                given = {"add_generation_prompt": True, **variables}
                given["tools"] = [TOOL] if name == "tool_use" else None
                try:
                    made = render_jinja_template([chat], chat_template=template, **given)
                    rendered.append(str(made[0][0]))
                except (TemplateError, TypeError, ValueError) as error:
                    rendered.append(f"refused: {error}")
            yield name, rendered[0], rendered[1]
