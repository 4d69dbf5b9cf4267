# SPDX-License-Identifier: Apache-2.0
"""The default experts backend: equal to the loop over experts at every size, hooks included."""

import subprocess
import sys
import threading
import time
from itertools import product

import pytest
import torch
from families import block_config
from torch import nn
from transformers import AutoModelForCausalLM

from cmoe_hf import CMoEGPTNeoXConfig, CMoELlamaConfig, CMoELlamaForCausalLM, modeling_cmoe
from cmoe_hf.modeling_cmoe import (
    EXPERTS_TUNER,
    LINEAR_TUNER,
    WAYS_TO_SUM,
    CMoELinear,
    ExpertsLoop,
    Tuner,
    current_backend,
    gathered_experts,
    kind_of_call,
    size_of,
    ways_to_multiply,
    ways_to_run,
)

pytestmark = pytest.mark.library

SIZES = {"narrow": (32, 8), "middle": (256, 128), "large": (1024, 512), "odd": (64, 291)}
"""Hidden size and width of an expert. Rows of the odd ones are no multiples of 16 bytes."""
TOKENS = (1, 2, 5, 31, 70, 600)
DEVICES = ["cpu"]
DEVICES += [
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    )
]


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    """Ways are chosen by time, anew in every test."""
    monkeypatch.setattr(Tuner, "enabled", True)
    for tuner in (EXPERTS_TUNER, LINEAR_TUNER):
        tuner.chosen.clear()
        tuner.times.clear()


def sparse_block(size, experts, top_k, kind=CMoELlamaConfig, shared=1):
    """A model of one layer, and its sparse block."""
    more = {"num_attention_heads": 4, "vocab_size": 64}
    config = block_config(kind, *SIZES[size], experts, top_k, shared, **more)
    model = AutoModelForCausalLM.from_config(config)
    block = model.base_model.layers[0].mlp
    for tensor in block.state_dict().values():
        tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return model, block


def both(model, run):
    """What the loop over experts and the default compute."""
    found = []
    for backend in ("eager", "cmoe"):
        model.set_experts_implementation(backend)
        found.append(run())
    return found


def routed(tokens, experts, top_k, skewed):
    """Tokens with the experts and weights of each; skewed: some experts have no token."""
    score_TN = torch.rand(tokens, experts) * 0.5 ** (skewed * torch.arange(experts))
    index_TK = score_TN.topk(top_k).indices
    return index_TK, torch.rand(index_TK.shape) + 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [CMoELlamaConfig, CMoEGPTNeoXConfig])
@torch.no_grad()
def test_the_default_computes_what_the_loop_over_experts_does(kind, size, device):
    for experts, top_k in ((1, 1), (4, 1), (7, 2), (7, 6)):
        model, block = sparse_block(size, experts, top_k, kind)
        module = block.experts.to(device)
        for tokens, skewed in product(TOKENS, (False, True)):
            if size == "large" and tokens > 70:
                continue
            x_TH = torch.randn(tokens, SIZES[size][0])
            index_TK, weight_TK = routed(tokens, experts, top_k, skewed)
            if skewed and top_k == 6:  # half of them are on another rank of a parallel model
                index_TK[:, ::2], weight_TK[:, ::2] = experts, 0
                module._is_expert_parallel = True
            arguments = [tensor.to(device) for tensor in (x_TH, index_TK, weight_TK)]
            expected, got = both(model, lambda module=module, it=arguments: module(*it))
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [CMoELlamaConfig, CMoEGPTNeoXConfig])
@torch.no_grad()
def test_every_way_to_run_experts_computes_what_the_loop_does(kind):
    for size, (experts, top_k), tokens in product(SIZES, ((1, 1), (7, 2), (7, 6)), (1, 5, 70)):
        module = sparse_block(size, experts, top_k, kind)[1].experts
        index_TK, weight_TK = routed(tokens, experts, top_k, skewed=tokens == 5)
        if tokens == 70:  # half of them are on another rank of a parallel model
            index_TK[::2], weight_TK[::2] = experts, 0
        arguments = (module, torch.randn(tokens, SIZES[size][0]), index_TK, weight_TK)
        expected = ExpertsLoop.forward(*arguments)
        ways = ways_to_run(*kind_of_call(module, tokens, top_k))
        assert {"sorted", "all_experts"} < ways.keys()
        for name, way in ways.items():
            if tokens == 70 and name not in ("sorted", "all_experts"):
                continue  # the library's are told about ranks by another name
            torch.testing.assert_close(way(*arguments), expected, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_way_to_multiply_is_a_linear_layer(dtype):
    for rows, size, tokens in product((1, 48, 291), (8, 96), (1, 2, 5, 16, 70)):
        x_TH, weight_QH = (torch.randn(n, size).to(dtype) for n in (tokens, rows))
        expected = (x_TH.double() @ weight_QH.double().T).to(dtype)
        ways = ways_to_multiply(dtype, size_of(tokens))
        assert len(ways) == (1 if dtype == torch.bfloat16 and tokens > 1 else 2) + (
            dtype == torch.float32 and tokens <= 16
        )
        for name, way in ways.items():
            got, near = way(x_TH, weight_QH), 1e-4 if dtype == torch.float32 else 5e-2
            torch.testing.assert_close(got, expected, atol=near, rtol=near, msg=name)


@torch.no_grad()
def test_every_way_to_sum_over_experts_is_that_sum():
    for tokens, experts in product((1, 5, 40), (1, 7)):
        z_TNM, weight_NHM = torch.randn(tokens, experts, 24), torch.randn(experts, 96, 24)
        expected = torch.einsum("tnm,nhm->th", z_TNM, weight_NHM)
        for name, way in WAYS_TO_SUM.items():
            got = way(z_TNM, weight_NHM)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, msg=name)


