# SPDX-License-Identifier: Apache-2.0
"""Finds, checks and reads dense checkpoints.

Weights are only ever read from safetensors. A shard is opened, read and closed, so that its
pages do not stay resident.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .architectures import Architecture, find_architecture
from .errors import CMoEError, RequestError

WEIGHTS_INDEX = "model.safetensors.index.json"
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model*", "tokenizer_config.json", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates"),
)
"""Files and folders; what a tokenizer has of them."""
SOURCE_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "README.md"),
    *TOKENIZER_FILES,
    *LEGAL_FILES,
)
logger = logging.getLogger(__name__)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A dense checkpoint whose files are complete and agree with its configuration."""

    folder: Path
    name: str
    """Hub id, or the bare name of a local folder: never a path."""
    revision: str | None
    """Commit of a Hub repository; None for a local folder."""
    architecture: Architecture
    config: PreTrainedConfig
    files: dict[str, Path]
    """Tensor name to the shard that holds it."""
    shapes: dict[str, list[int]]
    """Tensor name to its shape."""

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, as stored. Raises `CMoEError` for one that is not finite."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        tensors = {}
        for path, here in wanted.items():
            with safe_open(path, framework="pt", backend="pread") as shard:
                for name in here:
                    tensors[name] = shard.get_tensor(name)
                    if not torch.isfinite(tensors[name]).all():
                        raise CMoEError(
                            f"tensor {name} in {path.name} has NaN or infinite values: the "
                            "source checkpoint is damaged. Download it again or choose another."
                        )
        return tensors

    def read_layer(self, index: int, *, without_experts: bool = False) -> dict[str, torch.Tensor]:
        """The tensors of one decoder layer, named relative to the layer."""
        prefix = self.architecture.layer_prefix.format(index)
        experts = prefix + self.architecture.expert_prefix.partition("{")[0]
        tensors = self.read(
            name
            for name in self.files
            if name.startswith(prefix) and not (without_experts and name.startswith(experts))
        )
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def read_expert(self, index: int, number: int) -> dict[str, torch.Tensor]:
        """The tensors of one expert of a MoE's layer, named relative to the expert."""
        row = self.architecture
        prefix = row.layer_prefix.format(index) + row.expert_prefix.format(number)
        names = [name for name in (row.gate, row.up, row.down) if name is not None]
        tensors = self.read(prefix + name for name in names)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def read_rest(self) -> dict[str, torch.Tensor]:
        """The tensors outside the decoder layers: embedding, final norm, head."""
        prefix = self.architecture.layer_prefix.partition("{")[0]
        return self.read(name for name in self.files if not name.startswith(prefix))

    def digest(self) -> str:
        """SHA-256 of all tensors. Reads everything once: a NaN is found now, not hours later."""
        total = hashlib.sha256()
        names = sorted(self.files, key=lambda name: (self.files[name], name))
        for name in tqdm(names, desc="checking the weights", unit="tensor", disable=None):
            [tensor] = self.read([name]).values()
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update(tensor.flatten().view(torch.uint8).numpy().data)
        return total.hexdigest()

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def layer_parameters(self) -> int:
        """Number of values in one decoder layer."""
        prefix = self.architecture.layer_prefix.format(0)
        return sum(math.prod(at) for name, at in self.shapes.items() if name.startswith(prefix))

    def nbytes(self, dtype: torch.dtype | None) -> int:
        """Size in bytes in the given precision, or as stored."""
        if dtype is not None:
            return self.parameters * dtype.itemsize
        return sum(path.stat().st_size for path in set(self.files.values()))


