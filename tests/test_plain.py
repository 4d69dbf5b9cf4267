# SPDX-License-Identifier: Apache-2.0
"""FFNs without a gate, h = act(x W + b), as in GPT-NeoX and Pythia: what they add to the others."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_evaluate import slow_perplexity
from test_model import (
    BACKENDS,
    FIELDS,
    SHAPES,
    check_block,
    equal_gradients,
    ids,
    randomised,
)
from torch.nn.functional import gelu, normalize
from transformers import AutoModelForCausalLM, GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

from cmoe_hf import CMoEGPTNeoXConfig, CMoEGPTNeoXForCausalLM
from cmoe_hf.conversion import evaluate
from cmoe_hf.conversion.carve.profile import cosines
from cmoe_hf.conversion.carve.router import representative_router
from cmoe_hf.conversion.measure.roofline import Work, ffn_work
from cmoe_hf.modeling_cmoe import CMoERouter

pytestmark = pytest.mark.library


def config(**changes):
    return CMoEGPTNeoXConfig(**{**FIELDS, **changes})


def random_model(**changes):
    """Random weights and biases everywhere."""
    return randomised(CMoEGPTNeoXForCausalLM, config(**changes))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_backend_adds_the_output_bias_once(shape):
    check_block(random_model, shape)


def test_gradients_agree_between_backends():
    for gradients in equal_gradients(random_model, ["cmoe", *BACKENDS]):
        assert gradients["gpt_neox.layers.0.mlp.experts.up_proj_bias"].any()


def test_it_compiles_as_one_graph():
    model = random_model(num_hidden_layers=1)
    with torch.no_grad():
        expected = model(ids).logits
        got = torch.compile(model, fullgraph=True, backend="eager")(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("absolute", [False, True])
@torch.no_grad()
def test_the_router_scores_by_the_activation_of_one_neuron(absolute):
    router = CMoERouter(config(router_absolute_score=absolute))
    for tensor in router.state_dict().values():
        tensor.normal_(std=0.2)
    x_TH = torch.randn(20, 32)
    score_TN = gelu(x_TH @ router.up_weight.T + router.up_bias)
    score_TN = score_TN.abs() if absolute else score_TN
    torch.testing.assert_close(router(x_TH)[0], score_TN)


def test_a_bias_is_one_more_input_that_is_always_one():
    x_TH, up_FH, bias_F = torch.randn(7, 5), torch.randn(9, 5), torch.randn(9)
    x_TJ = torch.cat([x_TH, torch.ones(7, 1)], dim=1)
    row_FJ = torch.cat([up_FH, bias_F[:, None]], dim=1)
    torch.testing.assert_close(
        cosines(x_TH @ up_FH.T + bias_F, x_TH, up_FH, bias_F),
        normalize(x_TJ, dim=1) @ normalize(row_FJ, dim=1).T,
    )
    chosen_N = torch.tensor([3, 0, 7])
    for rows, normalised in ((row_FJ, False), (normalize(row_FJ, dim=1), True)):
        router = representative_router(
            None, up_FH, chosen_N, up_bias_F=bias_F, normalise=normalised
        )
        torch.testing.assert_close(router["up_weight"], rows[chosen_N, :5])
        torch.testing.assert_close(router["up_bias"], rows[chosen_N, 5])


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_names_of_old_and_new_checkpoints(make_dense, carve, tensors, token_ids, tmp_path, head):
    folder = shutil.copytree(make_dense("pythia"), tmp_path / "pythia")
    expected = AutoModelForCausalLM.from_pretrained(folder)(token_ids).logits
    stored = tensors(folder)
    [former] = stored.keys() & {"embed_out.weight", "lm_head.weight"}
    stored[head] = stored.pop(former)
    stored["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8)
    stored["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(carve(folder, (2, 6, 8), recipe="paper"))
    torch.testing.assert_close(model(token_ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert not any("masked" in name for name in model.state_dict())


def test_it_is_measured_like_the_others(make_dense, carve, short_text):
    dense = make_dense("pythia")
    folder = carve(dense, (3, 3, 8))
    result = evaluate(folder, baseline=dense, text=short_text, sequence_length=64)
    expected, _ = slow_perplexity(folder, short_text, 64)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    expected, _ = slow_perplexity(dense, short_text, 64)
    assert result.baseline_perplexity == pytest.approx(expected, rel=1e-4)


def test_its_work_is_that_of_its_weights():
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    fields = {name: FIELDS[name] for name in names}
    dense = GPTNeoXMLP(GPTNeoXConfig(**fields))
    vectors, weights = 2 * 5 * 32, 2 * 32 * 64 + 64 + 32
    assert ffn_work(dense, 5, 0) == Work(4 * (weights + vectors), 2 * 5 * weights)
    carved = random_model().base_model.layers[0].mlp
    neuron = 2 * 32 + 1
    always = 16 * neuron + 32 + 6 * (32 + 2)  # shared, the output's bias, the router and its scale
    work = ffn_work(carved, 5, 3)
    assert work.bytes == pytest.approx(4 * (always + 3 * 8 * neuron + vectors))
    assert work.operations == pytest.approx(2 * 5 * (always + 2 * 8 * neuron))