def waits(calls, **seconds):
    """Ways that return their name after a while, and note it."""

    def way(name, wait):
        calls.append(name)
        time.sleep(wait)
        return name

    return {name: lambda name=name, wait=wait: way(name, wait) for name, wait in seconds.items()}


def test_the_fastest_way_is_chosen_and_far_slower_ones_are_dropped():
    tuner, calls = Tuner(), []
    ways = waits(calls, plain=0.01, slow=0.04, fast=0.004)
    for _ in range(40):
        assert tuner.run("kind", ways) in ways
    assert tuner.chosen == {"kind": "fast"} and not tuner.times
    assert calls.count("slow") == 3 and set(calls[-10:]) == {"fast"}


def test_the_first_way_stays_if_nothing_is_much_faster():
    tuner = Tuner()
    ways = waits([], plain=0.01, other=0.0097)
    for _ in range(14):
        tuner.run("kind", ways)
    assert tuner.chosen == {"kind": "plain"}


def test_a_trial_within_a_trial_is_not_counted():
    outer, inner = Tuner(), Tuner()
    ways = {"one": lambda: inner.run("inner", waits([], one=0, two=0)), "two": lambda: None}
    outer.run("outer", ways)
    assert outer.times == {"outer": {"one": [], "two": []}}
    for _ in range(40):
        outer.run("outer", ways)
    assert outer.chosen and inner.chosen


@torch.no_grad()
def test_an_expert_without_tokens_decides_nothing():
    module = sparse_block("large", 4, 1)[1].experts
    index_TK = torch.zeros(2, 1, dtype=torch.int64)
    for _ in range(100):
        module(torch.randn(2, 1024), index_TK, torch.ones(2, 1))
    assert {kind[-1] for kind in LINEAR_TUNER.chosen} == {1}


def test_two_threads_never_try_at_once():
    tuner, calls, begun = Tuner(), [], threading.Event()
    ways = waits(calls, plain=0, other=0)
    ways["plain"]()
    blocking = {"slow": lambda: (begun.set(), time.sleep(0.5))}
    thread = threading.Thread(target=tuner.run, args=("other kind", blocking))
    thread.start()
    begun.wait()
    for _ in range(5):
        tuner.run("kind", ways)
    assert calls == ["plain"] * 6 and "kind" not in tuner.times
    thread.join()
    tuner.run("kind", ways)
    assert tuner.times["kind"]["plain"]


@torch.no_grad()
def test_nothing_is_tried_where_ways_are_fixed(monkeypatch):
    _, block = sparse_block("large", 4, 2)
    x_1TH, before = torch.randn(1, 3, 1024), Tuner.trials

    def run():
        block(x_1TH)
        return Tuner.trials - before

    with torch.enable_grad():
        assert run() == 0
    torch.use_deterministic_algorithms(True)
    assert run() == 0
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(Tuner, "enabled", False)
    assert run() == 0 and current_backend(block.experts, 3, 2) == "grouped_mm"
    monkeypatch.setattr(Tuner, "enabled", True)
    assert run() > 0
    for _ in range(100):
        settled = run()
    assert run() == settled
    chosen = EXPERTS_TUNER.chosen[kind_of_call(block.experts, 3, 2)]
    assert current_backend(block.experts, 3, 2) == chosen


def test_the_environment_fixes_the_ways():
    shown = "from cmoe_hf.modeling_cmoe import Tuner; print(Tuner.enabled)"
    output = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True)
    assert output.stdout.strip() == "False"  # as conftest.py asks


@torch.no_grad()
def test_a_linear_layer_with_a_bias_and_any_batch():
    layer = CMoELinear(256, 96)
    for shape in ((1, 256), (7, 256), (2, 3, 256), (256,), (0, 256)):
        x = torch.randn(shape)
        torch.testing.assert_close(
            layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["stored", "autocast"])
