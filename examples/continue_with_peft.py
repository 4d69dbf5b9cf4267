# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a carved model with LoRA on attention, shared expert and routed experts, and merge.

    python examples/continue_with_peft.py REPOSITORY OUT TEXT_FILE [STEPS]

Needs `pip install '.[train]'`.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import cmoe_hf  # noqa: F401 - registers the model classes, so that no remote code is needed

repository, out, text_file, *steps = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repository, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(repository)

config = LoraConfig(
    r=8,
    lora_alpha=32,
    # The routed experts are packed tensors, not modules: they have a list of their own.
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)
# Parameters without an adapter are frozen, the gate scale u too: let it learn.
for name, parameter in model.named_parameters():
    parameter.requires_grad |= name.endswith("mlp.gate.scale")

lines = load_dataset("text", data_files=text_file, split="train").filter(lambda row: row["text"])
tokens = lines.map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=256),
    remove_columns=lines.column_names,
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=f"{out}-checkpoints",
        max_steps=int(steps[0]) if steps else 200,
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
    ),
    train_dataset=tokens,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()

model.merge_and_unload().save_pretrained(out)
tokenizer.save_pretrained(out)
