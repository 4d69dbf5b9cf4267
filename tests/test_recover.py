# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: what learns, what stays, what is counted, and what survives an interruption."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import killable
import pytest
import torch
import yaml
from families import SHORT
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import FIRST_EDITION
from refusal import refused
from transformers import AutoModelForCausalLM, Trainer
from typer.testing import CliRunner

from cmoe_hf.conversion import (
    Recipe,
    Tuning,
    recover,
    resume_recovery,
    upgrade,
)
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.demo import CALIBRATION, HELD_OUT
from cmoe_hf.conversion.measure.evaluate import perplexity
from cmoe_hf.conversion.measure.routing import active_routers, count_loads, imbalance
from cmoe_hf.conversion.tune.tuning import divergence, move_bias

TEXTS = {"training": CALIBRATION, "text": SHORT}
FEW = {"samples": 16, "sequence_length": 64}
LOUD = {**FEW, "learning_rate": 3e-3, "router_learning_rate": 0.1, "bias_speed": 0.01}
"""Few steps, but large ones: what learns must be seen to move."""


@pytest.fixture(scope="session")
def carved(dense, carve):
    """A carved pico model, S2A2E8. Read only."""
    return carve(dense, recipe=FIRST_EDITION)


@pytest.fixture(scope="module")
def recovered(carved, dense, tmp_path_factory):
    """A recovery with a control, and its result."""
    output = tmp_path_factory.mktemp("recovered") / "out"
    return output, recover(carved, output, **TEXTS, control=dense, tuning=Tuning(**LOUD))


def report(output):
    return json.loads((output / "recovery.json").read_text())


def losses(output):
    return [row["loss"] for row in report(output)["stages"]["carved"]["losses"]]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def kill_after_two_checkpoints(pair, checkpoints):
    while len(list(checkpoints.glob("checkpoint-*/trainer_state.json"))) < 2:
        assert all(process.is_alive() for process in pair), "it ended before it could be killed"
        time.sleep(0.01)
    for process in pair:
        process.kill()
        process.join()


@pytest.mark.library
def test_what_learns_moves_and_nothing_else(carved, recovered, tensors):
    before, after = tensors(carved), tensors(recovered[0])
    assert before.keys() == after.keys()
    learns = ("_proj.weight", "experts.gate_up_proj", "experts.down_proj", "scale", "balance_bias")
    for name, tensor in before.items():
        moved = not torch.equal(tensor, after[name])
        assert moved == name.endswith(learns), name
        assert tensor.dtype == after[name].dtype


def test_the_gate_scale_learns_although_peft_freezes_what_is_no_adapter(recovered):
    assert recovered[1].scale > 0.01
    assert all(all(layer) for layer in report(recovered[0])["stages"]["carved"]["scales"])


def test_the_routers_learn_on_request_and_without_speed_the_biases_stay(carved, tensors, tmp_path):
    tuning = Tuning(**{**LOUD, "bias_speed": 0}, train_router=True)
    result = recover(carved, tmp_path / "out", **TEXTS, tuning=tuning)
    assert result.perplexity_after_without_bias is None
    before, after = tensors(carved), tensors(tmp_path / "out")
    assert any(name.endswith("linear_weight") for name in before)
    for name, tensor in before.items():
        if name.endswith(("linear_weight", "balance_bias")):
            assert torch.equal(tensor, after[name]) == name.endswith("bias")


def test_the_figures_are_those_of_the_models(carved, dense, recovered, token_ids):
    output, result = recovered
    windows_WL = token_ids  # any windows will do to compare two computations
    model, source = load(output), load(carved)
    assert perplexity(model, windows_WL) != perplexity(source, windows_WL)
    logs = [
        math.log(perplexity)
        for perplexity in (
            *(result.perplexity_before, result.perplexity_after),
            *(result.control_before, result.control_after),
        )
    ]
    assert result.gap_before == pytest.approx(logs[0] - logs[2])
    assert result.gap_after == pytest.approx(logs[1] - logs[3])
    assert result.closed == pytest.approx((logs[0] - logs[1]) / (logs[0] - logs[3]))
    assert result.control_after != result.control_before
    assert result.perplexity_after_without_bias != result.perplexity_after
    assert result.steps == 8
    assert result.training_tokens == 16 * 64


def test_measured_again_it_is_the_same(recovered):
    arguments = ["evaluate", recovered[0], "--text", SHORT, "--sequence-length", 64, "--json"]
    measured = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert json.loads(measured.stdout)["perplexity"] == pytest.approx(
        recovered[1].perplexity_after, rel=1e-5
    )


