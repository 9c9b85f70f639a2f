"""Entmax of rows: the solver that diffmax shares, at s = alpha - 1."""

from torch import Tensor

from shared_kernels.rows import Entmax, Weights
from shared_kernels.triton.rows import launch_rows_backward, launch_rows_forward


def launch_entmax_forward(call: Entmax) -> tuple[Tensor, Weights]:
    y = launch_rows_forward(call.x, call.s, call.n_iter, fast=call.fast_math)
    return y, Weights(y)


def launch_entmax_backward(
    call: Entmax, saved: Weights, dy: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    dx, ds = launch_rows_backward(dy, saved.out, call.s, "alpha" in needs, call.fast_math)
    return {"x": dx} if ds is None else {"x": dx, "alpha": call.d_alpha(ds)}
