"""The fast path in plain PyTorch: diffmax(alpha) is the threshold solver at s = 1 - alpha.

Made for the CPU, and what runs on any device that Triton does not serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import groups, qexp

from ._call import Bisect, Weights
from ._rows import from_last, to_last

# Rows of at least this length that may be mostly zeros are read in groups of this size, as long as
# at most this share of the groups holds a weight.
_MIN_LENGTH, _GROUP, _MAX_SHARE = 1024, 16, 1 / 7


def bisect(call: Bisect) -> tuple[Tensor, Weights]:
    X, s = to_last(call.X, call.dim), call.s(call.X.shape)
    Y, _ = qexp.normalize(X, s, call.n_iter, divide=call.ensure_sum_one)
    Y = from_last(Y, call.dim)
    return Y, Weights(Y)


def bisect_backward(
    call: Bisect, saved: Weights, G: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    G, Y = to_last(G, call.dim), to_last(saved.out, call.dim)
    s = call.s(saved.out.shape)
    if "alpha" in needs:
        return call.gradients(*qexp.backward_both(G, Y, s))
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
    mass, total = torch.zeros(2, Y.numel() // N, dtype=torch.float64, device="cpu").unbind()
    mean = total.index_add_(0, row, (S * g).double()) / mass.index_add_(0, row, S.double())
    dx = S.mul_(g - mean.to(g.dtype).index_select(0, row)).to(Y.dtype)
    dX = torch.zeros(Y.shape, dtype=Y.dtype, device="cpu")
    dX.view(-1).index_copy_(0, at, dx)
    if len(full):
        dX.view(-1, N)[full] = qexp.backward(G.reshape(-1, N)[full], Y.reshape(-1, N)[full], s)
    return dX
