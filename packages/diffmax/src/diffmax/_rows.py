"""How alpha lies along the rows: spread over them for the solver, collected for its gradient."""

from __future__ import annotations

from torch import Tensor


def row_shape(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """The shape of one number per row: size 1 along `dim`."""
    return tuple(1 if i == dim % len(shape) else n for i, n in enumerate(shape))


def to_last(x: Tensor, dim: int) -> Tensor:
    """x with `dim` moved to the end; x itself where it is there already."""
    return x if dim in (-1, x.dim() - 1) else x.movedim(dim, -1)


def from_last(x: Tensor, dim: int) -> Tensor:
    """What `to_last` makes, back again."""
    return x if dim in (-1, x.dim() - 1) else x.movedim(-1, dim)


def spread(alpha: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """alpha as a 0-d tensor, or as one value per row (..., 1) with `dim` moved to the end."""
    if alpha.numel() == 1:
        return alpha.reshape(())
    return alpha.expand(row_shape(shape, dim)).movedim(dim, -1)


def collect(d_rows: Tensor, alpha: Tensor, dim: int) -> Tensor:
    """Sum a gradient per row (..., 1), `dim` at the end, to alpha's shape, dtype and device."""
    d_rows = d_rows.movedim(-1, dim)
    lead = d_rows.dim() - alpha.dim()
    whole = [i for i in range(d_rows.dim()) if i < lead or alpha.shape[i - lead] == 1]
    total = d_rows.sum(whole, keepdim=True) if whole else d_rows
    return total.reshape(alpha.shape).to(alpha.device, alpha.dtype)
