"""Attention in tiles of rows that PyTorch differentiates, recomputed in the backward pass.

What has no kernel runs here: dropped weights, and scores that a callable changes. Memory is O(N).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shared_kernels import checks

from ._call import Attention, sequences
from ._tiles import Span, signed_distance

# (score, batch, head, query, key) -> score; the indices broadcast to the tile of scores.
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# Scores per tile: 2 MB in fp32.
TILE_SCORES = 1 << 19


def attention(
    call: Attention,
    normalize: Callable[[Tensor], Tensor],
    dropout_p: float = 0.0,
    score_mod: ScoreMod | None = None,
) -> Tensor:
    """o of a checked call; ``normalize`` makes (B, H, n, N_k) scores weights along the last dim."""
    (B, _, N_q, _), N_k = call.q.shape, call.k.shape[2]
    if call.varlen is None and call.cu_seqlens is None:
        every = slice(0, N_q), slice(0, N_k)
        return _sequence(call, normalize, dropout_p, score_mod, slice(0, B), *every)
    out = call.fake().zero_()
    for b, rows, keys in sequences(B, N_q, N_k, call.varlen, call.cu_seqlens):
        if rows.start < rows.stop and keys.start < keys.stop:
            batch = slice(b, b + 1)
            part = _sequence(call, normalize, dropout_p, score_mod, batch, rows, keys)
            out[batch, :, rows] = part
    return out


def _sequence(
    call: Attention,
    normalize: Callable[[Tensor], Tensor],
    dropout_p: float,
    score_mod: ScoreMod | None,
    batch: slice,
    rows: slice,
    keys: slice,
) -> Tensor:
    """The rows of one sequence (or of a batch of equal ones), tile by tile."""
    n_q, n_k, device = rows.stop - rows.start, keys.stop - keys.start, call.q.device
    k, v = call.k[batch, :, keys], call.v[batch, :, keys]
    B, H, H_kv = k.shape[0], call.q.shape[1], k.shape[1]
    mask, bias = (None if x is None else _part(x, batch, 0) for x in (call.mask, call.bias))
    mask, bias = (None if x is None else _part(x, keys, 3) for x in (mask, bias))

    def tile(span: Span) -> Tensor:
        queries = slice(rows.start + span.start, rows.start + span.stop)
        q = call.q[batch, :, queries] * call.scale
        products = q.unflatten(1, (H_kv, -1)).flatten(2, 3) @ k.mT
        scores = products.view(B, H, span.size, n_k)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if score_mod is not None:
            scores = _modified(score_mod, scores, batch, queries, keys)
        if bias is not None:
            scores = scores + _part(bias, queries, 2)
        distance = signed_distance(span, Span(0, n_k), n_k - n_q, device)
        if call.slopes is not None:
            scores = scores - call.slopes.to(scores.dtype).view(-1, 1, 1) * distance.abs()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if call.is_causal:
            hidden |= distance < 0
        if call.window is not None:
            hidden |= distance.abs() >= call.window
        if call.is_causal or call.window is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~_part(mask, queries, 2), -torch.inf)
        if call.s_aux is not None:
            sink = call.s_aux.to(scores.dtype).view(-1, 1, 1).expand(B, H, span.size, 1)
            scores = torch.cat([scores, sink], -1)
        p = F.dropout(normalize(scores)[..., :n_k], dropout_p).to(v.dtype)
        return (p.reshape(B, H_kv, -1, n_k) @ v).view(B, H, span.size, -1)

    step = max(1, TILE_SCORES // (B * H * n_k))
    spans = [Span(first, min(first + step, n_q)) for first in range(0, n_q, step)]
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(tile, span, use_reentrant=False) for span in spans], 2)
    return torch.cat([tile(span) for span in spans], 2)


def _part(x: Tensor, where: slice, dim: int) -> Tensor:
    """``x`` at ``where`` of a dimension in which it may have size 1."""
    return x if x.shape[dim] == 1 else x.narrow(dim, where.start, where.stop - where.start)


def _modified(
    score_mod: ScoreMod, scores: Tensor, batch: slice, queries: slice, keys: slice
) -> Tensor:
    sizes = batch, slice(0, scores.shape[1]), queries, keys
    b, h, i, j = (
        torch.arange(x.start, x.stop, device=scores.device).view(
            [-1 if at == dim else 1 for at in range(4)]
        )
        for dim, x in enumerate(sizes)
    )
    found = score_mod(scores, b, h, i, j)
    checks.floating("score_mod's result", found)
    wanted = tuple(scores.shape)
    checks.shape("score_mod's result", found, wanted, lambda: f"{wanted}, as its scores")
    return found.to(scores.dtype)
