# SPDX-License-Identifier: Apache-2.0
"""What a new repository takes over from a model's folder, read before the work begins.

After hours of work nothing of it can be missing, unreadable or changed. Contents stay as they are,
byte for byte, but for entries of JSON files that tell where something was on somebody's machine.
"""

import fnmatch
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import GENERATION_CONFIG_NAME

from ..errors import RequestError
from ..source.hub import HUB_ID, LEGAL_FILES, TOKENIZER_FILES, linked_file
from ..source.stored import is_inside, read_json
from .card import CARD_FILE, parsed_card

TOKENIZER_CONFIG = "tokenizer_config.json"
_PLACE = re.compile(r"(path|file|dir|folder)$")
"""How entries end that may tell where something was."""
_OLD_NAMES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Of classes that transformers 4 calls otherwise."""
NO_TEXTS = (".bin", ".gguf", ".json", ".pt", ".pth", ".py", ".safetensors")
"""How names of files end that no licence is in."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuxiliaryFiles:
    """Files of a model that go with it, and its card."""

    files: dict[str, bytes]
    """Contents by name, relative to the folder."""
    card: str
    """Text of the card, with metadata that can be read or none; empty if there is no card."""

    @property
    def licence(self) -> dict[str, Any]:
        """Return the licence fields of the card; empty if it states none."""
        data, fields = metadata(self.card), ("license", "license_name", "license_link")
        return {key: data[key] for key in fields if key in data}

    @property
    def nbytes(self) -> int:
        """Return the size of all files."""
        return sum(map(len, self.files.values()))

    def beside(
        self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> "AuxiliaryFiles":
        """Return the files as they serve beside another configuration, tried in a folder.

        The library takes the class of a tokenizer from the model type, which may overrule the
        files. Where the new type would make another tokenizer of them, the class is stated; where
        that is not enough, the tokenizer is written as it is. A generation configuration is added.
        """
        files = dict(self.files)
        stated = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
        with tempfile.TemporaryDirectory() as trial:
            try:
                config.save_pretrained(trial)
                if GENERATION_CONFIG_NAME not in files:
                    GenerationConfig.from_model_config(config).save_pretrained(trial)
                    path = Path(trial, GENERATION_CONFIG_NAME)
                    files[GENERATION_CONFIG_NAME] = path.read_bytes()
            except ValueError as error:  # of the library's validators
                raise RequestError(f"config.json cannot be written again: {error}") from error
            if "auto_map" not in stated:
                for changes in changed_files(stated, tokenizer):
                    files |= changes
                    for name, content in files.items():
                        path = Path(trial, name)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(content)
                    if serves(Path(trial), tokenizer):
                        break
        return replace(self, files=files)


def read_auxiliary_files(folder: Path, *others: str) -> AuxiliaryFiles:
    """Read the tokenizer, the generation configuration, the legal files, `others` and the card.

    Raises `RequestError` for a file that cannot be read, or is no JSON though it is called so.
    """
    files, card = {}, read_card(folder)
    patterns = (*TOKENIZER_FILES, GENERATION_CONFIG_NAME, *LEGAL_FILES, *others)
    paths = [  # glob would pass over links that lead nowhere
        path
        for path in sorted(folder.iterdir())
        if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
    ]
    if link := linked_file(metadata(card)):
        paths.append(folder / link)
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_dir():
                files[file.relative_to(folder).as_posix()] = _content(file)
    if TOKENIZER_CONFIG in files:
        for file in tokenizer_code(folder):
            files[file.name] = _content(file)
    return AuxiliaryFiles(files, card)


def changed_files(
    stated: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, bytes]]:
    """Yield files to try one after the other until they serve: the least change first."""
    yield {}
    wanted = type(tokenizer).__name__
    said = {**stated, "tokenizer_class": _OLD_NAMES.get(wanted, wanted)}
    yield {TOKENIZER_CONFIG: _as_json(said)}
    said["padding_side"] = tokenizer.padding_side
    yield {TOKENIZER_CONFIG: _as_json(said)}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        yield {"tokenizer.json": backend.to_str(pretty=True).encode()}


