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
from torch import Tensor, nn
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
"""Names that releases of transformers give the keys and values of earlier tokens, newest first."""
ACCEPTED_KWARGS = {
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


def cache_keyword(target: Any, *required: str) -> str:
    """Return the name under which a function or output class of the library takes the cache.

    Its signature decides, not a version. A keyword that is not there would vanish in `**kwargs`,
    and the model would go on with an empty cache or without a mask.

    Raises:
        ImportError: It knows no such name, or not all of the `required` keywords.
    """
    is_class = isinstance(target, type)
    known = target.__annotations__ if is_class else inspect.signature(target).parameters
    found = [name for name in CACHE_NAMES if name in known]
    missing = [name for name in required if name not in known]
    if missing or not found:
        lost = ", ".join(missing or ["the cache"])
        raise ImportError(
            f"transformers {transformers.__version__} has another name for {lost} in "
            f"{target.__qualname__}, so this model would compute something else. Its code knows "
            f"transformers {TESTED[0]} to {TESTED[1]}: install one of these, or renew the code "
            "with a newer cmoe-hf: cmoe upgrade."
        )
    return found[0]


def resolve_cache(cache: Any, past_key_values: Any, kwargs: dict[str, Any]) -> Any:
    """Return the cache that a forward method was given under either name.

    Raises:
        TypeError: There are two caches, or a keyword that nothing would read.
    """
    unread = sorted(
        name for name in kwargs if name not in ACCEPTED_KWARGS and kwargs[name] is not None
    )
    if unread:
        raise TypeError(f"forward() got {', '.join(unread)}, which nothing in this model reads.")
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("forward() got two caches: `cache` and `past_key_values` are the same.")
    return past_key_values if cache is None else cache


def warn_of_untested_library() -> None:
    """Warn, once, if the installed transformers is newer than all that were tested."""
    installed = [int(part) for part in transformers.__version__.split(".")[:2]]
    if installed > [int(part) for part in TESTED[1].split(".")]:
        logger.warning_once(
            f"This model's code has been tested with transformers {TESTED[0]} to {TESTED[1]}, not "
            f"with {transformers.__version__}. To see that it still computes the same: cmoe verify."
        )


def is_traced() -> bool:
    """Return whether a compiler or `torch.jit.trace` records the run: then no data may decide."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


class Routing(NamedTuple):
    """The decision of a router."""

    score_TN: Tensor
    """Score of every routed expert, float32."""
    weight_TK: Tensor
    """Gate weights of the experts that run."""
    index_TK: Tensor
    """Numbers of the experts that run, int64."""


class HierarchicalRouting(NamedTuple):
    """The decision of a carved MoE's router, over the experts of a token's parents."""

    score_TN: Tensor
    weight_TK: Tensor
    index_TK: Tensor
    idle_weight_TI: Tensor
    """Gate weights of the experts that do not run."""
    idle_index_TI: Tensor
    """Numbers of the experts that do not run, int64."""
    parent_weight_TP: Tensor
    parent_TP: Tensor


class CMoERouter(nn.Module):
    """Scores the routed experts, selects K of them and weighs them (paper, eq. 8 and 9).

    `"representative"`: s is the activation of one neuron per expert, act(x Wg) * (x Wu), or
    act(x W + b) where the FFN has no gate.
    `"linear"`: s = x W. The K experts of largest softmax(s) + b run, each with weight
    1 + softmax(s) * u; b balances the load and u is learned, both are zero after carving.

    The parameters are raw and none is called `weight`: vLLM would take a router whose state is
    a lone `weight` for a plain softmax router and silently replace it.
    """

    balance_bias: Tensor

    def __init__(self, config: CMoEConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        listed = config.always_on_experts
        self.always_on = None if listed is None else listed[layer_idx]
        """Experts whose balance bias makes them run for every token; None if nothing says so."""
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

    def score(self, x_TH: Tensor) -> Tensor:
        """Score s of every expert, in float32: rounding to 16 bits would reorder close experts."""
        with maybe_autocast(device_type=x_TH.device.type, enabled=False):
            x_TH = x_TH.float()
            if self.router_type == "linear":
                score_TN = F.linear(x_TH, self.linear_weight.float())
            elif self.has_gate:
                gate_TN = F.linear(x_TH, self.gate_weight.float())
                score_TN = self.act_fn(gate_TN) * F.linear(x_TH, self.up_weight.float())
            else:
                score_TN = self.act_fn(F.linear(x_TH, self.up_weight.float(), self.up_bias.float()))
            return score_TN.abs() if self.absolute_score else score_TN

    @property
    def choice(self) -> tuple[int, int]:
        """Number of experts that compete, and of those that run."""
        return len(self.scale), self.top_k

    def selection_score(self, probability: Tensor, index: Tensor | None, x_TH: Tensor) -> Tensor:
        """Value p + b that decides between the experts `index`, or between all."""
        return probability + (self.balance_bias if index is None else self.balance_bias[index])

    def pick(self, value_TN: Tensor, x_TH: Tensor) -> Tensor:
        """Experts of the highest value, (T, K), of those that the tokens x may have."""
        return torch.topk(value_TN, self.top_k, dim=-1).indices

    def weigh(self, probability_TN: Tensor, index_TK: Tensor) -> Tensor:
        """Gate weights 1 + p * u of the chosen experts, (T, K) float32."""
        return (1 + probability_TN * self.scale).gather(1, index_TK)

    def forward(self, x_TH: Tensor) -> Routing | HierarchicalRouting:
        """Route every token."""
        score_TN = self.score(x_TH)
        probability_TN = torch.softmax(score_TN, dim=-1, dtype=torch.float32)
        index_TK = self.pick(self.selection_score(probability_TN, None, x_TH), x_TH)
        weight_TK = self.weigh(probability_TN, index_TK)
        return Routing(score_TN, weight_TK.to(x_TH.dtype), index_TK)


class CMoEHierarchicalRouter(CMoERouter):
    """The source's router over its experts, the parents, and one over the experts carved from them.

    The experts of a token's parents compete: within each parent with scores of their own, or all
    together (`flat_routing`) with scores s that predict the logarithm of what an expert writes
    squared, and s + 2 log w under the parent's weight w.

    Shape suffixes besides: P parents of a token, C experts that compete with each other, G groups
    of such. All state is of one module without a lone `weight`, for the reason above.
    """

    def __init__(self, config: CMoEHierarchicalConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.parents_per_token = config.num_parents_per_tok
        self.norm_parent_prob = config.norm_parent_prob
        self.flat = config.flat_routing
        self.per_parent = config.num_experts // config.num_parents
        self.groups = 1 if self.flat else self.parents_per_token
        self.kept_parents = config.kept_parents[layer_idx] if config.kept_parents else []
        """Parents of which everything runs: their experts leave the places to others."""
        self.parent_weight = nn.Parameter(torch.empty(config.num_parents, config.hidden_size))
        if self.flat:
            self.linear_bias = nn.Parameter(torch.empty(config.num_experts))

    @property
    def choice(self) -> tuple[int, int]:
        """Number of experts that compete, and of those that run."""
        return self.parents_per_token * self.per_parent // self.groups, self.top_k // self.groups

    def parents(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the parents, (T, P) each, computed as in the source."""
        logits = F.linear(x_TH, self.parent_weight)
        probability = torch.softmax(logits, dtype=torch.float32, dim=-1)
        weight_TP, parent_TP = probability.topk(self.parents_per_token, dim=-1)
        if self.norm_parent_prob:
            weight_TP = weight_TP / weight_TP.sum(dim=-1, keepdim=True)
        return weight_TP.to(logits.dtype), parent_TP

    def candidates(self, parent_TP: Tensor) -> Tensor:
        """The experts that compete, (T, G, C)."""
        child_N = torch.arange(self.per_parent, device=parent_TP.device)
        index_TPN = parent_TP[:, :, None] * self.per_parent + child_N
        return index_TPN.flatten(1).unflatten(1, (self.groups, -1))

    def is_kept(self, index: Tensor) -> Tensor:
        """Whether experts are of a parent that is kept whole."""
        kept = torch.tensor(self.kept_parents, dtype=torch.int64, device=index.device)
        return torch.isin(index // self.per_parent, kept)

    def pick(self, value_TN: Tensor, x_TH: Tensor) -> Tensor:
        index_TGC = self.candidates(self.parents(x_TH)[1])
        value_TGC = value_TN.gather(1, index_TGC.flatten(1)).view_as(index_TGC)
        if self.kept_parents and self.flat:
            value_TGC = value_TGC.masked_fill(self.is_kept(index_TGC), -torch.inf)
        best_TGK = value_TGC.topk(self.choice[1], dim=-1).indices
        return index_TGC.gather(2, best_TGK).flatten(1)

    def forward(self, x_TH: Tensor) -> HierarchicalRouting:
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
"""Elements of a float32 weight that a few rows read faster by `small_batch_linear`."""
GEMV_LARGE = 2**16
"""Elements of a float32 weight that one row reads faster by `gemv`."""


def small_batch_linear(x_TH: Tensor, weight_QH: Tensor) -> Tensor:
    """Return `torch.nn.functional.linear(x, W)`, faster for a few float32 rows on a CPU.

    The library reads a large weight there much slower than memory allows, and with two to eight
    rows once for each of them.
    """
    rows = len(x_TH)
    with_gradients = x_TH.requires_grad or weight_QH.requires_grad
    if (
        rows > 512
        or weight_QH.numel() < (GEMV_LARGE if rows == 1 else LARGE)
        or not x_TH.dtype == weight_QH.dtype == torch.float32
        or not weight_QH.is_cpu
        or (with_gradients and torch.is_grad_enabled())
        or is_traced()
    ):
        return F.linear(x_TH, weight_QH)
    if rows == 1:
        return gemv(x_TH, weight_QH)
    # MKL is faster at W xᵀ than at x Wᵀ, if the product has a multiple of eight columns.
    padded_TH = F.pad(x_TH, (0, 0, 0, -rows % 8)) if rows > 4 else x_TH
    return (weight_QH @ padded_TH.T).T[:rows]


def gemv(x_1H: Tensor, weight_QH: Tensor) -> Tensor:
    """Return `torch.nn.functional.linear(x, W)` of one row, computed on all cores.

    The library multiplies one float32 row on one core, and the matrices of a batch on all.
    """
    rows = len(weight_QH)
    pieces = min(rows & -rows, 16)  # the largest power of two that divides it
    if not weight_QH.is_contiguous():
        return F.linear(x_1H, weight_QH)
    weight_PRH = weight_QH.view(pieces, rows // pieces, -1)
    return torch.bmm(weight_PRH, x_1H.T.expand(pieces, -1, 1)).view(1, rows)


class ExpertsLoop(nn.Module):
    """The readable reference, backend `"eager"`: loop over the experts that were chosen.

    Index `num_experts` means "not on this rank" under expert parallelism: the loop never reaches
    it.
    """

    down_proj: nn.Parameter

    def __init__(
        self, config: CMoEConfig, num_experts: int | None = None, width: int | None = None
    ) -> None:
        """Make the routed experts of `config`, or others of the same kind."""
        super().__init__()
        self.num_experts = num_experts or config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = width or config.moe_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        linear: Any = F.linear,
    ) -> Tensor:
        """Tokens (T, H), chosen experts (T, K) and their weights (T, K) to (T, H)."""
        out_TH = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if not is_traced() and token.numel() == 0:
                continue
            y_UH = self.run_expert(expert, hidden_states[token], linear)
            y_UH = y_UH * top_k_weights[token, slot, None]
            out_TH.index_add_(0, token, y_UH.to(out_TH.dtype).contiguous())
        return out_TH

    def run_expert(self, expert: int, x_UH: Tensor, linear: Any = F.linear) -> Tensor:
        """Output of one expert, (U, H)."""
        return linear(self.hidden(expert, x_UH, linear), self.down_proj[expert])

    def hidden(self, expert: int, x_UH: Tensor, linear: Any = F.linear) -> Tensor:
        """Hidden activations of one expert, (U, M)."""
        raise NotImplementedError

    def hidden_of_all(self, x_TH: Tensor) -> Tensor:
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

    def hidden(self, expert: int, x_UH: Tensor, linear: Any = F.linear) -> Tensor:
        gate_UM, up_UM = linear(x_UH, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return self.act_fn(gate_UM) * up_UM

    def hidden_of_all(self, x_TH: Tensor) -> Tensor:
        product_TQ = small_batch_linear(x_TH, self.gate_up_proj.flatten(0, 1))
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

    def hidden(self, expert: int, x_UH: Tensor, linear: Any = F.linear) -> Tensor:
        return self.act_fn(linear(x_UH, self.up_proj[expert]) + self.up_proj_bias[expert])

    def hidden_of_all(self, x_TH: Tensor) -> Tensor:
        product_TR = (
            small_batch_linear(x_TH, self.up_proj.flatten(0, 1)) + self.up_proj_bias.flatten()
        )
        return self.act_fn(product_TR).unflatten(1, (self.num_experts, -1))


def cmoe_experts_forward(
    self: ExpertsLoop,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run the default backend, `"cmoe"`: the fastest of its own ways and the library's."""
    backend = fastest_backend(self, *top_k_index.shape)
    run = OWN_BACKENDS.get(backend) or ALL_EXPERTS_FUNCTIONS[backend]
    return run(self, hidden_states, top_k_index, top_k_weights)


def fastest_backend(experts: ExpertsLoop, tokens: int, top_k: int) -> str:
    """Name the fastest way to run `top_k` experts for each of `tokens` tokens.

    The limits were measured on CPUs, see results/ of cmoe-hf. They depend on shapes and types
    only, so that a compiler can decide while it traces.
    """
    weight_NHM, pairs, traced = experts.down_proj, tokens * top_k, is_traced()
    if not traced and type(weight_NHM).__module__.startswith("torchao"):
        return "eager"  # the products of a quantised weight know one expert at a time
    if weight_NHM.is_cuda:
        return fastest_backend_on_a_gpu(weight_NHM, experts.num_experts, tokens, top_k)
    grouped = grouped_backend(weight_NHM)
    expert_size = experts.hidden_dim * experts.intermediate_dim
    if not weight_NHM.is_cpu:
        return grouped
    if traced:  # by a compiler to one loop that gathers and multiplies
        return "batched_mm" if pairs * expert_size <= 500_000 else grouped
    if weight_NHM.requires_grad and torch.is_grad_enabled():
        return grouped  # a view of one expert has a gradient of the size of all
    if is_all_experts_faster(experts, tokens, top_k):
        return "all_experts"
    if tokens == 1 or (expert_size >= LARGE and weight_NHM.dtype == torch.float32):
        return "direct"
    in_place = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if pairs >= 16 * experts.num_experts and type(experts) is CMoEExperts and in_place:
        return "sorted"
    if pairs >= 64 * experts.num_experts and pairs * experts.hidden_dim >= 300_000:
        return "eager"  # the others copy every token top_k times, here beyond the caches
    return grouped


def is_all_experts_faster(experts: ExpertsLoop, tokens: int, top_k: int) -> bool:
    """Return whether running all experts takes less time than choosing, on a CPU, as measured.

    Each chosen expert costs some calls, as long as reading so many weights of an idle one, more
    where tokens must be sorted. With few tokens the idle ones are only read. Narrow experts
    multiply slower than all of them as one wide matrix, the more so the narrower they are.
    """
    if experts.down_proj.dtype != torch.float32:
        return False  # many CPUs convert each number of 16 bits that they multiply
    count, width = experts.num_experts, experts.intermediate_dim
    hit = count * (1 - (1 - top_k / count) ** tokens)
    idle = (count - hit) * experts.hidden_dim * width
    if tokens == 1:  # three experts one by one take as long as the calls for all of them
        return idle < 75_000 * (top_k - 3)
    if count * width <= 100 * top_k:
        return True
    few = tokens * count <= (200 if width <= 64 else 64) * top_k
    return few and idle <= 100_000 * hit


def fastest_backend_on_a_gpu(weight_NHM: Tensor, experts: int, tokens: int, top_k: int) -> str:
    """Name the fastest way on a GPU, from what one H200 has shown in bfloat16.

    `grouped_mm` sorts, 0.4 ms whatever the size; that long, idle experts can multiply as well, and
    nothing launches less. `batched_mm` copies the weights of every pair of token and expert: good
    for a token or two, where reading the idle ones would take longer, or launches cost nothing.
    """
    expert_size = weight_NHM.shape[1] * weight_NHM.shape[2]
    idle = (experts - top_k) * expert_size
    if tokens * top_k <= experts and (is_traced() or idle > 50_000_000):
        return "batched_mm"
    # Activations of all experts would be kept for the gradients.
    most = 128 if torch.is_grad_enabled() else 2**26 / (experts * weight_NHM.shape[2])
    if tokens <= most and tokens * idle <= 30_000_000_000:
        return "all_experts"
    return grouped_backend(weight_NHM)


def grouped_backend(weight_NHM: Tensor) -> str:
    """Name what multiplies groups of tokens: a grouped kernel wants rows of 16 bytes."""
    if all(size * weight_NHM.element_size() % 16 == 0 for size in weight_NHM.shape[1:]):
        return "grouped_mm"
    return "batched_mm" if is_traced() else "eager"  # a loop depends on data


def direct_experts(self: ExpertsLoop, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Loop over the chosen experts with products for few rows, on views of the packed weights."""
    if len(x_TH) > 1:
        arguments = (x_TH, index_TK, weight_TK, small_batch_linear)
        return ExpertsLoop.forward(self, *arguments)
    y_KH = [
        self.run_expert(expert, x_TH, small_batch_linear)
        if expert < self.num_experts  # else it is on another rank
        else torch.zeros_like(x_TH)
        for expert in index_TK[0].tolist()
    ]
    return weight_TK @ torch.cat(y_KH)


def sorted_experts(self: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Sort the tokens by their experts, once, and write each expert's products where they belong.

    Shape suffixes besides: P pairs of token and expert, Q rows of a weight.
    """
    expert_P = index_TK.flatten()
    rows = torch.bincount(expert_P, minlength=self.num_experts)[: self.num_experts].tolist()
    order_P = expert_P.argsort(stable=True)[: sum(rows)]  # without experts on other ranks
    token_P = order_P // index_TK.shape[1]

    def product(x_PH: Tensor, weight_NQH: Tensor) -> Tensor:
        out_PQ = x_PH.new_empty(len(x_PH), weight_NQH.shape[1])
        parts = zip(x_PH.split(rows), weight_NQH.mT, out_PQ.split(rows), strict=True)
        for x_UH, weight_HQ, out_UQ in parts:
            torch.mm(x_UH, weight_HQ, out=out_UQ)
        return out_PQ

    gate_PM, up_PM = product(x_TH[token_P], self.gate_up_proj).chunk(2, dim=-1)
    z_PM = self.act_fn(gate_PM) * up_PM * weight_TK.flatten()[order_P, None]
    return torch.zeros_like(x_TH).index_add_(0, token_P, product(z_PM, self.down_proj))


def all_experts(self: ExpertsLoop, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Run every expert for every token, with weight 0 where it was not chosen."""
    tokens = len(x_TH)
    # One column more, which is dropped: of experts that are not on this rank.
    nothing = weight_TK.new_zeros(tokens, self.num_experts + 1)
    weight_TN = nothing.scatter(1, index_TK, weight_TK)[:, :-1]
    z_TNM = self.hidden_of_all(x_TH) * weight_TN.unsqueeze(2)
    if tokens <= 32 or self.down_proj.is_cuda:
        return torch.bmm(z_TNM.transpose(0, 1), self.down_proj.mT).sum(dim=0)
    return F.linear(z_TNM.flatten(1), self.down_proj.transpose(0, 1).flatten(1))  # copies weights


OWN_BACKENDS: dict[str, Any] = {
    "eager": ExpertsLoop.forward,
    "direct": direct_experts,
    "sorted": sorted_experts,
    "all_experts": all_experts,
}
"""Ways of the default backend that the library has not."""
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

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden activations."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class CMoEPlainSharedExpert(nn.Module):
    """The always-on expert of an FFN without a gate."""

    def __init__(self, config: CMoEConfig) -> None:
        super().__init__()
        width = config.shared_expert_intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, width)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden activations."""
        return self.act_fn(self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x))


class CMoESparseMoeBlock(nn.Module):
    """Shared expert plus the K routed experts that the router picks for each token."""

    experts_class: type[ExpertsLoop] = CMoEExperts
    shared_class: type[nn.Module] = CMoESharedExpert

    def __init__(self, config: CMoEConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.gate = CMoERouter(config, layer_idx)
        self.experts = self.experts_class(config)
        # Absent rather than empty: vLLM concludes from the name that there is a shared expert.
        has_shared = config.shared_expert_intermediate_size > 0
        self.shared_expert: Any = self.shared_class(config) if has_shared else None
        self.down_bias: nn.Parameter | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        # vLLM's kernel overwrites its input: everything else that needs it comes first.
        always_TH: Any = self.down_bias
        if self.shared_expert is not None:
            shared_TH = self.shared_expert(x_TH)
            always_TH = shared_TH if always_TH is None else always_TH + shared_TH
        if self.gate.top_k == 0:
            return always_TH.reshape(hidden_states.shape)
        _, weight_TK, index_TK = self.gate(x_TH)
        out_TH = self.experts(x_TH, index_TK, weight_TK)
        return (out_TH if always_TH is None else out_TH + always_TH).reshape(hidden_states.shape)


class CMoEPlainBlock(CMoESparseMoeBlock):
    """Sparse block of an FFN without a gate; the output bias is added once for every token."""

    experts_class, shared_class = CMoEPlainExperts, CMoEPlainSharedExpert

    def __init__(self, config: CMoEConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.down_bias = nn.Parameter(torch.empty(config.hidden_size))


class CMoEHierarchicalBlock(nn.Module):
    """A carved MoE: of each parent a shared part and the experts that its router picks."""

    def __init__(self, config: CMoEHierarchicalConfig, layer_idx: int) -> None:
        super().__init__()
        shared = config.shared_expert_intermediate_size
        self.gate = CMoEHierarchicalRouter(config, layer_idx)
        self.experts = CMoEExperts(config)
        self.shared_experts = CMoEExperts(config, config.num_parents, shared) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
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

    def run_kept(self, x_TH: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Tensor:
        """Output of the idle experts of the kept parents, (T, H)."""
        runs_TK = self.gate.is_kept(index_TK)
        if is_traced():  # to shapes that no data decides
            return self.experts(x_TH, index_TK, weight_TK * runs_TK)
        token, slot = torch.where(runs_TK)
        out_TH = torch.zeros_like(x_TH)
        if len(token):
            pair = (token, slot, None)
            out_TH.index_add_(0, token, self.experts(x_TH[token], index_TK[pair], weight_TK[pair]))
        return out_TH


class CMoEDecoderLayer(nn.Module):
    """Puts the sparse block in place of the FFN of a family's decoder layer, mixed in before it."""

    attention_class: type[nn.Module]
    norm_class: type[nn.Module]
    block_class: type[nn.Module] = CMoESparseMoeBlock

    def __init__(self, config: CMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp: Any
        if layer_idx not in (config.dense_layers or ()):
            self.mlp = self.block_class(config, layer_idx)


LAYER_KEYWORDS = ("attention_mask", "position_ids", "use_cache", "position_embeddings")
OUTPUT_CACHE = cache_keyword(MoeModelOutputWithPast)
MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


def attention_types(config: PreTrainedConfig) -> list[str]:
    """Return the kind of mask that each layer uses, a key of `MASKS`."""
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        types = ["full_attention" if window is None else "sliding_attention"]
        types *= config.num_hidden_layers
    return types


LINEAR_ONLY = ("bitsandbytes", "eetq", "hqq", "quanto", "torchao")
"""Quantisation methods that know linear layers only; torchao can be told other names."""


def quantisation_method(config: CMoEConfig) -> str | None:
    """Name the method that the configuration asks for, if any."""
    quantisation = getattr(config, "quantization_config", None)
    if isinstance(quantisation, dict):
        return quantisation.get("quant_method")
    method = getattr(quantisation, "quant_method", None)
    return getattr(method, "value", method)


def warn_of_unquantised_experts(decoder: "CMoEModel") -> None:
    """Warn if the model is about to be quantised by a method that passes over the experts."""
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
    """Tells the library how to load, save, split, compile and train these models."""

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
        """Set the attributes that follow from the family's layer."""
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
        parameters, buffers = module.named_parameters, module.named_buffers
        for name, value in (*parameters(recurse=False), *buffers(recurse=False)):
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
            kind: cache_keyword(mask, "attention_mask", "position_ids")
            for kind, mask in MASKS.items()
        }
        self.layer_cache = cache_keyword(self.layer_class.forward, *LAYER_KEYWORDS)
        warn_of_untested_library()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [self.layer_class(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = self.layer_class.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        warn_of_unquantised_experts(self)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the decoder; `output_router_logits=True` also returns the scores.

        `cache` is called `past_key_values` before transformers 5.24; both names are accepted.
        """
        cache = resolve_cache(cache, past_key_values, kwargs)
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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits (B, S, V), a loss if `labels` are given, and router scores on request."""
        cache = resolve_cache(cache, past_key_values, kwargs)
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
            **{OUTPUT_CACHE: outputs.get(OUTPUT_CACHE)},
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
