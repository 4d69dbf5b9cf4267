# SPDX-License-Identifier: Apache-2.0
"""The default experts backend: equal to the loop over experts, and out of everybody's way."""

import copy
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from cmoe_hf import CMoELlamaConfig, CMoELlamaForCausalLM, modeling_cmoe
from cmoe_hf.modeling_cmoe import (
    LARGE,
    CMoEExperts,
    CMoEPlainExperts,
    CMoESparseMoeBlock,
    fastest_backend,
    fastest_backend_on_a_gpu,
    row_linear,
    sorted_experts_forward,
    whole_experts_forward,
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


def routed(tokens, config, dtype=torch.float32, skewed=False):
    torch.manual_seed(tokens)
    x_TH = torch.randn(tokens, config.hidden_size, dtype=dtype)
    score_TN = torch.rand(tokens, config.num_experts)
    if skewed:  # most tokens to few experts, and some experts without any
        score_TN *= 0.5 ** torch.arange(config.num_experts)
    index_TK = score_TN.topk(config.num_experts_per_tok).indices
    return x_TH, index_TK, torch.rand(index_TK.shape).to(dtype) + 0.5


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_default_computes_what_the_loop_over_experts_does(data):
    size = data.draw(st.sampled_from(sorted(SIZES)))
    experts = data.draw(st.integers(1, 7))
    config = configuration(size, experts, data.draw(st.integers(1, experts)))
    module = random_(CMoEExperts(config))
    tokens = data.draw(st.sampled_from([1, 2, 3, 5, 9, 31, 70, 600, 1300]))
    arguments = routed(tokens, config, skewed=data.draw(st.booleans()))
    with torch.no_grad():
        expected = run(module, "eager", *arguments)
        torch.testing.assert_close(module(*arguments), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 6])
def test_half_precision(dtype, tokens):
    config = configuration("large", 5, 2)
    module = random_(CMoEExperts(config)).to(dtype)
    arguments = routed(tokens, config, dtype)
    with torch.no_grad():
        got = module(*arguments)
        expected = run(module, "eager", *arguments)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_no_grouped_kernel_takes(dtype):
    config = configuration("small", 5, 2)
    config.moe_intermediate_size = 3 * 97  # 16 bytes divide neither 582 nor 1164
    module = random_(CMoEExperts(config)).to(dtype)
    for tokens in (1, 40, 700):
        arguments = routed(tokens, config, dtype)
        torch.testing.assert_close(
            module(*arguments), run(module, "eager", *arguments), atol=2e-2, rtol=2e-2
        )


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


@pytest.mark.parametrize("size", ["small", "large"])
def test_it_steps_aside(size, monkeypatch):
    module = CMoEExperts(configuration(size, 5, 2))
    assert (module.down_proj[0].numel() >= LARGE) == (size == "large")
    with torch.no_grad():
        assert fastest_backend(module, 1, 2) == "direct"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert fastest_backend(module, 3000, 2) == "grouped_mm"
        assert fastest_backend(module, 1, 2) == ("batched_mm" if size == "small" else "grouped_mm")
        monkeypatch.undo()
        module._is_expert_parallel = True
        assert fastest_backend(module, 1, 2) == "grouped_mm"
        module._is_expert_parallel = False
        assert fastest_backend(module.to("meta"), 1, 2) == "grouped_mm"
    with_gradients = CMoEExperts(module.config)
    assert fastest_backend(with_gradients, 300, 2) == "grouped_mm"
    assert fastest_backend(with_gradients, 1, 2) in ("batched_mm", "grouped_mm")


