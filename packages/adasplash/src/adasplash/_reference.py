"""The specification: dense maths in the shortest readable form, any dtype including float64.

Gradients come from autograd. They are exact, twice, although the threshold is found by bisection:
autograd sees the last two steps, which are Newton's (implicit differentiation).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from shared_kernels.calls import replaced

from ._call import SQUARE, Attention, Lazy, Statistics, sequences


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """y = [(alpha-1) x - tau]_+ ^ (1/(alpha-1)) with sum(y) = 1; softmax where alpha = 1.

    ``alpha`` is a number or a tensor that broadcasts over the rows (size 1 in ``dim``). A row of
    nothing but -inf gives zeros.
    """
    if not x.numel():
        return x.clone()
    exact = x.double() if x.dtype != torch.float64 else x
    s = torch.as_tensor(alpha, dtype=torch.float64, device=x.device) - 1
    empty = (exact == -torch.inf).all(dim, keepdim=True)
    exact = exact.masked_fill(empty, 0.0)
    exact = exact - exact.detach().amax(dim, keepdim=True)
    y = _solve(exact, s, dim)
    softmax = torch.softmax(exact.detach(), dim) + (y - y.detach())  # to the last bit
    return torch.where(s > 0, y, softmax).masked_fill(empty, 0.0).to(x.dtype)


def _log_weight(z: Tensor, s: Tensor) -> Tensor:
    """log([1 + s z]_+ ** (1/s)) = log1p(s z) / s: a series where s z is small, as far as s = 0."""
    u = s * z
    series = torch.zeros_like(u)
    for k in range(9, 0, -1):  # 1 - u/2 + u^2/3 - ...
        series = 1 / k - u * series
    small = u.abs() < 1e-2
    log = torch.log1p(torch.where(small, 1.0, u))
    return torch.where(small, z * series, log / torch.where(small, 1.0, s))


def _solve(x: Tensor, s: Tensor, dim: int) -> Tensor:
    """Weights [1 + s (x - t)]_+ ** (1/s), softmax where s = 0. ``x`` has row maximum 0."""

    def weights(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        inside = s * (x - t) > -1
        return torch.where(inside, _log_weight(torch.where(inside, x - t, 0.0), s).exp(), 0.0)

    fixed, held = x.detach(), s.detach()
    # the largest weight is 1 at t = 0, and 1/N where all N are equal
    low = torch.zeros_like(fixed.amax(dim, keepdim=True))
    longest = math.log(x.shape[dim])
    high = torch.where(held > 0, -torch.expm1(-held * longest) / held, longest) + low
    positive = torch.where(held > 0, held, 1.0)
    for _ in range(60):  # what is left of log N is less than a float64 tells beside 1
        t = (low + high) / 2
        z = fixed - t
        log = torch.where(held > 0, torch.log1p((held * z).clamp(min=-1)) / positive, z)
        too_heavy = log.exp().sum(dim, keepdim=True) >= 1
        low, high = torch.where(too_heavy, t, low), torch.where(too_heavy, high, t)
    t = low
    for _ in range(2):  # the first carries the first derivatives, the second the second ones
        rough = weights(x, s, t)
        inside = 1 + s * torch.where(rough > 0, x - t, 0.0)
        t = t + (rough.sum(dim, keepdim=True) - 1) / (rough / inside).sum(dim, keepdim=True)
    y = weights(x, s, t)
    return y / y.detach().sum(dim, keepdim=True)


def attention_scores(call: Attention) -> Tensor:
    """cap(scale q k^T) + bias - slope |distance|, -inf at hidden keys. -> (B, H, N_q, N_k)

    Where there is a sink, its score stands behind those of the keys.
    """
    q, k, softcap = call.q, call.k, call.softcap
    (_, H, n_q, _), n_k = q.shape, k.shape[2]
    scores = q @ k.repeat_interleave(H // max(1, k.shape[1]), 1).mT * call.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if call.bias is not None:
        scores = scores + call.bias
    i = torch.arange(n_q, device=q.device) + (n_k - n_q)  # the last query sees the last key
    distance = i[:, None] - torch.arange(n_k, device=q.device)
    if call.slopes is not None:
        scores = scores - call.slopes.to(q.dtype).view(-1, 1, 1) * distance.abs()
    seen = torch.ones_like(distance, dtype=torch.bool) if call.mask is None else call.mask
    if call.is_causal:
        seen = seen & (distance >= 0)
    if call.window is not None:
        seen = seen & (distance.abs() < call.window)
    scores = scores.masked_fill(~seen, -torch.inf)
    if call.s_aux is None:
        return scores
    sink = call.s_aux.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], -1)


def attention_weights(call: Attention) -> Tensor:
    """entmax(scores) of :func:`attention_scores`, that of the sink included."""
    scores = attention_scores(call)
    if call.k.shape[2] == 0:
        return _function_of(scores, _alpha(call))
    return entmax(scores, per_head(_alpha(call), call.q.shape[1]), -1)


def per_head(alpha: float | Tensor, H: int) -> float | Tensor:
    """A number or a (H, 1, 1) tensor."""
    if not isinstance(alpha, Tensor):
        return alpha
    return alpha.reshape(-1, 1, 1).expand(H, 1, 1)


def _alpha(call: Attention) -> float | Tensor:
    return call.alpha_value if call.alpha is None else call.alpha


def _parts(call: Attention) -> Iterator[tuple[int, slice, slice, Tensor, Tensor]]:
    """Batch element, queries, keys, scores and weights (1, H, n_q, n_k) of each sequence.

    Where there is a sink, it is the last key.
    """
    (B, H, N_q, _), N_k = call.q.shape, call.k.shape[2]
    for b, rows, keys in sequences(B, N_q, N_k, call.varlen, call.cu_seqlens):
        mask, bias = (
            None if x is None else x.expand(B, H, N_q, N_k)[b : b + 1, :, rows, keys]
            for x in (call.mask, call.bias)
        )
        q, k = call.q[b : b + 1, :, rows], call.k[b : b + 1, :, keys]
        part = replaced(call, q=q, k=k, mask=mask, bias=bias)
        yield b, rows, keys, attention_scores(part), attention_weights(part)


def attention(call: Attention) -> Tensor:
    """o = weights @ v, one independent sequence after the other; padded rows are 0."""
    q, k = call.q, call.k
    B, H, N_q, _ = q.shape
    v = call.v.repeat_interleave(H // max(1, k.shape[1]), 1)
    out = torch.zeros(B, H, N_q, v.shape[-1], dtype=q.dtype, device=q.device)
    out = _function_of(out, q, k, v, call.alpha, call.bias, call.slopes, call.s_aux)
    for b, rows, keys, _, weights in _parts(call):
        n_k = keys.stop - keys.start
        out = _place(out, weights[..., :n_k] @ v[b : b + 1, :, keys], b, rows)
    return out


def attention_stats(call: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Support and tau of each query; squares with a weight, visited (all), visible per head.

    tau = s x - p^s for the largest weight p and its score x.
    """
    q, side = call.q, call.square or SQUARE
    B, H, N_q, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    support = torch.zeros(B, H, N_q, dtype=torch.int64, device=q.device)
    tau = torch.full((B, H, N_q), torch.nan, dtype=dtype, device=q.device)
    used, seen = (torch.zeros(B, H, dtype=torch.int64, device=q.device) for _ in range(2))
    s = torch.as_tensor(per_head(_alpha(call), H), dtype=torch.float64, device=q.device) - 1
    for b, rows, keys, scores, weights in _parts(call):
        if keys.start == keys.stop or rows.start == rows.stop:
            continue
        x, p = scores[0].double(), weights[0].double()
        top, place = p.max(-1, keepdim=True)
        found = torch.where(top > 0, s * x.gather(-1, place) - top**s, torch.nan)
        x, p = x[..., : keys.stop - keys.start], p[..., : keys.stop - keys.start]
        support[b, :, rows] = (p > 0).sum(-1)
        found = torch.where((x > -torch.inf).any(-1, keepdim=True), found, torch.nan)
        tau[b, :, rows] = found[..., 0].to(dtype)
        for flags, count in ((p > 0, used), (x > -torch.inf, seen)):
            ends = (-flags.shape[-1] % side, -flags.shape[-2] % side)
            flags = torch.nn.functional.pad(flags, (0, ends[0], 0, ends[1]))
            squares = flags.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
            count[b] += squares.any(-1).any(-2).sum((-1, -2))
    return support, tau, used, seen.clone(), seen


