# SPDX-License-Identifier: Apache-2.0
"""Tasks of the harness: figures that a slow oracle confirms, and what is written of them."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from lm_eval.tasks import TaskManager
from refusal import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cmoe_hf.conversion import CMoEError, evaluate, evaluate_tasks
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.measure.tasks import PAPER_TASKS

FOLDER = Path(__file__).parent / "task"
OWN = ["--include-path", "."]
TOPICS = ["--tasks", "pydoc_topics", *OWN]


@pytest.fixture(autouse=True)
def in_the_folder_of_the_task(monkeypatch):
    """Its data files are found from there."""
    monkeypatch.chdir(FOLDER)


@pytest.fixture
def copy(carved, tmp_path):
    """A carved repository that a test may write into."""
    return Path(shutil.copytree(carved, tmp_path / "carved"))


def invoke(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def read(name):
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def prompt(document):
    return f"Question: {document['question']}\nAnswer:"


def slow_accuracy(folder, *, few_shot=0, limit=None, by_length=True):
    """Share of the questions whose right answer is the likeliest, by its length or not.

    Token by token; what is too long for the model loses its beginning.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def score(before, after):
        start, ids = len(tokenizer(before)["input_ids"]), tokenizer(before + after)["input_ids"]
        window = ids[-model.config.max_position_embeddings - 1 :]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]])).logits[0].double()
        shares = logits[start - len(ids) :].log_softmax(dim=1)
        return sum(share[token].item() for share, token in zip(shares, ids[start:], strict=True))

    examples = "".join(
        f"{prompt(example)} {example['choices'][example['answer']]}\n\n"
        for example in read("examples.jsonl")[:few_shot]
    )
    questions, right = read("questions.jsonl")[:limit], 0
    for question in questions:
        scores = [
            score(examples + prompt(question), f" {it}") / (len(it) if by_length else 1)
            for it in question["choices"]
        ]
        right += scores.index(max(scores)) == question["answer"]
    return right / len(questions)


def test_carved_and_dense_score_what_the_oracle_says(carved, dense):
    result = invoke(carved, "--baseline", dense, *TOPICS, "--batch-size", 5, "--json")
    assert result.exit_code == 0, result.stderr
    assert "loglikelihood" not in result.stderr  # no bars of the harness without a terminal
    printed = json.loads(result.stdout)
    [row] = printed["tasks"]
    stderr, baseline_stderr = row.pop("stderr"), row.pop("baseline_stderr")
    assert row == {
        "task": "pydoc_topics",
        "metric": "acc_norm",
        "few_shot": 0,
        "documents": 24,
        "value": slow_accuracy(carved),
        "baseline_value": slow_accuracy(dense),
    }
    for error, mean in ((stderr, row["value"]), (baseline_stderr, row["baseline_value"])):
        assert error == pytest.approx((mean * (1 - mean) / 23) ** 0.5)
    assert printed["limit"] is None


@pytest.mark.parametrize(("few_shot", "truncated"), [(None, False), (0, False), (8, True)])
def test_without_acc_norm_it_is_acc_and_few_shot_overrides_the_count_of_the_task(
    dense, caplog, few_shot, truncated
):
    [row] = evaluate_tasks(dense, tasks=["pydoc_plain"], include_path=".", few_shot=few_shot).tasks
    count = 1 if few_shot is None else few_shot
    assert (row.metric, row.few_shot) == ("acc", count)
    assert row.value == slow_accuracy(dense, few_shot=count, by_length=False)
    assert row.baseline_value is row.baseline_stderr is None
    said = [record.getMessage() for record in caplog.records if "cmoe_hf" in record.name]
    assert len(said) == truncated
    assert all("longer than the model's context of 128 tokens" in line for line in said)


def test_a_limit_takes_the_first_documents_and_is_stated(dense):
    table = " ".join(invoke(dense, *TOPICS, "--limit", 5).stdout.split())
    assert f"{slow_accuracy(dense, limit=5):.4f}" in table
    assert "pydoc_topics" in table and "only the first 5 documents of each task" in table


