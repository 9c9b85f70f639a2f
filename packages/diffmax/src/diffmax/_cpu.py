"""The fast path in plain PyTorch: diffmax(alpha) is the threshold solver at s = 1 - alpha.

Made for the CPU, and what runs on any device that Triton does not serve.
"""

from __future__ import annotations

from torch import Tensor

from shared_kernels import qexp

from ._rows import collect, spread


def _s(alpha: Tensor, shape: tuple[int, ...], dim: int) -> float | Tensor:
    alpha = spread(alpha, shape, dim)
    if alpha.dim() == 0 and alpha.device.type == "cpu":
        return 1.0 - alpha.item()
    return 1 - alpha.float() if alpha.element_size() < 4 else 1 - alpha


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
        return qexp.backward(G, rows, s).movedim(-1, dim), alpha.new_zeros(alpha.shape)
    dX, d_s = qexp.backward_both(G, rows, s)
    return dX.movedim(-1, dim), collect(-d_s, alpha, dim)


def escort_backward(
    G: Tensor, Y: Tensor, alpha: Tensor, escort: Tensor, mass: Tensor, dim: int
) -> Tensor:
    rows = (t.movedim(dim, -1) for t in (G, escort, mass))
    return qexp.escort_backward(*rows).movedim(-1, dim)
