# SPDX-License-Identifier: Apache-2.0
"""Files that a new repository takes over: read before the work, and the same bytes after it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from killable import interrupted_at
from refusal import refused
from test_bad_input import run
from test_output import command
from tokenizers import Tokenizer, models, normalizers
from tokenizers.decoders import ByteFallback
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT

TEXT = " leading  and  double spaces, def f(x): return 'é'\n"


def recover(model, out, *options):
    few = ["--samples", 2, "--sequence-length", 32, "--rank", 2, "--device", "cpu"]
    texts = ["--training", CALIBRATION, "--text", HELD_OUT, "--objective", "next-token"]
    return command("recover", model, out, *texts, *few, *options)


@pytest.mark.parametrize(
    ("card", "licence", "warning"),
    [
        (b"---\nlicense: [mit\nbase: {\n---\nHello\n", None, "no licence counts as stated"),
        (b"---\n- mit\n---\nHello\n", None, "no licence counts as stated"),
        ("---\nlicense: mit\n---\nCafé\n".encode("latin-1"), "mit", "is not UTF-8"),
        ("\ufeff---\nlicense: mit\n---\nHello\n".encode(), "mit", None),
    ],
)
def test_a_card_that_is_hard_to_read(dense_copy, tmp_path, caplog, card, licence, warning):
    (dense_copy / "README.md").write_bytes(card)
    assert run(dense_copy, tmp_path / "out").exit_code == 0
    assert (warning or "") in caplog.text
    written = ModelCard.load(tmp_path / "out" / "README.md")
    assert written.data.to_dict().get("license") == licence
    assert ("The source states no licence" in written.text) == (licence is None)


@pytest.mark.parametrize(
    ("make", "section"),
    [
        (lambda *folders: command("export", *folders), "## Stock architecture"),
        pytest.param(recover, "## Recovery", marks=pytest.mark.thorough),
    ],
)
def test_a_broken_card_of_a_carved_model(carved, tmp_path, caplog, make, section):
    model = Path(shutil.copytree(carved, tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: [mit\n---\n\n# Mine\n\n## Licence\n\nNone.\n")
    assert make(model, tmp_path / "out").exit_code == 0
    assert caplog.text.count("no licence counts as stated") == 1
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict().get("license") is None
    assert "# Mine" in card.text and section in card.text


LEGAL = ["LICENSE", "license.txt", "License.md", "COPYING", "Notice.txt", "Use_Policy.md"]
LEGAL += ["LICENSES/MIT.txt", "LICENSES/more/A.txt", "terms/of use.md"]


def add_legal_texts(folder):
    """Legal texts by all kinds of names, one of which only the card tells."""
    for name in LEGAL:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"This is {name}.")
    link = "license: other\nlicense_link: ./terms/of%20use.md#2"
    (folder / "README.md").write_text(f"---\n{link}\n---\nHello\n")


@pytest.fixture(scope="module")
def legal(own_dense, carve, tmp_path_factory):
    """A source with legal texts and Llama's tokenizer, and all that can be made of it."""
    source, root = own_dense(), tmp_path_factory.mktemp("legal")
    add_legal_texts(source)
    llama_tokenizer(source, tokenizer_class="LlamaTokenizer")
    carved = carve(source)
    assert command("export", carved, root / "native").exit_code == 0
    assert recover(carved, root / "tuned").exit_code == 0
    return source, [carved, root / "native", root / "tuned"]


def test_legal_texts_go_with_the_model(legal, hub, tmp_path):
    source, folders = legal
    hub.publish("org/legal", source)
    assert run("org/legal", tmp_path / "out").exit_code == 0
    for folder in (*folders, tmp_path / "out"):
        for name in LEGAL:
            assert (folder / name).read_text() == f"This is {name}."
        assert ModelCard.load(folder / "README.md").data.license_link == "./terms/of%20use.md#2"


