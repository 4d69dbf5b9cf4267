# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, chat templates and generation settings of each family: the same wherever they go."""

import shutil
from functools import cache

import pytest
import torch
from families import FAMILIES, relatives_last
from hub import TOKEN
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from cmoe_hf.conversion import export, publish
from cmoe_hf.conversion.source.architectures import DIFFERS

pytestmark = pytest.mark.library

INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }}"
    " [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ROLES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>\n{% if quiet %}<think></think>{% endif %}{% endif %}"
)
SAID = [("user", " What is a défi?\n"), ("assistant", "A challenge."), ("user", "Thanks")]
CHAT = [{"role": role, "content": content} for role, content in SAID]
FUNCTIONS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
MIXED = ["The <tool> défi </s>", "[INST]<|im_start|>  <|endoftext|> 日"]
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.85, "top_k": 17, "max_new_tokens": 6}
TEXT, END, TURN = "<|endoftext|>", "<|text_end|>", "<|turn_end|>"
SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PADDED = {**SENTENCE, "pad_token": "</s>"}
LLAMA_3 = {"bos_token": "<|text|>", "eos_token": TURN, "pad_token": END}
NEOX = {"bos_token": TEXT, "eos_token": TEXT, "unk_token": TEXT, "pad_token": "<|padding|>"}
QWEN = {"eos_token": "<|im_end|>", "pad_token": TEXT}
BOX = {"padding_side": "left", "extra_special_tokens": ["<|box|>"]}
SHORT = {"padding_side": "right", "truncation_side": "left", "model_max_length": 100}
TOOLS = {"default": INSTRUCTIONS, "tool_use": "[TOOLS]{{ tools | tojson }}{{ bos_token }}"}
STYLES = {
    "llama-2": (LlamaTokenizer, SENTENCE, INSTRUCTIONS, ["</s>"], ["<pad>"], {}),
    "llama-3": (PreTrainedTokenizerFast, LLAMA_3, ROLES, [END, TURN], ["<|user|>"], {}),
    "tinyllama": (LlamaTokenizer, PADDED, ROLES, ["</s>"], ["<|user|>"], {}),
    "mistral": (LlamaTokenizer, SENTENCE, TOOLS, ["</s>"], ["[INST]", "[/INST]"], SHORT),
    "qwen": (Qwen2Tokenizer, QWEN, CHATML, ["<|im_end|>", TEXT], ["<|im_start|>"], BOX),
    "": (GPTNeoXTokenizer, NEOX, ROLES, [TEXT, "<|user|>"], ["<|user|>", "   "], {}),
}
"""Class, special tokens and template of a family's tokenizers, in its manner but of our own making;
tokens that end a text; added tokens; options."""


def build_tokenizer(kind, special, template, added, options):
    """A tokenizer of bytes and letters: with those of Llama-2 a space is a letter."""
    tokens = sorted(ByteLevel.alphabet())
    if kind is LlamaTokenizer:
        tokens = [*SENTENCE.values(), *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Teh"]
    tokens += ["Th", "The"]
    parts = {"vocab": {token: id for id, token in enumerate(tokens)}}
    parts["merges"] = [("T", "h"), ("Th", "e")]
    if kind is PreTrainedTokenizerFast:
        parts = {"tokenizer_object": GPTNeoXTokenizer(**parts).backend_tokenizer}
    tokenizer = kind(**parts, **special, **options, chat_template=template)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, normalized=False)])
    if bos := tokenizer.bos_token:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


@pytest.fixture(scope="module")
def repositories(make_dense, carve, tmp_path_factory):
    """A dense model of a family with its own files, and what was carved from it."""

    @cache
    def make(family):
        style = next(STYLES[name] for name in STYLES if family.startswith(name))
        kind, special, template, ends, added, options = style
        tokenizer = build_tokenizer(kind, special, template, added, options)
        ends = tokenizer.convert_tokens_to_ids(ends)
        ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        folder = tmp_path_factory.mktemp("own") / family
        shutil.copytree(make_dense(family, **ids), folder)
        for path in folder.glob("tokenizer*"):
            path.unlink()
        # The older layout has the template in tokenizer_config.json.
        tokenizer.save_pretrained(folder, save_jinja_files=isinstance(template, dict))
        GenerationConfig(**ids, **SAMPLING).save_pretrained(folder)
        return folder, carve(folder, (0, 2, 8))

    return make


