"""Plain PyTorch, on any device and in any floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call import Association, LogSumExp, NeighbourAttention, NeighbourSum
from ._tiles import slices

# Numbers gathered at once by neighbour attention (16 MB of fp32).
_TILE = 1 << 22
_LOG2_E, _LOG_2 = 1.4426950408889634, 0.6931471805599453


def neighbour_sum(call: NeighbourSum) -> Tensor:
    """W x by one embedding_bag; half types are summed in fp32."""
    x, wide = call.x, torch.promote_types(call.x.dtype, torch.float32)
    if call.col.numel() == 0 or x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    return F.embedding_bag(
        call.col, x.to(wide), call.crow[:-1], mode="sum", per_sample_weights=call.val.to(wide)
    ).to(x.dtype)


def neighbour_sum_backward(
    call: NeighbourSum, saved: None, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    return call.gradients(neighbour_sum, d_out, needs)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, S, d) at index (B, L, K) -> (B, H, L, K, d) in at least fp32."""
    (B, H, S, d), (_, L, K) = x.shape, index.shape
    # whole rows are copied, which is several times quicker than a gather of single numbers
    first = torch.arange(B * H, device=x.device).view(B, H, 1) * S
    rows = index.clamp(min=0).reshape(B, 1, L * K) + first
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(B * H * S, d)
    return wide.index_select(0, rows.flatten()).view(B, H, L, K, d)