@pytest.mark.parametrize(
    ("link", "stays"),
    [
        ("https://example.org/terms", True),
        ("../secret.txt", False),
        ("file:///etc/hostname", False),
        ("config.json", False),
        ("./", False),
    ],
)
def test_a_link_to_a_licence_is_followed_or_dropped(dense_copy, tmp_path, caplog, link, stays):
    (tmp_path / "secret.txt").write_text("a secret")
    card = f"---\nlicense: other\nlicense_name: own\nlicense_link: {link}\n---\nHello\n"
    (dense_copy / "README.md").write_text(card)
    assert run(dense_copy, tmp_path / "out").exit_code == 0
    written = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert written["license_name"] == "own" and written.get("license_link") == (
        (stays and link) or None
    )
    assert ("there is no such text" in caplog.text) != stays
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"secret.txt", "hostname"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "cmoe_llama"


def test_a_source_in_the_cache_of_the_hub_is_the_repository(dense, tmp_path):
    commit = "0123456789" * 4
    folder = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / commit
    shutil.copytree(dense, folder)
    (tmp_path / "link").symlink_to(folder)
    assert run(tmp_path / "link", tmp_path / "out").exit_code == 0
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["source"] == {"name": "owner/tiny", "revision": commit}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "owner/tiny" and "# tiny-CMoE-S2A2E8" in card.text
    assert f"| source revision | {commit} |" in card.text


