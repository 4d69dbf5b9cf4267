# SPDX-License-Identifier: Apache-2.0
"""The command line: its keys, its streams, its configuration file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cmoe_cli import SUMMARIES
from cmoe_hf.conversion import Settings
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.demo import CALIBRATION
from cmoe_hf.conversion.options import option_texts

PAGE = Path(__file__).parents[1] / "docs" / "convert.md"
SHAPE = ["--shared", "2", "--active", "2", "--experts", "8"]
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
    assert {
        "output",
        "notation",
        "activation_ratio",
        "calibration_tokens",
        "seconds",
        "peak_memory_bytes",
    } <= printed.keys()
    assert printed["notation"] == "S2A2E8"
    assert printed["activation_ratio"] == 0.5
    assert printed["calibration_tokens"] == 256
    assert printed["output"] == str(tmp_path / "out")
    assert printed["peak_memory_bytes"] > 10**7


def test_without_json_a_table_says_what_was_done(dense, tmp_path):
    result = invoke("convert", dense, tmp_path / "out", *SHAPE, *CHEAP)
    assert result.exit_code == 0, result.stderr
    assert "S2A2E8" in result.stdout and "50.0%" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("dump", [json.dumps, yaml.safe_dump])
def test_a_configuration_file_gives_defaults_and_the_command_line_wins(dense, tmp_path, dump):
    config = tmp_path / "settings"
    entries = {"shared": 1, "active": 2, "experts": 8, "samples": 4, "sequence-length": 64}
    config.write_text(dump({**entries, "calibration": str(CALIBRATION)}))
    result = invoke("convert", dense, tmp_path / "out", "--config", config, "--active", 3, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["notation"] == "S1A3E8"


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


def test_a_missing_option_is_a_wrong_request(dense, tmp_path):
    result = invoke("convert", dense, tmp_path / "out", "--shared", 2, "--experts", 8)
    assert result.exit_code == 2
    assert "--active" in result.stderr


def test_the_demo_compares_dense_and_carved_and_generates_a_line(tmp_path):
    result = invoke("demo", tmp_path / "demo")
    assert result.exit_code == 0, result.stderr
    page = tmp_path / "demo" / "report" / "index.html"
    shapes = ("carved S3A3E8", "carved S2A2E8", "carved S1A1E8")
    told = ("dense continues: When a", "S3A3E8 continues: When a", f"report: {page}\n")
    for phrase in ("perplexity", *shapes, "chance 10.0%)", *told):
        assert phrase in result.stdout, result.stdout
    assert page.is_file()
    assert (tmp_path / "demo" / "config.json").is_file()
