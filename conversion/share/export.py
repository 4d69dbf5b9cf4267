# SPDX-License-Identifier: Apache-2.0
"""Write the same function as a stock architecture, which needs no remote code.

Shape suffixes: T tokens, K active experts.
"""

import logging
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from cmoe_hf import CMoEConfig, CMoEHierarchicalConfig
from cmoe_hf.configuration_cmoe import with_legacy_keys

from ..carve.settings import MAX_SHARD_SIZE, shard_bytes
from ..errors import RequestError, check_known
from ..folder.auxiliary_files import read_auxiliary_files
from ..folder.card import CARD_FILE, native_card
from ..folder.fingerprint import write_fingerprint
from ..folder.shards import Shards
from ..folder.unfinished import PartialFolder
from ..measure.routing import collected
from ..options import with_options
from ..source.architectures import dense_type, differences
from ..source.hub import fetch_model, find_model, load_tokenizer
from ..source.stored import read_headers, read_json
from .needs import choose, lacking, needs_of
from .pieces import Files, by_layer
from .targets import TARGETS, by_faithfulness

logger = logging.getLogger(__name__)

COMPARED_TOKENS = 64


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


@dataclass(frozen=True)
class ExportOptions:
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
    """Maximum size of a weights file, for example 500MB or 2GiB."""
    overwrite: bool = False
    """Replace what is at the output."""


@with_options(ExportOptions)
def export(options: ExportOptions) -> Export:
    """Write a carved model as a stock architecture that loads without remote code.

    It must have a linear router and no fine-tuned gates.

    Raises:
        RequestError: No architecture, or not the one asked for, represents the model; the message
            says why.
        CMoEError: The model cannot be reached or is damaged.
    """
    limit = shard_bytes(options.max_shard_size)
    work = ExportFolder(options.output, overwrite=options.overwrite)
    check_known("export to", options.to, TARGETS)
    folder, name, commit = find_model(options.model)
    config = AutoConfig.from_pretrained(folder)
    check_config(config, name)
    if commit is not None:
        folder = fetch_model(name, commit)
    needs = needs_of(config, folder)
    target, reasons = choose(by_faithfulness(config, needs), config, needs, name, options.to)
    if options.to is None:
        precise = target.float32_router or config.dtype == torch.float32
        precision = "in float32" if precise else "in 16 bits, less precisely than we do"
        reasons.insert(0, f"it scores experts {precision}")
    if unread := " and the ".join(lacking(target.unread & needs, ())):
        where = "there it would be another model. transformers does"
        logger.warning("vLLM 0.32 does not read the %s of a %s: %s.", unread, target.causal, where)
    tokenizer = load_tokenizer(folder)
    native = target.config(config, needs)
    kept = read_auxiliary_files(folder).beside(native, tokenizer)
    work.check({"the carved model": folder})
    stored: dict[str, Any] = read_headers(folder)
    overwrite = options.overwrite
    with ExportFolder.create(options.output, {"model": name}, overwrite=overwrite) as work:
        layers = []
        for layer, parts in by_layer(stored).items():
            made = target.layer(parts, config) if layer else target.ends(parts)
            layers.append({layer + part: it for part, it in made.items()})
        planned = {name: it.empty for made in layers for name, it in made.items()}
        shards = Shards(work.folder, planned, limit)
        shards.create()
        with Files() as files:
            for made in tqdm(layers, desc="exporting", unit="layer", disable=None):
                shards.write({name: it.read(files) for name, it in made.items()})
        native.save_pretrained(work.folder)
        written = read_json(work.folder / CONFIG_NAME)
        work.write_json(CONFIG_NAME, dict(sorted(with_legacy_keys(native, written).items())))
        work.write_files(kept.files)
        write_fingerprint(folder, work, tokenizer)
        difference, agreement = compare(folder, work.folder, config)
        if kept.card:
            work.write_files({CARD_FILE: native_card(kept.card, native.model_type, difference)})
    return Export(
        output=str(work.output),
        architecture=native.model_type,
        reason="; ".join(reasons),
        dtype=str(config.dtype).removeprefix("torch."),
        max_abs_logit_difference=difference,
        routing_agreement=agreement,
    )


class ExportFolder(PartialFolder):
    """An export's folder."""

    noun = "export"


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Raise `RequestError` for a model that no target represents."""
    if not isinstance(config, CMoEConfig):
        raise RequestError(f"{name} is a {config.model_type} model, not a carved one.")
    if isinstance(config, CMoEHierarchicalConfig):
        raise RequestError(
            f"{name} is a carved MoE: no stock architecture has routers within experts. Its own "
            "code loads wherever trust_remote_code may be given."
        )
    reasons = []
    if not config.has_gate:
        reasons.append("no stock architecture has experts without a gate")
    elif differences(config) is None:
        reasons.append(
            f"no stock MoE architecture is known to have the layers of a {dense_type(config)} "
            "around its FFN"
        )
    if config.router_type != "linear":
        reasons.append(
            f"its router is {config.router_type}, products of neurons, where stock architectures "
            "have a matrix: carve with the recipe refined"
        )
    if config.router_absolute_score:
        reasons.append("its router takes absolute values")
    if config.num_experts_per_tok == 0:
        reasons.append("it does not route")
    if reasons:
        raise RequestError(f"{name} cannot be exported: {'; '.join(reasons)}.")


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
        with collected(routers_of(loaded), lambda *call: chosen_by(call[2])) as chosen:
            logits.append(loaded(ids, use_cache=False).logits.float())
        choices.append(torch.cat([index_TK for calls in chosen for index_TK in calls]))
        del loaded
    same_T = (choices[0] == choices[1]).all(dim=1)
    return (logits[0] - logits[1]).abs().max().item(), same_T.double().mean().item()


def routers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the routers of a carved or a stock model."""
    return [it for it in model.modules() if type(it).__name__.lower().endswith("router")]


def chosen_by(output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the experts that a router chose, sorted: its one output of whole numbers."""
    return next(it for it in output if not it.is_floating_point()).sort().values
