"""flashdiffusion: one matvec against an already built matrix, the whole map against dense eigsh."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from flashdiffusion import DiffusionMap, FlashDiffusion

from ..clock import without_library
from ..registry import Row


def _dense_matvec(X: Tensor, V: Tensor, beta: float) -> Tensor:
    K = torch.exp(-beta * torch.cdist(X.double(), X.double()).square())
    return K @ V.double()


def _matvec_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    N = 2048 if quick else 8192
    X = torch.randn(N, 3, device=device)
    K = torch.exp(-torch.cdist(X, X).square())
    for r, allowed in ((1, 2.2), (8, 1.5)):
        V = torch.randn(N, r, device=device)
        yield Row(
            "flashdiffusion/matvec",
            f"N={N} d=3 r={r}",
            ours=lambda X=X, V=V: FlashDiffusion(X, X, V, beta=1.0, normalize="none"),
            exact=lambda X=X, V=V: _dense_matvec(X, V, 1.0),
            peers={
                "product with a built matrix": lambda K=K, V=V: K @ V,
                "build and multiply": lambda X=X, V=V: torch.exp(-torch.cdist(X, X).square()) @ V,
            },
            bars={} if quick else {"product with a built matrix": round(1 / allowed, 3)},
        )


def _swiss_roll(N: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    t = 1.5 * np.pi * (1 + 2 * rng.random(N))
    X = np.stack((t * np.cos(t), 21 * rng.random(N), t * np.sin(t)), 1)
    return ((X - X.mean(0)) / X.std()).astype(np.float32)


def _dense_map(X: np.ndarray, beta: float, k: int) -> np.ndarray:
    x = torch.from_numpy(X)
    # exp and products are many times slower below the normal numbers: nothing falls under e^-60
    K = torch.exp((-beta * torch.cdist(x, x).square()).clamp(min=-60.0))
    K = K / K.sum(1).outer(K.sum(1)).sqrt()
    scale = K.sum(1).rsqrt()
    M = (K * scale[:, None] * scale).numpy()
    v0 = (1 / scale).numpy()
    return np.sort(eigsh(M, k=k + 1, tol=1e-6, v0=v0)[0])[::-1][1:]


def _map_rows(quick: bool) -> Iterator[Row]:
    for N in (2000,) if quick else (6000, 20000):
        X = _swiss_roll(N)

        def ours(X=X):
            return DiffusionMap(beta=20.0, alpha=0.5, n_components=8, tol=1e-6).fit(X)

        small = _swiss_roll(1500)
        yield Row(
            "flashdiffusion/DiffusionMap.fit",
            f"N={N} d=3, 8 components, tol 1e-6",
            ours=ours,
            checked=lambda small=small: torch.from_numpy(
                np.asarray(ours(small).eigenvalues_, dtype=np.float32)
            ),
            exact=lambda small=small: torch.from_numpy(
                _dense_map(small.astype(np.float64), 20.0, 8).copy()
            ),
            peers={
                "dense fp32 + eigsh": lambda X=X: _dense_map(X, 20.0, 8),
                "without the native library": without_library(ours),
            },
            bars={} if quick else {"dense fp32 + eigsh": 2.8},
        )


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    yield from _matvec_rows(device, quick)
    if device.type == "cpu":
        yield from _map_rows(quick)