@pytest.mark.thorough
def test_groups_and_tags_of_ones_own_beside_the_harness_tasks(dense):
    rows = evaluate_tasks(dense, tasks=["pydoc_list"], include_path=".", limit=4).tasks
    rows += evaluate_tasks(dense, tasks=["pydoc_tag"], include_path=".", limit=4).tasks
    assert [row.task for row in rows] == [
        "pydoc_group",  # has an aggregate, the list around it has none
        "pydoc_fixed",
        "pydoc_fixed",
        "pydoc_plain",
    ]
    topics, plain = (
        slow_accuracy(dense, limit=4, few_shot=few_shot, by_length=False) for few_shot in (0, 1)
    )
    assert (rows[0].metric, rows[0].few_shot, rows[0].documents) == ("acc", None, 8)
    assert rows[0].value == (topics + plain) / 2
    assert rows[3].value == plain
    refused(invoke(dense, "--tasks", "pydoc_topics,pydoc_group", *OWN), 2, "pydoc_topics")


@pytest.mark.thorough
def test_the_paper_tasks_exist_and_an_unknown_one_is_refused(dense):
    assert set(TaskManager().all_tasks) >= PAPER_TASKS.keys()
    refused(invoke(dense, "--tasks", "bolq,piqa"), 2, "no task 'bolq'", "boolq", "lm-eval ls tasks")


WITHOUT_PACKAGE = """
import sys
sys.modules["cmoe_hf"] = None  # any import of it fails
command, site, *models = sys.argv
sys.path.insert(0, site)
from lm_eval.__main__ import cli_evaluate
for model in models:
    arguments = f"--model hf --model_args pretrained={model},trust_remote_code=True"
    arguments += f" --tasks pydoc_topics --num_fewshot 1 --include_path . --output_path {model}"
    sys.argv = ["lm_eval", *arguments.split()]
    cli_evaluate()
"""


@pytest.fixture
def harness_without_its_tasks(tmp_path):
    """The code of the harness; its 14,000 task files, which take 10 seconds to read, stay out."""
    installed, linked = Path(find_spec("lm_eval").origin).parent, tmp_path / "site" / "lm_eval"
    (linked / "tasks").mkdir(parents=True)
    code = [path for path in installed.iterdir() if path.name != "tasks"]
    for path in [*code, *installed.glob("tasks/*.py")]:
        (linked / path.relative_to(installed)).symlink_to(path)
    return linked.parent


@pytest.mark.thorough
def test_the_harness_by_itself_says_the_same_without_the_package(
    copy, dense_copy, harness_without_its_tasks, tmp_path
):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, harness_without_its_tasks, copy, dense_copy],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "modules").glob("**/modeling_cmoe.py"))
    [row] = evaluate_tasks(
        copy, baseline=dense_copy, tasks=["pydoc_topics"], include_path=".", few_shot=1
    ).tasks
    ours = {copy: (row.value, row.stderr), dense_copy: (row.baseline_value, row.baseline_stderr)}
    for model, figures in ours.items():
        [file] = model.glob("**/results_*.json")
        theirs = json.loads(file.read_text())["results"]["pydoc_topics"]
        assert (theirs["acc_norm,none"], theirs["acc_norm_stderr,none"]) == figures


def in_card(folder):
    """Dataset, its name, metric and value of each result in the card."""
    return [
        (it.dataset_type, it.dataset_name, it.metric_type, it.metric_value)
        for it in ModelCard.load(folder / "README.md").data.eval_results
    ]


