# SPDX-License-Identifier: Apache-2.0
"""The model card of a carved repository."""

import re
import tomllib
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
TEXTS = tomllib.loads((ASSETS / "card.toml").read_text(encoding="utf-8"))
HEADLINE, FIGURES, CODE = "headline", "cmoe report", "remote code"
"""Sections that can be replaced, between comments of these names."""


def recovered_card(card: str, report: dict[str, Any], code: Mapping[str, str]) -> str:
    """Return the card of a carved repository after a recovery, without older results and figures.

    `report` is the content of recovery.json, and `code` has the SHA-256 of the Python files.
    """
    result = report["result"]
    rows = [("carved", f"{result['perplexity_before']:.2f}", result["perplexity_after"])]
    tuning = report["tuning"]
    if result["teacher_perplexity"] is not None:
        rows.append(("dense, untouched", "", result["teacher_perplexity"]))
    section = TEXTS["recovery"].format(
        **report,
        method=TEXTS[f"trained_{tuning['method']}"].format(**tuning),
        distilled=f", distilled from `{report['teacher']}`" if report["teacher"] else "",
        rows="\n".join(f"| {name} | {before} | {after:.2f} |" for name, before, after in rows),
    )
    card = without_section(_without_results(card), FIGURES)
    perplexity = f"{result['perplexity_after']:.2f} on `{report['text']}`"
    card = with_perplexity(card, f"{perplexity}, {result['perplexity_before']:.2f} before recovery")
    card = card.replace(TEXTS["untrained"], TEXTS["trained"])
    for sentence in (TEXTS["ranked"], TEXTS["polished"]):
        card = card.replace(sentence, f"{sentence} {TEXTS['trained']}")
    return _before_licence(renewed_card(card, code), section)


def native_card(card: str, architecture: str, difference: float) -> str:
    """Return the card of a model exported to a stock architecture."""
    card = without_section(_without_results(card, "custom_code"), FIGURES)
    section = TEXTS["native"].format(architecture=architecture, difference=difference)
    card = with_perplexity(without_section(card, CODE), TEXTS["unmeasured"])
    return _before_licence(card.replace(", trust_remote_code=True", ""), section)


def _without_results(card: str, *tags: str) -> str:
    parsed = parsed_card(card)
    parsed.data.eval_results = None
    if tags:
        parsed.data.tags = [tag for tag in parsed.data.get("tags") or [] if tag not in tags]
    return str(parsed)


def parsed_card(text: str) -> Any:
    """Return a card with its metadata as `data`, whose fields the library does not annotate."""
    return ModelCard(text, ignore_metadata_errors=True)


def _before_licence(card: str, section: str) -> str:
    body, licence, rest = card.rpartition("## Licence")
    return body + section + licence + rest if licence else f"{card.rstrip()}\n\n{section}"


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def _pattern(name: str) -> str:
    return ".*?".join(map(re.escape, _markers(name)))


def with_section(card: str, name: str, section: str) -> str:
    """Return the card with this section, in place of an older one or at the end."""
    begin, end = _markers(name)
    section = f"{begin}\n\n{section}\n\n{end}"
    replaced, found = re.subn(_pattern(name), lambda _: section, card, count=1, flags=re.DOTALL)
    return replaced if found else card.rstrip("\n") + f"\n\n{section}\n"


def without_section(card: str, name: str) -> str:
    """Return the card without this section."""
    return re.sub(rf"\n*{_pattern(name)}", "\n", card, count=1, flags=re.DOTALL)


def with_perplexity(card: str, perplexity: str) -> str:
    """Return the card with another perplexity in its first table, if it has that."""
    begin, end = map(re.escape, _markers(HEADLINE))
    table = rf"({begin}.*\n)\| [^|]* (\|[^\n]*\s*{end})"
    return re.sub(
        table, lambda found: f"{found[1]}| {perplexity} {found[2]}", card, flags=re.DOTALL
    )


def code_section(code: Mapping[str, str]) -> str:
    """Return what the Python files are, their hashes, and what they were tested with."""
    rows = "\n".join(f"| `{name}` | `{code[name]}` |" for name in code)
    return TEXTS["code"].format(rows=rows, lowest=TESTED[0], newest=TESTED[1])


def renewed_card(card: str, code: Mapping[str, str]) -> str:
    """Return the card with the hashes of other Python files, if it states any."""
    found = re.search(_pattern(CODE), card, flags=re.DOTALL)
    return with_section(card, CODE, code_section(code)) if found else card


