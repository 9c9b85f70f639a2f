"""The loss of a linear layer on a GPU: the search for the logits that may have a weight.

Two sweeps over the vocabulary, tile by tile; no logit but those that are kept leaves the chip.

1. The largest logit of each row and tile, and the logits of the targets. Each tile has a program.
2. The threshold of these maxima, a subset of a row's logits, is a lower bound of the row's own. The
   logits above it are made again and written, packed, with their columns. Tiles whose maxima lie
   below the bound in all rows of a program are skipped before their products.

Tiles are dealt to a few programs in turn, each of which has room of its own: no atomics, and where
an entry lies depends on its row alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.rows import wide
from shared_kernels.triton.dot import dot_acc
from shared_kernels.triton.rows import launch_rows_forward

from .. import _torch_linear
from .._call import LinearLoss, Support
from .._torch_linear import Found, Shard, below
from . import configs

_ROWS = 1024  # rows that are searched at once
_LARGEST_DEAL = 8  # programs that share the tiles of a row in the second sweep
_TILES_PER_PROGRAM = 16
# Products per fp32 number: "tf32x3" is three tensor-core passes on NVIDIA.
_PRECISION = {"cuda": "tf32x3"}
_TABLES = {torch.float32: configs.LINEAR_FP32, torch.float64: configs.LINEAR_FP64}


@triton.jit
def _tanh(x):
    """tanh x, with the relative precision of x near 0."""
    b_e = tl.exp(-2.0 * tl.abs(x))
    b_far = (1.0 - b_e) / (1.0 + b_e)
    b_far = tl.where(x < 0.0, -b_far, b_far)
    b_s = x * x
    b_near = x * (
        1.0 - b_s * (0.3333333333333333 - b_s * (0.13333333333333333 - b_s * 0.053968254))
    )
    return tl.where(b_s < 1e-3, b_near, b_far)


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    softcap_ptr,
    o_r,
    o_v,
    n_rows,
    V,
    D,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of rows o_r and classes o_v -> [BLOCK_R, BLOCK_V]; -inf beyond the vocabulary."""
    dtype: tl.constexpr = tl.float64 if IS_WIDE else tl.float32
    m_v = o_v < V
    b_x = tl.zeros([BLOCK_R, BLOCK_V], dtype)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = (o_d < D)[None, :]
        # [BLOCK_R, BLOCK_D]
        p_h = hidden_ptr + o_r[:, None] * stride_hr + o_d[None, :] * stride_hd
        b_h = tl.load(p_h, mask=(o_r < n_rows)[:, None] & m_d, other=0.0)
        # [BLOCK_V, BLOCK_D]
        p_w = weight_ptr + o_v[:, None] * stride_wv + o_d[None, :] * stride_wd
        b_w = tl.load(p_w, mask=m_v[:, None] & m_d, other=0.0)
        if IS_WIDE:
            b_x += tl.sum(b_h[:, None, :] * b_w[None, :, :], 2)
        else:
            b_x = dot_acc(b_h, tl.trans(b_w), b_x, PRECISION)
    if HAS_BIAS:
        b_x += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(dtype)[None, :]
    if HAS_CAP:
        softcap = tl.load(softcap_ptr)
        b_x = softcap * _tanh(b_x / softcap)
    return tl.where(m_v[None, :], b_x, float("-inf"))