def test_the_card_states_each_result_once_and_keeps_its_body_and_those_of_others(
    copy, dense, held_out
):
    index = """model-index:
- name: theirs
  results:
  - task: {type: text-generation}
    dataset: {name: Another, type: another}
    metrics: [{type: acc, value: 0.5}]
"""
    path, others = copy / "README.md", ("another", "Another", "acc", 0.5)
    card = ModelCard.load(path)
    path.write_text(path.read_text().replace("---\n", "---\n" + index, 1))
    options = {"baseline": dense, "card": True}
    tasks = {"tasks": ["pydoc_topics", "pydoc_plain"], "include_path": ".", **options}
    evaluate_tasks(copy, limit=3, **tasks)
    assert [name for _, name, _, _ in in_card(copy)] == [
        "Another",
        "pydoc_topics (0-shot, first 3 documents only)",
        "pydoc_plain (1-shot, first 3 documents only)",
    ]
    measured = evaluate(copy, text=held_out, sequence_length=64, **options)
    perplexity, dense_perplexity = measured.perplexity, measured.baseline_perplexity
    topics, plain = evaluate_tasks(copy, **tasks).tasks
    assert in_card(copy) == [
        others,
        ("heldout.txt", "heldout.txt (windows of 64 tokens)", "perplexity", perplexity),
        ("pydoc_topics", "pydoc_topics (0-shot)", "acc_norm", topics.value),
        ("pydoc_plain", "pydoc_plain (1-shot)", "acc", plain.value),
    ]
    again = ModelCard.load(path)
    led = f"| **{perplexity:.2f}** (dense {dense_perplexity:.2f}) on `heldout.txt` |"
    unmeasured = "| not measured yet: `cmoe evaluate --baseline DENSE --card` |"
    assert led in again.text and again.text.replace(led, unmeasured) == card.text
    after = again.data.to_dict()
    assert after.pop("model-index")[0]["name"] == "theirs" and after == card.data.to_dict()

    written = (copy / "evaluation.json").read_text()
    records = json.loads(written)["results"]
    assert [record["metric"] for record in records] == ["perplexity", "acc_norm", "acc"]
    assert [record["limit"] for record in records[1:]] == [None, None]
    assert records[1]["baseline"] == dense.name
    assert records[1]["baseline_value"] == topics.baseline_value
    assert {"cmoe_hf", "torch", "transformers", "lm_eval"} <= records[1]["versions"].keys()
    for content in (written, path.read_text()):
        assert str(copy.parent) not in content and str(dense.parent) not in content
    AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--tasks", ","], ["names no task"]),
        (["--tasks", "pydoc_topics", "--include-path", "nowhere"], ["nowhere is not a folder"]),
        ([*TOPICS, "--few-shot", "-1"], ["--few-shot is -1"]),
        ([*TOPICS, "--few-shot", "9"], ["pydoc_topics", "9 examples", "lower --few-shot"]),
        (["--tasks", "pydoc_fixed", *OWN, "--few-shot", "1"], ["pydoc_fixed", "takes no others"]),
        (["--tasks", "pydoc_unsafe", *OWN], ["pydoc_unsafe runs code that the model writes"]),
        ([*TOPICS, "--limit", "0"], ["--limit is 0"]),
        ([*TOPICS, "--batch-size", "0"], ["--batch-size is 0"]),
        ([*TOPICS, "--text", "wikitext2"], ["--text is for perplexity"]),
        ([*TOPICS, "--router", "oracle"], ["--router is for perplexity"]),
        (["--few-shot", "1"], ["--few-shot is for tasks", "--tasks"]),
        (["--limit", "1"], ["--limit is for tasks"]),
        (["--include-path", "."], ["--include-path is for tasks"]),
        (["--batch-size", "1"], ["--batch-size is for tasks"]),
        ([*TOPICS, "--baseline", "nowhere/at/all"], ["nowhere/at/all is neither"]),
        ([*TOPICS, "--dtype", "float8"], ["no dtype 'float8'"]),
        (["--card", "--router", "oracle"], ["not with router 'oracle'"]),
    ],
)
def test_bad_requests_are_refused(carved, arguments, phrases):
    refused(invoke(carved, *arguments, "--json"), 2, *phrases)


@pytest.mark.parametrize("what", [TOPICS, []])
def test_a_card_that_cannot_be_written_is_refused(copy, hub, what):
    hub.publish("org/tasks", copy)
    refused(invoke("org/tasks", *what, "--card"), 2, "local folder", "org/tasks")
    (copy / "evaluation.json").write_text('{"results": [{}]}')
    refused(invoke(copy, *what, "--card"), 2, "cannot be read", "leave --card out")
    (copy / "evaluation.json").unlink()
    (copy / "README.md").unlink()
    refused(invoke(copy, *what, "--card"), 2, "has no README.md")


def test_what_cannot_be_measured(carved, dense_copy, monkeypatch):
    refused(invoke(carved, "--tasks", "pydoc_broken", *OWN), 1, "pydoc_broken cannot be loaded")
    weights = load_file(dense_copy / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, dense_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CMoEError, match="NaN on the task pydoc_topics"):
        evaluate_tasks(dense_copy, tasks=["pydoc_topics"], include_path=".", limit=1)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    refused(invoke(carved, *TOPICS), 2, "pip install '.[eval]'")
