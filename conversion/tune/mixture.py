# SPDX-License-Identifier: Apache-2.0
"""The mixture of texts that a recovery learns from, and the one that the teacher writes itself.

Shape suffixes: W windows, L tokens of one window, B windows of a batch.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..carve.settings import public_name
from ..errors import RequestError
from ..folder.paths import replace_file
from ..source.texts import absolute_text

OWN = "own"
"""The name of the text that the teacher writes."""
OWN_BATCH = 64
"""Windows that the teacher writes at once on a CPU; sixteen times as many elsewhere."""
UNITS = {"": 1, "k": 10**3, "m": 10**6}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([km]?)")


class Portion(NamedTuple):
    """One text of a mixture."""

    text: str
    tokens: int | None
    """As asked for; None for a share of what is left."""

    @classmethod
    def of(cls, source: str | Path) -> "Portion":
        """Read `TEXT` or `TEXT:TOKENS`, as in `wikitext2:500k`. Raises `RequestError`."""
        name, _, amount = str(source).rpartition(":")
        found = AMOUNT.fullmatch(amount.lower()) if name else None
        if found is None or Path(source).expanduser().is_file():
            if name == OWN:
                raise RequestError(f"{source}: say how many tokens, for example {OWN}:500k.")
            return cls(str(source), None)
        return cls(name, int(float(found[1]) * UNITS[found[2]]))

    @property
    def absolute(self) -> str:
        """Return it as it can be read from anywhere."""
        text = self.text if self.text == OWN else absolute_text(self.text)
        return text if self.tokens is None else f"{text}:{self.tokens}"

    @property
    def name(self) -> str:
        """Return its public name."""
        return public_name(self.text)


def shares(portions: Sequence[Portion], samples: int, length: int) -> list[int]:
    """Return the windows of each text: as many as it says, or an equal share of `samples`."""
    unsaid = sum(portion.tokens is None for portion in portions)
    each = -(-samples // unsaid) if unsaid else 0
    return [each if it.tokens is None else max(1, it.tokens // length) for it in portions]


def write_own(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    length: int,
    seed: int,
    folder: Path,
) -> None:
    """Let the teacher write windows of text, batch by batch, each into a file of `folder`.

    It samples at temperature 1 behind a token drawn from its vocabulary; every second batch of a
    chat model is an answer. Batches that are there already are not written again, and several
    processes share them. An end of text does not end a window: another text begins.
    """
    state, batches = accelerate.PartialState(), own_batches(teacher.device, windows)
    folder.mkdir(parents=True, exist_ok=True)
    teacher.generation_config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0)
    known = min(len(tokenizer), teacher.config.vocab_size)
    plain = torch.tensor(sorted({*range(known)} - {*tokenizer.all_special_ids}))
    starts = own_starts(tokenizer, length)
    done = tqdm(
        total=windows, desc="the teacher writes", disable=None if state.is_main_process else True
    )
    for number, size in enumerate(batches):
        path = folder / f"{number:06}.safetensors"
        if number % state.num_processes == state.process_index and not path.is_file():
            devices = [teacher.device] if teacher.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed((seed << 20) + number)
                first_B1 = plain[torch.randint(len(plain), (size, 1))]
                start = torch.tensor(starts[number % len(starts)], dtype=torch.int64)
                ids_BL = torch.cat([start.expand(size, -1), first_B1], dim=1).to(teacher.device)
                more = {"max_new_tokens": length - ids_BL.shape[1]}
                written: Any = teacher.generate(  # type: ignore[operator] # a mixin's
                    ids_BL, attention_mask=torch.ones_like(ids_BL), **more
                )
            replace_file(path, partial(save_file, {"ids": written.cpu().contiguous()}))
        done.update(size)
    done.close()
    state.wait_for_everyone()


def own_batches(device: torch.device, windows: int) -> list[int]:
    """Return how many windows each batch has."""
    most = OWN_BATCH if device.type == "cpu" else 16 * OWN_BATCH
    return [min(most, windows - start) for start in range(0, windows, most)]


def own_starts(tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Return the tokens with which windows begin: of a text, and of an answer in a chat."""
    starts: list[list[int]] = [tokenizer("")["input_ids"]]
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": ""}]
        chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        starts.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
    return [start for start in starts if len(start) + 1 < length] or [[]]


def read_own(folder: Path) -> torch.Tensor:
    """Return the windows (W, L) that `write_own` has written."""
    return torch.cat([load_file(path)["ids"] for path in sorted(folder.glob("*.safetensors"))])
