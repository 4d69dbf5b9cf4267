# SPDX-License-Identifier: Apache-2.0
"""Finds and fetches the folders of models, on the disk or the Hub, and loads their tokenizers."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from posixpath import normpath
from typing import Any
from urllib.parse import unquote, urlsplit

import transformers
from huggingface_hub import hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from yaml import YAMLError

from cmoe_hf import carved_classes

from ..errors import CMoEError, RequestError
from .stored import read_json

ADAPTER = "adapter_config.json"
MERGE = (
    "Merge the adapter into its model first: load both with PEFT, call merge_and_unload(), and "
    "save_pretrained the result with the tokenizer."
)
LEGAL_FILES = tuple(
    "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in pattern)
    for pattern in (
        *("license*", "licence*", "unlicense*", "copying*", "copyright*"),
        *("notice*", "*use_policy*", "third*party*"),
    )
)
"""Patterns of names, in any case; also what of a repository is downloaded."""
VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer.model*", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates"),
)
"""Files and folders; what a tokenizer has of them."""
SOURCE_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "README.md"),
    *TOKENIZER_FILES,
    *LEGAL_FILES,
)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SNAPSHOT = re.compile(r"models--(.+)/snapshots/([0-9a-f]{40})")
"""How the path of a Hub model's files in the library's cache ends: its id, and the commit."""


def find_model(model: str | Path, *, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Return folder, name and commit of a model. Fetches only `config.json` of a Hub model.

    The classes of a carved model's family are made and registered with the Auto classes.

    Raises `RequestError` if there is no such folder or repository, or it is gated, and
    `CMoEError` if the Hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RequestError(
                f"folder {folder} has no config.json: it is not a model."
                + (f" It holds {ADAPTER}. {MERGE}" if (folder / ADAPTER).is_file() else "")
            )
        register_family(folder)
        return folder, local_name(folder)[0], None
    if folder.exists() or not HUB_ID.fullmatch(str(model)):
        raise RequestError(f"{model} is neither a folder nor the id of a Hub repository.")
    config = Path(from_hub(hf_hub_download, str(model), revision, filename="config.json"))
    register_family(config.parent)
    return config.parent, str(model), config.parent.name


def register_family(folder: Path) -> None:
    """Register the classes of a folder's family, if it is carved. Raises `RequestError`."""
    model_type = str(read_json(folder / "config.json").get("model_type"))
    if not model_type.startswith("cmoe_"):
        return
    try:
        carved_classes(model_type)
    except KeyError as error:
        raise RequestError(
            f"{folder.name} is a {model_type}, and this transformers ({transformers.__version__}) "
            f"has no {model_type.removeprefix('cmoe_')}. Install the version that it was carved "
            "with, or a newer one."
        ) from error


def local_name(folder: Path) -> tuple[str, str | None]:
    """Return the Hub id and the commit of a folder in the Hub's cache, else its bare name."""
    if found := SNAPSHOT.fullmatch("/".join(folder.resolve().parts[-3:])):
        return found[1].replace("--", "/"), found[2]
    return folder.resolve().name, None


def public_name(name: str | Path) -> str:
    """Return the name that may be published: of an absolute path, its last part."""
    return local_name(Path(os.path.normpath(name)))[0] if Path(name).is_absolute() else str(name)


def fetch_model(name: str, revision: str | None, *, code: bool = False) -> Path:
    """Download the files of a Hub model that a conversion or an evaluation needs."""
    patterns = [*SOURCE_FILES, *(["*.py"] if code else [])]
    folder = Path(from_hub(snapshot_download, name, revision, allow_patterns=patterns))
    with suppress(OSError, ValueError, YAMLError):  # a card that cannot be read names no licence
        link = linked_file(metadata_load(folder / "README.md") or {})
        if link and not (folder / link).exists():
            linked = [escape(link), escape(link) + "/*"]
            from_hub(snapshot_download, name, folder.name, allow_patterns=linked)
    return folder


def linked_file(card: Mapping[str, Any]) -> str | None:
    """Return the path that `license_link` of a card's metadata names; None for none or a URL."""
    link = card.get("license_link")
    if not link or not isinstance(link, str):
        return None
    parts = urlsplit(link)
    return None if parts.scheme in ("http", "https") else normpath(unquote(parts.path))


HUB_ERRORS: dict[type[Exception], tuple[type[CMoEError], str]] = {
    GatedRepoError: (
        RequestError,
        "{name} is gated. Ask for access at its page on the Hub, then log in with `hf auth login` "
        "or set HF_TOKEN.",
    ),
    RevisionNotFoundError: (
        RequestError,
        "{name} exists on the Hub, but has no revision {revision}.",
    ),
    RepositoryNotFoundError: (
        RequestError,
        "there is no folder and no Hub repository named {name}. Check the spelling; if it is "
        "private, log in with `hf auth login`.",
    ),
    LocalEntryNotFoundError: (
        CMoEError,
        "cannot reach the Hub, and {where} is not in the local cache. Check the connection and "
        "HF_HUB_OFFLINE, or give a local folder.",
    ),
    EntryNotFoundError: (RequestError, "{where} has no config.json: it is not a model."),
    HFValidationError: (RequestError, "{name} is neither a folder nor a valid Hub id."),
    Exception: (  # of the HTTP library, which differs between versions
        CMoEError,
        "cannot reach the Hub for {where}: {error}. Check the connection, or give a local folder.",
    ),
}
"""What failures of a download mean; the first that fits counts."""


def from_hub(download: Any, name: str, revision: str | None, **arguments: Any) -> str:
    """Call a download function of huggingface_hub. Raises `CMoEError` for all its failures."""
    where = f"{name} at revision {revision}" if revision else name
    try:
        return download(name, revision=revision, **arguments)
    except Exception as error:
        kind, text = next(it for known, it in HUB_ERRORS.items() if isinstance(error, known))
        raise kind(text.format(name=name, where=where, revision=revision, error=error)) from error


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder. Raises `RequestError` if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises whatever its parsers raise
        if any(path.match(name) for path in folder.iterdir() for name in VOCABULARY_FILES):
            reason = " ".join(str(error).split()).replace(str(folder), folder.name)
            if "trust_remote_code" in reason:
                reason = "it has code of its own. Pass --trust-remote-code if you have read it."
            raise RequestError(
                f"the tokenizer of {folder.name} cannot be loaded: {reason}"
            ) from error
        tokenizer = None
    # Without files the library makes some tokenizers that know their special tokens only.
    if tokenizer is None or not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}:
        raise RequestError(
            f"{folder.name} has no tokenizer (such as tokenizer.json, or vocab.json and "
            "merges.txt). Copy the tokenizer files of the model into the folder."
        )
    return tokenizer
