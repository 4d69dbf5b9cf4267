# SPDX-License-Identifier: Apache-2.0
"""Carve a small model of every family under several releases of transformers, and use them there.

    python examples/compare_versions.py 5.16.0 5.19.0 5.23.0 5.24.0

Each release is installed beside the current environment, into a temporary folder. Under each, every
family is carved; then, in a process that cannot import this package, it is loaded, generates 32
tokens with and without a cache and in a batch padded on the left, is saved and loaded again.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
CARVE = """
import sys
from pathlib import Path
import torch
from families import FAMILIES, pico_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from cmoe_hf.conversion import convert
from cmoe_hf.conversion.embedded import CALIBRATION, MODEL

for family in FAMILIES:
    torch.manual_seed(0)
    folder = Path(sys.argv[1]) / family
    model = AutoModelForCausalLM.from_config(pico_config(family))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "dense")
    shape = {"shared": 1, "active": 2, "experts": 8}
    few = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 64}
    convert(folder / "dense", folder / "carved", **shape, **few)
"""
USE = """
import json, sys
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM

def load(folder):
    options = {"trust_remote_code": True, "output_loading_info": True, "dtype": "float32"}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules")
    return model.eval()

@torch.no_grad()
def row(folder):
    model = load(folder / "carved")
    greedy = {"do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32, "pad_token_id": 1}
    greedy["eos_token_id"] = None
    long, short = torch.arange(2, 42)[None], torch.arange(300, 310)[None]
    mask = torch.ones_like(long)
    cached = [model.generate(it, attention_mask=mask[:, : it.shape[1]], **greedy)
              for it in (long, short)]
    plain = long
    for _ in range(32):
        logits = model(plain, use_cache=False).logits
        plain = torch.cat([plain, logits[:, -1:].argmax(-1)], dim=1)
    gap = long.shape[1] - short.shape[1]
    padded = torch.cat([torch.nn.functional.pad(short, (gap, 0), value=1), long])
    mask = (torch.arange(padded.shape[1]) >= torch.tensor([[gap], [0]])).long()
    batch = model.generate(padded, attention_mask=mask, **greedy)
    model.save_pretrained(folder / "saved")
    again = load(folder / "saved")
    return {
        "cached": torch.equal(cached[0], plain),
        "padded": torch.equal(batch[1:], cached[0]) and torch.equal(batch[:1, gap:], cached[1]),
        # Not bit for bit: where a file's tensors lie in memory can change the BLAS kernel.
        "saved": torch.allclose(again(long).logits, model(long).logits, atol=1e-4, rtol=1e-4),
    }

found = {it.name: row(it) for it in sorted(Path(sys.argv[1]).iterdir())}
print(json.dumps({"transformers": transformers.__version__, "families": found}))
"""


def run(program: str, folder: Path, search: list[Path]) -> str:
    """Run a program with these folders in front of its path; return its last line."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, search)),
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return (done.stdout.strip().splitlines() or [""])[-1]


def under(version: str) -> dict:
    """What happens under a release of transformers."""
    with tempfile.TemporaryDirectory() as temporary:
        library, folder = Path(temporary) / "library", Path(temporary) / "models"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(library)]
        subprocess.run([*pip, f"transformers=={version}"], check=True)
        run(CARVE, folder, [library, TESTS])
        without_package = "import sys; sys.modules['cmoe_hf'] = None\n"
        return json.loads(run(without_package + USE, folder, [library]))


def main() -> None:
    rows = [under(version) for version in sys.argv[1:]]
    families = list(rows[0]["families"])
    print("| transformers |", " | ".join(families), "|")
    print("|---" * (1 + len(families)) + "|")
    for row in rows:
        cells = []
        for family in families:
            unequal = [name for name, equal in row["families"][family].items() if not equal]
            cells.append("equal" if not unequal else f"**not {', '.join(unequal)}**")
        print(f"| {row['transformers']} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
