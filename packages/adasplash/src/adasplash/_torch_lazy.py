"""Lazy attention in plain PyTorch: the same tiles of whole rows, with an elastic softmax.

A score of -inf, which a bias of -inf makes, hides its pair as the mask does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shared_kernels.calls import replaced
from shared_kernels.rows import wide

from ._call import Lazy, LazySecondDerivative, RowSums, sequences
from ._tiles import Group, Span, below_top, groups, hidden_pairs, one_batch, row_tiles

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class _Problem:
    bias: Tensor  # (H, window_size + 1)
    tau: Tensor  # (H,)
    window_size: int
    mask: Tensor | None  # (B, H, N, N) view
    only_future: bool  # nothing else is hidden: no mask, and no other score can be -inf

    def near(self, rows: Span) -> Span:
        """The keys at most ``window_size`` behind some query of the tile."""
        return Span(max(0, rows.start - self.window_size), rows.stop)

    def scores(self, q: Tensor, k: Tensor, group: Group, rows: Span, keys: Span) -> Tensor:
        """(heads, G, rows, keys) scores, -inf where a query must not look."""
        out = torch.bmm(q, k[:, keys.start : keys.stop].mT)
        tile = out.view(group.n_heads, group.G, rows.size, keys.size)
        near = self.near(rows)
        by_distance = self.bias[group.heads].view(group.n_heads, group.G, -1)
        tile[..., near.start :] += _by_pair(by_distance, rows, near)
        _hide_future_(tile, rows, keys, -torch.inf)
        if self.mask is not None:
            tile.masked_fill_(group.pairs(self.mask, rows, keys).logical_not(), -torch.inf)
        return tile

    def hidden(self, scores: Tensor) -> Tensor | None:
        """Where a query does not look, but for the future if that is all."""
        return None if self.only_future else scores == -torch.inf

    def lift(self, group: Group, rows: Span) -> Tensor:
        """tau_h / i for the i-th query of its sequence, from 1. -> (heads, G, rows, 1)"""
        tau = self.tau[group.heads].view(group.n_heads, group.G, 1)
        return (tau / _ordinals(rows, tau)).unsqueeze(-1)


def _softmax_(scores: Tensor) -> Tensor:
    """Turn scores into weights, in place; a row that sees nothing into zeros.

    -> (..., 1), log2 of the sum of each row's exponentials beside its largest score.
    """
    total = below_top(scores).mul_(_LOG2_E).exp2_().sum(-1, keepdim=True)
    total.masked_fill_(total == 0, 1.0)
    scores.div_(total)
    return total.log2_()


def _hide_future_(tile: Tensor, rows: Span, keys: Span, value: float) -> None:
    """Write ``value`` into (heads, G, rows, keys) where a key comes after its query."""
    for columns, future in hidden_pairs(rows, keys, 0, True, None, tile.device):
        tile[..., columns].masked_fill_(future, value)


def _cut_(lifted: Tensor, hidden: Tensor | None, rows: Span, keys: Span) -> Tensor:
    """Weights from the softmax plus tau / i, in place: those below 0, and hidden ones, become 0."""
    lifted.clamp_(min=0)
    if hidden is None:
        _hide_future_(lifted, rows, keys, 0.0)
        return lifted
    return lifted.masked_fill_(hidden, 0.0)


def _ordinals(rows: Span, like: Tensor) -> Tensor:
    """1, 2, ... for the queries of a tile, counted from the start of the sequence."""
    first, behind = rows.start + 1, rows.stop + 1
    return torch.arange(first, behind, dtype=like.dtype, device=like.device)


def _by_pair(by_distance: Tensor, rows: Span, keys: Span) -> Tensor:
    """b[i - j] for every pair, 0 where i - j is not in [0, window]. -> (..., rows, keys)"""
    n, m = rows.size, keys.size
    farthest = rows.stop - 1 - keys.start
    known = min(by_distance.shape[-1], farthest + 1)
    # line[t] belongs to distance farthest - t, t = 0 .. n + m - 2
    line = by_distance.new_zeros(*by_distance.shape[:-1], n + m - 1)
    line[..., farthest + 1 - known : farthest + 1] = by_distance[..., :known].flip(-1)
    # row r starts at distance rows.start + r - keys.start, which is t = n - 1 - r
    return line.unfold(-1, m, 1).flip(-2)


def _by_distance(pairs: Tensor, rows: Span, keys: Span, size: int) -> Tensor:
    """The transpose of :func:`_by_pair`: sums over the pairs of equal distance. -> (..., size)"""
    n, m = rows.size, keys.size
    farthest = rows.stop - 1 - keys.start
    sheared = pairs.new_zeros(*pairs.shape[:-2], n, n + m)
    sheared[..., :m] = pairs.flip(-2)
    # One column less per row shifts row r by r: equal distances fall into one column.
    line = sheared.flatten(-2)[..., : n * (n + m - 1)].unflatten(-1, (n, n + m - 1)).sum(-2)
    known = min(size, farthest + 1)
    out = pairs.new_zeros(*pairs.shape[:-2], size)
    out[..., :known] = line[..., farthest + 1 - known : farthest + 1].flip(-1)
    return out


def _are_bounded(call: Lazy | LazySecondDerivative, bias: Tensor) -> bool:
    """Whether no score can be -inf, by the norms of all queries, keys and biases.

    Asked on the CPU alone: elsewhere the answer would have to be waited for.
    """
    if call.q.device.type != "cpu":
        return False
    q, k, b = (torch.linalg.vector_norm(x, dtype=bias.dtype) for x in (call.q, call.k, bias))
    return math.isfinite(q * k * abs(call.scale) + b)


def _problem(call: Lazy | LazySecondDerivative, bias: Tensor, tau: Tensor) -> _Problem:
    B, H, N, _ = call.q.shape
    repeats, dtype = H // max(1, tau.shape[0]), wide(call.q)  # batch elements may be heads
    bias = bias.detach().to(dtype)
    return _Problem(
        bias=bias.repeat(repeats, 1),
        tau=tau.detach().to(dtype).repeat(repeats),
        window_size=call.window_size,
        mask=None if call.mask is None else call.mask.expand(B, H, N, N),
        only_future=call.mask is None and _are_bounded(call, bias),
    )


def _as_heads(call: Lazy) -> Lazy:
    """The call with its batch elements as further heads, where nothing tells them apart."""
    if call.varlen is None and call.mask is None:
        return replaced(call, q=one_batch(call.q), k=one_batch(call.k), v=one_batch(call.v))
    return call


def _groups(call: Lazy | LazySecondDerivative) -> Iterator[Group]:
    (B, H, N, _), H_kv = call.q.shape, call.k.shape[1]
    lengths = sequences(B, N, N, call.varlen, None)
    return groups((B, H_kv, H // max(1, H_kv), N, N), lengths)


@torch.autocast("cpu", enabled=False)
def lazy_forward(call: Lazy) -> tuple[Tensor, RowSums]:
    """o, and what the backward pass divides the weights by."""
    o_shape, dtype, scale = (*call.q.shape[:3], call.v.shape[-1]), wide(call.q), call.scale
    call = _as_heads(call)
    q, k, v = call.q, call.k, call.v
    B, H, N, _ = q.shape
    problem = _problem(call, call.bias, call.tau)
    o = torch.zeros(B, H, N, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.zeros(B, H, N, dtype=dtype, device=q.device)
    for group in _groups(call):
        b_k, b_v = group.of_keys(k, dtype), group.of_keys(v, dtype)
        for rows, keys in row_tiles(group, True, None):
            b_q, seen = group.of_rows(q, rows, dtype) * scale, b_v[:, keys.start : keys.stop]
            w = problem.scores(b_q, b_k, group, rows, keys)
            hidden = problem.hidden(w)
            row_lse = _softmax_(w)
            _cut_(w.add_(problem.lift(group, rows)), hidden, rows, keys)
            group.put_rows(o, rows, torch.bmm(w.flatten(1, 2), seen))
            group.put_rows(lse, rows, row_lse)
    return o.view(o_shape), RowSums(lse.view(o_shape[:3]) if call.save else lse.new_empty(0))


@torch.autocast("cpu", enabled=False)
def lazy_backward(
    call: Lazy, saved: RowSums, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of q, k, v, bias and tau."""
    first, do, lse = call, d_out, saved.lse
    bias, tau, scale, window_size = call.bias, call.tau, call.scale, call.window_size
    n_bias_heads, dtype = tau.shape[0], lse.dtype
    call = _as_heads(call)
    q, k, v = call.q, call.k, call.v
    if q is not first.q:
        do, lse = one_batch(do), one_batch(lse)
    problem = _problem(call, bias, tau)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    d_bias = torch.zeros(bias.shape, dtype=dtype, device=q.device)
    d_tau = torch.zeros(tau.shape, dtype=dtype, device=q.device)
    for group in _groups(call):
        b_k, b_v = group.of_keys(k, dtype), group.of_keys(v, dtype)
        g_k, g_v = torch.zeros_like(b_k), torch.zeros_like(b_v)
        heads = group.head_index(n_bias_heads, q.device)
        for rows, keys in row_tiles(group, True, None):
            seen, near = slice(keys.start, keys.stop), problem.near(rows)
            b_q, b_do = group.of_rows(q, rows, dtype) * scale, group.of_rows(do, rows, dtype)
            p = problem.scores(b_q, b_k, group, rows, keys)
            hidden = problem.hidden(p)
            row_lse = group.of_rows(lse, rows, dtype).view(*p.shape[:3], 1)
            below_top(p).mul_(_LOG2_E).sub_(row_lse).exp2_()
            w = _cut_(p + problem.lift(group, rows), hidden, rows, keys)
            g_v[:, seen].baddbmm_(w.flatten(1, 2).mT, b_do)
            dw = torch.bmm(b_do, b_v[:, seen].mT).view_as(p).mul_(w > 0)
            d_tau.index_add_(0, heads, (dw.sum(-1) / _ordinals(rows, lse)).sum(-1).flatten())
            delta = (p * dw).sum(-1, keepdim=True)
            ds = dw.sub_(delta).mul_(p)
            by_distance = _by_distance(ds[..., near.start :], rows, near, window_size + 1)
            d_bias.index_add_(0, heads, by_distance.flatten(0, 1))
            ds = ds.flatten(1, 2)
            group.put_rows(dq, rows, torch.bmm(ds, b_k[:, seen]).mul_(scale))
            g_k[:, seen].baddbmm_(ds.mT, b_q)
        group.add_keys(dk, g_k)
        group.add_keys(dv, g_v)
    return {
        "q": dq.view(first.q.shape),
        "k": dk.view(first.k.shape).to(k.dtype),
        "v": dv.view(first.v.shape).to(v.dtype),
        "bias": d_bias.to(bias.dtype),
        "tau": d_tau.to(tau.dtype),
    }


