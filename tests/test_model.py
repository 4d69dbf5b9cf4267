# SPDX-License-Identifier: Apache-2.0
"""The model itself: routing, backends, and what transformers expects of a MoE."""

import fnmatch
from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, silu
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmoe_hf import CMoELlamaConfig, CMoELlamaForCausalLM
from cmoe_hf.modeling_cmoe import CMoERouter

pytestmark = pytest.mark.library

BACKENDS = ["eager", "batched_mm", "grouped_mm"]
COMPILERS = ["eager", pytest.param("inductor", marks=pytest.mark.thorough)]
"""Of `torch.compile`: the first only traces, which is what a graph break would stop."""


FIELDS = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 16,
}


def config(**changes):
    return CMoELlamaConfig(**{**FIELDS, "num_key_value_heads": 2, **changes})


def random_model(**changes):
    """Random weights, u and b not zero."""
    return randomised(CMoELlamaForCausalLM, config(**changes))


def randomised(kind, settings):
    """A model with random weights, biases, u and b in its sparse blocks."""
    torch.manual_seed(0)
    model = kind(settings).eval()
    for name, tensor in model.state_dict().items():
        if ".mlp." in name:
            tensor.normal_(std=0.3)
    return model


ids = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("router_type", ["representative", "linear"])
@pytest.mark.parametrize("absolute", [False, True])
def test_router_against_its_definition(router_type, absolute):
    settings = config(router_type=router_type, router_absolute_score=absolute)
    router = CMoERouter(settings)
    for tensor in router.state_dict().values():
        tensor.normal_(std=0.2)  # small: softmax must not saturate
    x_TH = torch.randn(20, 32)
    score_TN, weight_TK, index_TK = router(x_TH)
    for x_H, got_N, weight_K, index_K in zip(x_TH, score_TN, weight_TK, index_TK, strict=True):
        if router_type == "linear":
            score_N = router.linear_weight @ x_H
        else:
            score_N = silu(router.gate_weight @ x_H) * (router.up_weight @ x_H)
        score_N = score_N.abs() if absolute else score_N
        torch.testing.assert_close(got_N, score_N)
        share_N = score_N.exp() / score_N.exp().sum()
        order = sorted(range(6), key=lambda n: -(share_N + router.balance_bias)[n].item())
        assert sorted(index_K.tolist()) == sorted(order[:2])
        torch.testing.assert_close(weight_K, 1 + share_N[index_K] * router.scale[index_K])


SHAPES = [(2, 16, 6), (6, 16, 6), (1, 0, 8), (3, 0, 8), (1, 56, 1), (0, 16, 6)]
"""Experts that run, width of the shared one, routed experts."""


def slow_block(block, x_TH):
    """The block as a loop over tokens and experts, (T, H)."""
    shared, experts, rows = block.shared_expert, block.experts, []
    is_plain = block.down_bias is not None
    _, weight_TK, index_TK = block.gate(x_TH)
    for x_H, weight_K, index_K in zip(x_TH, weight_TK, index_TK, strict=True):
        y_H = block.down_bias.clone() if is_plain else torch.zeros_like(x_H)
        if shared is not None:
            h_S = shared.up_proj.weight @ x_H
            h_S = gelu(h_S + shared.up_proj.bias) if is_plain else h_S * silu(shared.gate_proj(x_H))
            y_H += shared.down_proj.weight @ h_S
        for weight, expert in zip(weight_K, index_K.tolist(), strict=True):
            if is_plain:
                h_M = gelu(experts.up_proj[expert] @ x_H + experts.up_proj_bias[expert])
            else:
                gate_M, up_M = (experts.gate_up_proj[expert] @ x_H).chunk(2)
                h_M = silu(gate_M) * up_M
            y_H += weight * (experts.down_proj[expert] @ h_M)
        rows.append(y_H)
    return torch.stack(rows)


def check_block(make, shape):
    """Every backend computes what the loop over tokens and experts does."""
    names = ("num_experts_per_tok", "shared_expert_intermediate_size", "num_experts")
    model = make(**dict(zip(names, shape, strict=True)))
    block = model.base_model.layers[0].mlp
    for tokens in (1, 40):
        x_TH = torch.randn(tokens, 32)
        expected = slow_block(block, x_TH)
        for backend in ("cmoe", *BACKENDS):
            model.set_experts_implementation(backend)
            got = block(x_TH[None])[0]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, msg=backend)
    assert model(ids, output_router_logits=True).logits.shape == (2, 12, 128)


