# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: what learns, what stays, what is counted, and what survives an interruption."""

import json
import math
import os
import shutil
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
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from typer.testing import CliRunner

from cmoe_hf.conversion import (
    Recipe,
    Tuning,
    evaluate,
    export,
    recover,
    resume_recovery,
    upgrade,
)
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT
from cmoe_hf.conversion.folder.own_text import read_own, write_own
from cmoe_hf.conversion.measure.evaluate import divergence, quality
from cmoe_hf.conversion.measure.routing import active_routers, count_loads, imbalance
from cmoe_hf.conversion.tune.distil import TRAINING_BACKEND, Outputs, distillation_loss
from cmoe_hf.conversion.tune.tuning import move_bias

TEXTS = {"training": CALIBRATION, "text": SHORT}
FEW = {"objective": "next-token", "samples": 16, "sequence_length": 64}
LOUD = {**FEW, "learning_rate": 3e-3, "router_learning_rate": 0.1, "bias_speed": 0.01}
"""Few steps, but large ones: what learns must be seen to move."""


@pytest.fixture(scope="session")
def carved(dense, carve):
    """A carved pico model, S2A2E8. Read only."""
    return carve(dense, recipe=FIRST_EDITION)


@pytest.fixture(scope="module")
def recovered(carved, tmp_path_factory):
    """A recovery, and its result."""
    output = tmp_path_factory.mktemp("recovered") / "out"
    return output, recover(carved, output, **TEXTS, tuning=Tuning(**LOUD))


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
    recover(carved, tmp_path / "out", **TEXTS, tuning=tuning)
    before, after = tensors(carved), tensors(tmp_path / "out")
    assert any(name.endswith("linear_weight") for name in before)
    for name, tensor in before.items():
        if name.endswith(("linear_weight", "balance_bias")):
            assert torch.equal(tensor, after[name]) == name.endswith("bias")


def test_the_figures_are_those_of_the_models(carved, recovered, token_ids):
    output, result = recovered
    windows_WL = token_ids  # any windows will do to compare two computations
    model, source = load(output), load(carved)
    assert quality(model, windows_WL) != quality(source, windows_WL)
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
    sizes = {"samples": 64, "sequence_length": 128, "batch_size": 4}
    tuning = Tuning(objective="next-token", **sizes, bias_speed=0.03)
    carved = carve(embedded, (1, 1, 8), samples=8, sequence_length=128)
    result = recover(carved, tmp_path / "out", **texts, tuning=tuning)
    assert result.training_imbalance_after < result.training_imbalance_before / 2
    assert result.imbalance_after < result.imbalance_before


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


DISTIL = {"samples": 24, "sequence_length": 64, "learning_rate": 3e-3, "batch_size": 4}


@pytest.fixture(scope="module")
def distilled(carved, dense, tmp_path_factory):
    """A distillation on the teacher's own text and another, measured on two texts."""
    output = tmp_path_factory.mktemp("distilled") / "out"
    arguments = {"training": ["own:2k", CALIBRATION], "text": [SHORT, HELD_OUT], "windows": 8}
    return output, recover(
        carved, output, **arguments, teacher=dense, tuning=Tuning(**DISTIL, epochs=4)
    )


def test_distilling_makes_the_model_more_like_its_teacher(distilled, dense):
    output, result = distilled
    assert [row["text"] for row in result.texts] == [SHORT.name, HELD_OUT.name]
    for row in result.texts:
        before, after = row["before"], row["after"]
        assert after["divergence"] < 0.9 * before["divergence"]
        assert after["agreement"] > before["agreement"]
        assert after["baseline_perplexity"] == before["baseline_perplexity"]
    measured = evaluate(output, baseline=dense, text=SHORT, sequence_length=64, windows=8)
    assert measured.divergence == pytest.approx(result.texts[0]["after"]["divergence"], rel=1e-4)
    assert measured.agreement == pytest.approx(result.texts[0]["after"]["agreement"])
    assert result.gap_after == pytest.approx(
        math.log(result.perplexity_after / result.teacher_perplexity)
    )
    assert result.closed == pytest.approx(1 - result.gap_after / result.gap_before)
    assert result.training_tokens == (31 + 24) * 64 * 4  # of 2,000 tokens whole windows
    assert report(output)["tuning"]["method"] == "full"
    assert "all weights" in report(output)["method_reason"]
    assert report(output)["training"] == "own, calibration.txt"


