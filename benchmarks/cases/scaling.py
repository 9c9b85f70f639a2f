"""How time and memory grow with N: four sizes of everything that a complexity is claimed for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adasplash import adasplash, adasplash_no_block_mask
from difflayers import (
    AttentionOperator,
    FactoredDiffusion,
    GraphBuilder,
    IterativeDiffusion,
    SimpleDiffusion,
    SpectralDiffusion,
    _reference,
)
from difflayers.graph.build_graph import build_knn_graph, build_similarity_matrix
from difflayers.graph.laplacian import compute_normalized_laplacian
from diffmax import diffmax_bisect
from dsalt.kernels import dsalt_attention
from flashdiffusion import FlashDiffusion

from ..registry import Row

QUICK = False
D, K = 64, 8  # features and neighbours
Built = tuple[Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Claim:
    """What grows how: the exponents of time and memory against N, and four sizes to see it at."""

    name: str
    sizes: tuple[int, int, int, int]
    grows: tuple[float, float]
    build: Callable[[int, torch.device], Built]  # N -> the call, and its float64 answer


def _grad(out: Tensor, inputs: list[Tensor]) -> Any:
    return torch.autograd.grad(out.sum(), inputs)


def _diffmax(N: int, device: torch.device) -> Built:
    X = torch.randn(64, N, device=device)
    return (
        lambda: diffmax_bisect(X, 0.5),
        lambda: diffmax_bisect(X.double(), 0.5, backend="reference"),
    )


def _entmax_attention(attend: Callable[..., Tensor]) -> Callable[[int, torch.device], Built]:
    def build(N: int, device: torch.device) -> Built:
        qkv = [torch.randn(1, 2, N, D, device=device).requires_grad_() for _ in range(3)]

        def exact() -> Any:
            wide = [x.detach().double().requires_grad_() for x in qkv]
            return _grad(adasplash(*wide, 1.5, True, backend="reference"), wide)

        return lambda: _grad(attend(*qkv, 1.5, True), qkv), exact

    return build


def _window_attention(N: int, device: torch.device) -> Built:
    qkv = [torch.randn(1, 2, N, D, device=device).requires_grad_() for _ in range(3)]
    windows = torch.full((1, 2, N), 128, device=device, dtype=torch.int32)
    marks = torch.rand(1, 2, N, device=device).topk(32, -1).indices.sort(-1).values.int()

    def exact() -> Any:
        wide = [x.detach().double().requires_grad_() for x in qkv]
        return _grad(dsalt_attention(*wide, windows, marks, backend="reference"), wide)

    return lambda: _grad(dsalt_attention(*qkv, windows, marks), qkv), exact


def _matvec(N: int, device: torch.device) -> Built:
    X, V = torch.randn(N, 3, device=device), torch.randn(N, 4, device=device)

    def exact() -> Tensor:
        return torch.exp(-torch.cdist(X.double(), X.double()).square()) @ V.double()

    return lambda: FlashDiffusion(X, X, V, beta=1.0, normalize="none"), exact


def _points(N: int, device: torch.device) -> Tensor:
    return torch.randn(N, D, device=device)


def _sparse_graph(N: int, device: torch.device) -> Any:
    return GraphBuilder(_points(N, device)).cosine_similarity().knn(K, sparse=True).build()


def _factored(N: int, device: torch.device) -> Built:
    graph, x = _sparse_graph(N, device), _points(N, device)
    step = FactoredDiffusion(graph.W, graph.deg, 0.01)

    def exact() -> Tensor:
        W = graph.W.double()
        return (1 - 0.01 * graph.deg.double())[:, None] * x.double() + 0.01 * torch.sparse.mm(
            W, x.double()
        )

    return lambda: step(x), exact


def _laplacian_of(N: int, device: torch.device) -> Tensor:
    return _reference.laplacian(_reference.adjacency(_points(N, device).cpu(), K), True).to(device)


def _operator(mode: str, make: Callable[[], Any]) -> Callable[[int, torch.device], Built]:
    def build(N: int, device: torch.device) -> Built:
        L, x = _laplacian_of(N, device).float(), _points(N, device)
        ready = make().precompute(L)
        steps = 3 if mode == "iterative" else 1
        return lambda: ready(x), lambda: _reference.diffuse(
            x.double(), L.double(), mode, 0.1, steps
        )

    return build


def _decomposition(N: int, device: torch.device) -> Built:
    L, x = _laplacian_of(N, device).float(), _points(N, device)[:, :1]

    def ours() -> Tensor:
        return SpectralDiffusion(0.1).precompute(L)(x)

    return ours, lambda: _reference.diffuse(x.double(), L.double(), "spectral", 0.1, 1)


def _similarity(N: int, device: torch.device) -> Built:
    X = _points(N, device)

    def exact() -> Tensor:
        unit = torch.nn.functional.normalize(X.double(), dim=-1)
        return (unit @ unit.mT).clamp(min=0).fill_diagonal_(0)

    return lambda: build_similarity_matrix(X), exact


def _dense_graph(N: int, device: torch.device) -> Built:
    X = _points(N, device)
    S = build_similarity_matrix(X)
    return lambda: build_knn_graph(S, K), lambda: _reference.adjacency(X.double().cpu(), K)


def _sparse_search(N: int, device: torch.device) -> Built:
    X = _points(N, device)
    builder = GraphBuilder(k=K, use_sparse=True)
    return lambda: builder.build(X).deg, lambda: _reference.adjacency(X.double().cpu(), K).sum(1)


def _laplacian(N: int, device: torch.device) -> Built:
    W = torch.rand(N, N, device=device)
    W += W.mT.clone()
    return lambda: compute_normalized_laplacian(W), lambda: _reference.laplacian(W.double(), True)


def _association(mode: str) -> Callable[[int, torch.device], Built]:
    def build(N: int, device: torch.device) -> Built:
        q, k, v = (_points(N, device) for _ in range(3))
        index = torch.randint(0, N, (N, K), device=device)
        attend = AttentionOperator(0.1, mode)

        def exact() -> Tensor:
            scores = 0.1 * q.double() @ k.double().mT
            if mode == "dense":
                return scores.softmax(-1) @ v.double()
            picked = scores.gather(1, index).softmax(-1)
            return (picked[:, :, None] * v.double()[index]).sum(1)

        return lambda: attend(q, k, v, index if mode == "graph" else None), exact

    return build


def _whole(mode: str) -> Callable[[int, torch.device], Built]:
    """Smooth the stored patterns three times, then associate: dense, or along the graph."""

    def build(N: int, device: torch.device) -> Built:
        graph, x, v = _sparse_graph(N, device), _points(N, device), _points(N, device)
        smooth, attend = (
            FactoredDiffusion(graph.W, graph.deg, 0.01, 3),
            AttentionOperator(0.1, mode),
        )

        def exact() -> Tensor:
            W, wide, near = graph.W.double(), x.double(), graph.adj_indices
            for _ in range(3):
                kept = (1 - 0.01 * graph.deg.double())[:, None] * wide
                wide = kept + 0.01 * torch.sparse.mm(W, wide)
            scores = 0.1 * x.double() @ wide.mT
            if mode == "dense":
                return scores.softmax(-1) @ v.double()
            return (scores.gather(1, near).softmax(-1)[:, :, None] * v.double()[near]).sum(1)

        near = graph.adj_indices if mode == "graph" else None
        return lambda: attend(x, smooth(x), v, near), exact

    return build


LONG, MIDDLE, SHORT = (4096, 8192, 16384, 32768), (1024, 2048, 4096, 8192), (512, 1024, 2048, 4096)
SMALL = (128, 256, 512, 1024)
CLAIMS = (
    Claim("diffmax", LONG, (1, 1), _diffmax),
    Claim("adasplash forward+backward", SHORT, (2, 1), _entmax_attention(adasplash)),
    Claim(
        "adasplash without a block mask, forward+backward",
        SHORT,
        (2, 1),
        _entmax_attention(adasplash_no_block_mask),
    ),
    Claim("dsalt forward+backward", MIDDLE, (1, 1), _window_attention),
    Claim("FlashDiffusion product", MIDDLE, (2, 1), _matvec),
    Claim("similarity matrix", MIDDLE, (2, 2), _similarity),
    Claim("kNN graph, dense", MIDDLE, (2, 2), _dense_graph),
    Claim("kNN graph, sparse, with its search", MIDDLE, (2, 1), _sparse_search),
    Claim("Laplacian, dense", MIDDLE, (2, 2), _laplacian),
    Claim("FactoredDiffusion step, sparse", MIDDLE, (1, 1), _factored),
    Claim("SimpleDiffusion step", SHORT, (2, 2), _operator("simple", lambda: SimpleDiffusion(0.1))),
    Claim(
        "IterativeDiffusion, 3 steps",
        SHORT,
        (2, 2),
        _operator("iterative", lambda: IterativeDiffusion(0.1, 3)),
    ),
    Claim("SpectralDiffusion, decomposition", SMALL, (3, 2), _decomposition),
    Claim(
        "SpectralDiffusion, application",
        SMALL,
        (2, 2),
        _operator("spectral", lambda: SpectralDiffusion(0.1)),
    ),
    Claim("association, dense", SHORT, (2, 2), _association("dense")),
    Claim("association along the graph", MIDDLE, (1, 1), _association("graph")),
    Claim("smoothing + dense association", SHORT, (2, 2), _whole("dense")),
    Claim("smoothing + association along the graph", MIDDLE, (1, 1), _whole("graph")),
)


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Four sizes of each claim; ``quick`` has two. A small one is held against float64."""
    for claim in CLAIMS:
        small = claim.sizes[0]
        torch.manual_seed(0)
        checked, exact = claim.build(min(small, 256), device)
        for N in claim.sizes[:2] if quick else claim.sizes:
            torch.manual_seed(0)
            ours, _ = claim.build(N, device)
            yield Row(
                f"scaling/{claim.name}",
                f"N={N}",
                ours=ours,
                checked=checked,
                exact=exact,
                N=N,
                grows=claim.grows,
                memory=True,
            )