def described(tokenizer):
    """Everything that must stay as it was."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else [None]
    options = {"tools": FUNCTIONS, "add_generation_prompt": True, "quiet": True}
    return {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "special": (tokenizer.special_tokens_map, tokenizer.all_special_ids),
        "added": {id: repr(token) for id, token in tokenizer.added_tokens_decoder.items()},
        "sides": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length),
        "plain": tokenizer.apply_chat_template(CHAT, tokenize=False),
        "chats": [
            tokenizer.apply_chat_template(CHAT, chat_template=name, tokenize=ids, **options)
            for name in named
            for ids in (False, True)
        ],
        "ids": tokenizer(MIXED).input_ids,
    }


def load(place):
    """The model of a folder or repository."""
    return AutoModelForCausalLM.from_pretrained(place).eval()


def text_after(model, tokens):
    """What is generated by a model that wants to say these tokens."""

    def say(input_ids, scores):
        said = torch.full_like(scores, -torch.inf)
        said[:, tokens[input_ids.shape[1] - 3]] = 0
        return said

    return model.generate(torch.tensor([[7, 8, 9]]), logits_processor=[say])[0, 3:].tolist()


def deliver(how, carved, folder):
    """Where the carved model can be had after this was done with it."""
    if how == "exported":
        return export(carved, folder / "out").output
    if how == "published":  # every name once: the library keeps what it has loaded
        return publish(carved, f"org/{folder.name}", licence="mit", base_model="o/d").repository
    if how == "saved":
        load(carved).save_pretrained(folder)
        AutoTokenizer.from_pretrained(carved).save_pretrained(folder)
    return carved if how == "carved" else folder


WAYS = [
    (family, how)
    for family, (kind, _) in FAMILIES.items()
    for how in ("carved", "saved", "published", "exported")
    if how in ("carved", "exported")
    or family in ("llama-2", "mistral-sliding", "qwen3-moe", "pythia")
    if how != "exported" or kind.model_type in DIFFERS
]


@pytest.mark.parametrize("way", relatives_last(WAYS), ids="-".join)
def test_its_files_survive(repositories, tmp_path, hub, monkeypatch, way):
    family, how = way
    hub.reset()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source, carved = repositories(family)
    expected = GenerationConfig.from_pretrained(source)
    assert SAMPLING.items() <= expected.to_dict().items()
    place = deliver(how, carved, tmp_path)
    there = AutoTokenizer.from_pretrained(place)
    assert described(there) == described(AutoTokenizer.from_pretrained(source))
    assert GenerationConfig.from_pretrained(place).to_dict() == expected.to_dict()
    model, dense = load(place), load(source)
    assert model.generation_config.to_dict() == dense.generation_config.to_dict()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(dense.config, name)
    for end in torch.tensor(expected.eos_token_id).view(-1).tolist():
        assert text_after(model, [7, 8, end, 7, 8, 9]) == [7, 8, end]
    assert len(text_after(model, range(10, 20))) == 6


def test_they_survive_the_way_from_the_hub(repositories, carve, hub):
    source, _ = repositories("mistral")
    hub.publish("org/chat", source)
    extra = source / "additional_chat_templates" / "tool_use.jinja"
    hub.repositories["org/chat"].files()[str(extra.relative_to(source))] = extra.read_bytes()
    there = AutoTokenizer.from_pretrained(carve("org/chat"))
    assert described(there) == described(AutoTokenizer.from_pretrained(source))


@pytest.mark.parametrize("family", ["llama-2", "pythia"])
def test_without_generation_settings_those_of_the_configuration_count(
    make_dense, carve, tmp_path, family
):
    dense = make_dense(family, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    source = shutil.copytree(dense, tmp_path / family)
    (source / "generation_config.json").unlink()
    settings = load(carve(source)).generation_config
    assert settings.eos_token_id == [4, 5]
    expected = load(source).generation_config.to_dict()
    assert {name: it for name, it in settings.to_dict().items() if it} == {
        name: it for name, it in expected.items() if it
    }
