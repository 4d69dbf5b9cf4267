# SPDX-License-Identifier: Apache-2.0
"""CMoE models (arXiv 2502.04416): a shared expert, routed experts and an analytical router.

What a family needs of this file travels with its converted repositories. It may import torch,
transformers and its sibling configuration file only.

Shape suffixes: B sequences, S positions, T = B * S tokens, H hidden size, N routed experts,
K active experts, M neurons of one routed expert.
"""

# No `from __future__ import annotations` here, and the decorator below stays literal: transformers,
# vLLM and llm-compressor read this source and these annotations.

import functools
import inspect
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import maybe_autocast

from .configuration_cmoe import CMoEConfig, CMoEHierarchicalConfig

logger = logging.get_logger(__name__)

TESTED = ("5.16", "5.24")
"""The lowest and the newest transformers that this code has been tested with."""


def warn_of_untested_library() -> None:
    """Warn once if the installed transformers is newer than all that were tested."""
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


def linear_in_float32(x_TH: Tensor, weight_NH: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Apply a linear layer to float32 tokens, whatever its own precision."""
    return F.linear(x_TH, weight_NH.float(), None if bias_N is None else bias_N.float())


class TritonKernels(NamedTuple):
    """Functions of the file of kernels, see there."""

    cover: Callable[..., bool]
    experts: Callable[..., Tensor]
    router: Callable[..., tuple[Tensor, Tensor, Tensor]]


def triton_kernels() -> TritonKernels:
    """Return the kernels of the experts backend `"cmoe_triton"`.

    Raises `ImportError` where Triton is not.
    """
    from .triton_cmoe import cover, experts, router

    return TritonKernels(cover, experts, router)


class WithTriton(ExpertsInterface):
    """Runs a function in place of a forward method if the backend `"cmoe_triton"` is chosen.

    The function gets that method too: for all that the kernels do not cover.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def get_interface(self, experts_implementation: str | None, default: Any) -> Any:
        """Return what runs."""
        if experts_implementation != "cmoe_triton":
            return default
        return functools.partial(self.function, default)


def triton_router_forward(forward: Any, self: Any, x_TH: Tensor) -> Routing:
    """Route up to 16 tokens in one kernel."""
    kernels, activation = triton_kernels(), self.config.ffn["activation"]
    if self.router_type == "linear":
        activation, up_NH = "linear", self.linear_weight
    else:
        up_NH = self.up_weight
    weights = (self.gate_weight, up_NH, self.scale)
    is_biased = self.up_bias is not None
    if is_biased or not kernels.cover(x_TH, activation, len(up_NH), *weights):
        return forward(self, x_TH)
    settings = (self.top_k, activation, self.absolute_score)
    return Routing(
        *kernels.router(x_TH, self.gate_weight, up_NH, self.balance_bias, self.scale, *settings)
    )


@use_experts_implementation(experts_interface=WithTriton(triton_router_forward))
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
        self.gate_weight: nn.Parameter | None = None
        self.gate_bias: nn.Parameter | None = None
        self.up_bias: nn.Parameter | None = None
        if self.router_type == "representative":
            if config.has_gate:
                self.gate_weight = nn.Parameter(torch.empty(shape))
            if config.ffn["up_bias"]:
                self.up_bias = nn.Parameter(torch.empty(config.num_experts))
                if config.has_gate:
                    self.gate_bias = nn.Parameter(torch.empty(config.num_experts))
            self.up_weight = nn.Parameter(torch.empty(shape))
            self.act_fn = ACT2FN[config.ffn["activation"]]
        else:
            self.linear_weight = nn.Parameter(torch.empty(shape))
        self.scale = nn.Parameter(torch.zeros(config.num_experts))
        self.register_buffer(
            "balance_bias", torch.zeros(config.num_experts, dtype=torch.float32), persistent=True
        )

    def score(self, x_TH: Tensor) -> Tensor:
        """Return every expert's score s, in float32: 16 bits would reorder close experts."""
        with maybe_autocast(device_type=x_TH.device.type, enabled=False):
            x_TH = x_TH.float()
            if self.router_type == "linear":
                score_TN = linear_in_float32(x_TH, self.linear_weight)
            elif self.gate_weight is not None:
                gate_TN = linear_in_float32(x_TH, self.gate_weight, self.gate_bias)
                score_TN = self.act_fn(gate_TN)
                score_TN = score_TN * linear_in_float32(x_TH, self.up_weight, self.up_bias)
            else:
                score_TN = self.act_fn(linear_in_float32(x_TH, self.up_weight, self.up_bias))
            return score_TN.abs() if self.absolute_score else score_TN

    @property
    def choice(self) -> tuple[int, int]:
        """Return the number of experts that compete, and of those that run."""
        return len(self.scale), self.top_k

    def selection_score(self, probability: Tensor, index: Tensor | None, x_TH: Tensor) -> Tensor:
        """Return p + b, which decides between the experts `index`, or between all."""
        return probability + (self.balance_bias if index is None else self.balance_bias[index])

    def pick(self, value_TN: Tensor, x_TH: Tensor) -> Tensor:
        """Return the experts of the highest value that the tokens x may have, (T, K)."""
        if self.top_k == 1 and is_traced():  # which a compiler can join with other kernels
            return value_TN.argmax(dim=-1, keepdim=True)
        return torch.topk(value_TN, self.top_k, dim=-1).indices

    def weigh(self, probability_TN: Tensor, index_TK: Tensor) -> Tensor:
        """Return the gate weights 1 + p * u of the chosen experts, (T, K) float32."""
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
        """Return the number of experts that compete, and of those that run."""
        return self.parents_per_token * self.per_parent // self.groups, self.top_k // self.groups

    def parents(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and indices of the parents, (T, P) each, computed as in the source."""
        logits = F.linear(x_TH, self.parent_weight)
        probability = torch.softmax(logits, dtype=torch.float32, dim=-1)
        weight_TP, parent_TP = probability.topk(self.parents_per_token, dim=-1)
        if self.norm_parent_prob:
            weight_TP = weight_TP / weight_TP.sum(dim=-1, keepdim=True)
        return weight_TP.to(logits.dtype), parent_TP

    def candidates(self, parent_TP: Tensor) -> Tensor:
        """Return the experts that compete, (T, G, C)."""
        child_N = torch.arange(self.per_parent, device=parent_TP.device)
        index_TPN = parent_TP[:, :, None] * self.per_parent + child_N
        return index_TPN.flatten(1).unflatten(1, (self.groups, -1))

    def is_kept(self, index: Tensor) -> Tensor:
        """Return whether experts are of a parent that is kept whole."""
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


def can_choose(x_TH: Tensor, weight: Tensor) -> bool:
    """Return whether a CPU multiplies x by a plain weight, for inference, and nothing records it.

    Everything else, gradients, compilers, other devices and quantised weights, has a fixed way.
    """
    return (
        weight.is_cpu
        and type(x_TH) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x_TH.dtype == weight.dtype
        and len(x_TH) > 0
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x_TH.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.are_deterministic_algorithms_enabled()
        and not is_traced()
        and Tuner.enabled
    )


class Tuner:
    """Chooses between ways of computing the same, by the time that each takes on this machine.

    The first calls of a kind run one way after the other and are timed. So nothing is computed for
    the measurement alone, and weights come from where they will come from later. A way takes the
    place of the first one if its median time is at least a tenth shorter.
    """

    enabled = os.environ.get("CMOE_TUNE") != "0"
    """Without, nothing is chosen by time: every run adds in the same order."""
    ROUNDS = 7
    lock = threading.RLock()
    """One trial at a time, of all tuners; one within another is of the same thread."""
    trials = 0

    def __init__(self) -> None:
        self.chosen: dict[Any, str] = {}
        """Names of the ways by kinds of calls."""
        self.times: dict[Any, dict[str, list[float]]] = {}
        """Seconds, of kinds that are not decided yet."""

    def run(self, kind: Any, ways: dict[str, Callable[..., Tensor]], *inputs: Any) -> Tensor:
        """Compute by the way that is chosen for `kind`, or by one that is to be tried."""
        if kind in self.chosen:
            return ways[self.chosen[kind]](*inputs)
        if not self.lock.acquire(blocking=False):
            return next(iter(ways.values()))(*inputs)
        try:
            times = self.times.setdefault(kind, {name: [] for name in ways})
            name = min(times, key=lambda name: len(times[name]))
            trials, start = Tuner.trials, time.perf_counter()
            result = ways[name](*inputs)
            seconds = time.perf_counter() - start
            if trials == Tuner.trials:  # else another trial was part of it
                times[name].append(seconds)
                self.decide(kind, times)
            Tuner.trials += 1
            return result
        finally:
            self.lock.release()

    def decide(self, kind: Any, times: dict[str, list[float]]) -> None:
        """Drop what is far too slow; if nothing is left to be tried, choose."""
        shortest = {name: min(tried[1:]) for name, tried in times.items() if len(tried) > 2}
        for name, seconds in shortest.items():
            if seconds > 2 * min(shortest.values()):
                del times[name]
        if min(map(len, times.values())) >= self.ROUNDS:
            # The first calls are left out: libraries prepare themselves in them.
            first, *others = {n: statistics.median(tried[2:]) for n, tried in times.items()}.items()
            name, seconds = min(others, key=lambda it: it[1], default=first)
            self.chosen[kind] = name if seconds < 0.9 * first[1] else first[0]
            del self.times[kind]


def size_of(tokens: int) -> int:
    """Return the power of two up to which the number of tokens goes: calls of it are one kind."""
    return (tokens - 1).bit_length()


def linear_in_pieces(x_TH: Tensor, weight_QH: Tensor) -> Tensor:
    """Return x Wᵀ as a batch of products, by pieces of W.

    On some processors the library multiplies a float32 row on one core, and a batch on all.
    """
    rows, pieces = len(weight_QH), math.gcd(len(weight_QH), 16)
    weight_PRH = weight_QH.view(pieces, rows // pieces, -1)
    y_PRT = torch.bmm(weight_PRH, x_TH.T.expand(pieces, -1, -1))
    return y_PRT.view(rows, -1).T


def linear_by_rows(x_TH: Tensor, weight_QH: Tensor) -> Tensor:
    """Return x Wᵀ as products of W with a vector."""
    return torch.stack([torch.mv(weight_QH, x_H) for x_H in x_TH])


def linear_by_onednn(x_TH: Tensor, weight_QH: Tensor) -> Tensor:
    """Return x Wᵀ by oneDNN, where `torch` prefers MKL for float32."""
    return F.linear(x_TH.to_mkldnn(), weight_QH).to_dense()


@functools.cache
def has_onednn() -> bool:
    """Return whether this `torch` was built with oneDNN."""
    try:
        linear_by_onednn(torch.ones(1, 1), torch.ones(1, 1))
    except RuntimeError:
        return False
    return True


LINEAR_TUNER = Tuner()


def tuned_linear(x_TH: Tensor, weight_QH: Tensor) -> Tensor:
    """Return `torch.nn.functional.linear(x, W)`, of which `can_choose` holds, the fastest way."""
    if len(x_TH) == 0 or weight_QH.numel() < 2**14:  # it is read in the time of one more call
        return F.linear(x_TH, weight_QH)
    kind = (weight_QH.shape, weight_QH.dtype, size_of(len(x_TH)))
    return LINEAR_TUNER.run(kind, ways_to_multiply(*kind[1:]), x_TH, weight_QH)


@functools.cache
def ways_to_multiply(dtype: torch.dtype, size: int) -> dict[str, Callable[..., Tensor]]:
    """Return what is tried for up to 2 to the power of `size` rows, the library's way first."""
    ways: dict[str, Callable[..., Tensor]] = {"linear": F.linear}
    if dtype == torch.float32:
        if size <= 4:
            ways["in pieces"] = linear_in_pieces
        if has_onednn():
            ways["oneDNN"] = linear_by_onednn
    elif size == 0:
        ways["by rows"] = linear_by_rows
    return ways


class CMoELinear(nn.Linear):
    """A linear layer of the fastest way to multiply."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if x.ndim != 2 or not can_choose(x, weight):
            return super().forward(x)
        return tuned_linear(x, weight) if bias is None else tuned_linear(x, weight) + bias


SILU = ("silu", "swish")


class ExpertsLoop(nn.Module):
    """The readable reference, backend `"eager"`: loop over the experts that were chosen.

    With a gate, `gate_up_proj` is (N, 2M, H), gate rows first; without, `up_proj` is (N, M, H).
    Biases are (N, 2M) or (N, M); `down_proj` is (N, H, M). Index `num_experts` means "not on this
    rank" under expert parallelism: the loop never reaches it.
    """

    gated = True
    biased = False

    def __init__(
        self, config: CMoEConfig, num_experts: int | None = None, width: int | None = None
    ) -> None:
        """Make the routed experts of `config`, or others of the same kind."""
        super().__init__()
        self.num_experts = num_experts or config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = width or config.moe_intermediate_size
        self.act_fn = ACT2FN[config.ffn["activation"]]
        count, hidden, width = self.num_experts, self.hidden_dim, self.intermediate_dim
        rows = 2 * width if self.gated else width
        name = "gate_up_proj" if self.gated else "up_proj"
        self.register_parameter(name, nn.Parameter(torch.empty(count, rows, hidden)))
        if self.biased:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(count, rows)))
            # The backends add one for each expert that runs, weighted. The FFN's is the block's.
            self.register_buffer("down_proj_bias", torch.zeros(count, hidden), persistent=False)
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        if self.gated and config.ffn["activation"] not in SILU:
            # vLLM 0.32 replaces experts that have nothing but packed weights, and takes SiLU.
            self.other_activation = nn.Parameter(torch.zeros(1), requires_grad=False)

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the first product."""
        parts: Any = self
        if self.gated:
            return parts.gate_up_proj, parts.gate_up_proj_bias if self.biased else None
        return parts.up_proj, parts.up_proj_bias if self.biased else None

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Map tokens (T, H), chosen experts (T, K) and their weights (T, K) to (T, H)."""
        out_TH = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if not is_traced() and token.numel() == 0:
                continue
            y_UH = self.run_expert(expert, hidden_states[token])
            y_UH = y_UH * top_k_weights[token, slot, None]
            out_TH.index_add_(0, token, y_UH.to(out_TH.dtype).contiguous())
        return out_TH

    def run_expert(self, expert: int, x_UH: Tensor, linear: Any = F.linear) -> Tensor:
        """Return the output of one expert, (U, H)."""
        return linear(self.hidden(expert, x_UH, linear), self.down_proj[expert])

    def hidden(self, expert: int, x_UH: Tensor, linear: Any = F.linear) -> Tensor:
        """Return the hidden activations of one expert, (U, M)."""
        weight_NQH, bias_NQ = self.inputs
        z_UQ = linear(x_UH, weight_NQH[expert])
        return self.activate(z_UQ if bias_NQ is None else z_UQ + bias_NQ[expert])

    def activate(self, z: Tensor) -> Tensor:
        """Return the hidden activations of the first product, (..., M)."""
        if not self.gated:
            return self.act_fn(z)
        gate, up = z.chunk(2, dim=-1)
        return self.act_fn(gate) * up


@use_experts_implementation
class CMoEExperts(ExpertsLoop):
    """Gated experts without biases: two packed tensors, the layout of every experts backend."""


@use_experts_implementation(has_bias=True)
class CMoEBiasedExperts(ExpertsLoop):
    """Gated experts with biases."""

    biased = True


@use_experts_implementation(has_gate=False)
class CMoEUngatedExperts(ExpertsLoop):
    """Experts with neither a gate nor biases."""

    gated = False


@use_experts_implementation(has_gate=False, has_bias=True)
class CMoEPlainExperts(ExpertsLoop):
    """Experts without a gate, with biases."""

    gated, biased = False, True


EXPERTS = {
    (kind.gated, kind.biased): kind
    for kind in (CMoEExperts, CMoEBiasedExperts, CMoEUngatedExperts, CMoEPlainExperts)
}
"""Classes of experts by what the FFN had: a gate, and biases."""


EXPERTS_TUNER = Tuner()


def cmoe_experts_forward(
    self: ExpertsLoop,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run the default backend, `"cmoe"`: on a CPU the fastest way, as the first calls show."""
    tokens, top_k = top_k_index.shape
    arguments = (self, hidden_states, top_k_index, top_k_weights)
    if not can_choose(hidden_states, self.down_proj):
        return named_backend(fixed_backend(self, tokens, top_k))(*arguments)
    kind = kind_of_call(self, tokens, top_k)
    return EXPERTS_TUNER.run(kind, ways_to_run(*kind), *arguments)


def kind_of_call(experts: ExpertsLoop, tokens: int, top_k: int) -> tuple[Any, ...]:
    """Return what decides how long the experts take."""
    weight_NHM = experts.down_proj
    return type(experts), weight_NHM.shape, weight_NHM.dtype, top_k, size_of(tokens)


def current_backend(experts: ExpertsLoop, tokens: int, top_k: int) -> str:
    """Name the way in which `"cmoe"` runs `top_k` experts for each of `tokens` tokens."""
    chosen = EXPERTS_TUNER.chosen.get(kind_of_call(experts, tokens, top_k))
    return chosen or fixed_backend(experts, tokens, top_k)


@functools.cache
def ways_to_run(
    kind: type[ExpertsLoop], shape: torch.Size, dtype: torch.dtype, top_k: int, size: int
) -> dict[str, Callable[..., Tensor]]:
    """Return what is tried for up to 2 to the power of `size` tokens, the library's way first."""
    names = [grouped_backend(shape, dtype), "sorted"]
    if size <= 7 or 4 * top_k >= shape[0]:  # idle experts cost arithmetic and memory
        names.append("all_experts")
    return {name: named_backend(name) for name in names}


def named_backend(name: str) -> Callable[..., Tensor]:
    """Return one of our ways to run experts, or of the library's."""
    return OWN_BACKENDS.get(name) or ALL_EXPERTS_FUNCTIONS[name]


def fixed_backend(experts: ExpertsLoop, tokens: int, top_k: int) -> str:
    """Name the way to run `top_k` experts for each of `tokens` tokens where none is measured.

    It depends on shapes and types only, so that a compiler can decide while it traces.
    """
    weight_NHM, traced = experts.down_proj, is_traced()
    if not traced and type(weight_NHM).__module__.startswith("torchao"):
        return "eager"  # the products of a quantised weight know one expert at a time
    if weight_NHM.is_cuda:
        return fastest_backend_on_a_gpu(weight_NHM, experts.num_experts, tokens, top_k)
    # A compiler makes one loop that gathers and multiplies.
    if traced and weight_NHM.is_cpu and tokens * top_k * weight_NHM[0].numel() <= 500_000:
        return "batched_mm"
    return grouped_backend(weight_NHM.shape, weight_NHM.dtype)


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
    return grouped_backend(weight_NHM.shape, weight_NHM.dtype)


def grouped_backend(shape_NHM: torch.Size, dtype: torch.dtype) -> str:
    """Name what multiplies groups of tokens: a grouped kernel wants rows of 16 bytes."""
    if all(size * dtype.itemsize % 16 == 0 for size in shape_NHM[1:]):
        return "grouped_mm"
    return "batched_mm" if is_traced() else "eager"  # a loop depends on data


def sorted_experts(self: ExpertsLoop, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Sort pairs of token and expert by the expert, and run each expert on a view of its weights.

    Pairs of weight 0 fill every expert's tokens up to one of eight numbers between two powers of
    two: oneDNN prepares a product of each new shape for longer than it computes it.

    Shape suffixes besides: P pairs of token and expert, U tokens of one expert, Q rows of a weight.
    """
    weight_NQH, bias_NQ = self.inputs
    linear = tuned_linear if can_choose(x_TH, weight_NQH) else F.linear
    if len(x_TH) == 1:  # nothing to sort
        y_KH = [
            self.run_expert(expert, x_TH, linear)
            if expert < self.num_experts  # else it is on another rank
            else torch.zeros_like(x_TH)
            for expert in index_TK[0].tolist()
        ]
        return weight_TK @ torch.cat(y_KH)
    index_P, weight_P = index_TK.flatten(), weight_TK.flatten()
    sizes_N = torch.bincount(index_P, minlength=self.num_experts)[: self.num_experts]
    sizes = [rounded_up(size) for size in sizes_N.tolist()]
    if filling := sum(sizes) - int(sizes_N.sum()):
        filling_N = torch.tensor(sizes, device=x_TH.device) - sizes_N
        filling_P = torch.arange(self.num_experts, device=x_TH.device).repeat_interleave(filling_N)
        index_P, weight_P = torch.cat([index_P, filling_P]), F.pad(weight_P, (0, filling))
    expert_P, order_P = index_P.sort()
    order_P = order_P[: sum(sizes)]  # without experts on other ranks
    token_P = (order_P // index_TK.shape[1]).clamp_(max=len(x_TH) - 1)  # of a filling: any

    def product(x_PH: Tensor, weight_NQH: Tensor) -> Tensor:
        # `unbind` collects the gradients of all experts; each index would add zeros for the others.
        groups = zip(x_PH.split(sizes), weight_NQH.unbind(), strict=True)
        return torch.cat([linear(x_UH, weight_QH) for x_UH, weight_QH in groups])

    z_PQ = product(x_TH.index_select(0, token_P), weight_NQH)
    if bias_NQ is not None:
        z_PQ = z_PQ + bias_NQ[expert_P[: len(order_P)]]
    z_PM = self.activate(z_PQ) * weight_P[order_P, None]
    out_PH = product(z_PM, self.down_proj).to(x_TH.dtype)  # autocast changes it
    return torch.zeros_like(x_TH).index_add_(0, token_P, out_PH)


def rounded_up(size: int) -> int:
    """Return the next number of which at most the first four binary digits are not 0."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def all_experts(self: ExpertsLoop, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Run every expert for every token, with weight 0 where it was not chosen."""
    # One column more, which is dropped: of experts that are not on this rank.
    nothing = weight_TK.new_zeros(len(x_TH), self.num_experts + 1)
    weight_TN = nothing.scatter(1, index_TK, weight_TK)[:, :-1]
    weight_NQH, bias_NQ = self.inputs
    is_tuned = can_choose(x_TH, weight_NQH)
    z_TR = (tuned_linear if is_tuned else F.linear)(x_TH, weight_NQH.flatten(0, 1))
    if bias_NQ is not None:
        z_TR = z_TR + bias_NQ.flatten()
    z_TNM = self.activate(z_TR.unflatten(1, (self.num_experts, -1))) * weight_TN.unsqueeze(2)
    if not is_tuned:
        return batched_linear(z_TNM, self.down_proj)
    kind = ("all", self.down_proj.shape, x_TH.dtype, size_of(len(x_TH)))
    return LINEAR_TUNER.run(kind, WAYS_TO_SUM, z_TNM, self.down_proj)


def batched_linear(z_TNM: Tensor, weight_NHM: Tensor) -> Tensor:
    """Return the sum over n of z W(n)ᵀ, (T, H)."""
    return torch.bmm(z_TNM.transpose(0, 1), weight_NHM.mT).sum(dim=0)


def transposed_batched_linear(z_TNM: Tensor, weight_NHM: Tensor) -> Tensor:
    """Return the sum over n of z W(n)ᵀ, (T, H), from W(n) zᵀ."""
    return torch.bmm(weight_NHM, z_TNM.permute(1, 2, 0)).sum(dim=0).T


def joined_linear(z_TNM: Tensor, weight_NHM: Tensor) -> Tensor:
    """Return the sum over n of z W(n)ᵀ, (T, H), as one product with a copy of the weights."""
    return tuned_linear(z_TNM.flatten(1), weight_NHM.transpose(0, 1).flatten(1))


WAYS_TO_SUM = {
    "x Wᵀ": batched_linear,
    "W xᵀ": transposed_batched_linear,
    "copied": joined_linear,
}


def gathered_experts(
    self: ExpertsLoop, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """Multiply each token by the gathered weights of its experts, for a compiler.

    With `coordinate_descent_tuning` one kernel gathers and multiplies; elsewhere this copies.
    """
    here_TK = index_TK < self.num_experts  # else an expert is on another rank
    index_P = (index_TK * here_TK).flatten()
    x_PH = x_TH.repeat_interleave(index_TK.shape[1], 0)
    weight_NQH, bias_NQ = self.inputs
    z_PQ = (weight_NQH[index_P] * x_PH.unsqueeze(1)).sum(-1)
    if bias_NQ is not None:
        z_PQ = z_PQ + bias_NQ[index_P]
    y_PH = (self.down_proj[index_P] * self.activate(z_PQ).unsqueeze(1)).sum(-1)
    y_TKH = y_PH.unflatten(0, index_TK.shape) * (weight_TK * here_TK).unsqueeze(2)
    return y_TKH.sum(1).to(x_TH.dtype)


def gathered_experts_forward(
    self: ExpertsLoop, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """Run the backend `"cmoe_gathered"`: in compiled code few tokens gather, else the default runs.

    Few: that read half of the experts at most. Not measured on a GPU yet.
    """
    is_few = 2 * index_TK.numel() <= self.num_experts
    run = gathered_experts if is_few and is_traced() else cmoe_experts_forward
    return run(self, x_TH, index_TK, weight_TK)


def triton_experts_forward(self: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Run the backend `"cmoe_triton"`: kernels for up to 16 tokens, the default for all else."""
    kernels, activation = triton_kernels(), self.config.ffn["activation"]
    weights = (self.inputs[0], self.down_proj)
    covered = kernels.cover(x_TH, activation, self.num_experts, *weights, weight_TK)
    if not covered or not self.gated or self.biased:
        return cmoe_experts_forward(self, x_TH, index_TK, weight_TK)
    return kernels.experts(x_TH, index_TK, weight_TK, *weights, activation)


OWN_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "eager": ExpertsLoop.forward,
    "sorted": sorted_experts,
    "all_experts": all_experts,
}
"""Ways of the default backend that the library has not."""
ALL_EXPERTS_FUNCTIONS.register("cmoe", cmoe_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("cmoe_gathered", gathered_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("cmoe_triton", triton_experts_forward)


class CMoESharedExpert(nn.Module):
    """The always-on expert: a gated FFN over the busiest neurons."""

    def __init__(self, config: CMoEConfig) -> None:
        super().__init__()
        width, bias = config.shared_expert_intermediate_size, config.ffn["up_bias"]
        self.gate_proj = CMoELinear(config.hidden_size, width, bias=bias)
        self.up_proj = CMoELinear(config.hidden_size, width, bias=bias)
        self.down_proj = CMoELinear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.ffn["activation"]]

    def hidden(self, x: Tensor) -> Tensor:
        """Return the hidden activations."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x))


class CMoEPlainSharedExpert(nn.Module):
    """The always-on expert of an FFN without a gate."""

    def __init__(self, config: CMoEConfig) -> None:
        super().__init__()
        width = config.shared_expert_intermediate_size
        self.up_proj = CMoELinear(config.hidden_size, width, bias=config.ffn["up_bias"])
        self.down_proj = CMoELinear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.ffn["activation"]]

    def hidden(self, x: Tensor) -> Tensor:
        """Return the hidden activations."""
        return self.act_fn(self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x))


def whole_weights(block: Any) -> list[Tensor]:
    """Return the weights of a gated block's experts, or none unless our modules hold all of them.

    Adapters and quantisation replace modules; parallelism splits weights and adds up in hooks.
    """
    experts, shared, config = block.experts, block.shared_expert, block.config
    if type(experts) is not CMoEExperts or block.down_bias is not None:
        return []
    weights: list[Any] = [experts.gate_up_proj, experts.down_proj]
    width = 0
    if shared is not None:
        if type(shared) is not CMoESharedExpert:
            return []
        linears = (shared.gate_proj, shared.up_proj, shared.down_proj)
        if any(type(linear) is not CMoELinear for linear in linears):
            return []
        weights += [linear.weight for linear in linears]
        width = len(shared.gate_proj.weight)
    widths = (config.num_experts, config.moe_intermediate_size)
    is_whole = experts.down_proj.shape[::2] == widths
    return weights if is_whole and width == config.shared_expert_intermediate_size else []


def triton_block_forward(
    forward: Any, self: Any, hidden_states: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Run up to 16 tokens with the shared expert as one more of a token's experts."""
    x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    kernels, activation = triton_kernels(), self.config.ffn["activation"]
    weights = whole_weights(self) if self.gate.top_k and residual is None else []
    settings = (activation, self.config.num_experts)
    if not weights or not kernels.cover(x_TH, *settings, *weights):
        return forward(self, hidden_states, residual)
    _, weight_TK, index_TK = self.gate(x_TH)
    experts, shared = weights[:2], weights[2:]
    out_TH = kernels.experts(x_TH, index_TK, weight_TK, *experts, activation, *shared)
    return out_TH.view_as(hidden_states)


@use_experts_implementation(experts_interface=WithTriton(triton_block_forward))
class CMoESparseMoeBlock(nn.Module):
    """Shared expert plus the K routed experts that the router picks for each token.

    An output bias of the FFN is added once for every token.
    """

    def __init__(self, config: CMoEConfig, layer_idx: int = 0) -> None:
        super().__init__()
        ffn = config.ffn
        self.gate = CMoERouter(config, layer_idx)
        self.experts = EXPERTS[config.has_gate, ffn["up_bias"]](config)
        # Absent rather than empty: vLLM concludes from the name that there is a shared expert.
        self.shared_expert: Any = None
        if config.shared_expert_intermediate_size > 0:
            kind = CMoESharedExpert if config.has_gate else CMoEPlainSharedExpert
            self.shared_expert = kind(config)
        self.down_bias: nn.Parameter | None = None
        if ffn["down_bias"]:
            self.down_bias = nn.Parameter(torch.empty(config.hidden_size))
        self.takes_residual = ffn["takes_residual"]

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (B, S, H) or (T, H) to the same shape; in some families it adds the residual."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        # vLLM's kernel overwrites its input: everything else that needs it comes first.
        always_TH: Any = self.down_bias
        if self.shared_expert is not None:
            shared_TH = self.shared_expert(x_TH)
            always_TH = shared_TH if always_TH is None else always_TH + shared_TH
        if self.gate.top_k == 0:
            out_TH = always_TH
        else:
            _, weight_TK, index_TK = self.gate(x_TH)
            out_TH = self.experts(x_TH, index_TK, weight_TK)
            out_TH = out_TH if always_TH is None else out_TH + always_TH
        out = out_TH.reshape(hidden_states.shape)
        return out + residual if self.takes_residual and residual is not None else out


class CMoEHierarchicalBlock(nn.Module):
    """A carved MoE: of each parent a shared part and the experts that its router picks."""

    def __init__(self, config: CMoEHierarchicalConfig, layer_idx: int) -> None:
        super().__init__()
        shared = config.shared_expert_intermediate_size
        self.gate = CMoEHierarchicalRouter(config, layer_idx)
        self.experts = CMoEExperts(config)
        self.shared_experts = CMoEExperts(config, config.num_parents, shared) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, S, H) to (B, S, H)."""
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
        """Return the output of the idle experts of the kept parents, (T, H)."""
        runs_TK = self.gate.is_kept(index_TK)
        if is_traced():  # to shapes that no data decides
            return self.experts(x_TH, index_TK, weight_TK * runs_TK)
        token, slot = torch.where(runs_TK)
        out_TH = torch.zeros_like(x_TH)
        if len(token):
            pair = (token, slot, None)
            out_TH.index_add_(0, token, self.experts(x_TH[token], index_TK[pair], weight_TK[pair]))
        return out_TH


LINEAR_ONLY = ("bitsandbytes", "eetq", "hqq", "quanto", "torchao")
"""Quantisation methods that know linear layers only; torchao can be given other names."""


def quantisation_method(config: PreTrainedConfig) -> str | None:
    """Name the method that the configuration asks for, if any."""
    quantisation = getattr(config, "quantization_config", None)
    if isinstance(quantisation, dict):
        return quantisation.get("quant_method")
    method = getattr(quantisation, "quant_method", None)
    return getattr(method, "value", method)


def warn_of_unquantised_experts(decoder: PreTrainedModel) -> None:
    """Warn if the model is about to be quantised by a method that passes over the experts."""
    quantisation = getattr(decoder.config, "quantization_config", None)
    told_names = hasattr(getattr(quantisation, "quant_type", None), "fqn_to_config")
    method = quantisation_method(decoder.config)
    if method not in LINEAR_ONLY or told_names or isinstance(quantisation, dict):
        return
    experts = sum(p.numel() for name, p in decoder.named_parameters() if ".experts." in name)
    share = experts / decoder.num_parameters()
    logger.warning(
        f"{method} quantises linear layers only: the routed experts, {share:.0%} of the decoder, "
        "stay as they are. To quantise both: TorchAoConfig(FqnToConfig("
        r"{r're:.*(_proj\.weight|experts\..*_proj)': Int8WeightOnlyConfig()}))"
    )


class Carved(PreTrainedModel):
    """Puts sparse blocks where the FFNs of a model of transformers are, and changes nothing else.

    Inherit from it before a decoder or a causal model of the library, which stays in charge of
    masks, caches, positions, norms and residuals.
    """

    model_class: type[PreTrainedModel] | None = None
    """The carved decoder of a causal model; None in a decoder."""
    is_made = True
    _keep_in_fp32_modules_strict = ["balance_bias"]
    _keys_to_ignore_on_load_missing = ["other_activation"]  # in models of cmoe-hf 0.2 and before

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the forward method return router scores."""
        super().__init_subclass__(**options)
        cls.forward = with_router_logits(cls.forward)

    def __init__(self, config: CMoEConfig, *args: Any, **kwargs: Any) -> None:
        if self.model_class is not None:
            # The dense decoder, made first and replaced, must not be asked for an experts backend.
            self.is_made = False
            super().__init__(type(config).from_dict(config.to_dict()), *args, **kwargs)
            self.is_made, self.config = True, config
            self.register_module(self.base_model_prefix, self.model_class(config))
        else:
            super().__init__(config, *args, **kwargs)
            put_blocks(self, config)
            warn_of_unquantised_experts(self)
            warn_of_untested_library()
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The library reads the file of a class for that, and would find the dense one's answer.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if not self.is_made:
            return super().get_correct_experts_implementation("eager")
        if requested_experts == "cmoe_triton":
            try:
                triton_kernels()
            except ImportError as error:
                logger.warning_once(f"The default experts backend runs: {error}")
                requested_experts = "cmoe"
        # The other methods, such as fp8, replace the experts by their own, with other backends.
        if requested_experts is None and quantisation_method(self.config) in (None, *LINEAR_ONLY):
            requested_experts = "cmoe"
        return super().get_correct_experts_implementation(requested_experts)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Of custom code the library leaves out modules without tensors of their own, some of which
        # initialise those of others (Falcon-H1).
        super()._initialize_weights(module, is_custom_code=False)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        # The library leaves what is inside another of its models to that (OPT's decoder).
        for model in self.modules():
            if isinstance(model, PreTrainedModel) and not isinstance(model, Carved):
                for module in model.modules():
                    self.init_block(module)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        self.init_block(module)

    @torch.no_grad()
    def init_block(self, module: nn.Module) -> None:
        """Initialise a part of a sparse block; leave any other module alone."""
        if not isinstance(module, CMoERouter | CMoESparseMoeBlock | ExpertsLoop):
            return
        std = getattr(self.config, "initializer_range", None) or 0.02
        parameters, buffers = module.named_parameters, module.named_buffers
        for name, value in (*parameters(recurse=False), *buffers(recurse=False)):
            if name.endswith(("bias", "scale", "other_activation")):
                init.zeros_(value)
            else:
                init.normal_(value, mean=0.0, std=std)


def put_blocks(decoder: PreTrainedModel, config: CMoEConfig) -> None:
    """Replace the FFN of each carved layer by a sparse block."""
    kind: Any = CMoEHierarchicalBlock if config.num_parents > 1 else CMoESparseMoeBlock
    layers: Any = decoder.get_submodule(config.ffn["layers"])
    for index, layer in enumerate(layers):
        if index in (config.dense_layers or ()):
            continue
        owner, _, name = config.ffn["module"].rpartition(".")
        layer.get_submodule(owner).register_module(name, kind(config, index))
        for part in config.ffn["skipped"]:
            layer.register_module(part, nn.Identity())


def with_router_logits(forward: Any) -> Any:
    """Let a forward method return the scores of its routers, on `output_router_logits`.

    Hooks collect them: neither the outputs nor the decorators of the dense family know of them.
    """
    if hasattr(forward, "without_router_logits"):
        return forward
    # A MoE's own forward method would look for the routers of its source.
    is_known = "output_router_logits" in inspect.signature(forward).parameters

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.pop("output_router_logits", None)
        if is_known:
            kwargs["output_router_logits"] = False
        if not (self.config.output_router_logits if asked is None else asked):
            return forward(self, *args, **kwargs)
        scores: list[Tensor] = []
        routers = [module for module in self.modules() if isinstance(module, CMoERouter)]
        hooks = [
            router.register_forward_hook(lambda _module, _args, out: scores.append(out[0]))
            for router in routers
        ]
        try:
            outputs = forward(self, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        if isinstance(outputs, ModelOutput):
            outputs["router_logits"] = tuple(scores)
        return outputs

    wrapper.without_router_logits = forward  # type: ignore[attr-defined]
    return wrapper
