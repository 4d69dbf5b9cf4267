# SPDX-License-Identifier: Apache-2.0
"""Find the FFN of a decoder layer of any family, and prove what it computes.

The shapes of a layer's linear layers say where an FFN may be. Which of them is one is found out
by running the layer with its real weights: only an FFN turns its input x into
down(act(gate x) * up x), or into down(act(up x)).

Shape suffixes: B windows, L tokens of one window, T tokens, H hidden size, F FFN width.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..errors import CMoEError, RequestError
from .walk import LayerWalk, Place

TOLERANCE = 1e-4
"""Relative error up to which an FFN computes its formula, in float32."""
Weights = dict[str, torch.Tensor | None]
"""gate (F, H), up (F, H), down (H, F), gate_bias (F,), up_bias (F,) and down_bias (H,)."""


@dataclass(frozen=True, kw_only=True)
class DenseFFN:
    """An FFN: y = down(act(gate x) * up x) * scale, or down(act(up x)) * scale without a gate."""

    owner: str
    """Module of the layer that has the linear layers; empty for the layer itself."""
    kind: str
    """`"gated"`, `"fused"` (one linear layer has the rows of gate and up) or `"plain"`."""
    gate: str
    """Linear layer of `owner`; `up` if fused or plain."""
    up: str
    down: str
    width: int
    transposed: bool = False
    """Whether weights are stored as (inputs, outputs), in `Conv1D`."""
    gate_first: bool = True
    """Whether the rows of the gate come first, if fused."""
    activation: str = ""
    """Name in transformers' `ACT2FN`."""
    up_bias: bool = False
    """Whether gate and up have biases."""
    down_bias: bool = False
    """Whether down has one."""
    gate_scale: float = 1.0
    """What the gate's output is multiplied by (Falcon-H1)."""
    scale: float = 1.0
    """What y is multiplied by."""
    place: Place
    """Where a block takes its place."""
    adds: bool = True
    """Whether the layer adds y to the residual stream as it is, neither normalised nor scaled."""

    @property
    def has_gate(self) -> bool:
        """Return whether there is a gate."""
        return self.kind != "plain"

    def names(self) -> dict[str, str]:
        """Return the linear layers, by names relative to the decoder layer."""
        prefix = f"{self.owner}." if self.owner else ""
        linears = {"up": self.up, "down": self.down}
        if self.kind == "gated":
            linears["gate"] = self.gate
        return {part: prefix + name for part, name in linears.items()}

    def take(self, tensors: dict[str, torch.Tensor]) -> Weights:
        """Take the FFN's weights out of a layer's tensors, scales folded in."""
        found: Weights = {}
        for part, name in self.names().items():
            weight = tensors.pop(f"{name}.weight")
            found[part] = weight.T if self.transposed else weight
            found[f"{part}_bias"] = tensors.pop(f"{name}.bias", None)
        if self.kind == "fused":
            parts = ("gate", "up") if self.gate_first else ("up", "gate")
            for suffix in ("", "_bias"):
                both = found[f"up{suffix}"]
                halves = (None, None) if both is None else both.chunk(2)
                found |= dict(zip((parts[0] + suffix, parts[1] + suffix), halves, strict=True))
        for part, factor in (("gate", self.gate_scale), ("down", self.scale)):
            for name in (part, f"{part}_bias"):
                if factor != 1.0 and (value := found.get(name)) is not None:
                    found[name] = value * factor
        return {"gate": None, "gate_bias": None} | found

    def output(self, weights: Weights, x_TH: torch.Tensor) -> torch.Tensor:
        """Return y of some inputs, (T, H)."""
        up, down = weights["up"], weights["down"]
        assert up is not None and down is not None
        up_TF = F.linear(x_TH, up, weights["up_bias"])
        act = ACT2FN[self.activation]
        if weights["gate"] is None:
            z_TF = act(up_TF)
        else:
            z_TF = act(F.linear(x_TH, weights["gate"], weights["gate_bias"])) * up_TF
        return F.linear(z_TF, down, weights["down_bias"])


def overflowed(index: int) -> CMoEError:
    """Return the error for finite weights with activations that are not."""
    return CMoEError(
        f"layer {index} produces NaN or infinite activations from finite weights: the checkpoint "
        "overflows. Try another one."
    )


class Seen(NamedTuple):
    """What one run of a layer showed of an FFN."""

    x_TH: torch.Tensor
    """Input of the first linear layer."""
    y_TH: torch.Tensor
    """Output of the FFN."""
    out_BLH: torch.Tensor
    """Output of the layer."""
    place: Place


