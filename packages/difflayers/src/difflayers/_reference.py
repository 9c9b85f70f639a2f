"""The specification: shortest dense maths, any dtype. Nothing optimised uses it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._call import Association, NeighbourAttention, NeighbourSum


def associate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 1.0,
    steps: int = 0,
    mask: Tensor | None = None,
    normalizer: Callable[[Tensor, int], Tensor] = torch.softmax,
) -> Tensor:
    """q (…, L, d), k (…, S, d), v (…, S, d_v): xi v after ``steps`` of q <- xi k.

    ``mask`` is bool (True = may be seen), or added to the scores.
    """

    def xi(q: Tensor) -> Tensor:
        scores = scale * q @ k.mT
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        dead = (scores == -torch.inf).all(-1, keepdim=True)
        return normalizer(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0).to(q.dtype)

    for _ in range(steps):
        q = xi(q) @ k
    return xi(q) @ v


def association(call: Association) -> Tensor:
    """The op: `associate` with softmax."""
    return associate(call.q, call.k, call.v, call.scale, call.steps, call.mask)


def adjacency(X: Tensor, k: int) -> Tensor:
    """X (N, d) -> A = max(M, M^T), M the k largest entries per row of max(0, cos), diagonal 0."""
    N = X.shape[0]
    Xn = X / X.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    S = (Xn @ Xn.T).clamp(min=0.0)
    S = S * (1 - torch.eye(N, dtype=X.dtype))
    M = torch.zeros_like(S)
    for i in range(N):
        for j in S[i].argsort(descending=True)[: min(k, N - 1)]:
            M[i, j] = S[i, j]
    return torch.maximum(M, M.T)


def laplacian(A: Tensor, normalized: bool) -> Tensor:
    """D - A, or D^(-1/2) (D - A) D^(-1/2) with a zero row where the degree is 0."""
    L = torch.diag(A.sum(-1)) - A
    if not normalized:
        return L
    scale = torch.where(A.sum(-1) > 0, A.sum(-1), torch.inf).rsqrt()
    return scale[:, None] * L * scale[None, :]


def diffuse(
    x: Tensor, L: Tensor, mode: str, eta: float, steps: int, restart: float = 0.1
) -> Tensor:
    """H(L) x on x (N, d)."""
    eye = torch.eye(L.shape[0], dtype=L.dtype)
    out: Tensor
    if mode == "simple":
        return (eye - eta * L) @ x
    if mode in ("iterative", "factored"):
        out = torch.linalg.matrix_power(eye - eta * L, steps) @ x
        return out
    if mode in ("spectral", "heat"):
        out = torch.linalg.matrix_exp(-eta * steps * L) @ x
        return out
    z = x
    for _ in range(steps):
        z = (1 - restart) * (eye - eta * L) @ z + restart * x
    return z


def logit_diffusion(w: Tensor, L: Tensor, eta: float, keep: Tensor | None = None) -> Tensor:
    """w (…, N) -> max(0, (I - eta L) w) where keep (all, without it), rescaled to the sum of w."""
    moved = (w - eta * w @ L).clamp(min=0.0)
    moved = moved if keep is None else moved * keep
    return moved * (w.sum(-1, keepdim=True) / moved.sum(-1, keepdim=True))


def neighbour_sum(call: NeighbourSum) -> Tensor:
    """W x for W in CSR; x (N, d)."""
    x, N = call.x, call.x.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    W = torch.zeros(N, N, dtype=wide, device=x.device)
    W = W.index_put((call.rows(), call.col), call.val.to(wide), accumulate=True)
    return (W @ x.to(wide)).to(x.dtype)


def neighbour_attention(call: NeighbourAttention) -> Tensor:
    """softmax(scale q k^T) v over the listed patterns of each state."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (call.q, call.k, call.v))
    item = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1)
    listed = call.neighbours.clamp(min=0)
    # [B, L, K, H, D]
    k, v = k.transpose(1, 2)[item, listed], v.transpose(1, 2)[item, listed]
    empty = (call.neighbours < 0)[:, None]
    alone = empty.all(-1, keepdim=True)
    scores = call.scale * torch.einsum("bhld,blkhd->bhlk", q, k)
    scores = scores.masked_fill(empty, -torch.inf).masked_fill(alone, 0.0)
    weights = torch.softmax(scores, -1).masked_fill(alone, 0.0)
    return torch.einsum("bhlk,blkhd->bhld", weights, v).to(call.q.dtype)
