"""Continue sequences from what their attention remembers, also rows of different lengths.

Where rows differ in length each ends at the last column of the cache, so that new tokens are
appended to all of them at once; columns before a row's first token are empty. Such rows attend in
plain PyTorch, in the memory class of the operator; rows of one length use the operator.

A cache holds what later tokens can attend and no more (:func:`bounded`). Lists of landmarks grow
from the last one: the best of all tokens are among the best so far and those that came since.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _landmarks
from ._call import Attention
from ._choice import Landmarks
from .kernels import attend

if TYPE_CHECKING:
    from .modules import AttentionCache, DSALTAttention

Fields = tuple


def bounded(layer: DSALTAttention, cache: AttentionCache) -> AttentionCache:
    """The cache without the columns that no later token attends, when that frees a block or more.

    The first F = G K columns get the landmarks that are dropped otherwise, a slot for each head and
    list entry; the rest are the last tokens, at least as many as the largest window reaches and as
    a block holds. Slots are further away than any window, so their factor is 1 as their token's is.
    A whole number of blocks is dropped: columns stay in step with the blocks of landmark lists.
    """
    block, K = layer.scorer.landmark_block, layer.scorer.k
    (B, H, T), H_kv = cache.energy.shape, cache.keys.shape[1]
    G = H // max(1, H_kv)
    F = G * K
    least = max(math.ceil(layer.window.n_max + layer.window_ramp), block)
    drop = max(0, T - F - least) // block * block
    if drop == 0:
        return cache
    first = drop + F  # the first column that stays as it is
    idx, all_places = cache.landmark_idx.to(torch.int64), _places(cache)
    if layer.scorer.causal:  # rows that differ in length are in blocks of their own
        last = idx.new_full((1,), cache.length) if cache.lengths is None else cache.lengths
        now = (last - 1).div(block, rounding_mode="floor")
        idx = _grown(layer, cache.energy, all_places, now, 1)[:, :, 0].to(torch.int64)
    gone = (idx >= 0) & (idx < first)
    column = torch.where(gone, idx, 0)
    places = all_places.expand(B, H, T).gather(-1, column)
    own = torch.arange(H, device=idx.device) // G  # the key head of each head
    batch = torch.arange(B, device=idx.device)[:, None, None]

    def kept(x: Tensor) -> Tensor:
        moved = torch.where(gone[..., None], x[batch, own[:, None], column], 0)
        return torch.cat((moved.reshape(B, H_kv, F, x.shape[-1]), x[:, :, first:]), 2)

    def spread(x: Tensor, empty: float) -> Tensor:  # (B, H, K) to each head's own slots (B, H, F)
        x = torch.where(gone, x, empty)
        slots = x.new_full((B, H, G, K), empty)
        head = torch.arange(H, device=x.device)
        slots[:, head, head % G] = x
        return slots.reshape(B, H, F)

    energy = spread(cache.energy.gather(-1, column), float("-inf"))
    slot = torch.arange(F, device=idx.device).view(G, K).repeat(H_kv, 1)  # (H, K)
    idx = torch.where(gone, slot, torch.where(idx < 0, -1, idx - drop))
    return cache._replace(
        keys=kept(cache.keys),
        values=kept(cache.values),
        energy=torch.cat((energy, cache.energy[..., first:]), -1),
        landmark_idx=idx.to(torch.int32),
        front=spread(places, -1),
        total=cache.length,
    )


def _places(cache: AttentionCache) -> Tensor:
    """Places in their own sequence of the columns' tokens, (B or 1, H or 1, T); < 0: none."""
    T = cache.columns
    lengths = cache.energy.new_full((1,), cache.length).long()
    if cache.lengths is not None:
        lengths = cache.lengths
    place = torch.arange(T, device=lengths.device) - T + lengths[:, None, None]
    if cache.front is None:
        return place
    B, H, F = cache.front.shape
    return torch.cat((cache.front, place[..., F:].expand(B, H, -1)), -1)


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
    n, scorer, seen = x.shape[1], layer.scorer, past.length
    positions = torch.arange(seen, seen + n, device=x.device)
    q, k, v, windows, source, values = layer._project(x, x_prev, positions)
    k, v = torch.cat((past.keys, k), 2), torch.cat((past.values, v), 2)
    scores, state = _scores(layer, source, values, past, None)
    idx = last = past.landmark_idx
    if scorer.causal:
        block = scorer.landmark_block
        if n > 1 or seen % block == 0:  # lists change at block boundaries only
            now = past._replace(keys=k, energy=scores, total=seen + n)
            before = torch.full((1,), seen, device=x.device)
            lists = (seen + n - 1) // block - seen // block + 1
            idx = _grown(layer, scores, _places(now), before // block, lists)
        else:
            idx = idx[:, :, None]
        last = idx[:, :, -1]
    out = layer._mix(q, k, v, windows, idx, scorer.gate(scores, idx), None)
    out = layer.out_proj(out.transpose(1, 2).reshape(x.shape))
    return out, windows, (k, v, scores, state, last, None, past.front, seen + n)


def extend_ragged(
    layer: DSALTAttention,
    x: Tensor,
    x_prev: Tensor | None,
    past: AttentionCache,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Fields]:
    """The same where rows differ in length, or where ``mask`` (B, n) leaves some tokens out."""
    B, n, _ = x.shape
    T, device = past.columns, x.device
    F = 0 if past.front is None else past.front.shape[-1]
    before = past.lengths
    if before is None:
        before = torch.full((B,), past.length, device=device)
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
        # slots of landmarks, then the columns of past and new tokens without holes between them
        column = torch.arange(T, device=device)
        token = (column >= T - before[:, None]) & (column >= F)
        key = torch.cat((token, valid), 1).to(torch.uint8) + 1
        key = torch.where(torch.arange(T + n, device=device) < F, 0, key)
        scores = scores.masked_fill((key == 1)[:, None], float("-inf"))
        kept = key.argsort(dim=-1, stable=True)
        k, v, scores = (_ordered(y, kept) for y in (k, v, scores))
        old = torch.where(old >= F, old + (n - fresh)[:, None, None], old)
    scores = _without_padding(scores, lengths, F)
    start = (k.shape[2] - lengths).clamp(min=0)  # [B], the first column that a row may see
    if past.front is not None:
        start = start.masked_fill((past.front >= 0).flatten(1).any(1), 0)
    longest = past.length + n
    now = past._replace(keys=k, energy=scores, lengths=lengths, total=longest)
    idx, row_list = _lists(layer, scores, _places(now), before, positions, old)
    row_start = torch.minimum(start[:, None], torch.arange(T, T + n, device=device))
    gates = layer.scorer.gate(scores, idx)
    call = Attention(q, k, v, windows, idx, gates, None, None, layer.window_ramp, None)
    rows = (row_start, row_list)
    out = attend(call, layer.normalizer, rows=rows, reach=layer.window.n_max)
    out = layer.out_proj(out.transpose(1, 2).reshape(x.shape))
    if mask is not None and order is not None:
        back = order.argsort(-1)
        out, windows = _ordered(out, back, 1), _ordered(windows, back)
        out = torch.where(mask[..., None], out, 0)
    last = idx[:, :, -1].to(torch.int32)
    return out, windows, (k, v, scores, state, last, lengths, past.front, longest)


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


def _without_padding(scores: Tensor, lengths: Tensor, front: int = 0) -> Tensor:
    """-inf before the first token of each row of (B, H, T), rows ending at the last column.

    The first ``front`` columns are slots of landmarks.
    """
    T = scores.shape[-1]
    column = torch.arange(T, device=scores.device)
    empty = (column < T - lengths[:, None, None]) & (column >= front)
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
    places: Tensor,
    before: Tensor,
    positions: Tensor,
    old: Tensor,
) -> tuple[Tensor, Tensor]:
    """Landmark lists (B, H, lists, K) as columns, and the list of each new token (B, n)."""
    if not layer.scorer.causal:
        return old[:, :, None], torch.zeros_like(positions)
    block, n = layer.scorer.landmark_block, positions.shape[1]
    first = before // block
    lists = _grown(layer, scores, places, first, (n + block - 2) // block + 1)
    return lists, (positions // block - first[:, None]).clamp(min=0)


def _grown(
    layer: DSALTAttention, scores: Tensor, places: Tensor, first: Tensor, n_lists: int
) -> Tensor:
    """Lists (B, H, n_lists, K) of blocks first, first + 1, ... (B or 1,), as columns."""
    scorer = layer.scorer
    compared = scorer.compared(scores)
    sinks = (places >= 0) & (places < scorer.n_sink)
    compared = torch.where(sinks & (scores != float("-inf")), float("inf"), compared)
    lists = []
    for u in range(n_lists):
        end = (first + u) * scorer.landmark_block
        allowed = (places >= 0) & (places < end[:, None, None])
        lists.append(_landmarks.select_global(compared, scorer.k, allowed))
    return torch.stack(lists, 2)