def test_the_repository_is_complete_and_says_what_was_done(carved, recovered):
    output = recovered[0]
    missing = {path.name for path in carved.iterdir()} - {path.name for path in output.iterdir()}
    assert all(name.startswith("model") for name in missing)  # one shard or several
    card = (output / "README.md").read_text()
    assert "No gradient" not in card and "[fine-tuned](#recovery)" in card
    assert card.index("## Recovery") < card.index("## Licence")
    assert f"{recovered[1].perplexity_after:.2f}" in card
    assert not output.with_name("out.partial").exists()
    for text in (card, (output / "recovery.json").read_text()):
        assert str(output.parent) not in text and str(CALIBRATION.parent) not in text


def test_micro_batches_and_checkpointed_activations_change_nothing(carved, recovered, tmp_path):
    change = {"micro_batch_size": 1, "gradient_checkpointing": True}
    recover(carved, tmp_path / "out", **TEXTS, tuning=Tuning(**LOUD, **change))
    assert losses(tmp_path / "out") == pytest.approx(losses(recovered[0]), rel=1e-4)
    ours, theirs = (report(at)["stages"]["carved"] for at in (tmp_path / "out", recovered[0]))
    for key in ("biases", "scales"):
        pair = torch.tensor(ours[key]), torch.tensor(theirs[key])
        torch.testing.assert_close(*pair, atol=2e-3, rtol=0)


def test_the_bias_moves_once_in_each_optimiser_step(recovered):
    """Eight steps of falling size, up or down: 8 to 1 eighths of the speed."""
    biases = torch.tensor(report(recovered[0])["stages"]["carved"]["biases"])
    eighths = biases / (LOUD["bias_speed"] / 8)
    torch.testing.assert_close(eighths, eighths.round(), atol=1e-3, rtol=0)
    # An expert that is always too busy, or never busy enough, went the whole way.
    assert eighths.round().abs().max() == sum(range(1, 9))


@pytest.mark.thorough
def test_the_biases_balance_the_loads(embedded, carve, tmp_path):
    (tmp_path / "test.txt").write_text(HELD_OUT.read_text(encoding="utf-8")[:8_000])
    texts = {"training": CALIBRATION, "text": tmp_path / "test.txt"}
    tuning = Tuning(samples=64, sequence_length=128, batch_size=4, bias_speed=0.03)
    carved = carve(embedded, (1, 1, 8), samples=8, sequence_length=128)
    result = recover(carved, tmp_path / "out", **texts, tuning=tuning)
    assert result.training_imbalance_after < result.training_imbalance_before / 2
    assert result.imbalance_after < result.imbalance_before
    assert result.imbalance_after < result.imbalance_after_without_bias


