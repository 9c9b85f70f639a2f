"""alpha-entmax along rows as an op: one definition for everybody who has an implementation of it.

With s = alpha - 1, p the weights, L = log p, g = p^(1-s) on the support, and an overlined value the
mean under g of its row, the derivatives are

    dx = g (dp - mean(dp)),    ds = -sum h (dp - mean(dp)),    h = p L^2 phi(-s L)

with phi(u) = (e^u - 1 - u) / u^2. `second_derivative` is theirs, from dg/dp = (1-s) g / p,
dg/ds = -g L, dh/dp = (1-s) L^2 phi + L and dh/ds = -p L^3 phi'(-s L). It is made of plain operators
and keeps its graph: derivatives of any order follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import Backend, define_op
from .qpower import least, phi, phi_slope

__all__ = [
    "Entmax",
    "Weights",
    "batch_first",
    "define_entmax",
    "entmax",
    "in_operators",
    "second_derivative",
    "wide",
]

# Newton's steps of a program that cannot ask whether it has converged; long flat rows take 14.
_STEPS = 24


def second_derivative(
    v: Tensor, w: Tensor | None, dp: Tensor, p: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <v, dx> + <w, ds> in dp, p and s; rows along the last dimension.

    Args:
        v, dp, p: (..., N), fp32 or fp64. Rows of zeros give zeros.
        w: (..., 1), or None where ds was not asked for.
        s: () or (..., 1).

    Returns:
        (..., N), (..., N) and, one number per row, (..., 1).
    """
    support = p != 0
    y = torch.where(support, p, 1.0).clamp(min=least(p.dtype))
    L = y.log()
    ratio = (s * -L).exp()  # g / p
    g = torch.where(support, ratio * y, 0.0)
    mass = g.sum(-1, keepdim=True)
    mass = torch.where(mass == 0, 1.0, mass)
    dp = dp - (g * dp).sum(-1, keepdim=True) / mass
    v = v - (g * v).sum(-1, keepdim=True) / mass
    d_g, d_dp = dp * v, g * v
    d_p = d_s = torch.zeros((), dtype=p.dtype, device=p.device)
    if w is not None:
        value = phi(-s * L)
        h = torch.where(support, y * L * L * value, 0.0)
        w_mean = w * h.sum(-1, keepdim=True) / mass
        d_g, d_dp = d_g + dp * w_mean, d_dp + g * w_mean - w * h
        d_p = w * dp * ((1 - s) * L * L * value + L)
        d_s = torch.where(support, w * dp * y * L**3 * phi_slope(-s * L), 0.0)
    d_p = torch.where(support, d_g * (1 - s) * ratio - d_p, 0.0)
    return d_dp, d_p, (d_s - d_g * g * L).sum(-1, keepdim=True)