def serves(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer that loads from a folder does what this one does."""

    def function(of: PreTrainedTokenizerBase) -> tuple[Any, ...]:
        backend = getattr(of, "backend_tokenizer", None)
        does = type(of).__name__ if backend is None else backend.to_str()
        return does, of.padding_side, of.truncation_side, of.special_tokens_map

    try:
        return function(AutoTokenizer.from_pretrained(folder)) == function(tokenizer)
    except Exception:  # whatever the library's parsers raise: the class it takes is the wrong one
        return False


def _content(path: Path) -> bytes:
    """Return the content of a file, without JSON entries that name a local path."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(
            f"{path.name} in {path.parent} goes with the model and cannot be read "
            f"({error.strerror}). Restore it, or remove it."
        ) from error
    if path.suffix != ".json":
        return content
    entries = read_json(path)
    kept = {name: value for name, value in entries.items() if not is_place(name, value)}
    return content if len(kept) == len(entries) else _as_json(kept)


def _as_json(entries: dict[str, Any]) -> bytes:
    return (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()


def is_place(name: str, value: object) -> bool:
    """Return whether a JSON entry names a local path, and not a Hub id."""
    if not isinstance(value, str) or not _PLACE.search(name) or HUB_ID.fullmatch(value):
        return False
    return "/" in value or "\\" in value or bool(PureWindowsPath(value).drive)


def tokenizer_code(folder: Path) -> Iterator[Path]:
    """Yield the Python files of a tokenizer with trusted remote code."""
    entries = read_json(folder / TOKENIZER_CONFIG).get("auto_map") or {}
    classes = entries.get("AutoTokenizer") if isinstance(entries, dict) else entries
    classes = [classes] if isinstance(classes, str) else classes or []
    for name in dict.fromkeys(filter(None, classes)):
        if "--" not in name:  # else it stays in another repository
            path = folder / f"{name.partition('.')[0]}.py"
            yield path
            yield from map(Path, get_relative_import_files(path))


def read_card(folder: Path) -> str:
    """Return the card of a model, empty if it has none.

    Metadata that cannot be read is left out, and so is a `license_link` to what is not there.
    """
    path = folder / CARD_FILE
    if path.is_dir() or not os.path.lexists(path):
        return ""
    content = _content(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        logger.warning("%s of %s is not UTF-8 (%s): read as Latin-1.", CARD_FILE, folder, error)
        text = content.decode("latin-1")
    text = text.replace("\r\n", "\n")
    try:
        link = linked_file(metadata(text))
    except Exception as error:  # of the YAML parser and of the library, which builds on it
        reason = " ".join(str(error).split())
        logger.warning(
            "the metadata of %s in %s cannot be read (%s): no licence counts as stated.",
            *(CARD_FILE, folder, reason),
        )
        return REGEX_YAML_BLOCK.sub("", text, count=1).lstrip("\n")
    if link and not (is_inside(link) and is_legal_text(folder, link)):
        logger.warning(
            "license_link of %s in %s names %s, and there is no such text in the folder: the new "
            "card does not name it.",
            *(CARD_FILE, folder, link),
        )
        card = parsed_card(text)
        card.data.license_link = None
        text = str(card)
    return text


def is_legal_text(folder: Path, name: str) -> bool:
    """Return whether a name is that of legal texts, or of a file that can be one."""
    path = folder / name
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in LEGAL_FILES):
        return os.path.exists(path)
    return os.path.isfile(path) and path.suffix not in NO_TEXTS


def metadata(card: str) -> dict[str, Any]:
    """Return the metadata of a card, which may be empty."""
    return parsed_card(card).data.to_dict() if card else {}
