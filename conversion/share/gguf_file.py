# SPDX-License-Identifier: Apache-2.0
"""Write a carved or a dense model as a GGUF file, tensor by tensor, for llama.cpp."""

import re
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from cmoe_hf import CMoEConfig

from ..errors import CMoEError, RequestError, check_known, missing
from ..folder.paths import check_apart, check_place, replace_file, resolved
from ..options import with_options
from ..source.architectures import differences
from ..source.hub import fetch_model, find_model, load_tokenizer
from ..source.library import attention_types
from ..source.stored import read_headers
from .export import check_config
from .gguf_layouts import BLOCK, LAYOUTS, Layout, empty_layer, file_fields, rope_factors
from .gguf_quantize import WHOLE, find_quantizer, quantize
from .gguf_reading import check_reading
from .gguf_vocabulary import vocabulary
from .needs import choose, needs_of
from .pieces import Files, Made, by_layer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""Types of numbers in which matrices can be written, and how a file says which. llama.cpp's own
program makes the others."""


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """What was written; the keys of `cmoe export --gguf --json`."""

    output: str
    architecture: str
    """As llama.cpp calls it."""
    reason: str
    """Why this one."""
    type: str
    """Of the matrices; vectors and routers are float32."""
    tensors: int
    bytes: int
    coarse: int
    """Matrices of another type, because their rows are no multiple of this one's blocks."""
    fallbacks: dict[str, str]
    """Those matrices and their types."""


@dataclass(frozen=True)
class GGUFOptions:
    """The options of `export_gguf`."""

    model: str | Path
    """Folder or Hub id of a carved model, or of a dense one."""
    output: str | Path
    """File to create."""
    _: KW_ONLY
    to: str | None = None
    """Architecture of llama.cpp; default the first one that computes the same."""
    type: str = "f16"
    """Of a GGUF file's matrices: f32, f16, q8_0, bf16; what llama-quantize knows where there is
    one, for example q4_k_m."""
    force: bool = False
    """Write the file even if llama.cpp would read texts, chats or ends of generations otherwise
    than transformers: what differs is a warning then."""
    overwrite: bool = False
    """Replace what is at the output."""


