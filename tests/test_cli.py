# SPDX-License-Identifier: Apache-2.0
"""The command line: its keys, its streams, its configuration file."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from families import SHORT
from hub import TOKEN
from killable import interrupted_at
from refusal import refused
from typer.testing import CliRunner

from cmoe_cli import SUMMARIES
from cmoe_hf import conversion
from cmoe_hf.conversion import RECIPES, Settings
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.convert import Conversion
from cmoe_hf.conversion.device import DTYPES
from cmoe_hf.conversion.embedded import CALIBRATION
from cmoe_hf.conversion.measure.evaluate import ROUTERS
from cmoe_hf.conversion.measure.shapes import SHAPES
from cmoe_hf.conversion.options import option_texts
from cmoe_hf.conversion.share.gguf_file import FILE_TYPES
from cmoe_hf.conversion.share.gguf_layouts import LAYOUTS
from cmoe_hf.conversion.share.serve import ENGINES
from cmoe_hf.conversion.share.targets import TARGETS

PAGE = Path(__file__).parents[1] / "docs" / "convert.md"
SHAPE = ["--shared", "2", "--active", "2", "--experts", "8"]
RENAMED = {"compiled": "compile", "licence": "license", "pull_request": "pr"}
CHEAP = ["--calibration", str(CALIBRATION), "--samples", "4", "--sequence-length", "64"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_overview_names_every_command_and_imports_nothing_heavy(arguments):
    script = """
import atexit, sys
from cmoe_cli import main
heavy = {"torch", "transformers", "cmoe_hf"}
atexit.register(lambda: print("heavy:", sorted(heavy & sys.modules.keys())))
sys.argv = ["cmoe", *sys.argv[1:]]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60
    )
    printed, _, heavy = done.stdout.rpartition("heavy: ")
    assert heavy.strip() == "[]", done.stderr
    expected = CliRunner().invoke(app, arguments, prog_name="cmoe")
    assert printed == expected.stdout and done.returncode == expected.exit_code
    assert all(f" {name} " in printed for name in SUMMARIES)


def test_the_page_says_of_the_options_what_the_command_says():
    printed = " ".join(invoke("convert", "--help").stdout.replace("│", " ").split())
    rows = []
    for name, text in option_texts(Settings).items():
        option = f"--{name.replace('_', '-')}"
        rows.append(f"| `{option}` | {text} |")
        assert option in printed
    table = "\n".join(rows)
    assert table in PAGE.read_text(encoding="utf-8"), f"{PAGE.name} should say\n{table}"


def test_the_version_is_said():
    assert re.fullmatch(r"cmoe-hf \d+\.\d+\.\d+\n", invoke("--version").stdout)


