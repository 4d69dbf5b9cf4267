# SPDX-License-Identifier: Apache-2.0
"""Conversions that are killed, crowded or cheated: nothing lost, nothing half-written."""

import json
import shutil
import sys
from pathlib import Path

import killable
import pytest
from killable import interrupted_at
from refusal import refused
from test_bad_input import run
from test_output import command

import cmoe_hf
from cmoe_hf.conversion import RequestError, convert, plan, resume, verify
from cmoe_hf.conversion.embedded import CALIBRATION, MODEL
from cmoe_hf.conversion.tune.recover import RecoveryFolder, resume_recovery

SHAPE = {"shared": 2, "active": 2, "experts": 8}
FEW = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 64}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


@pytest.fixture
def unfinished(dense, tmp_path):
    """A conversion that was interrupted after its first layer."""
    with interrupted_at("model.safetensors", 4):
        result = run(dense, tmp_path / "out")
    assert result.exit_code == 1
    assert "Layers finished: 1; go on with: cmoe convert" in result.stderr
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def cli_resume(*arguments):
    return command("convert", *arguments, "--resume")


def test_resume_takes_no_other_argument(unfinished, carved, dense):
    log = (unfinished.with_name("out.partial") / "work" / "conversion.log").read_text()
    assert "started" in log and "layer 1 of 2" in log and "stopped" in log
    result = cli_resume(unfinished)
    assert result.exit_code == 0, result.stderr
    assert contents(unfinished) == contents(carved)
    assert [path.name for path in unfinished.parent.glob("out*")] == ["out"]
    report = json.loads((unfinished / "conversion.json").read_text())
    assert len(report["layers"]) == 2


def test_resume_accepts_the_same_settings_and_refuses_others(unfinished, dense, embedded):
    for options, phrase in [
        (["--active", 3], "active was 2 when this conversion started and cannot become 3"),
        (["--recipe", "paper"], "recipe was 'refined'"),
        (["--seed", 1], "seed was 0"),
        (["--dtype", "bfloat16"], "dtype was None"),
        (["--change", "refit=false"], "recipe was 'refined'"),
        (["--overwrite"], "--resume goes with neither"),
        (["--dry-run"], "--resume goes with neither"),
    ]:
        refused(cli_resume(unfinished, *options), 2, phrase)
    refused(cli_resume(embedded, unfinished), 2, "model was")
    result = cli_resume(dense, unfinished, "--active", 2, "--calibration", CALIBRATION)
    assert result.exit_code == 0, result.stderr


