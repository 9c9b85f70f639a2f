"""The threshold solver of the sparse normalisers, in plain PyTorch.

    weights_i = [s * x_i - tau]_+ ** (1 / s),    tau such that the weights of a row sum to 1

with 0 <= s <= 1: s -> 0 is softmax, s = 1/2 is 1.5-entmax, s = 1 is sparsemax. With p = 1/s,
F(tau) = sum [s x - tau]_+^p and G = sum [s x - tau]_+^(p-1), Newton's method on the p-norm

    tau <- tau + (F - F^(1 - s)) / G,    from tau = max(max(s x) - 1, mean(s x) - N^(-s))

rises monotonically to the root (F^s is convex and decreasing in tau): it needs no bracket and drops
no entry. This is the path of devices that neither the native library nor Triton serves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .qpower import least, phi
from .rows import Entmax, Weights, wide
from .rows import entmax as _entmax

__all__ = ["backward", "backward_both", "backward_s", "entmax", "normalize", "sparsemax"]

# Elements at once, of which there are four buffers in the solver and a dozen in the derivatives.
_CHUNK, _CHUNK_OF_DERIVATIVES = 1 << 17, 1 << 15
# Below this s a base is 1 - O(s), whose rounding error the power would raise by 1/s: 1 is left out.
_LOG1P_BELOW = 0.03


def _by_rows(s: float | Tensor, x: Tensor, chunk: int) -> tuple[Tensor, list[slice]]:
    """s as (R, 1) in the dtype of sums, and the R rows of x (..., N) a few at a time."""
    dtype, R, N = wide(x), x.shape[:-1].numel(), max(1, x.shape[-1])
    s = torch.as_tensor(s, dtype=dtype, device=x.device).detach()
    # of zero, a number whose log1p is exact
    s = s.clamp(min=2.0**-40 if dtype == torch.float32 else 2.0**-70)
    s = s.expand(R, 1) if s.numel() == 1 else s.expand(*x.shape[:-1], 1).reshape(R, 1)
    n = max(1, chunk // N)
    return s, [slice(start, start + n) for start in range(0, R if x.numel() else 0, n)]


def _powers(v: Tensor, c: Tensor, s: Tensor, near: bool | Tensor, w: Tensor, g: Tensor) -> None:
    """b ** p and b ** (p - 1) into w and g, with p = 1/s and b = [v + c]_+, or [1 + v + c]_+."""
    floor = -80.0 if v.dtype == torch.float32 else -600.0  # exponentials below it are slow
    low = torch.where(s < _LOG1P_BELOW, (s * floor).expm1(), (s * floor).exp())
    torch.maximum(torch.add(v, c, out=g), low, out=g)
    if isinstance(near, bool):
        (torch.log1p if near else torch.log)(g, out=w)
    else:
        torch.where(near, g.log1p(), g.log(), out=w)
    torch.threshold_(w.div_(s).exp_(), 3 * math.exp(floor), 0.0)
    torch.div(w, g if near is False else g.add_(near), out=g)


def _solve(v: Tensor, s: Tensor, n_iter: int, w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of rows v = s (x - max) <= 0 into w; their sums, and s max - tau - 1."""
    near, g = s < _LOG1P_BELOW, torch.empty_like(v)
    kind = near if len(near.unique()) == 2 else bool(near[0])
    start, flat = near.logical_not().to(v.dtype), s * -math.log(v.shape[-1])
    c = torch.where(near, flat.expm1(), flat.exp()) - v.mean(-1, keepdim=True)
    c = torch.minimum(c.add_(4 * torch.finfo(v.dtype).eps), start)
    # from such an F - 1 on, one more step is exact to rounding
    steep, smooth = (2e-6, 2e-4) if v.dtype == torch.float32 else (1e-13, 1e-9)
    enough, is_late = torch.where(s > 0.55, steep, smooth), torch.ones_like(near)
    for _ in range(n_iter):
        _powers(v, c, s, kind, w, g)
        F, G = w.sum(-1, keepdim=True), g.sum(-1, keepdim=True)
        # without cancellation at F -> 1; never down: rounding must not lift an entry of weight 0
        step = torch.expm1(F.log().mul(-s)).mul_(F).neg_().div_(G).clamp_(min=0)
        # a row that has converged does not move: its bits are not up to the other rows
        following = torch.where(is_late, c - step, c)
        is_late = is_late & (F - 1 > enough) & (following != c)
        c = following
        if not bool(is_late.any()):
            break
    _powers(v, c, s, kind, w, g)
    return w.sum(-1, keepdim=True), c - start


