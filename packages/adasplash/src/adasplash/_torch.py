"""Attention in plain PyTorch, on any device, by tiles of whole rows.

A tile is a few heads times a few queries times every key they may see, so each softmax-like row is
complete on the spot: no running maximum, and the backward needs one threshold per row. Memory is
O(N); a tile takes a few hundred KB, or one row where a single row is longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared_kernels import qexp
from shared_kernels.calls import replaced
from shared_kernels.rows import second_derivative, wide

from . import _dense, _support
from ._call import (
    ROOM,
    Attention,
    Lists,
    SecondDerivative,
    Statistics,
    per_head_sums,
    sequences,
)
from ._tiles import (
    Group,
    Span,
    below_top,
    groups,
    hidden_pairs,
    one_batch,
    row_tiles,
    signed_distance,
)

# Below this s a threshold in fp32 no longer fixes the weights to rounding: solve again instead.
_RESOLVE_BELOW = 0.03


def exponents(alpha: Tensor | None, value: float, dtype: torch.dtype) -> float | Tensor:
    """s = alpha - 1, as a float where all rows share it."""
    if alpha is None:
        return value - 1.0
    s = alpha.detach().to(dtype) - 1
    if s.numel() and bool((s == s.reshape(-1)[0]).all()):
        return float(alpha.reshape(-1)[0]) - 1.0
    return s


@dataclass(frozen=True)
class _Problem:
    """A call as its tiles are made: which pairs see each other, and how a score is made."""

    call: Attention  # mask and bias as (B, H, N_q, N_k) views; slopes and s_aux of every head
    shape: tuple[int, int, int, int, int]  # B, H_kv, G, N_q, N_k
    s: float | Tensor  # (H,) if it differs between heads
    lengths: list[tuple[int, slice, slice]]
    dtype: torch.dtype

    def s_rows(self, group: Group, n_rows: int) -> float | Tensor:
        """s for the rows of a tile: a float or (heads, G * n_rows, 1)."""
        if isinstance(self.s, float):
            return self.s
        s = self.s[group.heads].view(-1, group.G, 1)
        if s.numel() == 1:
            return s.item()
        return s.expand(-1, -1, n_rows).reshape(s.shape[0], -1, 1)

    def scores(self, q: Tensor, k: Tensor, group: Group, rows: Span, keys: Span) -> Tensor:
        """(heads, G * rows, keys, and the sink) scores, -inf where a query must not look."""
        return self.finished(self.products(q, k, keys), group, rows, keys)

    def products(self, q: Tensor, k: Tensor, keys: Span) -> Tensor:
        """(heads, G * rows, keys) products of queries and keys, capped."""
        out = torch.bmm(q, k[:, keys.start : keys.stop].mT)
        if self.call.softcap is not None:
            out.div_(self.call.softcap).tanh_().mul_(self.call.softcap)
        return out

    def cap_slope(self, products: Tensor) -> Tensor | None:
        """The derivative of capped products in those without a cap: 1 - tanh^2."""
        if self.call.softcap is None:
            return None
        return (products / self.call.softcap).square_().neg_().add_(1)

    def with_sink(self, x: Tensor, per_head: Tensor | None, group: Group, rows: Span) -> Tensor:
        """(heads, G * rows, keys) with the number of each head (0: None) in the sink's column."""
        if self.call.s_aux is None:
            return x
        column = x.new_zeros(group.n_heads, group.G, rows.size)
        if per_head is not None:
            column += per_head[group.heads].view(group.n_heads, group.G, 1)
        return torch.cat([x, column.view(*x.shape[:2], 1)], -1)

    def finished(self, out: Tensor, group: Group, rows: Span, keys: Span) -> Tensor:
        """The scores of a tile of capped products, which are overwritten."""
        call, tile = self.call, out.view(group.n_heads, group.G, rows.size, keys.size)
        if call.slopes is not None:
            distance = signed_distance(rows, keys, group.offset, out.device).abs_().to(self.dtype)
            slopes = call.slopes[group.heads].to(self.dtype).view(*tile.shape[:2], 1, 1)
            tile.addcmul_(slopes, distance, value=-1)
        if call.bias is not None:
            tile.add_(group.pairs(call.bias, rows, keys))
        for columns, hidden in hidden_pairs(
            rows, keys, group.offset, call.is_causal, call.window, out.device
        ):
            tile[..., columns].masked_fill_(hidden, -torch.inf)
        if call.mask is not None:
            tile.masked_fill_(group.pairs(call.mask, rows, keys).logical_not(), -torch.inf)
        return self.with_sink(out, call.s_aux, group, rows)


