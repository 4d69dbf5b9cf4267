# SPDX-License-Identifier: Apache-2.0
"""The text that a dense model writes itself, in a folder of unfinished work.

Shape suffixes: W windows, L tokens of one window, B windows of a batch.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .paths import replace_file

OWN_BATCH, OWN_CACHE = 64, 2**29
"""Windows written at once, and values in the cache of keys and values, at most on a CPU; sixteen
times as many elsewhere."""


def write_own(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    length: int,
    seed: int,
    folder: Path,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Let a model write windows of text, batch by batch, each into a file of `folder`.

    It samples at temperature 1 behind a token drawn from its vocabulary; every second batch of a
    chat model is an answer. Batches that are there already are not written again, and several
    processes share them. An end of text does not end a window: another text begins.
    """
    starts = own_starts(tokenizer, length)
    batches = own_batches(model.config, tokenizer, model.device, windows, length)
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0)
    known = min(len(tokenizer), model.config.vocab_size)
    plain = torch.tensor(sorted({*range(known)} - {*tokenizer.all_special_ids}))
    done = tqdm(
        total=windows, desc="the dense model writes", unit="window", disable=process != 0 or None
    )
    for number, size in enumerate(batches):
        path = folder / f"{number:06}.safetensors"
        if number % processes == process and not path.is_file():
            devices = [model.device] if model.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed((seed << 20) + number)
                first_B1 = plain[torch.randint(len(plain), (size, 1))]
                start = torch.tensor(starts[number % len(starts)], dtype=torch.int64)
                ids_BL = torch.cat([start.expand(size, -1), first_B1], dim=1).to(model.device)
                more = {"max_new_tokens": length - ids_BL.shape[1]}
                written: Any = model.generate(  # type: ignore[operator] # a mixin's
                    ids_BL, attention_mask=torch.ones_like(ids_BL), **more
                )
            replace_file(path, partial(save_file, {"ids": written.cpu().contiguous()}))
        done.update(size)
    done.close()


def own_batches(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    windows: int,
    length: int,
) -> list[int]:
    """Return how many windows each batch has: at least one batch has each start."""
    factor = 1 if device.type == "cpu" else 16
    most = min(factor * OWN_BATCH, factor * OWN_CACHE // (length * cached_values(config)))
    most = max(1, min(most, -(-windows // len(own_starts(tokenizer, length)))))
    return [min(most, windows - start) for start in range(0, windows, most)]


def cached_values(config: PreTrainedConfig) -> int:
    """Return how many values the cache of keys and values has for a token."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kept * width)


def own_starts(tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Return the tokens with which windows begin: of a text, and of an answer in a chat."""
    starts: list[list[int]] = [tokenizer("")["input_ids"]]
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": ""}]
        chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        starts.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
    return [start for start in starts if len(start) + 1 < length] or [[]]


def read_own(folder: Path, seed: int) -> torch.Tensor:
    """Return the windows (W, L) that `write_own` has written, in random order."""
    paths = sorted(folder.glob("*.safetensors"))
    windows_WL = torch.cat([load_file(path)["ids"] for path in paths])
    order_W = torch.randperm(len(windows_WL), generator=torch.Generator().manual_seed(seed))
    return windows_WL[order_W]
