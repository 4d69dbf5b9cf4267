# SPDX-License-Identifier: Apache-2.0
"""How fast is a carved model in llama.cpp? Dense beside carved, in turn, beside the roofline.

    python examples/speed_llama_cpp.py --threads 2 --models DENSE=CARVED,CARVED --json FILE

Besides the models given, random weights of the shapes of TinyLlama and Llama 3.2 1B, with fewer
layers: a layer's speed does not depend on how many there are, and the head is counted as it is.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from cmoe_hf.conversion import benchmark_gguf, export_gguf
from cmoe_hf.conversion.carve.recipe import RECIPES
from cmoe_hf.conversion.carve.shape import Shape, carved_config
from cmoe_hf.conversion.embedded import MODEL
from cmoe_hf.conversion.source.architectures import llama_architecture

SHAPES = {
    "TinyLlama": {"intermediate_size": 5632, "num_key_value_heads": 4, "vocab_size": 32000},
    "Llama-3.2-1B": {
        "intermediate_size": 8192,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}


def random_models(name: str, layers: int, shapes: list[str], folder: Path) -> list[Path]:
    """The dense model of a shape, and the carved ones."""
    dense = LlamaConfig(
        **SHAPES[name],
        hidden_size=2048,
        num_attention_heads=32,
        num_hidden_layers=layers,
        max_position_embeddings=2048,
    )
    row, recipe = llama_architecture(dense), RECIPES["refined"]
    configs = [dense, *(carved_config(dense, row, Shape.parse(it), recipe) for it in shapes)]
    places = []
    for config, kind in zip(configs, ["dense", *shapes], strict=True):
        place = folder / f"{name}-{kind}"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(place)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(place)
        places.append(place)
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[], metavar="DENSE=CARVED,CARVED")
    parser.add_argument("--random", nargs="*", default=list(SHAPES), help="Of which shapes.")
    parser.add_argument("--shapes", nargs="*", default=["S1A1E8", "S3A3E8"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--types", nargs="*", default=["q8_0", "f16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = [
            [Path(dense), *map(Path, carved.split(","))]
            for dense, carved in (pair.split("=") for pair in arguments.models)
        ]
        for shape in arguments.random:
            groups.append(random_models(shape, arguments.layers, arguments.shapes, folder))
        for dense, *carved in groups:
            for type in arguments.types:
                files = [
                    export_gguf(it, folder / f"{it.name}.gguf", type=type, overwrite=True).output
                    for it in (dense, *carved)
                ]
                for file in files[1:]:
                    measured = benchmark_gguf(
                        file,
                        files[0],
                        threads=arguments.threads,
                        prefill=(256,),
                        context=(128,),
                        rounds=arguments.rounds,
                    )
                    row = {"type": type, **asdict(measured)}
                    rows.append(row)
                    points = {kind: row[kind][0] for kind in ("prefill", "decode")}
                    said = ", ".join(
                        f"{kind} {it['dense_ms']:.2f} -> {it['carved_ms']:.2f} ms, "
                        f"{it['speedup']:.2f} (roofline {it['roofline_speedup']:.2f})"
                        for kind, it in points.items()
                    )
                    print(f"{Path(file).stem} {type}: {said}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