def test_what_has_changed_is_named(unfinished, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(cmoe_hf, "__version__", "9.9")
    refused(cli_resume(unfinished), 2, "version of cmoe hf has changed", "9.9")
    monkeypatch.undo()
    settings = unfinished.with_name("out.partial") / "work" / "settings.json"
    record = json.loads(settings.read_text())
    for name in ("source_checkpoint", "calibration_text"):
        settings.write_text(json.dumps({**record, name: "0" * 64}))
        refused(cli_resume(unfinished), 2, f"{name.replace('_', ' ')} has changed")


@pytest.mark.parametrize("name", ["repository/model.safetensors", "work/states-1.safetensors"])
def test_damage_to_what_is_finished_is_noticed(unfinished, name):
    path = unfinished.with_name("out.partial") / name
    with open(path, "r+b") as file:  # in the embedding, or in the header's last tensor
        file.seek(path.stat().st_size // 10)
        file.write(b"damaged!")
    refused(cli_resume(unfinished), 1, "what is finished of the conversion is missing or damaged")
    path.unlink()
    refused(cli_resume(unfinished), 1, "missing or damaged", "Start again with --overwrite")


def test_an_unfinished_conversion_is_not_started_over_unasked(unfinished, dense):
    with pytest.raises(RequestError, match=r"go on with: cmoe convert .* --resume"):
        convert(dense, unfinished, **SHAPE, **FEW)
    convert(dense, unfinished, **SHAPE, **FEW, overwrite=True)
    assert [path.name for path in unfinished.parent.glob("out*")] == ["out"]


def test_the_dense_model_writes_the_calibration_text(dense, tmp_path, monkeypatch):
    """Interrupted while it writes, and once more while it is carved: the same bytes."""
    monkeypatch.setattr("cmoe_hf.conversion.folder.own_text.OWN_BATCH", 2)
    own = {**SHAPE, "calibration": "own:384", "sequence_length": 64}
    convert(dense, tmp_path / "whole", **own)
    report = json.loads((tmp_path / "whole" / "conversion.json").read_text())
    assert (report["calibration"]["source"], report["calibration"]["samples"]) == ("own", 6)
    assert report["settings"]["calibration"] == "own"
    assert "`own`" in (tmp_path / "whole" / "README.md").read_text()
    verified = verify(tmp_path / "whole")
    assert verified.as_carved and verified.fingerprint
    times = []
    for name, count in (("000002.safetensors.new", 1), ("model.safetensors", 4)):
        begun = tmp_path / "out.partial"
        with pytest.raises(KeyboardInterrupt) as stopped, interrupted_at(name, count):
            resume(tmp_path / "out") if begun.exists() else convert(dense, tmp_path / "out", **own)
        kept = begun / "work" / "own"
        times.append({path.name: path.stat().st_mtime_ns for path in kept.iterdir()})
    assert len(times[0]) == 2 and times[0].items() < times[1].items()
    assert "Layers finished: 1" in stopped.value.__notes__[0]
    resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_own_text_is_refused_before_anything_is_written(dense, no_leftovers, monkeypatch):
    refused(run(dense, no_leftovers, "--calibration", "own:many"), 2, "say how many tokens")
    refused(run(dense, no_leftovers, "--calibration", "own:500k"), 2, "leave out --samples")
    planning = sys.modules["cmoe_hf.conversion.plan"]  # the package exports a function of this name
    monkeypatch.setattr(planning, "free_memory", lambda device: 10**5)
    refused(run(dense, no_leftovers, "--calibration", "own"), 2, "all of its weights in memory")


def test_nothing_to_resume(tmp_path):
    refused(cli_resume(tmp_path / "out"), 2, "no unfinished conversion")
    refused(command("convert", "model"), 2, "cmoe convert MODEL OUT")
    refused(command("convert", "model", "out"), 2, "--experts")


def test_killed_between_the_last_two_renames(dense, carved, tmp_path):
    """The old model has left, the new one does not have its name yet."""
    out = Path(shutil.copytree(carved, tmp_path / "out"))
    with interrupted_at("model.safetensors", 4):
        assert run(dense, out, "--overwrite").exit_code == 1
    out.rename(tmp_path / "out.partial" / "replaced")
    refused(run(dense, out, "--overwrite"), 2, "out.partial exists already", "move it away")
    assert cli_resume(out).exit_code == 0
    assert contents(out) == contents(carved)
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


@pytest.mark.thorough
def test_two_conversions_into_the_same_folder(processes, dense, tmp_path):
    begun = processes.Event()
    process = processes.Process(target=killable.hold, args=(begun, tmp_path / "out"))
    process.start()
    assert begun.wait(300)
    for overwrite in (False, True):
        with pytest.raises(RequestError, match="another conversion into"):
            convert(dense, tmp_path / "out", **SHAPE, **FEW, overwrite=overwrite)
    with pytest.raises(RequestError, match="another conversion into"):
        resume(tmp_path / "out")
    process.kill()
    process.join()
    convert(dense, tmp_path / "out", **SHAPE, **FEW, overwrite=True)
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


@pytest.mark.thorough
def test_a_full_disk_leaves_a_folder_that_can_be_resumed(processes, dense, carved, tmp_path):
    queue = processes.Queue()
    arguments = {"model": dense, "output": tmp_path / "out", **SHAPE, **FEW}
    process = processes.Process(target=killable.run_out_of_space, args=(queue, arguments))
    process.start()
    kind, message, notes = queue.get(timeout=300)
    process.join()
    assert kind == "CMoEError" and "cannot write model.safetensors in" in message
    assert "Layers finished: 1" in notes[0] and "--resume" in notes[0]
    resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(carved)


def test_activations_on_the_disk_change_nothing(dense, carved, tmp_path):
    result = convert(dense, tmp_path / "out", **SHAPE, **FEW, activations="disk")
    assert contents(tmp_path / "out") == contents(carved)
    assert result.calibration_tokens == 256


def test_a_plan_writes_nothing_and_predicts_the_disk(dense, carved, tmp_path):
    planned = plan(dense, tmp_path / "out", **SHAPE, **FEW)
    assert not list(tmp_path.iterdir())
    assert planned.notation == "S2A2E8" and planned.layers == 2
    assert planned.ffn_width == 8 * planned.expert_width
    assert planned.refit_order == 96
    assert planned.seconds > 0
    used = sum(path.stat().st_size for path in carved.iterdir())
    assert planned.disk_bytes == pytest.approx(used, rel=0.05)


def test_experts_of_an_awkward_width_are_warned_about(dense, tmp_path, caplog):
    options = {"shared": 1, "active": 1, **FEW}
    [warning] = plan(dense, tmp_path / "out", experts=8, **options).warnings
    assert "8 experts of 12 neurons, not a multiple of 8" in warning
    assert "--experts 4, 6, 12 avoids it" in warning
    assert not plan(dense, tmp_path / "out", experts=12, **options).warnings
    convert(dense, tmp_path / "out", experts=8, **options)
    assert warning in caplog.messages


def test_a_plan_refuses_what_a_conversion_would(dense, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run(dense, tmp_path, "--dry-run"), 2, "exists already")
    out = tmp_path / "out"
    result = run(dense, out, "--dry-run")
    assert result.exit_code == 0, result.stderr
    keys = json.loads(result.stdout).keys()
    assert {"layers", "parameters", "active_parameters", "disk_bytes", "seconds"} <= keys
    shape = ["--budget", 0.25, "--experts", 8, "--calibration", CALIBRATION]
    words = " ".join(command("convert", dense, out, *shape, "--dry-run").stdout.split())
    assert "nothing was written" in words and "disk while working" in words
    refused(run(dense, out, "--activations", "magic"), 2, "choose auto, memory, disk")
    assert not out.exists()


def test_notes_of_an_older_release_are_not_misread(unfinished):
    settings = unfinished.with_name("out.partial") / "work" / "settings.json"
    kept = json.loads(settings.read_text())
    asked = kept.pop("settings")
    for notes in ({"job": {"settings": asked}}, {"settings": {**asked, "polish": False}}):
        settings.write_text(json.dumps({**notes, **kept}))
        with pytest.raises(RequestError, match="begun by an older release"):
            resume(unfinished)


@pytest.mark.parametrize("options", [["demo"], ["convert", MODEL, "--budget", 0.5, "--recover", 9]])
def test_a_recovery_at_work_is_left_alone(tmp_path, options):
    with RecoveryFolder.create(tmp_path / "out", {}, overwrite=False):
        result = command(*options[:2], tmp_path / "out", *options[2:])
        refused(result, 2, "another recovery into", "is running right now")


def test_notes_of_an_older_recovery_are_not_misread(carved, tmp_path):
    out = tmp_path / "out"
    asked = {"model": str(carved), "output": str(out), "tuning": {"control": True}}
    made = RecoveryFolder.create(out, {"options": asked}, overwrite=False)
    with pytest.raises(EOFError), made as work:
        work.own_text.mkdir()
        (work.own_text / "000000.safetensors").touch()
        raise EOFError
    with pytest.raises(RequestError, match="begun by an older release"):
        resume_recovery(out)
