# SPDX-License-Identifier: Apache-2.0
"""Files of weights: one up to a size, numbered ones above, whatever happens while they are made."""

import json
import signal

import pytest
import torch
from killable import die_at_something_new, go_on, interrupted_at
from refusal import refused
from safetensors import safe_open
from safetensors.torch import load_file, save
from test_bad_input import run
from test_output import command
from test_written_files import recover
from transformers import AutoModelForCausalLM

from cmoe_hf.conversion import resume
from cmoe_hf.conversion.embedded import CALIBRATION

INDEX = "model.safetensors.index.json"
FEW = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 64}
FEW |= {"shared": 2, "active": 2, "experts": 8}


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("model*.safetensors*")}


def sizes(folder):
    """Bytes of the tensors in each file, and the largest tensor's."""
    found, largest = {}, 0
    for path in sorted(folder.glob("*.safetensors")):
        nbytes = [tensor.nbytes for tensor in load_file(path).values()]
        found[path.name], largest = sum(nbytes), max(largest, *nbytes)
    return found, largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_model_is_one_file_as_the_library_would_write_it(dense, carve, tmp_path, dtype):
    carved = carve(dense, dtype=dtype)
    assert command("export", carve(dense), tmp_path / "native").exit_code == 0
    for folder in (carved, tmp_path / "native"):
        assert weights(folder).keys() == {"model.safetensors"}
        path = folder / "model.safetensors"
        assert path.read_bytes() == save(load_file(path), metadata={"format": "pt"})


@pytest.mark.parametrize("size", ["600KB", "100 KiB", 1])
def test_a_large_one_is_several_files_of_the_size_asked_for(dense, carve, carved, tmp_path, size):
    limit = {"600KB": 600_000, "100 KiB": 102_400, 1: 1}[size]
    folders, option = [carve(dense, max_shard_size=size)], ["--max-shard-size", size]
    if size == "600KB":
        folders += [tmp_path / "native", tmp_path / "tuned"]
        assert command("export", carved, folders[1], *option).exit_code == 0
        assert recover(carved, folders[2], *option).exit_code == 0
    for folder in folders:
        found, largest = sizes(folder)
        assert len(found) > 1 and all(size <= max(limit, largest) for size in found.values())
        numbers = range(1, len(found) + 1)
        assert list(found) == [f"model-{n:05d}-of-{len(found):05d}.safetensors" for n in numbers]
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(found.values())
        for name in found:
            with safe_open(folder / name, framework="pt") as shard:
                assert shard.metadata() == {"format": "pt"}
                assert {index["weight_map"].pop(tensor) for tensor in shard.keys()} == {name}  # noqa: SIM118
        assert not index["weight_map"]
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())


def test_the_files_do_not_change_the_tensors(dense, carve, carved, tensors):
    whole, split = tensors(carved), tensors(carve(dense, max_shard_size="100 KiB"))
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


@pytest.mark.parametrize("size", [pytest.param("5GB", marks=pytest.mark.thorough), "600KB"])
def test_interrupted_at_any_write_it_resumes_to_the_same_bytes(dense, carve, tmp_path, size):
    expected = weights(carve(dense, max_shard_size=size))
    names = ["windows.safetensors", *sorted(expected), "states-1.safetensors", "manifest.json"]
    for name in [*names, "README.md"]:
        with pytest.raises(KeyboardInterrupt), interrupted_at(name, 1 + (name == "manifest.json")):
            go_on({"model": dense, "output": tmp_path / "out", "max_shard_size": size, **FEW})
    resume(tmp_path / "out")
    assert weights(tmp_path / "out") == expected


@pytest.mark.thorough
@pytest.mark.parametrize("size", ["5GB", "150KB"])
def test_killed_at_any_write_it_resumes_to_the_same_bytes(processes, dense, carve, tmp_path, size):
    expected = carve(dense, max_shard_size=size)
    seen, out = tmp_path / "seen", tmp_path / "out"
    seen.write_text("")
    arguments = {"model": dense, "output": out, "max_shard_size": size, **FEW}
    for _ in range(40):
        process = processes.Process(target=die_at_something_new, args=(seen, arguments))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL and not out.exists()
        weight = sum(path.stat().st_size for path in tmp_path.rglob("model*.safetensors"))
        assert weight <= sum(map(len, weights(expected).values()))  # no tensor is written twice
    assert {"manifest.json", "README.md", *weights(expected)} <= set(seen.read_text().split())
    assert weights(out) == weights(expected)
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_a_size_that_is_none(dense, carved, no_leftovers):
    for size in ("0", "5 apples", "-1GB", ""):
        phrase = "cannot have the size"
        refused(run(dense, no_leftovers, "--max-shard-size", size), 2, phrase, "5GB, 500MB or 2GiB")
        refused(command("export", carved, no_leftovers, "--max-shard-size", size), 2, phrase)
        refused(recover(carved, no_leftovers, "--max-shard-size", size), 2, phrase)


def test_the_size_is_frozen(dense, tmp_path):
    with interrupted_at("README.md"):
        assert run(dense, tmp_path / "out", "--max-shard-size", "600KB").exit_code == 1
    result = command("convert", tmp_path / "out", "--resume", "--max-shard-size", "1GB")
    refused(result, 2, "max_shard_size was '600KB'")
    result = command("convert", tmp_path / "out", "--resume", "--max-shard-size", "600KB")
    assert result.exit_code == 0, result.stderr
