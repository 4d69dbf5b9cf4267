# SPDX-License-Identifier: Apache-2.0
"""The experts backend "cmoe_triton", by Triton's interpreter, against the loop over experts.

    make kernels

It needs the package triton and TRITON_INTERPRET=1, no GPU.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from families import block_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from cmoe_hf import CMoEGPTNeoXConfig, CMoELlamaConfig, modeling_cmoe
from cmoe_hf.modeling_cmoe import ExpertsLoop, triton_kernels

pytest.importorskip("triton", reason="needs triton: make kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make kernels", allow_module_level=True)

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def sparse_block(
    kind=CMoELlamaConfig,
    hidden=24,
    width=20,
    shared=1,
    experts=5,
    top_k=2,
    dtype=torch.bfloat16,
    activation="silu",
    **options,
):
    """A model of one layer without gradients, and its sparse block of random weights."""
    more = {"num_attention_heads": 1, "vocab_size": 8, "hidden_act": activation, **options}
    config = block_config(kind, hidden, width, experts, top_k, shared, **more)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="cmoe_triton")
    block = model.base_model.layers[0].mlp
    for name, tensor in block.state_dict().items():
        tensor.normal_(std=0.3 if name.endswith("balance_bias") else tensor.shape[-1] ** -0.5)
    return model.to(dtype).eval().requires_grad_(False), block


@contextmanager
def counted(monkeypatch):
    """Count the kernels that run."""
    kernels, calls = triton_kernels(), {"experts": 0, "router": 0}

    def counting(name):
        def run(*arguments):
            calls[name] += 1
            return getattr(kernels, name)(*arguments)

        return run

    with monkeypatch.context() as patch:
        replaced = kernels._replace(**{name: counting(name) for name in calls})
        patch.setattr(modeling_cmoe, "triton_kernels", lambda: replaced)
        yield calls


def both(model, block, x):
    """What the loop over experts and the kernels compute, with scores, weights and experts."""
    found = []
    for backend in ("eager", "cmoe_triton"):
        model.set_experts_implementation(backend)
        found.append((block(x), *block.gate(x.flatten(0, -2))))
    return found


def check(model, block, tokens):
    x_1TH = torch.randn(1, tokens, block.config.hidden_size, dtype=model.dtype)
    expected, got = both(model, block, x_1TH)
    assert [it.dtype for it in got] == [it.dtype for it in expected]
    torch.testing.assert_close(got[1], expected[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(got[3], expected[3])  # the order of the experts too
    tolerance = TOLERANCE[model.dtype]
    for index in (0, 2):
        torch.testing.assert_close(got[index], expected[index], atol=tolerance, rtol=tolerance)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    hidden=st.sampled_from([8, 24, 40]),
    width=st.sampled_from([3, 16, 20]),
    shared=st.integers(0, 2),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    tokens=st.integers(1, 16),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    activation=st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"]),
    router_type=st.sampled_from(["representative", "linear"]),
    router_absolute_score=st.booleans(),
)
def test_the_kernels_compute_what_the_loop_over_experts_does(tokens, experts, top_k, **shape):
    torch.manual_seed(tokens)
    with pytest.MonkeyPatch.context() as patch, counted(patch) as calls:
        model, block = sparse_block(experts=experts, top_k=min(top_k, experts), **shape)
        check(model, block, tokens)
    assert calls == {"experts": 1, "router": 2}


def not_covered():
    """What the kernels leave to the default backend: a block and its input, by the reason."""
    _, block = sparse_block()
    yield "17 tokens", block, 17, torch.bfloat16
    yield "float32", sparse_block(dtype=torch.float32)[1], 3, torch.float32
    yield "an activation", sparse_block(activation="sigmoid")[1], 3, torch.bfloat16
    yield "no gate", sparse_block(CMoEGPTNeoXConfig)[1], 3, torch.bfloat16
    _, trained = sparse_block()
    yield "gradients", trained.requires_grad_(True), 3, torch.bfloat16


@pytest.mark.parametrize("reason", [reason for reason, *_ in not_covered()])
def test_all_else_is_left_to_the_default_backend(reason, monkeypatch):
    [(block, tokens, dtype)] = [found for it, *found in not_covered() if it == reason]
    x_1TH = torch.randn(1, tokens, block.config.hidden_size, dtype=dtype)
    with counted(monkeypatch) as calls:
        got = block(x_1TH)
    assert calls == {"experts": 0, "router": 0}
    for module in (block, block.gate, block.experts):
        module.config._experts_implementation = "cmoe"  # no public name
    torch.testing.assert_close(got, block(x_1TH), atol=3e-2, rtol=3e-2)


def test_static_pruning_has_nothing_to_route():
    model, block = sparse_block(top_k=0)
    expected, got = (it[0] for it in both(model, block, torch.randn(1, 2, 24).bfloat16()))
    assert torch.equal(got, expected)


def test_a_replaced_shared_expert_is_called(monkeypatch):
    """The routed experts still run in the kernels: adapters replace linear layers."""
    model, block = sparse_block()
    x_1TH = torch.randn(1, 3, 24).bfloat16()
    before = block(x_1TH)
    block.shared_expert.up_proj = nn.Sequential(block.shared_expert.up_proj, nn.Tanh())
    with counted(monkeypatch) as calls:
        check(model, block, 3)
        assert not torch.equal(block(x_1TH), before)
    assert calls == {"experts": 2, "router": 3}


def test_experts_on_other_ranks_are_left_out():
    _, block = sparse_block()
    x_TH, weight_TK = torch.randn(4, 24).bfloat16(), torch.rand(4, 2).bfloat16()
    index_TK = torch.tensor([[0, 5], [5, 5], [4, 1], [5, 2]])
    found = [run(block.experts, x_TH, index_TK, weight_TK) for run in (ExpertsLoop.forward, call)]
    torch.testing.assert_close(found[1], found[0], atol=3e-2, rtol=3e-2)
    assert not found[1][1].any()


def call(module, *arguments):
    return module(*arguments)


def test_a_share_of_the_experts_is_not_taken_for_all(monkeypatch):
    """Under tensor parallelism modules hold a part of the neurons and hooks add up."""
    model, block = sparse_block()
    added = []
    block.experts.register_forward_hook(lambda *_: added.append(1))
    block.experts.down_proj = nn.Parameter(block.experts.down_proj[..., :10].contiguous(), False)
    halves = block.experts.gate_up_proj.view(5, 2, 20, 24)[:, :, :10].flatten(1, 2)
    block.experts.gate_up_proj = nn.Parameter(halves.contiguous(), False)
    with counted(monkeypatch) as calls:
        check(model, block, 3)
    assert calls["experts"] == 1 and len(added) == 2


def test_scores_that_are_no_numbers_choose_experts_that_exist():
    _, block = sparse_block()
    routing = block.gate(torch.full((2, 24), torch.nan, dtype=torch.bfloat16))
    assert (routing.index_TK < 5).all() and routing.weight_TK.isnan().all()


def test_router_scores_are_collected(monkeypatch):
    model, _ = sparse_block()
    ids = torch.arange(6)[None]
    with counted(monkeypatch) as calls:
        [score_TN] = model(ids, output_router_logits=True).router_logits
    assert calls == {"experts": 1, "router": 1} and score_TN.shape == (6, 5)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(score_TN, model(ids, output_router_logits=True).router_logits[0])


def test_a_compiler_sees_the_kernels_and_they_become_machine_code():
    """In a process without the interpreter: the kernels cannot run where there is no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "lru_cache" not in done.stderr, done.stderr
    assert done.stdout.split() == ["router", "gate_up", "down"] * 2


