# SPDX-License-Identifier: Apache-2.0
"""What people do with a transformers model, done with a carved one: small, real, offline."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

pytestmark = pytest.mark.library


@pytest.fixture(scope="module")
def repo(embedded, carve):
    """The embedded default, carved S2A2E8."""
    return carve(embedded, (2, 2, 8), samples=16, sequence_length=256, dtype="float32")


@pytest.fixture
def model(repo):
    return AutoModelForCausalLM.from_pretrained(repo, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(repo):
    return AutoTokenizer.from_pretrained(repo)


@pytest.fixture
def prompt(tokenizer):
    return tokenizer("The following methods are", return_tensors="pt")


def slow_greedy(model, ids, count):
    """Greedy decoding without a cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_text_generation_pipeline(repo, model, tokenizer):
    generate = pipeline("text-generation", model=str(repo), dtype=torch.float32)
    [output] = generate("The class", max_new_tokens=8, do_sample=False)
    ids = slow_greedy(model, tokenizer("The class", return_tensors="pt")["input_ids"], 8)
    assert output["generated_text"] == tokenizer.decode(ids[0])


def test_generation_by_a_compiled_forward_method(repo, model, prompt):
    expected = slow_greedy(model, prompt["input_ids"], 12)
    compiled = AutoModelForCausalLM.from_pretrained(repo, dtype=torch.float32).eval()
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="eager")
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "eos_token_id": None}
    ids = compiled.generate(**prompt, **options, cache_implementation="static")
    assert torch.equal(ids, expected)


def test_sampling_and_beam_search(model, prompt):
    torch.manual_seed(0)
    sampled = model.generate(**prompt, do_sample=True, top_p=0.9, max_new_tokens=8)
    beams = model.generate(**prompt, num_beams=3, num_return_sequences=3, max_new_tokens=8)
    assert sampled.shape[0] == 1 and beams.shape[0] == 3
    length = prompt["input_ids"].shape[1]
    for ids in (sampled, beams):
        assert (ids[:, :length] == prompt["input_ids"]).all()
        assert ids.shape[1] > length
    assert len({tuple(row) for row in beams.tolist()}) == 3


def test_left_padded_batches_equal_single_inputs(model, tokenizer):
    texts = ["The following methods are defined for", "def", "A mapping object maps hashable"]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert (batch["attention_mask"] == 0).any()
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    together = model.generate(**batch, **options)
    for row, text in zip(together, texts, strict=True):
        single = model.generate(**tokenizer(text, return_tensors="pt"), **options)
        assert torch.equal(row[-single.shape[1] :], single[0])


def training_set(tokenizer, text):
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"]
    return Dataset.from_dict({"input_ids": [ids[i : i + 64] for i in range(0, 64 * 16, 64)]})


def train(model, tokenizer, text, folder, **options):
    """Twelve steps; the logged losses."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            **options,
        ),
        train_dataset=training_set(tokenizer, text),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_lowers_the_loss_and_its_checkpoints_load(model, tokenizer, held_out, tmp_path):
    scale = model.model.layers[0].mlp.gate.scale
    bias = model.model.layers[0].mlp.gate.balance_bias.clone()
    losses = train(model, tokenizer, held_out, tmp_path, save_steps=12)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert scale.abs().sum() > 0  # u moves
    assert torch.equal(model.model.layers[0].mlp.gate.balance_bias, bias)  # b does not, by itself
    checkpoint = tmp_path / "checkpoint-12"
    assert (checkpoint / "modeling_cmoe.py").is_file()
    again, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(2, 18).view(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)


def test_peft_lora_trains_saves_reloads_and_merges(
    model, repo, tokenizer, held_out, tmp_path, prompt
):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any(".experts." in name for name in trained)
    assert any(".shared_expert." in name for name in trained)
    losses = train(adapted, tokenizer, held_out, tmp_path / "run", save_strategy="no")
    assert sum(losses[-4:]) < sum(losses[:4])
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(**prompt).logits
    fresh = AutoModelForCausalLM.from_pretrained(repo, dtype=torch.float32).eval()
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**prompt).logits, expected, atol=1e-4, rtol=1e-4)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(**prompt).logits, expected, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())


def test_disk_offload(model, repo, prompt, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" for index in (1, 2, 3)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        repo, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    ).eval()
    assert offloaded.model.layers[2].mlp.experts.down_proj.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(
            offloaded(**prompt).logits, model(**prompt).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.thorough
def test_compiled_by_inductor_without_graph_breaks(carved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(carved, experts_implementation="grouped_mm")
    with torch.no_grad():
        expected = model.eval()(token_ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        logits = compiled(token_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
