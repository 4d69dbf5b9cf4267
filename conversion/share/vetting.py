# SPDX-License-Identifier: Apache-2.0
"""What must be true of a model's folder before strangers get it: it is whole, and it is nobody's
private matter."""

import fnmatch
import getpass
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import get_token
from transformers import AutoConfig, AutoModelForCausalLM

import cmoe_hf
from cmoe_hf import FAMILIES

from ..errors import RequestError
from ..folder.card import CARD_FILE, parsed_card, stated_hashes
from ..folder.paths import SUFFIX
from ..folder.shards import read_header
from ..folder.unfinished import SETTINGS, sha256_of
from ..source.checkpoint import LEGAL_FILES, load_tokenizer
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
PATHS = {
    "a local path": r"(?<![\w.:/-])/(?:home|Users|root|mnt|tmp|scratch|workspace)/[\w.-]+"
    r"|\b[A-Za-z]:\\+Users\\+\w|\"(?:file:/)?/[\w.-]+/[\w./-]+\""
}


def files_to_publish(folder: Path) -> list[str]:
    """Names, relative to the folder, of all files but hidden ones. Raises for pickled weights."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    pickles = [name for name in names if matches(name, PICKLES)]
    if pickles:
        raise RequestError(
            f"{folder.name} holds {', '.join(pickles)}: pickled files run code when they are "
            "opened and are not published. Remove them; the weights are in the safetensors files."
        )
    return names


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the last part of a name matches any pattern."""
    return any(fnmatch.fnmatch(PurePosixPath(name).name, pattern) for pattern in patterns)


def check_complete(folder: Path) -> None:
    """Raises `RequestError` unless the folder can be loaded by somebody who has nothing else."""
    older = (folder / "work" / SETTINGS).is_file()  # as it was left by older releases
    if older or SUFFIX in (folder.suffix, folder.resolve().parent.suffix):
        raise RequestError(f"{folder.name} is unfinished work: complete it with --resume first.")
    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder} has no config.json: it is not a model.")
    config = read_json(folder / "config.json")
    check_auto_map(folder, config.get("auto_map"))
    shapes = {name: tensor.shape for name, tensor in read_headers(folder).items()}
    check_weights(folder, shapes)
    if config.get("model_type") in {family.model_type for family, *_ in FAMILIES}:
        check_carved(folder, shapes)
    load_tokenizer(folder)


def check_auto_map(folder: Path, auto_map: dict[str, str] | None) -> None:
    """The Python files that `auto_map` names are there, as plain files of this folder."""
    if auto_map is None:
        return
    for name in AUTO_CLASSES:
        entry = auto_map.get(name)
        if entry is None or "--" in entry:
            raise RequestError(
                f"auto_map in config.json has {'no' if entry is None else 'a foreign'} entry for "
                f"{name}: the repository would not load by itself. Load the model and save it "
                "again with save_pretrained."
            )
        module = entry.partition(".")[0] + ".py"
        if not (folder / module).is_file():
            raise RequestError(
                f"{module} is missing, without which nobody can load the model. Copy it from the "
                "carved folder, or load the model and save it again with save_pretrained."
            )


def check_weights(folder: Path, shapes: dict[str, list[int]]) -> None:
    """The shards are those of the index, and hold what it says."""
    where = {}
    indexed = {WEIGHTS_FILE}
    if (folder / WEIGHTS_INDEX).is_file():
        where = read_json(folder / WEIGHTS_INDEX)["weight_map"]
        indexed = set(where.values())
    stray = sorted({path.name for path in folder.glob("*.safetensors")} - indexed)
    if stray:
        raise RequestError(
            f"{', '.join(stray)} is not a shard of this model (see {WEIGHTS_INDEX}); a loader "
            "might take it for one. Remove it, or the index if that is the one left over."
        )
    missing = sorted(where.keys() - shapes.keys())
    if missing:
        raise RequestError(
            f"{WEIGHTS_INDEX} names {len(missing)} tensors that no shard has, {missing[0]} among "
            "them. Convert again, or restore the folder."
        )


def check_carved(folder: Path, shapes: dict[str, list[int]]) -> None:
    """The tensors are those that the configuration asks for."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
        shapes = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    wrong = sorted(name for name in expected | shapes if expected.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise RequestError(
            f"{len(wrong)} tensors are not what config.json asks for, {name} among them: "
            f"{shapes.get(name, 'missing')} where {expected.get(name, 'nothing')} should be. "
            "Convert again, or restore the folder."
        )


def check_card(folder: Path, card: str) -> None:
    """The card states licence and base model, and the hashes that the Python files have."""
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


def check_private(folder: Path, names: list[str], card: str, known: set[str]) -> None:
    """Raises `RequestError` if a file tells a secret, a user's name or a path of this machine.

    Args:
        folder: The model.
        names: The files in question.
        card: The text that README.md will have.
        known: Names that are public anyhow, such as the owner of the repository.
    """
    user = user_name()
    people = {}
    if user.lower() not in NOBODY | {name.lower() for name in known}:
        # A name that is an ordinary word, such as llama, would be found in every card: it counts
        # only where it must mean somebody. So it is missed in prose and in relative paths, and
        # still found, wrongly, where such a path or key has the word by chance.
        pattern = PERSON if is_ordinary(user, folder) else r"\b{0}\b"
        people = {"your user name": pattern.replace("{0}", re.escape(user))}
    token = get_token()
    secrets = SECRETS | ({"your token": re.escape(token)} if token else {})
    home = str(Path.home())
    own = {"a local path": re.escape(home)} if home.count("/") + home.count("\\") > 1 else {}
    for name in names:
        told = secrets
        if not matches(name, (*VOCABULARIES, *LEGAL_FILES)):
            told = {**secrets, **people, **PATHS, **own}
        for number, line in enumerate(lines_of(folder / name, card, name), 1):
            for what, pattern in told.items():
                if re.search(pattern, line):
                    raise RequestError(
                        f"{name} tells {what} in line {number}. Remove it from the file."
                    )


def user_name() -> str:
    """Who runs this; a container may not know."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "user"


def is_ordinary(user: str, folder: Path) -> bool:
    """Whether a name is a word of the model's vocabulary or of this package's own files."""
    vocabulary = load_tokenizer(folder).get_vocab()
    if user.lower() in {token.strip("\u0120\u2581 ").lower() for token in vocabulary}:
        return True
    word = re.compile(rf"(?<![a-z]){re.escape(user)}(?![a-z])", re.IGNORECASE)
    ours = (
        *Path(__file__).parent.parent.rglob("*.py"),
        *Path(cmoe_hf.__file__).parent.glob("*.py"),
    )
    return any(word.search(path.read_text(encoding="utf-8")) for path in ours)


def lines_of(path: Path, card: str, name: str) -> Iterator[str]:
    """The lines of a text file; of weights, the metadata; of a picture, nothing."""
    if name == CARD_FILE:
        yield from card.splitlines()
    elif path.suffix == ".safetensors":
        yield json.dumps(read_header(path), ensure_ascii=False)
    elif not matches(name, BINARIES):
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file
