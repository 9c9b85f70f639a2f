"""difflayers: Hopfield layers against LayerNorm + projections + SDPA; neighbour search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflayers import DiffusedHopfield, Hopfield, _reference
from shared_kernels import pairwise

from ..registry import Row, peer

SIZES = ((8, 128, 128, 128, 4), (2, 1024, 1024, 128, 4))  # B, L, S, d, H
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _by_hand(layer: Hopfield, attend: Attend, smooth: Callable[[Tensor], Tensor]) -> Callable:
    """The layer from torch's own parts: three LayerNorms, four projections, ``attend``."""
    core, H = layer.association_core, layer.association_core.num_heads

    def run(stored: Tensor, state: Tensor, values: Tensor) -> Tensor:
        w, b = core.in_proj_weight.to(state), core.in_proj_bias.to(state)

        def norm(x: Tensor, by: nn.LayerNorm) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], by.weight.to(x), by.bias.to(x))

        inputs = (
            norm(state, layer.norm_state_pattern),
            smooth(norm(stored, layer.norm_stored_pattern)),
            norm(values, layer.norm_pattern_projection),
        )
        q, k, v = (
            F.linear(x, wi, bi).unflatten(-1, (H, -1)).transpose(1, 2)
            for x, wi, bi in zip(inputs, w.chunk(3), b.chunk(3), strict=True)
        )
        out = attend(q, k, v).transpose(1, 2).flatten(-2)
        return F.linear(out, core.out_proj.weight.to(out), core.out_proj.bias.to(out))

    return run


def _dense(steps: int) -> Attend:
    return lambda q, k, v: _reference.associate(q, k, v, q.shape[-1] ** -0.5, steps)


def _smoothing(stored: Tensor, layer: DiffusedHopfield) -> Callable[[Tensor], Tensor]:
    """(I - eta L)^steps of each item's own graph, dense."""
    c = layer.config

    def one(x: Tensor, patterns: Tensor) -> Tensor:
        L = _reference.laplacian(_reference.adjacency(patterns, c.k_neighbors), True)
        return _reference.diffuse(x, L, "iterative", c.eta, c.steps)

    return lambda x: torch.stack([one(a, b) for a, b in zip(x, stored.double().cpu(), strict=True)])


def _neighbours(device: torch.device, quick: bool) -> Iterator[Row]:
    """The search behind sparse graphs, exact, against scikit-learn's; every 50th is checked."""
    N, d, k = 2000 if quick else 10_000, 64, 10
    X = torch.randn(N, d, device=device)
    points = X.cpu().numpy()

    for metric in ("sqeuclidean", "cosine"):

        def values(metric: str = metric) -> Tensor:
            return pairwise.knn(X, k, metric=metric)[0][::50]

        def exact(metric: str = metric) -> Tensor:
            wide = X.double().cpu()
            if metric == "cosine":
                wide = F.normalize(wide, dim=-1)
                return (wide[::50] @ wide.mT).topk(k, -1).values
            return torch.stack(
                [(row - wide).square().sum(-1).topk(k, largest=False).values for row in wide[::50]]
            )

        def fitted(neighbors: Any, metric: str = metric) -> Callable[[], Any]:
            search = neighbors.NearestNeighbors(n_neighbors=k, algorithm="brute", metric=metric)
            search.fit(points)
            return lambda: search.kneighbors(points)

        yield Row(
            f"difflayers/kNN, {metric}",
            f"N={N} d={d} k={k}",
            ours=lambda m=metric: pairwise.knn(X, k, metric=m),
            checked=values,
            exact=exact,
            peers={"scikit-learn": peer("sklearn.neighbors", fitted)},
            bars={} if quick else {"scikit-learn": round(1 / 1.1, 3)},
        )


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    yield from _neighbours(device, quick)
    for B, L, S, d, H in SIZES:
        triple = tuple(torch.randn(B, n, d, device=device) for n in (S, L, S))
        wide = tuple(x.double().cpu() for x in triple)
        layers = {
            "Hopfield, 1 update": (Hopfield(d, num_heads=H), 0),
            "Hopfield, 3 updates": (Hopfield(d, num_heads=H, update_steps_max=2), 2),
            "DiffusedHopfield, cached graph": (DiffusedHopfield(d, num_heads=H), 0),
        }
        first = layers["Hopfield, 1 update"][0].to(device).eval()
        sdpa = _by_hand(first, F.scaled_dot_product_attention, lambda x: x)

        def quiet(call, *args):
            with torch.no_grad():
                return call(*args)

        for name, (layer, steps) in layers.items():
            layer.to(device).eval()
            diffused = isinstance(layer, DiffusedHopfield)
            smooth = _smoothing(triple[0], layer) if diffused else lambda x: x
            exact = _by_hand(layer, _dense(steps), smooth)
            peers = {"LayerNorm + projections + SDPA": lambda q=quiet, s=sdpa, t=triple: q(s, *t)}
            if layer is not first:
                peers["Hopfield, 1 update"] = lambda q=quiet, f=first, t=triple: q(f, t)
            bars = {
                "Hopfield, 1 update": {"LayerNorm + projections + SDPA": round(1 / 1.15, 3)},
                "Hopfield, 3 updates": {"Hopfield, 1 update": round(1 / 3.5, 3)},
                "DiffusedHopfield, cached graph": {"Hopfield, 1 update": 1 / 2.5},
            }
            yield Row(
                f"difflayers/{name}",
                f"B{B} L{L} S{S} d{d} H{H}",
                ours=lambda q=quiet, m=layer, t=triple: q(m, t),
                exact=lambda q=quiet, e=exact, w=wide: q(e, *w),
                peers=peers,
                bars=bars[name],
            )
