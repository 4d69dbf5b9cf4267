# SPDX-License-Identifier: Apache-2.0
"""Texts, tokenizers and windows."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused
from test_bad_input import run
from transformers import AutoTokenizer

from cmoe_hf.conversion import RequestError
from cmoe_hf.conversion.embedded import CALIBRATION
from cmoe_hf.conversion.source.calibration import (
    apart_windows,
    consecutive_windows,
    held_out,
    random_windows,
)


@pytest.mark.library
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama-2", {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}), ("qwen2", None)],
)
def test_a_vocabulary_beside_its_merges_is_a_tokenizer(own_dense, tmp_path, family, settings):
    source = own_dense(family)
    model = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    for path in source.glob("*token*"):
        path.unlink()
    (source / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(map(" ".join, model["merges"]))
    (source / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    if settings:
        (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert run(source, tmp_path / "out").exit_code == 0
    theirs, ours = map(AutoTokenizer.from_pretrained, (source, tmp_path / "out"))
    text = CALIBRATION.read_text(encoding="utf-8")[:5000]
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert (tmp_path / "out" / "merges.txt").is_file()


@pytest.mark.parametrize("family", ["llama-2", "qwen2", "pythia"])  # of some, the library makes one
def test_no_tokenizer_is_refused(own_dense, no_leftovers, family):
    source = own_dense(family)
    for path in source.glob("*token*"):
        path.unlink()
    refused(run(source, no_leftovers), 2, f"{family} has no tokenizer")


@given(st.integers(1, 300), st.integers(1, 9000))
def test_what_is_held_out_is_an_eighth_in_whole_windows_and_never_much(windows, length):
    held = held_out(windows, length)
    if windows == 1:
        assert held < length
    else:
        assert held % length == 0
        assert length <= held <= max(length, min(windows * length // 8, 4096))


@given(st.integers(2, 40), st.integers(1, 20), st.integers(0, 99))
def test_what_is_held_out_comes_from_the_end_of_the_text(samples, length, seed):
    ids = torch.arange(2000)
    windows_WL = apart_windows(ids, samples=samples, length=length, seed=seed)
    held = held_out(samples, length) // length
    assert windows_WL.shape == (samples, length)
    assert (windows_WL[:-held] < 1750).all() and (windows_WL[-held:] >= 1750).all()


@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 99))
def test_random_windows_are_slices_of_the_text(samples, length, seed):
    ids = torch.arange(max(200, samples * length + 1))
    windows_WL = random_windows(ids, samples=samples, length=length, seed=seed)
    assert windows_WL.shape == (samples, length)
    for window_L in windows_WL:
        assert torch.equal(window_L, ids[window_L[0] : window_L[0] + length])
    again = random_windows(ids, samples=samples, length=length, seed=seed)
    assert torch.equal(windows_WL, again)


@given(st.integers(1, 300), st.integers(1, 40))
def test_consecutive_windows_drop_only_the_last_partial_one(tokens, length):
    ids = torch.arange(tokens)
    if tokens < length:
        with pytest.raises(RequestError, match="fewer than one window"):
            consecutive_windows(ids, length=length)
    else:
        windows_WL = consecutive_windows(ids, length=length)
        assert torch.equal(windows_WL.flatten(), ids[: tokens - tokens % length])