def test_always_on_experts_stay_on_in_bfloat16(dense, carve, tmp_path, tensors, edit_config):
    carved = carve(dense, recipe=Recipe.of("refined", pinned=1), dtype="bfloat16")
    recover(carved, tmp_path / "out", **TEXTS, tuning=Tuning(**LOUD))
    before, after = tensors(carved), tensors(tmp_path / "out")
    for name, tensor in after.items():
        is_bias = name.endswith("balance_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16)
        assert not name.endswith("scale") or tensor.any()
        if is_bias:
            pinned = before[name] == 2
            assert pinned.sum() == 1
            assert torch.equal(tensor == 2, pinned)
            assert tensor[~pinned].any()
    path = tmp_path / "out" / "config.json"
    written = path.read_bytes()
    assert json.loads(written)["always_on_experts"] == [[0], [0]]
    edit_config(tmp_path / "out", always_on_experts=None)  # as in releases until 0.2
    assert upgrade(tmp_path / "out").changed == ["config.json"]
    assert path.read_bytes() == written


def test_a_model_that_does_not_route_recovers_too(dense, carve, tmp_path):
    result = recover(carve(dense, (4, 0, 8)), tmp_path / "out", **TEXTS, tuning=Tuning(**FEW))
    assert result.scale is None and result.imbalance_after is None
    assert result.perplexity_after != result.perplexity_before


def test_distilling_from_its_own_function_starts_at_zero(dense, carve, tmp_path):
    everything = carve(dense, (2, 6, 8), recipe="paper")  # all experts active: the dense model
    recover(
        everything, tmp_path / "out", **TEXTS, teacher=dense, tuning=Tuning(**{**FEW, "samples": 4})
    )
    assert losses(tmp_path / "out")[0] == pytest.approx(0, abs=1e-4)


def test_distilling_learns_the_teacher_and_a_teacher_is_no_control(carved, dense, tmp_path):
    tuning = Tuning(**{**FEW, "epochs": 4, "learning_rate": 3e-3})
    arguments = {"teacher": dense, "control": dense, "tuning": tuning}
    result = recover(carved, tmp_path / "out", **TEXTS, **arguments)
    curve = losses(tmp_path / "out")
    assert sum(curve[-8:]) < sum(curve[:8])  # the last and the first time that it saw the windows
    assert result.control_after == result.control_before


def test_divergence_is_the_textbook_sum():
    torch.manual_seed(0)
    model_TV, teacher_TV = torch.randn(5, 7), torch.randn(5, 7)
    total = 0.0
    for model_V, teacher_V in zip(model_TV, teacher_TV, strict=True):
        p, q = teacher_V.softmax(0), model_V.softmax(0)
        total += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    assert divergence(model_TV, teacher_TV).item() == pytest.approx(total / 5, rel=1e-5)


BIASES = st.sampled_from([-1.0, -0.3, 0.0, 0.7, 1.0, 2.0])


@given(st.lists(st.tuples(st.integers(0, 1000), BIASES), min_size=1, max_size=12))
@settings(deadline=None)
def test_move_bias_is_what_a_loop_does(experts):
    loads, biases = zip(*experts, strict=True)
    free = [load for load, bias in experts if bias <= 1]
    mean = sum(free) / len(free) if free else 0
    expected = []
    for load, bias in experts:
        step = 0.125 if load < mean else -0.125 if load > mean else 0.0
        expected.append(bias if bias > 1 else min(1.0, max(-1.0, bias + step)))
    bias_N = torch.tensor(biases)
    move_bias(bias_N, torch.tensor(loads), 0.125, bias_N > 1)
    torch.testing.assert_close(bias_N, torch.tensor(expected))


def test_loads_and_imbalance_are_what_a_loop_counts(recovered, token_ids):
    model = load(recovered[0])
    gates = active_routers(model)
    chosen = {gate: [] for gate in gates}
    for gate in gates:
        gate.register_forward_hook(lambda gate, _, output: chosen[gate].extend(output[2].tolist()))
    with count_loads(model) as loads:
        model(token_ids)
    for gate, load_N in zip(gates, loads, strict=True):
        counts = [0] * len(load_N)
        for choice in chosen[gate]:
            for expert in choice:
                counts[expert] += 1
        assert load_N.tolist() == counts
        mean = sum(counts) / len(counts)
        deviation = (sum((count - mean) ** 2 for count in counts) / len(counts)) ** 0.5
        assert imbalance(load_N, gate.balance_bias > 1) == pytest.approx(deviation / mean)


@pytest.mark.library
def test_interrupted_it_resumes_to_the_same_curve(carved, recovered, dense, tmp_path, tensors):
    """In this process; the next test kills one."""
    steps = []

    def step(trainer, *arguments):
        steps.append(trainer.state.global_step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return take_step(trainer, *arguments)

    take_step = Trainer.training_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", step)
        recover(carved, tmp_path / "out", **TEXTS, control=dense, tuning=Tuning(**LOUD))
    assert not (tmp_path / "out").exists()
    resume_recovery(tmp_path / "out")
    assert losses(tmp_path / "out") == losses(recovered[0])
    whole, resumed = tensors(recovered[0]), tensors(tmp_path / "out")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.thorough
def test_killed_it_resumes_to_the_same_curve(carved, processes, tmp_path, tensors):
    tuning = {**LOUD, "samples": 60}
    recover(carved, tmp_path / "whole", **TEXTS, tuning=Tuning(**tuning))
    arguments = {"model": carved, "output": tmp_path / "killed", **TEXTS}
    process = processes.Process(target=killable.recover_it, args=(arguments, tuning))
    process.start()
    checkpoints = tmp_path / "killed.partial" / "work" / "carved"
    kill_after_two_checkpoints([process], checkpoints)
    (checkpoints / "checkpoint-99").mkdir()  # cut off while it was written
    (checkpoints / "checkpoint-99" / "trainer_state.json").write_text('{"half": ')
    refused(
        CliRunner().invoke(app, ["convert", str(tmp_path / "killed"), "--resume"]),
        2,
        "unfinished recovery, not a conversion",
    )
    again = [carved, tmp_path / "killed", "--training", CALIBRATION, "--text", SHORT]
    result = CliRunner().invoke(app, ["recover", *map(str, again), "--samples", "4"])
    refused(result, 2, "cmoe recover", "--resume")
    resume_recovery(tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


@pytest.mark.thorough
def test_two_processes_learn_what_one_does(carved, recovered, dense, tmp_path):
    options = {key.replace("_", "-"): value for key, value in {**LOUD, **TEXTS}.items()}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "cmoe_hf.conversion.cli", "recover", carved, tmp_path / "out"),
            *("--control", dense, "--device", "cpu", "--json", *arguments),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr
    printed = json.loads(launched.stdout)  # of one process
    assert losses(tmp_path / "out") == pytest.approx(losses(recovered[0]), rel=1e-3)
    for key in ("perplexity_before", "perplexity_after", "control_after"):
        assert printed[key] == pytest.approx(getattr(recovered[1], key), rel=1e-2)
    ours, theirs = (
        torch.tensor(report(at)["stages"]["carved"]["biases"])
        for at in (tmp_path / "out", recovered[0])
    )
    assert ((ours - theirs).abs() < 1e-6).float().mean() > 0.8  # ties of loads may fall otherwise


FSDP2 = Path(__file__).parent.parent / "examples" / "accelerate_fsdp2.yaml"


def launched_with(path):
    """What `accelerate launch --config_file` tells the processes."""
    fields = yaml.safe_load(path.read_text())["fsdp_config"]
    return {name.upper(): str(value) for name, value in fields.items()} | {
        "ACCELERATE_USE_FSDP": "true"
    }


@pytest.mark.thorough
def test_two_processes_that_share_the_weights_learn_what_one_does_even_if_killed(
    carved, processes, tmp_path, tensors
):
    """FSDP2. That each process holds a part only is seen from what both wrote."""
    recover(carved, tmp_path / "whole", **TEXTS, tuning=Tuning(**LOUD))
    output, arguments = tmp_path / "sharded", {"model": carved, "device": "cpu", **TEXTS}

    def start(attempt, *begun_with):
        shared = (tmp_path / attempt, launched_with(FSDP2), output, *begun_with)
        pair = [
            processes.Process(target=killable.recover_as_rank, args=(rank, *shared))
            for rank in (0, 1)
        ]
        for process in pair:
            process.start()
        return pair

    pair = start("first", arguments, LOUD)
    checkpoints = tmp_path / "sharded.partial" / "work" / "carved"
    kill_after_two_checkpoints(pair, checkpoints)
    assert len(list(checkpoints.glob("checkpoint-*/pytorch_model_fsdp_0/*.distcp"))) >= 4
    pair = start("second", None, None)
    for process in pair:
        process.join(timeout=120)
        process.kill()  # of no effect if it has ended
    assert [process.exitcode for process in pair] == [0, 0]
    assert losses(output) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    whole, sharded = tensors(tmp_path / "whole"), tensors(output)
    assert whole.keys() == sharded.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, atol=1e-4, rtol=0)


def test_other_ways_to_share_the_weights_are_refused(carved, monkeypatch, tmp_path):
    for name, value in launched_with(FSDP2).items():
        monkeypatch.setenv(name, value)
    arguments = ["recover", carved, tmp_path / "out", "--training", CALIBRATION, "--text", SHORT]
    for name, value, expected in (
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "ram_efficient_loading: false"),
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
    ):
        monkeypatch.setenv(name, value)
        refused(CliRunner().invoke(app, [str(argument) for argument in arguments]), 2, expected)


