# SPDX-License-Identifier: Apache-2.0
"""What distillation needs: the divergence in chunks, what is trained, and whether it fits.

Shape suffixes: B windows of a batch, L tokens of one window, T tokens, V vocabulary, X hidden size
or vocabulary, H hidden size, K active experts.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import accelerate
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cmoe_hf.modeling_cmoe import (
    CMoEHierarchicalBlock,
    CMoESparseMoeBlock,
    ExpertsLoop,
    sorted_experts,
)

from ..device import DTYPES, free_memory
from ..errors import missing
from ..folder.card import in_words
from ..measure.evaluate import divergence
from ..source.walk import decoder_layers
from .settings import Tuning

CHUNK_LOGITS = 2**23
"""Logits of the positions whose divergence is computed at once on a CPU, where larger tensors are
allocated anew each time; four times as many elsewhere."""
LIBRARIES = 1e9
"""Bytes that the libraries take for themselves."""
TRAINING_BACKEND = "cmoe_training"


class ChunkedDivergence(torch.autograd.Function):
    """`divergence` of two frozen heads over outputs, with the logits of one chunk at a time.

    The gradient with respect to the outputs is computed on the way, so that no logits are kept
    and none are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output_TX: torch.Tensor,
        target_TX: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        target_head: Callable[[torch.Tensor], torch.Tensor],
        chunk: int,
    ) -> torch.Tensor:
        """Return the mean over all positions."""
        total, gradients = output_TX.new_zeros((), dtype=torch.float32), []
        for one_TX, other_TX in zip(output_TX.split(chunk), target_TX.split(chunk), strict=True):
            one_TX = one_TX.detach().requires_grad_()
            target_TV = target_head(other_TX)
            with torch.enable_grad():
                share = divergence(head(one_TX), target_TV) * (len(one_TX) / len(output_TX))
                gradients += torch.autograd.grad(share, one_TX)
            total += share.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Return the gradient with respect to the outputs."""
        (gradient_TX,) = ctx.saved_tensors
        return gradient_TX * gradients[0].to(gradient_TX.dtype), None, None, None, None


class Outputs:
    """The last hidden states of a causal model and the head that makes logits of them.

    Of families that do more to logits than the head does (caps, scales), and of a model whose head
    is split among processes, the outputs are the logits, and the head changes nothing.
    """

    def __init__(self, model: PreTrainedModel, *, whole: bool = True) -> None:
        self.model = model
        self.head: Any = nn.Identity()
        if whole and self._is_plain():
            self.head = model.get_output_embeddings()

    @torch.no_grad()
    def _is_plain(self) -> bool:
        head = self.model.get_output_embeddings()
        if head is None or "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return False
        ids_BL = torch.arange(4, device=self.model.device)[None]
        logits_BLV = self.model(input_ids=ids_BL, use_cache=False).logits
        hidden = self._hidden(self.model, ids_BL)
        return bool(hidden) and torch.allclose(head(hidden[0]), logits_BLV, rtol=1e-4, atol=1e-5)

    def _hidden(self, call: nn.Module, ids_BL: torch.Tensor) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        decoder: Any = self.model.base_model
        hook = decoder.register_forward_hook(lambda _model, _inputs, out: kept.append(out[0]))
        none = torch.empty(0, dtype=torch.int64, device=ids_BL.device)
        try:
            call(input_ids=ids_BL, use_cache=False, logits_to_keep=none)
        finally:
            hook.remove()
        return kept

    def __call__(self, ids_BL: torch.Tensor, call: nn.Module | None = None) -> torch.Tensor:
        """Return the outputs (T, X); `call` is what wraps the model for several processes."""
        call = call or self.model
        if isinstance(self.head, nn.Identity):
            return call(input_ids=ids_BL, use_cache=False).logits.flatten(0, 1)
        return self._hidden(call, ids_BL)[0].flatten(0, 1)


def distillation_loss(
    student: Outputs, teacher: Outputs, ids_BL: torch.Tensor, call: nn.Module | None = None
) -> torch.Tensor:
    """Return the mean KL(teacher || student) over the whole vocabulary, at temperature 1."""
    output_TX = student(ids_BL, call)
    with torch.no_grad():
        target_TX = teacher(ids_BL)
    chunk = max(1, chunk_logits(ids_BL.device) // teacher.model.config.vocab_size)
    mean: Any = ChunkedDivergence.apply  # the library does not annotate it
    loss: torch.Tensor = mean(output_TX, target_TX, student.head, teacher.head, chunk)
    return loss


def chunk_logits(device: torch.device) -> int:
    """Return the number of logits that are computed at once."""
    return CHUNK_LOGITS if device.type == "cpu" else 4 * CHUNK_LOGITS


def train_only_what_was_carved(model: PreTrainedModel, tuning: Tuning) -> None:
    """Freeze all but experts and the norms of the layers; attention and routers on request."""
    model.requires_grad_(False)
    blocks = CMoESparseMoeBlock | CMoEHierarchicalBlock
    _, layers = decoder_layers(model.base_model)
    for module in layers.modules():
        is_norm = "norm" in type(module).__name__.lower()
        if tuning.train_attention or is_norm or isinstance(module, blocks):
            module.requires_grad_()
    for module in layers.modules():
        if isinstance(module, blocks):
            chooses = module.gate.top_k > 0
            module.gate.requires_grad_(tuning.train_router and chooses)
            module.experts.requires_grad_(chooses)
        if isinstance(module, ExpertsLoop) and hasattr(module, "other_activation"):
            module.other_activation.requires_grad_(False)


class Cast:
    """Experts whose weights are seen in another precision."""

    def __init__(self, experts: ExpertsLoop, dtype: torch.dtype) -> None:
        self.experts, self.dtype = experts, dtype

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias of the first product."""
        weight_NQH, bias_NQ = self.experts.inputs
        return weight_NQH.to(self.dtype), None if bias_NQ is None else bias_NQ.to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.experts, name)
        is_weight = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self.dtype) if is_weight else value