def test_what_is_float16_learns_in_bfloat16(dense, carve, tmp_path):
    carved = carve(dense, recipe=FIRST_EDITION, dtype="float16")
    texts = {"training": "own:1k", "text": SHORT, "windows": 2, "teacher": dense}
    result = recover(carved, tmp_path / "out", **texts, tuning=Tuning(**DISTIL))
    assert result.gap_after < result.gap_before
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_experts_and_norms_learn_and_attention_and_routers_on_request(
    carved, distilled, tensors, tmp_path
):
    before, after = tensors(carved), tensors(distilled[0])
    learns = ("layernorm.weight", "gate_up_proj", "experts.down_proj")
    for name, tensor in before.items():
        moved = not torch.equal(tensor, after[name])
        assert moved == (name.endswith(learns) or "shared_expert" in name), name
        assert tensor.dtype == after[name].dtype
    tuning = Tuning(**{**DISTIL, "samples": 16}, train_attention=True, train_router=True)
    recover(carved, tmp_path / "out", **TEXTS, tuning=tuning, teacher=distilled[0])
    assert "experts, attention, routers" in report(tmp_path / "out")["method_reason"]
    after = tensors(tmp_path / "out")
    for name in ("self_attn.q_proj.weight", "mlp.gate.scale", "mlp.gate.linear_weight"):
        name = f"model.layers.0.{name}"
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_distilled_can_be_exported(carved, dense, tmp_path, method):
    tuning = Tuning(**{**DISTIL, "samples": 4}, method=method)
    recover(carved, tmp_path / "out", **TEXTS, tuning=tuning, teacher=dense)
    assert export(tmp_path / "out", tmp_path / "native").max_abs_logit_difference < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(carved, tmp_path, dtype, method):
    tuning = Tuning(**{**DISTIL, "samples": 4}, method=method)
    options = {"dtype": dtype, "teacher": carved, "tuning": tuning}
    recover(carved, tmp_path / "out", **TEXTS, **options)
    assert losses(tmp_path / "out")[0] == pytest.approx(0, abs=1e-4 if dtype == "float32" else 0.02)


def test_what_was_pruned_statically_is_distilled_too(dense, carve, tmp_path):
    pruned = carve(dense, (4, 0, 8))
    options = {"teacher": dense, "tuning": Tuning(**DISTIL)}
    result = recover(pruned, tmp_path / "out", **TEXTS, **options)
    [row] = result.texts
    assert row["after"]["divergence"] < row["before"]["divergence"]
    assert result.scale is None


def test_interrupted_distillation_goes_on_to_the_same_weights(
    carved, dense, tmp_path, tensors, monkeypatch
):
    """Interrupted twice: while the teacher writes, and between two checkpoints."""
    monkeypatch.setattr("cmoe_hf.conversion.folder.own_text.OWN_BATCH", 4)
    options = {"training": ["own"], "text": SHORT, "teacher": dense, "tuning": Tuning(**DISTIL)}
    recover(carved, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt), killable.interrupted_at("000002.safetensors.new"):
        recover(carved, tmp_path / "out", **options)
    own = tmp_path / "out.partial" / "work" / "own"
    kept = {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
    assert sorted(kept) == ["000000.safetensors", "000001.safetensors"]
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupting_after(3))
        resume_recovery(tmp_path / "out")
    assert all((own / name).stat().st_mtime_ns == written for name, written in kept.items())
    resume_recovery(tmp_path / "out")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def interrupting_after(count):
    """Return a training step that presses Ctrl-C when it is called once more than `count` times."""
    steps, take_step = [], Trainer.training_step

    def step(trainer, *arguments):
        steps.append(1)
        if len(steps) > count:
            raise KeyboardInterrupt
        return take_step(trainer, *arguments)

    return step


def test_the_text_that_the_teacher_writes_is_seeded(dense, tmp_path):
    model, tokenizer = load(dense), AutoTokenizer.from_pretrained(dense)
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_own(model, tokenizer, windows=6, length=20, seed=seed, folder=tmp_path / name)
        texts.append(read_own(tmp_path / name, seed))
    assert texts[0].shape == (6, 20)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert len(texts[0][:, 1].unique()) > 1  # from many starts


@pytest.mark.parametrize("family", ["llama-2", "gemma2", "opt", "cohere"])
def test_the_loss_in_chunks_is_the_divergence_of_all_logits(
    family, make_dense, token_ids, monkeypatch
):
    """Gradients, too; Gemma 2 caps its logits and Cohere scales them."""
    monkeypatch.setattr("cmoe_hf.conversion.tune.distil.CHUNK_LOGITS", 5 * 1024)
    student, teacher = load(make_dense(family)), load(make_dense(family))
    decoder = student.base_model
    decoder.requires_grad_()
    student.get_output_embeddings().requires_grad_(False)
    student.get_input_embeddings().requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.data *= 1.1
    loss = distillation_loss(Outputs(student), Outputs(teacher), token_ids)
    loss.backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected = divergence(*(it(token_ids).logits.flatten(0, 1) for it in (student, teacher)))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    wanted = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-2", "phi"])
