# SPDX-License-Identifier: Apache-2.0
"""Write decoders.json, the table of families, from what `make families` left in build/.

make families
python results/decoders.py "2 cores AMD EPYC"
make results
"""

import datetime
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import transformers

from cmoe_hf.conversion.source.architectures import TESTED

HERE = Path(__file__).parent
FOUND = HERE.parent / "build" / "families.json"
REFUSALS = {
    "other parts": "refused: composite, or the decoder of an encoder",
    "part of another": "refused: composite, or the decoder of an encoder",
    "MoE": "refused: a MoE, or fields that a carved model needs for itself",
}
"""How refusals are grouped, by what their messages say."""


def state_of(model_type: str, state: str, reason: str) -> str:
    """Return the group of a family."""
    if model_type in TESTED:
        return "tested"
    if state == "converts":
        return "proven at conversion"
    if state != "refused":
        return "not tried: no small random model could be built from the configuration's defaults"
    return next((text for said, text in REFUSALS.items() if said in reason), "refused: other")


def main() -> None:
    """Group the families and write the table."""
    groups = defaultdict(list)
    for model_type, found in json.loads(FOUND.read_text("utf-8")).items():
        groups[state_of(model_type, found["state"], found.get("reason", ""))].append(model_type)
    order = ["tested", "proven at conversion", *dict.fromkeys(REFUSALS.values())]
    order += sorted(groups.keys() - {*order})
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    table = {
        "title": "Families of causal language models",
        "machine": sys.argv[1],
        "versions": versions,
        "date": str(datetime.date.today()),
        "command": ["make families && python results/decoders.py MACHINE"],
        "columns": ["state", "number", "families"],
        "rows": [
            [state, len(groups[state]), ", ".join(sorted(groups[state]))]
            for state in order
            if groups[state]
        ],
    }
    text = json.dumps(table, indent=2, ensure_ascii=False)
    (HERE / "decoders.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
