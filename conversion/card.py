# SPDX-License-Identifier: Apache-2.0
"""The model card of a carved repository."""

from typing import Any

from huggingface_hub import ModelCardData

from cmoe_hf import CMoELlamaConfig

from .checkpoint import Source

_BODY = """\
# {title}

[{base}]({base_link}) carved into a sparse Mixture of Experts of shape **{notation}**: of
{experts} experts, {shared} shared ones always run and a router picks {active} of the other
{routed} for every token. {activation:.1%} of the FFN neurons run (FFN sparsity {sparsity:.1%}).
Carving rearranges the neurons of the dense model and drops none.{refitted}{split} No gradient
descent was used.

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

repo = "{title}"  # the Hub id or the folder of this repository
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repo)
```

`trust_remote_code=True` runs the two Python files of this repository. With `pip install cmoe-hf`
and `import cmoe_hf` it is not needed.

## How it was made

| | |
|---|---|
| method | CMoE, [arXiv 2502.04416](https://arxiv.org/abs/2502.04416), recipe `{recipe}` |
| source revision | {revision} |
| calibration | {tokens:,} tokens of `{calibration}` ({samples} windows of {length}), seed {seed} |
| neurons marked per token | {k_act} |
| software | cmoe-hf {cmoe_hf}, torch {torch}, transformers {transformers} |
| time | {seconds:.0f} s on {device}; carving pass {ratio:.2f} x the bare forward pass |

## What was measured

On the calibration tokens, with all earlier layers carved: error of the carved FFN's output
relative to the dense FFN's (norm of the difference over norm), share of the marks that the shared
expert holds, routed experts that always run, and the busiest and idlest routed expert's share of
tokens.

| layer | relative error | marks on shared | always run | busiest expert | idlest expert |
|---|---|---|---|---|---|
{rows}

Perplexity is not measured by the conversion: run `cmoe evaluate` on this repository with
`--baseline` and the dense model. Per-layer figures are in `conversion.json`.

## Licence

{licence}
"""

_SPLIT = """ In each layer
a number of the routed experts, listed below, always run: the others were better left to the router
on held-out calibration tokens."""

_REFITTED = " Their down projections were\nrefitted to the calibration text by least squares."


def model_card(source: Source, config: CMoELlamaConfig, report: dict[str, Any]) -> str:
    """Text of README.md: metadata block and body. `report` is the content of conversion.json."""
    licence = source.licence
    data = ModelCardData(
        base_model=source.name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cmoe", "moe", "mixture-of-experts", "sparse", "custom_code"],
        **licence,  # type: ignore[arg-type]
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + _BODY.format(
        **_shape(config),
        **_provenance(source, report),
        rows="\n".join(_row(index, layer) for index, layer in enumerate(report["layers"])),
        licence=_licence_sentence(licence),
    )


def _shape(config: CMoELlamaConfig) -> dict[str, Any]:
    return {
        "notation": config.notation,
        "shared": config.num_shared,
        "active": config.num_experts_per_tok,
        "routed": config.num_experts,
        "experts": config.num_shared + config.num_experts,
        "activation": config.activation_ratio,
        "sparsity": 1 - config.activation_ratio,
    }


def _provenance(source: Source, report: dict[str, Any]) -> dict[str, Any]:
    calibration, result = report["calibration"], report["result"]
    on_hub = source.revision is not None
    return {
        "title": f"{source.name.rpartition('/')[2]}-CMoE-{result['notation']}",
        "base": source.name,
        "base_link": f"https://huggingface.co/{source.name}" if on_hub else "#how-it-was-made",
        "recipe": report["settings"]["recipe"],
        "refitted": _REFITTED if report["recipe"]["refit"] else "",
        "split": _SPLIT if report["recipe"]["adaptive_split"] else "",
        "revision": source.revision or "a local folder, no revision known",
        "tokens": calibration["tokens"],
        "calibration": calibration["source"],
        "samples": calibration["samples"],
        "length": calibration["sequence_length"],
        "seed": report["settings"]["seed"],
        "k_act": report["settings"]["k_act"],
        **{name: report["versions"][name] for name in ("cmoe_hf", "torch", "transformers")},
        "seconds": result["seconds"],
        "device": report["device"],
        "ratio": result["carving_ratio"],
    }


def _row(index: int, layer: dict[str, Any]) -> str:
    loads = layer["expert_loads"]
    return (
        f"| {index} | {layer['relative_output_error']:.3f} | {layer['marks_on_shared']:.1%} "
        f"| {layer['pinned_experts']} | {max(loads):.1%} | {min(loads):.1%} |"
    )


def _licence_sentence(licence: dict[str, str]) -> str:
    if not licence:
        return "The source states no licence; its terms, whatever they are, apply to this model."
    name = licence.get("license_name") or licence["license"]
    return f"As the source: `{name}`."