def test_experts_in_training_compute_what_the_plain_loop_does(family, make_dense, carve, token_ids):
    """Gradients, too; the experts of Phi have biases and no gate."""
    model, found = load(carve(make_dense(family), recipe=FIRST_EDITION)), {}
    for backend in ("eager", TRAINING_BACKEND):
        model.set_experts_implementation(backend)
        model.zero_grad()
        model(token_ids, labels=token_ids).loss.backward()
        found[backend] = {n: p.grad for n, p in model.named_parameters() if ".experts." in n}
    for name, gradient in found["eager"].items():
        assert gradient.any()
        torch.testing.assert_close(found[TRAINING_BACKEND][name], gradient, rtol=1e-3, atol=1e-6)


def test_no_logits_of_all_positions_are_made_where_the_head_is_all(dense, token_ids):
    assert isinstance(Outputs(load(dense)).head, torch.nn.Linear)
    assert Outputs(load(dense))(token_ids).shape == (token_ids.numel(), 64)


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
def test_interrupted_it_resumes_to_the_same_curve(carved, recovered, tmp_path, tensors):
    """In this process; the next test kills one."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", interrupting_after(4))
        recover(carved, tmp_path / "out", **TEXTS, tuning=Tuning(**LOUD))
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
    again += ["--objective", "next-token"]
    result = CliRunner().invoke(app, ["recover", *map(str, again), "--samples", "4"])
    refused(result, 2, "cmoe recover", "--resume")
    resume_recovery(tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


@pytest.mark.thorough
def test_two_processes_learn_what_one_does(carved, recovered, tmp_path):
    options = {key.replace("_", "-"): value for key, value in {**LOUD, **TEXTS}.items()}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "cmoe_hf.conversion.cli", "recover", carved, tmp_path / "out"),
            *("--device", "cpu", "--json", *arguments),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr
    printed = json.loads(launched.stdout)  # of one process
    assert losses(tmp_path / "out") == pytest.approx(losses(recovered[0]), rel=1e-3)
    for key in ("perplexity_before", "perplexity_after"):
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
@pytest.mark.parametrize("objective", ["next-token", "distil"])
def test_two_processes_that_share_the_weights_learn_what_one_does_even_if_killed(
    objective, carved, dense, processes, tmp_path, tensors
):
    """FSDP2. That each process holds a part only is seen from what both wrote."""
    tuning, more = LOUD, {}
    if objective == "distil":
        tuning, more = {**DISTIL, "samples": 48}, {"teacher": dense}
    recover(carved, tmp_path / "whole", **TEXTS, **more, tuning=Tuning(**tuning))
    output, arguments = tmp_path / "sharded", {"model": carved, "device": "cpu", **TEXTS, **more}

    def start(attempt, *begun_with):
        shared = (tmp_path / attempt, launched_with(FSDP2), output, *begun_with)
        pair = [
            processes.Process(target=killable.recover_as_rank, args=(rank, *shared))
            for rank in (0, 1)
        ]
        for process in pair:
            process.start()
        return pair

    pair = start("first", arguments, tuning)
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
        options += ["--teacher", dense] * ("--objective" not in arguments)
        return CliRunner().invoke(app, ["recover", *map(str, [*options, *arguments])])

    refused(invoke(model=dense), 2, "not a carved one")
    refused(invoke(text=CALIBRATION), 2, "the text to train on")
    refused(invoke("--dtype", "float16"), 2, "bfloat16 or float32")
    refused(invoke("--schedule", "zigzag"), 2, "constant, linear, cosine")
    refused(invoke("--batch-size", 3, "--micro-batch-size", 2), 2, "multiple of 2")
    refused(invoke("--rank", 0), 2, "rank is 0")
    refused(invoke("--bias-speed", -1), 2, "bias_speed is -1")
    refused(invoke("--samples", 10**6), 2, "Give more text")
    paper = ("--objective", "next-token")
    refused(invoke(*paper, "--teacher", dense), 2, "has no teacher")
    refused(invoke(*paper, "--training", "own"), 2, "written by a teacher")
    refused(invoke(*paper, "--method", "full"), 2, "trains LoRA")
    refused(invoke("--objective", "fame"), 2, "distil, next-token")
    refused(invoke("--method", "magic"), 2, "full or lora")
    refused(invoke("--training", "own:many"), 2, "own:500k")
    refused(invoke("--windows", 0), 2, "windows")
    refused(invoke("--teacher", tmp_path / "nowhere"), 2, "neither a folder")
    alone = Path(shutil.copytree(carved, tmp_path / "alone" / "carved"))
    arguments = ["recover", alone, out, "--training", CALIBRATION, "--text", SHORT]
    refused(CliRunner().invoke(app, [*map(str, arguments)]), 2, "cannot be found", "--teacher")
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
