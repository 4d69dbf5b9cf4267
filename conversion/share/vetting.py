# SPDX-License-Identifier: Apache-2.0
"""Check that a model's folder is complete and holds nothing private, before it is published."""

import fnmatch
import getpass
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import get_token

import cmoe_hf

from ..errors import RequestError
from ..folder.auxiliary_files import read_card
from ..folder.card import CARD_FILE, parsed_card, stated, stated_hashes
from ..folder.paths import SUFFIX
from ..folder.shards import read_header
from ..folder.unfinished import SETTINGS, sha256_of
from ..source.hub import LEGAL_FILES, load_tokenizer
from ..source.stored import WEIGHTS_FILE, WEIGHTS_INDEX, read_headers, read_json

AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
BINARIES = ("*.png", "*.jpg", "*.model")
NOBODY = frozenset(("root", "user", "admin", "ubuntu", "debian", "ec2-user", "jovyan", "runner"))
"""User names that say nothing about the user."""
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "an API key": r"\b(?:sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16})\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
PERSON = (
    r"(?<![\w.:/-])(?:~|(?:/|file:/+|[A-Za-z]:\\+)(?:[\w.+-]+[/\\]+)+){0}(?![\w-])"
    r"|\\Users\\+{0}\b|(?<![\w.-]){0}@\w"
    r"|(?i:\b(?:user(?:[ _-]?name)?|log(?:in|name)|author|owner|creator))\b\W?\s*[:=]\W*{0}\b"
)
"""Where a word is somebody's name: in an absolute path, before an @, as the value of such a key."""
PATH = (
    r"(?<![\w.:/-])/(?:home|Users|root|mnt|tmp|scratch|workspace)/[\w.-]+"
    r"|\b[A-Za-z]:\\+Users\\+\w|\"(?:file:/)?/[\w.-]+/[\w./-]+\""
)
"""A path of somebody's machine."""