def train_experts(
    self: ExpertsLoop, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Run the experts so that their gradients are fast: 3.5 to 12 times as the library's on a CPU.

    Under autocast, which knows no grouped products and would cast the inputs of each expert, all
    is cast once before. On a GPU the default backend runs.
    """
    device = x_TH.device.type
    run: Any = ALL_EXPERTS_FUNCTIONS["cmoe"] if x_TH.is_cuda else sorted_experts
    experts: Any = self
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        experts, x_TH, weight_TK = Cast(self, dtype), x_TH.to(dtype), weight_TK.to(dtype)
    y_TH: torch.Tensor = run(experts, x_TH, index_TK, weight_TK)
    return y_TH


ALL_EXPERTS_FUNCTIONS.register(TRAINING_BACKEND, train_experts)


class TrainingPlan(NamedTuple):
    """How a model will be trained."""

    tuning: Tuning
    """With a method."""
    reason: str
    checkpoint_bytes: int


def plan_training(
    config: PreTrainedConfig,
    teacher: PreTrainedConfig | None,
    tuning: Tuning,
    dtype: str | None,
    device: torch.device,
    length: int,
) -> TrainingPlan:
    """Train all weights if they, their gradients and Adam's state fit into memory, else LoRA.

    Raises `RequestError` for LoRA without its extra.

    Args:
        config: Of the carved model.
        teacher: Of the teacher, which is in memory, too.
        tuning: Its method wins.
        dtype: In which models are loaded; what learns is float32 nevertheless.
        device: Where to train.
        length: Of the windows, in tokens.
    """
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(config)
        dense = None if teacher is None else AutoModelForCausalLM.from_config(teacher)
    train_only_what_was_carved(student, tuning)
    parameters, trained = student.num_parameters(), student.num_parameters(only_trainable=True)
    stored: Any = config.dtype or torch.float32
    itemsize = (DTYPES[dtype] if dtype else stored).itemsize
    state = accelerate.PartialState()
    tokens = tuning.split(state.num_processes)[0] * length  # of a forward pass on this process
    sharing = state.num_processes if state.distributed_type == DistributedType.FSDP else 1
    frozen = (parameters - trained) * itemsize
    # Of those that learn weight, gradient and two moments, in float32; LoRA factors are few.
    held = {"full": frozen + 16 * trained, "lora": parameters * itemsize}
    # What a layer keeps of a token for the backward pass, and six tensors of a chunk's logits: as
    # measured on layers of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B.
    width = (24 + 2 * config.num_experts_per_tok) * config.hidden_size + 4 * config.ffn_width
    layers = 1 if tuning.gradient_checkpointing else config.num_hidden_layers
    activations = tokens * layers * width * itemsize
    logits = 6 * 4 * min(chunk_logits(device), tokens * config.vocab_size)
    teacher_bytes = dense.num_parameters() * itemsize if dense else 0
    beside = LIBRARIES + activations + logits + teacher_bytes
    needed = {name: size / sharing + beside for name, size in held.items()}
    free = free_memory(device) // (state.num_processes if device.type == "cpu" else 1)
    method = tuning.method or ("full" if needed["full"] < 0.9 * free else "lora")
    if method == "lora" and importlib.util.find_spec("peft") is None:
        raise missing("LoRA needs PEFT", "train")
    asked = {"attention": tuning.train_attention, "routers": tuning.train_router}
    learns = ", ".join(["experts", *(name for name, is_asked in asked.items() if is_asked)])
    what = "LoRA factors" if method == "lora" else f"all weights of {learns} and norms"
    reason = (
        f"training {what}: with gradients and Adam's state of {in_words(trained)} of "
        f"{in_words(parameters)} parameters it takes about {needed['full'] / 1e9:.2f} GB, with "
        f"LoRA factors {needed['lora'] / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
    )
    if needed[method] > free:
        reason += "; lower --micro-batch-size, or pass --gradient-checkpointing"
    kept = frozen + 12 * trained if method == "full" else 0
    return TrainingPlan(replace(tuning, method=method), reason, kept)
