"""One update of a Hopfield memory whose patterns are spread over ranks.

Queries are the same on every rank. Scores stay where their patterns are: softmax needs a row's
log-sum-exp over all ranks; a sparse separation the few scores that are above the threshold of the
patterns of one rank, a lower bound of that of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared_kernels import checks, distributed, qexp

from ._attention import TILE
from ._separation import Normalizer
from ._tiles import slices

# s = alpha - 1 of the separations whose weights ranks can find together.
_POWERS = {"softmax": 0.0, "entmax15": 0.5, "sparsemax": 1.0}


def ranks_of(
    group: Any,
    memory: Tensor,
    query: Tensor,
    separation: str | Normalizer,
    options: tuple[Any, ...],
) -> distributed.Ranks | None:
    """The ranks of a group whose patterns and queries fit; refused on all ranks or on none."""
    ranks = distributed.resolve(group)
    if ranks is None:
        return None
    with distributed.agreement(ranks) as agreed:
        if separation not in _POWERS:
            needs = f"be one of {', '.join(_POWERS)} with `group`"
            checks.fail("separation", needs, separation, error=NotImplementedError)
        if memory.dim() != 2:
            checks.fail("memory", "have shape (N, d) with `group`", tuple(memory.shape))
        plain = query.detach().double().cpu().numpy()
        agreed.equal["query"] = distributed.fingerprint(plain, str(query.dtype))
        agreed.equal["memory.dtype"] = distributed.fingerprint(str(memory.dtype))
        agreed.equal["beta, steps, eps and separation"] = distributed.fingerprint(
            options, separation
        )
        # the backward pass exchanges messages, too
        grad = torch.is_grad_enabled() and (memory.requires_grad or query.requires_grad)
        agreed.equal["requires_grad of memory or query"] = int(grad)
    return ranks


def longest(memory: Tensor, ranks: distributed.Ranks) -> Tensor:
    """(1,) the length of the longest pattern of all ranks; 0 without one."""
    wide = torch.promote_types(memory.dtype, torch.float32)
    own = memory.new_zeros(1, dtype=wide)
    if len(memory):
        own = torch.linalg.vector_norm(memory.detach().to(wide), dim=-1).amax().view(1)
    return ranks.gather(own).amax(0)


def attend(
    q: Tensor, memory: Tensor, beta: float, separation: str, ranks: distributed.Ranks
) -> Tensor:
    """sum_j p_j m_j over the patterns of all ranks, p = separation(beta q M^T); q is (L, d)."""
    out: Tensor = _Update.apply(q, memory, beta, _POWERS[separation], ranks)
    return out


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, memory: Tensor, beta: float, s: float, ranks: distributed.Ranks
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        M = memory.to(wide)
        sums = torch.zeros(q.shape, dtype=wide, device=q.device)
        for rows in _tiles(q, memory, ranks):
            sums[rows] = _weights(beta * q[rows].to(wide) @ M.T, s, ranks) @ M
        ctx.save_for_backward(q, memory)
        ctx.given = (beta, s, ranks)
        return ranks.total(sums).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (q, memory), (beta, s, ranks) = ctx.saved_tensors, ctx.given
        wide = torch.promote_types(q.dtype, torch.float32)
        M = memory.to(wide)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        d_memory = torch.zeros_like(M)
        for rows in _tiles(q, memory, ranks):
            b_q, b_d = q[rows].to(wide), d_out[rows].to(wide)
            p = _weights(beta * b_q @ M.T, s, ranks)
            g = p.pow(1.0 - s) * (p > 0)
            dp = b_d @ M.T
            mass, mean = ranks.total(torch.stack((g.sum(-1), (g * dp).sum(-1)))).unsqueeze(-1)
            d_scores = g * (dp - mean / mass.masked_fill(mass == 0, 1.0)) * beta
            d_memory.addmm_(p.T, b_d).addmm_(d_scores.T, b_q)
            dq[rows] = d_scores @ M
        return ranks.total(dq).to(q.dtype), d_memory.to(memory.dtype), None, None, None


def _tiles(q: Tensor, memory: Tensor, ranks: distributed.Ranks) -> list[slice]:
    """Rows whose scores over a rank's patterns stay within a constant; alike on all ranks."""
    most = int(ranks.gather(torch.tensor([len(memory)], device=q.device)).amax())
    return slices(len(q), most, TILE)


def _weights(x: Tensor, s: float, ranks: distributed.Ranks) -> Tensor:
    """(L, n) the weights of own scores among those of all ranks."""
    if s == 0.0:
        own = x.logsumexp(-1) if x.shape[1] else x.new_full((len(x),), -torch.inf)
        return torch.exp(x - ranks.gather(own).logsumexp(0)[:, None])
    tau = x.new_full((len(x), 1), -torch.inf)
    if x.shape[1]:
        tau = qexp.normalize(x, s)[1]
        # rounding must not lift a bound above the threshold
        tau = tau - 2**12 * torch.finfo(x.dtype).eps * (1 + tau.abs())
    bound = ranks.gather(tau).amax(0)
    keep = (s * x <= bound).logical_not_()  # a NaN is kept
    row, key = keep.nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(x))
    width = int(ranks.gather(count.amax().view(1)).amax()) if len(x) else 0
    slot = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count)[row]
    few = x.new_full((len(x), width), -torch.inf)
    few[row, slot] = x[row, key]
    every = torch.cat(list(ranks.gather(few)), 1)
    p, _ = qexp.normalize(every, s)
    out = torch.zeros_like(x)
    out[row, key] = p[row, ranks.rank * width + slot]
    return out
