# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for up to 16 tokens on a GPU, of the experts backend `"cmoe_triton"`.

Travels with converted repositories. It is imported at the first use, where Triton is, and may
import torch and Triton only. Not measured on a GPU yet.

Nothing is sorted, and no expert's weights are copied: each program reads the rows of an expert's
weights that it multiplies by one token. Tokens of the same expert follow each other, so that they
find these rows in the cache.

Shape suffixes: T tokens, H hidden size, N routed experts, K active experts, M neurons of one
routed expert, C neurons of the shared expert, R rows that a program computes, B of a block.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

try:  # transformers would take an import in the open for a requirement of the repository
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("cmoe_triton needs Triton, which torch for CUDA brings along.") from error

INTERPRETED = triton.knobs.runtime.interpret
"""Whether `TRITON_INTERPRET=1` lets the kernels run on a CPU, slowly."""
MOST_TOKENS, MOST_EXPERTS = 16, 256
"""Up to which the kernels are used."""
LINEAR, SILU, GELU, GELU_TANH, RELU = (tl.constexpr(number) for number in range(5))
ACTIVATIONS = {
    **{"linear": 0, "silu": 1, "swish": 1, "gelu": 2},
    **{"gelu_new": 3, "gelu_pytorch_tanh": 3, "relu": 4},
}
"""Numbers of the activations that the kernels know."""
TILES = ((1, 1024, 4), (2, 512, 4), (4, 256, 4), (4, 512, 4), (8, 256, 4), (8, 512, 8))
"""Rows and columns of a weight that a program reads at once, and its warps."""
tuned = triton.autotune(
    [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)
        for rows, columns, warps in (((16, 32, 1),) if INTERPRETED else TILES)
    ],
    key=["hidden", "width", "shared_width", "size"],
)


def operator(run: Any) -> Any:
    """Return a function that is an operator where a compiler records it, and plain elsewhere.

    An operator costs time with each call. Several repositories in one process are as many modules,
    hence as many names.
    """
    name = f"{__name__.replace('.', '_')}::{run.__name__}"
    recorded = triton_op(name, run, mutates_args=())

    @functools.wraps(run)
    def call(*arguments: Any) -> Any:
        return (recorded if torch.compiler.is_compiling() else run)(*arguments)

    return call


