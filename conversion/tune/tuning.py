# SPDX-License-Identifier: Apache-2.0
"""Training of a carved model: distillation, or the paper's LoRA on the next token (section 5.1).

Shape suffixes: W windows, L tokens of one window, N routed experts.
"""

import copy
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from cmoe_hf.modeling_cmoe import CMoERouter, ExpertsLoop

from ..carve.router import HIGHEST_BIAS
from ..errors import CMoEError, RequestError
from ..measure.routing import active_routers, always_on, count_loads
from ..source.walk import decoder_layers
from .distil import TRAINING_BACKEND, Outputs, distillation_loss, train_only_what_was_carved
from .settings import Tuning, some

CHECKPOINTS = 10
"""Checkpoints of one training run; the last two are kept."""


def check_sharding() -> None:
    """Raise `RequestError` for a launch that shards the model so that it cannot be trained."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":  # it joins trained and frozen parameters
            raise RequestError("this is FSDP version 1: LoRA needs `fsdp_version: 2`.")
        if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):  # all but the first lack weights
            raise RequestError("FSDP needs `fsdp_cpu_ram_efficient_loading: false` here.")


def tune(
    model: PreTrainedModel,
    windows_WL: torch.Tensor,
    tuning: Tuning,
    folder: Path,
    *,
    teacher: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Train a model by the method of `tuning`, and merge LoRA factors.

    Resumes from the last whole checkpoint in `folder`, if there is one.

    Args:
        model: Carved or dense; it is changed.
        windows_WL: Training windows, int64.
        tuning: How to train.
        folder: Where the checkpoints go.
        teacher: The dense model, frozen, if the objective is to distil.

    Returns the merged model, of the same class and precision, and a list of `step` and `loss`.
    Raises `CMoEError` if the loss is NaN or infinite, or a checkpoint cannot be written.
    """
    dtype = model.dtype
    if tuning.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    use_backend(model, TRAINING_BACKEND)
    is_lora = tuning.method == "lora"
    learner = with_adapters(model, tuning) if is_lora else with_free_weights(model, tuning)
    micro, passes = tuning.split(accelerate.PartialState().num_processes)
    steps = tuning.steps(len(windows_WL))
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=model.device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        num_train_epochs=tuning.epochs,
        learning_rate=some(tuning.learning_rate),
        lr_scheduler_type=some(tuning.schedule),
        warmup_steps=some(tuning.warmup_steps),
        max_grad_norm=some(tuning.max_gradient_norm),
        seed=tuning.seed,
        save_steps=max(1, steps // CHECKPOINTS),
        save_total_limit=2,
        logging_steps=max(1, steps // 100),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no nn.DataParallel: `accelerate launch` splits
    trainer = CarvedTrainer(learner, arguments, windows_WL, tuning, teacher)
    empty = without_data(learner) if trainer.is_fsdp_enabled else None
    if sys.stderr.isatty():
        trainer.add_callback(Progress())
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    except OSError as error:
        raise CMoEError(f"cannot write a checkpoint: {error}.") from error
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if empty is not None:
        trained = gathered(trained, empty)
    merged = (trained.merge_and_unload() if is_lora else trained).to(dtype).eval()
    use_backend(merged, "cmoe")
    for module in merged.modules():
        if isinstance(module, CMoERouter):
            module.balance_bias = module.balance_bias.float()
    history = [row for row in trainer.state.log_history if "loss" in row]
    return merged, [{"step": row["step"], "loss": row["loss"]} for row in history]


def without_data(model: nn.Module) -> Any:
    """Return a copy whose parameters have shapes and types only: they are on the meta device."""
    empty = {
        id(it): nn.Parameter(it.detach().to("meta"), it.requires_grad) for it in model.parameters()
    }
    return copy.deepcopy(model, empty)


def gathered(sharded: nn.Module, empty: Any) -> Any:
    """Return the whole model on every process: `empty`, filled from all parts (FSDP2).

    The sharded one cannot become whole in place: its layers go on splitting themselves.
    """
    options = StateDictOptions(full_state_dict=True)
    empty.load_state_dict(get_model_state_dict(sharded, options=options), assign=True)
    empty.tie_weights()
    return empty


def with_free_weights(model: PreTrainedModel, tuning: Tuning) -> PreTrainedModel:
    """Return the model with what learns in float32, because 16 bits would swallow small steps.

    In a model of 16 bits autocast computes in these nevertheless. Weights that do not learn stay as
    they are: autocast would cast them anew in each product.
    """
    train_only_what_was_carved(model, tuning)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def use_backend(model: PreTrainedModel, backend: str) -> None:
    """Let experts run by a backend, if the model has any."""
    if any(isinstance(module, ExpertsLoop) for module in model.modules()):
        model.set_experts_implementation(backend)


def with_adapters(model: PreTrainedModel, tuning: Tuning) -> nn.Module:
    """Return the model with LoRA factors, and routers of which u or W learns on request.

    PEFT freezes what is no adapter. The routers are therefore modules to save: their u, W and
    balance bias are part of every checkpoint.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(tuning.seed)
    routed = any(isinstance(module, CMoERouter) for module in model.modules())
    packed = {
        f"{'.'.join(path.split('.')[-2:])}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, ExpertsLoop)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    _, layers = decoder_layers(model.base_model)
    linears = {
        path.rpartition(".")[2]
        for path, module in layers.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    config = LoraConfig(
        r=some(tuning.rank),
        lora_alpha=tuning.alpha,
        target_modules=sorted(linears),
        target_parameters=sorted(packed) or None,
        modules_to_save=["gate"] if routed else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, CMoERouter):
            for name, parameter in module.named_parameters():
                learns = tuning.train_router or (name == "scale" and not tuning.distils)
                parameter.requires_grad &= learns and module.top_k > 0
                if parameter.requires_grad:  # 16 bits would swallow the small steps
                    parameter.data = parameter.data.float()
    return adapted


class CarvedTrainer(Trainer):
    """Two learning rates, two objectives, and expert loads counted while the loss is computed."""

    whole: Any
    """The model itself, without what wraps it."""

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        windows_WL: torch.Tensor,
        tuning: Tuning,
        teacher: PreTrainedModel | None,
    ) -> None:
        dataset = [{"input_ids": ids_L, "labels": ids_L} for ids_L in windows_WL]
        super().__init__(model=model, args=arguments, train_dataset=dataset)
        # All windows are equally long: the mean over micro-batches is the mean over tokens.
        self.model_accepts_loss_kwargs = False
        self.tuning = tuning
        self.whole = model.get_base_model() if tuning.method == "lora" else model  # type: ignore
        self.pair: tuple[Outputs, Outputs] | None = None
        if teacher is not None:
            is_whole = not self.is_fsdp_enabled
            with self.accelerator.autocast():
                self.pair = Outputs(self.whole, whole=is_whole), Outputs(teacher)
        self.loads: list[torch.Tensor] = []
        """Of this optimiser step so far, on this process."""
        self.remove_callback(PrinterCallback)  # it prints on standard output
        if some(tuning.bias_speed) > 0:
            self.add_callback(BalanceBias(self))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return Adam: routers at one learning rate, everything else at another.

        Weights do not decay, so that it is AdamW as well.
        """
        if self.optimizer is None:
            learner: Any = model or self.model
            routers = {
                id(parameter)
                for module in learner.modules()
                if isinstance(module, CMoERouter)
                for parameter in module.parameters()
            }
            rates = {False: self.tuning.learning_rate, True: self.tuning.router_learning_rate}
            groups: dict[bool, list[nn.Parameter]] = {of_router: [] for of_router in rates}
            for parameter in learner.parameters():
                if parameter.requires_grad:
                    groups[id(parameter) in routers].append(parameter)
            self.optimizer = torch.optim.Adam(
                [{"params": it, "lr": rates[key]} for key, it in groups.items() if it],
                betas=(self.tuning.adam_beta1, self.tuning.adam_beta2),
            )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *arguments: Any, **options: Any
    ) -> Any:
        """Return a micro-batch's mean negative log-likelihood, or divergence from the teacher.

        The loads are counted here: the backward pass may run the routers again.
        """
        with count_loads(model) as loads:
            if self.pair is None:
                loss = model(**inputs, use_cache=False).loss
            else:
                with self.accelerator.autocast():
                    loss = distillation_loss(*self.pair, inputs["input_ids"], model)
        former = self.loads or [torch.zeros_like(load_N) for load_N in loads]
        self.loads = [old_N + new_N for old_N, new_N in zip(former, loads, strict=True)]
        if not torch.isfinite(loss):
            raise CMoEError(
                f"the loss is {loss.item()} after {self.state.global_step} steps: lower the "
                "learning rate, or check the training text and the weights."
            )
        return loss


class BalanceBias(TrainerCallback):
    """Moves every balance bias once per optimiser step (paper, section 4.3)."""

    def __init__(self, trainer: CarvedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the biases by the loads of all micro-batches and processes."""
        assert self.trainer.model is not None
        loads, self.trainer.loads = self.trainer.loads, []
        speed = some(self.trainer.tuning.bias_speed) * (
            1 - (state.global_step - 1) / state.max_steps
        )
        for router, load_N in zip(active_routers(self.trainer.model), loads, strict=True):
            load_N = accelerate.utils.reduce(load_N.clone(), reduction="sum")
            move_bias(router.balance_bias, load_N, speed, always_on(router))


@torch.no_grad()
def move_bias(
    bias_N: torch.Tensor, load_N: torch.Tensor, speed: float, always_on_N: torch.Tensor
) -> None:
    """Move the balance bias up by `speed` where the load is below the mean, down where above.

    Experts that are always on stay so and do not count; no other may become one.
    """
    free_N = ~always_on_N
    load_N = load_N.to(bias_N.device, torch.float32)
    step_N = speed * (load_N[free_N].mean() - load_N[free_N]).sign()
    bias_N[free_N] = (bias_N[free_N] + step_N).clamp(-HIGHEST_BIAS, HIGHEST_BIAS)


class Progress(ProgressCallback):
    """Shows the last loss in the progress bar: the library's prints it on standard output."""

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show it on the main process, which has a bar."""
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_description("tuning")
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint; the library writes the state of its trainer last."""
    whole = {}
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):  # cut off while it was written
            whole[json.loads(path.read_text(encoding="utf-8"))["global_step"]] = str(path.parent)
    return whole[max(whole)] if whole else None
