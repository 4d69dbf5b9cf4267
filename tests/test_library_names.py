# SPDX-License-Identifier: Apache-2.0
"""What the library renames: the model works or refuses, it never computes another thing."""

import importlib
import inspect
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from transformers import DynamicCache, masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

import cmoe_hf
from cmoe_hf import modeling_cmoe
from cmoe_hf.modeling_cmoe import CACHE_NAMES, TESTED, CMoELlamaForCausalLM

pytestmark = pytest.mark.library

CODE = Path(cmoe_hf.__file__).parent
FIELDS = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 16,
}
LIBRARY = {
    "layer": (modeling_cmoe.llama.LlamaDecoderLayer, "forward"),
    "mask": (masking_utils, "create_causal_mask"),
}


def renamed(function, names):
    """A stand-in for the next release: other keywords, and what is unknown vanishes unread."""
    signature = inspect.signature(function)
    old_names = {new: old for old, new in names.items()}

    def stand_in(*arguments, **keywords):
        read = {old_names.get(name, name): it for name, it in keywords.items() if name not in names}
        return function(*arguments, **read)

    parameters = [
        it.replace(name=names.get(name, name)) for name, it in signature.parameters.items()
    ]
    stand_in.__signature__ = signature.replace(parameters=parameters)
    stand_in.__qualname__ = function.__qualname__
    return stand_in


@pytest.fixture
def under_another_library(monkeypatch):
    """Import the model's code where parts of the library have other names for some keywords."""

    def load(changes):
        for part, names in changes.items():
            owner, name = LIBRARY[part]
            monkeypatch.setattr(owner, name, renamed(getattr(owner, name), names))
        package = types.ModuleType("standin")
        package.__path__ = [str(CODE)]
        monkeypatch.setitem(sys.modules, "standin", package)
        for module in ("configuration_cmoe", "modeling_cmoe"):
            monkeypatch.delitem(sys.modules, f"standin.{module}", raising=False)
        return importlib.import_module("standin.modeling_cmoe")

    registered = ALL_EXPERTS_FUNCTIONS["cmoe"]
    yield load
    for module in ("configuration_cmoe", "modeling_cmoe"):
        sys.modules.pop(f"standin.{module}", None)
    ALL_EXPERTS_FUNCTIONS.register("cmoe", registered)


def random_model(module=modeling_cmoe, **changes):
    config = sys.modules[module.__name__.replace("modeling", "configuration")]
    model = module.CMoELlamaForCausalLM(config.CMoELlamaConfig(**{**FIELDS, **changes})).eval()
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 or ".mlp." in name:
            tensor.normal_(std=0.3)
    return model


@torch.no_grad()
def generate_both_ways(model):
    """Greedy tokens with the cache, and without it."""
    ids = torch.arange(2, 22)[None]
    cached = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
    )
    for _ in range(16):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return cached, ids


INSTALLED = next(
    name
    for name in CACHE_NAMES
    if name in inspect.signature(masking_utils.create_causal_mask).parameters
)
OTHER = {"cache": "past_key_values", "past_key_values": "cache"}[INSTALLED]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer": {INSTALLED: OTHER}, "mask": {INSTALLED: OTHER}},
        {"layer": {INSTALLED: OTHER}},
        {"mask": {INSTALLED: OTHER}},
        {"layer": {INSTALLED: "layer_past"}},
    ],
)
def test_known_names_work_in_every_mixture(under_another_library, changes):
    cached, uncached = generate_both_ways(random_model(under_another_library(changes)))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"layer": {INSTALLED: "kept"}}, "the cache"),
        ({"mask": {INSTALLED: "kept"}}, "the cache"),
        ({"layer": {"attention_mask": "mask"}}, "attention_mask"),
        ({"layer": {"position_embeddings": "rotary"}}, "position_embeddings"),
        ({"layer": {"position_ids": "positions"}}, "position_ids"),
        ({"mask": {"attention_mask": "padding"}}, "attention_mask"),
        ({"mask": {"position_ids": "positions"}}, "position_ids"),
    ],
)
def test_unknown_names_are_refused_when_the_model_is_made(under_another_library, changes, lost):
    module = under_another_library(changes)
    with pytest.raises(ImportError, match=rf"another name for {lost} .* cmoe upgrade") as refusal:
        random_model(module)
    assert len(str(refusal.value).splitlines()) == 1
    assert f"{TESTED[0]} to {TESTED[1]}" in str(refusal.value)


def test_the_cache_goes_by_either_name_but_not_by_two():
    model, ids = random_model(), torch.arange(2, 22)[None]
    expected = model(ids).logits[:, 12:]
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        model(ids[:, :12], **{name: cache}, use_cache=True)
        assert cache.get_seq_length() == 12
        logits = model(ids[:, 12:], **{name: cache}, use_cache=True).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(TypeError, match="two caches"):
        model(ids, cache=cache, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("part", ["whole", "decoder"])
def test_a_keyword_that_nobody_reads_is_refused(part):
    whole, ids = random_model(), torch.arange(2, 22)[None]
    model = whole if part == "whole" else whole.model
    with pytest.raises(TypeError, match="kept_keys_and_values, which nothing in this model reads"):
        model(ids, kept_keys_and_values=DynamicCache(config=whole.config))
    expected = model(ids)[0]
    harmless = {"nothing": None, "token_type_ids": torch.zeros_like(ids), "num_items_in_batch": 7}
    assert torch.equal(model(ids, **harmless)[0], expected)


def test_nothing_deprecated_is_used(make_dense, carve):
    for family in FAMILIES:
        model = transformers.AutoModelForCausalLM.from_pretrained(carve(make_dense(family)))
        logging.warning_once.cache_clear()
        with warnings.catch_warnings(), CaptureLogger(logging.get_logger("transformers")) as log:
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            generate_both_ways(model)
        assert "deprecated" not in log.out


def test_a_library_newer_than_the_tested_ones_is_named_once(monkeypatch):
    def said():
        logging.warning_once.cache_clear()
        with CaptureLogger(modeling_cmoe.logger) as log:
            for _ in range(2):
                random_model()
        return log.out

    assert "cmoe verify" not in said()
    monkeypatch.setattr(modeling_cmoe.transformers, "__version__", "5.99.0.dev0")
    assert said().count(f"{TESTED[0]} to {TESTED[1]}, not with 5.99.0.dev0") == 1


def test_every_family_takes_both_names():
    for *_, causal in cmoe_hf.FAMILIES:
        for kind in (causal, causal.model_class):
            assert {"cache", "past_key_values"} <= set(inspect.signature(kind.forward).parameters)
    assert issubclass(CMoELlamaForCausalLM, transformers.GenerationMixin)
