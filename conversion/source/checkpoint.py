# SPDX-License-Identifier: Apache-2.0
"""Checks and reads dense checkpoints.

Weights are only ever read from safetensors, by the names that the library has for them.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..errors import CMoEError, RequestError
from .architectures import Architecture, dense_class, is_moe, moe_architecture
from .ffn import find_ffn
from .hub import ADAPTER, MERGE, fetch_model, find_model, local_name
from .library import blaming, dense_config, meta_model
from .stored import CARVABLE, TensorRef, digest_of, read_headers, read_json, read_tensors
from .walk import LayerWalk, entering

IGNORED = (
    r"rotary_emb\.inv_freq$",
    r"attn\.(bias|masked_bias)$",
    r"attention\.(bias|masked_bias)$",
)
"""Tensors of old checkpoints that are computed again and not stored."""
PROOF_TOKENS = 16
"""Tokens on which the formula of an FFN is compared with what it computes."""
WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "_fsdp_wrapped_module.": ("FSDP", "gather the full state dict"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "the model inside it"),
    "module.": ("DistributedDataParallel", "model.module"),
    "base_model.model.": ("PEFT", "model.merge_and_unload()"),
}
"""Parts of names that wrappers add: whose they are, and how to get at the model inside."""
logger = logging.getLogger(__name__)
Shapes = dict[str, list[int]]
SIZES = (
    *("rope_parameters", "rope_scaling", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "pad_token_id"),
)
"""Fields of a configuration to look at if the library cannot build a model, or run its layers."""


@dataclass(frozen=True)
class Source:
    """A dense checkpoint whose files are complete and agree with its configuration."""

    folder: Path
    name: str
    """Hub id, or the bare name of a local folder: never a path."""
    revision: str | None
    """Commit of a Hub repository; None for any other folder."""
    architecture: Architecture
    config: PreTrainedConfig
    tensors: dict[str, TensorRef]
    """Where the dense model's tensors lie, by the library's names; experts one by one."""

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors, as stored. Raises `CMoEError` for one that is not finite."""
        return read_finite({name: self.tensors[name] for name in names})

    def read_layer(self, index: int, *, without_experts: bool = False) -> dict[str, torch.Tensor]:
        """Return the tensors of one decoder layer, named relative to the layer."""
        prefix = self.architecture.layer_prefix.format(index)
        experts = prefix + self.architecture.expert_prefix.partition("{")[0]
        names = [name for name in self.tensors if name.startswith(prefix)]
        return self._read_relative(
            prefix, [it for it in names if not (without_experts and it.startswith(experts))]
        )

    def read_expert(self, index: int, number: int) -> dict[str, torch.Tensor]:
        """Return the tensors of one expert of a MoE's layer, named relative to the expert."""
        arch = self.architecture
        prefix = arch.layer_prefix.format(index) + arch.expert_prefix.format(number)
        return self._read_relative(prefix, [it for it in self.tensors if it.startswith(prefix)])

    def _read_relative(self, prefix: str, names: list[str]) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): it for name, it in self.read(names).items()}

    def read_rest(self) -> dict[str, torch.Tensor]:
        """Return the tensors outside the decoder layers: embedding, final norm, head."""
        return self.read(outside(self.architecture.layer_prefix, self.tensors))

    def walk(self, rest: Mapping[str, torch.Tensor], device: torch.device) -> LayerWalk:
        """Return the layers, none with its weights, and the decoder around them with `rest`."""
        walk = LayerWalk(meta_model(self.architecture.dense_model, self.config), device)
        walk.load_rest(rest)
        return walk

    def digest(self) -> str:
        """Return the SHA-256 of all tensors. A NaN is found now, not hours later."""
        names = sorted(self.tensors, key=lambda name: (self.tensors[name].path, name))
        bar = tqdm(names, desc="checking the weights", unit="tensor", disable=None)
        return digest_of(item for name in bar for item in self.read([name]).items())

    @property
    def parameters(self) -> int:
        """Return the number of values in all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def layer_parameters(self) -> int:
        """Return the number of values in the largest decoder layer."""
        start, _, rest = self.architecture.layer_prefix.partition("{}")
        sizes = Counter[str]()
        for name, tensor in self.tensors.items():
            if name.startswith(start):
                sizes[name.removeprefix(start).partition(rest)[0]] += tensor.numel
        return max(sizes.values())

    @property
    def outside_parameters(self) -> int:
        """Return the number of values outside the decoder layers."""
        names = outside(self.architecture.layer_prefix, self.tensors)
        return sum(self.tensors[name].numel for name in names)

    def ffn(self, index: int) -> list[TensorRef]:
        """Return the tensors of a layer's FFN, or first expert, that its neurons share out."""
        arch = self.architecture
        prefix = arch.layer_prefix.format(index) + arch.expert_prefix.format(0)
        parts = arch.ffn.names()
        names = [f"{prefix}{name}.weight" for name in parts.values()]
        names += [f"{prefix}{name}.bias" for part, name in parts.items() if part != "down"]
        return [self.tensors[name] for name in names if name in self.tensors]

    @property
    def ffn_parameters(self) -> int:
        """Return the number of values of an FFN's, or an expert's, neurons: no output bias."""
        return sum(tensor.numel for tensor in self.ffn(0))

    def nbytes(self, dtype: torch.dtype | None) -> int:
        """Return the size in bytes in the given precision, or as stored."""
        if dtype is not None:
            return self.parameters * dtype.itemsize
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_source(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Source:
    """Find a dense checkpoint and check its files against its configuration, cheapest first.

    With `trust_remote_code`, code may come with it. That of a tokenizer will run; that of a model
    does not, the model is taken for one of the library's family.
    """
    folder, name, commit = find_model(model, revision=revision)
    dense = dense_class(read_json(folder / "config.json"))
    check_code(folder, name, trust_remote_code)
    config = dense_config(dense, folder, name)
    with blaming(config, name, "hidden_act"):
        ACT2FN[getattr(config, "hidden_act", "silu")]
    with blaming(config, name, *SIZES):
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[dense]
        built = meta_model(causal, config)
    decoder: Any = MODEL_MAPPING.get(dense, None)
    if type(built.base_model) is not decoder:
        raise RequestError(
            f"cannot carve {name}, a {config.model_type}: its causal model is a part of another."
        )
    if commit is not None:
        folder = fetch_model(name, commit, code=trust_remote_code)
        check_code(folder, name, trust_remote_code)
    if (folder / ADAPTER).is_file():
        raise RequestError(
            f"{name} has {ADAPTER} beside its weights: the library would add the adapter to them, "
            f"and a carved model would lack it. {MERGE}"
        )
    moe = moe_architecture(config, causal) if is_moe(config) else None
    shapes = {
        own: part.shape
        for key, it in built.state_dict().items()
        for own, part in unpacked(moe, key, TensorRef(folder, key, "", list(it.shape)))
    }
    tensors = named_tensors(built, moe, config, read_headers(folder), shapes)
    with blaming(config, name, *SIZES):
        architecture = found_architecture(built, moe, tensors, name)
    return Source(folder, name, commit or local_name(folder)[1], architecture, config, tensors)


@torch.no_grad()
def found_architecture(
    model: PreTrainedModel, moe: Architecture | None, tensors: Mapping[str, TensorRef], name: str
) -> Architecture:
    """Return what the first layer shows of a decoder. Raises `RequestError` if it has no FFN.

    The model, on the meta device, is used up. Of a MoE it is checked that its layers run.
    """
    walk = LayerWalk(model, torch.device("cpu"))
    prefix = f"{walk.prefix}{{}}."
    first = prefix.format(0)
    experts = first + moe.expert_prefix.partition("{")[0] if moe else None
    inside = {
        key: it
        for key, it in tensors.items()
        if key.startswith(first) and not (experts and key.startswith(experts))
    }
    try:
        _, embedding = ends_of(model)
        rest = {key: tensors[key] for key in outside(prefix, tensors)}
        del rest[embedding]  # which may be large
        walk.load_rest(read_finite(rest))
        walk.invent_embedding()
        walk.record(1, PROOF_TOKENS)
        layer = read_finite(inside)
        walk.load(0, {key.removeprefix(first): it.float() for key, it in layer.items()})
        hidden_BLH = entering(walk.calls[1, PROOF_TOKENS])
        if moe is not None:
            walk.replace_ffn(moe.ffn.place)
            walk.ffn_input(hidden_BLH)
            return moe
        ffn = find_ffn(walk, hidden_BLH)
    except RequestError as error:
        raise RequestError(f"cannot carve {name}, a {model.config.model_type}: {error}") from error
    return Architecture(dense_model=type(model), layers=walk.name, layer_prefix=prefix, ffn=ffn)


def outside(layer_prefix: str, names: Iterable[str]) -> list[str]:
    """Return the names of tensors outside the decoder layers."""
    prefix = layer_prefix.partition("{")[0]
    return [name for name in names if not name.startswith(prefix)]


def read_finite(tensors: Mapping[str, TensorRef]) -> dict[str, torch.Tensor]:
    """Return some tensors, as stored. Raises `CMoEError` for one that is not finite."""
    found = {}
    for name, tensor in read_tensors(tensors):
        if not torch.isfinite(tensor).all():
            raise CMoEError(
                f"tensor {name} in {tensors[name].path.name} has NaN or infinite values: the "
                "source checkpoint is damaged. Download it again or choose another."
            )
        found[name] = tensor
    return found


def check_code(folder: Path, name: str, trusted: bool) -> None:
    """Raise `RequestError` for a source that carries code, unless it is trusted."""
    for file in ("config.json", "tokenizer_config.json"):
        if not ((folder / file).is_file() and read_json(folder / file).get("auto_map")):
            continue
        if not trusted:
            raise RequestError(
                f"{name} carries Python code of its own (auto_map in {file}). A conversion runs "
                "that of a tokenizer, and ignores that of a model, which it takes for an ordinary "
                "one of its family: pass --trust-remote-code if you have read it and agree."
            )
        if file == "config.json":
            logger.warning("the Python code of %s is not run: it is taken as stock.", name)


def named_tensors(
    model: PreTrainedModel,
    moe: Architecture | None,
    config: PreTrainedConfig,
    stored: Mapping[str, TensorRef],
    shapes: Shapes,
) -> dict[str, TensorRef]:
    """Return the stored tensors by the names that the dense model has for them.

    `stored` has the names in the files, `shapes` those of the model, an expert at a time. As in the
    library, `config.tie_word_embeddings` becomes false if a head differs from the embedding.

    Raises `RequestError` for what the library would not load in full, or carving would lose.
    """
    tensors: dict[str, TensorRef] = {}
    for key, own in loaded_names(model, moe, stored, shapes).items():
        for name, part in unpacked(moe, own, stored[key]):
            if name in tensors:
                raise RequestError(
                    f"tensors {tensors[name].key} and {key} both stand for {name}: nobody can say "
                    "which one counts. Remove one, or download again."
                )
            tensors[name] = part
    for name in sorted(tensors.keys() - shapes.keys()):
        for prefix, (wrapper, remedy) in WRAPPERS.items():
            if f".{prefix}" in f".{name}":
                raise RequestError(
                    f"tensor {name} has {prefix!r} in its name: the model was saved inside a "
                    f"wrapper, {wrapper}, and the library would not find its weights. Unwrap it "
                    f"({remedy}), and save it again with save_pretrained."
                )
    for tensor in tensors.values():
        if tensor.dtype not in CARVABLE:
            raise RequestError(
                f"tensor {tensor.key} is stored as {tensor.dtype}, and only {', '.join(CARVABLE)} "
                "can be carved. Use the checkpoint from before it was quantised, or save it again "
                "in one of these types."
            )
    head, embedding = ends_of(model)
    if config.tie_word_embeddings:
        tie_head(head, embedding, config, tensors)
    if config.tie_word_embeddings:
        tied = {head, *(model._tied_weights_keys or ())}
        shapes = {name: shape for name, shape in shapes.items() if name not in tied}
    check_shapes(config, tensors, shapes, head)
    return tensors


def loaded_names(
    model: PreTrainedModel,
    moe: Architecture | None,
    keys: Iterable[str],
    known: Collection[str],
) -> dict[str, str]:
    """Return what the library's loader calls the tensors of a file, without those it ignores.

    Raises `RequestError` for tensors that the loader does not only rename but also converts.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    ignored = [*IGNORED, *(model._keys_to_ignore_on_load_unexpected or ())]
    state = dict.fromkeys([*known, *model.state_dict()], True)
    names: dict[str, str] = {}
    for key in keys:
        prefix = model.base_model_prefix
        name, _ = rename_source_key(key, renamings, [], prefix, state)
        if name not in known and any(re.search(pattern, key) for pattern in ignored):
            continue
        if name not in known and moe is None:
            found, converter = rename_source_key(key, renamings, converters, prefix, state)
            if converter is not None and found in known:
                raise RequestError(
                    f"tensor {key} is stored in another layout than {found}, to which the library "
                    "converts it. Load the model with transformers and save it again."
                )
        names[key] = name
    return names


def ends_of(model: PreTrainedModel) -> tuple[str, str]:
    """Return the names of the weights of a causal model's head and embedding."""
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"


def unpacked(moe: Architecture | None, key: str, tensor: TensorRef) -> list[tuple[str, TensorRef]]:
    """Return a tensor by its name, or the parts of one that has all experts of a MoE's layer."""
    inside = moe.expert_prefix.partition("{")[0] if moe else ""
    packed = key.endswith((f"{inside}gate_up_proj", f"{inside}down_proj"))
    if moe is None or not packed or len(tensor.shape) != 3:
        return [(key, tensor)]
    layer, _, name = key.partition(inside)
    parts = moe.ffn.names()
    kept = [parts["down"]] if name == "down_proj" else [parts["gate"], parts["up"]]
    return [
        (
            f"{layer}{moe.expert_prefix.format(number)}{part}.weight",
            tensor.of_expert(number, place, len(kept)),
        )
        for number in range(tensor.shape[0])
        for place, part in enumerate(kept)
    ]


def tie_head(
    head_name: str, embedding_name: str, config: PreTrainedConfig, tensors: dict[str, TensorRef]
) -> None:
    """Leave out a head that equals the embedding to which the configuration ties it.

    As in the library's loader, either may be missing, and two that differ are not tied.
    """
    if head_name not in tensors:
        return
    head = tensors[head_name]
    embedding = tensors.setdefault(embedding_name, head)
    both = {head_name: head, embedding_name: embedding}
    if embedding is head or (
        head.shape == embedding.shape and torch.equal(*(it for _, it in read_tensors(both)))
    ):
        del tensors[head_name]
        return
    config.tie_word_embeddings = False
    logger.warning(
        "%s differs from the embedding, although config.json ties them: both are kept, as the "
        "library does, and the carved model does not tie them.",
        head.key,
    )


def check_shapes(
    config: PreTrainedConfig, tensors: Mapping[str, TensorRef], expected: Shapes, head: str
) -> None:
    """Raise `RequestError` unless the tensors are those expected, of the same shapes."""
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing == [head]:
        raise RequestError(
            f"the checkpoint has no head ({head}), and config.json does not tie it to the "
            "embedding: the library would make one up at random. Save the whole model, or set "
            "tie_word_embeddings to true if it shares the embedding."
        )
    if missing:
        raise RequestError(
            f"the checkpoint lacks {len(missing)} tensors that its configuration asks for, "
            f"{missing[0]} among them. A shard or its index is damaged: download it again."
        )
    if unknown:
        raise RequestError(
            f"the checkpoint holds {len(unknown)} tensors that a {config.model_type} model does "
            f"not have, {tensors[unknown[0]].key} among them. Carving would lose them, so it is "
            "refused."
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise RequestError(
                f"tensor {tensors[name].key} has shape {tensors[name].shape}, but config.json asks "
                f"for {shape}. The configuration and the weights are not of the same model."
            )
