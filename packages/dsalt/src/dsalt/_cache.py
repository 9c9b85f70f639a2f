"""Continue sequences from what their attention remembers, also rows of different lengths.

Where rows differ in length each ends at the last column of the cache, so that new tokens are
appended to all of them at once; columns before a row's first token are empty. Such rows attend in
plain PyTorch, in the memory class of the operator; rows of one length use the operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _energy, _normalized
from .kernels import Landmarks, select_landmarks

if TYPE_CHECKING:
    from .modules import AttentionCache, DSALTAttention

Fields = tuple[Tensor, Tensor, Tensor, tuple | None, Tensor, Tensor | None]


def remember(
    keys: Tensor, values: Tensor, marks: Landmarks, lengths: Tensor | None, cu: Tensor | None
) -> Fields:
    """The cache of whole sequences: of one length, with padding behind them, or packed."""
    idx = marks.idx[:, :, -1] if marks.idx.dim() == 4 else marks.idx
    if cu is not None:
        # one row per sequence; a global list does not exist for packed sequences
        place, token = _unpacking(cu)
        lengths = cu.diff().to(torch.int64)
        keys, values, scores = (_spread(x, place) for x in (keys, values, marks.scores))
        order = token.to(torch.uint8).argsort(dim=-1, stable=True)
        idx = idx.new_full((lengths.shape[0], *idx.shape[1:]), -1)
    elif lengths is None:
        return keys, values, marks.scores, marks.state, idx, None
    else:
        scores = marks.scores
        place = torch.arange(keys.shape[2], device=keys.device)
        order = (place < lengths[:, None]).to(torch.uint8).argsort(dim=-1, stable=True)
        # a list of the last block is read again from the scores; a global one stays
        idx = torch.where(idx >= 0, idx + (keys.shape[2] - lengths[:, None, None]), -1)
    keys, values, scores = (_ordered(x, order) for x in (keys, values, scores))
    scores = _without_padding(scores, lengths)
    return keys, values, scores, marks.state, idx.to(torch.int32), lengths


def extend_rows(
    layer: DSALTAttention, x: Tensor, x_prev: Tensor | None, past: AttentionCache
) -> tuple[Tensor, Tensor, Fields]:
    """Attend new tokens (B, n, d) of rows of one length: (out, windows, cache)."""
    n, scorer = x.shape[1], layer.scorer
    positions = torch.arange(past.length, past.length + n, device=x.device)
    q, k, v, windows, source, values = layer._project(x, x_prev, positions)
    k, v = torch.cat((past.keys, k), 2), torch.cat((past.values, v), 2)
    scores, state = _scores(layer, source, values, past, None)
    idx = last = past.landmark_idx
    if scorer.causal:
        block, compared = scorer.landmark_block, scorer.compared(scores)
        if n > 1:
            idx = select_landmarks(compared, scorer.k, landmark_block=block, n_sink=scorer.n_sink)
            idx = idx[:, :, past.length // block :]
        elif past.length % block == 0:  # lists change at block boundaries only
            idx = select_landmarks(compared[..., : past.length], scorer.k, n_sink=scorer.n_sink)[
                :, :, None
            ]
        else:
            idx = idx[:, :, None]
        last = idx[:, :, -1]
    out = layer._mix(q, k, v, windows, idx, scorer.gate(scores, idx), None)
    out = layer.out_proj(out.transpose(1, 2).reshape(x.shape))
    return out, windows, (k, v, scores, state, last, None)


def extend_ragged(
    layer: DSALTAttention,
    x: Tensor,
    x_prev: Tensor | None,
    past: AttentionCache,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Fields]:
    """The same where rows differ in length, or where ``mask`` (B, n) leaves some tokens out."""
    B, n, _ = x.shape
    T, device = past.length, x.device
    before = past.lengths
    if before is None:
        before = torch.full((B,), T, device=device)
    order = None
    if mask is not None:
        order = mask.to(torch.uint8).argsort(dim=-1, stable=True)  # tokens to the end
        x = _ordered(x, order, 1)
        x_prev = None if x_prev is None else _ordered(x_prev, order, 1)
    fresh = before.new_full((B,), n) if mask is None else mask.sum(-1)
    lengths = before + fresh
    # places in their own sequence; below zero: not a token
    place = lengths[:, None] - n + torch.arange(n, device=device)
    positions = place.clamp(min=0)
    valid = torch.arange(n, device=device) >= n - fresh[:, None]
    q, k, v, windows, source, values = layer._project(x, x_prev, positions)
    k, v = torch.cat((past.keys, k), 2), torch.cat((past.values, v), 2)
    scores, state = _scores(layer, source, values, past, None if mask is None else valid)
    old = past.landmark_idx
    if mask is not None:
        # the columns of past and new tokens without the holes between them
        column = torch.arange(T, device=device) >= T - before[:, None]
        kept = torch.cat((column, valid), 1).to(torch.uint8).argsort(dim=-1, stable=True)
        k, v, scores = (_ordered(y, kept) for y in (k, v, scores))
        old = torch.where(old >= 0, old + (n - fresh)[:, None, None], -1)
    scores = _without_padding(scores, lengths)
    start = k.shape[2] - lengths  # [B], the first column of a token
    idx, row_list = _lists(layer, scores, start, before, positions, old)
    row_start = torch.minimum(start[:, None], torch.arange(T, T + n, device=device))
    out = _normalized.attention(
        q,
        k,
        v,
        windows,
        idx,
        layer.scorer.gate(scores, idx),
        (row_start, row_list),
        layer.head_dim**-0.5,
        layer.window_ramp,
        layer.normalizer or torch.softmax,
        layer.window.n_max,
    )
    out = layer.out_proj(out.transpose(1, 2).reshape(x.shape))
    if mask is not None and order is not None:
        back = order.argsort(-1)
        out, windows = _ordered(out, back, 1), _ordered(windows, back)
        out = torch.where(mask[..., None], out, 0)
    return out, windows, (k, v, scores, state, idx[:, :, -1].to(torch.int32), lengths)


def unpack(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed x (1, T, d) as one row per sequence (S, longest, d), and which places are tokens."""
    place, token = _unpacking(cu_seqlens)
    return x[0, place], token