def cover(x_TH: Tensor, activation: str, experts: int, *weights: Tensor | None) -> bool:
    """Return whether the kernels compute with these tokens and weights."""
    given = [weight for weight in weights if weight is not None]
    return (
        (x_TH.is_cuda or (INTERPRETED and not torch.compiler.is_compiling()))
        and 0 < len(x_TH) <= MOST_TOKENS
        and 0 < experts <= MOST_EXPERTS
        and activation in ACTIVATIONS
        and x_TH.dtype in (torch.float16, torch.bfloat16)
        and type(x_TH) is Tensor
        and all(type(weight) in (Tensor, torch.nn.Parameter) for weight in given)
        and all(weight.dtype == x_TH.dtype and weight.is_contiguous() for weight in given)
        and all(weight.device == x_TH.device for weight in given)
        and not (torch.is_grad_enabled() and any(it.requires_grad for it in (x_TH, *given)))
        and not torch.is_autocast_enabled(x_TH.device.type)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return act(z), of float32."""
    if ACTIVATION == SILU:
        z = z * tl.sigmoid(z)
    elif ACTIVATION == GELU:
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:  # (1 + tanh(y)) / 2 = sigmoid(2 y)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == RELU:
        z = tl.maximum(z, 0.0)
    return z


@triton.jit
def load_rows(matrix, rows, count, columns, length):
    """Return a tile of a matrix of `count` rows of `length`, float32, with zeros outside of it."""
    inside = (rows < count)[:, None] & (columns < length)[None, :]
    tile = tl.load(matrix + rows[:, None] * length + columns[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def load_row(vector, columns, length):
    """Return a part of a vector, float32, as one row, with zeros outside of it."""
    part = tl.load(vector + columns, mask=columns < length, other=0.0)
    return part.to(tl.float32)[None, :]


@tuned
@triton.jit
def gate_up_kernel(
    x_TH, index_TK, gate_up_NQH, shared_gate_CH, shared_up_CH, z_TZ,
    experts, hidden, width, shared_width, size,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store act(x Wg) * (x Wu) for one slot of one token, side by side: K experts, then the shared.

    The grid is (T * SLOTS, blocks of rows).
    """
    token = tl.program_id(0) // SLOTS
    slot = tl.program_id(0) % SLOTS
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    gate, up, count = shared_gate_CH, shared_up_CH, shared_width
    if slot < TOP_K:
        expert = tl.load(index_TK + token * TOP_K + slot)
        gate = gate_up_NQH + expert * (2 * width * hidden)
        up = gate + width * hidden
        count = tl.where(expert < experts, width, 0)  # else it is on another rank
    if tl.program_id(1) * ROWS < count:
        gate_RB = tl.zeros((ROWS, COLUMNS), tl.float32)
        up_RB = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, hidden, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            x_1B = load_row(x_TH + token * hidden, columns, hidden)
            gate_RB += load_rows(gate, rows, count, columns, hidden) * x_1B
            up_RB += load_rows(up, rows, count, columns, hidden) * x_1B
        z_R = activate(tl.sum(gate_RB, axis=1), ACTIVATION) * tl.sum(up_RB, axis=1)
        z_M = z_TZ + token * (TOP_K * width + shared_width) + slot * width
        tl.store(z_M + rows, z_R.to(z_TZ.dtype.element_ty), mask=rows < count)


@tuned
@triton.jit
def down_kernel(
    z_TZ, index_TK, weight_TK, down_NHM, shared_down_HC, out_TH,
    experts, hidden, width, shared_width, size,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the sum over a token's slots of z W, weighted. The grid is (T, blocks of rows)."""
    token = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    z_Z = z_TZ + token * (TOP_K * width + shared_width)
    sum_RB = tl.zeros((ROWS, COLUMNS), tl.float32)
    for slot in range(TOP_K):
        expert = tl.load(index_TK + token * TOP_K + slot)
        weight = tl.load(weight_TK + token * TOP_K + slot).to(tl.float32)
        for start in range(0, tl.where(expert < experts, width, 0), COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            z_1B = load_row(z_Z + slot * width, columns, width) * weight
            down_HM = down_NHM + expert * (hidden * width)
            sum_RB += load_rows(down_HM, rows, hidden, columns, width) * z_1B
    for start in range(0, shared_width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        z_1B = load_row(z_Z + TOP_K * width, columns, shared_width)
        sum_RB += load_rows(shared_down_HC, rows, hidden, columns, shared_width) * z_1B
    out_R = tl.sum(sum_RB, axis=1).to(out_TH.dtype.element_ty)
    tl.store(out_TH + token * hidden + rows, out_R, mask=rows < hidden)


@triton.jit
def router_kernel(
    x_TH, gate_NH, up_NH, bias_N, scale_N, score_TN, weight_TK, index_TK, experts, hidden,
    TOP_K: tl.constexpr, GATED: tl.constexpr, ABSOLUTE: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store scores, gate weights and numbers of the chosen experts of one token. The grid is (T,).

    All scores are of one block of ROWS experts.
    """
    token = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    gate_RB = tl.zeros((ROWS, COLUMNS), tl.float32)
    up_RB = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, hidden, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x_1B = load_row(x_TH + token * hidden, columns, hidden)
        up_RB += load_rows(up_NH, rows, experts, columns, hidden) * x_1B
        if GATED:
            gate_RB += load_rows(gate_NH, rows, experts, columns, hidden) * x_1B
    score_R = tl.sum(up_RB, axis=1)
    if GATED:
        score_R = activate(tl.sum(gate_RB, axis=1), ACTIVATION) * score_R
    else:
        score_R = activate(score_R, ACTIVATION)
    if ABSOLUTE:
        score_R = tl.abs(score_R)
    inside = rows < experts
    tl.store(score_TN + token * experts + rows, score_R, mask=inside)
    score_R = tl.where(inside, score_R, -float("inf"))
    probability_R = tl.exp(score_R - tl.max(score_R, axis=0))
    probability_R = probability_R / tl.sum(probability_R, axis=0)
    selection_R = probability_R + tl.load(bias_N + rows, mask=inside, other=0.0).to(tl.float32)
    scale_R = tl.load(scale_N + rows, mask=inside, other=0.0).to(tl.float32)
    weight_R = 1 + probability_R * scale_R
    is_left = inside
    for slot in range(TOP_K):
        best = tl.max(tl.where(is_left, selection_R, -float("inf")), axis=0)
        first = tl.min(tl.where(is_left & (selection_R >= best), rows, ROWS), axis=0)
        chosen = tl.minimum(first, experts - 1)  # of scores that are no numbers
        weight = tl.sum(tl.where(rows == chosen, weight_R, 0.0), axis=0)
        tl.store(weight_TK + token * TOP_K + slot, weight.to(weight_TK.dtype.element_ty))
        tl.store(index_TK + token * TOP_K + slot, chosen.to(tl.int64))
        is_left = is_left & (rows != chosen)


@operator
def experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_NQH: Tensor,
    down_NHM: Tensor,
    activation: str,
    shared_gate_CH: Tensor | None = None,
    shared_up_CH: Tensor | None = None,
    shared_down_HC: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of each token's experts, with the shared one if given, (T, H)."""
    x_TH, index_TK, weight_TK = (it.contiguous() for it in (x_TH, index_TK, weight_TK))
    (tokens, hidden), top_k = x_TH.shape, index_TK.shape[1]
    experts, _, width = down_NHM.shape
    shared = (shared_gate_CH, shared_up_CH, shared_down_HC)
    gate, up, down = (x_TH if it is None else it for it in shared)
    shared_width = 0 if shared_gate_CH is None else shared_gate_CH.shape[0]
    slots = top_k + (shared_width > 0)
    z_TZ = x_TH.new_empty(tokens, top_k * width + shared_width)
    out_TH = torch.empty_like(x_TH)
    sizes = (experts, hidden, width, shared_width, (tokens - 1).bit_length())
    # A wrapper that compilers see through takes a millisecond where none is at work.
    is_plain = type(x_TH) is Tensor
    first: Any = gate_up_kernel if is_plain else wrap_triton(gate_up_kernel)
    second: Any = down_kernel if is_plain else wrap_triton(down_kernel)
    with torch.cuda.device_of(x_TH):
        first[lambda meta: (tokens * slots, triton.cdiv(max(width, shared_width), meta["ROWS"]))](
            x_TH,
            index_TK,
            gate_up_NQH,
            gate,
            up,
            z_TZ,
            *sizes,
            top_k,
            slots,
            ACTIVATIONS[activation],
        )
        second[lambda meta: (tokens, triton.cdiv(hidden, meta["ROWS"]))](
            z_TZ, index_TK, weight_TK, down_NHM, down, out_TH, *sizes, top_k
        )
    return out_TH


@operator
def router(
    x_TH: Tensor,
    gate_NH: Tensor | None,
    up_NH: Tensor,
    bias_N: Tensor,
    scale_N: Tensor,
    top_k: int,
    activation: str,
    absolute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores (T, N) in float32, gate weights (T, K) and numbers (T, K) of the experts."""
    x_TH = x_TH.contiguous()
    (tokens, hidden), experts = x_TH.shape, up_NH.shape[0]
    score_TN = x_TH.new_empty((tokens, experts), dtype=torch.float32)
    weight_TK = x_TH.new_empty(tokens, top_k)
    index_TK = x_TH.new_empty((tokens, top_k), dtype=torch.int64)
    rows = triton.next_power_of_2(experts)
    kernel: Any = router_kernel if type(x_TH) is Tensor else wrap_triton(router_kernel)
    with torch.cuda.device_of(x_TH):
        kernel[(tokens,)](
            x_TH, up_NH if gate_NH is None else gate_NH, up_NH, bias_N, scale_N,
            score_TN, weight_TK, index_TK, experts, hidden,
            top_k, gate_NH is not None, absolute, ACTIVATIONS[activation],
            rows, max(16, 4096 // rows),
        )  # fmt: skip
    return score_TN, weight_TK, index_TK
