"""How wrong a result may be: one table, relative to the size of the exact answer."""

from __future__ import annotations

import torch
from torch import Tensor

# (dtype, kind) -> largest |out - exact| / max(1, max|exact|). "rounding" is for a few operations in
# a row (a logarithm, the sum of one row of weights), "forward" and "gradient" for whole ops.
TABLE = {
    (torch.float64, "rounding"): 1e-12,
    (torch.float64, "forward"): 1e-9,
    (torch.float64, "gradient"): 1e-7,
    (torch.float32, "rounding"): 1e-6,
    (torch.float32, "forward"): 2e-5,
    (torch.float32, "gradient"): 2e-4,
    (torch.float16, "rounding"): 1e-3,
    (torch.float16, "forward"): 2e-3,
    (torch.float16, "gradient"): 8e-3,
    (torch.bfloat16, "rounding"): 8e-3,
    (torch.bfloat16, "forward"): 1.6e-2,
    (torch.bfloat16, "gradient"): 6e-2,
}


def tolerance(dtype: torch.dtype, kind: str = "forward") -> float:
    return TABLE[dtype, kind]


def _error(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest difference and the exact answer's size; non-finite entries must agree exactly."""
    if out.shape != exact.shape:
        raise AssertionError(f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}")
    out64, exact64 = out.detach().double(), exact.detach().double()
    finite = exact64.isfinite()
    same = torch.where(finite, out64.isfinite(), out64 == exact64) | (
        out64.isnan() & exact64.isnan()
    )
    if not bool(same.all()):
        raise AssertionError(f"{int((~same).sum())} entries are not finite where they should be")
    if not finite.any():
        return 0.0, 1.0
    difference = (out64 - exact64)[finite].abs().max().item()
    return difference, max(1.0, exact64[finite].abs().max().item())


def assert_close(out: Tensor, exact: Tensor, kind: str = "forward", scale: float = 1.0) -> None:
    """|out - exact| <= scale * tolerance(out.dtype, kind) * max(1, max|exact|), everywhere.

    ``scale`` < 1 tightens; a test that needs ``scale`` > 1 must say why where it uses it.
    """
    difference, size = _error(out, exact)
    bound = scale * tolerance(out.dtype, kind) * size
    if not difference <= bound:
        raise AssertionError(
            f"{kind} error {difference:.3g} exceeds {bound:.3g} "
            f"({out.dtype}, answers up to {size:.3g})"
        )


def assert_no_worse(out: Tensor, *, eager: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The rule for half types: at most ``factor`` times the error of plain PyTorch in that dtype.

    One rounding of the answer is always allowed.
    """
    if out.dtype != eager.dtype:
        raise AssertionError(f"dtype {out.dtype}, expected {eager.dtype}")
    (ours, size), (theirs, _) = _error(out, exact), _error(eager, exact)
    bound = factor * max(theirs, torch.finfo(out.dtype).eps * size / 2)
    if not ours <= bound:
        raise AssertionError(f"error {ours:.3g}, plain {out.dtype} PyTorch errs by {theirs:.3g}")
