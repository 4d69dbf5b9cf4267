# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate`: perplexity, dense beside carved, and how good the router is.

Shape suffixes: W windows, L tokens of one window, T tokens, H hidden size, N routed experts,
K active experts.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from cmoe_hf.modeling_cmoe import CMoERouter, CMoESparseMoeBlock

from .calibration import consecutive_windows, load_text, tokenize
from .checkpoint import fetch_model, find_model, load_tokenizer
from .device import check_dtype, find_device
from .errors import CMoEError, RequestError
from .router import agreement, oracle_choice

ROUTERS = ("own", "oracle", "random")
BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured; the keys of `cmoe evaluate --json`."""

    perplexity: float
    tokens: int
    """Predicted tokens, L - 1 of every window."""
    sequence_length: int
    baseline_perplexity: float | None
    """Of the dense model on the same windows, None without `baseline`."""
    router: str
    """Who routed: `"own"`, `"oracle"` or `"random"`."""
    router_oracle_agreement: float | None
    """Share of tokens, averaged over layers, whose experts are exactly the oracle's choice, the
    ones of largest sum |h|. None for a model that does not route, and for a replaced router."""
    router_chance_agreement: float | None
    """The same for a router that picks at random: 1 / C(Nr, A)."""


def evaluate(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    text: str | Path = "wikitext2",
    sequence_length: int | None = None,
    router: str = "own",
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure the perplexity of a model, and of its dense baseline in the same run.

    The text is tokenised once with the model's tokenizer and cut into consecutive windows; the
    last partial one is dropped. Perplexity is exp of the mean negative log-likelihood over the
    L - 1 predicted tokens of every window.

    Args:
        model: Folder or Hub id of a carved or dense model.
        baseline: Folder or Hub id of the dense model; it must share the tokenizer.
        text: Text file, `wikitext2`, `c4` or a Hub data set (their test parts).
        sequence_length: Window length in tokens, default 2,048 or the model's context.
        router: `"own"`, or replace it in `model`: `"oracle"` runs the experts of largest
            sum |h| (a bound, not a usable router), `"random"` any.
        seed: Seed of the random router.
        dtype: Precision to compute in, default that of each checkpoint.
        device: Where to compute, default the accelerator if there is one.
        trust_remote_code: Run Python code that comes with the model. CMoE repositories need it
            only where this package is not installed.

    Raises:
        RequestError: The request cannot be satisfied.
        CMoEError: A model or text cannot be reached, or yields NaN.
    """
    if router not in ROUTERS:
        raise RequestError(f"there is no router {router!r}; choose one of {', '.join(ROUTERS)}.")
    check_dtype(dtype)
    where = find_device(device)
    carved, tokenizer = load_model(model, dtype, where, trust_remote_code)
    length = sequence_length or min(2048, carved.config.max_position_embeddings)
    if length < 2:
        raise RequestError(f"--sequence-length is {length}: a window needs at least 2 tokens.")
    windows_WL = consecutive_windows(
        tokenize(tokenizer, load_text(text, part="test")), length=length
    )

    carved_perplexity, own, chance = measure_routing(carved, windows_WL, router, seed)
    baseline_perplexity = None
    if baseline is not None:
        del carved  # one model in memory at a time
        dense, dense_tokenizer = load_model(baseline, dtype, where, trust_remote_code)
        if dense_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise RequestError(
                f"{baseline} has another vocabulary than {model}: their perplexities cannot be "
                "compared. Give the model that was carved as the baseline."
            )
        baseline_perplexity = perplexity(dense, windows_WL, description="baseline")
    return Evaluation(
        perplexity=carved_perplexity,
        tokens=windows_WL.shape[0] * (length - 1),
        sequence_length=length,
        baseline_perplexity=baseline_perplexity,
        router=router,
        router_oracle_agreement=own,
        router_chance_agreement=chance,
    )


