# SPDX-License-Identifier: Apache-2.0
"""Train a small MoE, carve its experts again, and print perplexity against activation ratio.

    python examples/compare_hierarchical.py                      # Qwen3-MoE and OLMoE
    python examples/compare_hierarchical.py --family olmoe --steps 300 --active 1 --active 3

One JSON object for each family and ratio goes to standard output: perplexity of held-out text, of
the source, with static pruning of each expert (its most energetic neurons, as they are and
refitted), by each recipe, and by `refined` where the small experts compete within each expert of
the source only, as the paper has it. Models this small tell the order of the rows, not their size.
"""

import argparse
import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare_families import FAMILIES, REFINED, WINDOW, carve, train
from transformers import AutoTokenizer

from cmoe_hf.conversion import RECIPES, Recipe, evaluate
from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT, MODEL

EXPERTS = 8
MOE = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 2,
    "output_router_logits": True,  # while it trains, to balance the loads
    "router_aux_loss_coef": 0.01,
}
SOURCES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**MOE, "moe_intermediate_size": 96, "head_dim": 32, "norm_topk_prob": True},
    "olmoe": {**MOE, "intermediate_size": 96},
}
ROWS: dict[str, Recipe] = {
    "all_active": REFINED,  # must be the source
    "released": RECIPES["released"],
    "paper": RECIPES["paper"],
    "static": replace(REFINED, refit=False),
    "static_refitted": REFINED,
    # Competition between parents knows no router that ranks: without one here, too.
    "refined_within_parents": replace(REFINED, competition="parent", router_epochs=0),
    "refined_without_refit": replace(REFINED, refit=False),
    "refined": REFINED,
}


def compare(source: Path, active: int, folder: Path) -> dict[str, Any]:
    """Perplexity of all rows at one activation ratio, 2 A / E."""
    rows: dict[str, Any] = {"notation": f"S{active}A{active}E{EXPERTS}"}
    for name, recipe in ROWS.items():
        shape = (active, active, EXPERTS)
        if name.startswith("static"):
            shape = (2 * active, 0, EXPERTS)
        elif name == "all_active":
            shape = (active, EXPERTS - active, EXPERTS)
        measured = carve(source, folder / name, shape, recipe)
        rows |= {"source": measured.baseline_perplexity, name: measured.perplexity}
    rows["oracle"] = evaluate(
        folder / "refined", router="oracle", text=HELD_OUT, sequence_length=WINDOW
    ).perplexity
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=SOURCES, help="repeatable")
    parser.add_argument("--active", action="append", type=int, help="A = S; repeatable, 1 2 3")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    FAMILIES.update(SOURCES)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = CALIBRATION.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    for family in arguments.family or SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / family
            model = train(family, ids, arguments.steps)
            model.config.output_router_logits = False
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
            for active in arguments.active or (1, 2, 3):
                rows = compare(source, active, Path(folder))
                print(json.dumps({"family": family, "steps": arguments.steps, **rows}), flush=True)


if __name__ == "__main__":
    main()
