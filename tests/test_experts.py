# SPDX-License-Identifier: Apache-2.0
"""The default experts backend: equal to the loop over experts, and out of everybody's way."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cmoe_hf import CMoELlamaConfig, CMoELlamaForCausalLM
from cmoe_hf.modeling_cmoe import (
    OWN_BACKENDS,
    CMoEExperts,
    CMoEPlainExperts,
    CMoESparseMoeBlock,
    fastest_backend,
    fastest_backend_on_a_gpu,
    small_batch_linear,
)

pytestmark = pytest.mark.library

SIZES = {
    "small": {"hidden_size": 32, "moe_intermediate_size": 8},
    "middle": {"hidden_size": 256, "moe_intermediate_size": 128},
    "large": {"hidden_size": 1024, "moe_intermediate_size": 512},
}


def configuration(size, experts, top_k, shared=1, **changes):
    fields = SIZES[size] | {"num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    width = fields["moe_intermediate_size"]
    config = CMoELlamaConfig(
        **fields,
        num_experts=experts,
        num_experts_per_tok=top_k,
        shared_expert_intermediate_size=shared * width,
        intermediate_size=(shared + experts) * width,
        **changes,
    )
    config._experts_implementation = "cmoe"
    return config


def random_(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def run(experts, backend, *arguments):
    experts.config._experts_implementation = backend
    try:
        return experts(*arguments)
    finally:
        experts.config._experts_implementation = "cmoe"


def check_default(module, arguments, bound=1e-4):
    """The default computes what the loop over experts does."""
    got, expected = module(*arguments), run(module, "eager", *arguments)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=bound, rtol=bound)


def routed(tokens, config, dtype=torch.float32, skewed=False):
    torch.manual_seed(tokens)
    x_TH = torch.randn(tokens, config.hidden_size, dtype=dtype)
    score_TN = torch.rand(tokens, config.num_experts)
    if skewed:  # most tokens to few experts, and some experts without any
        score_TN *= 0.5 ** torch.arange(config.num_experts)
    index_TK = score_TN.topk(config.num_experts_per_tok).indices
    return x_TH, index_TK, torch.rand(index_TK.shape).to(dtype) + 0.5


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_default_computes_what_the_loop_over_experts_does(data):
    size = data.draw(st.sampled_from(sorted(SIZES)))
    experts = data.draw(st.integers(1, 7))
    config = configuration(size, experts, data.draw(st.integers(1, experts)))
    module = random_(data.draw(st.sampled_from([CMoEExperts, CMoEPlainExperts]))(config))
    tokens = data.draw(st.sampled_from(TOKENS))
    with torch.no_grad():
        check_default(module, routed(tokens, config, skewed=data.draw(st.booleans())))


TOKENS = (1, 2, 3, 5, 9, 31, 70, 600, 1300)


@torch.no_grad()
def test_every_way_of_its_own_has_been_compared():
    found = set()
    for size, experts, kind in product(SIZES, (1, 4, 7), (CMoEExperts, CMoEPlainExperts)):
        for top_k in range(1, experts + 1):
            module = kind(configuration(size, experts, top_k)).to_empty(device="cpu")
            found |= {fastest_backend(module, tokens, top_k) for tokens in TOKENS}
    assert found == {*OWN_BACKENDS, "grouped_mm"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "tokens"), [("large", 1), ("large", 6), ("middle", 300)])
@torch.no_grad()
def test_half_precision(dtype, size, tokens):
    config = configuration(size, 5, 2)
    check_default(random_(CMoEExperts(config)).to(dtype), routed(tokens, config, dtype), 3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_rows_that_no_grouped_kernel_takes(dtype, tokens):
    config = configuration("small", 5, 2)
    config.moe_intermediate_size = 3 * 97  # 16 bytes divide neither 582 nor 1164
    check_default(random_(CMoEExperts(config)).to(dtype), routed(tokens, config, dtype), 2e-2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [1, 5, 70, 600])
@pytest.mark.parametrize("top_k", [2, 6])
@torch.no_grad()
def test_experts_of_other_ranks_add_nothing(size, tokens, top_k):
    config = configuration(size, 7, top_k)
    module = random_(CMoEExperts(config))
    x_TH, index_TK, weight_TK = routed(tokens, config)
    index_TK[:, ::2] = config.num_experts
    weight_TK[:, ::2] = 0
    module._is_expert_parallel = True  # as the library says it
    check_default(module, (x_TH, index_TK, weight_TK))


@pytest.mark.parametrize("size", ["middle", "large"])
@torch.no_grad()
def test_autocast_computes_in_its_type(size):
    config = configuration(size, 5, 2)
    module = random_(CMoEExperts(config))
    for tokens in (1, 300):
        arguments = routed(tokens, config)
        expected = run(module, "eager", *arguments)
        with torch.autocast("cpu", torch.bfloat16):
            got = module(*arguments)
        torch.testing.assert_close(got.float(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_loop_over_experts(tokens, frozen):
    config = configuration("large", 4, 2)
    block = random_(CMoESparseMoeBlock(config))
    block.requires_grad_(not frozen)
    gradients = []
    for backend in ("eager", "cmoe"):
        config._experts_implementation = backend
        torch.manual_seed(1)
        x = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
        block.zero_grad()
        block(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in block.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) == (1 if frozen else 1 + 8)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 128, 2048, 200_000])
@pytest.mark.parametrize("width", [12, 1376, 2752])
def test_what_a_gpu_is_given_exists(width, tokens):
    weight_NHM = torch.empty(7, 4096, width, dtype=torch.bfloat16, device="meta")
    for top_k, gradients in product((1, 7), (False, True)):
        with torch.set_grad_enabled(gradients):
            backend = fastest_backend_on_a_gpu(weight_NHM, 7, tokens, top_k)
        assert backend in OWN_BACKENDS or backend in ALL_EXPERTS_FUNCTIONS
        assert backend != "grouped_mm" or width != 12  # whose rows its kernel refuses


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 23, 513])
@pytest.mark.parametrize("shape", [(64, 1024), (192, 700), (577, 128), (1156, 700)])
@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_few_rows_are_multiplied_as_the_library_does(rows, shape, transposed, monkeypatch):
    monkeypatch.setattr("cmoe_hf.modeling_cmoe.LARGE", 0)
    weight_QH = torch.randn(shape[::-1]).T if transposed else torch.randn(shape)
    x_TH = torch.randn(rows, shape[1])
    expected = nn.functional.linear(x_TH, weight_QH)
    torch.testing.assert_close(small_batch_linear(x_TH, weight_QH), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7])
@torch.no_grad()
def test_whoever_watches_or_replaces_a_part_sees_it_called(tokens):
    block = random_(CMoESparseMoeBlock(configuration("large", 3, 1)))
    x_TH, called = torch.randn(tokens, 1024), []
    expected = block(x_TH)
    parts = [part for part in block.modules() if part is not block]
    for part in parts:
        part.register_forward_hook(lambda part, *_: called.append(part))
    torch.testing.assert_close(block(x_TH), expected)
    assert {*called} == {part for part in parts if "Linear" not in str(type(part))} | {
        *block.shared_expert.children()
    }
    block.shared_expert.up_proj = nn.Sequential(block.shared_expert.up_proj, nn.Tanh())
    assert not torch.equal(block(x_TH), expected)


def test_it_is_the_default_and_can_be_overruled(carved):
    loaded = CMoELlamaForCausalLM.from_pretrained(carved)
    assert loaded.config._experts_implementation == "cmoe"
    other = CMoELlamaForCausalLM.from_pretrained(carved, experts_implementation="eager")
    assert other.config._experts_implementation == "eager"
    other.set_experts_implementation("cmoe")
    assert other.config._experts_implementation == "cmoe"
    with pytest.raises(ValueError, match="no_such_backend"):
        CMoELlamaForCausalLM.from_pretrained(carved, experts_implementation="no_such_backend")


def test_quantised_models_keep_a_stock_backend():
    config = configuration("small", 4, 2)
    config.quantization_config = {"quant_method": "fp8"}
    model = CMoELlamaForCausalLM(config)
    assert model.get_correct_experts_implementation(None) == "grouped_mm"
    assert model.get_correct_experts_implementation("cmoe") == "cmoe"