def find_model(model: str | Path, *, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Locate a model: (folder, name, commit). Only `config.json` of a Hub model is fetched.

    Raises `RequestError` if there is no such folder or repository, or it is gated, and
    `CMoEError` if the Hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RequestError(f"folder {folder} has no config.json: it is not a model.")
        return folder, folder.resolve().name, None
    if folder.exists() or not HUB_ID.fullmatch(str(model)):
        raise RequestError(f"{model} is neither a folder nor the id of a Hub repository.")
    config = Path(_from_hub(hf_hub_download, str(model), revision, filename="config.json"))
    return config.parent, str(model), config.parent.name


def fetch_model(name: str, revision: str | None, *, code: bool = False) -> Path:
    """Download the files of a Hub model that a conversion or an evaluation needs."""
    patterns = [*SOURCE_FILES, *(["*.py"] if code else [])]
    return Path(_from_hub(snapshot_download, name, revision, allow_patterns=patterns))


def _from_hub(download: Any, name: str, revision: str | None, **arguments: Any) -> str:
    """Call a download function of huggingface_hub; its failures become one clear line."""
    where = f"{name} at revision {revision}" if revision else name
    try:
        return download(name, revision=revision, **arguments)
    except GatedRepoError as error:
        raise RequestError(
            f"{name} is gated. Ask for access at its page on the Hub, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise RequestError(f"{name} exists on the Hub, but has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        raise RequestError(
            f"there is no folder and no Hub repository named {name}. Check the spelling; if it "
            "is private, log in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise CMoEError(
            f"cannot reach the Hub, and {where} is not in the local cache. Check the connection "
            "and HF_HUB_OFFLINE, or give a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise RequestError(f"{where} has no config.json: it is not a model.") from error
    except HFValidationError as error:
        raise RequestError(f"{name} is neither a folder nor a valid Hub id.") from error
    except Exception as error:  # of the HTTP library, which differs between versions
        raise CMoEError(
            f"cannot reach the Hub for {where}: {error}. Check the connection, or give a local "
            "folder."
        ) from error


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises `RequestError` if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise RequestError(
            f"{folder.name} has no tokenizer (neither tokenizer.json nor tokenizer.model). Copy "
            "the tokenizer files of the model into the folder."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises whatever its parsers raise
        raise RequestError(f"the tokenizer of {folder.name} cannot be loaded: {error}") from error


def open_source(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Source:
    """Find a dense checkpoint and check its files against its configuration.

    Checks, in order of cost: the family is supported, no code comes with the checkpoint, every
    shard is there and whole, every tensor has the shape that the configuration asks for, none is
    missing or unknown.

    With `trust_remote_code`, code may come with it. That of a tokenizer will run; that of a model
    does not, the model is taken for one of the library's family.
    """
    folder, name, commit = find_model(model, revision=revision)
    architecture = find_architecture(read_json(folder / "config.json"), folder)
    check_code(folder, name, trust_remote_code)
    if commit is not None:
        folder = fetch_model(name, revision, code=trust_remote_code)
        check_code(folder, name, trust_remote_code)
    try:
        config = architecture.dense_config.from_pretrained(folder)
    except Exception as error:  # the library raises whatever its validators raise
        raise RequestError(f"config.json of {name} is not usable: {error}") from error
    shapes = stored_shapes(folder)
    files = {tensor: path for tensor, (path, _) in shapes.items()}
    for tensor in _check_tensors(architecture, config, shapes):
        del files[tensor]
    sizes = {tensor: shapes[tensor][1] for tensor in files}
    return Source(folder, name, commit, architecture, config, files, sizes)


def one_by_one(row: Architecture, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The experts' tensors as checkpoints have them, where the library packs those of a layer."""
    inside = row.expert_prefix.partition("{")[0]
    found = {name: shape for name, shape in shapes.items() if inside not in name}
    for name, (experts, rows, columns) in (item for item in shapes.items() if inside in item[0]):
        layer, _, packed = name.partition(inside)
        parts = [row.down] if packed == "down_proj" else [row.gate, row.up]
        for number in range(experts):
            prefix = layer + row.expert_prefix.format(number)
            found |= {f"{prefix}{part}": [rows // len(parts), columns] for part in parts}
    return found


def check_code(folder: Path, name: str, trusted: bool) -> None:
    """Raises `RequestError` for a source that carries code, unless it is trusted."""
    for file in ("config.json", "tokenizer_config.json"):
        entries = read_json(folder / file).get("auto_map") if (folder / file).is_file() else None
        if not entries:
            continue
        if not trusted:
            raise RequestError(
                f"{name} carries Python code of its own (auto_map in {file}). A conversion runs "
                "that of a tokenizer, and ignores that of a model, which it takes for an ordinary "
                "one of its family: pass --trust-remote-code if you have read it and agree."
            )
        if file == "config.json":
            logger.warning("the Python code of %s is not run: it is taken as stock.", name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the source. Raises `RequestError` if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(
            f"{path.name} is not valid JSON ({error}). Download it again."
        ) from error
    if not isinstance(content, dict):
        raise RequestError(f"{path.name} is not a JSON object. Download it again.")
    return content


def stored_shapes(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """Shard and shape of every tensor, from the shards' headers."""
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        shards = ["model.safetensors"]
    shapes: dict[str, tuple[Path, list[int]]] = {}
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise RequestError(
                f"shard {shard} is missing. Weights are read from safetensors only; complete the "
                "download, or convert other formats with `save_pretrained` first."
            )
        try:
            with safe_open(path, framework="pt", backend="pread") as opened:
                for tensor in opened.keys():  # noqa: SIM118 - not a dict, cannot be iterated
                    if tensor in shapes:
                        raise RequestError(
                            f"tensor {tensor} is in both {shapes[tensor][0].name} and {shard}: "
                            "nobody can say which one counts. Remove one, or download again."
                        )
                    shapes[tensor] = (path, opened.get_slice(tensor).get_shape())
        except SafetensorError as error:
            raise RequestError(
                f"shard {shard} is corrupt or truncated ({error}). Download it again."
            ) from error
    return shapes


def _check_tensors(
    architecture: Architecture,
    config: PreTrainedConfig,
    shapes: dict[str, tuple[Path, list[int]]],
) -> list[str]:
    """Compare stored with expected tensors; return the stored ones that are to be ignored."""
    with torch.device("meta"):
        model = architecture.dense_model(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if architecture.router is not None:
        expected = one_by_one(architecture, expected)
    # What the library calls it; older checkpoints may have another name for it.
    head = architecture.head if architecture.head in shapes else "lm_head.weight"
    expected[head] = expected.pop("lm_head.weight")
    ignored = [name for name in shapes if name.endswith(architecture.ignored_suffixes)]
    if config.tie_word_embeddings:
        expected.pop(head)
        ignored += [head] if head in shapes else []
    missing = sorted(expected.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - expected.keys() - set(ignored))
    if missing:
        raise RequestError(
            f"the checkpoint lacks {len(missing)} tensors that its configuration asks for, "
            f"{missing[0]} among them. A shard or its index is damaged: download it again."
        )
    if unknown:
        raise RequestError(
            f"the checkpoint holds {len(unknown)} tensors that a {config.model_type} model does "
            f"not have, {unknown[0]} among them. Carving would lose them, so it is refused."
        )
    for name, shape in expected.items():
        if shapes[name][1] != shape:
            raise RequestError(
                f"tensor {name} has shape {shapes[name][1]}, but config.json asks for {shape}. "
                "The configuration and the weights are not of the same model."
            )
    return ignored
