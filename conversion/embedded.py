# SPDX-License-Identifier: Apache-2.0
"""The small model that the package carries, and its texts."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "llama-pydoc"
CALIBRATION = ASSETS / "calibration.txt"
HELD_OUT = ASSETS / "heldout.txt"
