# SPDX-License-Identifier: Apache-2.0
"""Convert a random checkpoint of a large model's shape: what memory and time a real one will take.

    python examples/convert_large.py --shape llama-2-7b --tokens 2048 --folder /big/disk
    python examples/convert_large.py --shape llama-2-70b --layers 2 --tokens 2048 --folder /big/disk
    python examples/convert_large.py --shape llama-2-7b --layers 1 --tokens 16384
    python examples/convert_large.py --shape qwen3-30b-a3b --layers 1 --tokens 16384

The weights are random, so the quality means nothing; the arithmetic, the memory and the files are
those of the real model, but for its vocabulary, which is that of the tokenizer that comes with the
package unless --vocabulary is larger. Needs twice the checkpoint's size on the disk.

The conversion runs in a process of its own. Printed as one JSON object: its peak resident memory,
the size of what it wrote, what --dry-run had said of both, and the seconds of a layer.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from cmoe_hf.conversion.embedded import CALIBRATION, MODEL
from cmoe_hf.conversion.measure.shapes import SHAPES
from cmoe_hf.conversion.source.architectures import is_moe, moe_architecture
from cmoe_hf.conversion.source.checkpoint import unpacked
from cmoe_hf.conversion.source.stored import TensorRef

MOE_SHAPES = {
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}


def write_checkpoint(folder: Path, config: PreTrainedConfig) -> None:
    """Random bfloat16 weights, one layer in memory at a time, one shard a layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    moe = moe_architecture(config, type(model)) if is_moe(config) else None
    names = {
        name: part.shape
        for key, tensor in model.state_dict().items()
        for name, part in unpacked(moe, key, TensorRef(folder, key, "", list(tensor.shape)))
    }
    shards = []
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        shards.append({name: shape for name, shape in names.items() if name.startswith(prefix)})
    inside = {name for shard in shards for name in shard}
    shards.append({name: shape for name, shape in names.items() if name not in inside})
    torch.manual_seed(0)
    where, size = {}, 0
    for number, shapes in enumerate(tqdm(shards, desc="writing random weights", disable=None), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES | MOE_SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="fewer than the real model has")
    parser.add_argument("--vocabulary", type=int, default=0, help="32000 in Llama-2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--split", type=int, nargs=3, default=[3, 3, 8], metavar=("S", "A", "E"))
    parser.add_argument("--budget", help="the share of the neurons that run, in place of --split")
    parser.add_argument("--recipe", default="refined")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="on a disk with room; removed afterwards")
    arguments = parser.parse_args()
    shape = (SHAPES | MOE_SHAPES)[arguments.shape]
    kind = Qwen3MoeConfig if arguments.shape in MOE_SHAPES else LlamaConfig
    fields = {
        **shape,
        "vocab_size": max(arguments.vocabulary, len(AutoTokenizer.from_pretrained(MODEL))),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    if arguments.layers:
        fields["num_hidden_layers"] = arguments.layers
    config = kind(**fields)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, output = Path(folder) / "dense", Path(folder) / "carved"
        source.mkdir()
        write_checkpoint(source, config)
        length = min(2048, arguments.tokens)
        shared, active, experts = map(str, arguments.split)
        command = [sys.executable, "-m", "cmoe_hf.conversion.cli", "convert", source, output]
        if arguments.budget:
            command += ["--budget", arguments.budget]
        else:
            command += ["--shared", shared, "--active", active, "--experts", experts]
        command += ["--recipe", arguments.recipe, "--device", arguments.device]
        command += ["--calibration", CALIBRATION, "--sequence-length", str(length)]
        command += ["--samples", str(arguments.tokens // length), "--json"]
        planned, result = (
            json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for line in ([*command, "--dry-run"], command)
        )
        layers = json.loads((output / "conversion.json").read_text())["layers"]
        written = sum(path.stat().st_size for path in output.iterdir())
    seconds = {
        step: round(statistics.median(layer["seconds"][step] for layer in layers), 2)
        for step in layers[0]["seconds"]
    }
    print(
        json.dumps(
            {
                "shape": arguments.shape,
                "layers": config.num_hidden_layers,
                "notation": result["notation"],
                "calibration_tokens": result["calibration_tokens"],
                "peak_memory_gb": round(result["peak_memory_bytes"] / 1e9, 2),
                "planned_memory_gb": round(planned["peak_memory_bytes"] / 1e9, 2),
                "disk_gb": round(written / 1e9, 3),
                "planned_disk_gb": round(planned["disk_bytes"] / 1e9, 3),
                "planned_seconds": round(planned["seconds"]),
                "carving_pass_over_bare_forward": round(result["carving_ratio"], 2),
                "seconds": round(result["seconds"], 1),
                "median_seconds_per_layer": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
