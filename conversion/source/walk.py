# SPDX-License-Identifier: Apache-2.0
"""Run any decoder of transformers layer by layer, with the weights of one layer in memory.

The library's own model stands on the meta device. What it hands to each layer (masks, positions,
rotary embeddings by type of layer) is recorded once, and the layer's own forward method is called
with it when its weights are there: nothing of a family is written a second time.

Shape suffixes: B windows of a batch, W windows, L tokens of one window, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import RequestError

FFNFunction = Callable[[torch.Tensor], torch.Tensor]
"""Maps inputs (T, H) to outputs (T, H)."""
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""Arguments of each layer's forward method."""
FEW_TOKENS = 97
"""Different tokens on which calls of layers are recorded."""
RETURNED: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden, None, None),
    lambda hidden: (hidden, None),
)
"""What the layers of families return: hidden states, alone or with what is not needed here."""


class Place(NamedTuple):
    """Where the FFN of a layer is, by names relative to the layer."""

    module: str
    """The FFN, or the first of its parts where the layer calls them itself."""
    skipped: tuple[str, ...] = ()
    """The other parts."""
    takes_residual: bool = False
    """Whether the FFN is called with the residual, too, and adds it (BLOOM, MPT)."""


class StandIn(nn.Module):
    """Compute some function in the place of an FFN."""

    function: FFNFunction

    def __init__(self, takes_residual: bool) -> None:
        super().__init__()
        self.takes_residual = takes_residual

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Return the function's values, plus the residual where the FFN has to add it."""
        # A copy of the output, because some families add to it in place (Falcon).
        y = self.function(x.flatten(0, -2)).clone().view_as(x)
        return y + others[0] if self.takes_residual else y