def in_operators(x: Tensor, s: Tensor, divide: bool = True) -> Tensor:
    """Weights of rows (..., N) as one fixed list of PyTorch's operators: for exported programs.

        w = [1 + s (x - max x - t)]_+ ** (1/s),   t <- t + (F - F^(1-s)) / (s G),   t = 0 at first,

    F the sum of w and G that of w^(1-s): Newton's method of `qexp`, from its safest start.

    Args:
        s: () or (..., 1), in [0, 1].
        divide: whether the weights are divided by their sum at the end.

    Returns:
        (..., N), contiguous, in the dtype of x.
    """
    if isinstance(x.shape[-1], int) and x.shape[-1] == 0:
        return x.contiguous()
    z = x.to(wide(x))
    top = z.amax(-1, keepdim=True)
    z = z - torch.where(top == -torch.inf, 0.0, top)
    # at s = 0 the power is an exponential, and so it is to rounding this near to 0
    s = s.to(x.device, z.dtype).clamp(min=0.5 * torch.finfo(z.dtype).eps)

    def powers(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = s * (z - t)
        inside = u > -1
        L = torch.log1p(torch.where(inside, u, 0.0)) / s
        w = torch.where(inside, L.exp(), 0.0)
        return inside, L, w

    t = torch.zeros_like(top)
    for _ in range(_STEPS):
        inside, L, w = powers(t)
        # G >= F >= 1, but for rounding and rows of -inf, which make no step
        F = w.sum(-1, keepdim=True).clamp(min=1.0)
        G = torch.where(inside, ((1 - s) * L).exp(), 0.0).sum(-1, keepdim=True).clamp(min=1.0)
        t = t - F * torch.expm1(-s * F.log()) / (s * G)
    w = powers(t)[2]
    if divide:
        F = w.sum(-1, keepdim=True)
        w = w / torch.where(F == 0, 1.0, F)
    return torch.where(top < torch.inf, w, torch.nan).to(x.dtype).contiguous()


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: fp32, fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Entmax(NamedTuple):
    """y = entmax_alpha(x) along the last dimension of x (..., N).

    alpha is a tensor in [1, 2]: () or one value per row, (..., 1). A number is a 0-d tensor on the
    CPU, so that a number that changes is no reason to compile again.
    """

    x: Tensor
    alpha: Tensor
    n_iter: int
    fast_math: bool

    def fake(self) -> Tensor:
        return torch.empty_like(self.x, memory_format=torch.contiguous_format)

    def fake_gradients(self, saved: Weights, needs: frozenset[str]) -> dict[str, Tensor]:
        """x is not kept: its gradient has the shape of the weights."""
        of = {"x": saved.out, "alpha": self.alpha}
        return {f: torch.empty_like(of[f], memory_format=torch.contiguous_format) for f in needs}

    @property
    def s(self) -> float | Tensor:
        """alpha - 1: a number where all rows share one that costs nothing to read."""
        if self.alpha.numel() == 1 and self.alpha.device.type == "cpu":
            return self.alpha.item() - 1.0
        return self.alpha.double() - 1

    def d_alpha(self, ds: Tensor) -> Tensor:
        """A gradient in s per row (..., 1), summed to that of alpha."""
        return ds.sum_to_size(self.alpha.shape).to(self.alpha.device, self.alpha.dtype)


class Weights(NamedTuple):
    """All that the backward pass of rows needs: the weights themselves."""

    out: Tensor

    @classmethod
    def fake(cls, call: Any) -> Weights:
        return cls(call.fake())


def _second(
    call: Entmax, y: Tensor, dy: Tensor, to: dict[str, Any], backend: str
) -> dict[str, Any]:
    dtype, alpha = wide(y), call.alpha
    v, w = (None if t is None else t.to(y.device, dtype) for t in (to["x"], to["alpha"]))
    v = torch.zeros_like(y, dtype=dtype) if v is None else v
    s = (alpha - 1).to(y.device, dtype)
    d_dy, d_y, d_s = second_derivative(v, w, dy.to(dtype), y.to(dtype), s)
    return {"d_out": d_dy.to(dy.dtype), "out": d_y.to(y.dtype), "alpha": call.d_alpha(d_s)}


def batch_first(x: Tensor, at: int | None, rank: int) -> Tensor:
    """A vmap's batch in front of `rank` dimensions; without one, broadcasting does the rest."""
    if at is None:
        return x
    x = x.movedim(at, 0)
    return x.reshape(x.shape[0], *(1,) * (rank + 1 - x.dim()), *x.shape[1:])


def define_entmax(namespace: str, triton: tuple[str, str] | None = None) -> Callable[..., Tensor]:
    """Register ``namespace::entmax``, twice differentiable in x and alpha.

    Args:
        triton: the launchers of the forward and of the backward pass, ``"module:function"``.

    Returns:
        A function of (x, alpha, n_iter, fast_math, backend="auto"), the fields of :class:`Entmax`.
    """

    def vmap(info: Any, dims: Any, x: Tensor, alpha: Tensor, *rest: Any) -> tuple[Tensor, int]:
        rank = x.dim() - (dims[0] is not None)
        x = batch_first(x, dims[0], rank)
        x = x if dims[0] is not None else x.expand(info.batch_size, *x.shape)
        return op.overload(x, batch_first(alpha, dims[1], rank), *rest), 0

    def backward_vmap(
        info: Any,
        dims: Any,
        dy: Tensor,
        x: Tensor,
        alpha: Tensor,
        n_iter: int,
        fast_math: bool,
        y: Tensor,
        needs: str,
        backend: str = "auto",
    ) -> Any:
        rank = y.dim() - (dims[5] is not None)
        dy, y = (
            batch_first(t, at, rank).expand(info.batch_size, *(-1,) * rank)
            for t, at in ((dy, dims[0]), (y, dims[5]))
        )
        if dims[2] is None:  # one alpha for the batch has one gradient per member all the same
            alpha = alpha.expand(info.batch_size, *alpha.shape)
        else:
            alpha = alpha.movedim(dims[2], 0)
        rows = batch_first(alpha, 0, rank)
        dx, d_alpha = op.backward(dy, None, rows, n_iter, fast_math, y, needs, backend)
        of_alpha = d_alpha.reshape(alpha.shape) if "alpha" in needs.split(",") else d_alpha
        return (dx, of_alpha), tuple(0 if f in needs.split(",") else None for f in ("x", "alpha"))

    backends = {
        "native": Backend(
            "shared_kernels.native.rows:entmax_forward",
            "shared_kernels.native.rows:entmax_backward",
            Weights,
            why_not="shared_kernels.native.rows:why_not",
        ),
        "torch": Backend(
            "shared_kernels.qexp:entmax_forward", "shared_kernels.qexp:entmax_backward", Weights
        ),
    }
    if triton is not None:
        backends = {"triton": Backend(*triton, Weights), **backends}
    op = define_op(
        f"{namespace}::entmax",
        Entmax,
        backends,
        gradients=("x", "alpha"),
        drops=("x",),
        second=_second,
        autocast=torch.float32,
        vmap=vmap,
        backward_vmap=backward_vmap,
        decomposition=lambda call: in_operators(call.x, call.alpha - 1),
    )

    def entmax(
        x: Tensor, alpha: Tensor, n_iter: int, fast_math: bool, backend: str = "auto"
    ) -> Tensor:
        return op(Entmax(x, alpha, n_iter, fast_math), backend)

    return entmax


entmax = define_entmax("shared_kernels")