def lazy_weights(call: Lazy) -> Tensor:
    """W_ij = relu(softmax_j(scale q_i k_j + b[h, i-j] [i-j <= window]) + tau_h / i) for j <= i.

    Pairs with a score of -inf are hidden, as those of the mask are.
    """
    q, k, mask = call.q, call.k, call.mask
    i = torch.arange(q.shape[2], device=q.device)
    distance = i[:, None] - i
    seen = (distance >= 0) if mask is None else (distance >= 0) & mask
    near = (distance >= 0) & (distance <= call.window_size)
    scores = q @ k.repeat_interleave(q.shape[1] // max(1, k.shape[1]), 1).mT * call.scale
    by_pair = call.bias[:, distance.clamp(0, call.window_size)]
    scores = scores + torch.where(near, by_pair, 0.0)
    scores = scores.masked_fill(~seen, -torch.inf)
    hidden = scores == -torch.inf
    empty = hidden.all(-1, keepdim=True)  # any finite scores do
    p = torch.softmax(scores.masked_fill(empty, 0.0), -1)
    return (p + call.tau[:, None, None] / (i + 1)[:, None]).relu().masked_fill(hidden, 0.0)


def lazy_attention(call: Lazy) -> Tensor:
    """o = lazy_weights @ v, one sequence after the other; padded rows are 0."""
    q, k, mask = call.q, call.k, call.mask
    B, H, N, _ = q.shape
    v = call.v.repeat_interleave(H // max(1, k.shape[1]), 1)
    out = torch.zeros(B, H, N, v.shape[-1], dtype=q.dtype, device=q.device)
    out = _function_of(out, q, k, v, call.bias, call.tau)
    for b, rows, _ in sequences(B, N, N, call.varlen, None):
        part = replaced(
            call,
            q=q[b : b + 1, :, rows],
            k=k[b : b + 1, :, rows],
            mask=None if mask is None else mask.expand(B, H, N, N)[b : b + 1, :, rows, rows],
        )
        out = _place(out, lazy_weights(part) @ v[b : b + 1, :, rows], b, rows)
    return out


def _function_of(out: Tensor, *arguments: object) -> Tensor:
    """``out`` as a function of its arguments: also where it uses none, they get zeros."""
    for x in arguments:
        if isinstance(x, Tensor) and x.is_floating_point():
            out = out + x.flatten()[:0].sum().to(out.dtype)
    return out


def _place(out: Tensor, part: Tensor, b: int, rows: slice) -> Tensor:
    """``out`` with ``part`` at (b, :, rows), out of place so that autograd sees it."""
    index = torch.arange(rows.start, rows.stop, device=out.device)
    placed = torch.zeros_like(out[b : b + 1]).index_add(2, index, part)
    batch = torch.tensor([b], device=out.device)
    return out.index_add(0, batch, placed)
