# SPDX-License-Identifier: Apache-2.0
"""Check that vLLM computes the same as transformers, on models carved for the purpose.

    examples/vllm_setup.sh .venv-vllm
    python examples/compare_with_vllm.py --vllm-python .venv-vllm/bin/python
    python examples/compare_with_vllm.py --vllm-python .venv-vllm/bin/python --model MODEL \
        --calibration TEXT --text TEXT --way eager --way bfloat16

vLLM runs in its own environment, where cmoe-hf is not installed: it reads the code that is in the
carved folder. Both generate greedily from the same prompts. Printed as a Markdown table: for how
many prompts all tokens are the same, and the largest difference of the log-probabilities of vLLM's
five likeliest tokens at every step to which both came by the same tokens.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

NEW_TOKENS = 32
PROMPT_LENGTHS = (8, 16, 24, 40, 64)
SHAPES = {"S0A2E8": (0, 2, 8), "S1A1E8": (1, 1, 8), "S3A3E8": (3, 3, 8), "S3A0E8": (3, 0, 8)}
ROUTERS = {
    "representative": {"router": "representative", "clusters": "marks", "competition": "parent"},
    "linear": {},
}
EXPORTS = ("granite", "glm4", "ernie", "qwen2", "qwen3")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # otherwise no second model in the same process
}


@dataclass(frozen=True)
class Case:
    """A model of the grid."""

    shape: str
    router: str
    gates: str
    """`"carved"`: u = b = 0; `"drawn"`: u and b at random; or what it was exported to."""

    @property
    def folder(self) -> str:
        return f"{self.shape}-{self.router}-{self.gates}"


@dataclass(frozen=True)
class Way:
    """How vLLM runs some of the models."""

    options: dict[str, Any]
    """What `vllm.LLM` gets besides the folder; float32 and no compilation unless they say so."""
    gates: tuple[str, ...] = ("drawn",)
    shapes: tuple[str, ...] = ("S1A1E8", "S3A3E8")


WAYS = {
    "eager": Way({}, ("carved", "drawn"), tuple(SHAPES)),
    "bfloat16": Way({"dtype": "bfloat16"}),
    "compiled": Way({"enforce_eager": False}),
    "tensor parallel, 2": Way({"tensor_parallel_size": 2}),
    "expert parallel, 2": Way({"tensor_parallel_size": 2, "enable_expert_parallel": True}),
    "pipeline parallel, 2": Way({"pipeline_parallel_size": 2}),
    "its own code": Way({"model_impl": "auto"}, EXPORTS, tuple(SHAPES)),
}


def run_vllm(job: dict[str, Any]) -> dict[str, Any]:
    """The other role: generate with every folder of the job. Needs vLLM alone."""
    if importlib.util.find_spec("cmoe_hf"):
        sys.exit("cmoe_hf is importable in vLLM's environment: this would prove nothing.")
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=5, ignore_eos=True)
    defaults = {
        "trust_remote_code": True,
        "model_impl": "transformers",
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
    }
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    found: dict[str, Any] = {}
    for folder in job["folders"]:
        try:
            llm = LLM(model=folder, **defaults | job["options"])
            outputs = [request.outputs[0] for request in llm.generate(prompts, sampling)]
        except Exception as error:  # a refusal is a result, too
            found[folder] = {"refusal": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        finally:
            llm = None
            cleanup_dist_env_and_memory()
        found[folder] = {
            "tokens": [list(output.token_ids) for output in outputs],
            "logprobs": [
                [
                    {token: known.logprob for token, known in step.items()}
                    for step in output.logprobs
                ]
                for output in outputs
            ],
        }
    return {"versions": engine_versions(), "found": found}


def engine_versions() -> dict[str, str]:
    """Versions of what computes in this environment."""
    names = ("vllm", "vllm-cpu", "transformers", "torch")
    return {name: version(name) for name in names if has_distribution(name)}


def has_distribution(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


def start_vllm(
    name: str, cases: list[Case], prompts: list[list[int]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run the other role in vLLM's environment on some models; its log stays beside them."""
    root = arguments.folder
    stem = "".join(letter if letter.isalnum() else "-" for letter in name)
    job, result = root / f"{stem}.job.json", root / f"{stem}.json"
    folders = [str(root / case.folder) for case in cases]
    job.write_text(
        json.dumps({"folders": folders, "prompts": prompts, "options": WAYS[name].options})
    )
    # An empty cache of its own: the code must come from the folders.
    environment = os.environ | ENVIRONMENT | {"HF_MODULES_CACHE": str(root / f"{stem}.modules")}
    # -I: neither the working directory nor PYTHONPATH can lend it cmoe_hf.
    command = [arguments.vllm_python, "-I", __file__, "--engine", "vllm", str(job), str(result)]
    with (root / f"{stem}.log").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
    return json.loads(result.read_text())


