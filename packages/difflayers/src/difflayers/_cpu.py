"""The fast CPU paths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbour_sum(x: Tensor, crow: Tensor, col: Tensor, val: Tensor) -> Tensor:
    """W x for W in CSR, by one embedding_bag; half types are summed in fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if col.numel() == 0 or x.numel() == 0:
        return torch.zeros_like(x)
    return F.embedding_bag(
        col, x.to(wide), crow[:-1], mode="sum", per_sample_weights=val.to(wide)
    ).to(x.dtype)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, S, d) at index (B, L, K) -> (B, H, L, K, d) in at least fp32."""
    B, L, K = index.shape
    flat = index.clamp(min=0).view(B, 1, L * K, 1).expand(-1, x.shape[1], -1, x.shape[-1])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.gather(2, flat).view(B, x.shape[1], L, K, x.shape[-1])


def _scores(q: Tensor, k: Tensor, index: Tensor, scale: float) -> Tensor:
    """(B, H, L, K), -inf in empty slots."""
    s = scale * (q.unsqueeze(-2) * _gathered(k, index)).sum(-1)
    return s.masked_fill((index < 0).unsqueeze(1), -torch.inf)


def neighbour_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax over each state's list of stored patterns, and its log-sum-exp to base 2."""
    s = _scores(q, k, index, scale)
    dead = (index < 0).all(-1).unsqueeze(1).expand(s.shape[:-1])
    lse = s.logsumexp(-1).masked_fill(dead, torch.inf)
    p = torch.exp(s - lse.unsqueeze(-1))
    o = (p.unsqueeze(-1) * _gathered(v, index)).sum(-2)
    return o.to(q.dtype), lse * 1.4426950408889634


def neighbour_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `neighbour_attention`."""
    s = _scores(q, k, index, scale)
    p = torch.exp(s - lse.unsqueeze(-1) * 0.6931471805599453)
    wide = do.to(p.dtype)
    delta = (wide * o.to(p.dtype)).sum(-1, keepdim=True)
    ds = scale * p * ((wide.unsqueeze(-2) * _gathered(v, index)).sum(-1) - delta)
    dq = (ds.unsqueeze(-1) * _gathered(k, index)).sum(-2)

    def scattered(rows: Tensor, like: Tensor) -> Tensor:
        B, H, L, K, d = rows.shape
        flat = index.clamp(min=0).view(B, 1, L * K, 1).expand(-1, H, -1, d)
        out = torch.zeros(like.shape, dtype=rows.dtype, device=rows.device)
        return out.scatter_add_(2, flat, rows.flatten(2, 3)).to(like.dtype)

    dk = scattered(ds.unsqueeze(-1) * q.unsqueeze(-2), k)
    dv = scattered(p.unsqueeze(-1) * wide.unsqueeze(-2), v)
    return dq.to(q.dtype), dk, dv