@pytest.mark.parametrize("router_type", ["representative", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_backend_computes_what_a_loop_over_experts_does(router_type, shape):
    check_block(partial(random_model, router_type=router_type), shape)


class Logits(torch.nn.Module):
    """What a trace can return."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "shape"), [("llama-2", (2, 2, 8)), ("pythia", (2, 2, 8)), ("qwen3-moe", (1, 1, 4))]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_of_one_token_serves_others(make_dense, carve, family, shape):
    model = AutoModelForCausalLM.from_pretrained(carve(make_dense(family), shape)).eval()
    if family == "qwen3-moe":
        for layer in model.model.layers:
            layer.mlp.gate.kept_parents = [0]
    expected = [model(torch.tensor([[token]])).logits for token in range(20, 40)]
    for backend in ("cmoe", *BACKENDS):
        model.set_experts_implementation(backend)
        traced = torch.jit.trace(Logits(model), torch.tensor([[5]]), check_trace=False)
        for token, logits in zip(range(20, 40), expected, strict=True):
            got = traced(torch.tensor([[token]]))
            torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-4)


def test_gradients_agree_between_backends():
    equal_gradients(random_model, BACKENDS)


def equal_gradients(make, backends):
    """Gradients of a model, by name, that each backend finds; they have been compared."""
    found = []
    for backend in backends:
        model = make()
        model.set_experts_implementation(backend)
        model(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        for name, gradient in found[-1].items():
            torch.testing.assert_close(gradient, found[0][name], atol=1e-5, rtol=1e-3, msg=name)
    return found


def test_router_logits_on_request_by_keyword_or_config():
    model = random_model()
    assert "router_logits" not in model(ids)
    by_keyword = model(ids, output_router_logits=True).router_logits
    assert [tuple(scores.shape) for scores in by_keyword] == [(24, 6)] * 2
    model.config.output_router_logits = True
    by_config = model(ids).router_logits
    for ours, theirs in zip(by_keyword, by_config, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert "router_logits" not in model(ids, output_router_logits=False)


def test_hidden_states_and_attentions_are_recorded():
    model = random_model()
    model.set_attn_implementation("eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 12, 12)] * 2


def test_attention_backends_agree():
    model = random_model()
    expected = model(ids).logits
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = random_model()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_balance_bias_stays_float32_in_half_precision(dtype, tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    loaded = CMoELlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    router = loaded.model.layers[1].mlp.gate
    assert router.balance_bias.dtype == torch.float32
    assert router.scale.dtype == router.gate_weight.dtype == dtype
    torch.testing.assert_close(router.balance_bias, model.model.layers[1].mlp.gate.balance_bias)
    assert torch.isfinite(loaded(ids).logits).all()


def test_generation_stops_at_a_string(carved):
    """For which the library hands the tokenizer to `generate`, and from there to the model."""
    model = CMoELlamaForCausalLM.from_pretrained(carved).eval()
    tokenizer = AutoTokenizer.from_pretrained(carved)
    options = {"do_sample": False, "max_new_tokens": 12}
    whole = model.generate(ids[:1], **options)
    stop = tokenizer.decode(whole[0, 16:18])
    stopped = model.generate(ids[:1], **options, stop_strings=[stop], tokenizer=tokenizer)
    assert stopped.tolist() == whole[:, :18].tolist()


def test_the_parallel_plans_name_every_expert_tensor():
    model = random_model()
    names = [name for name, _ in model.model.named_parameters() if ".mlp." in name]
    planned = model.config.base_model_tp_plan
    for name in names:
        covered = any(fnmatch.fnmatch(name, f"{pattern}*") for pattern in planned)
        assert covered != (".gate." in name), f"{name}: experts are split, the router is not"
    expert = [name for name in names if ".experts." in name]
    for name in expert:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in model.config.base_model_ep_plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 5}, "must equal intermediate_size"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"router_type": "magic"}, "router_type"),
        ({"always_on_experts": [[0]]}, "1 lists for 2 layers"),
        ({"always_on_experts": [[0], [6]]}, "names 6 in layer 1"),
        ({"always_on_experts": [[], [1, 1]]}, "each once"),
        ({"always_on_experts": [[0, 1, 2], []]}, "at most 2"),
        (
            {
                "num_experts": 8,
                "shared_expert_intermediate_size": 0,
                "num_experts_per_tok": 0,
            },
            "at least 1",
        ),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        config(**changes)


def test_notation_and_activation_ratio():
    settings = config()
    assert settings.notation == "S2A2E8"
    assert settings.activation_ratio == 0.5
    assert settings.num_local_experts == settings.num_experts == 6
