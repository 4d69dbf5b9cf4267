# SPDX-License-Identifier: Apache-2.0
"""Let several processes share a carved model, each with a part of it, and write a line.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py REPOSITORY
    torchrun --nproc-per-node 2 examples/tensor_parallel.py REPOSITORY --expert-parallel

Every process holds its part of each routed expert, or with --expert-parallel whole experts of its
own; their number must then be divisible by the processes (7 of S1A1E8 is not; transformers 5.20 or
newer). Attention, shared expert and vocabulary are split in both. Tested with two CPU processes.
"""

import argparse
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

parser = argparse.ArgumentParser()
parser.add_argument("repository")
parser.add_argument("--expert-parallel", action="store_true")
arguments = parser.parse_args()

processes = int(os.environ["WORLD_SIZE"])
sizes = {"tp_size": processes} | ({"ep_size": processes} if arguments.expert_parallel else {})
model = AutoModelForCausalLM.from_pretrained(
    arguments.repository,
    trust_remote_code=True,  # runs the Python files of the repository: read them first
    distributed_config=DistributedConfig(**sizes),
)
tokenizer = AutoTokenizer.from_pretrained(arguments.repository, trust_remote_code=True)

inputs = tokenizer("The value of", return_tensors="pt").to(model.device)
outputs = model.generate(**inputs, max_new_tokens=30, do_sample=False)
if os.environ["RANK"] == "0":
    print(tokenizer.decode(outputs[0]))
torch.distributed.destroy_process_group()