def find_ffn(walk: LayerWalk, hidden_BLH: torch.Tensor) -> DenseFFN:
    """Return the FFN of the layer that has its weights. Raises `RequestError` if none is proven."""
    if packed := packed_experts(walk.layer):
        raise RequestError(f"layer {walk.index} has experts of its own ({packed}): it is a MoE.")
    tried = []
    for found in candidates(walk.layer):
        seen = observe(walk, found, hidden_BLH)
        if seen is None:
            continue
        found = replace(found, place=seen.place)
        for ffn in formulas(found, walk):
            if is_proven(ffn, walk, seen):
                return replace(ffn, adds=is_added(walk, ffn, hidden_BLH, seen.out_BLH))
        tried.append(f"{found.owner or 'the layer'} ({found.up}, {found.down})")
    raise RequestError(
        f"layer {walk.index} has no FFN of a known formula"
        + (f": {', '.join(dict.fromkeys(tried))} compute something else." if tried else ".")
    )


def prove(walk: LayerWalk, ffn: DenseFFN, hidden_BLH: torch.Tensor) -> torch.Tensor:
    """Return the output of the layer that has its weights, (B, L, H).

    Raises `RequestError` unless its FFN is the same as in the layers before.
    """
    seen = observe(walk, ffn, hidden_BLH)
    is_same = seen is not None and seen.place == ffn.place and is_proven(ffn, walk, seen)
    if seen is None or not is_same:
        raise RequestError(
            f"the FFN of layer {walk.index} ({ffn.place.module}) computes something else than that "
            "of the layers before: the model cannot be carved."
        )
    if ffn.adds and not is_added(walk, ffn, hidden_BLH, seen.out_BLH):
        raise RequestError(
            f"layer {walk.index} normalises or scales what its FFN returns, and the layers before "
            "do not: the model cannot be carved."
        )
    return seen.out_BLH


def is_proven(ffn: DenseFFN, walk: LayerWalk, seen: Seen) -> bool:
    """Return whether the formula turns what entered an FFN into what left it."""
    weights = ffn.take(dict(walk.layer.state_dict()))
    down_HF = weights["down"]
    is_as_wide = down_HF is not None and down_HF.shape[1] == ffn.width
    return is_as_wide and difference(ffn.output(weights, seen.x_TH), seen.y_TH) < TOLERANCE


def packed_experts(layer: nn.Module) -> str | None:
    """Return the name of a parameter that holds the weights of several experts, if any."""
    names = (name for name, weight in layer.named_parameters() if weight.ndim == 3)
    return next((name for name in names if re.search("expert|moe", name)), None)


def candidates(layer: nn.Module) -> list[DenseFFN]:
    """Return whatever has the shapes of an FFN: the widest first, and those with a gate."""
    found = []
    for owner, module in layer.named_modules():
        linears = {
            name: tuple(part.weight.T.shape if isinstance(part, Conv1D) else part.weight.shape)
            for name, part in module.named_children()
            if isinstance(part, nn.Linear | Conv1D)
        }
        for down, (hidden, width) in linears.items():
            common: dict[str, Any] = {
                "owner": owner,
                "place": Place(owner),
                "down": down,
                "width": width,
                "transposed": isinstance(module.get_submodule(down), Conv1D),
                "down_bias": has_bias(module, down),
            }
            same = [n for n, shape in linears.items() if n != down and shape == (width, hidden)]
            both = [n for n, shape in linears.items() if n != down and shape == (2 * width, hidden)]
            for gate, up in product(same, same):
                if has_bias(module, gate) == has_bias(module, up):
                    kind = "plain" if gate == up else "gated"
                    parts = {"gate": gate, "up": up, "up_bias": has_bias(module, up)}
                    found.append(DenseFFN(kind=kind, **parts, **common))
            for up, first in product(both, (True, False)):
                parts = {"gate": up, "up": up, "up_bias": has_bias(module, up)}
                found.append(DenseFFN(kind="fused", gate_first=first, **parts, **common))
    return sorted(found, key=lambda ffn: (-ffn.width, not ffn.has_gate))


def has_bias(module: nn.Module, name: str) -> bool:
    """Return whether a linear layer of a module has a bias."""
    return module.get_submodule(name).bias is not None


def formulas(found: DenseFFN, walk: LayerWalk) -> Iterator[DenseFFN]:
    """Yield the formulas to try, those with an activation that the configuration names first.

    Scales are none, or numbers that the FFN has as attributes. Activations with parameters are not
    supported; the others are made one by one, because some warn.
    """
    values = vars(walk.layer.get_submodule(found.owner)).values()
    numbers = [value for value in values if type(value) is float]
    scales: list[dict[str, Any]] = [{}]
    scales += [{"gate_scale": g, "scale": s} for g, s in product(numbers, numbers)]
    named = [value for value in walk.model.config.to_dict().values() if isinstance(value, str)]
    for name in dict.fromkeys([*(name for name in named if name in ACT2FN), *ACT2FN]):
        if not list(ACT2FN[name].parameters()):
            yield from (replace(found, activation=name, **factors) for factors in scales)


