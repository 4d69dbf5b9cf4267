# SPDX-License-Identifier: Apache-2.0
"""The model card of a carved repository."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from cmoe_hf import CMoEConfig, CMoEHierarchicalConfig
from cmoe_hf.modeling_cmoe import TESTED

from ..carve.shape import active_parameters
from ..source.checkpoint import Source

CARD_FILE = "README.md"
ASSETS = Path(__file__).parent.parent / "assets"

_MEASURED = """\
On the calibration tokens, with all earlier layers carved: error of the carved FFN's output
relative to the dense FFN's (norm of the difference over norm), share of the marks that the shared
expert holds, routed experts that always run, and the busiest and idlest routed expert's share of
tokens.

| layer | relative error | marks on shared | always run | busiest expert | idlest expert |
|---|---|---|---|---|---|
{rows}"""

_MEASURED_PARENTS = """\
On the calibration tokens, with all earlier layers carved: error of the layer's output relative to
the source's (norm of the difference over norm), how many calibration tokens its rarest and its
busiest expert saw, and which experts saw too few and are kept whole.

| layer | relative error | fewest tokens | most tokens | kept whole |
|---|---|---|---|---|
{rows}"""

_PARENTS = """
The source is a mixture of {parents} experts itself, of which {picked} run for a token. Its router
is kept, each of its experts is carved, and the figures above are those within one of them{flat}. Of
those kept whole, which are listed below if there are any, everything runs.
"""

_FLAT = """ on
average: what was carved from the {picked} experts of a token competes for the same places"""

_SPLIT = """ In each layer
a number of the routed experts, listed below, always run: the others were better left to the router
on held-out calibration tokens."""

_DENSE = " Of the decoder's layers {} stay dense."
_REFITTED = " Their down projections were\nrefitted to the calibration text by least squares."


_HEADLINE = """\
| perplexity | FFN neurons run for a token | parameters run for a token |
|---|---|---|
| {perplexity} | {activation:.1%} | {active} of {parameters} |"""
_UNMEASURED = "not measured yet: `cmoe evaluate --baseline DENSE --card`"

HEADLINE, FIGURES, CODE = "headline", "cmoe report", "remote code"
"""Sections that can be replaced: comments around them bear these names."""

_NO_LICENCE = "The source states no licence; its terms, whatever they are, apply to this model."
_UNTRAINED = "No gradient\ndescent was used."
_RANKED = "Nothing but the\nrouters descended a gradient, each by itself."
_POLISHED = """\
Each layer was then trained by itself towards the dense one's output on these tokens, without labels
and without gradients between layers."""
_TRAINED = "Afterwards the\nmodel was [fine-tuned](#recovery)."


_REFITTED_ROUTER = """ Its routers are not those described above: they
were replaced by linear ones, fitted to a calibration text."""


def template(name: str) -> str:
    """Return a text of `assets`, whose fields are in braces."""
    return (ASSETS / name).read_text(encoding="utf-8")


def recovered_card(card: str, report: dict[str, Any], code: Mapping[str, str]) -> str:
    """The card of a carved repository after a recovery. `report` is the content of recovery.json
    and `code` the hashes of the Python files.

    Expects a card by `model_card`; in another one, the section is added at the end. Results and
    figures of the model before are left out.
    """
    tuning, result = report["tuning"], report["result"]
    rows = [("carved", result["perplexity_before"], result["perplexity_after"])]
    if result["perplexity_after_without_bias"] is not None:
        rows.append(("carved, balance biases zero", None, result["perplexity_after_without_bias"]))
    if report["control"] is not None:
        dense = (result["control_before"], result["control_after"])
        rows.append((f"dense `{report['control']}`, tuned by the same recipe", *dense))
    section = template("card-recovery.md").format(
        steps=result["steps"],
        tokens=result["training_tokens"],
        training=report["training"],
        rank=tuning["rank"],
        rate=tuning["learning_rate"],
        teacher=f", distilled from `{report['teacher']}`" if report["teacher"] else "",
        text=report["text"],
        rows="\n".join(
            f"| {name} | {'' if before is None else f'{before:.2f}'} | {after:.2f} |"
            for name, before, after in rows
        ),
    )
    parsed = parsed_card(card)
    parsed.data.eval_results = None
    card = without_section(str(parsed), FIGURES)
    perplexity = f"{result['perplexity_after']:.2f} on `{report['text']}`"
    card = with_perplexity(card, f"{perplexity}, {result['perplexity_before']:.2f} before recovery")
    card = card.replace(_UNTRAINED, _TRAINED)
    for said in (_RANKED, _POLISHED):
        card = card.replace(said, f"{said} {_TRAINED}")
    card = renewed_card(card, code)
    return _before_licence(card, section)


def native_card(card: str, architecture: str, difference: float, *, refitted: bool) -> str:
    """The card of a model exported to a stock architecture."""
    parsed = parsed_card(card)
    parsed.data.eval_results = None
    parsed.data.tags = [tag for tag in parsed.data.get("tags") or [] if tag != "custom_code"]
    card = without_section(without_section(str(parsed), FIGURES), CODE)
    section = template("card-native.md").format(
        architecture=architecture,
        difference=difference,
        refitted=_REFITTED_ROUTER if refitted else "",
    )
    card = with_perplexity(card, _UNMEASURED)
    return _before_licence(card.replace(", trust_remote_code=True", ""), section)


def parsed_card(text: str) -> Any:
    """A card with its metadata as `data`, whose fields the library's own annotation lacks."""
    return ModelCard(text, ignore_metadata_errors=True)