def carve_all(arguments: argparse.Namespace) -> list[Case]:
    """Carve the grid; draw u and b; export to what can represent it."""
    from cmoe_hf.conversion import Recipe, RequestError, convert, export

    cases = []
    for shape, (shared, active, experts) in SHAPES.items():
        for router, changes in ROUTERS.items():
            if active == 0 and router != "linear":
                continue  # the same function: nothing is routed
            carved = Case(shape, router, "carved")
            convert(
                arguments.model,
                arguments.folder / carved.folder,
                shared=shared,
                active=active,
                experts=experts,
                recipe=Recipe.of("refined", **changes),
                calibration=arguments.calibration,
                samples=16,  # quick: quality is not the point
                overwrite=True,
            )
            cases.append(carved)
            if active:
                cases.append(Case(shape, router, "drawn"))
                draw_gates(arguments.folder / carved.folder, arguments.folder / cases[-1].folder)
            for to in EXPORTS if active and router == "linear" else ():
                exported = Case(shape, router, to)
                source, target = (arguments.folder / case.folder for case in (carved, exported))
                with suppress(RequestError):  # it has no place for what there is
                    export(source, target, to=to, overwrite=True)
                    cases.append(exported)
    return cases


def draw_gates(source: Path, target: Path) -> None:
    """The same model after what training would change: gate scales u and balance biases b."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        for tensor, std in ((layer.mlp.gate.scale, 2.0), (layer.mlp.gate.balance_bias, 0.1)):
            tensor.data.copy_(std * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def cut_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Token ids of consecutive pieces of the text, of several lengths."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(arguments.model)(
        Path(arguments.text).read_text(encoding="utf-8")[:10_000]
    )
    ends = [sum(PROMPT_LENGTHS[: index + 1]) for index in range(len(PROMPT_LENGTHS))]
    return [
        ids["input_ids"][end - length : end]
        for end, length in zip(ends, PROMPT_LENGTHS, strict=True)
    ]


def run_transformers(folder: Path, prompts: list[list[int]], dtype: str) -> dict[str, Any]:
    """Greedy tokens and the log-probabilities of the whole vocabulary at each step."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    tokens, logprobs = [], []
    for ids in prompts:
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(output.sequences[0, len(ids) :].tolist())
        logprobs.append(torch.cat(output.logits).float().log_softmax(-1).tolist())
    return {"tokens": tokens, "logprobs": logprobs}


def compare(found: dict[str, Any], reference: dict[str, Any]) -> tuple[int, float]:
    """Prompts with the same tokens, and the largest difference of log-probabilities."""
    same = sum(map(list.__eq__, found["tokens"], reference["tokens"]))
    largest = 0.0
    for ours, theirs, steps, known in zip(
        found["tokens"], reference["tokens"], found["logprobs"], reference["logprobs"], strict=True
    ):
        for step, likeliest in enumerate(steps):
            if ours[:step] == theirs[:step]:
                gaps = [abs(value - known[step][int(token)]) for token, value in likeliest.items()]
                largest = max(largest, *gaps)
    return same, largest


def likeliest(found: dict[str, Any], count: int = 5) -> dict[str, Any]:
    """What transformers found, in the form in which vLLM answers."""
    logprobs = [
        [dict(sorted(enumerate(step), key=lambda pair: -pair[1])[:count]) for step in steps]
        for steps in found["logprobs"]
    ]
    return found | {"logprobs": logprobs}


def main() -> None:
    from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT, MODEL

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True, help="of vLLM's environment")
    parser.add_argument("--model", default=MODEL, help="dense model; by default the package's own")
    parser.add_argument("--calibration", default=CALIBRATION)
    parser.add_argument("--text", default=HELD_OUT, help="where the prompts are cut from")
    parser.add_argument("--way", action="append", choices=WAYS, help="only this one; repeatable")
    parser.add_argument("--folder", type=Path, help="keep the models, results and logs here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = (arguments.folder or Path(temporary)).resolve()
        arguments.folder.mkdir(parents=True, exist_ok=True)
        compare_all(arguments)


def compare_all(arguments: argparse.Namespace) -> None:
    """Print one row of the table for each way and model."""
    cases, prompts = carve_all(arguments), cut_prompts(arguments)
    references = {
        case: run_transformers(arguments.folder / case.folder, prompts, "float32")
        for case in cases
        if case.gates not in EXPORTS
    }
    print("| run by | shape | router | u and b | same tokens | largest difference of log p |")
    print("|---|---|---|---|---|---|")
    for name in arguments.way or WAYS:
        way = WAYS[name]
        chosen = [case for case in cases if case.gates in way.gates and case.shape in way.shapes]
        answer = start_vllm(name, chosen, prompts, arguments)
        for case in chosen:
            folder = arguments.folder / case.folder
            # An export must do what the carved model does.
            carved = replace(case, gates="carved") if case.gates in EXPORTS else case
            print_row(f"vLLM, {name}", case, answer["found"][str(folder)], references[carved])
            if "dtype" in way.options:  # what the rounding alone does
                rounded = run_transformers(folder, prompts, way.options["dtype"])
                print_row(f"transformers, {name}", case, likeliest(rounded), references[carved])
    print(f"\nIn vLLM's environment: {answer['versions']}; here: {engine_versions()}")


def print_row(name: str, case: Case, found: dict[str, Any], reference: dict[str, Any]) -> None:
    result = f"{found['refusal']} |" if "refusal" in found else ""
    if not result:
        same, largest = compare(found, reference)
        result = f"{same} of {len(reference['tokens'])} | {largest:.1e}"
    print(f"| {name} | {case.shape} | {case.router} | {case.gates} | {result} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:3] == ["--engine", "vllm"]:
        job_file, result_file = map(Path, sys.argv[3:])
        result_file.write_text(json.dumps(run_vllm(json.loads(job_file.read_text()))))
    else:
        main()