def observe(walk: LayerWalk, found: DenseFFN, hidden_BLH: torch.Tensor) -> Seen | None:
    """Run the layer and watch an FFN. None unless it is one call of one module or of the layer."""
    layer = walk.layer
    owner = layer.get_submodule(found.owner)
    seen: dict[str, list[Any]] = {"x": [], "y": [], "given": [], "returned": []}

    def enters(key: str) -> Callable[..., None]:
        return lambda module, args: seen[key].append(args)

    def leaves(key: str) -> Callable[..., None]:
        return lambda module, args, out: seen[key].append(out.clone())  # Falcon adds in place

    with ExitStack() as stack:
        for hook in (
            owner.get_submodule(found.up).register_forward_pre_hook(enters("x")),
            owner.get_submodule(found.down).register_forward_hook(leaves("y")),
            *([owner.register_forward_pre_hook(enters("given"))] if found.owner else []),
            *([owner.register_forward_hook(leaves("returned"))] if found.owner else []),
        ):
            stack.callback(hook.remove)
        try:
            out_BLH = walk(hidden_BLH)
        except AttributeError:  # the candidate returns no tensor
            return None
    if [len(seen["x"]), len(seen["y"])] != [1, 1] or len(seen["given"]) > 1:
        return None
    if () in seen["given"]:  # called by keywords, as attention is
        return None
    [(x, *_)], [y] = seen["x"], seen["y"]
    if not bool(torch.isfinite(y).all()):
        raise overflowed(walk.index)
    if not found.owner:
        place = Place(found.up, (*inline_activation(layer), found.down))
        return Seen(x.flatten(0, -2), y.flatten(0, -2), out_BLH, place)
    [(given, *others)], [returned] = seen["given"], seen["returned"]
    takes_residual = bool(others) and torch.is_tensor(others[0]) and others[0].shape == y.shape
    if takes_residual:
        returned = returned - others[0]
    if given.shape != x.shape or not torch.equal(given, x):
        return None
    place = Place(found.owner, (), takes_residual)
    return Seen(x.flatten(0, -2), returned.flatten(0, -2), out_BLH, place)


def inline_activation(layer: nn.Module) -> Iterator[str]:
    """Yield the attribute of a layer that is the activation which it calls itself, if any."""
    probe = torch.linspace(-3, 3, 16)
    for name, value in {**layer._modules, **vars(layer)}.items():
        if callable(value) and not (isinstance(value, nn.Module) and list(value.parameters())):
            try:
                out = value(probe)
            except Exception:  # whatever is no function of a tensor
                continue
            if torch.is_tensor(out) and out.shape == probe.shape and not torch.equal(out, probe):
                yield name
                return


def difference(
    got: torch.Tensor, wanted: torch.Tensor, beside: torch.Tensor | None = None
) -> float:
    """Return the relative error of a tensor that was computed as a small part of `beside`."""
    if got.shape != wanted.shape:
        return float("inf")
    rounding = 0.0 if beside is None else 1e-2 * beside.norm()
    return ((got - wanted).norm() / (wanted.norm() + rounding).clamp_min(1e-30)).item()


def is_added(
    walk: LayerWalk, ffn: DenseFFN, hidden_BLH: torch.Tensor, out_BLH: torch.Tensor
) -> bool:
    """Return whether the layer adds its FFN's output to the residual stream as it is.

    Raises `RequestError` unless it computes `out_BLH` with a stand-in in the FFN's place.
    """
    weights = ffn.take(dict(walk.layer.state_dict()))
    walk.replace_ffn(ffn.place)
    without_BLH, x_TH = walk.ffn_input(hidden_BLH)
    y_TH = ffn.output(weights, x_TH)
    got_BLH = walk(hidden_BLH, lambda _: y_TH)
    walk.put_back()
    effect_BLH, y_BLH = out_BLH - without_BLH, y_TH.view_as(out_BLH)
    if difference(got_BLH - without_BLH, effect_BLH, out_BLH) > TOLERANCE:
        raise RequestError(
            f"layer {walk.index} uses its FFN ({ffn.place.module}) in another way than by calling "
            "it once."
        )
    return difference(effect_BLH, y_BLH, out_BLH) < TOLERANCE