def test_convert_json_has_the_promised_keys(dense, tmp_path):
    result = invoke("convert", dense, tmp_path / "out", *SHAPE, *CHEAP, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed.keys() == Conversion.__dataclass_fields__.keys()
    assert printed["notation"] == "S2A2E8" and printed["activation_ratio"] == 0.5
    assert printed["calibration_tokens"] == 256 and printed["peak_memory_bytes"] > 10**7
    assert printed["output"] == str(tmp_path / "out")


@pytest.mark.parametrize("dump", [json.dumps, yaml.safe_dump])
def test_a_configuration_file_gives_defaults_and_the_command_line_wins(tmp_path, dump):
    config = tmp_path / "settings"
    entries = {"shape": "tiny", "layers": 1, "rounds": 1, "tokens": [1, 2], "active": 3}
    config.write_text(dump({**entries, "prefill": [], "batch": "", "json": True}))
    result = invoke("benchmark", "--config", config, "--active", 2)
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert [point["tokens"] for point in printed["ffn"]] == [1, 2]
    assert printed["notation"] == "S3A2E8"


@pytest.mark.parametrize(
    ("content", "phrase"), [("magic: 1", "magic"), ("[1, 2]", "map option names"), (None, "cannot")]
)
def test_a_bad_configuration_file_is_refused(dense, tmp_path, content, phrase):
    config = tmp_path / "settings.yaml"
    if content is not None:
        config.write_text(content)
    result = invoke("convert", dense, tmp_path / "out", *SHAPE, "--config", config)
    assert result.exit_code == 2
    assert phrase in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_demo_carves_recovers_and_compares(tmp_path):
    out = tmp_path / "demo[v2]"
    result = invoke("demo", out, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    dense, carved = printed["dense_perplexity"], printed["carved_perplexity"]
    assert dense < printed["recovered_perplexity"] < carved < 100
    before, after = printed["shapes"]
    assert (before["recovered"], after["recovered"]) == (False, True)
    assert after["divergence"] < before["divergence"] and before["notation"] == "S2A2E8"
    assert (out / "recovery.json").is_file() and (out / "report" / "index.html").is_file()


@pytest.mark.thorough
def test_the_demo_compares_other_shapes_and_generates_a_line(tmp_path):
    out = tmp_path / "demo[v2]"
    result = invoke("demo", out, "--compare", "S1A1E8")
    assert result.exit_code == 0, result.stderr
    shapes = ("carved S2A2E8", "recovered S2A2E8", "carved S1A1E8")
    lines = ("dense continues: When a", "S2A2E8 continues: When a", "/report/index.html\n")
    for phrase in ("perplexity", "times as fast", *shapes, "chance", *lines):
        assert phrase in result.stdout, result.stdout


def test_convert_with_recover_is_both_commands_and_resumes_in_either(dense, tmp_path, tensors):
    how = [*SHAPE, "--calibration", SHORT, "--samples", 4, "--sequence-length", 64]
    learn = ["--teacher", dense, "--training", "own:3k", "--text", SHORT]
    assert invoke("convert", dense, tmp_path / "two-carved", *how).exit_code == 0
    assert invoke("recover", tmp_path / "two-carved", tmp_path / "two", *learn).exit_code == 0
    shutil.copytree(tmp_path / "two-carved", tmp_path / "one")
    once = ["convert", dense, tmp_path / "one", *how, "--recover", "3k", "--overwrite"]
    planned = invoke(*once, "--dry-run")
    assert planned.exit_code == 0 and "then, on 3k tokens: training all weights" in planned.stdout
    with interrupted_at("model.safetensors", 4):
        stopped = invoke(*once)
    assert stopped.exit_code != 0 and "same command with --resume" in stopped.stderr
    assert not (tmp_path / "one-carved").exists()
    with interrupted_at("recovery.json"):
        assert invoke(*once, "--resume").exit_code != 0
    assert (tmp_path / "one-carved").exists() and not (tmp_path / "one" / "recovery.json").exists()
    result = invoke(*once, "--resume")
    assert result.exit_code == 0 and "distance to the dense model closed" in result.stdout
    both, one = tensors(tmp_path / "two"), tensors(tmp_path / "one")
    assert both.keys() == one.keys()
    carved = tensors(tmp_path / "two-carved").items()
    sizes = [it.std(correction=0) for name, it in carved if "expert" in name and it.dim() > 1]
    tuning = json.loads((tmp_path / "two" / "recovery.json").read_text())["tuning"]
    assert tuning["learning_rate"] == pytest.approx(0.003 * min(sizes).item(), rel=0.02)
    assert all(torch.equal(tensor, one[name]) for name, tensor in both.items())


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["other", "--recover", "many"], "say how many tokens"),
        (["out", "--recover", "3k"], "exists already"),
        (["other", "--recover", "9000000M"], "the recovery needs about 72000."),
    ],
)
def test_a_recovery_that_cannot_be_is_refused_before_the_conversion(
    dense, tmp_path, options, phrase
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    output = tmp_path / options[0]
    how = [*SHAPE, "--calibration", SHORT, "--samples", 4, "--sequence-length", 64]
    result = invoke("convert", dense, output, *how, *options[1:])
    assert result.exit_code == 2 and phrase in result.stderr
    assert not output.with_name(f"{output.name}-carved").exists()


AWKWARD = "[b]:smile:[v2]"
"""Markup and an emoji's code to rich, an ordinary name to the file system."""


@pytest.fixture(scope="module")
def awkward(dense, carved, hub, tmp_path_factory):
    """A folder with models and a task of such names; a repository with a file of such a name."""
    folder = tmp_path_factory.mktemp("awkward")
    shutil.copytree(dense, folder / f"dense{AWKWARD}")
    shutil.copytree(carved, folder / f"carved{AWKWARD}")
    (folder / "there").mkdir()
    (folder / "there" / f"{AWKWARD}.md").write_text("Notes.")
    hub.reset()
    hub.publish("org/model", folder / "there")
    tasks = Path(__file__).parent / "task"
    task = yaml.safe_load((tasks / "pydoc_topics.yaml").read_text())
    for name in task["dataset_kwargs"]["data_files"].values():
        shutil.copy(tasks / name, folder)
    task["task"] = f"topics{AWKWARD}"
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    return folder


TEXT = ["--text", SHORT, "--sequence-length", 64]
LOADS = ["--training", CALIBRATION, "--text", SHORT, "--samples", 4, "--sequence-length", 64]
PRINTED = {
    "convert": ["convert", f"dense{AWKWARD}", f"out{AWKWARD}", *SHAPE, *CHEAP],
    "plan": ["convert", f"dense{AWKWARD}", "planned", *SHAPE, *CHEAP, "--dry-run"],
    "recover": [
        "recover",
        f"carved{AWKWARD}",
        f"recovered{AWKWARD}",
        *LOADS,
        "--objective",
        "next-token",
    ],
    "evaluate": ["evaluate", f"carved{AWKWARD}", *TEXT, "--windows", 1],
    "tasks": ["evaluate", f"carved{AWKWARD}", "--tasks", f"topics{AWKWARD}", "--include-path", "."],
    "benchmark": [
        *("benchmark", f"carved{AWKWARD}", "--prefill", 8, "--rounds", 1),
        *("--tokens", "", "--batch", ""),
    ],
    "sweep": [
        *("sweep", f"dense{AWKWARD}", f"swept{AWKWARD}", "--rounds", 0, "--grid", "S2A1E4"),
        *(*TEXT[:2], *CHEAP),
    ],
    "report": ["report", f"carved{AWKWARD}", *TEXT, "--windows", 1, "--no-figures"],
    "export": ["export", f"carved{AWKWARD}", f"exported{AWKWARD}"],
    "gguf": ["export", f"carved{AWKWARD}", "--gguf", f"{AWKWARD}[/b].gguf"],
    "verify": ["verify", f"carved{AWKWARD}"],
    "upgrade": ["upgrade", f"carved{AWKWARD}"],
    "publish": [
        *("publish", f"carved{AWKWARD}", "org/model", "--dry-run"),
        *("--license", "mit", "--base-model", "org/dense"),
    ],
}


@pytest.mark.parametrize("arguments", PRINTED.values(), ids=PRINTED)
def test_names_are_printed_as_they_are(arguments, awkward, monkeypatch):
    monkeypatch.chdir(awkward)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert AWKWARD in result.stdout, result.stdout


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_function_takes_what_its_command_takes(name):
    function = getattr(conversion, name)
    command = typer.main.get_command(app).commands[name]
    options = {flag: option for option in command.params for flag in option.opts}
    for keyword, parameter in inspect.signature(function).parameters.items():
        assert f"    {keyword}: " in function.__doc__
        if parameter.kind is parameter.KEYWORD_ONLY and keyword != "tuning":
            called = RENAMED.get(keyword, keyword).replace("_", "-")
            expected = parameter.default
            if isinstance(expected, tuple):
                expected = ",".join(map(str, expected))
            assert options[f"--{called}"].default == expected
    with pytest.raises(TypeError, match="magic"):
        function(magic=1)


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        ("convert", RECIPES),
        ("convert", DTYPES),
        ("evaluate", [*ROUTERS, *DTYPES]),
        ("benchmark", [*SHAPES, *DTYPES]),
        ("export", [*TARGETS, *LAYOUTS, *FILE_TYPES]),
        ("serve", ENGINES),
        ("report", ["[report]"]),
    ],
)
def test_the_help_names_every_choice(monkeypatch, command, choices):
    monkeypatch.setenv("COLUMNS", "300")
    printed = invoke(command, "--help").stdout
    assert all(choice in printed for choice in choices)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["export", "carved", "out", "--type", "f32"], "--type is for a GGUF file"),
        (["export", "carved", "--gguf", "file", "--max-shard-size", "1GB"], "is for a folder"),
        (["export", "carved", "out", "--gguf", "file"], "either a folder OUT or --gguf"),
        (["export", "carved"], "either a folder OUT or --gguf"),
        (["evaluate", "carved", "--limit", 1], "--limit is for tasks"),
        (["evaluate", "carved", "--tasks", "boolq", "--seed", 0], "--seed is for perplexity"),
        (["benchmark", "carved", "--threads", 1], "--threads goes with --engine llama.cpp only"),
        (["benchmark", "--engine", "llama.cpp", "--compile"], "--compile does not go with"),
        (["benchmark", "--engine", "magic"], "no engine 'magic'"),
    ],
)
def test_options_that_do_not_go_together(arguments, phrase):
    refused(invoke(*arguments), 2, phrase)
