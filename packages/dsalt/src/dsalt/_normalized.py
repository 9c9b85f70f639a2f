"""Window + landmark attention with any map from scores to weights, in plain PyTorch.

Chunks of queries, recomputed in the backward pass: memory O(N D), time O((w + K) N).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shared_kernels.calls import replaced
from shared_kernels.rows import wide

from ._call import Attention

CHUNK = 64


def attention(
    call: Attention,
    rows: tuple[Tensor, Tensor],
    normalizer: Callable[[Tensor, int], Tensor],
    reach: float,
) -> Tensor:
    """out_i = sum_j p_ij v_j, p_i = normalizer(s_i + log M_i) over the keys with M > 0.

    ``rows`` are the first visible key and the landmark list of each query, (N_q,) or (B, N_q).
    ``reach`` bounds the windows: it sizes the slices, so that no value has to be read.
    Each key stands once: a landmark outside its row's full window keeps only its landmark slot.
    """
    q, landmarks, bias = call.q, call.landmarks, call.bias
    n_q, n_k = q.shape[2], call.k.shape[2]
    if q.numel() == 0:
        return q.clone()
    if landmarks.dim() == 3:
        landmarks = landmarks[:, :, None]
        bias = None if bias is None else bias[:, :, None]
    start, row_list = rows
    span = math.ceil(reach + call.ramp)
    parts = []
    for r0 in range(0, n_q, CHUNK):
        r1 = min(n_q, r0 + CHUNK)
        p0, p1 = r0 + n_k - n_q, r1 + n_k - n_q
        lists = row_list[..., r0:r1]
        part = replaced(
            call,
            q=q[:, :, r0:r1],
            windows=call.windows[:, :, r0:r1],
            landmarks=_of_rows(landmarks, lists),
            bias=None if bias is None else _of_rows(bias, lists),
        )
        arguments = (part, start[..., r0:r1], (p0, p1, max(0, p0 - span)), normalizer)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False))
        else:
            parts.append(_chunk(*arguments))
    return torch.cat(parts, 2)


def _of_rows(x: Tensor, lists: Tensor) -> Tensor:
    """x (B, H, lists, K) at the list of each row, (n,) or (B, n): (B, H, n, K)."""
    if lists.dim() == 1:
        return x[:, :, lists]
    index = lists[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return x.gather(2, index)


def _chunk(
    call: Attention,
    start: Tensor,
    bounds: tuple[int, int, int],
    normalizer: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """The output of some queries, each of which has a list of its own: landmarks (B, H, n, K).

    ``bounds``: the positions of the first query and of the end, and the first key of the slice.
    """
    (p0, p1, lo), k, v, ramp = bounds, call.k, call.v, call.ramp
    (B, H, n, D), H_kv = call.q.shape, k.shape[1]
    dtype = wide(call.q)
    q, w = call.q.to(dtype) * call.factor, call.windows[..., None]  # [B, H, n, D], [B, H, n, 1]
    keys, values = k[:, :, lo:p1].to(dtype), v[:, :, lo:p1].to(dtype)
    grouped = q.reshape(B, H_kv, -1, D)
    s = (grouped @ keys.transpose(-1, -2)).view(B, H, n, -1)  # [B, H, n, W]
    place = torch.arange(p0, p1, device=q.device)[:, None]
    o_k = torch.arange(lo, p1, device=q.device)
    d = (place - o_k).to(dtype)
    start = start.view(-1, 1, n, 1)
    seen = (d < w + ramp) & (d >= 0) & (o_k >= start)
    m = _edge(d, w, ramp)

    l = call.landmarks.to(torch.int64)  # [B, H, n, K]
    d_l = (place - l).to(dtype)
    far = (l >= 0) & (l >= start) & (d_l > w)
    column = torch.where(far & (l >= lo), l - lo, o_k.shape[0])
    twice = torch.zeros(B, H, n, o_k.shape[0] + 1, dtype=torch.bool, device=q.device)
    twice = twice.scatter(-1, column, torch.ones_like(column, dtype=torch.bool))
    seen = seen & ~twice[..., :-1]
    # a landmark's log M; far ones have M = g, whatever number g is
    gate = torch.zeros_like(d_l)
    if call.bias is not None:
        m_l = _edge(d_l, w, ramp).clamp(max=1 - torch.finfo(dtype).eps)
        both = torch.logaddexp(m_l.log(), torch.log1p(-m_l) + call.bias)
        gate = torch.where(far & (d_l < w + ramp), both, call.bias)
    group = torch.arange(H, device=q.device) // (H // H_kv)
    batch = torch.arange(B, device=q.device)[:, None, None, None]
    where = (batch, group[:, None, None], l.clamp(min=0))
    l_k, l_v = k[where].to(dtype), v[where].to(dtype)  # [B, H, n, K, D]
    t = (l_k @ q[..., None]).squeeze(-1)

    dead = torch.tensor(float("-inf"), dtype=dtype, device=q.device)
    s, t, gate = torch.where(seen, s, dead), torch.where(far, t, dead), torch.where(far, gate, 0.0)
    if normalizer is torch.softmax:  # differences alone count: gates are lost beside a large score
        top = torch.cat((s, t + gate), -1).amax(-1, keepdim=True).detach()
        top = torch.where(top == -torch.inf, 0.0, top)
        s, t = s - top, t - top
    s, t = s + m.log(), t + gate
    p = normalizer(torch.cat((s, t), -1), -1)
    p_window, p_marks = p.split((s.shape[-1], t.shape[-1]), -1)
    out: Tensor = (p_window.reshape(B, H_kv, -1, s.shape[-1]) @ values).view(B, H, n, D)
    out = out + (p_marks[..., None, :] @ l_v).squeeze(-2)
    return out.to(k.dtype)


def _edge(d: Tensor, w: Tensor, ramp: float) -> Tensor:
    """m(d) strictly inside the ramp, where it has a derivative in w, and 1 elsewhere."""
    return torch.where((d > w) & (d < w + ramp), (ramp + w - d) / ramp, 1.0)