@triton.jit(do_not_specialize=["n_rows", "V", "D", "n_targets"])
def _linear_maxima_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    softcap_ptr,
    target_ptr,
    maxima_ptr,
    total_ptr,
    of_target_ptr,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    n_rows,
    V,
    D,
    n_targets,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # the tile of this program
    i_v = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    n_tiles = tl.cdiv(V, BLOCK_V)
    m_r = o_r < n_rows
    b_x = _logits(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        softcap_ptr,
        o_r,
        o_v,
        n_rows,
        V,
        D,
        stride_hr,
        stride_hd,
        stride_wv,
        stride_wd,
        BLOCK_R,
        BLOCK_V,
        BLOCK_D,
        HAS_BIAS,
        HAS_CAP,
        IS_WIDE,
        PRECISION,
    )
    # [BLOCK_R]
    b_top = tl.max(b_x, 1)
    m_nan = tl.max((b_x != b_x).to(tl.int32), 1) > 0
    tl.store(maxima_ptr + o_r * n_tiles + i_v, tl.where(m_nan, float("nan"), b_top), mask=m_r)
    if HAS_TOTAL:
        # beside the tile's own largest logit, as a share that keeps sums of finite logits finite
        share = 1.0 / (2 * BLOCK_V)
        b_own = tl.where(tl.abs(b_top) < float("inf"), b_top, 0.0) * share
        b_total = tl.sum(tl.where((o_v < V)[None, :], b_x * share - b_own[:, None], 0.0), 1)
        tl.store(total_ptr + o_r * n_tiles + i_v, b_total, mask=m_r)
    # each target lies in one tile, which writes it
    for k in range(n_targets):
        o_t = o_r * n_targets + k
        b_t = tl.load(target_ptr + o_t, mask=m_r, other=-1)
        m_t = (b_t >= i_v * BLOCK_V) & (b_t < (i_v + 1) * BLOCK_V) & (b_t < V)
        b_one = tl.sum(tl.where(o_v[None, :] == b_t[:, None], b_x, 0.0), 1)
        tl.store(of_target_ptr + o_t, b_one, mask=m_r & m_t)


