# SPDX-License-Identifier: Apache-2.0
"""The benchmark: its figures hang together, its bounds are those of a pencil, it says what lost."""

import json
import math
import re

import pytest
import torch
from refusal import refused
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from cmoe_hf import CMoELlamaForCausalLM
from cmoe_hf.conversion import RequestError, benchmark
from cmoe_hf.conversion.carve.shape import Shape
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.measure.roofline import Work, ffn_work, model_work
from cmoe_hf.conversion.measure.shapes import SHAPES, dense_twin, shape_config

FEW = {"tokens": (1, 20), "prefill": (24,), "batch": (2,), "context": 8, "rounds": 1}
FEW_OPTIONS = ["--tokens", "1,20", "--prefill", "24", "--batch", "2", "--context", "8"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["benchmark", *map(str, arguments)])


def test_json_has_the_promised_keys(carved, dense):
    result = invoke(carved, "--baseline", dense, *FEW_OPTIONS, "--rounds", 3, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert [point["tokens"] for point in printed["ffn"]] == [1, 20]
    assert [point["tokens"] for point in printed["prefill"]] == [24]
    assert [point["batch"] for point in printed["decode"]] == [2]
    assert printed["notation"] == "S2A2E8" and printed["backend"] == "cmoe"
    points = printed["ffn"] + printed["prefill"] + printed["decode"]
    for point in points:
        assert point["dense_ms"] >= point["dense_roofline_ms"] > 0
        assert point["carved_ms"] >= point["carved_roofline_ms"] > 0
        bounds = point["dense_roofline_ms"] / point["carved_roofline_ms"]
        assert point["roofline_speedup"] == pytest.approx(bounds)
        assert point["speedup_low"] <= point["speedup"] <= point["speedup_high"]
        assert 2 <= point["experts_hit"] <= 6
    slower = [remark for remark in printed["remarks"] if remark.startswith("SLOWER")]
    assert len(slower) == sum(point["speedup"] < 1 for point in points)
    # Routing 64 channels costs more than it can save: a slowdown that is real.
    assert slower[0].startswith("SLOWER: FFN block of 1 token: the carved model takes")
    assert "times as long as the dense one" in slower[0]
    assert printed["remarks"][-1].startswith("What may help: compiled decoding")
    assert all(point["backend"] in ("grouped_mm", "sorted", "all_experts") for point in points)
    assert 0.1 < printed["bandwidth_gb_per_s"] < 1e4 and printed["arithmetic_gflop_per_s"] > 0.1


def test_a_shape_needs_no_checkpoint():
    result = benchmark(shape="tiny", layers=1, shared=1, active=1, experts=8, **FEW)
    assert (result.model, result.notation, result.layers) == ("tiny", "S1A1E8", 1)
    assert result.activation_ratio == 0.25
    assert result.ffn[0].roofline_speedup == pytest.approx(4, rel=0.05)  # one expert of seven
    assert 1 < result.ffn[1].experts_hit <= 7


def test_without_a_baseline_a_random_model_is_timed_and_a_text_decides_what_runs(
    carved, held_out, tmp_path
):
    plot, few = tmp_path / "speed.png", ["--tokens", "", "--prefill", "64", "--batch", "2"]
    few += ["--context", 8, "--rounds", 1, "--text", held_out, "--plot", plot]
    result = invoke(carved, *few)
    assert result.exit_code == 0, result.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = result.stdout.splitlines()
    [row] = [line for line in lines if line.startswith("│ decoding, batch 2")]
    assert [line for line in lines if re.match("How the experts ran: .*decoding, batch 2", line)]
    assert len(re.findall(r"\d+\.\d\d-\d+\.\d\d", row)) == 1
    assert "prefill, 64 tokens" in result.stdout and "FFN block" not in result.stdout


@pytest.mark.thorough
def test_compiled_decoding_with_a_static_cache(carved, dense):
    options = {"tokens": (), "prefill": (), "batch": (2,), "context": 8, "rounds": 3}
    result = benchmark(carved, baseline=dense, compiled=True, **options)
    assert result.compiled
    # A recompilation within a round would take seconds.
    assert result.decode[0].carved_ms < 1000 and result.decode[0].speedup_high < 50


def test_bad_requests(carved, dense):
    tiny = ["--shape", "tiny"]
    for arguments, phrase in [
        ([], "either a carved MODEL or --shape"),
        ([carved, *tiny], "either a carved MODEL or --shape"),
        (["--shape", "llama-9"], "no shape 'llama-9'; choose one of tiny"),
        ([*tiny, "--experts", 7], "1024 is not divisible by 7"),
        ([*tiny, "--baseline", dense], "leave out --baseline"),
        ([carved, "--layers", 1], "--layers goes with --shape"),
        ([*tiny, "--layers", 0], "--layers is 0"),
        ([carved, "--tokens", "", "--prefill", "", "--batch", ""], "nothing to time"),
        ([carved, "--tokens", "one"], "--tokens one is not a list of numbers"),
        ([carved, "--batch", "0"], "--batch is 0"),
        ([*tiny, "--device", "cuda:99"], "cannot be used"),
        (["--shape", "llama-2-70b", "--layers", 40, "--dtype", "float32"], "lower --layers"),
        ([*tiny, "--plot", "no/such/folder.png"], "cannot draw into"),
        ([*tiny, "--plot", "plot.docx"], "cannot draw into"),
    ]:
        refused(invoke(*arguments), 2, phrase)


def test_models_that_cannot_be_compared(carved, dense, embedded, tmp_path):
    (tmp_path / "few.txt").write_text("Two words.")
    for model, options, message in [
        (dense, {}, "is not a carved model"),
        (carved, {"baseline": carved}, "is carved itself"),
        (carved, {"baseline": embedded}, "hidden_size 128, but the carved model has 64"),
        (carved, {"backend": "magic"}, "no experts backend 'magic'"),
        (carved, {"text": tmp_path / "few.txt", "prefill": [100]}, "100 are needed"),
    ]:
        with pytest.raises(RequestError, match=message):
            benchmark(model, **{"tokens": (), "batch": (), **options})


def small(shared, active):
    torch.manual_seed(0)
    config = shape_config("tiny", 2, Shape(shared, active, 8))
    config.vocab_size = 100
    dense = LlamaForCausalLM(dense_twin(config))
    return dense, CMoELlamaForCausalLM(config)


def test_the_work_of_an_ffn_is_that_of_its_weights():
    dense, carved = small(1, 1)
    hidden, width = SHAPES["tiny"]["hidden_size"], SHAPES["tiny"]["intermediate_size"]
    vectors = 4 * 2 * 5 * hidden
    work = ffn_work(dense.model.layers[0].mlp, 5, 0)
    assert work == Work(4 * 3 * hidden * width + vectors, 2 * 5 * 3 * hidden * width)
    routed = ffn_work(carved.model.layers[0].mlp, 5, 3)
    router = 7 * hidden + 7  # and the gate scale
    assert routed.bytes == pytest.approx(4 * (3 * hidden * width * 4 / 8 + router) + vectors)
    assert routed.operations == pytest.approx(2 * 5 * (3 * hidden * width * 2 / 8 + router))


def test_with_all_experts_the_whole_model_is_as_much_work_but_for_the_router():
    dense, carved = small(3, 5)
    sizes = {"batch": 2, "tokens": 7, "context": 11}
    works = [
        model_work(model, [layer.mlp for layer in model.model.layers], [5, 5], **sizes)
        for model in (dense, carved)
    ]
    router = 2 * (5 * 256 + 5)
    assert works[1].bytes == pytest.approx(works[0].bytes + 4 * router)
    assert works[1].operations == pytest.approx(works[0].operations + 2 * 2 * 7 * router)
    weights = sum(p.numel() for p in dense.parameters()) - dense.model.embed_tokens.weight.numel()
    cache = 2 * 2 * (11 + 7) * 2 * 64  # layers, sequences, tokens, heads of 64, keys and values
    assert works[0].bytes == pytest.approx(4 * (weights + 2 * cache), rel=0.05)
    assert math.isfinite(works[0].operations)