def _before_licence(card: str, section: str) -> str:
    body, licence, rest = card.rpartition("## Licence")
    return body + section + licence + rest if licence else f"{card.rstrip()}\n\n{section}"


def marked(name: str) -> tuple[str, str]:
    """The comments around a section that can be replaced."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def _around(card: str, name: str) -> tuple[str, str] | None:
    """What is before a section and after it; None if the card does not have it."""
    begin, end = marked(name)
    before, found, rest = card.partition(begin)
    _, closed, after = rest.partition(end)
    return (before, after) if found and closed else None


def with_section(card: str, name: str, section: str) -> str:
    """The card with this section, in place of an older one or at the end."""
    section = "\n\n".join([marked(name)[0], section, marked(name)[1]])
    around = _around(card, name)
    return section.join(around) if around else card.rstrip("\n") + f"\n\n{section}\n"


def without_section(card: str, name: str) -> str:
    """The card without this section."""
    around = _around(card, name)
    return around[0].rstrip("\n") + "\n" + around[1] if around else card


def with_perplexity(card: str, told: str) -> str:
    """The card with another perplexity in its first table, if it has that."""
    begin, end = map(re.escape, marked(HEADLINE))
    table = rf"({begin}.*\n)\| [^|]* (\|[^\n]*\s*{end})"
    return re.sub(table, lambda found: f"{found[1]}| {told} {found[2]}", card, flags=re.DOTALL)


def code_section(code: Mapping[str, str]) -> str:
    """What the Python files are, their hashes, and what they were tested with."""
    rows = "\n".join(f"| `{name}` | `{code[name]}` |" for name in code)
    return template("card-code.md").format(rows=rows, lowest=TESTED[0], newest=TESTED[1])


def renewed_card(card: str, code: Mapping[str, str]) -> str:
    """The card with the hashes of other Python files, if it states any."""
    return with_section(card, CODE, code_section(code)) if marked(CODE)[0] in card else card


def stated_hashes(card: str) -> dict[str, str]:
    """File name to the SHA-256 that a card states for it."""
    return dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", card, flags=re.MULTILINE))


def stated(card: str, *, licence: str | None, base_model: str | None) -> str:
    """The card with what the publisher knows and the source's folder did not say."""
    parsed = parsed_card(card)
    if base_model is not None:
        parsed.data.base_model = base_model
    text = str(parsed)
    if licence is not None:
        parsed.data.license = licence
        text = str(parsed).replace(_NO_LICENCE, f"As stated by the publisher: `{licence}`.")
    return text