COMPILED = """
import torch, triton
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from transformers import AutoModelForCausalLM
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cmoe_hf import CMoELlamaConfig, triton_cmoe

triton_cmoe.cover = lambda *_: True  # as if the tensors were on a GPU
config = CMoELlamaConfig(
    hidden_size=24, intermediate_size=40, moe_intermediate_size=8, num_experts=4,
    num_attention_heads=1, num_hidden_layers=1, vocab_size=8,
)
model = AutoModelForCausalLM.from_config(config, experts_implementation="cmoe_triton")
block = model.bfloat16().requires_grad_(False).model.layers[0].mlp


def python_of(kernel):
    return kernel if isinstance(kernel, triton.JITFunction) else python_of(kernel.fn)


def record(graph, inputs):
    for node in graph.graph.nodes:
        if "kernel_idx" in node.kwargs:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            print(python_of(kernel).__name__.removesuffix("_kernel"))
    outputs = [it.meta["val"] for it in graph.graph.output_node().args[0]]
    return lambda *_: [torch.zeros(it.shape, dtype=it.dtype) for it in outputs]


run = torch.compile(block, backend=aot_autograd(fw_compiler=record), fullgraph=True)
with torch.no_grad():
    run(torch.zeros(1, 2, 24).bfloat16())

TYPES = {"index_TK": "*i64", "score_TN": "*fp32", "bias_N": "*fp32"}
TYPES |= dict.fromkeys(("experts", "hidden", "width", "shared_width", "size"), "i32")
TILE = {"ROWS": 8, "COLUMNS": 512}
CONSTANTS = {
    "router": {"TOP_K": 2, "GATED": True, "ABSOLUTE": False, "ACTIVATION": 1, **TILE},
    "gate_up": {"TOP_K": 2, "SLOTS": 3, "ACTIVATION": 2, **TILE},
    "down": {"TOP_K": 2, **TILE},
}
for name, constants in CONSTANTS.items():
    kernel = python_of(getattr(triton_cmoe, name + "_kernel"))
    types = {it: TYPES.get(it, "*bf16") for it in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(kernel, types, constants), GPUTarget("cuda", 90, 32))
    print(name if made.asm["cubin"] else "nothing")
"""
