# SPDX-License-Identifier: Apache-2.0
"""Families besides Llama: what is theirs alone is in the right place."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, relatives_last
from refusal import refused
from test_bad_input import run
from transformers import AutoModelForCausalLM

import cmoe_hf
from cmoe_hf.conversion.source.architectures import ARCHITECTURES
from cmoe_hf.conversion.source.checkpoint import open_source
from cmoe_hf.conversion.source.library import AttentionHalf

pytestmark = pytest.mark.library

OTHERS = [family for family, (kind, _) in FAMILIES.items() if kind.model_type != "llama"]
SLIDING = [family for family in OTHERS if "sliding" in family]
ALONE = ["llama-2", "mistral-sliding", "qwen3-moe", "pythia"]

WITHOUT_PACKAGE = """
import sys, traceback
sys.modules["cmoe_hf"] = None  # any import of it fails
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
ids = torch.arange(2, 66).view(2, 32)

def logits(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert model.config._experts_implementation == "cmoe"
    with torch.no_grad():
        found = model.eval()(ids).logits
        base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        assert torch.equal(model.lm_head(base(ids).last_hidden_state), found)
    return model, found

for folder in sys.argv[1:]:
    try:
        model, first = logits(folder + "/carved")
        model.save_pretrained(folder + "/again")
        AutoTokenizer.from_pretrained(folder + "/carved").save_pretrained(folder + "/again")
        model, second = logits(folder + "/again")
        model.save_pretrained(folder + "/third")
        torch.save([first, second], folder + "/logits.pt")
    except Exception:
        print(folder, traceback.format_exc(), file=sys.stderr)
"""


@pytest.fixture(
    scope="module",
    params=[ALONE, pytest.param(sorted({*OTHERS} - {*ALONE}), marks=pytest.mark.thorough)],
    ids=["some", "others"],
)
def alone(request, make_dense, carve, tmp_path_factory):
    """A folder a family: `carved`, and what a process without this package made of it.

    One process for all: to start costs more than to load. It printed the errors.
    """
    root = tmp_path_factory.mktemp("alone")
    for family in request.param:
        shutil.copytree(carve(make_dense(family)), root / family / "carved")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, *map(str, root.iterdir())],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return root, done.stderr


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options).eval()


def test_every_family_has_a_row_and_three_classes():
    rows = {row.cmoe_config: row.cmoe_model for row in ARCHITECTURES.values()}
    assert rows == {config: causal for config, _, causal in cmoe_hf.FAMILIES}
    assert ARCHITECTURES.keys() == {kind.model_type for kind, _ in FAMILIES.values()}


def test_it_loads_saves_and_loads_again_where_this_package_is_not(alone, tensors):
    root, errors = alone
    assert not errors or "Traceback" not in errors, errors
    for family in root.iterdir():
        if family.name != "modules":
            check_loaded(family, tensors)


def check_loaded(family, tensors):
    """The model of a family is the same, with the package and without it, saved again or not."""
    carved, again, third = (family / name for name in ("carved", "again", "third"))
    loaded = torch.load(family / "logits.pt")
    for folder in (third, carved):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(model).__module__ == "cmoe_hf.modeling_cmoe"
        with torch.no_grad():
            loaded.append(model(torch.arange(2, 66).view(2, 32)).logits)
    for logits in loaded:
        # Not bit for bit: where a file's tensors lie in memory can change the BLAS kernel.
        torch.testing.assert_close(logits, loaded[0], atol=1e-5, rtol=1e-5)
    before, after = tensors(carved), tensors(third)
    assert before.keys() - after.keys() <= {"lm_head.weight"} and after.keys() <= before.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    auto_map = json.loads((again / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for name in ("configuration_cmoe.py", "modeling_cmoe.py"):
        assert (third / name).read_bytes() == (carved / name).read_bytes()


@pytest.mark.parametrize("family", relatives_last(["llama-2", *OTHERS]))
def test_generation_with_a_cache_equals_decoding_without_one(make_dense, carve, family):
    model = load(carve(make_dense(family)))
    ids = torch.arange(2, 42).view(2, 20)
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "eos_token_id": None}
    found = [
        model.generate(
            ids, attention_mask=torch.ones_like(ids), **options, cache_implementation=cache
        )
        for cache in ("dynamic", "static")
    ]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found[0], ids) and torch.equal(found[1], ids)


@pytest.mark.parametrize("family", relatives_last(SLIDING))
def test_a_sliding_window_is_felt(make_dense, carve, token_ids, family):
    """Or the next tests could not fail."""
    narrow, wide = (
        load(make_dense(family, sliding_window=window))(token_ids).logits for window in (16, 64)
    )
    assert torch.allclose(narrow[:, :16], wide[:, :16], atol=1e-5)
    assert not torch.allclose(narrow[:, 17:], wide[:, 17:], atol=1e-2)


@pytest.mark.parametrize("family", relatives_last(OTHERS))
def test_calibration_sees_what_the_dense_model_computes(make_dense, token_ids, family):
    folder = make_dense(family)
    model, source = load(folder), open_source(folder)
    seen, entering = [], []
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: entering.append(inputs[0]))
        layer.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(token_ids, use_cache=False)
        length, device = token_ids.shape[1], torch.device("cpu")
        attention = AttentionHalf(source.architecture, source.config, length, device)
        for index in range(2):
            tensors = source.read_layer(index)
            rest = {name: it for name, it in tensors.items() if not name.startswith("mlp.")}
            attention.load(index, rest)
            _, x_WLH = attention(entering[index])
            torch.testing.assert_close(x_WLH, seen[index], atol=1e-5, rtol=1e-5)


def test_models_with_other_parts_inside_are_named(dense_copy, no_leftovers, edit_config):
    edit_config(
        dense_copy,
        model_type="llava",
        architectures=["LlavaForConditionalGeneration"],
        text_config={"model_type": "llama"},
    )
    refused(
        run(dense_copy, no_leftovers),
        2,
        "'llava'",
        "a llama inside (text_config)",
        "save the language model by itself",
    )


def test_an_unknown_family_is_told_what_a_row_would_need(dense_copy, no_leftovers, edit_config):
    edit_config(dense_copy, model_type="gemma", architectures=["GemmaForCausalLM"])
    refused(
        run(dense_copy, no_leftovers),
        2,
        "'gemma'",
        f"Supported model types: {', '.join(sorted(ARCHITECTURES))}",
        "mlp.down_proj (64, 96)",
        "CONTRIBUTING.md",
    )
