# SPDX-License-Identifier: Apache-2.0
"""What happens inside a carved model while it reads a text: which neurons fire, where activation
is, how the router loads its experts, and where the tokens of a sample go. No batch is kept.

Shape suffixes: W windows, L tokens of one window, T tokens, H hidden size, F dense FFN width
(shared neurons first, then expert by expert), N routed experts, K active experts.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cmoe_hf.modeling_cmoe import CMoERouter, CMoESparseMoeBlock

from ..carve.profile import activation_marks
from ..carve.router import ALWAYS_ON_BIAS, agreement, oracle_choice
from ..errors import CMoEError
from ..measure.evaluate import Quality, quality
from ..measure.routing import always_on, collected, imbalance, sparse_blocks

MARKED = 10
"""Neurons that a token marks, the paper's K_a."""
BINS_PER_DECADE = 6
"""Every bin then holds a whole number of marks: 1, 2, 3, 4, 5 to 6, 7 to 9, 10 to 14, ..."""
HIDDEN_BINS = 49
"""Odd: the middle bin lies around 0."""
HIDDEN_QUANTILE = 0.999
"""Share of the first tokens' |h| that the histogram is wide enough for."""
CHUNK_VALUES = 2**23
"""Hidden values that are computed at once."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a model did on a text."""

    quality: Quality
    tokens: int
    """Tokens seen, all L of every window."""
    marked: int
    """Neurons that each token marks."""
    layers: list[dict[str, Any]]
    """Figures of the carved layers, see `LayerWatch.result`."""


def observe(
    model: PreTrainedModel, windows_WL: torch.Tensor, baseline: PreTrainedModel | None = None
) -> Observation:
    """Run a carved model, and its baseline beside it, over windows and watch every layer.

    Raises `CMoEError` if the model yields NaN or infinite activations.
    """
    with ExitStack() as stack:
        watches = [LayerWatch(block) for block in sparse_blocks(model)]
        for watch in watches:
            stack.callback(watch.block.register_forward_pre_hook(watch).remove)
        measured = quality(model, windows_WL, baseline, description="observing")
    return Observation(
        quality=measured,
        tokens=windows_WL.numel(),
        marked=watches[0].marked,
        layers=[watch.result() for watch in watches],
    )