@triton.jit(do_not_specialize=["n_rows", "V", "D", "room"])
def _linear_collect_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    softcap_ptr,
    maxima_ptr,
    low_ptr,
    x_ptr,
    keys_ptr,
    count_ptr,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    n_rows,
    V,
    D,
    room,
    DEAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # the rows of this program, and which of their tiles: i_s, i_s + DEAL, ...
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_s = tl.program_id(1)
    n_tiles = tl.cdiv(V, BLOCK_V)
    m_r = o_r < n_rows
    # [BLOCK_R]
    b_low = tl.load(low_ptr + o_r, mask=m_r, other=float("inf"))
    b_count = tl.zeros([BLOCK_R], tl.int32)
    for i_v in range(i_s, n_tiles, DEAL):
        b_top = tl.load(maxima_ptr + o_r * n_tiles + i_v, mask=m_r, other=float("-inf"))
        n_hits = tl.sum((b_top > b_low).to(tl.int32), 0)
        if n_hits > 0:
            o_v = tl.cast(i_v, tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
            b_x = _logits(
                hidden_ptr,
                weight_ptr,
                bias_ptr,
                softcap_ptr,
                o_r,
                o_v,
                n_rows,
                V,
                D,
                stride_hr,
                stride_hd,
                stride_wv,
                stride_wd,
                BLOCK_R,
                BLOCK_V,
                BLOCK_D,
                HAS_BIAS,
                HAS_CAP,
                IS_WIDE,
                PRECISION,
            )
            # [BLOCK_R, BLOCK_V]: the entries of a row stand one after the other
            m_x = b_x > b_low[:, None]
            o_x = b_count[:, None] + tl.cumsum(m_x.to(tl.int32), 1) - 1
            m_x = m_x & (o_x < room)
            o_x = (o_r[:, None] * DEAL + i_s) * room + o_x
            tl.store(x_ptr + o_x, b_x, mask=m_x)
            tl.store(keys_ptr + o_x, tl.broadcast_to(o_v[None, :], [BLOCK_R, BLOCK_V]), mask=m_x)
            b_count += tl.sum((b_x > b_low[:, None]).to(tl.int32), 1)
    tl.store(count_ptr + o_r * DEAL + i_s, b_count, mask=m_r)


def _solver(x: Tensor, s: float | Tensor) -> Tensor:
    return launch_rows_forward(x, s, 50)


def _lower_bound(maxima: Tensor, s: float | Tensor) -> Tensor:
    """(R,): the threshold of some logits of each row, in their units, less what rounding may do.

    The weight of the largest one, before the division, is c^(1/s) with s max - tau = c.
    """
    top = maxima.amax(-1)
    weights = launch_rows_forward(maxima, s, 50, divide=False, fast=False)
    c = weights.amax(-1) ** s
    return below(top - (c + 16 * torch.finfo(maxima.dtype).eps) / s)


def launch_linear_search(call: LinearLoss, shard: Shard, rows: Tensor) -> Found:
    """The logits of rows that may lie above the threshold."""
    hidden, weight = call.hidden[rows], call.weight
    (R, D), V, dtype = hidden.shape, weight.shape[0], wide(hidden)
    where = device.target(hidden)
    table = _TABLES.get(hidden.dtype, configs.LINEAR)
    meta: dict[str, Any] = table.pick(where, D).meta()
    n_blocks, n_tiles = triton.cdiv(R, meta["BLOCK_R"]), triton.cdiv(V, meta["BLOCK_V"])
    meta.update(
        HAS_BIAS=call.bias is not None,
        HAS_CAP=call.softcap is not None,
        IS_WIDE=dtype == torch.float64,
        PRECISION=_PRECISION.get(where.backend, "ieee") if hidden.dtype == dtype else "ieee",
    )

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    # kernels take numbers in fp32: the cap is a tensor
    softcap = torch.full((1,), call.softcap or 0.0, dtype=dtype, device=hidden.device)
    column, is_here = shard.local(call.target[rows], V)
    target = torch.where(is_here, column, -1).contiguous()
    maxima, of_target = empty(R, n_tiles), empty(*target.shape)
    total = empty(R, n_tiles if call.label_smoothing else 1)
    operands = (hidden, weight, weight if call.bias is None else call.bias.contiguous(), softcap)
    strides = (*hidden.stride(), *weight.stride())
    _linear_maxima_kernel[(n_tiles, n_blocks)](
        *operands,
        target,
        maxima,
        total,
        of_target,
        *strides,
        R,
        V,
        D,
        target.shape[1],
        HAS_TOTAL=bool(call.label_smoothing),
        **meta,
    )
    deal = min(_LARGEST_DEAL, max(1, n_tiles // _TILES_PER_PROGRAM))
    room = triton.cdiv(min(V, 2 * call.capacity), deal)
    x = torch.full((R, deal * room), -torch.inf, dtype=dtype, device=hidden.device)
    keys = torch.zeros(R, deal * room, dtype=torch.int32, device=hidden.device)
    count = torch.empty(R, deal, dtype=torch.int32, device=hidden.device)
    low = _lower_bound(maxima, call.s)
    _linear_collect_kernel[(n_blocks, deal)](
        *operands, maxima, low, x, keys, count, *strides, R, V, D, room, DEAL=deal, **meta
    )
    top = shard.largest(maxima.amax(-1))
    is_long = (count > room).any(-1) | (~top.isfinite() & (top != -torch.inf))
    of_target = torch.where(is_here, of_target, 0.0)
    mean = torch.zeros_like(top, dtype=torch.float64)
    if call.label_smoothing:
        beside, own = (torch.where(x.isfinite(), x, 0.0).double() for x in (top, maxima))
        columns = torch.arange(0, V, meta["BLOCK_V"], device=hidden.device)
        in_tile = (V - columns).clamp(max=meta["BLOCK_V"])
        total = 2 * meta["BLOCK_V"] * total.double() + in_tile * (own - beside.unsqueeze(1))
        mean = total.sum(-1) / shard.total
    return Found(x, keys, top, of_target, mean, is_long)


ROUTINES = _torch_linear.Routines(launch_linear_search, _solver, _ROWS)


def launch_linear_loss(call: LinearLoss) -> tuple[Tensor, Support]:
    return _torch_linear.linear_loss(call, ROUTINES)


def launch_linear_loss_backward(
    call: LinearLoss, saved: Support, g: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    return _torch_linear.linear_loss_backward(call, saved, g, needs, ROUTINES)
