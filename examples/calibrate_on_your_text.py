# SPDX-License-Identifier: Apache-2.0
"""Carve on text of your own domain, and see what that does on held-out text.

    python examples/calibrate_on_your_text.py MODEL OUT CALIBRATION_TEXT HELD_OUT_TEXT

Texts are files (plain text, or JSONL and parquet with a `text` column) or data sets of the Hub.
"""

import sys

from cmoe_hf.conversion import convert, evaluate

model, out, calibration, held_out = sys.argv[1:]
convert(model, out, shared=3, active=3, experts=8, calibration=calibration)
result = evaluate(out, baseline=model, text=held_out)
print(f"perplexity: dense {result.baseline_perplexity:.2f}, carved {result.perplexity:.2f}")
