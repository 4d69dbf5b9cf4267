# SPDX-License-Identifier: Apache-2.0
"""The trade-off curve: its figures are those of the single commands, each measured once."""

import json
import time

import killable
import pytest
from families import SHORT
from refusal import refused
from typer.testing import CliRunner

from cmoe_hf.conversion import RequestError, evaluate, sweep
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION

FEW = {"calibration": CALIBRATION, "text": SHORT, "samples": 4, "sequence_length": 64}


@pytest.fixture(scope="module")
def swept(dense, tmp_path_factory):
    """Two shapes of one activation ratio, with speed; the models are kept."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    result = sweep(dense, output, grid=["S1A2E4", "S2A1E4"], rounds=1, keep=True, **FEW)
    return output, result


def test_the_rows_are_what_the_single_commands_measure(swept, dense):
    output, result = swept
    assert [row.notation for row in result.rows] == ["S1A2E4", "S2A1E4", "S3A0E4"]
    assert [row.static for row in result.rows] == [False, False, True]
    windows = {"text": SHORT, "sequence_length": 64}
    assert result.dense_perplexity == pytest.approx(evaluate(dense, **windows).perplexity)
    for row in result.rows:
        measured = evaluate(output / row.notation, **windows)
        assert row.perplexity == pytest.approx(measured.perplexity, rel=1e-6)
        assert row.router_oracle_agreement == measured.router_oracle_agreement
        assert row.activation_ratio == 0.75
        assert row.speedup.keys() == {"ffn", "prefill", "decode"}
        # Three quarters of the weights, and the router.
        assert row.roofline_speedup["ffn"] == pytest.approx(1.32, rel=0.01)
    table = (output / "sweep.md").read_text()
    assert table.count("\n| ") == 6  # head, rule, dense, three shapes
    assert all(f"{row.perplexity:.2f}" in table for row in result.rows)
    assert str(output.parent) not in table
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_not_measured_again(swept, dense):
    output, result = swept
    before = json.loads((output / "sweep.json").read_text())["measured"]
    grid = ["S1A2E4", "S2A1E4", "S1A1E4"]
    larger = sweep(dense, output, grid=grid, rounds=1, keep=True, **FEW)
    after = json.loads((output / "sweep.json").read_text())["measured"]
    assert {key: after[key] for key in before} == before  # times, too
    assert [row.notation for row in larger.rows[:2]] == ["S1A1E4", "S2A0E4"]
    assert larger.rows[2:] == result.rows
    with pytest.raises(RequestError, match="seed was 0 in the sweep"):
        sweep(dense, output, grid=["S1A2E4"], rounds=1, seed=1, **FEW)


def test_a_budget_beside_static_pruning_of_the_same_layers(make_dense, tmp_path):
    deep = make_dense(num_hidden_layers=12)
    result = sweep(deep, tmp_path / "out", grid=["0.5", "S3A3E12"], rounds=0, **FEW)
    labels = [row.label for row in result.rows]
    assert labels == ["budget 0.5: S2A3E12", "S5A0E12, static", "S3A3E12", "S6A0E12, static"]
    of_budget, beside = result.rows[:2]
    assert of_budget.activation_ratio == beside.activation_ratio
    assert of_budget.activation_ratio == pytest.approx((1 + 11 * 5 / 12) / 12)
    assert of_budget.perplexity != beside.perplexity
    measured = json.loads((tmp_path / "out" / "sweep.json").read_text())["measured"]
    assert {"budget-0.5", "S5A0E12-dense-0"} < measured.keys()
    assert "| budget 0.5: S2A3E12 |" in (tmp_path / "out" / "sweep.md").read_text()


@pytest.mark.thorough
def test_killed_it_goes_on(swept, processes, dense, tmp_path):
    arguments = {"model": dense, "output": tmp_path / "out", "rounds": 0, **FEW}
    arguments["grid"] = ["S1A2E4", "S2A1E4"]
    process = processes.Process(target=killable.sweep_it, args=(arguments,))
    process.start()
    while not (tmp_path / "out" / "sweep.json").is_file():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    result = sweep(**arguments)
    assert [row.perplexity for row in result.rows] == [row.perplexity for row in swept[1].rows]
    assert all(row.speedup == {} for row in result.rows)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"sweep.json", "sweep.md", "sweep.png"}


def test_the_command(dense, tmp_path):
    options = [text for key, value in FEW.items() for text in (f"--{key.replace('_', '-')}", value)]

    def invoke(*arguments):
        arguments = ["sweep", dense, tmp_path / "out", *options, "--rounds", 0, *arguments]
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    refused(invoke("--grid", "S1A1"), 2, "'S1A1' is not a shape")
    refused(invoke("--grid", "S1A1E7"), 2, "not divisible by 7")
    refused(invoke("--grid", "1.5"), 2, "budget")
    refused(invoke("--grid", "S9A1E8"), 2, "only 8")
    refused(invoke("--rounds", -1), 2, "--rounds is -1")
    assert not (tmp_path / "out").exists()
    result = invoke("--grid", "S2A1E4", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert [row["notation"] for row in printed["rows"]] == ["S2A1E4", "S3A0E4"]
    (tmp_path / "out" / "sweep.json").unlink()
    refused(invoke(), 2, "holds no sweep")
