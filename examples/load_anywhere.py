# SPDX-License-Identifier: Apache-2.0
"""Open a carved repository with transformers alone; cmoe-hf need not be installed.

python examples/load_anywhere.py REPOSITORY
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

repository = sys.argv[1]
# trust_remote_code runs the Python files of the repository: read them first.
model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=True)

inputs = tokenizer("The value of", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=30, do_sample=False)
print(tokenizer.decode(outputs[0]))

scores = model(**inputs, output_router_logits=True).router_logits
print("experts of the last token, layer by layer:")
blocks = [layer.mlp for layer in model.base_model.layers if hasattr(layer.mlp, "gate")]
for block, score_TN in zip(blocks, scores, strict=True):  # other layers stayed dense
    print("  ", score_TN[-1].topk(block.gate.top_k).indices.tolist())
