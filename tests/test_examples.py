# SPDX-License-Identifier: Apache-2.0
"""The scripts under examples/ run as printed."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    """Run a script in an empty folder, as `python examples/NAME ARGUMENTS` would."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_convert_and_generate_then_load(run_example, tmp_path, capsys):
    run_example("convert_and_generate.py")
    run_example("load_anywhere.py", tmp_path / "carved")
    printed = capsys.readouterr().out
    assert "S3A3E8: 75% of the FFN neurons run per token" in printed
    assert printed.count("The value of") == 2
    assert "experts of the last token" in printed


@pytest.mark.thorough
def test_calibrate_on_your_text(run_example, embedded, calibration_text, held_out, capsys):
    run_example("calibrate_on_your_text.py", embedded, "out", calibration_text, held_out)
    assert "perplexity: dense 39.8" in capsys.readouterr().out


def test_continue_with_peft(run_example, embedded, carve, calibration_text, tmp_path):
    repository = carve(embedded)
    run_example("continue_with_peft.py", repository, tmp_path / "out", calibration_text, 3)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp
        for folder in (repository, tmp_path / "out")
    )
    assert (after.gate.scale != 0).any()
    assert (after.experts.down_proj.float() != before.experts.down_proj.float()).any()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "rows", [("refined, no refit", "static"), ("refined for an oracle", "refined, split by layer")]
)
def test_the_reference_tables_can_be_reproduced(
    run_example, embedded, calibration_text, held_out, capsys, tmp_path, rows
):
    text = tmp_path / "text.txt"
    text.write_text(held_out.read_text()[:8000])
    run_example(
        "compare_recipes.py",
        *(embedded, calibration_text, text),
        *("--shape", "S1A1E8", "--seeds", "1", "--samples", "16"),
        *(argument for row in rows for argument in ("--row", row)),
    )
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    means = {(record["row"], record.get("router")): record["mean"] for record in records}
    assert means.pop(("dense", None)) < min(means.values())
    assert {row for row, _ in means} == set(rows)
    if "static" in rows:
        oracle, own, chance = (means[rows[0], router] for router in ("oracle", "own", "random"))
        assert oracle < own < chance


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "layers", "more"), [("tiny", 3, ()), ("smollm2-135m", 1, ("--budget", 0.5))]
)
def test_a_random_checkpoint_of_a_shape_is_planned_and_converted(
    run_example, tmp_path, capfd, shape, layers, more
):
    options = ("--tokens", 256, "--layers", layers, "--folder", tmp_path, *more)
    run_example("convert_large.py", "--shape", shape, *options)
    figures = json.loads(capfd.readouterr().out)
    assert figures["layers"] == layers and figures["calibration_tokens"] == 256
    assert figures["disk_gb"] == pytest.approx(figures["planned_disk_gb"], rel=0.05)
    assert figures["peak_memory_gb"] == pytest.approx(figures["planned_memory_gb"], rel=0.25)
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_the_embedded_default_can_be_trained(run_example, tmp_path):
    run_example("train_embedded_default.py", tmp_path / "assets", "--steps", "2")
    folder = tmp_path / "assets" / "llama-pydoc"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 918_656
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 2 * 10**6


@pytest.mark.thorough
def test_the_speed_map_fills_a_table(run_example, tmp_path):
    point = ("--shape", "smollm2-135m", "--notation", "S1A1E8", "--dtype", "float32")
    run_example("speed_map.py", "map.json", *point, "--tokens", 1, "--rounds", 1, "--ffn-only")
    table = tmp_path / "table.json"
    table.write_text('{"title": "The map", "rows": []}')
    run_example("speed_map.py", "map.json", "--fill", table)
    [row] = json.loads(table.read_text())["rows"]
    assert row[0] == "SmolLM2-135M, float32, S1A1E8" and len(row) == 9
    assert re.fullmatch(r"\d+\.\d\d of 3\.97", row[1]) and not any(row[2:])


def test_the_comparison_with_vllm_would_notice_ignored_gates(
    embedded, carve, tmp_path, run_example, capsys
):
    example = runpy.run_path(str(EXAMPLES / "compare_with_vllm.py"))
    repository, drawn = carve(embedded, (1, 1, 8)), tmp_path / "drawn"
    example["draw_gates"](repository, drawn)
    prompts = [[40, 50, 60], [70, 80]]
    plain, gated = (
        example["run_transformers"](folder, prompts, "float32") for folder in (repository, drawn)
    )
    assert example["compare"](example["likeliest"](plain), plain) == (2, 0)
    same, largest = example["compare"](example["likeliest"](plain), gated)
    assert same == 0 and largest > 1
    with pytest.raises(SystemExit, match="0"):
        run_example("compare_with_vllm.py", "--help")
    assert "--vllm-python" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, 1])
def test_all_machines_but_the_head_serve_headless(rank):
    printed = subprocess.run(
        ["sh", EXAMPLES / "serve_multinode.sh", "carved", "10.0.0.1", "2", str(rank)],
        env={**os.environ, "VLLM": "echo", "GPUS": "4"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "serve carved --trust-remote-code --model-impl transformers" in printed
    assert "--tensor-parallel-size 4 --pipeline-parallel-size 2" in printed
    assert f"--node-rank {rank} " in printed and ("--headless" in printed) == (rank == 1)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", [[], ["--expert-parallel"]])
def test_two_processes_share_a_model(embedded, carve, layout):
    script = [EXAMPLES / "tensor_parallel.py", carve(embedded, (2, 2, 8)), *layout]
    printed = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *map(str, script),
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    ).stdout
    assert printed.startswith("The value of") and printed.count("The value of") == 1


@pytest.mark.thorough
def test_a_moe_is_carved_again(run_example, capsys):
    run_example("compare_hierarchical.py", "--family", "olmoe", "--steps", "100", "--active", "1")
    rows = json.loads(capsys.readouterr().out)
    assert rows["notation"] == "S1A1E8"
    assert rows["all_active"] == pytest.approx(rows["source"], rel=1e-4)
    assert rows["refined"] < rows["refined_within_parents"] < rows["released"]
    assert rows["refined"] < rows["static"]


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["mistral", "gpt_neox"])
def test_in_another_family_too_ours_is_the_better_recipe(run_example, capsys, family):
    run_example("compare_families.py", "--family", family, "--steps", "200")
    row = json.loads(capsys.readouterr().out)
    assert row["all_active"] == pytest.approx(row["dense"], rel=1e-4)
    assert row["shape"] == "S1A1E8"
    assert row["dense"] < row["refined"] < min(row["static"], row["released"], row["paper"])
