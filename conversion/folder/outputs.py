# SPDX-License-Identifier: Apache-2.0
"""What a repository computes, seen from outside: likeliest tokens, and generation with the cache.

Also a script, `python outputs.py FOLDER REQUEST RESULT`, which imports nothing of this package: in
a process of its own the repository's own code runs. The oracle is the model without a cache, one
sequence at a time.

Shape suffixes: L prompt tokens, G generated tokens, K likeliest tokens, V vocabulary.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

GENERATED = 32
POSITIONS = 4
LIKELIEST = 5
TOLERANCE = 1e-3
"""Of log-probabilities in float32. A cache that is forgotten changes them by more than 1."""
IN_MEMORY = 2e9
"""Bytes of a model in float32 beyond which its layers are read from the disk at every step."""


@torch.no_grad()
def model_outputs(
    folder: str | Path,
    prompts: list[list[int]],
    *,
    recorded: list[int] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Run a causal language model in float32 on the CPU.

    Args:
        folder: A repository with safetensors.
        prompts: Token ids of two or more sequences of different lengths.
        recorded: Tokens that it generated after the first prompt when it was made.
        trust_remote_code: Run the repository's own code.

    Returns:
        `likeliest` and `log_probabilities`, (`POSITIONS`, K), at the last positions of the first
        prompt; `generated`, the G greedy tokens after it; and `differences` in log-probability
        from the oracle: `cached`, at every step of generation; `padded`, in a batch padded on the
        left; `recorded`, by which recorded tokens fall short of the likeliest, None without them.
    """
    with deterministic(), tempfile.TemporaryDirectory() as offloaded:
        model = load(Path(folder), offloaded, trust_remote_code=trust_remote_code)
        # Greedy and without an end: whatever the repository's own settings are.
        model.generation_config = GenerationConfig(pad_token_id=0)
        first, batches = prompts[0], (prompts[:1], prompts)
        [generated_G], cached = compared(model, batches[0])
        padded = compared(model, batches[1])[1]
        if not (cached <= TOLERANCE and padded <= TOLERANCE):
            # Close scores, or a fault: without a choice of experts only a fault is left.
            with all_experts_active(model):
                cached, padded = (compared(model, batch)[1] for batch in batches)
        positions_PV = logits_of(model, first + generated_G)[: len(first)][-POSITIONS:]
        best = positions_PV.log_softmax(-1).topk(LIKELIEST)
        return {
            "likeliest": best.indices.tolist(),
            "log_probabilities": [[round(it, 5) for it in row] for row in best.values.tolist()],
            "generated": generated_G,
            "differences": {
                "cached": cached,
                "padded": padded,
                "recorded": None if recorded is None else shortfall(model, first, recorded),
            },
        }


@contextmanager
def deterministic() -> Iterator[None]:
    """Let every run add in the same order: nothing is chosen by time."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def load(folder: Path, offloaded: str, *, trust_remote_code: bool) -> Any:
    """Load the model in float32, without a bar. Raises `ValueError` if tensors are missing."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map=placement(folder),
            offload_folder=offloaded,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    model, info = loaded
    if wrong := {kind: found for kind, found in info.items() if found}:
        raise ValueError(f"tensors are not those that it needs: {wrong}")
    return model.eval()


def placement(folder: Path) -> dict[str, str] | None:
    """Return a device map with the layers on the disk, or None if all fits into memory."""
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict, cannot be iterated
                sizes[name] = 4 * torch.Size(file.get_slice(name).get_shape()).numel()
    if sum(sizes.values()) <= IN_MEMORY:
        return None
    ffn = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("ffn") or {}
    mark = f".{ffn.get('layers', 'layers')}."  # GPT-2's are called h
    [layers] = {name.partition(mark)[0] + mark[:-1] for name in sizes if mark in name}
    outside = {name.rpartition(".")[0] for name in sizes if not name.startswith(layers)}
    decoder = layers.rpartition(".")[0]
    return {**dict.fromkeys([*outside, f"{decoder}.rotary_emb", "lm_head"], "cpu"), layers: "disk"}


def generate(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Return the greedy tokens after each prompt of a batch, and their logits (G, V)."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    found = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=GENERATED,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences[:, longest:].tolist(), list(torch.stack(found.logits, dim=1).float())


def compared(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """Return the greedy tokens after each prompt of a batch, and how far they are from the oracle.

    The difference is in log-probability, of the sequence that has the largest.
    """
    tokens, logits = generate(model, prompts)
    differences = [
        difference(logits_GV, logits_of(model, prompt + row)[len(prompt) - 1 : -1])
        for prompt, row, logits_GV in zip(prompts, tokens, logits, strict=True)
    ]
    return tokens, torch.tensor(differences).amax().item()  # NaN if any is


@contextmanager
def all_experts_active(model: Any) -> Iterator[None]:
    """Let every routed expert of a carved model run. A carved MoE stays as it is."""
    is_flat = getattr(model.config, "num_parents", 1) == 1
    routers = [it for it in model.modules() if is_flat and hasattr(it, "balance_bias")]
    chosen = [router.top_k for router in routers]
    for router in routers:
        router.top_k = len(router.balance_bias)
    try:
        yield
    finally:
        for router, top_k in zip(routers, chosen, strict=True):
            router.top_k = top_k


def logits_of(model: Any, ids_L: list[int]) -> torch.Tensor:
    """Return the oracle: logits (L, V) of one sequence, without a cache."""
    return model(torch.tensor([ids_L]), use_cache=False).logits[0].float()


def difference(got_GV: torch.Tensor, oracle_GV: torch.Tensor) -> float:
    """Return how much the log-probabilities of the oracle's likeliest tokens differ."""
    wanted_GK, index_GK = oracle_GV.log_softmax(-1).topk(LIKELIEST)
    return usual((got_GV.log_softmax(-1).gather(1, index_GK) - wanted_GK).abs().amax(-1))


def shortfall(model: Any, prompt_L: list[int], tokens_G: list[int]) -> float:
    """Return by how much log-probability the tokens after a prompt miss the likeliest ones."""
    oracle_GV = logits_of(model, prompt_L + tokens_G)[len(prompt_L) - 1 : -1].log_softmax(-1)
    chosen_G = oracle_GV.gather(1, torch.tensor(tokens_G)[:, None])[:, 0]
    return usual(oracle_GV.amax(-1) - chosen_G)


def usual(difference_G: torch.Tensor) -> float:
    """Return what three quarters of the steps stay within; NaN if any is.

    Not the largest: where two experts are almost equal, rounding may choose the other for a token.
    What is wrong with a cache or a mask is wrong at most steps.
    """
    return difference_G.quantile(0.75).item()


if __name__ == "__main__":
    source, request, result = sys.argv[1:]
    found = model_outputs(source, **json.loads(request), trust_remote_code=True)
    Path(result).write_text(json.dumps(found), encoding="utf-8")