def _problem(call: Attention) -> _Problem:
    (B, H, N_q, _), (H_kv, N_k) = call.q.shape, call.k.shape[1:3]
    dtype = wide(call.q)
    s = exponents(call.alpha, call.alpha_value, dtype)
    if isinstance(s, Tensor):
        s = s.reshape(-1).repeat(H // max(1, s.numel()))
    slopes, s_aux = (
        None if x is None else x.detach().repeat(H // max(1, x.numel()))  # batch elements as heads
        for x in (call.slopes, call.s_aux)
    )
    mask, bias = (None if x is None else x.expand(B, H, N_q, N_k) for x in (call.mask, call.bias))
    s_aux = None if s_aux is None else s_aux.to(dtype)
    return _Problem(
        call=replaced(call, mask=mask, bias=bias, slopes=slopes, s_aux=s_aux),
        shape=(B, H_kv, H // max(1, H_kv), N_q, N_k),
        s=s,
        lengths=sequences(B, N_q, N_k, call.varlen, call.cu_seqlens),
        dtype=dtype,
    )


def _as_heads(call: Attention) -> Attention:
    """The call with its batch elements as further heads, where nothing tells them apart."""
    if call.varlen is None and call.cu_seqlens is None and call.mask is None and call.bias is None:
        return replaced(call, q=one_batch(call.q), k=one_batch(call.k), v=one_batch(call.v))
    return call


@torch.autocast("cpu", enabled=False)
def attention_forward(call: Attention) -> tuple[Tensor, Lists]:
    """o (B, H, N_q, D_v); theta, and the weights and keys of the tiles that are sparse."""
    o_shape, save, n_iter = (*call.q.shape[:3], call.v.shape[-1]), call.save, call.n_iter
    call = _as_heads(call)
    q, k, v = call.q, call.k, call.v
    problem = _problem(call)
    B, H, N_q, _ = q.shape
    dtype = problem.dtype
    o = torch.zeros(B, H, N_q, v.shape[-1], dtype=q.dtype, device=q.device)
    theta = torch.zeros(B, H, N_q, dtype=dtype, device=q.device)
    counts = torch.full_like(theta, -1, dtype=torch.int32)
    room = ROOM * counts.numel() if save else 0
    p_list = torch.zeros(room, dtype=dtype, device=q.device)
    key_list = torch.zeros(room, dtype=torch.int32, device=q.device)
    used = 0
    share = _support.MAX_SHARE if save else _support.MAX_SHARE_FORWARD
    for group in groups(problem.shape, problem.lengths):
        b_k, b_v = group.of_keys(k, dtype), group.of_keys(v, dtype)
        for rows, keys in row_tiles(group, call.is_causal, call.window):
            b_q = group.of_rows(q, rows, dtype) * call.scale
            scores = problem.scores(b_q, b_k, group, rows, keys)
            s = problem.s_rows(group, rows.size)
            bounds = _support.bounds(scores, s) if _has_bounds(call) else None
            found = None
            if bounds is not None and keys.size >= _support.MIN_KEYS:
                found = _support.solve(scores, bounds, s, n_iter, keys.start, group.n_k, share)
            if found is not None and (not save or used + found[0].key.numel() <= room):
                support, tau = found
                tau = tau.view(*scores.shape[:2], 1)
                part = support.times(b_v, support.p)
                if save:
                    end = used + support.key.numel()
                    p_list[used:end], key_list[used:end] = support.p, support.key
                    group.put_rows(counts, rows, support.size)
                    used = end
            elif bounds is not None and isinstance(s, float) and s == _dense.S:
                p, total, c = _dense.solve(bounds.flat.sub_(bounds.top), bounds.bound, n_iter)
                p = p.view(*scores.shape[:2], -1)[..., : keys.size]
                part = torch.bmm(p, b_v[:, keys.start : keys.stop])
                part.div_(total.view(*part.shape[:2], 1))
                tau = c * s
            else:
                p, tau = qexp.normalize(below_top(scores), s, n_iter)
                part = torch.bmm(p[..., : keys.size], b_v[:, keys.start : keys.stop])
            group.put_rows(o, rows, part)
            group.put_rows(theta, rows, (tau + 1) / _positive(s))
    if not save:
        theta, counts = theta.new_empty(0), counts.new_empty(0)
        return o.view(o_shape), Lists(theta, p_list, key_list, counts)
    theta, counts = theta.view(o_shape[:3]), counts.view(o_shape[:3])
    return o.view(o_shape), Lists(theta, p_list, key_list, counts)


@torch.autocast("cpu", enabled=False)
@torch.no_grad()
def attention_stats(call: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Support and tau of each query; squares with a weight, visited (all), visible per head."""
    q, k, tile = call.q, call.k, call.square
    problem = _problem(call)
    B, H, N_q, _ = q.shape
    support = torch.zeros(B, H, N_q, dtype=torch.int64, device=q.device)
    tau = torch.full((B, H, N_q), torch.nan, dtype=problem.dtype, device=q.device)
    used = torch.zeros(B, H, dtype=torch.int64, device=q.device)
    seen = torch.zeros_like(used)
    for group in groups(problem.shape, problem.lengths):
        b_k = group.of_keys(k, problem.dtype)
        for rows, keys in row_tiles(group, call.is_causal, call.window, at_most=tile):
            b_q = group.of_rows(q, rows, problem.dtype) * call.scale
            scores = problem.scores(b_q, b_k, group, rows, keys)
            p, t = qexp.normalize(scores, problem.s_rows(group, rows.size), call.n_iter)
            p, scores = p[..., : keys.size], scores[..., : keys.size]
            group.put_rows(support, rows, (p > 0).sum(-1))
            some = (scores > -torch.inf).any(-1, keepdim=True)
            group.put_rows(tau, rows, t.masked_fill_(~some, torch.nan))
            for flags, count in ((p > 0, used), (scores > -torch.inf, seen)):
                flags = flags.reshape(-1, rows.size, keys.size).any(1)
                first = keys.start % tile
                flags = torch.nn.functional.pad(flags, (first, -(first + keys.size) % tile))
                count[group.b, group.heads] += flags.unflatten(-1, (-1, tile)).any(-1).sum(-1)
    return support, tau, used, seen.clone(), seen


def _has_bounds(call: Attention) -> bool:
    """Whether thresholds of subsets of the keys are worth it; a list holds keys and no sink."""
    return call.bias is None and call.s_aux is None and call.softcap is None


def _positive(s: float | Tensor) -> float | Tensor:
    return s.clamp(min=2.0**-40) if isinstance(s, Tensor) else max(s, 2.0**-40)


@torch.autocast("cpu", enabled=False)
def attention_backward(
    call: Attention, saved: Lists, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of q, k and v, and of alpha, bias, slopes and s_aux if they are needed."""
    first, H, n_iter = call, call.q.shape[1], call.n_iter
    need_alpha, need_bias, need_slopes = (x in needs for x in ("alpha", "bias", "slopes"))
    call = _as_heads(call)
    q, k, v, bias, scale = call.q, call.k, call.v, call.bias, call.scale
    do, theta, counts = d_out, saved.theta, saved.counts
    if call.q is not first.q:
        do, theta, counts = one_batch(do), one_batch(theta), one_batch(counts)
    problem = _problem(call)
    dtype = problem.dtype
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    d_alpha = torch.zeros(H if need_alpha else 0, dtype=dtype, device=q.device)
    d_slopes = torch.zeros(H if need_slopes else 0, dtype=dtype, device=q.device)
    d_s_aux = torch.zeros(0 if call.s_aux is None else H, dtype=dtype, device=q.device)
    used = 0
    bias_shape = bias.shape if need_bias and bias is not None else (0,)
    d_bias = torch.zeros(bias_shape, dtype=dtype, device=q.device)
    for group in groups(problem.shape, problem.lengths):
        b_k, b_v = group.of_keys(k, dtype), group.of_keys(v, dtype)
        g_k, g_v = torch.zeros_like(b_k), torch.zeros_like(b_v)
        for rows, keys in row_tiles(group, call.is_causal, call.window):
            seen = slice(keys.start, keys.stop)
            b_q, b_do = group.of_rows(q, rows, dtype) * scale, group.of_rows(do, rows, dtype)
            s = problem.s_rows(group, rows.size)
            count = group.of_rows(counts, rows, torch.int64).view(-1)
            if bias is None and int(count[0]) >= 0:
                end = used + int(count.sum())
                support = _support.Support(
                    saved.keys[used:end].long(), saved.weights[used:end], count
                )
                used = end
                part, ds, d_scores = _support.backward(
                    support, b_q, b_k, b_v, b_do, s, g_k, g_v, need_alpha
                )
                group.put_rows(dq, rows, part.mul_(scale))
                if need_slopes:
                    row = support.rows()
                    query = row % rows.size + (rows.start + group.offset)
                    d_scores.mul_((query - support.key % group.n_k).abs_())
                    d_rows = torch.zeros(count.numel(), dtype=dtype, device=q.device)
                    d_rows.index_add_(0, row, d_scores, alpha=-1)
                    d_slopes.index_add_(0, group.head_index(H, q.device), _by_head(d_rows, rows))
                if ds is not None:
                    d_alpha.index_add_(0, group.head_index(H, q.device), _by_head(ds, rows))
                continue
            products = problem.products(b_q, b_k, keys)
            cap_slope = problem.cap_slope(products)
            scores = below_top(problem.finished(products, group, rows, keys))
            if (
                isinstance(s, float)
                and s == _dense.S
                and cap_slope is None
                and call.s_aux is None
                and not (need_alpha or need_bias or need_slopes)
            ):
                part = _dense.backward(
                    scores,
                    group.of_rows(theta, rows, dtype),
                    b_q,
                    b_k[:, seen],
                    b_v[:, seen],
                    b_do,
                    g_k[:, seen],
                    g_v[:, seen],
                )
                group.put_rows(dq, rows, part.mul_(scale))
                continue
            p, u = _weights(scores, s, group.of_rows(theta, rows, dtype), n_iter)
            g_v[:, seen].baddbmm_(p[..., : keys.size].mT, b_do)
            dp = torch.bmm(b_do, b_v[:, seen].mT)
            dp = problem.with_sink(dp, None, group, rows)
            if need_alpha:
                ds = qexp.backward_s(dp, p, s)
                d_alpha.index_add_(0, group.head_index(H, q.device), _by_head(ds, rows))
            mass = u.sum(-1, keepdim=True)
            mean = (u * dp).sum(-1, keepdim=True).div_(mass.masked_fill_(mass == 0, 1.0))
            d_scores = u.mul_(dp.sub_(mean))
            if call.s_aux is not None:
                index = group.head_index(H, q.device)
                d_s_aux.index_add_(0, index, _by_head(d_scores[..., -1], rows))
                d_scores = d_scores[..., :-1]
            if need_bias:
                group.add_pairs(d_bias, rows, keys, d_scores)
            if need_slopes:
                _add_slopes(d_slopes, d_scores, group, rows, keys)
            if cap_slope is not None:
                d_scores = d_scores.mul_(cap_slope)
            group.put_rows(dq, rows, torch.bmm(d_scores, b_k[:, seen]).mul_(scale))
            g_k[:, seen].baddbmm_(d_scores.mT, b_q)
        group.add_keys(dk, g_k)
        group.add_keys(dv, g_v)
    found = {
        "q": dq.view(first.q.shape),
        "k": dk.view(first.k.shape).to(k.dtype),
        "v": dv.view(first.v.shape).to(v.dtype),
    }
    if first.alpha is not None and need_alpha:
        found["alpha"] = per_head_sums(d_alpha, first.alpha)
    if bias is not None and need_bias:
        found["bias"] = d_bias.to(bias.dtype)
    if first.slopes is not None and need_slopes:
        found["slopes"] = d_slopes.to(first.slopes.dtype)
    if first.s_aux is not None:
        found["s_aux"] = d_s_aux.to(first.s_aux.dtype)
    return found


@torch.autocast("cpu", enabled=False)
@torch.no_grad()
def attention_second_backward(call: SecondDerivative) -> tuple[Tensor, ...]:
    """The derivative of sum <to_x, dx> over the results dx of :func:`attention_backward`.

    That sum is <lead, dS> + <to_alpha, dalpha> + <do to_v^T, P> with
    lead = cap' x + to_bias - to_slopes |distance|, x = scale (to_q k^T + q to_k^T), and to_s_aux at
    the sink, tile by tile; weights are solved for again. -> those of d_out, q, k, v, alpha, bias,
    slopes and s_aux.
    """
    q, k, v, do = call.q, call.k, call.v, call.d_out
    bias, to_bias, to_slopes, scale = call.bias, call.to_bias, call.to_slopes, call.scale
    problem = _problem(call.first)
    H, dtype = q.shape[1], problem.dtype
    to_q, to_k, to_v = (
        torch.zeros_like(x) if to is None else to
        for x, to in ((q, call.to_q), (k, call.to_k), (v, call.to_v))
    )
    heads = torch.zeros(H, dtype=dtype, device=q.device)
    to_alpha = heads
    if call.to_alpha is not None:
        to_alpha = call.to_alpha.reshape(-1).to(q.device, dtype).expand(H)
    to_bias = None if to_bias is None else to_bias.expand(*q.shape[:3], k.shape[2])
    d_do, d_q, d_k, d_v = (torch.zeros_like(x, dtype=dtype) for x in (do, q, k, v))
    d_alpha, d_slopes, d_s_aux = (torch.zeros_like(heads) for _ in range(3))
    to_s_aux = None if call.to_s_aux is None else call.to_s_aux.to(dtype)
    to_sinks = None if to_s_aux is None else to_s_aux.repeat(H // max(1, to_s_aux.numel()))
    d_bias = torch.zeros(0 if bias is None else bias.shape, dtype=dtype, device=q.device)
    for group in groups(problem.shape, problem.lengths):
        b_k, b_v, t_k, t_v = (group.of_keys(x, dtype) for x in (k, v, to_k, to_v))
        g_k, g_v = torch.zeros_like(b_k), torch.zeros_like(b_v)
        index = group.head_index(H, q.device)
        for rows, keys in row_tiles(group, call.is_causal, call.window):
            seen = slice(keys.start, keys.stop)
            b_q, b_do, t_q = (group.of_rows(x, rows, dtype) for x in (q, do, to_q))
            s = problem.s_rows(group, rows.size)
            products = problem.products(b_q * scale, b_k, keys)
            cap_slope, capped = problem.cap_slope(products), None
            if cap_slope is not None:
                capped = products.clone()
            p, _ = qexp.normalize(problem.finished(products, group, rows, keys), s, call.n_iter)
            lead = torch.bmm(t_q, b_k[:, seen].mT).baddbmm_(b_q, t_k[:, seen].mT).mul_(scale)
            bend = None  # the derivative of cap' x in the products
            if cap_slope is not None and capped is not None and call.softcap is not None:
                bend = capped.mul_(-2 / call.softcap**2).mul_(cap_slope).mul_(lead)
                lead.mul_(cap_slope)
            tile = lead.view(group.n_heads, group.G, rows.size, -1)
            if to_bias is not None:
                tile += group.pairs(to_bias, rows, keys)
            if to_slopes is not None:
                distance = signed_distance(rows, keys, group.offset, q.device).abs_().to(dtype)
                tile -= to_slopes.to(dtype)[index].view(*tile.shape[:2], 1, 1) * distance
            w = to_alpha[index].view(*tile.shape[:2], 1).expand(-1, -1, rows.size)
            w = w.reshape(*lead.shape[:2], 1)
            dp = problem.with_sink(torch.bmm(b_do, b_v[:, seen].mT), None, group, rows)
            lead = problem.with_sink(lead, to_sinks, group, rows)
            s_of = torch.as_tensor(s, dtype=dtype, device=p.device)
            d_dp, d_p, ds = second_derivative(lead, w, dp, p, s_of)
            d_p[..., : keys.size] += torch.bmm(b_do, t_v[:, seen].mT)
            d_scores, ds_more = qexp.backward_both(d_p, p, s)
            d_alpha.index_add_(0, index, _by_head(ds + ds_more, rows))
            first = qexp.backward(dp, p, s)
            if call.s_aux is not None:
                d_s_aux.index_add_(0, index, _by_head(d_scores[..., -1], rows))
                d_scores, first, d_dp, p = (x[..., :-1] for x in (d_scores, first, d_dp, p))
            if bias is not None:
                group.add_pairs(d_bias, rows, keys, d_scores)
            _add_slopes(d_slopes, d_scores, group, rows, keys)
            if cap_slope is not None and bend is not None:
                d_scores = d_scores * cap_slope + bend.mul_(first)
                first = first * cap_slope
            part = torch.bmm(d_scores, b_k[:, seen]).baddbmm_(first, t_k[:, seen])
            group.put_rows(d_q, rows, part.mul_(scale))
            part = torch.bmm(d_dp, b_v[:, seen]).baddbmm_(p, t_v[:, seen])
            group.put_rows(d_do, rows, part)
            g_k[:, seen] += (d_scores.mT @ b_q).baddbmm_(first.mT, t_q).mul_(scale)
            g_v[:, seen].baddbmm_(d_dp.mT, b_do)
        group.add_keys(d_k, g_k)
        group.add_keys(d_v, g_v)
    nothing = q.new_empty(0)
    return (
        *(x.to(q.dtype) for x in (d_do, d_q, d_k, d_v)),
        nothing if call.alpha is None else per_head_sums(d_alpha, call.alpha),
        nothing if bias is None else d_bias.to(bias.dtype),
        nothing if call.slopes is None else d_slopes.to(call.slopes.dtype),
        nothing if call.s_aux is None else d_s_aux.to(call.s_aux.dtype),
    )


def _add_slopes(d_slopes: Tensor, d_scores: Tensor, group: Group, rows: Span, keys: Span) -> None:
    """Subtract the sums of d_scores times the distance, which a slope multiplies, of each head."""
    distance = signed_distance(rows, keys, group.offset, d_scores.device).abs_().to(d_scores.dtype)
    sums = (d_scores.view(-1, *distance.shape) * distance).sum((1, 2))
    d_slopes.index_add_(0, group.head_index(d_slopes.numel(), sums.device), sums, alpha=-1)


def _by_head(rows_of_heads: Tensor, rows: Span) -> Tensor:
    """Sums over the queries of a tile. -> (heads * G,)"""
    return rows_of_heads.reshape(-1, rows.size).sum(-1)


def _weights(
    scores: Tensor, s: float | Tensor, theta: Tensor, n_iter: int
) -> tuple[Tensor, Tensor]:
    """The weights p again, and u = p^(1-s), from the saved threshold.

    ``scores``, less the largest of their row, is overwritten.
    """
    smallest = s if isinstance(s, float) else float(s.min())
    tiny = torch.finfo(scores.dtype).tiny
    if smallest < _RESOLVE_BELOW:
        p = qexp.normalize(scores, s, n_iter)[0]
        return p, p.clamp(min=tiny).log_().mul_(1 - s).exp_().mul_(p != 0)
    u = scores.mul_(s).sub_(s * theta - 1).clamp_(min=0)
    if isinstance(s, float) and s == 0.5:  # p = u^2 / F: nothing to exponentiate
        norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        u.div_(norm.masked_fill_(norm == 0, 1.0))
        return u * u, u
    if isinstance(s, float) and s == 1.0:
        total = u.sum(-1, keepdim=True)
        u.div_(total.masked_fill_(total == 0, 1.0))
        return u, torch.where(u > 0, 1.0, u)
    log_u = u.clamp(min=tiny).log_()
    inside = (u != 0).to(u.dtype)
    p = (log_u * (1 / s)).exp_().mul_(inside)
    g = log_u.mul_(1 / s - 1).exp_().mul_(inside)
    total = p.sum(-1, keepdim=True)
    return p.div_(total.masked_fill_(total == 0, 1.0)), g