def measure_routing(
    model: PreTrainedModel, windows_WL: torch.Tensor, router: str, seed: int
) -> tuple[float, float | None, float | None]:
    """Perplexity under a router, agreement of the model's own one with the oracle, and chance.

    The agreement is None for a replaced router; both are None for a model that does not route.
    """
    routed = [block for block in sparse_blocks(model) if block.gate.top_k > 0]
    if not routed:
        if router != "own":
            raise RequestError(f"the model does not route, so it cannot have a router {router!r}.")
        return perplexity(model, windows_WL, description="model"), None, None
    agreements = []
    with ExitStack() as stack:
        for index, block in enumerate(routed):
            if router == "own":
                agreements.append(stack.enter_context(watch_router(block)))
            else:
                stack.enter_context(replace_router(block, router, seed + index))
        measured = perplexity(model, windows_WL, description="model")
    own = _mean([_mean(layer) for layer in agreements]) if agreements else None
    return measured, own, 1 / math.comb(routed[0].experts.num_experts, routed[0].gate.top_k)


def sparse_blocks(model: PreTrainedModel) -> list[CMoESparseMoeBlock]:
    """The carved FFNs of a model in the order of its layers; none for a dense model."""
    return [block for block in model.modules() if isinstance(block, CMoESparseMoeBlock)]


def load_model(
    model: str | Path, dtype: str | None, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer."""
    folder, name, commit = find_model(model)
    if commit is not None:
        folder = fetch_model(name, commit)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library raises whatever its readers raise
        reason = str(error).strip().splitlines()[0]
        raise CMoEError(f"{name} cannot be loaded: {reason}") from error
    loaded.to(device)  # type: ignore[arg-type]
    return loaded.eval(), tokenizer


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows_WL: torch.Tensor, *, description: str = "perplexity"
) -> float:
    """exp of the mean negative log-likelihood of the L - 1 predicted tokens of every window.

    Raises `CMoEError` if the model yields NaN.
    """
    windows, length = windows_WL.shape
    total = 0.0
    batches = windows_WL.split(max(1, BATCH_TOKENS // length))
    for ids_BL in tqdm(batches, desc=description, disable=None):
        ids_BL = ids_BL.to(model.device)
        logits = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="sum")
        total += nll.item()
    if not math.isfinite(total):
        raise CMoEError(
            "the model yields NaN on this text: its weights are damaged or its precision "
            "overflows. Try --dtype float32."
        )
    return math.exp(total / (windows * (length - 1)))


@contextmanager
def watch_router(block: CMoESparseMoeBlock) -> Iterator[list[float]]:
    """Collect, batch by batch, how often the block's own router picks the oracle's experts."""
    collected: list[float] = []

    def compare(gate: CMoERouter, inputs: tuple[torch.Tensor], output: Any) -> None:
        oracle_TK = oracle_choice(routed_mass(block, inputs[0]), gate.top_k)
        collected.append(agreement(output[2], oracle_TK))

    handle = block.gate.register_forward_hook(compare)
    try:
        yield collected
    finally:
        handle.remove()


@contextmanager
def replace_router(block: CMoESparseMoeBlock, router: str, seed: int) -> Iterator[None]:
    """Let the oracle, or chance, choose the experts of a block; gate weights follow the choice."""
    generator = torch.Generator().manual_seed(seed)
    choose: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "oracle": lambda x_TH: routed_mass(block, x_TH),
        "random": lambda x_TH: torch.rand(
            len(x_TH), block.experts.num_experts, generator=generator
        ).to(x_TH.device),
    }

    def override(gate: CMoERouter, inputs: tuple[torch.Tensor], output: Any) -> Any:
        score_TN, weight_TK, _ = output
        index_TK = choose[router](inputs[0]).topk(gate.top_k, dim=1).indices
        probability_TN = score_TN.softmax(dim=1, dtype=torch.float32)
        weight_TK = gate.weigh(probability_TN, index_TK)
        return score_TN, weight_TK.to(inputs[0].dtype), index_TK

    handle = block.gate.register_forward_hook(override)
    try:
        yield
    finally:
        handle.remove()


def routed_mass(block: CMoESparseMoeBlock, x_TH: torch.Tensor) -> torch.Tensor:
    """Sum of |h| of every routed expert for every token, (T, N): all of them are computed."""
    masses = []
    for gate_up_QH in block.experts.gate_up_proj:
        gate_TM, up_TM = F.linear(x_TH, gate_up_QH).chunk(2, dim=1)
        masses.append((block.experts.act_fn(gate_TM) * up_TM).abs().float().sum(dim=1))
    return torch.stack(masses, dim=1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
