"""The specification: dense matrices, any dtype, a line for each formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def scores(x: Tensor, y: Tensor, score_mod: str | Callable[..., Tensor] | None = None) -> Tensor:
    """score(x_i, y_j): (N, d), (M, d) -> (N, M)."""
    x, y = x[:, None], y[None]
    if callable(score_mod):
        return score_mod(x, y)
    if score_mod == "dot":
        return -(x * y).sum(-1)
    if score_mod == "cosine":
        norms = x.norm(dim=-1) * y.norm(dim=-1)
        return 1.0 - torch.where(norms > 0, (x * y).sum(-1) / norms.where(norms > 0, 1.0), 0.0)
    if score_mod == "l1":
        return (x - y).abs().sum(-1)
    return ((x - y) ** 2).sum(-1)


def operator(
    Q: Tensor,
    K: Tensor,
    beta: float = 1.0,
    alpha: float = 0.5,
    h: Tensor | None = None,
    *,
    score_mod: str | Callable[..., Tensor] | None = None,
    normalize: str = "auto",
) -> Tensor:
    """The (N, M) matrix that FlashDiffusion multiplies by, in logarithms until the end."""
    if normalize == "auto":
        same = Q.shape == K.shape and torch.equal(Q, K)
        normalize = "symmetric" if same and h is None else "row"
    log_k = -beta * scores(Q, K, score_mod)
    if normalize == "none":
        return log_k.exp()
    log_r, log_c = log_k.logsumexp(1, keepdim=True), log_k.logsumexp(0, keepdim=True)
    log_ka = log_k - alpha * (log_r + log_c)
    if normalize == "symmetric":
        if h is not None:
            log_ka = log_ka + h.log()[:, None] + h.log()[None]
        log_d = log_ka.logsumexp(1)
        return (log_ka - 0.5 * log_d[:, None] - 0.5 * log_d[None]).exp()
    if h is not None:
        log_ka = log_ka + h.log()[None]
    return log_ka.softmax(1)


def flash_diffusion(Q: Tensor, K: Tensor, V: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return operator(Q, K, *args, **kwargs) @ V


def diffusion_map(
    X: Tensor, beta: float, alpha: float, n_components: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(eigenvalues (k,), psi (N, k), stationary (N,)) without the trivial pair."""
    M = operator(X, X, beta, alpha, normalize="symmetric")
    log_k = -beta * scores(X, X)
    log_r = log_k.logsumexp(1)
    log_d = (log_k - alpha * (log_r[:, None] + log_r[None])).logsumexp(1)
    stationary = log_d.softmax(0)
    values, vectors = torch.linalg.eigh(M)
    values, vectors = values.flip(0)[1 : n_components + 1], vectors.flip(1)[:, 1 : n_components + 1]
    return values, vectors / stationary.sqrt()[:, None], stationary


def carre_du_champ(P: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """1/2 sum_j P_ij (f_j - f_i)(g_j - g_i): (N,)."""
    return 0.5 * (P * (f[None] - f[:, None]) * (g[None] - g[:, None])).sum(1)