@torch.no_grad()
def test_half_precision(dtype, how):
    for size, tokens in (("large", 1), ("large", 6), ("middle", 300), ("odd", 700)):
        model, block = sparse_block(size, 5, 2)
        index_TK, weight_TK = routed(tokens, 5, 2, skewed=False)
        arguments = (torch.randn(tokens, SIZES[size][0]), index_TK, weight_TK)
        if how == "stored":
            block.to(dtype)
            arguments = (arguments[0].to(dtype), index_TK, weight_TK.to(dtype))
        model.set_experts_implementation("eager")
        expected = block.experts(*arguments)
        model.set_experts_implementation("cmoe")
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            got = block.experts(*arguments)
        torch.testing.assert_close(got.float(), expected.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_loop_over_experts(tokens, frozen):
    model, block = sparse_block("large", 4, 2)
    block.requires_grad_(not frozen)
    x_1TH = torch.randn(1, tokens, 1024, requires_grad=True)
    leaves = [x_1TH, *(it for it in block.parameters() if it.requires_grad)]
    assert len(leaves) == (1 if frozen else 1 + 8)
    found = both(model, lambda: torch.autograd.grad(block(x_1TH).square().sum(), leaves))
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tokens", [1, 7])
@torch.no_grad()
def test_hooks_and_replaced_layers_are_called(tokens):
    _, block = sparse_block("large", 3, 1)
    x_1TH, called = torch.randn(1, tokens, 1024), []
    expected = block(x_1TH)
    parts = {block.gate, block.experts, block.shared_expert, *block.shared_expert.children()}
    for part in parts:
        part.register_forward_hook(lambda part, *_: called.append(part))
    torch.testing.assert_close(block(x_1TH), expected)
    assert {*called} == parts
    block.shared_expert.up_proj = nn.Sequential(block.shared_expert.up_proj, nn.Tanh())
    assert not torch.equal(block(x_1TH), expected)


def test_the_default_can_be_overruled(carved):
    def chosen(**options):
        model = CMoELlamaForCausalLM.from_pretrained(carved, **options)
        return model.config._experts_implementation  # no public name

    assert chosen() == "cmoe"
    assert chosen(experts_implementation="eager") == "eager"
    with pytest.raises(ValueError, match="no_such_backend"):
        chosen(experts_implementation="no_such_backend")


def test_quantised_models_keep_a_stock_backend():
    """Methods such as fp8 replace the experts by their own, with other backends."""
    model, _ = sparse_block("narrow", 4, 2)
    model.config.quantization_config = {"quant_method": "fp8"}
    assert model.get_correct_experts_implementation(None) == "grouped_mm"
    assert model.get_correct_experts_implementation("cmoe") == "cmoe"


@pytest.mark.parametrize("kind", [CMoELlamaConfig, CMoEGPTNeoXConfig])
@torch.no_grad()
def test_what_a_compiler_gathers_equals_the_loop_over_experts(kind):
    """Compiled for a GPU a few tokens run so; which kernels come of it can be seen there only."""
    model, block = sparse_block("odd", 7, 2, kind)
    model.set_experts_implementation("eager")
    compiled = torch.compile(gathered_experts, backend="aot_eager", fullgraph=True)
    index_TK, weight_TK = routed(3, 7, 2, skewed=False)
    index_TK[0, 0], weight_TK[0, 0] = 7, 0  # on another rank
    arguments = (torch.randn(3, 64), index_TK, weight_TK)
    expected = block.experts(*arguments)
    for run in (gathered_experts, compiled):
        torch.testing.assert_close(run(block.experts, *arguments), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
@torch.no_grad()
def test_a_compiled_router_chooses_the_same_experts(top_k):
    _, block = sparse_block("narrow", 7, top_k)
    x_TH = torch.randn(50, 32)
    expected = block.gate(x_TH)
    got = torch.compile(block.gate, backend="aot_eager", fullgraph=True)(x_TH)
    assert torch.equal(got.index_TK, expected.index_TK)
    torch.testing.assert_close(got.weight_TK, expected.weight_TK)


@torch.no_grad()
def test_compiled_few_tokens_gather(monkeypatch):
    model, block = sparse_block("middle", 8, 1)
    gathered = []
    run = modeling_cmoe.gathered_experts
    monkeypatch.setattr(
        modeling_cmoe, "gathered_experts", lambda *it: gathered.append(len(it[1])) or run(*it)
    )
    monkeypatch.setattr(modeling_cmoe, "is_traced", lambda: True)
    for tokens in (1, 4, 5):
        arguments = (torch.randn(tokens, 256), *routed(tokens, 8, 1, skewed=False))
        model.set_experts_implementation("eager")
        expected = block.experts(*arguments)
        model.set_experts_implementation("cmoe_gathered")
        torch.testing.assert_close(block.experts(*arguments), expected, atol=1e-4, rtol=1e-4)
    assert gathered == [1, 4]
