"""diffmax on a GPU: the solver of rows at s = 1 - alpha."""

from __future__ import annotations

from torch import Tensor

from shared_kernels.triton.rows import launch_rows_backward, launch_rows_forward

from .._call import Bisect, Weights


def launch_bisect_forward(call: Bisect) -> tuple[Tensor, Weights]:
    rows, s = call.X.movedim(call.dim, -1), call.s(call.X.shape)
    Y = launch_rows_forward(rows, s, call.n_iter, call.ensure_sum_one).movedim(-1, call.dim)
    return Y, Weights(Y)


def launch_bisect_backward(
    call: Bisect, saved: Weights, G: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    s = call.s(saved.out.shape)
    G, Y = G.movedim(call.dim, -1), saved.out.movedim(call.dim, -1)
    return call.gradients(*launch_rows_backward(G, Y, s, "alpha" in needs))
