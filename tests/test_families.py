# SPDX-License-Identifier: Apache-2.0
"""Families besides Llama: what is theirs alone is in the right place, in every decoder."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from families import DECODERS, FAMILIES, MISSING, decoders, relatives_last
from refusal import refused
from test_bad_input import run
from transformers import AutoModelForCausalLM

from cmoe_hf.conversion.folder.remote_code import REMOTE_CODE
from cmoe_hf.conversion.source.architectures import TESTED
from cmoe_hf.conversion.source.checkpoint import open_source, outside
from cmoe_hf.conversion.source.library import meta_model
from cmoe_hf.conversion.source.walk import LayerWalk

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
        own = model.base_model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, own)
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
    params=[
        ALONE,
        pytest.param(sorted({*OTHERS} - {*ALONE}), marks=pytest.mark.thorough),
        [name for name in DECODERS if name not in MISSING],
    ],
    ids=["some", "others", "decoders"],
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
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(root / "modules"),
            "PYTHONPATH": str(Path(transformers.__file__).parents[1]),  # the version under test
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    return root, done.stderr


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options).eval()


def test_every_family_here_counts_as_tested():
    assert {*TESTED} == {kind.model_type for kind, _ in FAMILIES.values()} | DECODERS.keys()


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
        error = (logits - loaded[0]).abs().max().item()
        assert error < 1e-4, family.name
    before, after = tensors(carved), tensors(third)
    assert before.keys() - after.keys() <= {"lm_head.weight"} and after.keys() <= before.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    auto_map = json.loads((again / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for name in REMOTE_CODE:
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


@torch.no_grad()
@pytest.mark.parametrize("family", [*relatives_last(OTHERS), *decoders()])
def test_calibration_sees_what_the_dense_model_computes(make_dense, token_ids, family):
    folder = make_dense(family)
    model, source = load(folder), open_source(folder)
    architecture, seen, entering, leaving = source.architecture, [], [], []
    place = architecture.ffn.place
    for layer in model.base_model.get_submodule(architecture.layers):
        part = layer.get_submodule(place.module)
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer.register_forward_pre_hook(
            lambda _, args, named: entering.append([*args, named.get("hidden_states")][0]),
            with_kwargs=True,
        )
        layer.register_forward_hook(
            lambda _, args, out: leaving.append(out if torch.is_tensor(out) else out[0])
        )
    model(token_ids, use_cache=False)
    walk = LayerWalk(meta_model(architecture.dense_model, source.config), torch.device("cpu"))
    walk.load_rest(source.read(outside(architecture.layer_prefix, source.tensors)))
    is_dense = architecture.router is None
    read = partial(source.read_layer, without_experts=not is_dense)
    walk.record(*token_ids.shape)
    walk.record(1, token_ids.shape[1])
    torch.testing.assert_close(walk.embed(token_ids), entering[0], atol=1e-5, rtol=1e-5)
    for index in range(2):
        walk.load(index, {key: it.float() for key, it in read(index).items()})
        if is_dense:
            out_BLH = walk(entering[index])
            torch.testing.assert_close(out_BLH, leaving[index], atol=1e-5, rtol=1e-5)
        walk.replace_ffn(place)
        _, x_TH = walk.ffn_input(entering[index])
        walk.release()
        torch.testing.assert_close(x_TH, seen[index].flatten(0, -2), atol=1e-5, rtol=1e-5)


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
        "Save the language model by itself",
    )


@pytest.mark.parametrize(
    "fields, phrase",
    [
        ({"model_type": "nonesuch"}, "this transformers has no causal language model of that type"),
        ({"model_type": "gpt_oss", "num_experts_per_tok": 2}, "for itself (num_experts_per_tok)"),
        ({"model_type": "cmoe_llama"}, "it is carved already"),
    ],
    ids=["unknown", "moe", "carved"],
)
def test_what_cannot_be_carved_is_named(dense_copy, no_leftovers, edit_config, fields, phrase):
    edit_config(dense_copy, **fields)
    refused(run(dense_copy, no_leftovers), 2, repr(fields["model_type"]), phrase)


def test_an_ffn_of_another_formula_is_refused(make_dense, no_leftovers):
    """Its activation has parameters."""
    answer = run(make_dense("apertus"), no_leftovers)
    refused(answer, 2, "a apertus: layer 0", "mlp (up_proj, down_proj) compute something else")
