"""What the operators of this package compute, as dense maths in any floating dtype.

Everything here is O(N_q * N_k) and differentiable by autograd. Nothing optimised imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared_kernels.rows import wide

from ._geometry import first_lists, n_lists

if TYPE_CHECKING:
    from ._call import Attention, CausalLandmarks, LinearCrossEntropy


def multipliers(call: Attention) -> Tensor:
    """The factor M of every (query, key) pair, (B, H, N_q, N_k): 0 where nothing is attended.

    Inside the window M = m(d); a landmark further away than w gets m + (1 - m) g.
    """
    windows, landmarks, bias, ramp = call.windows, call.landmarks, call.bias, call.ramp
    (B, H, n_q), n_k, dtype = windows.shape, call.k.shape[2], wide(call.q)
    if landmarks.dim() == 3:
        landmarks = landmarks[:, :, None]
        bias = None if bias is None else bias[:, :, None]
    start, row_list = call.rows()
    position = torch.arange(n_k - n_q, n_k, device=windows.device)
    key = torch.arange(n_k, device=windows.device)
    d = (position[:, None] - key).to(dtype)  # [N_q, N_k]
    seen = (d >= 0) & (key >= start[:, None])
    w = windows.to(dtype)[..., None]  # [B, H, N_q, 1]
    one, zero = d.new_ones(()), d.new_zeros(())
    m = torch.where(d <= w, one, zero)
    if ramp > 0:
        m = torch.where((d > w) & (d < w + ramp), (ramp + w - d) / ramp, m)

    # g of every (list, key): exp(bias) of the first slot that names the key, 0 without one
    lists, n_slots = landmarks.shape[2:]
    g = torch.zeros(B, H, lists, n_k, dtype=dtype, device=windows.device)
    taken = torch.zeros(B, H, lists, n_k, dtype=torch.bool, device=windows.device)
    for slot in range(n_slots):
        l = landmarks[..., slot].to(torch.int64)  # [B, H, lists]
        named = (key == l[..., None]) & ~taken
        gate = one if bias is None else bias[..., slot, None].to(dtype).exp()
        g = torch.where(named, gate, g)
        taken = taken | named
    g = g[:, :, row_list]  # [B, H, N_q, N_k]
    m = torch.where(d > w, m + (1 - m) * g, m)
    return torch.where(seen, m, zero)


def attention(call: Attention) -> Tensor:
    """out_i = sum_j M_ij exp(s_ij) v_j / sum_j M_ij exp(s_ij), s_ij = scale q_i k_j.

    Plain PyTorch in q's dtype (the op gives it half types in fp32); only M, whose distances no half
    type holds, is made in fp32.
    """
    q = call.q
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (call.k, call.v))
    M = multipliers(call).to(q.dtype)
    s = (q @ k.transpose(-1, -2)) * call.factor
    s = s.masked_fill(M == 0, float("-inf"))
    top = s.amax(-1, keepdim=True).detach() if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    top = top.masked_fill(top == float("-inf"), 0.0)
    e = M * (s - top).exp()
    z = e.sum(-1, keepdim=True)
    return (e / z.masked_fill(z == 0, 1.0)) @ v


def energy(value_norm: Tensor, input_norm: Tensor, alpha: Tensor, causal: bool) -> Tensor:
    """a z(value_norm) + (1 - a) z(input_norm), (B, H, N); causal: z over the tokens up to j.

    z = (n - mean) / max(std, 0.01 mean, 1e-6).
    """

    def z(n: Tensor) -> Tensor:
        if not causal:
            spread = n.std(-1, keepdim=True) if n.shape[-1] > 1 else torch.zeros_like(n)
            mean = n.mean(-1, keepdim=True)
            return (n - mean) / torch.maximum(spread, 0.01 * mean).clamp(min=1e-6)
        rows = []
        for j in range(n.shape[-1]):
            seen = n[..., : j + 1]
            spread = seen.std(-1) if j else torch.zeros_like(n[..., 0])
            mean = seen.mean(-1)
            rows.append((n[..., j] - mean) / torch.maximum(spread, 0.01 * mean).clamp(min=1e-6))
        return torch.stack(rows, -1)

    a = alpha[:, None]
    return a * z(value_norm) + (1 - a) * z(input_norm)[:, None]


def select(scores: Tensor, k: int, allowed: Tensor) -> Tensor:
    """Indices of the k largest allowed scores in rising order, -1 behind; ties: the earlier."""
    n = scores.shape[-1]
    kept = scores.masked_fill(~allowed, float("-inf"))
    order = kept.argsort(dim=-1, descending=True, stable=True)[..., :k]
    legal = allowed.gather(-1, order)
    picked = torch.where(legal, order, n).sort(-1).values
    picked = torch.where(picked == n, -1, picked)
    short = k - picked.shape[-1]
    return torch.nn.functional.pad(picked, (0, short), value=-1).to(torch.int32)


def causal_landmarks(call: CausalLandmarks) -> Tensor:
    """List c of a sequence holds the k best of its tokens before c * block.

    (B, H, ceil(N / block), k); packed: list c of sequence s, which starts at b_s, is number
    b_s // block + s + c.
    """
    scores, k, block, cu_seqlens = call.scores, call.k, call.block, call.cu_seqlens
    B, H, n = scores.shape
    bounds, firsts = [0, n], [0]
    if cu_seqlens is not None:
        bounds, firsts = cu_seqlens.tolist(), first_lists(cu_seqlens, block).tolist()
    shape = (B, H, n_lists(n, n, block, cu_seqlens), k)
    lists = torch.full(shape, -1, dtype=torch.int32, device=scores.device)
    key = torch.arange(n, device=scores.device)
    legal = (scores != float("-inf")).expand(scores.shape)
    for start, stop, first in zip(bounds, bounds[1:], firsts, strict=False):
        for c in range(-(-(stop - start) // block)):
            before = (key >= start) & (key < start + c * block)
            lists[:, :, first + c] = select(scores, k, legal & before)
    return lists


def linear_cross_entropy(call: LinearCrossEntropy) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[label]; logits of a half type are widened."""
    logits = call.hidden @ call.weight.T
    logits = logits.to(wide(logits))
    return torch.nn.functional.cross_entropy(logits, call.labels, reduction="sum")
