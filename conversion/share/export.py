# SPDX-License-Identifier: Apache-2.0
"""Write the same function as a stock architecture, which needs no remote code.

Shape suffixes: T tokens, K active experts, W windows, L tokens of a window.
"""

import logging
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from cmoe_hf import CMoEConfig, CMoEHierarchicalConfig
from cmoe_hf.configuration_cmoe import with_legacy_keys
from cmoe_hf.modeling_cmoe import CMoERouter

from ..carve.recipe import Recipe
from ..carve.settings import MAX_SHARD_SIZE, shard_bytes
from ..errors import RequestError
from ..folder.auxiliary_files import read_auxiliary_files
from ..folder.card import CARD_FILE, native_card
from ..folder.fingerprint import write_fingerprint
from ..folder.shards import Shards
from ..folder.unfinished import BriefFolder
from ..measure.routing import collected
from ..options import with_options
from ..source.architectures import Architecture, architecture_of
from ..source.calibration import random_windows, read_tokens
from ..source.checkpoint import fetch_model, find_model, load_tokenizer
from ..source.loading import window_length
from ..source.stored import TensorRef, read_headers, read_json
from ..source.texts import open_text, text_file
from .linearise import linear_routers
from .needs import choose, lacking, needs_of
from .pieces import Files, Made, by_layer
from .targets import TARGETS, Target, by_faithfulness

logger = logging.getLogger(__name__)

COMPARED_TOKENS = 64
ROUTER_CLASSES: tuple[type[torch.nn.Module], ...] = (
    CMoERouter,
    *(target.router_class for target in TARGETS.values()),
)


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written; the keys of `cmoe export --json`."""

    output: str
    architecture: str
    """As transformers calls it."""
    reason: str
    """Why this one."""
    dtype: str
    max_abs_logit_difference: float
    """Between the logits of both models, in the precision of the checkpoint, on random tokens."""
    routing_agreement: float
    """Share of these tokens, over all layers, for which both choose the same experts."""
    refitted_router: bool
    """Whether the router was replaced: then the function is another."""


@dataclass(frozen=True, kw_only=True)
class RefitOptions:
    """Linear routers in place of those that an engine does not have."""

    refit_router: str | Path | None = None
    """Text to fit linear routers to, where the model has others."""
    samples: int = 8
    """Windows of that text."""
    sequence_length: int | None = None
    """Tokens per window; default 2,048 or the model's context."""
    overwrite: bool = False
    """Replace what is at the output."""


@dataclass(frozen=True)
class ExportOptions(RefitOptions):
    """The options of `export`."""

    model: str | Path
    """Folder or Hub id of a carved model."""
    output: str | Path
    """Folder to create."""
    _: KW_ONLY
    to: str | None = None
    """granite, glm4, ernie, qwen2, qwen3; with --gguf llama, qwen2, qwen3, granitemoe, glm4moe,
    step35; default the most faithful that fits."""
    max_shard_size: str | int = MAX_SHARD_SIZE
    """Of a file of weights, for example 500MB or 2GiB; one file up to it."""


@with_options(ExportOptions)
def export(options: ExportOptions) -> Export:
    """Write a carved model as a stock architecture that loads without remote code.

    It must have a linear router, unless one is fitted, and no fine-tuned gates.

    Raises:
        RequestError: No architecture, or not the one asked for, represents the model; the message
            says why.
        CMoEError: The model cannot be reached or is damaged.
    """
    model, output, to, overwrite = options.model, options.output, options.to, options.overwrite
    refit_router, samples = options.refit_router, options.samples
    sequence_length, max_shard_size = options.sequence_length, options.max_shard_size
    limit, work = shard_bytes(max_shard_size), ExportFolder(output, overwrite=overwrite)
    if to not in (None, *TARGETS):
        raise RequestError(f"there is no export to {to!r}; choose one of {', '.join(TARGETS)}.")
    folder, name, commit = find_model(model)
    config = AutoConfig.from_pretrained(folder)
    arch = check_config(config, name, refit=refit_router is not None)
    if commit is not None:
        folder = fetch_model(name, commit)
    needs = needs_of(config, arch, folder)
    targets = by_faithfulness(config, needs)
    chosen, reasons = choose({it.name: it.refusals(config, needs) for it in targets}, name, to)
    target = TARGETS[chosen]
    if to is None:
        precise = target.float32_router or config.dtype == torch.float32
        precision = "in float32" if precise else "in 16 bits, less precisely than we do"
        reasons.insert(0, f"it scores experts {precision}")
    if unread := " and the ".join(lacking(target.unread & needs, ())):
        where = "there it would be another model. transformers does"
        logger.warning("vLLM 0.32 does not read the %s of a %s: %s.", unread, target.causal, where)
    tokenizer = load_tokenizer(folder)
    native = target.config(config, needs)
    kept = read_auxiliary_files(folder).beside(native, tokenizer)
    work.check({"the carved model": folder, "the calibration text": text_file(refit_router)})
    routers = None
    if refit_router is not None:
        routers = fitted_routers(folder, config, tokenizer, refit_router, samples, sequence_length)
    with ExportFolder.create(output, {"model": name}, overwrite=overwrite) as work:
        write_shards(made_tensors(folder, config, target, routers), work, limit)
        native.save_pretrained(work.folder)
        written = read_json(work.folder / CONFIG_NAME)
        work.write_json(CONFIG_NAME, dict(sorted(with_legacy_keys(native, written).items())))
        work.write_files(kept.files)
        write_fingerprint(folder, work, tokenizer)
        difference, agreement = compare(folder, work.folder, config)
        result = Export(
            output=str(work.output),
            architecture=native.model_type,
            reason="; ".join(reasons),
            dtype=str(config.dtype).removeprefix("torch."),
            max_abs_logit_difference=difference,
            routing_agreement=agreement,
            refitted_router=routers is not None,
        )
        if kept.card:
            refitted = routers is not None
            card = native_card(kept.card, native.model_type, difference, refitted=refitted)
            work.write_text(CARD_FILE, card)
    return result


