"""The fast path in plain PyTorch: diffmax(alpha) is the threshold solver at s = 1 - alpha.

Made for the CPU, and what runs on any device that Triton does not serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import qexp

from ._rows import collect, spread

# Rows that may be mostly zeros are looked through in groups: from this length on, and while few
# groups hold a weight.
_LONG, _GROUP, _FEW = 1024, 16, 1 / 7


def _s(alpha: Tensor, shape: tuple[int, ...], dim: int) -> float | Tensor:
    alpha = spread(alpha, shape, dim)
    if alpha.dim() == 0 and alpha.device.type == "cpu":
        return 1.0 - alpha.item()
    return 1 - alpha.double()


def bisect(X: Tensor, alpha: Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> Tensor:
    rows = X.movedim(dim, -1)
    weights, _ = qexp.normalize(rows, _s(alpha, X.shape, dim), n_iter, divide=ensure_sum_one)
    return weights.movedim(-1, dim)


def bisect_escort(
    X: Tensor, alpha: Tensor, dim: int, n_iter: int, ensure_sum_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, s = X.movedim(dim, -1), _s(alpha, X.shape, dim)
    found = qexp.normalize_with_escort(rows, s, n_iter, divide=ensure_sum_one)
    Y, escort, mass = (rows.movedim(-1, dim) for rows in found)
    return Y, escort, mass


def bisect_backward(
    G: Tensor, Y: Tensor, alpha: Tensor, dim: int, alpha_grad: bool
) -> tuple[Tensor, Tensor]:
    s = _s(alpha, Y.shape, dim)
    G, rows = G.movedim(dim, -1), Y.movedim(dim, -1)
    if not alpha_grad:
        dX = _support_backward(G, rows, s)
        dX = qexp.backward(G, rows, s) if dX is None else dX
        return dX.movedim(-1, dim), alpha.new_zeros(alpha.shape)
    dX, d_s = qexp.backward_both(G, rows, s)
    return dX.movedim(-1, dim), collect(-d_s, alpha, dim)


def escort_backward(
    G: Tensor, Y: Tensor, alpha: Tensor, escort: Tensor, mass: Tensor, dim: int
) -> Tensor:
    rows = (t.movedim(dim, -1) for t in (G, escort, mass))
    return qexp.escort_backward(*rows).movedim(-1, dim)


def _support_backward(G: Tensor, Y: Tensor, s: float | Tensor) -> Tensor | None:
    """`qexp.backward` from the weights above 0 alone; None where it would not be faster.

    Which of the two a row takes is up to that row: its bits do not depend on the others.
    """
    N = Y.shape[-1]
    if not isinstance(s, float) or s <= 0.5 or N < _LONG or N % _GROUP or Y.device.type != "cpu":
        return None  # at s = 1/2 a square root is all that whole rows cost
    width = N // _GROUP
    held = Y.reshape(-1, _GROUP, width).amax(1) != 0
    is_full = held.sum(-1) * _GROUP > _FEW * N
    if bool(is_full.all()):
        return None
    full = is_full.nonzero().squeeze(1)
    found = held.logical_and_(is_full.logical_not().unsqueeze(1)).view(-1).nonzero().squeeze(1)
    # Column j of the maxima stands for Y[:, j], Y[:, j + width], ...
    row = torch.div(found, width, rounding_mode="floor")
    first = (found + row * (N - width)).unsqueeze(1)
    at = (first + torch.arange(_GROUP) * width).view(-1)
    y = Y.reshape(-1).index_select(0, at)
    kept = y.nonzero().squeeze(1)
    y, at = y.index_select(0, kept), at.index_select(0, kept)
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