@with_options(GGUFOptions)
def export_gguf(options: GGUFOptions) -> GGUFFile:
    """Write a model as a GGUF file, which llama.cpp and what is built on it run.

    A carved model must have a linear router and no fine-tuned gates.

    Raises:
        RequestError: The extra is not installed, or llama.cpp would compute something else; the
            message says what.
        CMoEError: The model cannot be reached or is damaged.
    """
    output, to, type = options.output, options.to, options.type
    library()
    check_known("export to", to, LAYOUTS)
    path = check_output(output, options.overwrite)
    quantizer = None if type in FILE_TYPES else find_quantizer(type, options.model, path)
    folder, name, commit = find_model(options.model)
    config = AutoConfig.from_pretrained(folder)
    routes = isinstance(config, CMoEConfig)
    if routes:
        check_config(config, name)
    if differences(config) is None:
        raise RequestError(f"{name} cannot be a GGUF file: a {config.model_type} is not known.")
    if getattr(config, "hidden_act", None) not in ("silu", "swish"):
        raise RequestError(f"{name} cannot be a GGUF file: its activation is {config.hidden_act}.")
    if commit is not None:
        folder = fetch_model(name, commit)
    check_apart(path, {"the model": folder})
    needs = needs_of(config, folder)
    layouts = [it for it in LAYOUTS.values() if it.routes == routes or it.name == to]
    layout, reasons = choose(layouts, config, needs, name, to)
    tokenizer = load_tokenizer(folder)
    ends = end_tokens(folder, config)
    words = vocabulary(tokenizer, config.vocab_size, ends)
    check_reading(tokenizer, words, ends, force=options.force)
    made = made_tensors(read_headers(folder), config, layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    # llama.cpp strips spaces behind special tokens of models whose name has Phi-3 in it.
    words["general.name"] = re.sub("(?i)(phi)-?3", r"\1 3", name)
    fields = file_fields(layout, config) | words
    fallbacks = {it: "f16" for it in made if type == "q8_0" and kind_of(made[it], type) == "f16"}

    def write(new: Path) -> None:
        if quantizer is None:
            write_file(new, layout.name, fields, made, type)
            return
        with TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as own:
            whole = Path(own, "whole.gguf")
            write_file(whole, layout.name, fields, made, WHOLE.get(config.dtype, "f32"))
            fallbacks.update(quantize([quantizer, str(whole), str(new), type.upper()], len(made)))

    replace_file(path, write)
    return GGUFFile(
        output=str(path),
        architecture=layout.name,
        reason="; ".join(reasons) or "it computes the same",
        type=type,
        tensors=len(made),
        bytes=path.stat().st_size,
        coarse=len(fallbacks),
        fallbacks=fallbacks,
    )


def library() -> Any:
    """Import the package that knows the format. Raises `RequestError` without the extra."""
    try:
        import gguf
    except ImportError:
        raise missing("GGUF files need one more package", "gguf") from None
    return gguf


def check_output(output: str | Path, overwrite: bool) -> Path:
    """Return where the file goes. Raises `RequestError` if something else is there."""
    path = resolved(output)
    if path.suffix != ".gguf":
        raise RequestError(f"{path.name} should end in .gguf, as tools look for it.")
    check_place(path)
    if path.is_dir() or (path.exists() and not overwrite):
        hint = "Choose another name." if path.is_dir() else "Pass --overwrite to replace it."
        raise RequestError(f"{path.name} exists already in {path.parent}. {hint}")
    return path


def end_tokens(folder: Path, config: PreTrainedConfig) -> list[int]:
    """Return the tokens at which transformers ends a generation."""
    if (folder / GENERATION_CONFIG_NAME).is_file():
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        found = getattr(config, "eos_token_id", None)
    ends = found if isinstance(found, list) else [found]
    return [it for it in ends if it is not None and 0 <= it < config.vocab_size]


def made_tensors(stored: dict[str, Any], config: Any, layout: Layout) -> dict[str, Made]:
    """Return all tensors of the file by name."""
    gguf, count, made = library(), config.num_hidden_layers, dict[str, Made]()
    [kind] = [it for it, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.name]
    names = gguf.get_tensor_name_map(kind, count)
    for name, it in stored.items():
        stem, _, end = name.rpartition(".")
        is_zero = layout.routes and name.endswith("o_proj.bias")  # else the model is refused
        if end in ("weight", "bias") and stem in names and not is_zero:
            heads = layout.interleaved_heads(name, config)
            made[f"{names[stem]}.{end}"] = Made.of(it, interleaved=heads)
    if layout.own_head:
        made.setdefault("output.weight", made["token_embd.weight"])
    factors_D = rope_factors(config)
    if factors_D is not None:
        made["rope_freqs.weight"] = Made.of(factors_D)
    blocks = {
        layer.split(".")[2]: layout.routed(parts, config)
        for layer, parts in by_layer(stored).items()
        if "mlp.experts.down_proj" in parts
    }
    if layout.wants_window and "sliding_attention" not in attention_types(config):
        blocks[str(count)] = empty_layer(config, made["token_embd.weight"])
    for number, parts in blocks.items():
        made |= {f"blk.{number}.{part}": it for part, it in parts.items()}
    return made


def kind_of(made: Made, type: str) -> str:
    """Return the type of numbers in which a tensor is written."""
    if len(made.shape) == 1 or made.precise:
        return "f32"
    return "f16" if type == "q8_0" and made.shape[-1] % BLOCK else type


def write_file(
    path: Path, architecture: str, fields: dict[str, Any], made: dict[str, Made], type: str
) -> None:
    """Write the file, one tensor in memory at a time."""
    gguf = library()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(FILE_TYPES[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kind_of_value = gguf.GGUFValueType
    for key, value in fields.items():
        is_int = isinstance(value, int) and not isinstance(value, bool)
        kind = kind_of_value.UINT32 if is_int else kind_of_value.get_type(value)
        writer.add_key_value(key, value, kind)
    kinds = {
        tensor: gguf.GGMLQuantizationType[kind_of(it, type).upper()] for tensor, it in made.items()
    }
    for tensor, kind in kinds.items():
        *rows, columns = made[tensor].shape
        block, width = gguf.GGML_QUANT_SIZES[kind]
        shape = [*rows, columns // block * width]
        writer.add_tensor_info(tensor, shape, np.dtype(np.uint8), prod(shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Files() as files:
        for tensor, it in tqdm(made.items(), desc="exporting", unit="tensor", disable=None):
            parts = it.read(files)
            writer.write_tensor_data(numbers(tensor, parts, it.shape[-1], kinds[tensor]))
    writer.close()


def numbers(
    name: str, parts: Iterator[torch.Tensor], columns: int, kind: "GGMLQuantizationType"
) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor. Raises `CMoEError` for values that the type cannot hold."""
    pieces = []
    for part in parts:
        values = part.float().reshape(-1, columns).numpy()
        with np.errstate(over="ignore"):
            made = library().quants.quantize(np.ascontiguousarray(values), kind)
        if made.dtype == np.float16 and not np.isfinite(made).all():
            raise CMoEError(f"{name} has values that float16 cannot hold: use --type bf16.")
        pieces.append(made.view(np.uint8).reshape(-1))
    return np.concatenate(pieces)