def model_card(
    source: Source,
    config: CMoEConfig,
    report: dict[str, Any],
    code: Mapping[str, str],
    licence: dict[str, Any],
) -> str:
    """Text of README.md: metadata block and body. `report` is the content of conversion.json,
    `code` the hashes of the Python files and `licence` the fields of the source's card."""
    data = ModelCardData(
        base_model=source.name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cmoe", "moe", "mixture-of-experts", "sparse", "custom_code"],
        **licence,
    )
    routed, kept = config.num_experts // config.num_parents, config.dense_layers
    headline = _HEADLINE.format(
        perplexity=_UNMEASURED,
        activation=config.activation_ratio,
        active=in_words(active_parameters(source, config)),
        parameters=in_words(source.parameters),
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + template("card.md").format(
        headline=with_section("", HEADLINE, headline).strip(),
        code=with_section("", CODE, code_section(code)).strip(),
        parents=_parents(config) if isinstance(config, CMoEHierarchicalConfig) else "",
        notation=config.notation,
        dense=_DENSE.format(", ".join(map(str, kept))) if kept else "",
        shared=config.num_shared,
        active=config.num_experts_per_tok // config.num_parents_per_tok,
        routed=routed,
        experts=config.num_shared + routed,
        sparsity=1 - config.activation_ratio,
        **_provenance(source, report),
        measured=_measured(config, report["layers"]),
        licence=_licence_sentence(licence),
    )


def in_words(count: int) -> str:
    """A number of parameters, to three digits: 135 M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return str(count)


def _parents(config: CMoEHierarchicalConfig) -> str:
    picked = config.num_parents_per_tok
    flat = _FLAT.format(picked=picked) if config.flat_routing else ""
    return _PARENTS.format(parents=config.num_parents, picked=picked, flat=flat)


def _provenance(source: Source, report: dict[str, Any]) -> dict[str, Any]:
    calibration, result = report["calibration"], report["result"]
    polished = any(layer.get("polish_errors") for layer in report["layers"])
    ranks = report["recipe"]["router_epochs"] and source.architecture.router is None
    on_hub = source.revision is not None
    return {
        "title": f"{source.name.rpartition('/')[2]}-CMoE-{result['notation']}",
        "base": source.name,
        "base_link": f"https://huggingface.co/{source.name}" if on_hub else "#how-it-was-made",
        "recipe": report["settings"]["recipe"],
        "refitted": _REFITTED if report["recipe"]["refit"] else "",
        "untrained": _POLISHED if polished else _RANKED if ranks else _UNTRAINED,
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


def _measured(config: CMoEConfig, layers: list[dict[str, Any]]) -> str:
    rows = []
    for index, layer in enumerate(layers):
        row = f"| {index} | {layer['relative_output_error']:.3f} "
        if layer.get("dense"):
            rows.append(f"| {index} | dense | | | | |")
        elif isinstance(config, CMoEHierarchicalConfig):
            counts = layer["tokens_of_parents"]
            kept = ", ".join(map(str, layer["kept_parents"])) or "none"
            rows.append(f"{row}| {min(counts):,} | {max(counts):,} | {kept} |")
        else:
            loads = layer["expert_loads"]
            rows.append(
                f"{row}| {layer['marks_on_shared']:.1%} | {layer['pinned_experts']} "
                f"| {max(loads):.1%} | {min(loads):.1%} |"
            )
    table = _MEASURED_PARENTS if isinstance(config, CMoEHierarchicalConfig) else _MEASURED
    return table.format(rows="\n".join(rows))


def _licence_sentence(licence: dict[str, Any]) -> str:
    if not licence:
        return _NO_LICENCE
    name = licence.get("license_name") or licence["license"]
    return f"As the source: `{name}`."