def pack(x: Tensor, token: Tensor) -> Tensor:
    """The tokens of (S, n, d) in one row (1, T, d)."""
    return x[token][None]


def _unpacking(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Where column j of sequence s is in the packed row, (S, longest), and whether it is there.

    A row per sequence has a size that only the values of cu_seqlens know: they are read here.
    """
    bounds = cu_seqlens.to(torch.int64)
    lengths = bounds.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    column = torch.arange(longest, device=bounds.device)
    token = column < lengths[:, None]
    return torch.where(token, bounds[:-1, None] + column, 0), token


def _spread(x: Tensor, place: Tensor) -> Tensor:
    """(1, H, T, ...) at places (S, n) of a packed row: (S, H, n, ...)."""
    return x[0].transpose(0, 1)[place].transpose(1, 2)


def _ordered(x: Tensor, order: Tensor, dim: int = 2) -> Tensor:
    """x with the entries of ``dim`` in the order (B, n) of each row."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    index = order.view(shape).expand(*x.shape[:dim], order.shape[1], *x.shape[dim + 1 :])
    return x.gather(dim, index)


def _without_padding(scores: Tensor, lengths: Tensor) -> Tensor:
    """-inf before the first token of each row of (B, H, T), rows ending at the last column."""
    T = scores.shape[-1]
    empty = torch.arange(T, device=scores.device) < T - lengths[:, None, None]
    return scores.masked_fill(empty, float("-inf"))


def _scores(
    layer: DSALTAttention,
    source: Tensor,
    values: Tensor,
    past: AttentionCache,
    valid: Tensor | None,
) -> tuple[Tensor, tuple | None]:
    """Scores of all columns. Global ones are those of the first call: later tokens have none."""
    if layer.scorer.causal:
        scores, state = layer.scorer.score(source, values, past.state, valid=valid)
    else:
        shape = (*past.energy.shape[:2], source.shape[1])
        scores, state = past.energy.new_full(shape, float("-inf")), past.state
    return torch.cat((past.energy, scores), -1), state


def _lists(
    layer: DSALTAttention,
    scores: Tensor,
    start: Tensor,
    before: Tensor,
    positions: Tensor,
    old: Tensor,
) -> tuple[Tensor, Tensor]:
    """Landmark lists (B, H, lists, K) as columns, and the list of each new token (B, n)."""
    scorer = layer.scorer
    if not scorer.causal:
        return old[:, :, None], torch.zeros_like(positions)
    block, n = scorer.landmark_block, positions.shape[1]
    first = before // block
    place = torch.arange(scores.shape[-1], device=scores.device) - start[:, None]  # [B, T]
    compared = scorer.compared(scores)
    sinks = (place >= 0) & (place < scorer.n_sink)
    compared = compared.masked_fill(sinks[:, None], float("inf"))
    lists = []
    for u in range((n + block - 2) // block + 1):
        allowed = (place >= 0) & (place < ((first + u) * block)[:, None])
        lists.append(_energy.select_global(compared, scorer.k, allowed[:, None]))
    return torch.stack(lists, 2), (positions // block - first[:, None]).clamp(min=0)
