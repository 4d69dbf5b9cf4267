# SPDX-License-Identifier: Apache-2.0
"""Does llama.cpp compute what transformers does? Tokens, perplexity, greedy text, for each model.

    python examples/compare_engines.py DENSE CARVED... --text FILE --json FILE

Every model becomes a GGUF file, and is asked for the log-probability of each token of a text.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmoe_hf.conversion import CMoEError, export_gguf
from cmoe_hf.conversion.device import versions
from cmoe_hf.conversion.measure.llama_cpp import LlamaServer, server_version

MIXED = (
    "Grüße aus Köln: naïve façade — 12345.67 €!\n\n\tdef f(x):  return x**2  # 🎉 I'll don't\r\n"
    "for (int i = 0; i < 10; ++i) { a[i] = b->c; }\n日本語 ЯΩ 한국어 العربية   end "
)
PRECISE = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")


def compared(model: str, text: str, tokens: int, type: str, threads: int) -> dict[str, object]:
    """One row: a model in both engines."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True, dtype="float32")
    ids_T = torch.tensor(tokenizer(text)["input_ids"][:tokens])
    with torch.no_grad():
        scores_TV = loaded.eval()(ids_T[None]).logits[0].log_softmax(dim=-1)
        loaded.generation_config.eos_token_id = None
        prompt_T = ids_T[:32]
        greedy = loaded.generate(prompt_T[None], max_new_tokens=200, do_sample=False)[0, 32:]
    own = [scores_TV[place, ids_T[place + 1]].item() for place in range(len(ids_T) - 1)]
    with tempfile.TemporaryDirectory() as folder:
        made = export_gguf(model, Path(folder) / "model.gguf", type=type)
        options = ("-c", str(tokens + 8), *PRECISE)
        with LlamaServer(made.output, threads=threads, options=options) as server:
            read = server.ask("/tokenize", content=MIXED, add_special=True, parse_special=False)
            same_ids = read["tokens"] == tokenizer(MIXED)["input_ids"]
            theirs, worst = [], 0.0
            for place, expected in enumerate(own):
                # A bias makes the choice, which the probabilities do not have.
                chosen = {"n_predict": 1, "n_probs": 1, "temperature": 0}
                chosen["logit_bias"] = [[int(ids_T[place + 1]), 1e6]]
                said = server.ask("/completion", prompt=ids_T[: place + 1].tolist(), **chosen)
                theirs.append(float(said["completion_probabilities"][0]["logprob"]))
                worst = max(worst, abs(theirs[-1] - expected))
            answer = server.complete(prompt_T.tolist(), 200)["tokens"]
    agree = [one == other for one, other in zip(greedy.tolist(), answer, strict=True)]
    return {
        "model": Path(model).name,
        "architecture": made.architecture,
        "type": type,
        "tokens": len(own),
        "same_token_ids": same_ids,
        "perplexity_transformers": math.exp(-sum(own) / len(own)),
        "perplexity_llama_cpp": math.exp(-sum(theirs) / len(theirs)),
        "largest_difference": worst,
        "same_greedy_tokens": [*agree, False].index(False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--type", nargs="+", default=["f32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # A token that is half a letter makes no answer of the server: plain letters only.
    text = arguments.text.read_text(encoding="utf-8").encode("ascii", "ignore").decode()
    rows = []
    for model in arguments.models:
        for type in arguments.type:
            try:
                row = compared(model, text, arguments.tokens, type, arguments.threads)
            except CMoEError as refusal:
                row = {"model": Path(model).name, "type": type, "refused": str(refusal)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    if arguments.json:
        about = {**versions(), "llama.cpp": server_version()}
        arguments.json.write_text(json.dumps({"versions": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
