# SPDX-License-Identifier: Apache-2.0
"""Train a small model of each family for about a minute, carve it by each recipe, and compare.

    python examples/compare_families.py                       # on the text that the package carries
    python examples/compare_families.py --family qwen3 --shape S3A3E8 --steps 600

One JSON object for each family goes to standard output: perplexity of held-out text, dense, with
static pruning at equal activation (the most energetic neurons, nothing routed), and by each recipe.
Models this small tell the order of the rows, not their size.
"""

import argparse
import json
import logging
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cmoe_hf.conversion import RECIPES, Evaluation, Recipe, convert, evaluate
from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT, MODEL

REFINED = RECIPES["refined"]
WINDOW = 128
COMMON = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    "qwen3": {"head_dim": 64},
    "gpt_neox": {"num_key_value_heads": 4},  # all: it has no others
}


def train(family: str, ids: torch.Tensor, steps: int) -> PreTrainedModel:
    """AdamW, one-cycle learning rate, 8 random windows a step."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    for step in range(steps):
        starts = torch.randint(len(ids) - WINDOW, (8,))
        batch = torch.stack([ids[start : start + WINDOW] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            logging.info("%s: step %d, loss %.3f", family, step, loss.item())
    return model


def compare(family: str, shape: tuple[int, int, int], steps: int, folder: Path) -> dict[str, Any]:
    """Perplexity of one family's rows."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = CALIBRATION.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    dense = folder / family
    train(family, ids, steps).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    shared, active, experts = shape
    rows: dict[str, Any] = {"family": family, "shape": "S{}A{}E{}".format(*shape), "steps": steps}
    for name, recipe, split in (
        ("all_active", REFINED, (shared, experts - shared)),  # must be the dense model
        ("released", RECIPES["released"], (shared, active)),
        ("paper", RECIPES["paper"], (shared, active)),
        ("static", replace(REFINED, refit=False), (shared + active, 0)),
        ("refined", REFINED, (shared, active)),
    ):
        output = folder / f"{family}-{name}"
        measured = carve(dense, output, (*split, experts), recipe)
        rows |= {"dense": measured.baseline_perplexity, name: measured.perplexity}
    return rows


def carve(source: Path, output: Path, shape: tuple[int, int, int], recipe: Recipe) -> Evaluation:
    """Carve a model on the calibration text, and measure both on held-out text."""
    shared, active, experts = shape
    result = convert(
        source,
        output,
        shared=shared,
        active=active,
        experts=experts,
        recipe=recipe,
        calibration=CALIBRATION,
        samples=128,
        sequence_length=WINDOW,
        overwrite=True,
    )
    return evaluate(result.output, baseline=source, text=HELD_OUT, sequence_length=WINDOW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=FAMILIES, help="repeatable")
    parser.add_argument("--shape", default="S1A1E8")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    match = re.fullmatch(r"S(\d+)A(\d+)E(\d+)", arguments.shape)
    if match is None:
        parser.error(f"{arguments.shape} is not a shape such as S1A1E8.")
    shared, active, experts = map(int, match.groups())
    for family in arguments.family or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            shape = (shared, active, experts)
            print(json.dumps(compare(family, shape, arguments.steps, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
