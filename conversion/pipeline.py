# SPDX-License-Identifier: Apache-2.0
"""The algorithm: profile -> partition -> route -> carve, one layer at a time.

`carve_layer` reads like the paper's section 4; `carve_model` walks the layers in order, each
profiled on what the carved layers before it really produce.

Shape suffixes: W windows, L tokens of one window, T = W * L tokens, H hidden size, F dense FFN
width, E = 1 + N experts (column 0 the shared one), N routed experts, K active experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers.activations import ACT2FN

from cmoe_hf import CMoELlamaConfig
from cmoe_hf.modeling_cmoe import CMoERouter

from .architectures import Architecture
from .checkpoint import Source
from .decoder import BATCH_TOKENS, FFN, AttentionHalf, Profile, Stopwatch, profile_layer
from .errors import CMoEError
from .partition import Partition, partition
from .profile import activation_rates
from .router import representative_router


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices on which the paper and its released code differ (method, section 11.1)."""

    cosine_profile: bool
    """Mark neurons by products of cosines instead of by their true activations."""
    metric: str
    """Distance between columns of marks: `"l2"` or `"l1"`."""
    max_iterations: int
    """Assignments of the balanced clustering."""
    absolute_score: bool
    """Route by |s| instead of s."""
    normalised_rows: bool
    """Scale the router's rows to length 1."""


RECIPES: dict[str, Recipe] = {
    # arXiv 2502.04416v3 as written.
    "paper": Recipe(
        cosine_profile=False,
        metric="l2",
        max_iterations=20,
        absolute_score=False,
        normalised_rows=False,
    ),
    # The authors' code, where it differs.
    "released": Recipe(
        cosine_profile=True,
        metric="l1",
        max_iterations=1,
        absolute_score=True,
        normalised_rows=True,
    ),
    # "refined", ours, goes here.
}


@dataclass
class CarvedLayer:
    """The outcome for one layer."""

    partition: Partition
    router: dict[str, torch.Tensor]
    y_TH: torch.Tensor
    """Output of the carved FFN for the calibration tokens."""
    figures: dict[str, Any]
    """What `conversion.json` says about the layer."""


def carve_layer(
    ffn: FFN, profile: Profile, config: CMoELlamaConfig, recipe: Recipe, clock: Stopwatch
) -> CarvedLayer:
    """Turn one dense FFN into shared expert, routed experts and router (paper, section 4)."""
    with clock("partition"):
        rate_F = activation_rates(profile.marks_TK, len(ffn.gate_FH))
        parts = partition(
            profile.marks_TK,
            rate_F,
            shared=config.shared_expert_intermediate_size,
            experts=config.num_experts,
            metric=recipe.metric,
            max_iterations=recipe.max_iterations,
        )
    with clock("router"):
        router = representative_router(
            ffn.gate_FH, ffn.up_FH, parts.representatives_N, normalise=recipe.normalised_rows
        )
        weight_TE = expert_weights(router, profile.x_TH, config)
    with clock("carved_down"):
        y_TH = carved_output(profile.h_TF, weight_TE, parts, ffn.down_HF)
    with clock("dense_down_sample"):
        dense_TH = profile.h_TF[:BATCH_TOKENS] @ ffn.down_HF.T
    # A layer whose FFN writes nothing has no relative error: 0, not NaN.
    error = (y_TH[:BATCH_TOKENS] - dense_TH).norm() / dense_TH.norm().clamp_min(1e-30)
    figures = {
        "activation_rate": _quantiles(rate_F),
        "marks_on_shared": rate_F[parts.shared_S].sum().item() / rate_F.sum().item(),
        "shared_neurons": len(parts.shared_S),
        "expert_sizes": [len(ids_M) for ids_M in parts.experts_NM],
        "expert_loads": (weight_TE[:, 1:] != 0).float().mean(dim=0).tolist(),
        "clustering_iterations": parts.iterations,
        "relative_output_error": error.item(),
    }
    return CarvedLayer(parts, router, y_TH, figures)


def expert_weights(
    router: dict[str, torch.Tensor], x_TH: torch.Tensor, config: CMoELlamaConfig
) -> torch.Tensor:
    """Gate weight of every expert for every token, (T, E); 0 where it does not run.

    The model's own router decides, so that calibration sees what inference will see.
    """
    module = CMoERouter(config).to(x_TH.device)
    module.load_state_dict(router, strict=False)
    _, weight_TK, index_TK = module(x_TH)
    weight_TE = x_TH.new_zeros(len(x_TH), 1 + config.num_experts)
    weight_TE[:, 0] = 1
    return weight_TE.scatter_(1, 1 + index_TK, weight_TK)


