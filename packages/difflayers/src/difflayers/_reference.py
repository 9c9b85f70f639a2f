"""The specification: shortest dense maths, any dtype. Nothing optimised uses it."""

from __future__ import annotations

import torch
from torch import Tensor


def associate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 1.0,
    steps: int = 0,
    keep: Tensor | None = None,
    normalizer=torch.softmax,  # type: ignore[no-untyped-def]
) -> Tensor:
    """q (…, L, d), k (…, S, d), v (…, S, d_v), keep bool: xi v after ``steps`` of q <- xi k."""

    def xi(q: Tensor) -> Tensor:
        scores = scale * q @ k.mT
        if keep is None:
            return normalizer(scores, -1)
        dead = ~keep.any(-1, keepdim=True)
        masked = scores.masked_fill(~keep, -torch.inf).masked_fill(dead, 0.0)
        return normalizer(masked, -1).masked_fill(dead, 0.0)

    for _ in range(steps):
        q = xi(q) @ k
    return xi(q) @ v


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
    if mode == "simple":
        return (eye - eta * L) @ x
    if mode in ("iterative", "factored"):
        return torch.linalg.matrix_power(eye - eta * L, steps) @ x
    if mode in ("spectral", "heat"):
        return torch.linalg.matrix_exp(-eta * steps * L) @ x
    z = x
    for _ in range(steps):
        z = (1 - restart) * (eye - eta * L) @ z + restart * x
    return z


def logit_diffusion(w: Tensor, L: Tensor, eta: float, keep: Tensor | None = None) -> Tensor:
    """w (…, N) -> max(0, (I - eta L) w) where keep (all, without it), rescaled to the sum of w."""
    moved = (w - eta * w @ L).clamp(min=0.0)
    moved = moved if keep is None else moved * keep
    return moved * (w.sum(-1, keepdim=True) / moved.sum(-1, keepdim=True))


def neighbour_sum(x: Tensor, crow: Tensor, col: Tensor, val: Tensor) -> Tensor:
    """W x for W in CSR; x (N, d)."""
    W = x.new_zeros(x.shape[0], x.shape[0])
    for i in range(x.shape[0]):
        for e in range(int(crow[i]), int(crow[i + 1])):
            W[i, col[e]] += val[e].to(W)
    return W @ x


def neighbour_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention (B, H, L, S) under the mask that index (B, L, K), -1 = empty, describes."""
    S = k.shape[2]
    hot = torch.nn.functional.one_hot(index.clamp(min=0), S) * (index >= 0).unsqueeze(-1)
    keep = hot.sum(-2).bool().unsqueeze(1)
    o = associate(q, k, v, scale, keep=keep.expand(*q.shape[:-1], S))
    s = (scale * q @ k.mT).masked_fill(~keep, -torch.inf)
    dead = ~keep.any(-1).expand(s.shape[:-1])
    return o, (s.logsumexp(-1) * 1.4426950408889634).masked_fill(dead, torch.inf)