def _check_scores(x: Tensor) -> None:
    checks.floating("x", x)
    if x.dim() == 0:
        checks.fail("x", "have at least one dimension", "a 0-d tensor")


@torch.no_grad()
def normalize(
    x: Tensor, s: float | Tensor, n_iter: int = 40, divide: bool = True
) -> tuple[Tensor, Tensor]:
    """Sparse weights [s x - tau]_+ ** (1/s) along the last dimension, and their threshold.

    Args:
        x: (..., N) scores, any floating dtype. Entries of -inf get weight 0.
        s: sparsity in [0, 1], a float or a tensor that broadcasts to (..., 1): one value per row.
        n_iter: cap on the Newton steps.
        divide: divide by the sum at the end. Without it the sum is 1 to 1e-5 (fp32), 1e-12 (fp64).

    Returns:
        p: (..., N) in the dtype of x. A row of only -inf gives zeros; a row with NaN or +inf, NaN.
        tau: (..., 1) in units of s * x, in fp32 (fp64 for fp64); 0 for a dead row.

    A row's bits do not depend on the other rows. `backward` and `backward_s` are its derivatives.
    """
    _check_scores(x)
    if not isinstance(s, Tensor) and not 0.0 <= s <= 1.0:
        raise ValueError(f"`s` must be in [0, 1], got {s}; 0 is softmax and 1 is sparsemax")
    checks.positive_int("n_iter", n_iter)
    p = torch.empty_like(x, memory_format=torch.contiguous_format)
    tau = torch.zeros(*x.shape[:-1], 1, dtype=wide(x), device=x.device)
    every_s, parts = _by_rows(s, x, _CHUNK)
    of_x, of_p, of_tau = (a.view(len(every_s), a.shape[-1]) for a in (x.contiguous(), p, tau))
    for rows in parts:
        of_s, v = every_s[rows], of_x[rows].to(tau.dtype)
        top = v.amax(-1, keepdim=True)
        live = top.isfinite()
        # a harmless row in the place of one whose answer is written below
        m = top.masked_fill(~live, 0.0)
        v = torch.where(live, v, 0.0).sub_(m).mul_(of_s)
        w = of_p[rows] if p.dtype == v.dtype else torch.empty_like(v)
        F, c = _solve(v, of_s, n_iter, w)
        dead = torch.where(top == -math.inf, 0.0, math.nan).to(w.dtype)
        of_p[rows] = torch.where(live, w.div_(F) if divide else w, dead)
        of_tau[rows] = torch.where(live, m * of_s - 1 - c, dead)
    return p, tau


