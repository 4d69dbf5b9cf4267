# SPDX-License-Identifier: Apache-2.0
"""Quantise a carved repository to int8, the packed experts too; save it and generate from it.

    python examples/quantise.py REPOSITORY QUANTISED

Needs torchao (`pip install '.[quantise]'`), and so does whoever loads the result; neither
needs cmoe-hf. There, `from_pretrained(QUANTISED, trust_remote_code=True)` is all.
"""

import sys
from pathlib import Path

from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

repository, quantised = sys.argv[1:]
# The linear layers and, by their own names, the packed experts; router, norms and embeddings are
# small or delicate and stay as they are.
names = r"re:.*(_proj\.weight|experts\..*_proj)"
model = AutoModelForCausalLM.from_pretrained(
    repository,
    trust_remote_code=True,
    quantization_config=TorchAoConfig(FqnToConfig({names: Int8WeightOnlyConfig()})),
)
tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=True)
model.save_pretrained(quantised)
tokenizer.save_pretrained(quantised)

for folder in (repository, quantised):
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    print(f"{folder}: {size / 1e6:.1f} MB")
model = AutoModelForCausalLM.from_pretrained(quantised, trust_remote_code=True)
inputs = tokenizer("The value of", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=30, do_sample=False)
print(tokenizer.decode(outputs[0]))
