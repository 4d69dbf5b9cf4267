# SPDX-License-Identifier: Apache-2.0
"""Where carved models are faster on this CPU: shapes, notations, tokens and types; rows and a map.

    python examples/speed_map.py map.json --quick
    python examples/speed_map.py map.json --before 601a904                 # beside older code
    python examples/speed_map.py map.json --fill results/speed-map-2.json  # the table's rows
    python examples/speed_map.py map.json --draw docs/speed-map.png

Weights are random: the speed does not depend on them. Everything of one point, dense, carved and,
with --before, carved by the modelling code of another commit, runs in turn in the same process.
Decoding uses a model of the shape with some of its layers and as large a part of its vocabulary, so
that the head weighs what it weighs in the whole. The file is written after every shape; points that
it has are not measured again.
"""

import argparse
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

import cmoe_hf.modeling_cmoe
from cmoe_hf.conversion.carve.recipe import RECIPES
from cmoe_hf.conversion.carve.shape import Shape, carved_config
from cmoe_hf.conversion.device import device_name, versions
from cmoe_hf.conversion.measure.roofline import ffn_work, measure_rates, model_work
from cmoe_hf.conversion.measure.shapes import SHAPES
from cmoe_hf.conversion.measure.timing import Decoder, settle
from cmoe_hf.conversion.source.architectures import llama_architecture
from cmoe_hf.families import family_code

