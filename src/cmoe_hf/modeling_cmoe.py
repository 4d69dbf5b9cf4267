# SPDX-License-Identifier: Apache-2.0
"""CMoE models (arXiv 2502.04416): a shared expert, routed experts and an analytical router.

What a family needs of this file travels with its converted repositories. It may import torch,
transformers and its sibling configuration file only.

Shape suffixes: B sequences, S positions, T = B * S tokens, H hidden size, N routed experts,
K active experts, M neurons of one routed expert.
"""

# No `from __future__ import annotations` here, and the decorator below stays literal: transformers,
# vLLM and llm-compressor read this source and these annotations.

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_cmoe import (
    CMoEConfig,
    CMoEGPTNeoXConfig,
    CMoEHierarchicalConfig,
    CMoELlamaConfig,
    CMoEMistralConfig,
    CMoEOlmoeConfig,
    CMoEQwen2Config,
    CMoEQwen3Config,
    CMoEQwen3MoeConfig,
)

logger = logging.get_logger(__name__)

TESTED = ("5.16", "5.24")
"""The lowest and the newest transformers that this code has been tested with."""
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""What releases of transformers call the keys and values of earlier tokens, the newest first."""
CONSUMED = {
    # What the library says may travel to layers, attention and loss.
    *TransformersKwargs.__annotations__,
    *("ignore_index", "shift_labels", "return_dict"),
    # Of paged attention, in `generate_batch`; of vLLM and SGLang.
    *("block_table", "logits_indices", "logits_processor_args", "read_index", "write_index"),
    *("attention_instances", "forward_batch"),
    # Tokenizers give it to every model. A decoder has one type of token.
    "token_type_ids",
    # `generate` has read it and passes it on all the same, as `transformers serve` makes it do.
    "tokenizer",
}
"""Keywords beyond the signatures of our forward methods that somebody further on reads."""


def cache_name(taker: Any, *others: str) -> str:
    """What a function, layer or output of the library calls the cache; it must know `others` too.

    Decided by its signature, not by a version. A keyword that is not there would vanish in
    `**kwargs`, and the model would go on with an empty cache or without a mask.

    Raises:
        ImportError: A name is not there.
    """
    known = getattr(taker, "__dataclass_fields__", None) or inspect.signature(taker).parameters
    found = [name for name in CACHE_NAMES if name in known]
    missing = [name for name in others if name not in known]
    if missing or not found:
        lost = ", ".join(missing or ["the cache"])
        raise ImportError(
            f"transformers {transformers.__version__} has another name for {lost} in "
            f"{taker.__qualname__}, so this model would compute something else. Its code knows "
            f"transformers {TESTED[0]} to {TESTED[1]}: install one of these, or renew the code "
            "with a newer cmoe-hf: cmoe upgrade."
        )
    return found[0]


def given_cache(cache: Any, past_key_values: Any, others: dict[str, Any]) -> Any:
    """The cache that a forward method was given under either name; nothing may be left unread.

    Raises:
        TypeError: Two caches, or a keyword among `others` that nobody would read.
    """
    unread = sorted(name for name in others if name not in CONSUMED and others[name] is not None)
    if unread:
        raise TypeError(f"forward() got {', '.join(unread)}, which nothing in this model reads.")
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("forward() got two caches: `cache` and `past_key_values` are the same.")
    return past_key_values if cache is None else cache


def warn_of_untested_library() -> None:
    """Say so, once, if the installed transformers is newer than all that were tested."""
    installed = [int(part) for part in transformers.__version__.split(".")[:2]]
    if installed > [int(part) for part in TESTED[1].split(".")]:
        logger.warning_once(
            f"This model's code has been tested with transformers {TESTED[0]} to {TESTED[1]}, not "
            f"with {transformers.__version__}. To see that it still computes the same: cmoe verify."
        )


PIN_BIAS, PIN_LIMIT = 2.0, 1.0
"""Balance bias of a pinned expert, and the highest of any other: below 1 + 1 with its probability,
it never wins against a pin."""


class Routing(NamedTuple):
    """What a router decided."""

    score_TN: torch.Tensor
    """Of every routed expert, float32."""
    weight_TK: torch.Tensor
    """Gate weights of the experts that run."""
    index_TK: torch.Tensor
    """Which they are, int64."""


class HierarchicalRouting(NamedTuple):
    """What the router of a carved MoE decided, over the experts of a token's parents."""

    score_TN: torch.Tensor
    weight_TK: torch.Tensor
    index_TK: torch.Tensor
    idle_weight_TI: torch.Tensor
    """Gate weights of the experts that do not run."""
    idle_index_TI: torch.Tensor
    """Which they are, int64."""
    parent_weight_TP: torch.Tensor
    parent_TP: torch.Tensor


