# SPDX-License-Identifier: Apache-2.0
"""A carved model in the browser: its text beside the dense model's, and the experts of every token.

    pip install gradio
    python examples/space_app.py smollm2-moe --dense HuggingFaceTB/SmolLM2-135M-Instruct

One file: as `app.py` of a Gradio Space it takes the two models from the variables MODEL and DENSE.
cmoe-hf need not be installed; the repository's own code runs.
"""

import argparse
import html
import os
import time
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442", "#999999"]
STYLE = """
.experts { line-height: 2.6; font-size: 17px; }
.experts span { padding: 2px 1px; border-bottom: 4px solid; white-space: pre-wrap; }
.experts sub { opacity: .7; font-size: 11px; margin-left: 2px; }
"""


def load(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def prompt_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids (1, T) of a message, in the chat's form if the tokenizer has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    return tokenizer(prompt, return_tensors="pt").input_ids


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[torch.Tensor, str, str]:
    """All ids (T,), the new text, and how fast it came."""
    ids = prompt_ids(tokenizer, prompt).to(model.device)
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.1,
    )[0]
    new = out[ids.shape[1] :]
    speed = len(new) / (time.perf_counter() - start)
    text = tokenizer.decode(new, skip_special_tokens=True)
    return out, text, f"{len(new)} tokens, {speed:.1f} a second"


def routers(model: Any) -> list[Any]:
    """The routers of the carved layers that choose something."""
    found = [
        module.gate
        for module in model.modules()
        if hasattr(module, "experts") and hasattr(module, "gate")
    ]
    return [gate for gate in found if gate.top_k > 0]


@torch.no_grad()
def chosen_experts(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """For each carved layer, the experts (T, K) that each token runs, the likeliest first."""
    seen: list[torch.Tensor] = []
    hooks = [
        gate.register_forward_hook(lambda gate, inputs, output: seen.append(output[2]))
        for gate in routers(model)
    ]
    try:
        model(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [index.reshape(len(ids), -1).cpu() for index in seen]


def drawn(tokenizer: Any, ids: torch.Tensor, chosen_TK: torch.Tensor) -> str:
    """Every token, underlined in the colour of its first expert, with the numbers of all."""
    parts = []
    for token, experts in zip(ids.tolist(), chosen_TK.tolist(), strict=True):
        text = html.escape(tokenizer.decode([token])).replace("\n", "⏎<br>") or "·"
        told = ", ".join(map(str, experts))
        colour = COLOURS[experts[0] % len(COLOURS)]
        parts.append(
            f'<span style="border-color: {colour}" title="experts {told}">{text}'
            f"<sub>{experts[0]}</sub></span>"
        )
    return f'<div class="experts">{"".join(parts)}</div>'


def build(carved_name: str, dense_name: str | None) -> gr.Blocks:
    """The page."""
    carved, tokenizer = load(carved_name)
    dense = load(dense_name)[0] if dense_name else None
    layers, config = len(routers(carved)), carved.config
    title = carved_name.rstrip("/").rpartition("/")[2]

    def answer(prompt: str, tokens: float, layer: float) -> tuple[Any, ...]:
        if not prompt.strip():
            raise gr.Error("Write something first.")
        ids, text, speed = generate(carved, tokenizer, prompt, int(tokens))
        shown = [gr.update(value=text, label=f"carved {config.notation}: {speed}")]
        if dense is not None:
            _, text, speed = generate(dense, tokenizer, prompt, int(tokens))
            shown.append(gr.update(value=text, label=f"dense: {speed}"))
        chosen = (ids, chosen_experts(carved, ids)) if layers else None
        return *shown, chosen, show(chosen, layer)

    def show(chosen: Any, layer: float) -> str:
        if chosen is None:
            return "" if layers else "No layer of this model routes."
        ids, experts = chosen
        return drawn(tokenizer, ids, experts[int(layer)])

    with gr.Blocks(title=title) as page:
        gr.Markdown(
            f"# {title}\nCarved to **{config.notation}**: "
            f"{config.activation_ratio:.0%} of the FFN neurons run for a token."
        )
        prompt = gr.Textbox(label="Prompt", value="What is a river?", lines=2)
        tokens = gr.Slider(1, 200, value=60, step=1, label="New tokens")
        go = gr.Button("Generate", variant="primary")
        with gr.Row():
            texts = [gr.Textbox(label=f"carved {config.notation}", lines=8)]
            if dense is not None:
                texts.append(gr.Textbox(label="dense", lines=8))
        gr.Markdown(
            "## The experts of every token\nThe colour and the number are those of the "
            "first of a token's routed experts; the others are in its tip."
        )
        layer = gr.Slider(
            0, max(layers - 1, 1), value=0, step=1, label="Carved layer", visible=layers > 1
        )
        experts, kept = gr.HTML(), gr.State()
        gr.on([go.click, prompt.submit], answer, [prompt, tokens, layer], [*texts, kept, experts])
        layer.change(show, [kept, layer], experts)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("carved", nargs="?", default=os.environ.get("MODEL"))
    parser.add_argument("--dense", default=os.environ.get("DENSE"))
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    if not arguments.carved:
        parser.error("give a carved repository, or the variable MODEL")
    build(arguments.carved, arguments.dense).launch(server_port=arguments.port, css=STYLE)


if __name__ == "__main__":
    main()