def test_what_a_tokenizer_is_set_to_stays_resumed_or_not(dense_copy, tmp_path):
    backend = Tokenizer.from_file(str(dense_copy / "tokenizer.json"))
    backend.enable_truncation(max_length=50)
    backend.enable_padding(length=20)
    backend.save(str(dense_copy / "tokenizer.json"))
    assert run(dense_copy, tmp_path / "whole").exit_code == 0
    with interrupted_at("model.safetensors", 4):  # when layer 1 is written
        assert run(dense_copy, tmp_path / "resumed").exit_code == 1
    assert command("convert", tmp_path / "resumed", "--resume").exit_code == 0
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys()
    differing = {name for name in whole if whole[name] != resumed[name]}
    assert differing <= {"conversion.json", "README.md"}  # which tell the time
    written = json.loads(whole["tokenizer.json"])
    assert written["truncation"]["max_length"] == 50 and written["padding"] is not None


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("LICENSE", None, "cannot be read (No such file"),
        ("NOTICE.txt", None, "NOTICE.txt in"),
        ("README.md", None, "README.md in"),
        ("merges.txt", None, "merges.txt in"),
        ("generation_config.json", "{", "generation_config.json is not valid JSON"),
        ("special_tokens_map.json", "{", "the tokenizer of"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_file_to_copy_that_cannot_be_read(
    dense_copy, carved, tmp_path, no_leftovers, name, content, phrase, options
):
    model = Path(shutil.copytree(carved, tmp_path / "model"))
    for folder in (dense_copy, model):
        (folder / name).unlink(missing_ok=True)
        if content is None:
            (folder / name).symlink_to(tmp_path / "gone")
        else:
            (folder / name).write_text(content)
    refused(run(dense_copy, no_leftovers, *options), 2, phrase)
    refused(command("export", model, no_leftovers), 2, phrase)
    refused(recover(model, no_leftovers), 2, phrase)


def llama_tokenizer(folder, **settings):
    """A tokenizer as Llama 2 has it, in files as transformers 4 wrote them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *map(chr, range(33, 127)), "▁l", "le", "▁le", "▁▁", "an", "▁an"]
    merges = [("▁", "l"), ("l", "e"), ("▁l", "e"), ("▁", "▁"), ("a", "n"), ("▁", "an")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = ByteFallback()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    written = {"tokenizer_config.json": {**ends, **settings}, "special_tokens_map.json": ends}
    for name, entries in {**written, "added_tokens.json": {}}.items():
        (folder / name).write_text(json.dumps(entries))  # in one line, as nobody writes it here
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}\r\n")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")


TOKENIZER_FILES = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_FILES += ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"]


@pytest.mark.library
@pytest.mark.parametrize(
    ("family", "stated"),
    [
        ("llama-2", "PreTrainedTokenizerFast"),
        ("llama-2", None),
        ("qwen2", "LlamaTokenizer"),
        pytest.param("mistral", "LlamaTokenizer", marks=pytest.mark.thorough),
        pytest.param("qwen2", None, marks=pytest.mark.thorough),
    ],
)
def test_the_tokenizer_is_the_source_s(make_dense, carve, tmp_path, family, stated):
    source = Path(shutil.copytree(make_dense(family), tmp_path / "source"))
    llama_tokenizer(source, **({"tokenizer_class": stated} if stated else {}))
    carved = carve(source, sequence_length=32)
    assert command("export", carved, tmp_path / "native").exit_code == 0
    check_tokenizer(source, [carved, tmp_path / "native"])


@pytest.mark.library
def test_the_tokenizer_of_a_recovered_model_is_the_source_s(legal):
    check_tokenizer(*legal)


def check_tokenizer(source, folders):
    """The files of the tokenizer are the source's, byte for byte where the library allows it."""
    ours = {"tokenizer_class": 0, "padding_side": 0}
    first = AutoTokenizer.from_pretrained(source)
    for folder in folders:
        before, after = (
            json.loads((place / "tokenizer_config.json").read_text()) for place in (source, folder)
        )
        if before != after:  # the library takes the class of the model type there
            assert after | ours == before | ours
            assert after["tokenizer_class"] != "TokenizersBackend"  # which 4.x does not know
        for name in TOKENIZER_FILES:
            if before == after or not name.startswith("tokenizer"):
                assert (folder / name).read_bytes() == (source / name).read_bytes(), name
        again = AutoTokenizer.from_pretrained(folder)
        assert again(TEXT)["input_ids"] == first(TEXT)["input_ids"]
        assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()


def test_what_tells_a_place_is_dropped_and_nothing_else(dense_copy, tmp_path):
    path = dense_copy / "tokenizer_config.json"
    plain = json.loads(path.read_text()) | {"name_or_path": "owner/name", "extra": ["é", 1e-30]}
    path.write_text(json.dumps(plain))
    assert run(dense_copy, tmp_path / "kept").exit_code == 0
    assert (tmp_path / "kept" / path.name).read_bytes() == path.read_bytes()
    places = {
        "name_or_path": "/home/jane-doe/models/llama",
        "tokenizer_file": "C:\\Users\\jane-doe\\tokenizer.json",
        "special_tokens_map_file": "~/jane-doe/special_tokens_map.json",
    }
    path.write_text(json.dumps(plain | places))
    assert run(dense_copy, tmp_path / "out").exit_code == 0
    written = (tmp_path / "out" / path.name).read_text()
    del plain["name_or_path"]
    assert json.loads(written) == plain and "jane-doe" not in written


def test_the_code_of_a_trusted_tokenizer_goes_with_it(dense_copy, tmp_path):
    (dense_copy / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "from .helper_own import NAME\n"
        "class Own(PreTrainedTokenizerFast):\n    name = NAME\n"
    )
    (dense_copy / "helper_own.py").write_text("NAME = 'own'\n")
    (dense_copy / "unrelated.py").write_text("")
    path = dense_copy / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    result = run(dense_copy, tmp_path / "out", "--trust-remote-code")
    assert result.exit_code == 0, result.stderr
    for name in ("tokenization_own.py", "helper_own.py", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dense_copy / name).read_bytes()
    assert not (tmp_path / "out" / "unrelated.py").exists()
    again = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert again.name == "own"
    refused(command("upgrade", tmp_path / "out"), 2, "was not written by any release")
    result = command("upgrade", tmp_path / "out", "--trust-remote-code")
    assert result.exit_code == 0 and "as carved" in result.stdout, result.stderr


def test_a_hub_id_keeps_its_owner_and_a_path_only_its_last_part(hub, dense, carved, tmp_path):
    hub.publish("org/pico", dense)
    (tmp_path / "jane-doe" / "x").mkdir(parents=True)
    shutil.copy(HELD_OUT, tmp_path / "jane-doe" / "mine.txt")
    few = ["--samples", 2, "--sequence-length", 32, "--rank", 2, "--device", "cpu"]
    few += ["--training", CALIBRATION, "--text", tmp_path / "jane-doe" / "x" / ".." / "mine.txt"]
    out = tmp_path / "out"
    result = command("recover", carved, out, *few, "--teacher", "org/pico")
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "recovery.json").read_text())
    assert report["teacher"] == "org/pico"
    assert (report["training"], report["text"]) == ("calibration.txt", "mine.txt")
    card = (out / "README.md").read_text()
    assert "distilled from `org/pico`" in card and "jane-doe" not in card


