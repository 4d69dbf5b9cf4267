# SPDX-License-Identifier: Apache-2.0
"""Every causal language model that the installed transformers has: carved, or why not.

`make families` runs it, and leaves build/families.json.
"""

import dataclasses
import json
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cmoe_hf.conversion import CMoEError, convert
from cmoe_hf.conversion.embedded import CALIBRATION, MODEL
from cmoe_hf.conversion.source.architectures import TESTED, dense_class
from cmoe_hf.conversion.source.stored import read_json

pytestmark = pytest.mark.families

FOUND = Path(__file__).parents[1] / "build" / "families.json"
AT_LEAST = 60
LARGEST = 50_000_000
"""Parameters of a small model; some families fix the sizes of their parts elsewhere."""
SECONDS, GIBIBYTES = 90, 8
"""What one family may take."""
SIZES = {
    r"mamba_d_ssm": 128,
    r"mamba_n_heads|mamba_num_heads": 8,
    r"mamba_d_head|mamba_head_dim": 16,
    r"vocab_size(_per_layer_input)?|unpadded_vocab_size": 1024,
    r"(hidden|embedding)_size|d_model|n_embd|embed_dim|emb_dim|word_embed_proj_dim|lru_width": 64,
    r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|n_inner|dff|dim_ff|d_inner": 96,
    r"(ffn_hidden|feed_forward|expert_ffn_hidden)_size|block_ff_dim": 96,
    r"(num_hidden|num|n|encoder|decoder|num_encoder|num_decoder)_layers?": 4,
    r"(\w+_)?(attention_heads|n_heads?|num_heads)": 4,
    r"(\w+_)?(key_value_heads|num_kv_heads)": 2,
    r"(\w+_)?head_dim|kv_channels": 16,
    r"max_position_embeddings|n_positions|n_ctx|(max_seq|context)_len(gth)?": 128,
    r"(moe_)?num_(local_)?experts|n_routed_experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts": 2,
    r"n_group|topk_group|num_expert_group|mamba_n_groups|n_groups": 1,
    r"(\w+_)?lora_rank|attention_head_size|rotary_dim|lsh_rank|mamba_d_state|(ssm_)?state_size": 16,
    r"sliding_window|attention_window_size|attention_chunk_size|local_attention": 16,
    r"bos_token_id|eos_token_id|pad_token_id|decoder_start_token_id|sep_token_id": 1,
}
"""Small values of the fields that are numbers, by their names."""
NEEDED = {
    *("n_inner", "ffn_hidden_size", "num_kv_heads", "num_key_value_heads", "head_dim"),
    *("mamba_d_head", "lru_width", "layers_block_type"),
}
"""Fields that are None or a word by default and decide the size then."""
OWN = {
    "apertus1p5_text": {"output_vocab_size": 1024},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bloom": {"n_inner": None},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "dots1": {"n_shared_experts": 1},
    "falcon": {"new_decoder_architecture": False},
    "falcon_mamba": {"expand": 2},
    "gemma3n_text": {
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["full_attention"] * 4,
        "num_kv_shared_layers": 1,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        **dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size")),
        "hidden_size_per_layer_input": 0,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2": {
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"head_dim": 24, "num_key_value_heads": 4},
    "phi": {"partial_rotary_factor": 0.5},
    "xlm": {"emb_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"head_dim": 16, "num_key_value_heads": 4},
}
"""What else a family needs to be built at this size."""


def small_config(model_type):
    """A configuration of a family of which every size is small."""
    kind = CONFIG_MAPPING[model_type]
    values = {}
    for field in dataclasses.fields(kind):
        number = [it for pattern, it in SIZES.items() if re.fullmatch(pattern, field.name)]
        is_set = type(field.default) is int or field.default is dataclasses.MISSING
        if number and (is_set or field.name in NEEDED):
            values[field.name] = number[0]
    return kind(**values | OWN.get(model_type, {}))


def build(model_type, folder):
    """Write a small random model of a family."""
    config = small_config(model_type)
    config.save_pretrained(folder)
    dense_class(read_json(folder / "config.json"))  # a refusal that needs no weights
    with torch.device("meta"):
        size = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"has {size:,} parameters at this size")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.6 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


def check(source, carved):
    """Convert a model; with all experts active it must be the dense one."""
    text = carved.with_name("text.txt")
    text.write_text(CALIBRATION.read_text("utf-8")[:8_000], encoding="utf-8")
    few = {"calibration": text, "samples": 4, "sequence_length": 32}
    convert(source, carved, shared=2, active=6, experts=8, **few)
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        dense, ours = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()(ids).logits
            for folder in (source, carved)
        )
    error = ((ours - dense).norm() / dense.norm()).item()
    assert error < 1e-4, f"all experts active differ from the dense model by {error:.2g}"


def too_slow(*_):
    raise TimeoutError(f"takes more than {SECONDS} s")


def state_of(model_type, folder):
    """State of a family, and why. Runs in a process of its own."""
    import resource  # not on Windows

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES * 2**30,) * 2)
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        build(model_type, folder / "dense")
    except CMoEError as error:
        return "refused", str(error)
    except Exception as error:  # whatever its validators raise
        return "not built", f"{type(error).__name__}: {error}"
    try:
        check(folder / "dense", folder / "carved")
    except CMoEError as error:
        return "refused", str(error)
    except Exception as error:
        return "fails", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "converts", ""


def test_every_family_converts_or_is_refused(processes, tmp_path):
    names = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & CONFIG_MAPPING.keys())
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
    with ProcessPoolExecutor(2, mp_context=processes) as pool:
        states = list(pool.map(state_of, names, folders))
    found = {
        name: {"state": state, "reason": " ".join(reason.split())}
        for name, (state, reason) in zip(names, states, strict=True)
    }
    FOUND.parent.mkdir(exist_ok=True)
    FOUND.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for name, it in found.items():
        print(f"{name}: {it['state']} {it['reason']}"[:300])
    assert not {name: it for name, it in found.items() if it["state"] == "fails"}
    converted = {name for name, it in found.items() if it["state"] == "converts"}
    moes = {"mixtral", "olmoe", "qwen3_moe"}
    assert len(converted) >= AT_LEAST and {*TESTED} - moes <= converted