class CMoERouter(nn.Module):
    """Scores the routed experts, selects K of them and weighs them (paper, eq. 8 and 9).

    `"representative"`: s is the activation of one neuron per expert, act(x Wg) * (x Wu), or
    act(x W + b) where the FFN has no gate.
    `"linear"`: s = x W. The K experts of largest softmax(s) + b run, each with weight
    1 + softmax(s) * u; b balances the load and u is learned, both are zero after carving.

    The parameters are raw and none is called `weight`: vLLM would take a router whose state is
    a lone `weight` for a plain softmax router and silently replace it.
    """

    balance_bias: torch.Tensor

    def __init__(self, config: CMoEConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.absolute_score = config.router_absolute_score
        self.router_type = config.router_type
        shape = (config.num_experts, config.hidden_size)
        self.has_gate = config.has_gate
        if self.router_type == "representative":
            if self.has_gate:
                self.gate_weight = nn.Parameter(torch.empty(shape))
            else:
                self.up_bias = nn.Parameter(torch.empty(config.num_experts))
            self.up_weight = nn.Parameter(torch.empty(shape))
            self.act_fn = ACT2FN[config.hidden_act]
        else:
            self.linear_weight = nn.Parameter(torch.empty(shape))
        self.scale = nn.Parameter(torch.zeros(config.num_experts))
        self.register_buffer(
            "balance_bias", torch.zeros(config.num_experts, dtype=torch.float32), persistent=True
        )

    def score(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Score s of every expert, in float32: rounding to 16 bits would reorder close experts."""
        with maybe_autocast(device_type=x_TH.device.type, enabled=False):
            return self.score_as_it_is(x_TH.float())

    def score_as_it_is(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The same of float32 tokens where nothing is cast unasked."""
        if self.router_type == "linear":
            score_TN = F.linear(x_TH, self.linear_weight.float())
        elif self.has_gate:
            gate_TN = F.linear(x_TH, self.gate_weight.float())
            up_TN = F.linear(x_TH, self.up_weight.float())
            score_TN = self.act_fn(gate_TN) * up_TN
        else:
            up_TN = F.linear(x_TH, self.up_weight.float(), self.up_bias.float())
            score_TN = self.act_fn(up_TN)
        return score_TN.abs() if self.absolute_score else score_TN

    @property
    def choice(self) -> tuple[int, int]:
        """How many experts compete, and how many of them run."""
        return len(self.scale), self.top_k

    def selection_score(
        self, probability: torch.Tensor, index: torch.Tensor | None, x_TH: torch.Tensor
    ) -> torch.Tensor:
        """What the experts `index`, or all of them, are chosen by: p + b."""
        return probability + (self.balance_bias if index is None else self.balance_bias[index])

    def pick(self, value_TN: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
        """The experts of the highest value, (T, K), of those that the tokens x may have."""
        return torch.topk(value_TN, self.top_k, dim=-1).indices

    def weigh(self, probability_TN: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Gate weights 1 + p * u of the chosen experts, (T, K) float32."""
        return (1 + probability_TN * self.scale).gather(1, index_TK)

    def forward(self, x_TH: torch.Tensor) -> Routing | HierarchicalRouting:
        """Route every token."""
        score_TN = self.score(x_TH)
        probability_TN = torch.softmax(score_TN, dim=-1, dtype=torch.float32)
        index_TK = self.pick(self.selection_score(probability_TN, None, x_TH), x_TH)
        weight_TK = self.weigh(probability_TN, index_TK)
        return Routing(score_TN, weight_TK.to(x_TH.dtype), index_TK)

    def route_one_token(self, x_1H: torch.Tensor) -> list[tuple[int, float]]:
        """The experts of one token on a CPU, and their gate weights.

        As `forward`, but in Python: choosing among a few dozen numbers takes it less than the
        library's calls do.
        """
        [probability_N] = self.score_as_it_is(x_1H.float()).softmax(dim=-1).tolist()
        scale_N, bias_N = self.scale.tolist(), self.balance_bias.tolist()
        selection_N = [p + b for p, b in zip(probability_N, bias_N, strict=True)]
        best_N = sorted(range(len(selection_N)), key=selection_N.__getitem__, reverse=True)
        return [(n, 1 + probability_N[n] * scale_N[n]) for n in best_N[: self.top_k]]


class CMoEHierarchicalRouter(CMoERouter):
    """The source's router over its experts, the parents, and one over the experts carved from them.

    The experts of a token's parents compete: within each parent with scores of their own, or all
    together (`flat_routing`) with scores s that predict the logarithm of what an expert writes
    squared, and s + 2 log w under the parent's weight w.

    Shape suffixes besides: P parents of a token, C experts that compete with each other, G groups
    of such. All state is of one module without a lone `weight`, for the reason above.
    """

    def __init__(self, config: CMoEHierarchicalConfig) -> None:
        super().__init__(config)
        self.parents_per_token = config.num_parents_per_tok
        self.norm_parent_prob = config.norm_parent_prob
        self.flat = config.flat_routing
        self.per_parent = config.num_experts // config.num_parents
        self.groups = 1 if self.flat else self.parents_per_token
        self.kept_parents: list[int] = []
        """Parents of which everything runs: their experts leave the places to others."""
        self.parent_weight = nn.Parameter(torch.empty(config.num_parents, config.hidden_size))
        if self.flat:
            self.linear_bias = nn.Parameter(torch.empty(config.num_experts))

    @property
    def choice(self) -> tuple[int, int]:
        """How many experts compete, and how many of them run."""
        return self.parents_per_token * self.per_parent // self.groups, self.top_k // self.groups

    def parents(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices of the parents, (T, P) each, computed as in the source."""
        logits = F.linear(x_TH, self.parent_weight)
        probability = torch.softmax(logits, dtype=torch.float32, dim=-1)
        weight_TP, parent_TP = probability.topk(self.parents_per_token, dim=-1)
        if self.norm_parent_prob:
            weight_TP = weight_TP / weight_TP.sum(dim=-1, keepdim=True)
        return weight_TP.to(logits.dtype), parent_TP

    def candidates(self, parent_TP: torch.Tensor) -> torch.Tensor:
        """The experts that compete, (T, G, C)."""
        child_N = torch.arange(self.per_parent, device=parent_TP.device)
        index_TPN = parent_TP[:, :, None] * self.per_parent + child_N
        return index_TPN.flatten(1).unflatten(1, (self.groups, -1))

    def is_kept(self, index: torch.Tensor) -> torch.Tensor:
        """Whether experts are of a parent that is kept whole."""
        kept = torch.tensor(self.kept_parents, dtype=torch.int64, device=index.device)
        return torch.isin(index // self.per_parent, kept)

    def pick(self, value_TN: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
        index_TGC = self.candidates(self.parents(x_TH)[1])
        value_TGC = value_TN.gather(1, index_TGC.flatten(1)).view_as(index_TGC)
        if self.kept_parents and self.flat:
            value_TGC = value_TGC.masked_fill(self.is_kept(index_TGC), -torch.inf)
        best_TGK = value_TGC.topk(self.choice[1], dim=-1).indices
        return index_TGC.gather(2, best_TGK).flatten(1)

    def forward(self, x_TH: torch.Tensor) -> HierarchicalRouting:
        """Route every token, within its parents."""
        weight_TP, parent_TP = self.parents(x_TH)
        index_TGC = self.candidates(parent_TP)
        under_TGC = weight_TP.float().repeat_interleave(self.per_parent, 1).view_as(index_TGC)
        score_TN = self.score(x_TH)
        if self.flat:
            score_TN = score_TN + self.linear_bias.float()
        score_TGC = score_TN.gather(1, index_TGC.flatten(1)).view_as(index_TGC)
        if self.flat:
            score_TGC = score_TGC + 2 * under_TGC.log()
        yields = self.is_kept(index_TGC) if self.kept_parents and self.flat else None
        if yields is not None:
            score_TGC = score_TGC.masked_fill(yields, torch.finfo(score_TGC.dtype).min)
        probability_TGC = torch.softmax(score_TGC, dim=-1)
        if yields is not None:
            probability_TGC = probability_TGC.masked_fill(yields, 0)
        weight_TGC = under_TGC * (1 + probability_TGC * self.scale[index_TGC])
        selection_TGC = self.selection_score(probability_TGC, index_TGC, x_TH)
        if yields is not None:
            selection_TGC = selection_TGC.masked_fill(yields, -torch.inf)
        order_TGC = selection_TGC.argsort(dim=-1, descending=True)
        competing, running = self.choice
        sizes = (running, competing - running)
        weight, idle_weight = weight_TGC.to(x_TH.dtype).gather(2, order_TGC).split(sizes, dim=2)
        index, idle_index = index_TGC.gather(2, order_TGC).split(sizes, dim=2)
        return HierarchicalRouting(
            score_TN,
            weight.flatten(1),
            index.flatten(1),
            idle_weight.flatten(1),
            idle_index.flatten(1),
            weight_TP,
            parent_TP,
        )


LARGE = 2**19
"""Elements of a weight that no longer fits into the nearer caches: reading it well pays."""
WIDE = 2**16
"""The same for one row, which the library multiplies on one core alone."""
PLAIN = (torch.Tensor, nn.Parameter)
"""Kinds of weights that are numbers, neither quantised nor spread over devices."""
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
SWITCH_ONEDNN = getattr(torch._C, "_set_mkldnn_enabled", None)
BFLOAT16_INSTRUCTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
MULTIPLIES_BFLOAT16 = any(getattr(torch.cpu, name, bool)() for name in BFLOAT16_INSTRUCTIONS)
"""Whether this CPU does: where it does not, each number that is multiplied is converted."""


def is_thin(x_TH: torch.Tensor, weight_QH: torch.Tensor) -> bool:
    """Whether x Wᵀ is a few rows on a CPU against a large weight, without gradients.

    `torch.nn.functional.linear` reads the weight much slower there than memory allows, and in
    float32 with two to eight rows once for each of them.
    """
    rows, dtype = len(x_TH), weight_QH.dtype
    if rows == 1:
        large = dtype == torch.bfloat16 or weight_QH.numel() >= WIDE
    else:
        large = rows <= 512 and weight_QH.numel() >= LARGE
    return (
        large
        and weight_QH.is_cpu
        and dtype == x_TH.dtype
        and dtype in ((torch.float32, torch.bfloat16) if rows == 1 else (torch.float32,))
        and type(weight_QH) in PLAIN
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (x_TH.requires_grad or weight_QH.requires_grad))
    )


def thin_linear(x_TH: torch.Tensor, weight_QH: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.linear`, faster where `is_thin`."""
    rows = len(x_TH)
    if not is_thin(x_TH, weight_QH):
        return F.linear(x_TH, weight_QH)
    if rows == 1:
        return row_linear(x_TH, weight_QH)
    if rows <= 24 and ONEDNN_LINEAR is not None:
        return ONEDNN_LINEAR(x_TH, weight_QH, None, "none", [], "")
    # MKL is faster at W xᵀ than at x Wᵀ, if the product has a multiple of eight columns.
    padded_TH = F.pad(x_TH, (0, 0, 0, -rows % 8)) if rows > 4 else x_TH
    return (weight_QH @ padded_TH.T).T[:rows]


def row_linear(x_1H: torch.Tensor, weight_QH: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.linear` of one row on a CPU, as fast as memory gives the weight."""
    if weight_QH.dtype == torch.bfloat16:
        return row_linear_without_onednn(x_1H, weight_QH)
    rows = len(weight_QH)
    pieces = min(rows & -rows, 16)  # the largest power of two that divides it
    if (
        pieces == 1
        or weight_QH.dtype != torch.float32  # others run on all cores anyway
        or weight_QH.numel() < WIDE
        or not weight_QH.is_contiguous()
    ):
        return F.linear(x_1H, weight_QH)
    weight_PRH = weight_QH.view(pieces, rows // pieces, -1)
    return torch.bmm(weight_PRH, x_1H.T.expand(pieces, -1, 1)).view(1, rows)


def row_linear_without_onednn(x_1H: torch.Tensor, weight_QH: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's own product: on CPUs that multiply bfloat16, oneDNN's takes 2.5 times
    as long for one row.
    """
    # The switch is the process's. Another thread that finds it off leaves it alone, and whoever
    # turned it off turns it on again: whatever happens in between, it does not stay off.
    if SWITCH_ONEDNN is None or not torch.backends.mkldnn.enabled:
        return F.linear(x_1H, weight_QH)
    try:
        SWITCH_ONEDNN(False)
        return F.linear(x_1H, weight_QH)
    finally:
        SWITCH_ONEDNN(True)


class ExpertsLoop(nn.Module):
    """The readable reference, backend `"eager"`: loop over the experts that were chosen.

    Index `num_experts` means "not on this rank" under expert parallelism: the loop never reaches
    it.
    """

    down_proj: nn.Parameter
    config: Any  # what `use_experts_implementation` keeps

    def __init__(
        self, config: CMoEConfig, num_experts: int | None = None, width: int | None = None
    ) -> None:
        """The routed experts of `config`, or others of the same kind."""
        super().__init__()
        self.num_experts = num_experts or config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = width or config.moe_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens (T, H), chosen experts (T, K) and their weights (T, K) to (T, H)."""
        out_TH = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            y_UH = F.linear(self.hidden(expert, hidden_states[token]), self.down_proj[expert])
            y_UH = y_UH * top_k_weights[token, slot, None]
            out_TH.index_add_(0, token, y_UH.to(out_TH.dtype))
        return out_TH

    def hidden(self, expert: int, x_UH: torch.Tensor, linear: Any = F.linear) -> torch.Tensor:
        """Hidden activations of one expert, (U, M)."""
        raise NotImplementedError

    def hidden_of_all(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Hidden activations of every expert, (T, N, M)."""
        raise NotImplementedError


@use_experts_implementation
class CMoEExperts(ExpertsLoop):
    """The routed experts as two packed tensors, the layout of every experts backend.

    `gate_up_proj` is (N, 2M, H), gate rows first; `down_proj` is (N, H, M).
    """

    def __init__(
        self, config: CMoEConfig, num_experts: int | None = None, width: int | None = None
    ) -> None:
        super().__init__(config, num_experts, width)
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        )
        self.down_proj = nn.Parameter(
            torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim)
        )

    def hidden(self, expert: int, x_UH: torch.Tensor, linear: Any = F.linear) -> torch.Tensor:
        gate_UM, up_UM = linear(x_UH, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return self.act_fn(gate_UM) * up_UM

    def hidden_of_all(self, x_TH: torch.Tensor) -> torch.Tensor:
        product_TQ = thin_linear(x_TH, self.gate_up_proj.flatten(0, 1))
        gate_TNM, up_TNM = product_TQ.unflatten(1, (self.num_experts, 2, -1)).unbind(dim=2)
        return self.act_fn(gate_TNM) * up_TNM


@use_experts_implementation(has_gate=False, has_bias=True)
class CMoEPlainExperts(ExpertsLoop):
    """Routed experts without a gate: `up_proj` (N, M, H), `up_proj_bias` (N, M) and `down_proj`."""

    def __init__(self, config: CMoEConfig) -> None:
        super().__init__(config)
        self.up_proj = nn.Parameter(
            torch.empty(self.num_experts, self.intermediate_dim, self.hidden_dim)
        )
        self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim))
        self.down_proj = nn.Parameter(
            torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim)
        )
        # The backends add one for every expert that runs, weighted. The FFN's is the block's.
        nothing = torch.zeros(self.num_experts, self.hidden_dim)
        self.register_buffer("down_proj_bias", nothing, persistent=False)

    def hidden(self, expert: int, x_UH: torch.Tensor, linear: Any = F.linear) -> torch.Tensor:
        return self.act_fn(linear(x_UH, self.up_proj[expert]) + self.up_proj_bias[expert])

    def hidden_of_all(self, x_TH: torch.Tensor) -> torch.Tensor:
        product_TR = thin_linear(x_TH, self.up_proj.flatten(0, 1)) + self.up_proj_bias.flatten()
        return self.act_fn(product_TR).unflatten(1, (self.num_experts, -1))


def cmoe_experts_forward(
    self: ExpertsLoop,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The default backend, `"cmoe"`: the fastest of its own loop and the stock ones."""
    backend = fastest_backend(self, *top_k_index.shape)
    arguments = (self, hidden_states, top_k_index, top_k_weights)
    if backend == "direct":
        return direct_experts_forward(*arguments)
    if backend == "whole":
        return whole_experts_forward(*arguments)
    if backend == "sorted":
        return sorted_experts_forward(*arguments)
    if backend == "eager":
        return ExpertsLoop.forward(*arguments)
    return ALL_EXPERTS_FUNCTIONS[backend](*arguments)


def fastest_backend(experts: ExpertsLoop, tokens: int, top_k: int) -> str:
    """Name of the fastest way to run `top_k` experts for each of `tokens` tokens.

    The limits were measured on CPUs, see results/ of cmoe-hf. They depend on shapes, types and the
    processor only, so that a compiler can decide while it traces.
    """
    weight_NHM, pairs = experts.down_proj, tokens * top_k
    if not torch.compiler.is_compiling() and type(weight_NHM).__module__.startswith("torchao"):
        return "eager"  # the products of a quantised weight know one expert at a time
    grouped = grouped_backend(weight_NHM)
    if weight_NHM.is_cuda:
        return fastest_backend_on_a_gpu(weight_NHM, experts.num_experts, tokens, top_k)
    expert_size = experts.hidden_dim * experts.intermediate_dim
    # Older releases do not have the attribute, nor the parallel plan.
    if getattr(experts, "_is_expert_parallel", False) or not weight_NHM.is_cpu:
        return grouped
    if torch.compiler.is_compiling():  # to one loop that gathers and multiplies
        return "batched_mm" if pairs * expert_size <= 500_000 else grouped
    if is_whole_faster(experts, tokens, top_k):
        return "whole"
    if pairs * expert_size <= 50_000 and tokens > 1:
        return "batched_mm"  # copying so little is cheaper than sorting
    if weight_NHM.requires_grad and torch.is_grad_enabled():
        return grouped  # a view of one expert has a gradient of the size of all
    if tokens == 1:
        return "direct"
    if expert_size >= LARGE and weight_NHM.dtype == torch.float32:
        return "direct"
    if pairs >= 16 * experts.num_experts and can_be_sorted(experts):
        return "sorted"
    if pairs >= 64 * experts.num_experts and pairs * experts.hidden_dim >= 300_000:
        return "eager"  # the others copy every token top_k times, here beyond the caches
    return grouped


def can_be_sorted(experts: ExpertsLoop) -> bool:
    """Whether products may be written in place, which no gradient follows and nothing casts."""
    return (
        type(experts) is CMoEExperts
        and experts.down_proj.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def is_whole_faster(experts: ExpertsLoop, tokens: int, top_k: int) -> bool:
    """Whether running all experts takes less than choosing, on a CPU, as measured.

    Each chosen expert costs some calls, as long as reading so many weights of an idle one, more
    where tokens must be sorted. With few tokens the idle ones are only read. Narrow experts
    multiply slower than all of them as one wide matrix, the more so the narrower they are.
    """
    dtype = experts.down_proj.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    if torch.is_grad_enabled() and experts.down_proj.requires_grad:
        return False  # idle experts would have gradients, all of them zero
    count, width = experts.num_experts, experts.intermediate_dim
    hit = count * (1 - (1 - top_k / count) ** tokens)
    idle = (count - hit) * experts.hidden_dim * width
    if tokens == 1:  # three experts one by one take as long as the calls for all of them
        return idle < 75_000 * (top_k - 3)
    if dtype == torch.bfloat16:  # 25 tokens multiply as long as their weights are read
        unchosen = (count - top_k) * experts.hidden_dim * width
        return MULTIPLIES_BFLOAT16 and idle + tokens / 25 * unchosen <= 150_000 * hit
    if count * width <= 100 * top_k:
        return True
    few = tokens * count <= (200 if width <= 64 else 64) * top_k
    return few and idle <= 100_000 * hit


def fastest_backend_on_a_gpu(
    weight_NHM: torch.Tensor, experts: int, tokens: int, top_k: int
) -> str:
    """The same on a GPU, from what one H200 has shown in bfloat16.

    `grouped_mm` sorts, 0.4 ms whatever the size; that long, idle experts can multiply as well, and
    nothing launches less. `batched_mm` copies the weights of every pair of token and expert: good
    for a token or two, where reading the idle ones would take longer, or launches cost nothing.
    """
    expert_size = weight_NHM.shape[1] * weight_NHM.shape[2]
    idle = (experts - top_k) * expert_size
    if tokens * top_k <= experts and (torch.compiler.is_compiling() or idle > 50_000_000):
        return "batched_mm"
    # Activations of all experts would be kept for the gradients.
    most = 128 if torch.is_grad_enabled() else 2**26 / (experts * weight_NHM.shape[2])
    if tokens <= most and tokens * idle <= 30_000_000_000:
        return "whole"
    return grouped_backend(weight_NHM)


def grouped_backend(weight_NHM: torch.Tensor) -> str:
    """What multiplies token groups: a grouped kernel wants rows at multiples of 16 bytes."""
    if all(size * weight_NHM.element_size() % 16 == 0 for size in weight_NHM.shape[1:]):
        return "grouped_mm"
    # A compiler cannot follow a loop that depends on data.
    return "batched_mm" if torch.compiler.is_compiling() else "eager"


def direct_experts_forward(
    self: ExpertsLoop,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Loop over the experts that were chosen, on views of the packed weights, on a CPU."""
    tokens, top_k = top_k_index.shape
    if tokens == 1:
        y_KH = [run_expert(self, expert, hidden_states) for expert in top_k_index[0].tolist()]
        return top_k_weights @ (y_KH[0] if top_k == 1 else torch.cat(y_KH))
    expert_P = top_k_index.flatten()
    order_P = expert_P.argsort(stable=True)
    rows = torch.bincount(expert_P, minlength=self.num_experts).tolist()
    token_P, weight_P1 = order_P // top_k, top_k_weights.flatten()[order_P, None]
    out_TH = torch.zeros_like(hidden_states)
    parts = zip(token_P.split(rows), weight_P1.split(rows), strict=True)
    for expert, (token_U, weight_U1) in enumerate(parts):
        if len(token_U):
            y_UH = run_expert(self, expert, hidden_states[token_U]) * weight_U1
            out_TH.index_add_(0, token_U, y_UH.to(out_TH.dtype).contiguous())
    return out_TH


def sorted_experts_forward(
    self: Any,  # CMoEExperts
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Sort the tokens by their experts, once, and write each expert's products where they belong.

    Shape suffixes besides: P pairs of token and expert, Q rows of a weight.
    """
    expert_P = top_k_index.flatten()
    order_P = expert_P.argsort(stable=True)
    rows = torch.bincount(expert_P, minlength=self.num_experts).tolist()
    token_P = order_P // top_k_index.shape[1]

    def product(x_PH: torch.Tensor, weight_NQH: torch.Tensor) -> torch.Tensor:
        out_PQ = x_PH.new_empty(len(x_PH), weight_NQH.shape[1])
        parts = zip(x_PH.split(rows), weight_NQH.mT, out_PQ.split(rows), strict=True)
        for x_UH, weight_HQ, out_UQ in parts:
            torch.mm(x_UH, weight_HQ, out=out_UQ)
        return out_PQ

    gate_PM, up_PM = product(hidden_states[token_P], self.gate_up_proj).chunk(2, dim=-1)
    z_PM = self.act_fn(gate_PM) * up_PM * top_k_weights.flatten()[order_P, None]
    return torch.zeros_like(hidden_states).index_add_(0, token_P, product(z_PM, self.down_proj))


def whole_experts_forward(
    self: ExpertsLoop,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run every expert for every token, with weight 0 where it was not chosen."""
    tokens = len(hidden_states)
    # One column more, which is dropped: of experts that are not on this rank.
    nothing = top_k_weights.new_zeros(tokens, self.num_experts + 1)
    weight_TN = nothing.scatter(1, top_k_index, top_k_weights)[:, :-1]
    z_TNM = self.hidden_of_all(hidden_states) * weight_TN.unsqueeze(2)
    if tokens <= 32 or self.down_proj.is_cuda:
        return torch.bmm(z_TNM.transpose(0, 1), self.down_proj.mT).sum(dim=0)
    return F.linear(z_TNM.flatten(1), self.down_proj.transpose(0, 1).flatten(1))  # copies weights


def run_expert(
    experts: ExpertsLoop, expert: int, x_UH: torch.Tensor, linear: Any = thin_linear
) -> torch.Tensor:
    """One expert on the tokens that chose it, (U, H)."""
    return linear(experts.hidden(expert, x_UH, linear), experts.down_proj[expert])


ALL_EXPERTS_FUNCTIONS.register("cmoe", cmoe_experts_forward)


class CMoESharedExpert(nn.Module):
    """The always-on expert: a gated FFN over the busiest neurons."""

    def __init__(self, config: CMoEConfig) -> None:
        super().__init__()
        width = config.shared_expert_intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden activations."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class CMoEPlainSharedExpert(nn.Module):
    """The always-on expert of an FFN without a gate."""

    def __init__(self, config: CMoEConfig) -> None:
        super().__init__()
        width = config.shared_expert_intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, width)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden activations."""
        return self.act_fn(self.up_proj(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.hidden(x))


def run_shared_expert(shared: Any, x_TH: torch.Tensor) -> torch.Tensor:
    """The shared expert, (T, H); by `thin_linear` if that is faster and nobody would notice.

    Not part of the module: what replaces or watches its parts (adapters, quantisation, parallel
    plans, offloading, vLLM, hooks) must find plain linear layers that are called as such.
    """
    if not is_plain(shared) or not is_thin(x_TH, shared.gate_proj.weight):
        return shared(x_TH)
    return run_plain_shared_expert(shared, x_TH, thin_linear)


def run_plain_shared_expert(shared: Any, x_TH: torch.Tensor, linear: Any) -> torch.Tensor:
    """One that `is_plain`, by another product than `torch.nn.functional.linear`."""
    hidden = shared.act_fn(linear(x_TH, shared.gate_proj.weight))
    return linear(hidden * linear(x_TH, shared.up_proj.weight), shared.down_proj.weight)


def is_plain(shared: Any) -> bool:
    """Whether a shared expert is a gated one as it was made, and nobody watches its parts."""
    if type(shared) is not CMoESharedExpert or not hasattr(shared, "gate_proj"):
        return False  # vLLM has merged it with up_proj
    parts = (shared.gate_proj, shared.up_proj, shared.down_proj)
    return not is_watched(shared, *parts) and all(
        type(part) is nn.Linear and type(part.weight) in PLAIN for part in parts
    )


def is_watched(*modules: nn.Module) -> bool:
    """Whether somebody would notice that one of them is not called: a hook, another forward."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in modules
    )


HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Findings:
    """What a block looked at when it found that it `may_be_short`, to see that nothing changed.

    To know it, its modules are asked some thirty things, each of them cold in the caches after a
    layer's weights went by: a tenth of a small block's time. Whether the dictionaries behind the
    answers still hold the same costs a third of that. Weights are not kept: those that somebody
    replaces must be free to go.
    """

    def __init__(self, block: "CMoESparseMoeBlock") -> None:
        modules = list(block.modules())
        self.hooks = [vars(module)[name] for module in modules for name in HOOKS]
        looks = [(module._modules, name) for module in modules for name in module._modules]
        looks += [(vars(module), "forward") for module in modules[1:]]
        looks.append((vars(block.experts.config), "_experts_implementation_internal"))
        self.same = [(owner, name, owner.get(name)) for owner, name in looks]
        owners = [module._parameters for module in modules]
        self.kinds = [(owner, name, type(owner[name])) for owner in owners for name in owner]

    def hold(self) -> bool:
        """Nothing was hooked, replaced or switched since."""
        return (
            not any(self.hooks)
            and all(owner.get(name) is value for owner, name, value in self.same)
            and all(type(owner.get(name)) is kind for owner, name, kind in self.kinds)
        )


class CMoESparseMoeBlock(nn.Module):
    """Shared expert plus the K routed experts that the router picks for each token."""

    experts_class: type[ExpertsLoop] = CMoEExperts
    shared_class: type[nn.Module] = CMoESharedExpert
    findings: "Findings | None" = None

    def __init__(self, config: CMoEConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.gate = CMoERouter(config)
        self.experts = self.experts_class(config)
        # Absent rather than empty: vLLM concludes from the name that there is a shared expert.
        has_shared = config.shared_expert_intermediate_size > 0
        self.shared_expert: Any = self.shared_class(config) if has_shared else None
        self.down_bias: nn.Parameter | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, H) to (B, S, H)."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.is_short(x_TH):
            return self.run_one_token(x_TH).reshape(hidden_states.shape)
        # vLLM's kernel overwrites its input: everything else that needs it comes first.
        always_TH: Any = self.down_bias
        if self.shared_expert is not None:
            shared_TH = run_shared_expert(self.shared_expert, x_TH)
            always_TH = shared_TH if always_TH is None else always_TH + shared_TH
        if self.gate.top_k == 0:
            return always_TH.reshape(hidden_states.shape)
        _, weight_TK, index_TK = self.gate(x_TH)
        out_TH = self.experts(x_TH, index_TK, weight_TK)
        return (out_TH if always_TH is None else out_TH + always_TH).reshape(hidden_states.shape)

    def is_short(self, x_TH: torch.Tensor) -> bool:
        """Whether this is one token on a CPU, whose chosen experts run one after the other, and all
        parts are as they were made and called by us alone.
        """
        if (
            len(x_TH) != 1
            or not x_TH.is_cpu
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
        ):
            return False
        if self.findings is None or not self.findings.hold():
            self.findings = Findings(self) if self.may_be_short() else None
        return self.findings is not None

    def may_be_short(self) -> bool:
        """What of that is asked once, and again when the `Findings` no longer hold."""
        gate, experts = self.gate, self.experts
        return (
            type(experts) is CMoEExperts
            and type(experts.down_proj) in PLAIN
            and experts.config._experts_implementation == "cmoe"
            and type(gate) is CMoERouter
            and is_plain(self.shared_expert)
            and not is_watched(gate, experts)
            and fastest_backend(experts, 1, gate.top_k) == "direct"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other dictionaries to look at.
        return {name: value for name, value in vars(self).items() if name != "findings"}

    def run_one_token(self, x_1H: torch.Tensor) -> torch.Tensor:
        """The same as `forward` in few calls, each of which takes longer than a small product."""
        out_1H = run_plain_shared_expert(self.shared_expert, x_1H, row_linear)
        for expert, weight in self.gate.route_one_token(x_1H):
            out_1H.add_(run_expert(self.experts, expert, x_1H, row_linear), alpha=weight)
        return out_1H


class CMoEPlainBlock(CMoESparseMoeBlock):
    """The same for an FFN without a gate, whose output bias is added once for every token."""

    experts_class, shared_class = CMoEPlainExperts, CMoEPlainSharedExpert

    def __init__(self, config: CMoEConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.down_bias = nn.Parameter(torch.empty(config.hidden_size))


class CMoEHierarchicalBlock(nn.Module):
    """A carved MoE: of each parent a shared part and the experts that its router picks."""

    def __init__(self, config: CMoEHierarchicalConfig, layer_idx: int) -> None:
        super().__init__()
        shared = config.shared_expert_intermediate_size
        self.gate = CMoEHierarchicalRouter(config)
        if config.kept_parents:
            self.gate.kept_parents = config.kept_parents[layer_idx]
        self.experts = CMoEExperts(config)
        self.shared_experts = CMoEExperts(config, config.num_parents, shared) if shared else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, H) to (B, S, H)."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: HierarchicalRouting = self.gate(x_TH)
        out_TH = x_TH.new_zeros(())
        if self.shared_experts is not None:
            out_TH = self.shared_experts(x_TH, routing.parent_TP, routing.parent_weight_TP)
        if self.gate.top_k:
            out_TH = out_TH + self.experts(x_TH, routing.index_TK, routing.weight_TK)
        if self.gate.kept_parents:
            out_TH = out_TH + self.run_kept(x_TH, routing.idle_weight_TI, routing.idle_index_TI)
        return out_TH.reshape(hidden_states.shape)

    def run_kept(
        self, x_TH: torch.Tensor, weight_TK: torch.Tensor, index_TK: torch.Tensor
    ) -> torch.Tensor:
        """What the idle experts of the kept parents add, (T, H)."""
        runs_TK = self.gate.is_kept(index_TK)
        if torch.compiler.is_compiling():  # to shapes that no data decides
            return self.experts(x_TH, index_TK, weight_TK * runs_TK)
        token, slot = torch.where(runs_TK)
        out_TH = torch.zeros_like(x_TH)
        if len(token):
            pair = (token, slot, None)
            out_TH.index_add_(0, token, self.experts(x_TH[token], index_TK[pair], weight_TK[pair]))
        return out_TH


class CMoEDecoderLayer(nn.Module):
    """A decoder layer with the sparse block in place of the FFN.

    To be mixed into a family's decoder layer, of which the rest stays as it is.
    """

    attention_class: type[nn.Module]
    norm_class: type[nn.Module]
    norm_eps = "rms_norm_eps"
    block_class: type[nn.Module] = CMoESparseMoeBlock

    def __init__(self, config: CMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp: Any
        if layer_idx not in (config.dense_layers or ()):
            self.mlp = self.block_class(config, layer_idx)


LAYER_KEYWORDS = ("attention_mask", "position_ids", "use_cache", "position_embeddings")
OUTPUT_CACHE = cache_name(MoeModelOutputWithPast)
MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


def attention_types(config: PreTrainedConfig) -> list[str]:
    """How far each layer looks back, one of `MASKS`."""
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        types = ["full_attention" if window is None else "sliding_attention"]
        types *= config.num_hidden_layers
    return types


LINEAR_ONLY = ("bitsandbytes", "eetq", "hqq", "quanto", "torchao")
"""Quantisation methods that know linear layers only; torchao can be told other names."""


def quantisation_method(config: CMoEConfig) -> str | None:
    """Name of the method that the configuration asks for, if any."""
    quantisation = getattr(config, "quantization_config", None)
    if isinstance(quantisation, dict):
        return quantisation.get("quant_method")
    method = getattr(quantisation, "quant_method", None)
    return getattr(method, "value", method)


def warn_of_unquantised_experts(decoder: "CMoEModel") -> None:
    """Say so if the model is about to be quantised by a method that passes over the experts."""
    quantisation = getattr(decoder.config, "quantization_config", None)
    told_names = hasattr(getattr(quantisation, "quant_type", None), "fqn_to_config")
    method = quantisation_method(decoder.config)
    if method not in LINEAR_ONLY or told_names or isinstance(quantisation, dict):
        return
    experts = sum(p.numel() for name, p in decoder.named_parameters() if ".mlp.experts." in name)
    share = experts / decoder.num_parameters()
    logger.warning(
        f"{method} quantises linear layers only: the routed experts, {share:.0%} of the decoder, "
        "stay as they are. To quantise both: TorchAoConfig(FqnToConfig("
        r"{r're:.*(_proj\.weight|experts\..*_proj)': Int8WeightOnlyConfig()}))"
    )


class CMoEPreTrainedModel(PreTrainedModel):
    """What the library needs to know to load, save, split, compile and train these models."""

    config: CMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["balance_bias"]

    def __init_subclass__(cls, **options: Any) -> None:
        """What follows from the family's layer."""
        decoder = getattr(cls, "model_class", cls)
        if layer := getattr(decoder, "layer_class", None):
            cls._no_split_modules = [layer.__name__]
            cls._can_record_outputs = {
                "router_logits": OutputRecorder(CMoERouter, index=0),
                "hidden_states": layer,
                "attentions": layer.attention_class,
            }
        super().__init_subclass__(**options)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # The other methods, such as fp8, replace the experts by their own, with other backends.
        if requested_experts is None and quantisation_method(self.config) in (None, *LINEAR_ONLY):
            requested_experts = "cmoe"
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if not isinstance(module, CMoERouter | CMoESparseMoeBlock | ExpertsLoop):
            return
        for name, value in {**module._parameters, **module._buffers}.items():
            if value is None:
                continue
            if name.endswith(("bias", "scale")):
                init.zeros_(value)
            else:
                init.normal_(value, mean=0.0, std=std)


class CMoEModel(CMoEPreTrainedModel):
    """The decoder without a head."""

    layer_class: type[CMoEDecoderLayer]
    rotary_class: type[nn.Module]

    def __init__(self, config: CMoEConfig) -> None:
        super().__init__(config)
        self.mask_cache = {
            kind: cache_name(mask, "attention_mask", "position_ids") for kind, mask in MASKS.items()
        }
        self.layer_cache = cache_name(self.layer_class.forward, *LAYER_KEYWORDS)
        warn_of_untested_library()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [self.layer_class(config, index) for index in range(config.num_hidden_layers)]
        )
        eps = getattr(config, self.layer_class.norm_eps)
        self.norm = self.layer_class.norm_class(config.hidden_size, eps=eps)
        self.rotary_emb = self.rotary_class(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        warn_of_unquantised_experts(self)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As in any transformers decoder; `output_router_logits=True` also returns the scores.

        `cache` and `past_key_values` are two names of the same: before transformers 5.24 it was
        called by the second.
        """
        cache = given_cache(cache, past_key_values, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (positions + seen).unsqueeze(0)

        types = attention_types(self.config)
        masks: Any = attention_mask  # `generate` may have made them
        if not isinstance(masks, dict):
            masks = {
                name: MASKS[name](
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **{self.mask_cache[name]: cache},
                )
                for name in dict.fromkeys(types)
            }
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer, name in zip(self.layers, types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[name],
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{self.layer_cache: cache},
                **kwargs,
            )
        past: dict[str, Any] = {OUTPUT_CACHE: cache}
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **past)


class CMoEForCausalLM(CMoEPreTrainedModel):
    """The decoder with a language-model head.

    Families add `GenerationMixin`, which must be a direct base.
    """

    model_class: type[CMoEModel]

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CMoEConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (B, S, V), the loss if `labels` are given, and the router scores on request."""
        cache = given_cache(cache, past_key_values, kwargs)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{OUTPUT_CACHE: getattr(outputs, OUTPUT_CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class CMoELlamaDecoderLayer(CMoEDecoderLayer, llama.LlamaDecoderLayer):
    """A carved decoder layer."""

    attention_class, norm_class = llama.LlamaAttention, llama.LlamaRMSNorm


class CMoELlamaModel(CMoEModel):
    """A carved Llama without a head."""

    config: CMoELlamaConfig
    layer_class, rotary_class = CMoELlamaDecoderLayer, llama.LlamaRotaryEmbedding


class CMoELlamaForCausalLM(CMoEForCausalLM, GenerationMixin):
    """A carved Llama."""

    config: CMoELlamaConfig
    model_class = CMoELlamaModel


class CMoEMistralDecoderLayer(CMoEDecoderLayer, mistral.MistralDecoderLayer):
    """A carved decoder layer."""

    attention_class, norm_class = mistral.MistralAttention, mistral.MistralRMSNorm


class CMoEMistralModel(CMoEModel):
    """A carved Mistral without a head."""

    config: CMoEMistralConfig
    layer_class, rotary_class = CMoEMistralDecoderLayer, mistral.MistralRotaryEmbedding


class CMoEMistralForCausalLM(CMoEForCausalLM, GenerationMixin):
    """A carved Mistral."""

    config: CMoEMistralConfig
    model_class = CMoEMistralModel


class CMoEQwen2DecoderLayer(CMoEDecoderLayer, qwen2.Qwen2DecoderLayer):
    """A carved decoder layer."""

    attention_class, norm_class = qwen2.Qwen2Attention, qwen2.Qwen2RMSNorm


class CMoEQwen2Model(CMoEModel):
    """A carved Qwen2 without a head."""

    config: CMoEQwen2Config
    layer_class, rotary_class = CMoEQwen2DecoderLayer, qwen2.Qwen2RotaryEmbedding


class CMoEQwen2ForCausalLM(CMoEForCausalLM, GenerationMixin):
    """A carved Qwen2."""

    config: CMoEQwen2Config
    model_class = CMoEQwen2Model


class CMoEQwen3DecoderLayer(CMoEDecoderLayer, qwen3.Qwen3DecoderLayer):
    """A carved decoder layer."""

    attention_class, norm_class = qwen3.Qwen3Attention, qwen3.Qwen3RMSNorm


class CMoEQwen3Model(CMoEModel):
    """A carved Qwen3 without a head."""

    config: CMoEQwen3Config
    layer_class, rotary_class = CMoEQwen3DecoderLayer, qwen3.Qwen3RotaryEmbedding


class CMoEQwen3ForCausalLM(CMoEForCausalLM, GenerationMixin):
    """A carved Qwen3."""

    config: CMoEQwen3Config
    model_class = CMoEQwen3Model


class CMoEGPTNeoXDecoderLayer(CMoEDecoderLayer, gpt_neox.GPTNeoXLayer):
    """A carved decoder layer, where attention and FFN may both start from the same residual."""

    attention_class, norm_class = gpt_neox.GPTNeoXAttention, nn.LayerNorm
    block_class = CMoEPlainBlock
    norm_eps = "layer_norm_eps"


class CMoEGPTNeoXModel(CMoEModel):
    """A carved GPT-NeoX without a head."""

    config: CMoEGPTNeoXConfig
    layer_class, rotary_class = CMoEGPTNeoXDecoderLayer, gpt_neox.GPTNeoXRotaryEmbedding


class CMoEGPTNeoXForCausalLM(CMoEForCausalLM, GenerationMixin):
    """A carved GPT-NeoX."""

    config: CMoEGPTNeoXConfig
    model_class = CMoEGPTNeoXModel


class CMoEQwen3MoeDecoderLayer(CMoEDecoderLayer, qwen3_moe.Qwen3MoeDecoderLayer):
    """A carved decoder layer."""

    attention_class, norm_class = qwen3_moe.Qwen3MoeAttention, qwen3_moe.Qwen3MoeRMSNorm
    block_class = CMoEHierarchicalBlock


class CMoEQwen3MoeModel(CMoEModel):
    """A carved Qwen3-MoE without a head."""

    config: CMoEQwen3MoeConfig
    layer_class, rotary_class = CMoEQwen3MoeDecoderLayer, qwen3_moe.Qwen3MoeRotaryEmbedding


class CMoEQwen3MoeForCausalLM(CMoEForCausalLM, GenerationMixin):
    """A carved Qwen3-MoE."""

    config: CMoEQwen3MoeConfig
    model_class = CMoEQwen3MoeModel


class CMoEOlmoeDecoderLayer(CMoEDecoderLayer, olmoe.OlmoeDecoderLayer):
    """A carved decoder layer."""

    attention_class, norm_class = olmoe.OlmoeAttention, olmoe.OlmoeRMSNorm
    block_class = CMoEHierarchicalBlock


class CMoEOlmoeModel(CMoEModel):
    """A carved OLMoE without a head."""

    config: CMoEOlmoeConfig
    layer_class, rotary_class = CMoEOlmoeDecoderLayer, olmoe.OlmoeRotaryEmbedding


class CMoEOlmoeForCausalLM(CMoEForCausalLM, GenerationMixin):
    """A carved OLMoE."""

    config: CMoEOlmoeConfig
    model_class = CMoEOlmoeModel


__all__ = [
    "CMoEGPTNeoXForCausalLM",
    "CMoEGPTNeoXModel",
    "CMoELlamaForCausalLM",
    "CMoELlamaModel",
    "CMoEMistralForCausalLM",
    "CMoEMistralModel",
    "CMoEOlmoeForCausalLM",
    "CMoEOlmoeModel",
    "CMoEQwen2ForCausalLM",
    "CMoEQwen2Model",
    "CMoEQwen3ForCausalLM",
    "CMoEQwen3Model",
    "CMoEQwen3MoeForCausalLM",
    "CMoEQwen3MoeModel",
]