def scatter_add(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """out (B, H, S, d) plus rows (B, H, L, K, d) at index (B, L, K); empty places get zeros."""
    B, H, L, K, d = rows.shape
    places = index.clamp(min=0).view(B, 1, L * K, 1).expand(-1, H, -1, d)
    return out.scatter_add(2, places, rows.reshape(B, H, L * K, d))


def scores(q: Tensor, listed: Tensor, index: Tensor, scale: float) -> Tensor:
    """scale q k^T (B, H, L, K) for the listed k (B, H, L, K, D); -inf in an empty place."""
    s = scale * (q.unsqueeze(-2) * listed).sum(-1)
    return s.masked_fill((index < 0).unsqueeze(1), -torch.inf)


def weights(q: Tensor, listed: Tensor, index: Tensor, scale: float) -> Tensor:
    """softmax of `scores`; zeros for a state without neighbours."""
    alone = (index < 0).all(-1)[:, None, :, None]
    s = scores(q, listed, index, scale).masked_fill(alone, 0.0)
    return torch.softmax(s, -1).masked_fill(alone, 0.0)


def decomposed_sum(call: NeighbourSum) -> Tensor:
    """`neighbour_sum` of PyTorch's own operators, without a look at sizes."""
    wide = torch.promote_types(call.x.dtype, torch.float32)
    x = call.x.to(wide)
    edges = call.val.to(wide).unsqueeze(-1) * x[call.col]
    return torch.zeros_like(x).index_add(0, call.rows(), edges).to(call.x.dtype)


def decomposed_attention(call: NeighbourAttention) -> Tensor:
    """`neighbour_attention` of PyTorch's own operators, in one piece."""
    index = call.neighbours
    found = weights(call.q, gather(call.k, index), index, call.scale)
    return (found.unsqueeze(-1) * gather(call.v, index)).sum(-2).to(call.q.dtype)


def _tiles(call: NeighbourAttention) -> list[slice]:
    """Slices of the states, such that one tile gathers at most _TILE numbers."""
    B, H, L, D = call.q.shape
    return slices(L, B * H * call.neighbours.shape[-1] * max(D, call.v.shape[-1]), _TILE)


def neighbour_attention(call: NeighbourAttention) -> tuple[Tensor, LogSumExp]:
    """Softmax over each state's list of stored patterns, tile by tile."""
    found = LogSumExp.fake(call)
    for part in _tiles(call):
        index = call.neighbours[:, part]
        s = scores(call.q[:, :, part], gather(call.k, index), index, call.scale)
        alone = (index < 0).all(-1).unsqueeze(1).expand(s.shape[:-1])
        top = (s.amax(-1) if s.shape[-1] else s.sum(-1)).masked_fill(alone, 0.0)
        s -= top.unsqueeze(-1)
        total = s.logsumexp(-1).masked_fill(alone, torch.inf)
        weights = torch.exp(s - total.unsqueeze(-1))
        found.out[:, :, part] = (weights.unsqueeze(-1) * gather(call.v, index)).sum(-2)
        found.top[:, :, part], found.lse[:, :, part] = top, total * _LOG2_E
    return found.out, found


def neighbour_attention_backward(
    call: NeighbourAttention, saved: LogSumExp, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """Gradients of q, k and v, tile by tile."""
    wide = saved.lse.dtype
    dq = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (call.k, call.v))
    for part in _tiles(call):
        index, q, above = call.neighbours[:, part], call.q[:, :, part], d_out[:, :, part].to(wide)
        k, v = gather(call.k, index), gather(call.v, index)
        s = scores(q, k, index, call.scale)
        top, lse = (x[:, :, part].unsqueeze(-1) for x in (saved.top, saved.lse))
        weights = torch.exp(s - top - lse * _LOG_2)
        mean = (above * saved.out[:, :, part].to(wide)).sum(-1, keepdim=True)
        ds = call.scale * weights * ((above.unsqueeze(-2) * v).sum(-1) - mean)
        dq[:, :, part] = (ds.unsqueeze(-1) * k).sum(-2)
        dk = scatter_add(dk, index, ds.unsqueeze(-1) * q.unsqueeze(-2))
        dv = scatter_add(dv, index, weights.unsqueeze(-1) * above.unsqueeze(-2))
    return {"q": dq, "k": dk.to(call.k.dtype), "v": dv.to(call.v.dtype)}


def association(call: Association) -> Tensor:
    """A few states at a time, in at least fp32."""
    q, k, v, out = *_wide(call), call.fake()
    for rows in _states_at_once(call):
        state = q[:, :, rows]
        for _ in range(call.steps):
            state = _association_weights(state, k, rows, call) @ k
        out[:, :, rows] = _association_weights(state, k, rows, call) @ v
    return out


def association_backward(
    call: Association, saved: None, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The updates are made again, and gone through from the last association to the first.

    g is the gradient of what an association gives: dp = g values^T, ds = p (dp - sum p dp).
    """
    q, k, v = _wide(call)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for rows in _states_at_once(call):
        states, weights = [q[:, :, rows]], []
        for _ in range(call.steps):
            weights.append(_association_weights(states[-1], k, rows, call))
            states.append(weights[-1] @ k)
        weights.append(_association_weights(states[-1], k, rows, call))
        g, values, d_values = d_out[:, :, rows].to(q.dtype), v, dv
        for state, p in zip(reversed(states), reversed(weights), strict=True):
            d_values += p.mT @ g
            dp = g @ values.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * call.scale
            dk += ds.mT @ state
            g, values, d_values = ds @ k, k, dk
        dq[:, :, rows] = g
    found = {"q": dq, "k": dk, "v": dv}
    return {field: found[field].to(call.q.dtype) for field in needs}


def _wide(call: Association) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(call.q.dtype, torch.float32)
    return call.q.to(wide), call.k.to(wide), call.v.to(wide)


def _states_at_once(call: Association) -> list[slice]:
    B, H, L, _ = call.q.shape
    return slices(L, B * H * call.k.shape[2] * (call.steps + 1), _TILE)


def _association_weights(q: Tensor, k: Tensor, rows: slice, call: Association) -> Tensor:
    """softmax(scale q k^T + mask) of some states; zeros for one that sees nothing."""
    scores, mask = call.scale * q @ k.mT, call.mask
    if mask is None:
        return torch.softmax(scores, -1)
    if mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask.to(scores.dtype)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)


def decomposed_association(call: Association) -> Tensor:
    """All states at once, in PyTorch's operators alone."""
    q, every = call.q, slice(None)
    for _ in range(call.steps):
        q = _association_weights(q, call.k, every, call) @ call.k
    return _association_weights(q, call.k, every, call) @ call.v
