# SPDX-License-Identifier: Apache-2.0
"""A carved model does what its dense one does, whatever the family and the way it is run."""

from typing import NamedTuple

import pytest
import torch
from families import decoders
from test_model import Logits
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.library

TOKENS = 8
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
WAYS = {
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "early-exit": {"assistant_early_exit": 1},
    "static-cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
}
"""How tokens can be generated."""


class Models(NamedTuple):
    dense: PreTrainedModel
    whole: PreTrainedModel
    """All experts active."""
    sparse: PreTrainedModel


@pytest.fixture(scope="module", params=decoders())
def models(request, make_dense, carve):
    dense = make_dense(request.param)
    folders = dense, carve(dense, (2, 6, 8)), carve(dense)
    return Models(*(AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders))


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, use_cache=False, **options).logits


def greedy(model, ids, **options):
    """Tokens that the model adds to some, or the class of error with which it refuses."""
    settings = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    mask, layers = torch.ones_like(ids), model.config.num_hidden_layers
    try:
        return model.generate(ids, attention_mask=mask, **settings, **options).tolist()
    except Exception as error:  # the library raises whatever a family's code stumbles over
        return type(error)
    finally:
        model.config.num_hidden_layers = layers  # which an early exit that fails leaves changed


def test_with_all_experts_active_it_is_the_dense_model(models, token_ids):
    expected = logits(models.dense, token_ids)
    torch.testing.assert_close(logits(models.whole, token_ids), expected, **CLOSE)
    assert not torch.allclose(logits(models.sparse, token_ids), expected, **CLOSE)


def test_what_is_not_stored_is_as_in_a_new_model(models):
    """Memory that nobody initialises is often zero, and not always."""
    model = models.sparse
    made = dict(type(model)(model.config).named_buffers())
    buffers = dict(model.named_buffers())
    assert made.keys() == buffers.keys()
    for name in made.keys() - model.state_dict().keys():
        assert torch.equal(buffers[name], made[name]), name


def test_generation_with_a_cache_equals_decoding_without_one(models, token_ids):
    for model in (models.whole, models.sparse):
        ids = token_ids[:, :20]
        found = greedy(model, ids, eos_token_id=None)
        for _ in range(TOKENS):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
        assert found == ids.tolist()


def test_a_batch_padded_on_the_left_is_as_with_the_dense_model(models, token_ids):
    ids, mask = token_ids.clone(), torch.ones_like(token_ids)
    ids[0, :5], mask[0, :5] = models.dense.config.pad_token_id, 0

    def by_padding(model):
        """How much padding changes, in the row that has it and the other one."""
        padded = logits(model, ids, attention_mask=mask)
        alone = logits(model, ids[:1, 5:])[0], logits(model, ids[1:])[0]
        pairs = zip((padded[0, 5:], padded[1]), alone, strict=True)
        return [(a - b).abs().max().item() for a, b in pairs]

    dense, whole, sparse = map(by_padding, models)
    assert whole == pytest.approx(dense, abs=1e-4)
    assert max(dense) > 1e-4 or max(sparse) < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_it_generates_in_every_way_that_the_dense_model_can(models, token_ids, way):
    ids = token_ids[:1, :20]
    dense, whole, sparse = (greedy(model, ids, **WAYS[way]) for model in models)
    assert whole == dense
    assert isinstance(sparse, list) == isinstance(dense, list)
    if isinstance(sparse, list) and way != "beams":
        assert sparse == greedy(models.sparse, ids)


def test_either_assists_the_other(models, token_ids):
    ids = token_ids[:1, :20]
    by_itself = greedy(models.dense, ids, assistant_model=models.dense)
    assert greedy(models.whole, ids, assistant_model=models.dense) == by_itself
    assert greedy(models.dense, ids, assistant_model=models.sparse) == by_itself
    assisted = greedy(models.sparse, ids, assistant_model=models.dense)
    assert assisted == (greedy(models.sparse, ids) if isinstance(by_itself, list) else by_itself)


def recorded(how, model, ids):
    """The recording of a model, or the class of error with which it refuses."""
    try:
        if how == "export":
            return torch.export.export(Logits(model), (ids,)).module()
        return torch.jit.trace(Logits(model), ids, check_trace=False)
    except Exception as error:
        return type(error)


@torch.no_grad()
@pytest.mark.parametrize("how", ["trace", pytest.param("export", marks=pytest.mark.thorough)])
def test_it_can_be_recorded_as_the_dense_model_can(models, token_ids, how):
    ids = token_ids[:, :9]
    dense = recorded(how, models.dense, ids)
    found = recorded(how, models.sparse, ids)
    if isinstance(dense, type):
        assert found == dense
    else:
        torch.testing.assert_close(found(ids + 7), logits(models.sparse, ids + 7), **CLOSE)


def test_router_scores_come_on_request(models, token_ids):
    config = models.sparse.config
    with torch.no_grad():
        plain = models.sparse(token_ids, use_cache=False)
        asked = models.sparse(token_ids, use_cache=False, output_router_logits=True)
    assert torch.equal(plain.logits, asked.logits) and "router_logits" not in plain
    shapes = [tuple(score.shape) for score in asked.router_logits]
    assert shapes == [(token_ids.numel(), config.num_experts)] * config.num_hidden_layers


def test_gradient_checkpointing_changes_no_gradient(models, token_ids):
    model = models.sparse.train()
    try:
        if not models.dense.supports_gradient_checkpointing:
            with pytest.raises(ValueError, match="does not support gradient checkpointing"):
                model.gradient_checkpointing_enable()
            return
        plain, stored = gradients(model, token_ids), None
        model.gradient_checkpointing_enable()
        stored = gradients(model, token_ids)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert plain.keys() == stored.keys() and any("experts" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(stored[name], gradient, atol=1e-6, rtol=1e-5)


def gradients(model, ids):
    """Gradients of the loss, by name; dropout draws the same."""
    torch.manual_seed(0)
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: it.grad.clone() for name, it in model.named_parameters() if it.grad is not None}