@pytest.mark.parametrize(
    ("width", "tokens", "compiling", "expected"),
    [
        (1376, 1, False, "whole"),  # launches least
        (2752, 1, False, "batched_mm"),  # where reading the idle ones takes longer
        (1376, 7, True, "batched_mm"),
        (1376, 8, True, "whole"),  # reads every expert once
        (1376, 512, False, "whole"),
        (1376, 2048, False, "grouped_mm"),
        (12, 200_000, False, "eager"),  # 24 bytes: the grouped kernel would refuse them
        (12, 200_000, True, "batched_mm"),
    ],
)
def test_on_a_gpu(width, tokens, compiling, expected, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    weight_NHM = torch.empty(7, 4096, width, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        assert fastest_backend_on_a_gpu(weight_NHM, 7, tokens, 1) == expected
    if tokens == 512:  # hidden activations of all experts would be kept
        assert fastest_backend_on_a_gpu(weight_NHM, 7, tokens, 1) == "grouped_mm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain", [False, True], ids=["gated", "plain"])
@pytest.mark.parametrize("tokens", [1, 5, 32, 33, 300])
def test_running_every_expert_is_running_the_chosen_ones(tokens, plain, dtype):
    config = configuration("middle", 7, 4)
    module = random_((CMoEPlainExperts if plain else CMoEExperts)(config)).to(dtype)
    arguments = routed(tokens, config, dtype)
    expected = run(module, "eager", *arguments)
    got = whole_experts_forward(module, *arguments)
    assert got.dtype == dtype
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_tokens_sorted_by_their_experts(tokens, skewed, dtype):
    config = configuration("middle", 7, 3)
    module = random_(CMoEExperts(config)).to(dtype)
    arguments = routed(tokens, config, dtype, skewed=skewed)
    with torch.no_grad():
        expected = run(module, "eager", *arguments)
        got = sorted_experts_forward(module, *arguments)
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got, expected, atol=bound, rtol=bound)


def test_tokens_are_sorted_only_where_nothing_follows_or_casts():
    module = CMoEExperts(configuration("middle", 7, 3))
    with torch.no_grad():
        assert fastest_backend(module, 300, 3) == "sorted"
        with torch.autocast("cpu"):
            assert fastest_backend(module, 300, 3) != "sorted"
        assert fastest_backend(CMoEPlainExperts(module.config), 300, 3) != "sorted"
        assert fastest_backend(module.to(torch.float16), 300, 3) != "sorted"
    assert fastest_backend(module.float().requires_grad_(False), 300, 3) != "sorted"


def test_running_every_expert_leaves_out_those_of_other_ranks():
    config = configuration("middle", 7, 4)
    module = random_(CMoEExperts(config))
    x_TH, index_TK, weight_TK = routed(5, config)
    index_TK[:, ::2] = config.num_experts
    got = whole_experts_forward(module, x_TH, index_TK, weight_TK)
    expected = run(module, "eager", x_TH, index_TK, weight_TK)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_every_expert_runs_where_choosing_costs_more():
    with torch.no_grad():
        narrow = CMoEExperts(configuration("small", 6, 4))
        assert {fastest_backend(narrow, tokens, 4) for tokens in (1, 9, 3000)} == {"whole"}
        assert fastest_backend(narrow, 1, 3) == "direct"
        wide = CMoEExperts(configuration("large", 7, 1))
        assert "whole" not in {fastest_backend(wide, tokens, 1) for tokens in (1, 9, 3000)}
        assert fastest_backend(wide.to(torch.bfloat16), 1, 1) != "whole"
    assert fastest_backend(CMoEExperts(configuration("small", 6, 3)), 9, 3) != "whole"


@pytest.mark.parametrize("multiplies", [False, True])
def test_a_cpu_that_converts_each_bfloat16_runs_no_idle_expert(multiplies, monkeypatch):
    monkeypatch.setattr(modeling_cmoe, "MULTIPLIES_BFLOAT16", multiplies)
    with torch.no_grad():
        module = CMoEExperts(configuration("middle", 6, 3)).to(torch.bfloat16)
        assert (fastest_backend(module, 9, 3) == "whole") == multiplies
        assert fastest_backend(module, 3000, 3) != "whole"


def watch(module):
    module.register_forward_hook(lambda *call: None)


