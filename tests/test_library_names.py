# SPDX-License-Identifier: Apache-2.0
"""Names of the library's cache, what it deprecates, and releases newer than those tested."""

import inspect
import warnings

import pytest
import torch
import transformers
from families import FAMILIES, RELATIVES
from transformers import DynamicCache
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from cmoe_hf import modeling_cmoe
from cmoe_hf.modeling_cmoe import TESTED

pytestmark = pytest.mark.library


@pytest.fixture(params=sorted(FAMILIES.keys() - RELATIVES))
def model(make_dense, carve, request):
    folder = carve(make_dense(request.param))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def generate_both_ways(model):
    """Greedy tokens with the cache, and without it."""
    ids = torch.arange(2, 22)[None]
    cached = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6
    )
    for _ in range(cached.shape[1] - 20):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return cached, ids


def test_cached_generation_is_exact_and_nothing_deprecated_is_used(model):
    logging.warning_once.cache_clear()
    with warnings.catch_warnings(), CaptureLogger(logging.get_logger("transformers")) as log:
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        cached, uncached = generate_both_ways(model)
    assert torch.equal(cached, uncached)
    assert "deprecated" not in log.out


@torch.no_grad()
def test_the_cache_goes_by_the_names_that_it_has_in_the_library(model):
    ids = torch.arange(2, 22)[None]
    expected = model(ids).logits[:, 12:]
    layer = inspect.signature(type(model).forward).parameters
    names = [name for name in ("cache", "past_key_values") if name in layer]
    assert names
    for name in names:
        cache = DynamicCache(config=model.config)
        model(ids[:, :12], **{name: cache}, use_cache=True)
        assert cache.get_seq_length() == 12
        logits = model(ids[:, 12:], **{name: cache}, use_cache=True).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_library_newer_than_the_tested_ones_is_named_once(model, monkeypatch):
    def said():
        logging.warning_once.cache_clear()
        with CaptureLogger(modeling_cmoe.logger) as log:
            for _ in range(2):
                type(model)(model.config)
        return log.out

    assert "cmoe verify" not in said()
    monkeypatch.setattr(modeling_cmoe.transformers, "__version__", "5.99.0.dev0")
    assert said().count(f"{TESTED[0]} to {TESTED[1]}, not with 5.99.0.dev0") == 1