def stated_hashes(card: str) -> dict[str, str]:
    """Return the SHA-256 that a card states for each file, by name."""
    return dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", card, flags=re.MULTILINE))


def stated(card: str, *, licence: str | None, base_model: str | None) -> str:
    """Return the card with what the publisher knows and the source's folder did not say."""
    parsed = parsed_card(card)
    if base_model is not None:
        parsed.data.base_model = base_model
    text = str(parsed)
    if licence is not None:
        parsed.data.license = licence
        text = str(parsed).replace(TEXTS["no_licence"], f"As stated by the publisher: `{licence}`.")
    return text


def model_card(
    source: Source,
    config: CMoEConfig,
    report: dict[str, Any],
    code: Mapping[str, str],
    licence: dict[str, Any],
) -> str:
    """Return the text of README.md: metadata block and body.

    `report` is the content of conversion.json, `code` the hashes of the Python files and `licence`
    the fields of the source's card.
    """
    data = ModelCardData(
        base_model=source.name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cmoe", "moe", "mixture-of-experts", "sparse", "custom_code"],
        **licence,
    )
    recipe, on_hub = report["recipe"], source.revision is not None
    routed, kept = config.num_experts // config.num_parents, config.dense_layers
    polished = any(layer.get("polish_errors") for layer in report["layers"])
    ranked = recipe["router_epochs"] and source.architecture.router is None
    headline = TEXTS["headline"].format(
        perplexity=TEXTS["unmeasured"],
        activation=config.activation_ratio,
        active=in_words(active_parameters(source, config)),
        parameters=in_words(source.parameters),
    )
    terms = [licence[key] for key in ("license_name", "license", "license_link") if key in licence]
    return f"---\n{data.to_yaml()}\n---\n\n" + TEXTS["body"].format(
        **report,
        title=f"{source.name.rpartition('/')[2]}-CMoE-{report['result']['notation']}",
        link=f"https://huggingface.co/{source.name}" if on_hub else "#how-it-was-made",
        revision=source.revision or "a local folder, no revision known",
        headline=with_section("", HEADLINE, headline).strip(),
        code=with_section("", CODE, code_section(code)).strip(),
        parents=_parents(config) if isinstance(config, CMoEHierarchicalConfig) else "",
        notation=config.notation,
        dense=TEXTS["dense"].format(", ".join(map(str, kept))) if kept else "",
        refitted=TEXTS["refitted"] if recipe["refit"] else "",
        split=TEXTS["split"] if recipe["adaptive_split"] else "",
        untrained=TEXTS["polished" if polished else "ranked" if ranked else "untrained"],
        shared=config.num_shared,
        active=config.num_experts_per_tok // config.num_parents_per_tok,
        routed=routed,
        experts=config.num_shared + routed,
        sparsity=1 - config.activation_ratio,
        measured=_measured(config, report["layers"]),
        licence=f"As the source: `{terms[0]}`." if terms else TEXTS["no_licence"],
    )


def in_words(count: int) -> str:
    """Return a number of parameters, to three digits: 135 M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return str(count)


def _parents(config: CMoEHierarchicalConfig) -> str:
    picked = config.num_parents_per_tok
    flat = TEXTS["flat"].format(picked=picked) if config.flat_routing else ""
    return TEXTS["parents"].format(parents=config.num_parents, picked=picked, flat=flat)


def _measured(config: CMoEConfig, layers: list[dict[str, Any]]) -> str:
    rows, of_experts = [], isinstance(config, CMoEHierarchicalConfig)
    for index, layer in enumerate(layers):
        row = f"| {index} | {layer['relative_output_error']:.3f} "
        if layer.get("dense"):
            rows.append(f"| {index} | dense | | | | |")
        elif of_experts:
            counts = layer["tokens_of_parents"]
            kept = ", ".join(map(str, layer["kept_parents"])) or "none"
            rows.append(f"{row}| {min(counts):,} | {max(counts):,} | {kept} |")
        else:
            loads = layer["expert_loads"]
            rows.append(
                f"{row}| {layer['marks_on_shared']:.1%} | {layer['pinned_experts']} "
                f"| {max(loads):.1%} | {min(loads):.1%} |"
            )
    return TEXTS["measured_parents" if of_experts else "measured"].format(rows="\n".join(rows))
