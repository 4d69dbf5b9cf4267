# SPDX-License-Identifier: Apache-2.0
"""Weight-only quantisation by the libraries themselves: what they reach, and what it costs."""

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes import FIRST_EDITION
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from cmoe_hf.conversion import evaluate
from cmoe_hf.modeling_cmoe import CMoEExperts, CMoELlamaForCausalLM

torchao = pytest.importorskip("torchao.quantization", reason="needs the extra [quantise]")

EXAMPLE = Path(__file__).parent.parent / "examples" / "quantise.py"
PACKED = ("gate_up_proj", "down_proj")
WITHOUT_PACKAGE = """
import sys
sys.modules["cmoe_hf"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
assert not any(info.values()), info
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def repo(embedded, carve):
    """The embedded default, carved S2A2E8, in float32."""
    return carve(embedded, (2, 2, 8), samples=16, sequence_length=256, dtype="float32")


@pytest.fixture(scope="module")
def quantised(repo, tmp_path_factory):
    """What the example makes of it."""
    folder = tmp_path_factory.mktemp("quantised") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [EXAMPLE.name, str(repo), str(folder)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, CMoEExperts)]


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_linear_layers_and_experts_are_stored_in_8_bits(repo, quantised, tensors):
    before = tensors(repo)
    with safe_open(quantised / "model.safetensors", "pt") as stored:
        kinds = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    for name, tensor in before.items():
        module, _, own = name.rpartition(".")
        if name.endswith("_proj.weight") or own in PACKED:
            assert kinds[f"{module}._{own}_qdata"] == "I8", name
        elif "lm_head" not in name:
            assert kinds[name] == {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype], name
    projections = sum(t.numel() for name, t in before.items() if "_proj" in name)
    saved = bytes_of(repo) - bytes_of(quantised)
    assert 2.8 * projections < saved < 3 * projections  # of 4 bytes; the scales take the rest


@pytest.mark.thorough
def test_it_loads_with_the_same_logits_in_a_process_without_the_package(
    quantised, token_ids, tmp_path
):
    torch.save(token_ids, tmp_path / "ids.pt")
    arguments = [quantised, tmp_path / "ids.pt", tmp_path / "out.pt"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, *map(str, arguments)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(load(quantised), token_ids))


@pytest.mark.parametrize("tokens", [1, 32])
def test_the_default_backend_computes_what_the_dequantised_weights_do(quantised, token_ids, tokens):
    model, ids = load(quantised), token_ids[:1, :tokens]
    assert model.config._experts_implementation == "cmoe"
    got = logits(model, ids)
    for experts in experts_of(model):
        for name in PACKED:
            weight = getattr(experts, name)
            assert isinstance(weight, torchao.Int8Tensor)
            setattr(experts, name, nn.Parameter(weight.dequantize(), requires_grad=False))
    torch.testing.assert_close(got, logits(model, ids), atol=1e-4, rtol=1e-4)


def test_perplexity_stays_within_a_percent(repo, quantised, short_text):
    before, after = (
        evaluate(folder, text=short_text, sequence_length=128) for folder in (repo, quantised)
    )
    assert after.perplexity == pytest.approx(before.perplexity, rel=0.01)
    assert after.perplexity != before.perplexity
    assert after.router_oracle_agreement == pytest.approx(before.router_oracle_agreement, abs=0.02)


def warnings_of(caplog, folder, quantisation):
    with caplog.at_level(logging.WARNING):
        load(folder, quantization_config=quantisation)
    return [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]


def check_warning(message, method, folder):
    model = load(folder)
    packed = sum(getattr(experts, name).numel() for experts in experts_of(model) for name in PACKED)
    assert message.startswith(f"{method} quantises linear layers only")
    assert f"{packed / model.model.num_parameters():.0%} of the decoder" in message


def test_torchao_says_that_it_passes_over_the_experts_and_how_to_reach_them(repo, caplog):
    [message] = warnings_of(caplog, repo, TorchAoConfig(torchao.Int8WeightOnlyConfig()))
    check_warning(message, "torchao", repo)
    caplog.clear()
    names = {"TorchAoConfig": TorchAoConfig, **vars(torchao)}
    advice = eval(message.split("both: ")[1], names)
    assert not warnings_of(caplog, repo, advice)
    [first, *_] = experts_of(load(repo, quantization_config=advice))
    assert isinstance(first.down_proj, torchao.Int8Tensor)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_bitsandbytes_says_that_it_passes_over_the_experts(repo, caplog, bits):
    pytest.importorskip("bitsandbytes", reason="needs the extra [quantise]")
    [message] = warnings_of(caplog, repo, BitsAndBytesConfig(**{bits: True}))
    check_warning(message, "bitsandbytes", repo)


def test_plain_loading_warns_of_nothing(repo, quantised, caplog):
    with caplog.at_level(logging.WARNING):
        load(repo), load(quantised)
    assert not [record for record in caplog.records if "experts" in record.getMessage()]


def test_bitsandbytes_can_pack_the_experts_into_4_bits(embedded, carve, token_ids):
    parametrize = pytest.importorskip(
        "bitsandbytes.nn.parametrize", reason="needs the extra [quantise]"
    )
    # On some CPUs the library cannot run linear layers of which its blocks of 64 do not divide
    # the width: the shared expert has 192 neurons here.
    options = {"samples": 16, "sequence_length": 256, "dtype": "float32"}
    repo = carve(embedded, (4, 2, 8), recipe=FIRST_EDITION, **options)
    model = load(repo, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    expected = logits(model, token_ids)
    for layer in model.model.layers:
        for name in PACKED:
            parametrize.replace_parameter_4bit(layer.mlp.experts, name)
    for experts in experts_of(model):
        stored = dict(experts.named_parameters())
        assert {tensor.dtype for tensor in stored.values()} == {torch.uint8}
    assert isinstance(model, CMoELlamaForCausalLM)
    error = (logits(model, token_ids) - expected).std() / expected.std()
    assert 0 < error < 0.15
