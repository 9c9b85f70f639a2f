"""The specification: dense maths in the shortest readable form, any dtype including float64.

Gradients come from autograd. They are exact, twice, although the threshold is found by bisection:
autograd sees the last two steps, which are Newton's (implicit differentiation).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Segments = list[tuple[int, slice, slice]]


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
    for _ in range(100):
        t = (low + high) / 2
        too_heavy = weights(fixed, held, t).sum(dim, keepdim=True) >= 1
        low, high = torch.where(too_heavy, t, low), torch.where(too_heavy, high, t)
    t = low
    for _ in range(2):  # the first carries the first derivatives, the second the second ones
        rough = weights(x, s, t)
        inside = 1 + s * torch.where(rough > 0, x - t, 0.0)
        t = t + (rough.sum(dim, keepdim=True) - 1) / (rough / inside).sum(dim, keepdim=True)
    y = weights(x, s, t)
    return y / y.detach().sum(dim, keepdim=True)


def segments(
    B: int, N_q: int, N_k: int, varlen: Tensor | None, cu_seqlens: Tensor | None
) -> Segments:
    """(batch index, queries, keys) of every independent sequence."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [(0, slice(a, b), slice(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    if varlen is not None:
        # (B,), or (B, 2): queries and keys
        both = varlen.view(B, 1 if varlen.dim() == 1 else 2).expand(B, 2).tolist()
        return [(b, slice(0, n_q), slice(0, n_k)) for b, (n_q, n_k) in enumerate(both)]
    return [(b, slice(0, N_q), slice(0, N_k)) for b in range(B)]


def visible(
    n_q: int, n_k: int, is_causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Which keys a query sees. Both end at the same position: the last query sees the last key."""
    distance = (torch.arange(n_q, device=device) + (n_k - n_q))[:, None] - torch.arange(
        n_k, device=device
    )
    seen = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return seen


def attention_weights(
    q: Tensor,
    k: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """entmax(scale q k^T + bias - slope |distance|, over the visible keys), (B, H, N_q, N_k)."""
    (_, H, n_q, D), n_k = q.shape, k.shape[2]
    scale = D**-0.5 if scale is None else scale
    scores = q @ k.repeat_interleave(H // max(1, k.shape[1]), 1).mT * scale
    if bias is not None:
        scores = scores + bias
    seen = visible(n_q, n_k, is_causal, window, q.device)
    if alibi_slopes is not None:
        distance = (torch.arange(n_q, device=q.device) + n_k - n_q)[:, None] - torch.arange(
            n_k, device=q.device
        )
        scores = scores - alibi_slopes.to(q.dtype).view(-1, 1, 1) * distance.abs()
    if mask is not None:
        seen = seen & mask
    if n_k == 0:
        return _function_of(scores, alpha)
    return entmax(scores.masked_fill(~seen, -torch.inf), per_head(alpha, H), -1)


def per_head(alpha: float | Tensor, H: int) -> float | Tensor:
    """A number or a (H, 1, 1) tensor."""
    if not isinstance(alpha, Tensor):
        return alpha
    return alpha.reshape(-1, 1, 1).expand(H, 1, 1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **options: object,
) -> Tensor:
    """o = weights @ v, one independent sequence after the other; padded rows are 0."""
    B, H, N_q, _ = q.shape
    v = v.repeat_interleave(H // max(1, k.shape[1]), 1)

    def part(x: Tensor | None, b: int, rows: slice, keys: slice) -> Tensor | None:
        if x is None:
            return None
        return x.expand(B, H, N_q, k.shape[2])[b : b + 1, :, rows, keys]

    out = torch.zeros(B, H, N_q, v.shape[-1], dtype=q.dtype, device=q.device)
    out = _function_of(out, q, k, v, alpha, bias, *options.values())
    for b, rows, keys in segments(B, N_q, k.shape[2], varlen, cu_seqlens):
        weights = attention_weights(
            q[b : b + 1, :, rows],
            k[b : b + 1, :, keys],
            alpha,
            is_causal,
            mask=part(mask, b, rows, keys),
            bias=part(bias, b, rows, keys),
            **options,  # type: ignore[arg-type]
        )
        out = _place(out, weights @ v[b : b + 1, :, keys], b, rows)
    return out


def lazy_weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    tau: Tensor,
    window_size: int = 512,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """W_ij = relu(softmax_j(scale q_i k_j + b[h, i-j] [i-j <= window]) + tau_h / i) for j <= i."""
    N, D = q.shape[-2:]
    i = torch.arange(N, device=q.device)
    distance = i[:, None] - i
    seen = (distance >= 0) if mask is None else (distance >= 0) & mask
    near = (distance >= 0) & (distance <= window_size)
    scores = q @ k.repeat_interleave(q.shape[1] // max(1, k.shape[1]), 1).mT
    scores = scores * (D**-0.5 if scale is None else scale)
    scores = scores + torch.where(near, bias[:, distance.clamp(0, window_size)], 0.0)
    hidden = ~seen & seen.any(-1, keepdim=True)  # a row that sees nothing: any finite scores do
    p = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).masked_fill(~seen, 0.0)
    return torch.where(seen, (p + tau[:, None, None] / (i + 1)[:, None]).relu(), 0.0)


def lazy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    window_size: int = 512,
    varlen: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """o = lazy_weights @ v, one sequence after the other; padded rows are 0."""
    B, H, N, _ = q.shape
    v = v.repeat_interleave(H // max(1, k.shape[1]), 1)
    out = torch.zeros(B, H, N, v.shape[-1], dtype=q.dtype, device=q.device)
    out = _function_of(out, q, k, v, bias, tau)
    for b, rows, _ in segments(B, N, N, varlen, None):
        part = None if mask is None else mask.expand(B, H, N, N)[b : b + 1, :, rows, rows]
        weights = lazy_weights(
            q[b : b + 1, :, rows], k[b : b + 1, :, rows], bias, tau, window_size,
            scale=scale, mask=part,
        )  # fmt: skip
        out = _place(out, weights @ v[b : b + 1, :, rows], b, rows)
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