def test_bad_requests(carved, dense, make_dense, tmp_path):
    out = tmp_path / "out"

    def invoke(*arguments, text=SHORT, model=carved):
        options = [model, out, "--training", CALIBRATION, "--text", text, "--samples", 4]
        return CliRunner().invoke(app, ["recover", *map(str, [*options, *arguments])])

    refused(invoke(model=dense), 2, "not a carved one")
    refused(invoke(text=CALIBRATION), 2, "the text to train on")
    refused(invoke("--dtype", "float16"), 2, "bfloat16 or float32")
    refused(invoke("--schedule", "zigzag"), 2, "constant, linear, cosine")
    refused(invoke("--batch-size", 3, "--micro-batch-size", 2), 2, "multiple of 2")
    refused(invoke("--rank", 0), 2, "rank is 0")
    refused(invoke("--bias-speed", -1), 2, "bias_speed is -1")
    refused(invoke("--samples", 10**6), 2, "Give more text")
    refused(invoke("--control", tmp_path / "nowhere"), 2, "neither a folder")
    refused(invoke("--resume"), 2, "cmoe recover OUT")
    refused(CliRunner().invoke(app, ["recover", str(out), "--resume"]), 2, "no unfinished recovery")
    refused(CliRunner().invoke(app, ["recover", str(carved)]), 2, "say where to")
    out.mkdir()
    (out / "mine").touch()
    refused(invoke(), 2, "out exists already")
    assert not out.with_name("out.partial").exists()


def test_a_loss_that_is_not_a_number_is_named(carved, tmp_path):
    tuning = Tuning(**{**FEW, "learning_rate": 1e30})
    with pytest.raises(Exception, match="lower the learning rate"):
        recover(carved, tmp_path / "out", **TEXTS, tuning=tuning)
    assert not (tmp_path / "out").exists()