@torch.no_grad()
def _vjp(dy: Tensor, p: Tensor, s: float | Tensor, wants: str) -> dict[str, Tensor]:
    """The gradients that are wanted, "x" and "s", from the divided weights p; 0 in dead rows."""
    dtype, N, found = wide(p), p.shape[-1], {}
    if "x" in wants:
        found["x"] = torch.empty_like(p, memory_format=torch.contiguous_format)
    if "s" in wants:
        found["s"] = torch.zeros(*p.shape[:-1], 1, dtype=dtype, device=p.device)
    every_s, parts = _by_rows(s, p, _CHUNK_OF_DERIVATIVES)
    of_p, of_dy = (a.reshape(len(every_s), N) for a in (p, dy))
    for rows in parts:
        of_s, y, d = every_s[rows], of_p[rows].to(dtype), of_dy[rows].to(dtype)
        u = y.clamp(min=least(dtype)).log_().mul_(-of_s)
        g = u.exp().mul_(y)  # exactly 0 outside the support; NaN stays
        mass = g.sum(-1, keepdim=True).clamp_(min=least(dtype))  # of a dead row it is 0
        d = d - (g * d).sum(-1, keepdim=True).div_(mass)
        if "x" in wants:
            found["x"].view(-1, N)[rows] = g.mul_(d)
        del g  # phi asks for room
        if "s" in wants:
            h = phi(u).mul_(u.div_(of_s).square_().mul_(y))
            found["s"].view(-1, 1)[rows] = -h.mul_(d).sum(-1, keepdim=True)
    return found


def backward(dy: Tensor, p: Tensor, s: float | Tensor) -> Tensor:
    """dL/dx of `normalize` from dL/dp and p: g (dy - sum(g dy)/sum(g)), g = p^(1-s) where p > 0."""
    return _vjp(dy, p, s, "x")["x"]


def backward_s(dy: Tensor, p: Tensor, s: float | Tensor) -> Tensor:
    """dL/ds per row, (..., 1): -sum h (dy - sum(g dy)/sum(g)), h = p L^2 phi(-s L), L = log p."""
    return _vjp(dy, p, s, "s")["s"]


def backward_both(dy: Tensor, p: Tensor, s: float | Tensor) -> tuple[Tensor, Tensor]:
    """`backward` and `backward_s` in one pass."""
    found = _vjp(dy, p, s, "xs")
    return found["x"], found["s"]


def entmax_forward(call: Entmax) -> tuple[Tensor, Weights]:
    """What the op `rows.entmax` and its like run."""
    y = normalize(call.x, call.s, call.n_iter)[0]
    return y, Weights(y)


def entmax_backward(
    call: Entmax, saved: Weights, dy: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    found = _vjp(dy, saved.out, call.s, "x" * ("x" in needs) + "s" * ("alpha" in needs))
    return {{"s": "alpha"}.get(f, f): g if f == "x" else call.d_alpha(g) for f, g in found.items()}


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """alpha-entmax along `dim`: [(alpha-1) x - tau]_+ ** (1/(alpha-1)), summing to 1.

    Args:
        x: scores of any shape and floating dtype.
        alpha: in [1, 2]; 1 is softmax, 2 is sparsemax. A tensor must broadcast against x with
            size 1 along `dim`, and receives its gradient. Twice differentiable in both.
        dim: the dimension that sums to 1.

    Example:
        >>> entmax(torch.tensor([2.0, 1.0, -1.0]), alpha=2.0)
        tensor([1., 0., 0.])
    """
    _check_scores(x)
    if not isinstance(alpha, Tensor):
        if not 1.0 <= alpha <= 2.0:
            raise ValueError(f"`alpha` must be in [1, 2], got {alpha}; 1 is softmax, 2 sparsemax")
        alpha = torch.full((), alpha, dtype=torch.float64, device="cpu")
    elif alpha.dim() > 0:
        shape = [1 if i == dim % x.dim() else n for i, n in enumerate(x.shape)]
        if torch.broadcast_shapes(alpha.shape, shape) != torch.Size(shape):
            must = f"broadcast to {tuple(shape)} (size 1 along dim {dim})"
            checks.fail("alpha", must, f"shape {tuple(alpha.shape)}")
        alpha = alpha.expand(shape).movedim(dim, -1)
    return _entmax(x.movedim(dim, -1), alpha, 40, True).movedim(-1, dim)


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """The Euclidean projection of x onto the probability simplex: entmax with alpha = 2."""
    return entmax(x, 2.0, dim)