def test_advice_works_as_printed(carved, tmp_path):
    out = tmp_path / "out"
    refused(command("recover", carved, out, "--resume"), 2, "cmoe recover OUT --resume.")
    (tmp_path / "out.partial" / "work").mkdir(parents=True)  # of an export that was killed
    (tmp_path / "out.partial" / "work" / "settings.json").write_text("{}")
    (tmp_path / "out.partial" / "repository").mkdir()
    result = command("export", carved, out)
    refused(result, 2, "choose another output folder, or pass --overwrite")
    assert "--resume" not in result.stderr
    assert command("export", carved, out, "--overwrite").exit_code == 0


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "default": ({"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6}),
    "linear": (
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "llama3": (
        {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 64} | LLAMA3,
        {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64}
            | LLAMA3,
        },
    ),
    "pythia": (
        {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
    ),
}
OLDER = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")


@pytest.mark.library
@pytest.mark.parametrize("kind", ROPES)
def test_the_configuration_speaks_to_older_engines_too(make_dense, carve, tmp_path, caplog, kind):
    rope, expected = ROPES[kind]
    family = "pythia" if kind == "pythia" else "tinyllama"
    carved = carve(
        make_dense(family, rope_parameters=dict(rope), intermediate_size=128), dtype="bfloat16"
    )
    AutoModelForCausalLM.from_pretrained(carved).save_pretrained(tmp_path / "again")
    folders = [carved, tmp_path / "again"]
    if kind != "pythia":
        result = command("export", carved, tmp_path / "native")
        assert result.exit_code == 0, result.stderr
        folders.append(tmp_path / "native")
    caplog.clear()
    for folder in folders:
        written = json.loads((folder / "config.json").read_text())
        whole = {} if folder.name != "native" else {"partial_rotary_factor": 1.0}  # of a GLM
        assert {name: written[name] for name in OLDER if name in written} == expected | whole
        assert written["torch_dtype"] == written["dtype"] == "bfloat16"
        config = AutoConfig.from_pretrained(folder)
        assert config.rope_parameters == written["rope_parameters"] == rope | whole
        assert config.dtype == torch.bfloat16
        # Transformers 5.16 keeps a GLM's factor as a field besides.
        assert not set(vars(config)) & ({*OLDER, "torch_dtype"} - whole.keys())
    assert not caplog.records


def test_the_newer_names_win_and_a_change_reaches_the_older_ones(carved, tmp_path, edit_config):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e4}
    model = Path(shutil.copytree(carved, tmp_path / "model"))
    stale = {"rope_type": "linear", "factor": 2.0}
    edit_config(model, rope_parameters=rope, rope_scaling=stale, rope_theta=1.0)
    config = AutoConfig.from_pretrained(model)
    assert config.rope_parameters == rope
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["rope_theta"] == 3e4 and written["rope_scaling"]["factor"] == 4.0