def check_folder(
    folder: Path, *, owner: str, licence: str | None, base_model: str | None, trusted: bool
) -> tuple[list[str], str]:
    """Check all that can be checked here.

    Return the files to publish, hidden ones left out, and the text that the card is to have.
    """
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = sorted(
        path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)
    )
    if pickles := [name for name in names if matches(name, PICKLES)]:
        raise RequestError(
            f"{folder.name} holds {', '.join(pickles)}: pickled files run code when they are "
            "opened and are not published. Remove them; the weights are in the safetensors files."
        )
    check_complete(folder)
    vocabulary = load_tokenizer(folder, trust_remote_code=trusted).get_vocab()
    if CARD_FILE not in names:
        raise RequestError(f"{folder.name} has no {CARD_FILE}: a model needs a card.")
    card = read_card(folder)
    if licence or base_model:
        card = stated(card, licence=licence, base_model=base_model)
    check_card(folder, card)
    check_private(folder, names, card, vocabulary, known={owner})
    return names, card


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether the last part of a name matches a pattern."""
    return any(fnmatch.fnmatch(PurePosixPath(name).name, pattern) for pattern in patterns)


def check_complete(folder: Path) -> None:
    """Check that the folder can be loaded by somebody who has nothing else."""
    older = (folder / "work" / SETTINGS).is_file()  # as earlier releases left it
    if older or SUFFIX in (folder.suffix, folder.resolve().parent.suffix):
        raise RequestError(f"{folder.name} is unfinished work: complete it with --resume first.")
    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder} has no config.json: it is not a model.")
    auto_map: Any = read_json(folder / "config.json").get("auto_map")
    save = "Load the model and save it again with save_pretrained."
    for name in AUTO_CLASSES if auto_map is not None else ():
        entry = auto_map.get(name, "--")
        if "--" in entry:
            raise RequestError(
                f"auto_map in config.json has no entry of its own for {name}: the repository "
                f"would not load by itself. {save}"
            )
        if not (folder / (module := entry.partition(".")[0] + ".py")).is_file():
            raise RequestError(
                f"{module} is missing, without which the model does not load. {save}"
            )
    stored = read_headers(folder)
    where = dict.fromkeys(stored, WEIGHTS_FILE)
    if (folder / WEIGHTS_INDEX).is_file():
        where = read_json(folder / WEIGHTS_INDEX)["weight_map"]
    if stray := sorted({path.name for path in folder.glob("*.safetensors")} - {*where.values()}):
        raise RequestError(
            f"{', '.join(stray)} is not a shard of this model (see {WEIGHTS_INDEX}); a loader "
            "might take it for one. Remove it, or the index if that is the one left over."
        )
    if missing := sorted(where.keys() - stored.keys()):
        raise RequestError(
            f"{WEIGHTS_INDEX} names {len(missing)} tensors that no shard has, {missing[0]} among "
            "them. Convert again, or restore the folder."
        )


def check_card(folder: Path, card: str) -> None:
    """Check that the card states licence, base model and the right hashes of the Python files."""
    data = parsed_card(card).data.to_dict()
    if not data.get("license"):
        raise RequestError(
            "the card (README.md) states no licence. Pass --license with the identifier of the "
            "source's licence, for example llama2 or apache-2.0."
        )
    bases = data.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    if not bases or not all(re.fullmatch(r"[\w.-]+/[\w.-]+", base) for base in bases):
        found = f"names {', '.join(bases)}, which is no Hub id" if bases else "names no base model"
        raise RequestError(
            f"the card (README.md) {found}. Pass --base-model with the id of the dense model on "
            "the Hub, OWNER/NAME."
        )
    for name, sha256 in stated_hashes(card).items():
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
            raise RequestError(
                f"{name} is not the file whose SHA-256 the card (README.md) states: it was changed "
                "or lost after the conversion. Restore it, or correct the card if you meant it."
            )


def check_private(
    folder: Path, names: list[str], card: str, vocabulary: Iterable[str], known: set[str]
) -> None:
    """Check that no file contains a secret, a user's name or a path of this machine.

    `card` is the text that README.md will have, `vocabulary` the model's, and `known` are public
    names, such as the owner of the repository.
    """
    secrets = SECRETS | ({"your token": re.escape(token)} if (token := get_token()) else {})
    private = dict(secrets)
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may not know
        user = "user"
    if user.lower() not in NOBODY | {name.lower() for name in known}:
        # An ordinary word, such as llama, is in every card: it counts only where it must mean
        # somebody, and is missed in prose and relative paths.
        pattern = PERSON if is_ordinary(user, vocabulary) else r"\b{0}\b"
        private["your user name"] = pattern.replace("{0}", re.escape(user))
    home = Path.home()
    private["a local path"] = f"{PATH}|{re.escape(str(home))}" if len(home.parts) > 2 else PATH
    for name in names:
        forbidden = secrets if matches(name, (*VOCABULARIES, *LEGAL_FILES)) else private
        for number, line in enumerate(lines_of(folder / name, card, name), 1):
            for what, pattern in forbidden.items():
                if re.search(pattern, line):
                    raise RequestError(
                        f"{name} tells {what} in line {number}. Remove it from the file."
                    )


def is_ordinary(user: str, vocabulary: Iterable[str]) -> bool:
    """Return whether a name is a word of the vocabulary or of this package's own files."""
    if user.lower() in {token.strip("\u0120\u2581 ").lower() for token in vocabulary}:
        return True
    word = re.compile(rf"(?<![a-z]){re.escape(user)}(?![a-z])", re.IGNORECASE)
    ours = [*Path(cmoe_hf.__file__).parent.glob("*.py")]
    ours += Path(__file__).parent.parent.rglob("*.py")
    return any(word.search(path.read_text(encoding="utf-8")) for path in ours)


def lines_of(path: Path, card: str, name: str) -> Iterator[str]:
    """Return the lines of a text file, the metadata of weights, nothing of a picture."""
    if name == CARD_FILE:
        yield from card.splitlines()
    elif path.suffix == ".safetensors":
        yield json.dumps(read_header(path), ensure_ascii=False)
    elif not matches(name, BINARIES):
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file
