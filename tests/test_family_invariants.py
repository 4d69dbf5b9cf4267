# SPDX-License-Identifier: Apache-2.0
"""What must always hold, in every family: nothing here knows how a family names its parts."""

import json
import shutil
from collections import Counter
from itertools import product

import pytest
import torch
from families import FAMILIES, relatives_last
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from cmoe_hf.conversion import convert, resume
from cmoe_hf.conversion.carve.recipe import RECIPES
from cmoe_hf.conversion.embedded import CALIBRATION

FEW = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 64}
USER, TOKEN = "jane-doe", "hf_" + "Zq7" * 11


@pytest.fixture(scope="module")
def sources(make_dense, tmp_path_factory):
    """Dense models of all families, in the home of somebody, with traces of it in their files."""
    home = tmp_path_factory.mktemp("home") / USER
    home.mkdir()
    shutil.copy(CALIBRATION, home / "notes.txt")
    folders = {}
    for family in FAMILIES:
        folder = home / family
        shutil.copytree(make_dense(family), folder)
        spread_vectors(folder / "model.safetensors")
        for name, field in (("config", "_name_or_path"), ("tokenizer_config", "name_or_path")):
            path = folder / f"{name}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), field: str(folder)}))
        folders[family] = folder
    return folders


def spread_vectors(path):
    """Change biases and norms: where they are all 0 or 1, nobody sees that one is lost."""
    generator, stored = torch.Generator().manual_seed(0), load_file(path)
    for tensor in stored.values():
        if tensor.dim() == 1:
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(stored, path, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=relatives_last(product(FAMILIES, RECIPES)), ids="-".join)
def pair(request, sources, carve):
    """A dense model and the same with all experts active; the recipe."""
    family, recipe = request.param
    source = sources[family]
    home, options = source.parent, {"recipe": recipe, "calibration": source.parent / "notes.txt"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HOME": home, "LOGNAME": USER, "HF_TOKEN": TOKEN}.items():
            patch.setenv(name, str(value))
        return source, carve(source, (2, 6, 8), **options), recipe


def logits(folder, token_ids, dtype="float32", compute=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model.to(compute)(token_ids, use_cache=False).logits.float()


def test_with_all_experts_active_it_is_the_dense_model(pair, token_ids):
    source, carved, _ = pair
    expected = logits(source, token_ids)
    difference = logits(carved, token_ids) - expected
    assert difference.abs().max() < 1e-4 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("family", relatives_last(FAMILIES))
def test_in_bfloat16_it_rounds_no_worse_than_the_dense_model(sources, carve, token_ids, family):
    carved = carve(sources[family], (2, 6, 8), recipe="paper", dtype="bfloat16")
    exact = logits(sources[family], token_ids, "bfloat16", torch.float32)
    dense, ours = (
        (logits(folder, token_ids, "bfloat16") - exact).norm().item()
        for folder in (sources[family], carved)
    )
    assert 0 < ours < 1.5 * dense


def neurons(tensors, hidden, axis):
    """How often each vector of a neuron's weights occurs in a layer, whatever holds it."""
    found = Counter()
    for name, tensor in tensors.items():
        layer, _, part = name.replace("block_sparse_moe", "mlp").partition(".mlp.")
        is_router = part.startswith("gate.")
        if part and not is_router and tensor.dim() > 1 and tensor.shape[axis] == hidden:
            rows = tensor.movedim(axis, -1).reshape(-1, hidden)
            number = layer.rpartition(".")[2]
            found.update((number, row.numpy().tobytes()) for row in rows)
    return found


def test_every_neuron_is_in_exactly_one_place(pair, tensors):
    source, carved, recipe = pair
    before, after = tensors(source), tensors(carved)
    for axis in (-1,) if RECIPES[recipe].refit else (-1, -2):  # the way in, and the way out
        expected = neurons(before, 64, axis)
        assert set(expected.values()) == {1} and len(expected) >= 2 * 96
        assert neurons(after, 64, axis) == expected
    for layer in json.loads((carved / "conversion.json").read_text())["layers"]:
        assert len(set(layer["expert_sizes"])) == 1


def test_no_file_tells_who_made_it_and_where(pair):
    source, carved, _ = pair
    for path in carved.iterdir():
        content = path.read_bytes()
        for secret in (USER, TOKEN, str(source.parents[1]), str(carved.parent)):
            assert secret.encode() not in content, f"{secret} in {path.name}"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


@pytest.mark.parametrize("family", ["llama-2", "pythia", "qwen3-moe"])
def test_the_same_request_gives_the_same_bytes_also_when_interrupted(
    sources, carve, tmp_path, monkeypatch, family
):
    def stop(bar, *arguments):  # a layer is done
        raise KeyboardInterrupt

    source, output = sources[family], tmp_path / "out"
    expected = contents(carve(source))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tqdm, "update", stop)
        convert(source, output, shared=2, active=2, experts=8, **FEW)
    assert not output.exists() and output.with_name("out.partial").is_dir()
    resume(output)
    assert contents(output) == expected
