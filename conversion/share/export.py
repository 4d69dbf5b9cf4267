# SPDX-License-Identifier: Apache-2.0
"""The verb `export`: the same function as a stock architecture, without remote code.

A carved Llama, Mistral or Qwen2 with a linear router is a Qwen2-MoE with other numbers in it. What
differs:

* attention: Qwen2-MoE has biases on q, k and v, as Qwen2; for the others they are zero.
* shared expert: its output passes a gate sigmoid(x w). With w = 0 that is 1/2, and the down
  projection is doubled.
* routing weights: ours are 1, those of Qwen2-MoE are the softmax over the experts, renormalised
  over the A chosen ones. With A = 1 that is exactly 1. With more, the router is scaled by a tiny
  power of two, which leaves the order of the scores alone and makes every weight 1/A but for `TINY`
  times the spread of the scores; the down projections of the experts are multiplied by A.

Qwen2-MoE has no norms on q and k: a carved Qwen3 becomes a Qwen3-MoE, by the same routing. That one
has no shared expert, nor anything that always runs, so that only shapes S0 can be represented.

Shape suffixes: T tokens, H hidden size, N routed experts, M neurons of an expert, Q = 2M.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.utils import CONFIG_NAME

from cmoe_hf import CMoEConfig, CMoEHierarchicalConfig
from cmoe_hf.configuration_cmoe import with_legacy_keys
from cmoe_hf.modeling_cmoe import PIN_LIMIT, CMoERouter, attention_types

from ..carve.recipe import Recipe
from ..carve.settings import MAX_SHARD_SIZE, shard_bytes
from ..errors import RequestError
from ..folder.card import CARD_FILE, native_card
from ..folder.carried import carried
from ..folder.fingerprint import write_fingerprint
from ..folder.shards import Entry, file_names, index_of, packed, raw, write_shard
from ..folder.unfinished import BriefFolder
from ..measure.routing import collected
from ..source.architectures import EXPORTS, architecture_of
from ..source.calibration import random_windows, read_tokens
from ..source.checkpoint import fetch_model, find_model, load_tokenizer
from ..source.loading import window_length
from ..source.stored import CARVABLE, WEIGHTS_INDEX, read_headers, read_json, read_tensors
from ..source.texts import open_text, text_file
from .linearise import linear_routers

TINY = 2.0**-13
"""Scale of the router where more than one expert runs. A smaller one would round close scores of a
float32 softmax to ties, a larger one would make the weights uneven."""
COMPARED_TOKENS = 64
ROUTER_CLASSES = (CMoERouter, Qwen2MoeTopKRouter, Qwen3MoeTopKRouter)
NO_SHARED = 8
"""Neurons, all zero, of the shared expert that Qwen2-MoE insists on, where there is none."""


SAME_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
    *("attention_dropout", "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)
"""Of the configuration; they mean the same in both."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written; the keys of `cmoe export --json`."""

    output: str
    architecture: str
    dtype: str
    max_abs_logit_difference: float
    """Between the logits of both models, in the precision of the checkpoint, on random tokens."""
    routing_agreement: float
    """Share of these tokens, over all layers, for which both choose the same experts."""
    refitted_router: bool
    """Whether the router was replaced: then the function is another, and both figures tell how
    far."""


