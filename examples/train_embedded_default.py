# SPDX-License-Identifier: Apache-2.0
"""Train the embedded default: a 0.9 M parameter Llama on the help topics of the standard library.

    python examples/train_embedded_default.py conversion/assets

Writes OUT/llama-pydoc (model and tokenizer), OUT/calibration.txt and OUT/heldout.txt. Two CPU
cores need about ten minutes. Everything is learnt from `pydoc_data.topics`, which every Python
carries (the shipped files come from Python 3.11.7); each tenth topic is held out and never seen
by the tokenizer, the training or the calibration.
"""

import argparse
import logging
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 256
HELD_OUT = slice(6, None, 10)  # of the topics in alphabetical order
NOISE = 0.15
CALIBRATION_CHARACTERS = 160_000


def split_topics() -> tuple[list[str], list[str]]:
    """Training topics and held-out topics, each in alphabetical order."""
    texts = [topics[name].strip() for name in sorted(topics)]
    held_out = texts[HELD_OUT]
    return [text for text in texts if text not in held_out], held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,024 tokens; nothing is added to a text by default."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=WINDOW,
    )


def new_model() -> LlamaForCausalLM:
    """The dense model: grouped-query attention, tied embeddings, FFN width 384 = 8 x 48."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            attention_dropout=0.1,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood over consecutive windows."""
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in windows.split(16)]
    model.train()
    return sum(losses) / len(losses)


def train(model: LlamaForCausalLM, ids: torch.Tensor, held_out: torch.Tensor, steps: int) -> None:
    """AdamW, one-cycle learning rate, 24 random windows a step.

    15 % of the input tokens are replaced by random ones: the text is small, and without
    this noise the model learns it by heart within 300 steps.
    """
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        starts = torch.randint(len(ids) - WINDOW, (24,), generator=generator)
        batch = torch.stack([ids[start : start + WINDOW] for start in starts])
        noise = torch.randint(model.config.vocab_size, batch.shape, generator=generator)
        replaced = torch.rand(batch.shape, generator=generator) < NOISE
        loss = model(input_ids=torch.where(replaced, noise, batch), labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            logging.info(
                "step %d  train %.3f  held out %.3f",
                step,
                loss.item(),
                held_out_loss(model, held_out),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    torch.manual_seed(0)
    texts, held_out = split_topics()
    tokenizer = train_tokenizer(texts)
    ids = torch.tensor(tokenizer("</s>".join(texts))["input_ids"])
    held_out_ids = torch.tensor(tokenizer("\n\n".join(held_out))["input_ids"])
    logging.info("%d training tokens, %d held out", len(ids), len(held_out_ids))

    model = new_model()
    logging.info("%d parameters", model.num_parameters())
    train(model, ids, held_out_ids, arguments.steps)

    folder = arguments.out / "llama-pydoc"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    calibration = "\n\n".join(texts)[:CALIBRATION_CHARACTERS]
    (arguments.out / "calibration.txt").write_text(calibration + "\n", encoding="utf-8")
    (arguments.out / "heldout.txt").write_text("\n\n".join(held_out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
