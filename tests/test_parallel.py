# SPDX-License-Identifier: Apache-2.0
"""Tensor and expert parallelism: two ranks do what one process does."""

from dataclasses import fields
from itertools import product

import killable
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

pytestmark = [pytest.mark.thorough, pytest.mark.library]

BACKENDS = ("cmoe", "eager", "grouped_mm", "batched_mm")
SHAPES = {  # width 128 instead of 96: grouped kernels want 16 bytes of every expert on each rank
    "S0A2E8": ((0, 2, 8), "llama-2", "paper"),
    "S1A1E8": ((1, 1, 8), "llama-2", "refined"),
    "S2A2E8": ((2, 2, 8), "llama-3", "refined"),
    "qwen3": ((2, 2, 8), "qwen3", "refined"),  # has norms on queries and keys
    "pythia": ((2, 2, 8), "pythia", "refined"),  # has biases and no gate
    "qwen3-moe": ((2, 2, 8), "qwen3-moe", "refined"),  # is carved a second time
}
TENSOR = {"tp_size": 2}
EXPERT = {"tp_size": 2, "ep_size": 2}
"""Attention and shared expert are split by `tp_size`, routed experts dealt out by `ep_size`."""
HAS_EXPERT = "ep_size" in {field.name for field in fields(DistributedConfig)}
needs_expert = pytest.mark.skipif(
    not HAS_EXPERT, reason="the plan's names are of transformers 5.20"
)


@pytest.fixture(scope="module")
def models(make_dense, carve, tmp_path_factory):
    """Carved folders, of which gate scales and balance biases are not zero."""
    folders = {}
    for name, (notation, family, recipe) in SHAPES.items():
        width = "moe_intermediate_size" if family == "qwen3-moe" else "intermediate_size"
        folder = carve(make_dense(family, **{width: 128}), notation, recipe=recipe)
        model = AutoModelForCausalLM.from_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        for layer in model.base_model.layers:
            layer.mlp.gate.scale.data.normal_(generator=generator)
            layer.mlp.gate.balance_bias.normal_(std=0.1, generator=generator)
        if family == "qwen3-moe":
            model.config.kept_parents = [[0, 2], [1]]
        folders[name] = tmp_path_factory.mktemp("biased") / name
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def ranks(models, processes, tmp_path_factory):
    """What two ranks found, for each shape and layout; they are started once."""
    folder = tmp_path_factory.mktemp("ranks")
    layouts = {"tensor": TENSOR} | ({"expert": EXPERT} if HAS_EXPERT else {})
    jobs = [
        (f"{shape}-{layout}", models[shape], layouts[layout], BACKENDS)
        for shape, layout in product(SHAPES, layouts)
    ]
    pair = [
        processes.Process(target=killable.be_rank, args=(rank, folder / "rendezvous", jobs, folder))
        for rank in (0, 1)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(timeout=120)
        process.kill()  # of no effect if it has ended
    assert [process.exitcode for process in pair] == [0, 0]
    return folder


def found(ranks, shape, layout, rank=0):
    result = torch.load(ranks / f"{shape}-{layout}-{rank}.pt")
    assert "error" not in result, result["error"]
    return result


def check_same(ranks, models, shape, layout):
    model = AutoModelForCausalLM.from_pretrained(models[shape], experts_implementation="eager")
    logits, tokens = killable.outputs(model.eval())
    for rank in (0, 1):
        result = found(ranks, shape, layout, rank)
        assert result["default"] == "cmoe"
        for backend in BACKENDS:
            torch.testing.assert_close(result[backend][0], logits, atol=1e-4, rtol=0)
            assert torch.equal(result[backend][1], tokens), backend


def check_saved(ranks, models, tensors, shape, layout):
    """Rank 0 wrote the whole model again."""
    whole, saved = tensors(models[shape]), tensors(ranks / f"{shape}-{layout}-saved")
    assert saved.keys() - whole.keys() <= {"lm_head.weight"}  # the library forgets that it is tied
    assert all(torch.equal(tensor, saved[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_parallel_is_the_same_function(ranks, models, tensors, shape):
    check_same(ranks, models, shape, "tensor")
    check_saved(ranks, models, tensors, shape, "tensor")


@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel_halves_every_expert(ranks, rank):
    shapes = found(ranks, "S2A2E8", "tensor", rank)["shapes"]
    mlp = "model.layers.0.mlp."
    assert shapes[mlp + "experts.gate_up_proj"] == (6, 16, 64)
    assert shapes[mlp + "experts.down_proj"] == (6, 64, 8)
    assert shapes[mlp + "shared_expert.gate_proj.weight"] == (16, 64)
    assert shapes[mlp + "shared_expert.up_proj.weight"] == (16, 64)
    assert shapes[mlp + "shared_expert.down_proj.weight"] == (64, 16)
    assert shapes[mlp + "gate.linear_weight"] == (6, 64)  # every rank routes alike
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (32, 64)


@needs_expert
@pytest.mark.parametrize("shape", ["S0A2E8", "S2A2E8", "qwen3", "pythia", "qwen3-moe"])
def test_expert_parallel_is_the_same_function(ranks, models, tensors, shape):
    check_same(ranks, models, shape, "expert")
    check_saved(ranks, models, tensors, shape, "expert")


@needs_expert
def test_expert_parallel_deals_out_whole_experts(ranks):
    shapes = found(ranks, "S2A2E8", "expert")["shapes"]
    mlp = "model.layers.0.mlp."
    assert shapes[mlp + "experts.gate_up_proj"] == (3, 32, 64)
    assert shapes[mlp + "experts.down_proj"] == (3, 64, 16)
    assert shapes[mlp + "shared_expert.gate_proj.weight"] == (16, 64)


@needs_expert
def test_experts_that_cannot_be_dealt_out_evenly_are_refused(ranks):
    for rank in (0, 1):
        result = torch.load(ranks / f"S1A1E8-expert-{rank}.pt")
        assert "Cannot evenly shard 7 experts across 2" in result["error"]