def export(
    model: str | Path,
    output: str | Path,
    *,
    architecture: str | None = None,
    refit_router: str | Path | None = None,
    samples: int = 8,
    sequence_length: int | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> Export:
    """Write a carved model as a stock architecture that loads without remote code.

    Args:
        model: Folder or Hub id of a carved model with a linear router and no fine-tuned gates.
        output: Folder to create.
        architecture: `"qwen2_moe"` or `"qwen3_moe"`, default the one of the family.
        refit_router: Calibration text (as for `convert`) to which linear routers are fitted, in
            place of routers that the architecture does not have.
        samples: Calibration windows.
        sequence_length: Tokens of each, default 2,048 or the model's context.
        max_shard_size: Of a file of weights, see `convert`.
        overwrite: Replace an existing model repository at `output`.

    Raises:
        RequestError: The architecture cannot represent the model; the message says why.
        CMoEError: The model cannot be reached or is damaged.
    """
    limit = shard_bytes(max_shard_size)
    if architecture not in (None, *EXPORTS):
        raise RequestError(
            f"there is no export to {architecture!r}; choose one of {', '.join(EXPORTS)}."
        )
    folder, name, commit = find_model(model)
    config = AutoConfig.from_pretrained(folder)
    architecture = architecture or next(iter(exports_of(config)), EXPORTS[0])
    check_config(config, name, architecture, refit=refit_router is not None)
    if commit is not None:
        folder = fetch_model(name, commit)
    check_gates(folder)
    tokenizer = load_tokenizer(folder)
    native = native_config(config, architecture)
    kept = carried(folder).beside(native, tokenizer)
    work = ExportFolder(output, overwrite=overwrite)
    work.check({"the carved model": folder, "the calibration text": text_file(refit_router)})
    routers = None
    if refit_router is not None:
        ids = read_tokens(open_text(refit_router), tokenizer, config.vocab_size).ids
        length = window_length(config, sequence_length)
        windows_WL = random_windows(ids, samples=samples, length=length, seed=0)
        routers = fitted_routers(folder, windows_WL)
    with ExportFolder.create(output, {"model": name}, overwrite=overwrite) as work:
        write_shards(folder, config, architecture, work, routers, limit)
        native.save_pretrained(work.folder)
        written = read_json(work.folder / CONFIG_NAME)
        work.write_json(CONFIG_NAME, dict(sorted(with_legacy_keys(native, written).items())))
        work.write_files(kept.files)
        write_fingerprint(folder, work, tokenizer)
        difference, agreement = compare(folder, work.folder, config)
        result = Export(
            output=str(work.output),
            architecture=architecture,
            dtype=str(config.dtype).removeprefix("torch."),
            max_abs_logit_difference=difference,
            routing_agreement=agreement,
            refitted_router=routers is not None,
        )
        if kept.card:
            text = native_card(kept.card, architecture, difference, refitted=routers is not None)
            work.write_text(CARD_FILE, text)
    return result


class ExportFolder(BriefFolder):
    """An export's folder."""

    command = "export"
    noun = "export"


def exports_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Stock architectures that a model's family can become."""
    row = architecture_of(config)
    return row.exports if row is not None else ()


def check_config(config: PreTrainedConfig, name: str, architecture: str, *, refit: bool) -> None:
    """Raises `RequestError` for what the configuration alone forbids."""
    if not isinstance(config, CMoEConfig):
        raise RequestError(f"{name} is a {config.model_type} model, not a carved one.")
    if isinstance(config, CMoEHierarchicalConfig):
        raise RequestError(
            f"{name} is a carved MoE: no stock architecture has routers within experts. Its own "
            "code loads wherever trust_remote_code may be given."
        )
    reasons = []
    possible = exports_of(config)
    if not config.has_gate:
        reasons.append("no stock architecture has experts with biases and without a gate")
    elif not possible:
        reasons.append(f"nobody has said what stock architecture a {config.model_type} can become")
    elif architecture not in possible:
        reasons.append(f"a {config.model_type} can only become {' or '.join(possible)}")
    if architecture == "qwen3_moe" and config.shared_expert_intermediate_size:
        reasons.append("it has a shared expert, and Qwen3-MoE has none: carve with --shared 0")
    if architecture == "qwen3_moe" and "sliding_attention" in attention_types(config):
        reasons.append("some of its layers attend in a sliding window")
    if config.router_type != "linear" and not refit:
        reasons.append(
            f"its router is {config.router_type}, products of neurons, where {architecture} has "
            "a matrix: pass --refit-router with a calibration text to fit one"
        )
    if config.router_absolute_score and not refit:
        reasons.append("its router takes absolute values")
    if config.num_experts_per_tok == 0:
        reasons.append("it does not route")
    if reasons:
        raise RequestError(f"{name} cannot be a {architecture}: {'; '.join(reasons)}.")


def check_gates(folder: Path) -> None:
    """Raises `RequestError` for gate scales, balance biases or attention biases of the output."""
    found: dict[str, int] = {}
    kinds = {"mlp.gate.scale": "scale", "mlp.gate.balance_bias": "balance_bias"}
    kinds["o_proj.bias"] = "attention output biases"
    stored = read_headers(folder)
    asked = {name: it for name, it in stored.items() if name.endswith(tuple(kinds))}
    for name, tensor in read_tensors(asked):
        kind = next(kind for end, kind in kinds.items() if name.endswith(end))
        if kind == "balance_bias" and (tensor > PIN_LIMIT).any():
            kind = "pinned experts (--budget)"
        if tensor.any():
            found[kind] = found.get(kind, 0) + 1
    if found:
        listed = ", ".join(f"{kind} in {layers} layers" for kind, layers in found.items())
        raise RequestError(
            f"the model has {listed}: stock architectures have no place for them. Export a model "
            "as carved with --shared and --active, or recover it with --router-learning-rate 0 "
            "and --bias-speed 0."
        )


def fitted_routers(folder: Path, windows_WL: torch.Tensor) -> dict[str, torch.Tensor]:
    """Linear routers for a carved model, by the names of their tensors."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = linear_routers(model, windows_WL, ridge=Recipe.router_ridge)
    names = [name for name, module in model.named_modules() if isinstance(module, CMoERouter)]
    return {
        f"{name}.linear_weight": weight_NH.to(model.dtype)
        for name, weight_NH in zip(names, weights, strict=True)
    }


def native_config(config: CMoEConfig, architecture: str) -> PreTrainedConfig:
    """The configuration of the same model as a stock one."""
    same: dict[str, Any] = {
        name: getattr(config, name) for name in SAME_FIELDS if hasattr(config, name)
    }
    same |= {"norm_topk_prob": True, "mlp_only_layers": list(config.dense_layers or [])}
    if architecture == "qwen3_moe":
        return Qwen3MoeConfig(
            **same, attention_bias=config.attention_bias, architectures=["Qwen3MoeForCausalLM"]
        )
    types = attention_types(config)
    return Qwen2MoeConfig(
        **same,
        shared_expert_intermediate_size=config.shared_expert_intermediate_size or NO_SHARED,
        layer_types=types,
        use_sliding_window="sliding_attention" in types,
        sliding_window=getattr(config, "sliding_window", None),
        architectures=["Qwen2MoeForCausalLM"],
    )


def write_shards(
    folder: Path,
    config: CMoEConfig,
    architecture: str,
    work: ExportFolder,
    routers: dict[str, torch.Tensor] | None,
    limit: int,
) -> None:
    """Rename and scale all tensors, one in memory at a time; `routers` replace others."""

    def native(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        router, _, part = name.rpartition(".")
        if routers is not None and router.endswith("mlp.gate"):
            if part != "scale":  # every router has one, whatever its kind
                return {}
            name = f"{router}.linear_weight"
            tensor = routers[name].to(tensor.device)
        return native_tensors(name, tensor, config, architecture)

    stored = read_headers(folder)
    parts: dict[Path, dict[str, Entry]] = {}
    origins: dict[str, str] = {}
    for name, it in stored.items():
        empty = torch.empty(it.shape, dtype=CARVABLE[it.dtype], device="meta")
        for new, tensor in native(name, empty).items():
            parts.setdefault(it.path, {})[new], origins[new] = Entry.of(tensor), name
    entries = {name: entry for part in parts.values() for name, entry in part.items()}
    sizes = {name: entry.nbytes for name, entry in entries.items()}
    plan = packed([{name: sizes[name] for name in part} for part in parts.values()], limit)
    files = dict(zip(file_names(len(plan)), plan, strict=True))
    for file, names in tqdm(files.items(), desc="exporting", unit="file", disable=None):
        here = {name: entries[name] for name in names}
        pieces = (
            (new, [raw(tensor)])
            for name, read in read_tensors({origins[new]: stored[origins[new]] for new in names})
            for new, tensor in native(name, read).items()
            if new in here
        )
        work.replace(work.folder / file, partial(write_shard, entries=here, pieces=pieces))
    if len(files) > 1:
        work.write_json(WEIGHTS_INDEX, index_of(files, sizes))


def native_tensors(
    name: str, tensor: torch.Tensor, config: CMoEConfig, architecture: str
) -> dict[str, torch.Tensor]:
    """What a tensor becomes, by the names that Qwen2-MoE and Qwen3-MoE have on the Hub."""
    block, _, part = name.rpartition("mlp.")
    block += "mlp."
    active = config.num_experts_per_tok
    if part in ("gate.scale", "gate.balance_bias") or name.endswith("o_proj.bias"):
        return {}
    if part == "gate.linear_weight":
        found = {f"{block}gate.weight": tensor * (1 if active == 1 else TINY)}
        if architecture == "qwen3_moe":
            return found
        hidden = config.hidden_size
        found[f"{block}shared_expert_gate.weight"] = tensor.new_zeros(1, hidden)
        if config.shared_expert_intermediate_size == 0:
            for projection, shape in {
                "gate_proj": (NO_SHARED, hidden),
                "up_proj": (NO_SHARED, hidden),
                "down_proj": (hidden, NO_SHARED),
            }.items():
                found[f"{block}shared_expert.{projection}.weight"] = tensor.new_zeros(shape)
        return found
    if part == "experts.gate_up_proj":
        found = {}
        for expert, gate_up_QH in enumerate(tensor):
            gate_MH, up_MH = gate_up_QH.chunk(2)
            found[f"{block}experts.{expert}.gate_proj.weight"] = gate_MH.contiguous()
            found[f"{block}experts.{expert}.up_proj.weight"] = up_MH.contiguous()
        return found
    if part == "experts.down_proj":
        return {
            f"{block}experts.{expert}.down_proj.weight": down_HM * active
            for expert, down_HM in enumerate(tensor)
        }
    if part == "shared_expert.down_proj.weight":
        return {name: tensor * 2}
    biased = isinstance(config, Qwen2Config) or getattr(config, "attention_bias", False)
    inputs = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    if architecture == "qwen2_moe" and inputs and not biased:
        return {name: tensor, name.removesuffix("weight") + "bias": tensor.new_zeros(len(tensor))}
    return {name: tensor}


@torch.no_grad()
def compare(carved: Path, native: Path, config: CMoEConfig) -> tuple[float, float]:
    """Precision, largest difference of the logits, and agreement of the routers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, COMPARED_TOKENS), generator=generator)
    logits, choices = [], []
    for folder in (carved, native):  # one model in memory at a time
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=config.dtype,
            experts_implementation="eager",  # of any width: grouped kernels want 16 bytes
        ).eval()
        gates = [module for module in loaded.modules() if isinstance(module, ROUTER_CLASSES)]
        with collected(gates, lambda *call: call[2][2].sort().values) as chosen:
            logits.append(loaded(ids, use_cache=False).logits.float())
        choices.append(torch.cat([index_TK for calls in chosen for index_TK in calls]))
        del loaded, gates
    same_T = (choices[0] == choices[1]).all(dim=1)
    return (logits[0] - logits[1]).abs().max().item(), same_T.double().mean().item()
