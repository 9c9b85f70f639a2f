"""The fast path in plain PyTorch: diffmax(alpha) is the threshold solver at s = 1 - alpha.

Made for the CPU, and what runs on any device that Triton does not serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import groups, qexp

from ._call import Bisect, Escort

# Rows of at least this length that may be mostly zeros are read in groups of this size, as long as
# at most this share of the groups holds a weight.
_MIN_LENGTH, _GROUP, _MAX_SHARE = 1024, 16, 1 / 7


def bisect(call: Bisect) -> tuple[Tensor, Escort]:
    rows, s = call.X.movedim(call.dim, -1), call.s(call.X.shape)
    if not call.save:
        Y, _ = qexp.normalize(rows, s, call.n_iter, divide=call.ensure_sum_one)
        Y = Y.movedim(-1, call.dim)
        return Y, Escort(Y, Y.new_empty(0), Y.new_empty(0))
    found = qexp.normalize_with_escort(rows, s, call.n_iter, divide=call.ensure_sum_one)
    saved = Escort(*(x.movedim(-1, call.dim) for x in found))
    return saved.out, saved


def bisect_backward(
    call: Bisect, saved: Escort, G: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    G, Y = G.movedim(call.dim, -1), saved.out.movedim(call.dim, -1)
    s = call.s(saved.out.shape)
    if "alpha" in needs:
        return call.gradients(*qexp.backward_both(G, Y, s))
    if call.save:
        escort, mass = (x.movedim(call.dim, -1) for x in (saved.escort, saved.mass))
        return call.gradients(qexp.escort_backward(G, escort, mass), None)
    dX = _support_backward(G, Y, s)
    return call.gradients(qexp.backward(G, Y, s) if dX is None else dX, None)


def _support_backward(G: Tensor, Y: Tensor, s: float | Tensor) -> Tensor | None:
    """`qexp.backward` from the weights above 0 alone; None where it would not be faster.

    Which of the two a row takes is up to that row: its bits do not depend on the others.
    """
    N = Y.shape[-1]
    if (
        not isinstance(s, float)
        or s <= 0.5
        or N < _MIN_LENGTH
        or N % _GROUP
        or Y.device.type != "cpu"
    ):
        return None  # at s = 1/2 a square root is all that whole rows cost
    held = groups.maxima(Y.reshape(-1, N), _GROUP) != 0
    is_full = held.sum(-1) * _GROUP > _MAX_SHARE * N
    if bool(is_full.all()):
        return None
    full = is_full.nonzero().squeeze(1)
    held.logical_and_(is_full.logical_not().unsqueeze(1))
    row, members = groups.members(held, _GROUP)
    at = members.view(-1)
    y = Y.reshape(-1).index_select(0, at)
    kept = y.nonzero().squeeze(1)
    y, at = y.index_select(0, kept), at.index_select(0, kept).long()
    row = row.index_select(0, torch.div(kept, _GROUP, rounding_mode="floor"))
    g = G.reshape(-1).index_select(0, at).to(torch.promote_types(y.dtype, torch.float32))
    S = y.to(g.dtype).log_().mul_(1 - s).exp_()
    # Sums run over the entries one by one: in fp64.
    mass, total = torch.zeros(2, Y.numel() // N, dtype=torch.float64).unbind()
    mean = total.index_add_(0, row, (S * g).double()) / mass.index_add_(0, row, S.double())
    dx = S.mul_(g - mean.to(g.dtype).index_select(0, row)).to(Y.dtype)
    dX = torch.zeros(Y.shape, dtype=Y.dtype)
    dX.view(-1).index_copy_(0, at, dx)
    if len(full):
        dX.view(-1, N)[full] = qexp.backward(G.reshape(-1, N)[full], Y.reshape(-1, N)[full], s)
    return dX