@torch.autocast("cpu", enabled=False)
@torch.no_grad()
def lazy_second_backward(call: LazySecondDerivative) -> tuple[Tensor, ...]:
    """The derivative of sum <to_x, dx> over the results dx of :func:`lazy_backward`.

    With a = [w > 0] dw that sum is <lead, p (a - <p, a>)> + <do to_v^T, w> + to_tau sum a / i, and
    lead = scale (to_q k^T + q to_k^T) + to_bias[i - j]. -> those of d_out, q, k, v, bias and tau.
    """
    q, k, v, bias, tau, do = call.q, call.k, call.v, call.bias, call.tau, call.d_out
    to_q, to_k, to_v, to_bias, to_tau = (
        torch.zeros_like(x) if to is None else to
        for x, to in (
            (q, call.to_q),
            (k, call.to_k),
            (v, call.to_v),
            (bias, call.to_bias),
            (tau, call.to_tau),
        )
    )
    scale, window_size, dtype = call.scale, call.window_size, wide(q)
    H = q.shape[1]
    problem, above = _problem(call, bias, tau), _problem(call, to_bias, to_tau)
    d_do, d_q, d_k, d_v = (torch.zeros_like(x, dtype=dtype) for x in (do, q, k, v))
    d_bias, d_tau = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (bias, tau))
    for group in _groups(call):
        b_k, b_v, t_k, t_v = (group.of_keys(x, dtype) for x in (k, v, to_k, to_v))
        g_k, g_v = torch.zeros_like(b_k), torch.zeros_like(b_v)
        heads = group.head_index(H, q.device)
        for rows, keys in row_tiles(group, True, None):
            seen, near = slice(keys.start, keys.stop), problem.near(rows)
            b_q, b_do, t_q = (group.of_rows(x, rows, dtype) for x in (q, do, to_q))
            p = problem.scores(b_q * scale, b_k, group, rows, keys)
            hidden = problem.hidden(p)
            _softmax_(p)
            w = _cut_(p + problem.lift(group, rows), hidden, rows, keys)
            active = (w > 0).to(dtype)
            lead = torch.bmm(t_q, b_k[:, seen].mT).baddbmm_(b_q, t_k[:, seen].mT).mul_(scale)
            lead = lead.view_as(p)
            by_distance = above.bias[group.heads].view(group.n_heads, group.G, -1)
            lead[..., near.start :] += _by_pair(by_distance, rows, near)
            a = torch.bmm(b_do, b_v[:, seen].mT).view_as(p).mul_(active)
            mean_a, mean_lead = ((p * x).sum(-1, keepdim=True) for x in (a, lead))
            first = p * (a - mean_a)
            d_dw = (p * (lead - mean_lead) + above.lift(group, rows)).mul_(active)
            d_w = torch.bmm(b_do, t_v[:, seen].mT).view_as(p).mul_(active)
            d_tau.index_add_(0, heads, (d_w.sum(-1) / _ordinals(rows, p)).sum(-1).flatten())
            d_p = lead * (a - mean_a) - mean_lead * a + d_w
            ds = p * (d_p - (p * d_p).sum(-1, keepdim=True))
            by_distance = _by_distance(ds[..., near.start :], rows, near, window_size + 1)
            d_bias.index_add_(0, heads, by_distance.flatten(0, 1))
            first, d_dw, ds, w = (x.flatten(1, 2) for x in (first, d_dw, ds, w))
            part = torch.bmm(ds, b_k[:, seen]).baddbmm_(first, t_k[:, seen])
            group.put_rows(d_q, rows, part.mul_(scale))
            part = torch.bmm(d_dw, b_v[:, seen]).baddbmm_(w, t_v[:, seen])
            group.put_rows(d_do, rows, part)
            g_k[:, seen] += torch.bmm(ds.mT, b_q).baddbmm_(first.mT, t_q).mul_(scale)
            g_v[:, seen].baddbmm_(d_dw.mT, b_do)
        group.add_keys(d_k, g_k)
        group.add_keys(d_v, g_v)
    d_bias, d_tau = d_bias.to(bias.dtype), d_tau.to(tau.dtype)
    return *(x.to(q.dtype) for x in (d_do, d_q, d_k, d_v)), d_bias, d_tau


def newest(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor, window_size: int) -> Tensor:
    """The newest n of T queries against a cache of T keys, 128 queries at a time: O(T) memory.

    Plain PyTorch, on any device and differentiable; n is a few when one decodes.
    """
    n, T, rows = q.shape[2], k.shape[2], []
    exact = wide(q)
    for start in range(0, n, 128):
        part = q[:, :, start : start + 128]
        i = torch.arange(T - n + start, T - n + start + part.shape[2], device=q.device)[:, None]
        behind = i - torch.arange(T, device=q.device)
        near = (behind >= 0) & (behind <= window_size)
        added = bias[:, behind.clamp(0, window_size)].to(exact).masked_fill(~near, 0.0)
        scores = (part.to(exact) @ k.mT.to(exact)) * q.shape[-1] ** -0.5 + added
        scores = scores.masked_fill(behind < 0, -torch.inf)
        hidden = scores == -torch.inf
        weights = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0).softmax(-1)
        weights = (weights + tau.to(exact)[:, None, None] / (i + 1)).relu()
        rows.append(weights.masked_fill(hidden, 0.0) @ v.to(exact))
    return torch.cat(rows, 2).to(q.dtype) if rows else q.new_empty(*q.shape[:3], v.shape[-1])
