# SPDX-License-Identifier: Apache-2.0
"""Carve a model and let it write.

    python examples/convert_and_generate.py [MODEL] [OUT]

Without arguments it carves the small model that comes with the package, offline.
"""

import sys

from transformers import pipeline

from cmoe_hf.conversion import convert
from cmoe_hf.conversion.embedded import CALIBRATION, MODEL

model, out = sys.argv[1:] or (MODEL, "carved")
result = convert(
    model,
    out,
    shared=3,
    active=3,
    experts=8,
    calibration=CALIBRATION if model == MODEL else "wikitext2",
)
print(f"{result.notation}: {result.activation_ratio:.0%} of the FFN neurons run per token")

generate = pipeline("text-generation", model=result.output)
print(generate("The value of", max_new_tokens=30, do_sample=False)[0]["generated_text"])