PARTS = {
    "smollm2-135m": 3,
    "smollm2-360m": 4,
    "tinyllama-1.1b": 5,
    "llama-3.2-1b": 4,
    "llama-3.2-3b": 7,
    "llama-2-7b": 16,
}
"""The shapes, and the part of the layers and of the vocabulary that decodes: one in so many."""
NAMES = ("SmolLM2-135M", "SmolLM2-360M", "TinyLlama", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-2-7B")
"""Their names in a table."""
NOTATIONS = ("S1A1E8", "S3A3E8", "budget 0.5")
TOKENS = (1, 4, 16, 64, 512)
DTYPES = ("float32", "bfloat16", "int8")
CONTEXT = 128
BATCHES = (1, 8)
"""Sequences that are decoded at once."""


def shape_of(notation: str, config: LlamaConfig) -> Shape:
    """The shape; of a budget, the one that is chosen for the model."""
    if not notation.startswith("budget "):
        return Shape.parse(notation)
    layers, width = config.num_hidden_layers, config.intermediate_size
    return Shape.spread(float(notation.split()[1]), layers, width, None)[0]


def code_of_commit(commit: str) -> ModuleType:
    """The modelling code of another commit; its experts backend is called `cmoe` and the commit."""
    folder = Path(tempfile.mkdtemp())
    package = folder / "cmoe_before"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("configuration_cmoe.py", "modeling_cmoe.py"):
        shown = subprocess.run(
            ["git", "show", f"{commit}:src/cmoe_hf/{name}"], check=True, capture_output=True
        )
        text = shown.stdout.decode()
        if "class CMoELlama" not in text:  # since classes are made on demand
            text += family_code(LlamaConfig)[name]
        (package / name).write_text(text)
    sys.path.insert(0, str(folder))
    ours = ALL_EXPERTS_FUNCTIONS["cmoe"]
    code = importlib.import_module("cmoe_before.modeling_cmoe")
    ALL_EXPERTS_FUNCTIONS.register("cmoe_before", ALL_EXPERTS_FUNCTIONS["cmoe"])
    ALL_EXPERTS_FUNCTIONS.register("cmoe", ours)
    return code


def prepared(module: torch.nn.Module, dtype: str) -> Any:
    """In its type, with weights that keep activations at one size."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith("scale"):
            torch.nn.init.zeros_(parameter)
    module = module.to(torch.float32 if dtype == "float32" else torch.bfloat16).eval()
    for name, buffer in module.named_buffers():
        if name.endswith("balance_bias"):
            buffer.data = buffer.data.float()
    if dtype == "int8":
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

        names = r"re:.*(_proj\.weight|experts\..*_proj|^(gate|up|down)_proj\.weight)"
        quantize_(module, FqnToConfig({names: Int8WeightOnlyConfig()}), filter_fn=None)
    return module


def medians(calls: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in turn, `rounds` times."""
    for call in calls.values():
        call(0)
        if not isinstance(call, Decoder):
            settle(call)
    start = time.perf_counter()
    calls["dense"](1)
    repeats = max(1, min(100, round(0.05 / (time.perf_counter() - start))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: (-1) ** turn]:
            start = time.perf_counter()
            for index in range(repeats):
                calls[name](turn * repeats + index)
            found[name].append(1e3 * (time.perf_counter() - start) / repeats)
    return found


class Map:
    """The rows so far, and how to measure one more."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.before = code_of_commit(options.before) if options.before else None
        self.rows: list[dict[str, Any]] = []
        if options.output.exists():
            self.rows = json.loads(options.output.read_text())["rows"]
        self.rates: dict[str, Any] = {}

    def save(self) -> None:
        """Everything, with what it was measured on."""
        flags = (
            Path("/proc/cpuinfo").read_text(encoding="utf-8")
            if Path("/proc/cpuinfo").exists()
            else ""
        )
        record = {
            "command": " ".join(["python", *sys.argv]),
            "device": device_name(torch.device("cpu")),
            "instructions": [name for name in ("avx512f", "avx512_bf16", "amx_bf16")
                             if name in flags],
            "threads": torch.get_num_threads(),
            "before": self.options.before,
            "bandwidth_gb_per_s": {k: rate.bytes / 1e9 for k, rate in self.rates.items()},
            "versions": versions(),
            "rows": self.rows,
        }  # fmt: skip
        self.options.output.write_text(json.dumps(record, indent=1) + "\n")

    def add(self, key: dict[str, Any], calls: dict[str, Any], works: tuple[Any, Any]) -> None:
        """One row."""
        dtype = key["dtype"]
        if dtype not in self.rates:
            kind = torch.float32 if dtype == "float32" else torch.bfloat16
            self.rates[dtype] = measure_rates(torch.device("cpu"), kind)
        found = medians(calls, self.options.rounds)
        dense, carved = (self.rates[dtype].seconds(work) for work in works)
        ratios = {
            name: round(statistics.median(map(lambda d, c: d / c, found["dense"], times)), 3)
            for name, times in found.items()
            if name != "dense"
        }
        times = {f"{name}_ms": round(statistics.median(found[name]), 4) for name in found}
        row = {**key, **times, "roofline_speedup": round(dense / carved, 3)}
        row |= {"speedup": ratios["carved"]}
        if "before" in ratios:
            row["speedup_before"] = ratios["before"]
        self.rows.append(row)
        print(row, flush=True)

    def lacks(self, key: dict[str, Any]) -> bool:
        """Whether a point is still to be measured."""
        return not any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    def models(self, config: LlamaConfig, shape: Shape) -> dict[str, tuple[Any, Any]]:
        """Classes and configuration of the carved model, by ours and the older code."""
        ours = carved_config(config, llama_architecture(config), shape, RECIPES["refined"])
        ours._experts_implementation = "cmoe"
        found = {"carved": (cmoe_hf.modeling_cmoe, ours)}
        if self.before is not None:
            fields = ours.to_dict()
            fields.pop("model_type", None)
            theirs = self.before.CMoELlamaConfig(**fields)
            theirs._experts_implementation = "cmoe_before"
            found["before"] = (self.before, theirs)
        return found

    @torch.no_grad()
    def ffn(self, name: str, notation: str, dtype: str) -> None:
        """One FFN block, of several with other weights, so that none stays in the caches."""
        config = LlamaConfig(**SHAPES[name])
        keys = [
            {"kind": "ffn", "shape": name, "notation": notation, "dtype": dtype, "tokens": tokens}
            for tokens in self.options.tokens
        ]
        keys = [key for key in keys if self.lacks(key)]
        if not keys:
            return
        hidden, width = config.hidden_size, config.intermediate_size
        copies = max(2, round(1.5e8 / (3 * hidden * width * (4 if dtype == "float32" else 2))))
        blocks = {"dense": [prepared(LlamaMLP(config), dtype) for _ in range(copies)]}
        for code_name, (code, carved) in self.models(config, shape_of(notation, config)).items():
            blocks[code_name] = [
                prepared(code.CMoESparseMoeBlock(carved), dtype) for _ in range(copies)
            ]
        for key in keys:
            tokens = key["tokens"]
            kind = torch.float32 if dtype == "float32" else torch.bfloat16
            x = torch.randn(8, 1, tokens, hidden).to(kind)
            calls = {
                code_name: lambda turn, some=some, x=x: some[turn % copies](x[turn % 8])
                for code_name, some in blocks.items()
            }
            index_TK = blocks["carved"][0].gate(x[0, 0])[2]
            hit = index_TK.unique().numel()
            works = (
                ffn_work(blocks["dense"][0], tokens, 0),
                ffn_work(blocks["carved"][0], tokens, hit),
            )
            self.add(key, calls, works)

    @torch.no_grad()
    def decode(self, name: str, notation: str, dtype: str) -> None:
        """Decoding of one sequence and of eight, and a prefill of 256 tokens."""
        config = LlamaConfig(**SHAPES[name])
        shape = shape_of(notation, config)
        config.num_hidden_layers = round(config.num_hidden_layers / PARTS[name])
        config.vocab_size //= PARTS[name]
        key = {"shape": name, "notation": notation, "dtype": dtype}
        if not self.lacks({"kind": "prefill", **key}):
            return
        models = {"dense": prepared(AutoModelForCausalLM.from_config(config), dtype)}
        for code_name, (code, carved) in self.models(config, shape).items():
            models[code_name] = prepared(code.CMoELlamaForCausalLM(carved), dtype)
        dense = [layer.mlp for layer in models["dense"].model.layers]
        blocks = [layer.mlp for layer in models["carved"].model.layers]
        routed = shape.experts - shape.shared

        def works(**sizes: int) -> tuple[Any, Any]:
            rows = sizes["batch"] * sizes["tokens"]
            hits = [routed * (1 - (1 - shape.active / routed) ** rows)] * len(blocks)
            return (
                model_work(models["dense"], dense, hits, **sizes),
                model_work(models["carved"], blocks, hits, **sizes),
            )

        for batch in BATCHES:
            ids = torch.randint(config.vocab_size, (batch, CONTEXT))
            settle(lambda _, ids=ids: Decoder(models["carved"], ids, None)(0))
            calls: dict[str, Any] = {
                code_name: Decoder(model, ids, None) for code_name, model in models.items()
            }
            work = works(batch=batch, tokens=1, context=CONTEXT)
            self.add({"kind": "decode", **key, "tokens": batch}, calls, work)
        ids = torch.randint(config.vocab_size, (1, 2 * CONTEXT))
        prompts = {
            code_name: lambda turn, model=model: model(ids, use_cache=True, logits_to_keep=1)
            for code_name, model in models.items()
        }
        work = works(batch=1, tokens=ids.numel(), context=0)
        self.add({"kind": "prefill", **key, "tokens": ids.numel()}, prompts, work)


COLUMNS = [("ffn", tokens) for tokens in TOKENS]
COLUMNS += [("decode", batch) for batch in BATCHES] + [("prefill", 2 * CONTEXT)]


def cell(row: dict[str, Any] | None) -> str:
    """Format one ratio: before, after, and the roofline's."""
    if row is None:
        return ""
    before = f"{row['speedup_before']:.2f} → " if "speedup_before" in row else ""
    return f"{before}{row['speedup']:.2f} of {row['roofline_speedup']:.2f}"


def fill(rows: list[dict[str, Any]], table: Path) -> None:
    """Write the rows of a file of results/ from those that were measured."""
    found = {
        (row["dtype"], row["notation"], row["shape"], row["kind"], row["tokens"]): row
        for row in rows
    }
    lines = [
        [f"{name}, {dtype}, {notation}"]
        + [cell(found.get((dtype, notation, shape, *column))) for column in COLUMNS]
        for dtype in DTYPES
        for notation in NOTATIONS
        for shape, name in zip(PARTS, NAMES, strict=True)
    ]
    content = json.loads(table.read_text(encoding="utf-8"))
    content["rows"] = [line for line in lines if any(line[1:])]
    table.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


COLOURS = {"cmap": "RdBu", "vmin": -2, "vmax": 2, "aspect": "auto"}
"""Of a ratio's logarithm: a quarter of the dense speed to four times."""


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """The map: a field a type and notation, a line a shape, a column a number of tokens."""
    import matplotlib.pyplot as plt

    kinds = sorted({(row["dtype"], row["notation"]) for row in rows})
    shapes = [shape for shape in PARTS if any(row["shape"] == shape for row in rows)]
    labels = [f"FFN {tokens}" for tokens in TOKENS]
    labels += [f"decode {batch}" for batch in BATCHES] + ["prefill"]
    figure, fields = plt.subplots(
        len(kinds), 1, figsize=(8, 2.2 * len(kinds)), squeeze=False, layout="constrained"
    )
    for (dtype, notation), field in zip(kinds, fields[:, 0], strict=True):
        found = {
            (row["shape"], row["kind"], row["tokens"]): row
            for row in rows
            if (row["dtype"], row["notation"]) == (dtype, notation)
        }
        grid = [
            [found.get((shape, *column), {}).get("speedup", float("nan")) for column in COLUMNS]
            for shape in shapes
        ]
        field.imshow([[math.log2(it) for it in line] for line in grid], **COLOURS)
        for line, shape in enumerate(shapes):
            for place, column in enumerate(COLUMNS):
                if row := found.get((shape, *column)):
                    text = f"{row['speedup']:.2f} ({row['roofline_speedup']:.1f})"
                    ink = "white" if abs(math.log2(row["speedup"])) > 1.2 else "black"
                    field.text(place, line, text, ha="center", va="center", fontsize=7, color=ink)
        field.set_xticks(range(len(labels)), labels, fontsize=7)
        field.set_yticks(range(len(shapes)), shapes, fontsize=7)
        field.set_title(f"{notation}, {dtype}: times dense (roofline)", fontsize=8)
    figure.savefig(output, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="JSON; what it has is kept")
    parser.add_argument("--quick", action="store_true", help="two shapes, S1A1E8, few points")
    parser.add_argument("--shape", action="append", choices=PARTS)
    parser.add_argument("--notation", action="append", choices=NOTATIONS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--tokens", type=int, nargs="*", default=None)
    parser.add_argument("--ffn-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", metavar="COMMIT", help="time its modelling code as well")
    parser.add_argument("--fill", type=Path, metavar="TABLE", help="fill in its rows, only")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="draw what the file has, only")
    options = parser.parse_args()
    if options.fill or options.draw:
        rows = json.loads(options.output.read_text())["rows"]
        if options.fill:
            fill(rows, options.fill)
        if options.draw:
            draw(rows, options.draw)
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    quick = options.quick
    if options.tokens is None:
        options.tokens = (1, 16) if quick else TOKENS
    points = Map(options)
    for name in options.shape or (["smollm2-135m", "tinyllama-1.1b"] if quick else list(PARTS)):
        for dtype in options.dtype or (DTYPES[:2] if quick else DTYPES):
            for notation in options.notation or (["S1A1E8"] if quick else list(NOTATIONS)):
                points.ffn(name, notation, dtype)
                if not options.ffn_only:
                    points.decode(name, notation, dtype)
                points.save()


if __name__ == "__main__":
    main()