def replace_forward(module):
    module.forward = module.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["middle", "large"])
@pytest.mark.parametrize("router", ["linear", "representative"])
def test_one_token_is_run_by_hand(size, dtype, router):
    config = configuration(size, 7, 2, router_type=router, router_absolute_score=True)
    block = random_(CMoESparseMoeBlock(config)).to(dtype).requires_grad_(False)
    block.gate.balance_bias = block.gate.balance_bias.float().normal_(std=0.1)
    x_TH = torch.randn(1, config.hidden_size, dtype=dtype)
    with torch.no_grad():
        config._experts_implementation = "eager"
        assert not block.is_short(x_TH)
        expected = block(x_TH[None])
        config._experts_implementation = "cmoe"
        assert block.is_short(x_TH) and not block.is_short(x_TH.expand(2, -1))
        bound = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(block(x_TH[None]), expected, atol=bound, rtol=bound)
    assert not block.is_short(x_TH)


@pytest.mark.parametrize("rows", [192, 577, 1156, 96])
@pytest.mark.parametrize("columns", [64, 700])
@pytest.mark.parametrize("turned", [False, True])
def test_a_row_in_pieces(rows, columns, turned):
    torch.manual_seed(0)
    weight_QH = torch.randn(columns, rows).T if turned else torch.randn(rows, columns)
    x_1H = torch.randn(1, columns)
    expected = nn.functional.linear(x_1H, weight_QH)
    torch.testing.assert_close(row_linear(x_1H, weight_QH), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_row_in_bfloat16_leaves_the_library_as_it_was(enabled):
    torch.manual_seed(0)
    weight_QH, x_1H = torch.randn(192, 576).bfloat16(), torch.randn(1, 576).bfloat16()
    exact = x_1H.double() @ weight_QH.double().T
    with torch.backends.mkldnn.flags(enabled=enabled):
        got = row_linear(x_1H, weight_QH)
        with pytest.raises(RuntimeError):
            row_linear(x_1H[:, 1:], weight_QH)
        assert torch.backends.mkldnn.enabled == enabled
    torch.testing.assert_close(got.double(), exact, atol=0.1, rtol=1e-2)


def test_threads_leave_the_library_as_it_was():
    weight_QH, x_1H = torch.randn(192, 576).bfloat16(), torch.randn(1, 576).bfloat16()
    expected = row_linear(x_1H, weight_QH)
    with ThreadPoolExecutor(4) as pool:
        products = list(pool.map(lambda _: row_linear(x_1H, weight_QH), range(2000)))
    assert torch.backends.mkldnn.enabled
    for product in products[::100]:
        torch.testing.assert_close(product, expected, atol=0.1, rtol=1e-2)


class Quantised(torch.Tensor):
    """A kind of weight that is not ours to cut."""


def test_a_quantised_shared_expert_is_called():
    block = random_(CMoESparseMoeBlock(configuration("middle", 7, 2))).requires_grad_(False)
    x_TH = torch.randn(1, block.experts.hidden_dim)
    with torch.no_grad():
        assert block.is_short(x_TH)
        weight = block.shared_expert.up_proj.weight
        block.shared_expert.up_proj.weight = nn.Parameter(weight.as_subclass(Quantised), False)
        assert not block.is_short(x_TH)


@pytest.mark.parametrize("part", ["gate", "experts", "shared_expert", "shared_expert.up_proj"])
@pytest.mark.parametrize("change", [watch, replace_forward])
def test_whoever_watches_a_part_sees_it_called(part, change):
    block = random_(CMoESparseMoeBlock(configuration("middle", 7, 2)))
    x_TH = torch.randn(1, block.experts.hidden_dim)
    with torch.no_grad():
        assert block.is_short(x_TH)
        change(block.get_submodule(part))
        assert not block.is_short(x_TH)


def test_who_has_gone_is_not_waited_for():
    block = random_(CMoESparseMoeBlock(configuration("middle", 7, 2)))
    x_TH = torch.randn(1, block.experts.hidden_dim)
    with torch.no_grad():
        handle = block.gate.register_forward_hook(lambda *call: None)
        assert not block.is_short(x_TH)
        handle.remove()
        assert block.is_short(x_TH)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_has_watchers_of_its_own(copied):
    block = random_(CMoESparseMoeBlock(configuration("middle", 7, 2)))
    x_TH = torch.randn(1, block.experts.hidden_dim)
    with torch.no_grad():
        assert block.is_short(x_TH)
        other = copied(block)
        assert other.is_short(x_TH)
        replace_forward(other.shared_expert)
        assert not other.is_short(x_TH) and block.is_short(x_TH)


def test_a_weight_that_is_replaced_is_not_kept():
    block = random_(CMoESparseMoeBlock(configuration("middle", 7, 2)))
    with torch.no_grad():
        assert block.is_short(torch.randn(1, block.experts.hidden_dim))
    old = weakref.ref(block.experts.down_proj)
    block.experts.down_proj = nn.Parameter(torch.zeros_like(block.experts.down_proj))
    assert old() is None


def test_it_is_the_default_and_can_be_overruled(carved):
    assert CMoELlamaForCausalLM(configuration("small", 4, 2)).config._experts_implementation
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


@pytest.mark.parametrize("tokens", [1, 7, 30, 600])
def test_the_shared_expert_is_what_its_module_computes(tokens):
    block = random_(CMoESparseMoeBlock(configuration("large", 3, 0, shared=3)))
    x_TH = torch.randn(tokens, 1024)
    with torch.no_grad():
        torch.testing.assert_close(block(x_TH), block.shared_expert(x_TH), atol=1e-5, rtol=1e-5)


def test_the_parts_of_the_shared_expert_can_be_watched_and_replaced():
    block = random_(CMoESparseMoeBlock(configuration("large", 3, 1)))
    x_TH = torch.randn(1, 1024)
    called = []
    parts = [block.shared_expert, block.shared_expert.gate_proj, block.shared_expert.down_proj]
    with torch.no_grad():
        expected = block(x_TH)
        for part in parts:
            handle = part.register_forward_hook(lambda module, *_: called.append(module))
            torch.testing.assert_close(block(x_TH), expected)
            handle.remove()
        assert called == parts
        plain = block.shared_expert.up_proj.forward
        block.shared_expert.up_proj.forward = lambda x: called.append("patched") or plain(x)
        block(x_TH)
        assert called[-1] == "patched"  # as offloading does
        del block.shared_expert.up_proj.forward
        block.shared_expert.up_proj = nn.Sequential(block.shared_expert.up_proj, nn.Tanh())
        assert not torch.equal(block(x_TH), expected)


def test_the_shared_expert_may_be_merged():
    class Merged(nn.Module):
        """What vLLM makes of it: two projections in one, and only the third has its name."""

        def __init__(self, shared):
            super().__init__()
            self.gate_up_proj = torch.cat((shared.gate_proj.weight, shared.up_proj.weight))
            self.down_proj = shared.down_proj

        def forward(self, x):
            gate, up = nn.functional.linear(x, self.gate_up_proj).chunk(2, dim=-1)
            return self.down_proj(nn.functional.silu(gate) * up)

    block = random_(CMoESparseMoeBlock(configuration("large", 3, 1)))
    x_TH = torch.randn(3, 1024)
    with torch.no_grad():
        expected = block(x_TH)
        block.shared_expert = Merged(block.shared_expert)
        torch.testing.assert_close(block(x_TH), expected, atol=1e-5, rtol=1e-5)


def test_adapters_on_the_shared_expert_act():
    model = CMoELlamaForCausalLM(configuration("large", 3, 1)).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = model(ids).logits
        adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"])).eval()
        torch.testing.assert_close(adapted(ids).logits, plain)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        assert (adapted(ids).logits - plain).abs().max() > 0.01
