# SPDX-License-Identifier: Apache-2.0
"""Outputs that would destroy what is read, or that cannot be made: refused before the work."""

import shutil
import subprocess
from pathlib import Path

import pytest
from killable import interrupted_at
from refusal import refused
from test_bad_input import run
from typer.testing import CliRunner

from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT


def command(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def contents(folder):
    """Every file below a folder, and its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def base(dense, tmp_path):
    """A source of its own in a folder of its own, which must be as before afterwards."""
    (tmp_path / "models").mkdir()
    folder = Path(shutil.copytree(dense, tmp_path / "models" / "base"))
    before = contents(folder)
    yield folder
    assert contents(folder) == before
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("out", "phrase"),
    [
        ("models/x/../base", "is the source checkpoint itself"),
        ("nowhere/../models/base", "is the source checkpoint itself"),
        ("link", "is the source checkpoint itself"),
        ("models/base/carved", "lies in the source checkpoint"),
        ("link/deep/carved", "lies in the source checkpoint"),
        ("models", "the source checkpoint lies in"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--overwrite", "--dry-run"]])
def test_an_output_that_meets_the_source(base, tmp_path, out, phrase, options):
    (tmp_path / "models" / "x").mkdir()
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "models" / "config.json").write_text("{}")  # --overwrite would take it for a model
    refused(run(base, tmp_path / out, *options), 2, phrase)


def test_a_source_under_a_name_that_the_work_needs(dense, tmp_path):
    source = Path(shutil.copytree(dense, tmp_path / "out.partial"))
    before = contents(source)
    refused(run(source, tmp_path / "out", "--overwrite"), 2, f"lies in {source}")
    assert contents(source) == before


def test_a_source_whose_weights_are_links_into_the_output(dense, carved, tmp_path):
    out = Path(shutil.copytree(carved, tmp_path / "out"))
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    shutil.move(source / "model.safetensors", out / "dense.safetensors")
    (source / "model.safetensors").symlink_to(out / "dense.safetensors")
    refused(run(source, out, "--overwrite"), 2, "the source checkpoint lies in")
    assert (source / "model.safetensors").stat().st_size > 0


def test_a_text_in_the_folder_to_be_replaced(dense, carved, tmp_path):
    out = Path(shutil.copytree(carved, tmp_path / "out"))
    text = Path(shutil.copy(CALIBRATION, out / "notes.txt"))
    result = run(dense, out, "--overwrite", "--calibration", text)
    refused(result, 2, "the calibration text lies in", "Choose another output folder, or move it")
    few = ["--samples", 2, "--sequence-length", 32, "--overwrite", "--teacher", dense]
    result = command("recover", carved, out, "--training", CALIBRATION, "--text", text, *few)
    refused(result, 2, "the text to measure on lies in")
    assert text.read_bytes() == CALIBRATION.read_bytes()


def test_other_commands_refuse_what_they_read(dense, carved, tmp_path):
    model = Path(shutil.copytree(carved, tmp_path / "model"))
    teacher = Path(shutil.copytree(dense, tmp_path / "teacher"))
    (tmp_path / "link").symlink_to(model)
    texts = ["--training", CALIBRATION, "--text", HELD_OUT]
    texts += ["--samples", 2, "--sequence-length", 32]
    paper = ["--objective", "next-token"]
    for out in (tmp_path / "link", tmp_path / "x" / ".." / "model"):
        for arguments in (["export", model, out], ["recover", model, out, *texts, *paper]):
            result = command(*arguments, "--overwrite")
            refused(result, 2, "is the carved model itself")
    result = command("recover", model, teacher, "--teacher", teacher, "--overwrite", *texts)
    refused(result, 2, "is the teacher itself")
    (model / "sweep.json").write_text("{}")
    before = contents(tmp_path)
    sweep = ["--calibration", CALIBRATION, "--text", CALIBRATION, "--rounds", 0, "--overwrite"]
    for out, phrase in ((teacher, "is the model itself"), (tmp_path, "the model lies in")):
        refused(command("sweep", teacher, out, *sweep), 2, phrase)
    assert contents(tmp_path) == before


def test_a_link_stays_a_link_and_the_work_lands_where_it_leads(dense, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    out = tmp_path / "out"
    out.symlink_to(disk / "carved")  # leads to nothing yet
    for options in ([], ["--overwrite"]):
        result = run(dense, out, *options)
        assert result.exit_code == 0, result.stderr
        assert out.is_symlink() and (disk / "carved" / "config.json").is_file()
        assert [path.name for path in disk.iterdir()] == ["carved"]
        assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}
    refused(run(dense, out), 2, "carved exists already")


def test_the_parents_of_an_output_are_made(dense, tmp_path):
    assert run(dense, tmp_path / "new" / "deep" / "out").exit_code == 0
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run(dense, tmp_path / "loop").exit_code == 2
    refused(run(dense, "/"), 2, "give a folder in it")
    (tmp_path / "file").touch()
    refused(run(dense, tmp_path / "file" / "out", "--dry-run"), 2, "file is not a folder")


@pytest.mark.parametrize("name", ["x" * 248, "é" * 124, "y" * 256 + "/out", "z/" * 2000])
def test_a_name_that_is_too_long(dense, carved, tmp_path, name):
    out, texts = tmp_path / name, ["--text", CALIBRATION, "--calibration", CALIBRATION]
    commands = [
        ["convert", dense, out, "--budget", 0.5, *texts[2:]],
        ["convert", dense, out, "--budget", 0.5, *texts[2:], "--dry-run"],
        ["convert", out, "--resume"],
        ["demo", out],
        ["export", carved, out],
        ["export", carved, "--gguf", out.with_name(out.name + ".gguf")],
        ["recover", carved, out, *("--training", CALIBRATION, "--text", HELD_OUT, "--samples", 2)],
        ["recover", out, "--resume"],
        ["sweep", dense, out, *texts],
        ["report", carved, "--output", out, *texts[:2], "--no-figures"],
    ]
    for arguments in commands:
        refused(command(*arguments), 2, "Choose a shorter")
    assert not list(tmp_path.iterdir())


def test_what_lies_under_a_name_that_the_work_needs_is_not_deleted(dense, carved, tmp_path):
    out = Path(shutil.copytree(carved, tmp_path / "out"))
    mine = tmp_path / "out.partial"
    for thesis in (mine, mine / "thesis.txt"):
        thesis.parent.mkdir(exist_ok=True)
        thesis.write_text("years of work")
        refused(run(dense, out, "--overwrite"), 2, "out.partial exists", "move it away")
        assert thesis.is_file()
        thesis.unlink()
    assert run(dense, out, "--overwrite").exit_code == 0


def test_what_came_to_the_output_while_the_work_stood_still_is_not_replaced(
    dense, carved, tmp_path
):
    with interrupted_at("modeling_cmoe.py"):
        assert run(dense, tmp_path / "out").exit_code == 1
    out = Path(shutil.copytree(carved, tmp_path / "out"))
    (out / "mine.txt").touch()
    refused(command("convert", out, "--resume"), 2, "out exists already")
    assert (out / "mine.txt").is_file()
    out.rename(tmp_path / "elsewhere")
    assert command("convert", out, "--resume").exit_code == 0


@pytest.fixture
def mount(tmp_path):
    """Mount something on a folder; skipped where that is not allowed."""
    mounted = []

    def do(folder, *how):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(["mount", *how, str(folder)], capture_output=True)
        except FileNotFoundError:
            pytest.skip("no mount here")
        if done.returncode:
            pytest.skip("nobody may mount here")
        mounted.append(folder)

    yield do
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["volume", "folder of the same disk"])
@pytest.mark.parametrize("options", [["--dry-run"], ["--overwrite"]])
def test_a_mount_point_cannot_be_the_output(dense, carved, tmp_path, mount, kind, options):
    out, disk = tmp_path / "a volume", tmp_path / "disk"
    disk.mkdir()
    mount(out, *(["-t", "tmpfs", "none"] if kind == "volume" else ["--bind", str(disk)]))
    if "--overwrite" in options:
        shutil.copytree(carved, out, dirs_exist_ok=True)
    before = contents(out)
    refused(run(dense, out, *options), 2, f"{out} is a mount point", str(out / "model"))
    assert contents(out) == before and not list(tmp_path.glob("*.partial"))
    if kind == "volume" and "--overwrite" in options:
        assert run(dense, out / "model").exit_code == 0


def test_a_volume_within_the_model_to_be_replaced(dense, carved, tmp_path, mount):
    out = Path(shutil.copytree(carved, tmp_path / "out"))
    mount(out / "data", "-t", "tmpfs", "none")
    (out / "data" / "thesis.txt").write_text("years of work")
    refused(run(dense, out, "--overwrite"), 2, f"holds a mount point ({out / 'data'})")
    assert (out / "data" / "thesis.txt").is_file()
