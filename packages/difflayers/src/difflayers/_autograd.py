"""Second derivatives of the ops, in PyTorch's operators: they have derivatives of any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared_kernels.calls import replaced

from . import _reference
from ._call import Association, NeighbourAttention, NeighbourSum
from ._torch import gather, scatter_add, weights


def second_of_sum(
    call: NeighbourSum, out: Any, d_out: Tensor, to: dict[str, Tensor | None], backend: str
) -> dict[str, Tensor]:
    """Derivatives of <to_x, W d_out> + <to_val, d_out_i . x_j of each edge>, for W = W^T."""
    rows, col = call.rows(), call.col
    wide = torch.promote_types(call.x.dtype, torch.float32)
    x, g = call.x.to(wide), d_out.to(wide)
    found: dict[str, Tensor] = {"d_out": torch.zeros_like(g)}
    if to["x"] is not None:
        above = to["x"]
        smoothed = torch.ops.difflayers.neighbour_sum(above, call.crow, col, call.val, backend)
        found["d_out"] = smoothed.to(wide)
        found["val"] = replaced(call, x=d_out).gradient_of_val(above)
    if to["val"] is not None:
        weight = to["val"].to(wide).unsqueeze(-1)
        found["d_out"] = found["d_out"].index_add(0, rows, weight * x[col])
        found["x"] = torch.zeros_like(x).index_add(0, col, weight * g[rows]).to(call.x.dtype)
    found["d_out"] = found["d_out"].to(d_out.dtype)
    return found


def second_of_attention(
    call: NeighbourAttention, out: Any, d_out: Tensor, to: dict[str, Tensor | None], backend: str
) -> dict[str, Tensor]:
    """Derivatives of <to_q, dq> + <to_k, dk> + <to_v, dv>.

    With p the weights of a state, a_j = d_out . v_j, c_j = scale (to_q . k_j + to_k_j . q) and
    b_j = to_v_j . d_out, that sum is L = sum_j p_j (a_j - p.a) c_j + p_j b_j.
    """
    index, scale = call.neighbours, call.scale
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q, g = call.q.to(wide), d_out.to(wide)
    k, v = gather(call.k, index), gather(call.v, index)
    to_q = torch.zeros_like(q) if to["q"] is None else to["q"].to(wide)
    to_k = torch.zeros_like(k) if to["k"] is None else gather(to["k"], index)
    to_v = torch.zeros_like(v) if to["v"] is None else gather(to["v"], index)

    p = weights(q, k, index, scale)

    def mean(x: Tensor) -> Tensor:
        return (p * x).sum(-1, keepdim=True)

    def along(factors: Tensor, rows: Tensor) -> Tensor:
        return (factors.unsqueeze(-1) * rows).sum(-2)

    a = (g.unsqueeze(-2) * v).sum(-1)
    c = scale * ((to_q.unsqueeze(-2) * k).sum(-1) + (to_k * q.unsqueeze(-2)).sum(-1))
    b = (to_v * g.unsqueeze(-2)).sum(-1)
    dc = p * (a - mean(a))
    da = p * (c - mean(c))
    dp = a * c - a * mean(c) - mean(a) * c + b
    ds = p * (dp - mean(dp))
    found_k = ds.unsqueeze(-1) * q.unsqueeze(-2) + dc.unsqueeze(-1) * to_q.unsqueeze(-2)
    found_v = da.unsqueeze(-1) * g.unsqueeze(-2)
    zeros_k, zeros_v = (torch.zeros_like(x, dtype=wide) for x in (call.k, call.v))
    return {
        "d_out": (along(da, v) + along(p, to_v)).to(d_out.dtype),
        "q": (scale * (along(ds, k) + along(dc, to_k))).to(call.q.dtype),
        "k": scatter_add(zeros_k, index, scale * found_k).to(call.k.dtype),
        "v": scatter_add(zeros_v, index, found_v).to(call.v.dtype),
    }


def second_of_association(
    call: Association, out: Any, d_out: Tensor, to: dict[str, Tensor | None], backend: str
) -> dict[str, Tensor]:
    """Derivatives of <to_q, dq> + <to_k, dk> + <to_v, dv>, by PyTorch through the formula."""
    inputs = [call.q, call.k, call.v, d_out]
    keeps_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that what is found is the derivative in these and not in what they came from
        q, k, v, g = (
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs
        )
        first = torch.autograd.grad(
            _reference.association(replaced(call, q=q, k=k, v=v)), (q, k, v), g, create_graph=True
        )
        parts = [
            (above * d).sum()
            for above, d in zip((to["q"], to["k"], to["v"]), first, strict=True)
            if above is not None
        ]
        found = torch.autograd.grad(
            torch.stack(parts).sum(), (q, k, v, g), create_graph=keeps_graph, materialize_grads=True
        )
    return dict(zip(("q", "k", "v", "d_out"), found, strict=True))