def carved_output(
    h_TF: torch.Tensor, weight_TE: torch.Tensor, parts: Partition, down_HF: torch.Tensor
) -> torch.Tensor:
    """Output of the carved FFN (T, H), from the activations of the dense one (eq. 2, 9).

    Every neuron is weighed as the expert that owns it. Multiplying by zero and then by a dense
    matrix is faster here than gathering the columns of each expert.
    """
    owner_EF = torch.zeros(weight_TE.shape[1], h_TF.shape[1], device=h_TF.device)
    owner_EF[0, parts.shared_S] = 1
    for expert, ids_M in enumerate(parts.experts_NM, start=1):
        owner_EF[expert, ids_M] = 1
    chunks = zip(h_TF.split(BATCH_TOKENS), weight_TE.split(BATCH_TOKENS), strict=True)
    return torch.cat([(weight_tE @ owner_EF).mul_(h_tF) @ down_HF.T for h_tF, weight_tE in chunks])


@torch.no_grad()
def carve_model(
    source: Source,
    windows_WL: torch.Tensor,
    config: CMoELlamaConfig,
    recipe: Recipe,
    *,
    k_act: int,
    device: torch.device,
) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, Any]]]:
    """Carve every layer in order; yield (shard number, tensors to store, figures).

    Shard 0 holds the tensors outside the layers, without figures. The arithmetic is float32
    whatever the precision of the checkpoint, which the stored tensors keep.

    Raises `CMoEError` if the weights or the activations are not finite.
    """
    names = source.architecture
    rest = source.read_rest()
    hidden_WLH = rest[names.embedding][windows_WL].to(device, torch.float32)
    yield 0, rest, {}
    del rest
    attention = AttentionHalf(names, source.config, windows_WL.shape[1], device)
    profile = Profile.empty(
        windows_WL.numel(), config.hidden_size, config.intermediate_size, k_act, device
    )
    for index in tqdm(range(config.num_hidden_layers), desc="carving", unit="layer", disable=None):
        clock = Stopwatch()
        with clock("read"):
            stored = source.read_layer(index)
            layer = {name: tensor.to(device, torch.float32) for name, tensor in stored.items()}
            ffn = FFN(
                gate_FH=layer.pop(names.gate),
                up_FH=layer.pop(names.up),
                down_HF=layer.pop(names.down),
                act=ACT2FN[config.hidden_act],
            )
            attention.load(layer)
        profile_layer(
            ffn, attention, hidden_WLH, profile, cosine=recipe.cosine_profile, clock=clock
        )
        if not profile.is_finite():
            raise CMoEError(
                f"layer {index} produces NaN or infinite activations on the calibration text, "
                "from finite weights: the checkpoint overflows. Try another one."
            )
        carved = carve_layer(ffn, profile, config, recipe, clock)
        hidden_WLH += carved.y_TH.view_as(hidden_WLH)
        tensors = stored_tensors(names, stored, carved)
        prefix = names.layer_prefix.format(index)
        figures = {**carved.figures, "seconds": clock.report(len(profile.x_TH))}
        yield index + 1, {prefix + name: tensor for name, tensor in tensors.items()}, figures


def stored_tensors(
    names: Architecture, dense: dict[str, torch.Tensor], carved: CarvedLayer
) -> dict[str, torch.Tensor]:
    """The tensors of a carved layer in the checkpoint's precision, named relative to it."""
    tensors = dict(dense)
    gate_FH, up_FH, down_HF = (tensors.pop(name) for name in (names.gate, names.up, names.down))
    shared_S, experts_NM = carved.partition.shared_S, carved.partition.experts_NM
    if len(shared_S):
        tensors["mlp.shared_expert.gate_proj.weight"] = gate_FH[shared_S]
        tensors["mlp.shared_expert.up_proj.weight"] = up_FH[shared_S]
        tensors["mlp.shared_expert.down_proj.weight"] = down_HF[:, shared_S]
    tensors["mlp.experts.gate_up_proj"] = torch.cat([gate_FH[experts_NM], up_FH[experts_NM]], dim=1)
    tensors["mlp.experts.down_proj"] = down_HF.T[experts_NM].transpose(1, 2)
    for name, weight in carved.router.items():
        tensors[f"mlp.gate.{name}"] = weight.to(gate_FH.dtype)
    tensors["mlp.gate.scale"] = torch.zeros(len(experts_NM), dtype=gate_FH.dtype)
    tensors["mlp.gate.balance_bias"] = torch.zeros(len(experts_NM), dtype=torch.float32)
    return tensors


def _quantiles(rate_F: torch.Tensor) -> dict[str, float]:
    """Minimum, quartiles, maximum."""
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=rate_F.dtype)
    values = torch.quantile(rate_F, points).tolist()
    return dict(zip(("min", "q25", "median", "q75", "max"), values, strict=True))