class LayerWalk:
    """The layers of a decoder, of which one at a time has its weights, in float32.

    Args:
        model: The causal model on the meta device. It is used up.
        device: Where to compute.

    Raises:
        RequestError: The layers are not called one after the other, or with inputs that depend on
            the tokens.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.device = model.eval(), device
        self.decoder: Any = model.base_model
        self.name, self.layers = decoder_layers(self.decoder)
        self.prefix = next(f"{name}." for name, it in model.named_modules() if it is self.layers)
        self.calls: dict[tuple[int, ...], Calls] = {}
        """By the number of windows and of their tokens."""
        self.index = 0
        """The layer that has its weights."""
        self._returned = RETURNED[0]
        self._replaced: dict[str, Any] = {}

    def load_rest(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the weights of the decoder outside of its layers, by the causal model's names."""
        own = {id(it) for it in self.decoder.state_dict(keep_vars=True).values()}
        state = self.model.state_dict(keep_vars=True)
        names = {name for name in tensors.keys() & state.keys() if id(state[name]) in own}
        values = {name: tensors[name].to(self.device, torch.float32) for name in names}
        self.model.load_state_dict(values, assign=True, strict=False)
        inside = {id(module) for module in self.layers.modules()}
        self._initialise([module for module in self.decoder.modules() if id(module) not in inside])

    def invent_embedding(self) -> None:
        """Give some tokens random embeddings, where no text will be read."""
        embedding: Any = self.model.get_input_embeddings()
        chance = torch.Generator().manual_seed(0)
        rows_VH = torch.randn(FEW_TOKENS, embedding.weight.shape[1], generator=chance)
        embedding.weight = nn.Parameter(rows_VH.to(self.device))
        embedding.padding_idx = None

    def record(self, windows: int, length: int) -> None:
        """Find out how the layers are called for so many windows of `length` tokens.

        Raises whatever the library raises, and `RequestError`.
        """
        rows = min(FEW_TOKENS, len(self.model.get_input_embeddings().weight))
        ids_BL = torch.arange(windows * length, device=self.device).view(windows, length) % rows
        calls, of_other_tokens = (self._called(ids) for ids in (ids_BL, ids_BL.flip(1)))
        if not alike(calls, of_other_tokens):
            raise RequestError(
                "its layers are called with inputs of their own for each token, besides the hidden "
                "states: that is not supported yet."
            )
        self.calls[windows, length] = calls

    def embed(self, windows_WL: torch.Tensor) -> torch.Tensor:
        """Return the hidden states that enter the first layer, (W, L, H)."""
        return torch.cat([entering(self._called(it.to(self.device))) for it in windows_WL.split(1)])

    def forget_rest(self) -> None:
        """Let go of the weights outside of the layers."""
        self.model.to("meta")

    def load(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the weights of a layer, float32 on the device, by names relative to it."""
        self.index = index
        self.layer.load_state_dict(tensors, assign=True, strict=False)
        self._initialise(list(self.layer.modules()))

    def release(self) -> None:
        """Let go of the weights of the layer."""
        self.put_back()
        self.layer.to("meta")

    @property
    def layer(self) -> nn.Module:
        """Return the layer that has its weights."""
        return self.layers[self.index]

    def replace_ffn(self, place: Place) -> None:
        """Put a stand-in where the FFN of the layer is, until the layer is released."""
        layer, stand_in = self.layer, StandIn(place.takes_residual)
        parts = {place.module: stand_in, **{name: nn.Identity() for name in place.skipped}}
        self._replaced = {name: attrgetter(name)(layer) for name in parts}
        for name, part in parts.items():
            set_part(layer, name, part)

    def put_back(self) -> None:
        """Put the FFN of the layer back in its place."""
        for name, part in self._replaced.items():
            set_part(self.layer, name, part)
        self._replaced = {}

    def __call__(self, hidden_BLH: torch.Tensor, ffn: FFNFunction | None = None) -> torch.Tensor:
        """Return the hidden states behind the layer, (B, L, H), with `ffn` in the FFN's place."""
        if ffn is not None:
            next(m for m in self.layer.modules() if isinstance(m, StandIn)).function = ffn
        args, kwargs = self.calls[hidden_BLH.shape[:2]][self.index]
        if args:
            args = (hidden_BLH, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden_BLH}
        out = self.layer(*args, **kwargs)
        return out[0] if isinstance(out, tuple | list) else out

    def ffn_input(self, hidden_BLH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states behind the layer without its FFN, (B, L, H), and x, (T, H)."""
        seen: list[torch.Tensor] = []

        def nothing(x_TH: torch.Tensor) -> torch.Tensor:
            seen.append(x_TH)
            return torch.zeros_like(x_TH)

        out_BLH = self(hidden_BLH, nothing)
        return out_BLH, seen[0]

    def _called(self, ids_BL: torch.Tensor) -> Calls:
        """Return how the decoder calls its layers for these tokens."""
        reason: Exception | None = None
        for returned in (self._returned, *RETURNED):
            calls: Calls = []
            try:
                for index, layer in enumerate(self.layers):
                    layer.forward = recording(calls, index, returned)
                self.decoder(input_ids=ids_BL, use_cache=False)
            except RequestError:
                raise
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
                reason = reason or error  # that of what most families return
                continue
            finally:
                for layer in self.layers:
                    del layer.forward
            if not all(torch.equal(entering([it]), entering(calls)) for it in calls):
                changed = RequestError("its hidden states are changed between the layers.")
                reason = reason or changed  # also where the decoder takes a tensor for a tuple
                continue
            self._returned = returned
            if len(calls) != len(self.layers):
                raise RequestError(f"of its {len(self.layers)} layers {len(calls)} are called.")
            return calls
        assert reason is not None
        raise reason

    def _initialise(self, modules: list[nn.Module]) -> None:
        """Compute the buffers that no checkpoint holds, by the library's own `_init_weights`."""
        missing = False
        for module in modules:
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    missing = True
                    fresh = torch.empty_like(buffer, device=self.device)
                    module.register_buffer(name, fresh, persistent=name in module.state_dict())
        if not missing:
            return
        for module in modules:
            for value in module.parameters(recurse=False):
                value._is_hf_initialized = True  # type: ignore[attr-defined] # it is left alone
        for module in (*modules, self.decoder):  # which fills buffers of its layers in Falcon-H1
            self.decoder._init_weights(module)


def recording(calls: Calls, index: int, returned: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward method that records its arguments and returns the hidden states."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(calls) != index:
            raise RequestError(f"layer {index} is called out of turn, as number {len(calls)}.")
        calls.append((args, kwargs))
        return returned(args[0] if args else kwargs["hidden_states"])

    return forward


def entering(calls: Calls) -> torch.Tensor:
    """Return the hidden states that enter the first layer, (B, L, H)."""
    args, kwargs = calls[0]
    return args[0] if args else kwargs["hidden_states"]


def alike(one: Calls, other: Calls) -> bool:
    """Return whether two records hand the same to each layer, but for the hidden states."""
    pairs = zip(others(one), others(other), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def others(calls: Calls) -> list[torch.Tensor]:
    """Return all tensors that layers are called with but the hidden states."""
    named: list[dict[Any, Any]] = [{**dict(enumerate(args)), **kw} for args, kw in calls]
    for given in named:
        del given[0 if 0 in given else "hidden_states"]
    return list(leaves(named))


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested dictionaries, lists and tuples."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)


def decoder_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and list of a decoder's layers: the outermost list with the most modules."""
    lists = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [
        (name, layers)
        for name, layers in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    ]
    if not outer:
        raise RequestError("it has no list of layers.")
    return max(outer, key=lambda item: sum(1 for _ in item[1].modules()))


def set_part(module: nn.Module, name: str, part: Any) -> None:
    """Set an attribute of a module inside."""
    owner, _, own = name.rpartition(".")
    parent = module.get_submodule(owner)
    if isinstance(getattr(parent, own), nn.Module):
        delattr(parent, own)  # a function cannot take the place of a module
    setattr(parent, own, part)