class ExportFolder(BriefFolder):
    """An export's folder."""

    command = "export"
    noun = "export"


def check_config(config: PreTrainedConfig, name: str, *, refit: bool) -> Architecture:
    """Return a carved model's family. Raises `RequestError` for what no target represents."""
    if not isinstance(config, CMoEConfig):
        raise RequestError(f"{name} is a {config.model_type} model, not a carved one.")
    if isinstance(config, CMoEHierarchicalConfig):
        raise RequestError(
            f"{name} is a carved MoE: no stock architecture has routers within experts. Its own "
            "code loads wherever trust_remote_code may be given."
        )
    reasons = []
    arch = architecture_of(config)
    if not config.has_gate:
        reasons.append("no stock architecture has experts with biases and without a gate")
    elif arch is None or arch.differs is None:
        reasons.append(f"nobody has said what stock architecture a {config.model_type} can become")
    if config.router_type != "linear" and not refit:
        reasons.append(
            f"its router is {config.router_type}, products of neurons, where stock architectures "
            "have a matrix: pass --refit-router with a calibration text to fit one"
        )
    if config.router_absolute_score and not refit:
        reasons.append("its router takes absolute values")
    if config.num_experts_per_tok == 0:
        reasons.append("it does not route")
    if reasons or arch is None:
        raise RequestError(f"{name} cannot be exported: {'; '.join(reasons)}.")
    return arch


def fitted_routers(
    folder: Path,
    config: CMoEConfig,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path,
    samples: int,
    sequence_length: int | None,
) -> dict[str, torch.Tensor]:
    """Fit linear routers to a carved model. Return them by the names of their tensors."""
    ids = read_tokens(open_text(text), tokenizer, config.vocab_size).ids
    length = window_length(config, sequence_length)
    windows_WL = random_windows(ids, samples=samples, length=length, seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = linear_routers(model, windows_WL, ridge=Recipe.router_ridge)
    names = [name for name, module in model.named_modules() if isinstance(module, CMoERouter)]
    return {
        f"{name}.linear_weight": weight_NH.to(model.dtype)
        for name, weight_NH in zip(names, weights, strict=True)
    }


def made_tensors(
    folder: Path,
    config: CMoEConfig,
    target: Target,
    routers: Mapping[str, torch.Tensor] | None,
) -> list[dict[str, Made]]:
    """Return the tensors of the target by name, for each layer; `routers` replace others."""
    layers = []
    for layer, parts in by_layer(read_headers(folder)).items():
        own = with_router(parts, layer, routers)
        made = target.layer(own, config) if layer else target.ends(parts)
        layers.append({layer + part: it for part, it in made.items()})
    return layers


def with_router(
    parts: dict[str, TensorRef], layer: str, routers: Mapping[str, torch.Tensor] | None
) -> dict[str, Any]:
    """Return the tensors of a layer, with another router if there is one for it."""
    name = "mlp.gate.linear_weight"
    if routers is None or layer + name not in routers:
        return parts
    gates = {part for part in parts if part.startswith("mlp.gate.") and "bias" not in part}
    kept = {part: it for part, it in parts.items() if part not in gates}
    return {**kept, name: routers[layer + name]}


def write_shards(layers: list[dict[str, Made]], work: ExportFolder, limit: int) -> None:
    """Write all tensors, a part of one in memory at a time."""
    parts = [{name: it.empty for name, it in layer.items()} for layer in layers]
    shards = Shards(work.folder, parts, limit)
    shards.create()
    with Files() as opened:
        for layer in tqdm(layers, desc="exporting", unit="layer", disable=None):
            shards.write({name: it.read(opened) for name, it in layer.items()})


@torch.no_grad()
def compare(carved: Path, native: Path, config: CMoEConfig) -> tuple[float, float]:
    """Return the largest difference of the logits, and how often both route alike."""
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
        with collected(gates, lambda *call: chosen_by(call[2])) as chosen:
            logits.append(loaded(ids, use_cache=False).logits.float())
        choices.append(torch.cat([index_TK for calls in chosen for index_TK in calls]))
        del loaded, gates
    same_T = (choices[0] == choices[1]).all(dim=1)
    return (logits[0] - logits[1]).abs().max().item(), same_T.double().mean().item()


def chosen_by(output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the experts that a router chose, sorted: its one output of whole numbers."""
    return next(it for it in output if not it.is_floating_point()).sort().values