class LayerWatch:
    """Adds up what one block does; a forward pre-hook that computes all of its neurons."""

    def __init__(self, block: CMoESparseMoeBlock) -> None:
        self.block = block
        shared, experts, gate = block.shared_expert, block.experts, block.gate
        self.shared = 0 if shared is None else shared.up_proj.weight.shape[0]
        self.width = self.shared + experts.num_experts * experts.intermediate_dim
        self.marked = min(MARKED, self.width)
        self.always_on_bias_N = gate.balance_bias * always_on(gate)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.always_on_bias_N.device)

        self.marks_F = zeros(self.width)
        self.hidden = [zeros(HIDDEN_BINS + 1), zeros(HIDDEN_BINS + 1)]  # shared, routed
        self.load_N, self.unbiased_N = zeros(len(gate.scale)), zeros(len(gate.scale))
        self.limit, self.low, self.high = 0.0, math.inf, -math.inf
        self.mass = [0.0, 0.0, 0.0]  # shared, routed and ran, routed and idle
        self.tokens, self.agreed = 0, 0.0

    def __call__(self, block: CMoESparseMoeBlock, inputs: tuple[torch.Tensor, ...]) -> None:
        """Count the tokens that enter the block."""
        for x_TH in inputs[0].flatten(0, -2).split(max(1, CHUNK_VALUES // self.width)):
            h_TF = hidden_values(block, x_TH)
            self.tokens += len(x_TH)
            self.marks_F += counted(activation_marks(h_TF, self.marked), self.width)
            self.add_hidden(h_TF)
            shared = h_TF[:, : self.shared].abs().sum().item()
            routed_TNM = h_TF[:, self.shared :].unflatten(1, (len(self.load_N), -1))
            mass_TN = routed_TNM.abs().sum(dim=2)
            ran = self.add_routing(x_TH, mass_TN) if block.gate.top_k else 0.0
            parts = (shared, ran, mass_TN.sum().item() - ran)
            self.mass = [total + part for total, part in zip(self.mass, parts, strict=True)]

    def add_hidden(self, h_TF: torch.Tensor) -> None:
        """Count hidden values. Raises `CMoEError` if one is not finite."""
        low, high = (end.item() for end in h_TF.aminmax())
        if not math.isfinite(low + high):
            raise CMoEError(
                "the model yields NaN or infinite activations on this text: its weights are "
                "damaged or its precision overflows. Try --dtype float32."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.limit == 0:
            size_T = h_TF.abs().flatten()
            limit = size_T.kthvalue(math.ceil(HIDDEN_QUANTILE * len(size_T))).values.item()
            self.limit = 1.001 * limit or 1.0  # that value itself lies inside
        for count_B, part_TF in zip(self.hidden, h_TF.tensor_split([self.shared], 1), strict=True):
            position_TF = (part_TF / self.limit + 1) * (HIDDEN_BINS / 2)
            bin_TF = position_TF.floor().clamp(-1, HIDDEN_BINS).long()
            bin_TF[bin_TF < 0] = HIDDEN_BINS  # both ends are outside
            count_B += counted(bin_TF, HIDDEN_BINS + 1)

    def add_routing(self, x_TH: torch.Tensor, mass_TN: torch.Tensor) -> float:
        """Count what the router chooses, with its bias and without; return the mass that ran."""
        gate = self.block.gate
        routing = gate.forward(x_TH)  # past other hooks
        index_TK = routing.index_TK
        probability_TN = routing.score_TN.softmax(dim=1, dtype=torch.float32)
        unbiased_TK = (probability_TN + self.always_on_bias_N).topk(gate.top_k, dim=1).indices
        self.load_N += counted(index_TK, len(self.load_N))
        self.unbiased_N += counted(unbiased_TK, len(self.load_N))
        oracle_TK = oracle_choice(mass_TN, gate.top_k)
        self.agreed += agreement(index_TK, oracle_TK) * len(x_TH)
        return mass_TN.gather(1, index_TK).sum().item()

    def result(self) -> dict[str, Any]:
        """Return the sums as shares of tokens, neurons or mass.

        `activation_rates` counts neurons by the share of tokens that mark them (those outside were
        never marked), `hidden_values` the values of h; `mass` are shares of sum |h| over all tokens
        and neurons, `loads` shares of the tokens that run each routed expert. What is `unbiased`
        leaves out the balance bias, but for experts that always run (`pinned`). Figures of routing
        are empty or None for a layer that does not route.
        """
        gate, whole = self.block.gate, max(sum(self.mass), 1e-30)
        always_on_N = always_on(gate).cpu()
        loads = {"": self.load_N.cpu(), "_unbiased": self.unbiased_N.cpu()}
        routes = gate.top_k > 0
        step = 2 * self.limit / HIDDEN_BINS
        edges = [-self.limit + step * index for index in range(HIDDEN_BINS + 1)]
        parts = zip(("shared", "ran", "idle"), self.mass, strict=True)
        figures: dict[str, Any] = {
            "activation_rates": rate_histogram(self.marks_F.cpu(), self.shared, self.tokens),
            "hidden_values": histogram(edges, *self.hidden),
            "hidden_low": self.low,
            "hidden_high": self.high,
            "mass": {name: part / whole for name, part in parts},
            "pinned": always_on_N.nonzero().flatten().tolist() if routes else [],
            "oracle_agreement": self.agreed / self.tokens if routes else None,
        }
        for name, load_N in loads.items():
            figures[f"loads{name}"] = (load_N / self.tokens).tolist() if routes else []
            figures[f"imbalance{name}"] = imbalance(load_N, always_on_N) if routes else None
        return figures


def hidden_values(block: CMoESparseMoeBlock, x_TH: torch.Tensor) -> torch.Tensor:
    """Return hidden activations of all neurons, (T, F) float32, whether they run or not."""
    experts, shared = block.experts, block.shared_expert
    parts = [] if shared is None else [shared.hidden(x_TH)]
    # Quantised weights cannot be iterated.
    parts += [experts.hidden(expert, x_TH) for expert in range(experts.num_experts)]
    return torch.cat(parts, dim=1).float()


def counted(index: torch.Tensor, size: int) -> torch.Tensor:
    """Return how often each number below `size` occurs, (size,) int64."""
    return torch.bincount(index.flatten(), minlength=size)


def rate_histogram(marks_F: torch.Tensor, shared: int, tokens: int) -> dict[str, Any]:
    """Count neurons by activation rate, in logarithmic bins from one mark to one per token."""
    bins = max(1, math.ceil(BINS_PER_DECADE * math.log10(tokens) - 1e-9))
    starts = [10 ** (index / BINS_PER_DECADE) for index in range(bins)]
    limits = torch.tensor(starts, dtype=torch.float64) * (1 - 1e-9)
    # 0 stands for never marked; it becomes the last, outside the edges.
    bin_F = (torch.bucketize(marks_F.double(), limits, right=True) - 1) % (bins + 1)
    parts = (counted(part, bins + 1) for part in bin_F.tensor_split([shared]))
    return histogram([*(start / tokens for start in starts), 1.0], *parts)


def histogram(edges: list[float], shared_B: torch.Tensor, routed_B: torch.Tensor) -> dict[str, Any]:
    """Return counts between ascending edges; the last of each is of what lies outside them."""
    found: dict[str, Any] = {"edges": edges}
    for name, count_B in (("shared", shared_B), ("routed", routed_B)):
        *found[name], found[f"outside_{name}"] = count_B.tolist()
    return found


@torch.no_grad()
def observe_sample(model: PreTrainedModel, ids_T: torch.Tensor) -> list[dict[str, Any]]:
    """Return where each layer that routes sends the tokens of a short text: lists (T, K).

    `experts` are ordered best first, `probabilities` are softmax(s) over all routed experts, and
    `weights` gate weights.
    """

    def routes(gate: CMoERouter, inputs: Any, output: Any) -> dict[str, Any]:
        score_TN, weight_TK, index_TK = output
        probability_TK = score_TN.softmax(dim=1, dtype=torch.float32).gather(1, index_TK)
        rank_TK = gate.balance_bias[index_TK] + probability_TK
        # Experts that are always on come last: they say nothing about the token.
        rank_TK = rank_TK - 2 * ALWAYS_ON_BIAS * always_on(gate)[index_TK]
        order_TK = rank_TK.argsort(dim=1, descending=True, stable=True)
        values = {"experts": index_TK, "probabilities": probability_TK, "weights": weight_TK}
        return {name: value.gather(1, order_TK).tolist() for name, value in values.items()}

    with collected([block.gate for block in sparse_blocks(model)], routes) as found:
        model(input_ids=ids_T[None].to(model.device), use_cache=False)
    return [layer for calls in found for layer in calls]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids_T: torch.Tensor) -> list[str]:
    """Return what each token adds to the text: nothing for a part of a character."""
    texts, before = [], ""
    for end in range(1, len(ids_T) + 1):
        # Decoded together: alone, tokens lose the spaces before them and shared characters.
        text = "".join(tokenizer.decode(ids_T[:end], clean_up_tokenization_spaces=False))
        whole = text.rstrip("\ufffd")
        texts.append(whole[len(before) :])
        before = whole
    return texts
