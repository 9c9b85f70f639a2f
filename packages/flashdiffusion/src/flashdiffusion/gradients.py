"""Derivatives of a diffusion map and of a bridge, without a graph of tiles.

An eigenvalue's derivative is v^T dM v, an eigenvector's solves (lambda - M) z = (1 - v v^T) dv.
Both are sums over K_ij (E F^T)_ij with a few columns E and F, so that one more sweep over the tiles
gives the gradient in all points and in beta: O(N tile) memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks
from .bridge import schroedinger_bridge
from .dmap import DiffusionMap

_TILE = 512
# Eigenvalues that are nearer than this are one pair: its vectors are not determined.
_DEGENERATE = 1e-7
# Pairs beyond the wanted ones: they show a multiple eigenvalue that the last one belongs to.
_SPARE = 3
_MAX_STEPS = 2000


def diffusion_eigenpairs(
    X: Tensor,
    beta: float | Tensor,
    alpha: float = 0.5,
    n_components: int = 4,
    *,
    tol: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of DiffusionMap, differentiable once in X and beta.

    d lambda = v^T dM v and dv = (lambda - M)^+ dM v, with alpha-normalisation and the scaling
    sum pi psi^2 = 1 differentiated as well. In float64.

    Args:
        X: (N, d) points, torch, finite.
        beta: inverse temperature > 0, a number or a tensor of one element.
        alpha: in [0, 1], as for DiffusionMap; not differentiated.
        n_components: pairs, at most N - 1.
        tol: of the residuals |M v - lambda v| and of the linear solves.

    Returns:
        values (n_components,) descending and psi (N, n_components), float64.

    Raises:
        ValueError: in backward, where a pair that a gradient is asked of is degenerate: its vector
            is not determined, nor is its value alone (the sum of equal values is: ask for that).

    Example:
        >>> X = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
        >>> values, psi = diffusion_eigenpairs(X, 1.0, n_components=2)
        >>> torch.autograd.grad(values.sum(), X)[0].shape
        torch.Size([40, 2])

    Source: Magnus, Econometric Theory 1 (1985) 179.
    """
    if not isinstance(X, Tensor):
        checks.fail("X", "be a torch tensor", type(X).__name__, error=TypeError)
    checks.shape("X", X, (None, None), "(N, d)")
    checks.floating("X", X)
    _checks.finite("X", X)
    if isinstance(beta, Tensor):
        if beta.numel() != 1:
            checks.fail("beta", "have one element", tuple(beta.shape))
        _checks.positive("beta", float(beta.detach()))
    else:
        beta = X.new_tensor(_checks.positive("beta", beta), dtype=torch.float64)
    alpha = _checks.alpha_range(alpha)
    tol = _checks.positive("tol", tol)
    pairs: tuple[Tensor, Tensor] = _Eigenpairs.apply(X, beta, alpha, n_components, tol)
    return pairs


class _Once(torch.autograd.Function):
    """A gradient that refuses to be differentiated: it would silently count as constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("flashdiffusion.gradients are differentiable once, not twice")


class _Eigenpairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, X: Tensor, beta: Tensor, alpha: float, n_components: int, tol: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(X, beta)
        x = X.detach().double()
        N = len(x)
        checks.positive_int("n_components", n_components)
        k = min(n_components + _SPARE, N - 1)
        if n_components >= N:
            checks.fail("n_components", f"be at most {N - 1}, points minus one", n_components)
        dm = DiffusionMap(float(beta), alpha, k, tol=tol, precision="float64", device=X.device).fit(
            x
        )
        ctx.dm, ctx.n, ctx.tol, ctx.shape = dm, n_components, tol, beta.shape
        ctx.dtypes = X.dtype, beta.dtype
        values = dm._tensor(dm.eigenvalues_)[:n_components].clone()
        psi = dm._tensor(dm.eigenvectors_)[:, :n_components].clone()
        return values, psi

    @staticmethod
    def backward(ctx: Any, value_bar: Tensor, psi_bar: Tensor) -> Any:
        with torch.no_grad():
            x_bar, beta_bar = _Eigenpairs.adjoint(ctx, value_bar, psi_bar)
        x_bar = _Once.apply(x_bar, *ctx.saved_tensors)
        return x_bar, _Once.apply(beta_bar, *ctx.saved_tensors), None, None, None

    @staticmethod
    def adjoint(ctx: Any, value_bar: Tensor, psi_bar: Tensor) -> tuple[Tensor, Tensor | None]:
        dm, n = ctx.dm, ctx.n
        operator = dm.operator()
        w, p, d, s = operator.weights, operator.row_sums, operator.degree, operator.rscale
        pi = d / d.sum()
        root = pi.sqrt()[:, None]
        values = dm._tensor(dm.eigenvalues_)
        psi = dm._tensor(dm.eigenvectors_)
        v = psi * root
        v = v / v.norm(dim=0)
        value_bar, psi_bar = value_bar.double(), psi_bar.double()
        _require_simple(values, value_bar, psi_bar, n)
        v_bar = psi_bar / root
        # psi = v / sqrt(pi)
        pi_bar = -0.5 * (psi_bar * psi[:, :n]).sum(1) / pi
        d_bar = (pi_bar - (pi_bar * pi).sum()) / d.sum()
        z = torch.zeros_like(v_bar)
        Mz = torch.zeros_like(v_bar)
        if bool((psi_bar != 0).any()):
            known = torch.cat((root, v), 1)
            z = _resolvent(operator, values, known, v_bar, ctx.tol)
            Mz = operator.apply(z)
        wanted = v[:, :n]
        # adjoint of M: sum_k g_k v v^T + (z v^T + v z^T) / 2, as half of (left right^T + its own)
        left = wanted * value_bar + z
        right = wanted
        # c: adjoint of log s, 2 (Mbar o M) 1
        Mv = wanted * values[:n]
        c = (2.0 * wanted * value_bar * Mv + z * Mv + wanted * Mz).sum(1)
        # s = sqrt(w / p), d = w p, p = K w, w = r^-alpha, r = K 1
        p_bar = -0.5 * c / p + d_bar * w
        w_bar = 0.5 * c / w + d_bar * p + operator.kernel.matvec(p_bar[:, None])[:, 0].double()
        r_bar = -dm.alpha * w_bar * w / dm._tensor(dm.density_)
        scale = s[:, None]
        one = torch.ones_like(w)[:, None]
        E = torch.cat((left * scale, p_bar[:, None], r_bar[:, None]), 1)
        F = torch.cat((right * scale, w[:, None], one), 1)
        x_bar, beta_bar = _sweep(dm._tensor(dm.X_fit_).double(), float(dm.beta_), E, F)
        dtype_x, dtype_beta = ctx.dtypes
        return x_bar.to(dtype_x), beta_bar.to(dtype_beta).reshape(ctx.shape)


def _require_simple(values: Tensor, value_bar: Tensor, psi_bar: Tensor, n: int) -> None:
    every = torch.cat((values.new_ones(1), values))
    g = torch.cat((value_bar, value_bar.new_zeros(len(values) - n)))
    for k in range(n):
        near = (every[1:] - values[k]).abs() < _DEGENERATE
        if abs(1.0 - float(values[k])) < _DEGENERATE:
            others = "1, the trivial one: the graph is disconnected"
            asked = bool(value_bar[k] != 0) or bool((psi_bar[:, k] != 0).any())
        else:
            twins = near.nonzero()[:, 0]
            if len(twins) < 2:
                continue
            others = ", ".join(str(int(j)) for j in twins if int(j) != k)
            asked = bool((psi_bar[:, k] != 0).any()) or bool((g[near] != g[k]).any())
        if asked:
            checks.fail(
                "n_components",
                "leave no degenerate pair whose gradient is asked for",
                f"eigenvalue {k} ({float(values[k]):.9f}) equal to eigenvalue {others}",
                "the sum of all equal eigenvalues has a gradient, their vectors have none",
            )


def _resolvent(operator: Any, values: Tensor, known: Tensor, v_bar: Tensor, tol: float) -> Tensor:
    """z_k = (lambda_k - M)^+ v_bar_k (N, n): by the known pairs where they reach, then by CG.

    Beside the known pairs lambda_k - M is positive: all its other eigenvalues are smaller.
    """
    n = v_bar.shape[1]
    every = torch.cat((values.new_ones(1), values))
    coefficients = known.T @ v_bar
    gaps = values[None, :n] - every[:, None]
    own = torch.zeros_like(gaps, dtype=torch.bool)
    own[range(1, n + 1), range(n)] = True
    z = known @ torch.where(own, 0.0, coefficients / gaps.where(~own, 1.0))
    if known.shape[1] >= len(known):
        return z

    def outside(x: Tensor) -> Tensor:
        for _ in range(2):
            x = x - known @ (known.T @ x)
        return x

    b = outside(v_bar)
    size = b.norm(dim=0).clamp(min=1e-300)
    u, r = torch.zeros_like(b), b
    q = r.clone()
    rho = (r * r).sum(0)
    for _ in range(_MAX_STEPS):
        if bool((r.norm(dim=0) <= tol * size).all()):
            return z + u
        Aq = outside(values[:n] * q - operator.apply(q))
        curvature = (q * Aq).sum(0)
        step = torch.where(curvature > 0, rho / curvature.where(curvature > 0, 1.0), 0.0)
        u, r = u + step * q, r - step * Aq
        new = (r * r).sum(0)
        q = r + torch.where(rho > 0, new / rho.where(rho > 0, 1.0), 0.0) * q
        rho = new
    raise RuntimeError(
        f"the gradient of the eigenvectors has not converged: relative residual "
        f"{float((r.norm(dim=0) / size).max()):.2e} after {_MAX_STEPS} passes, tol is {tol:.1e}; "
        f"the last eigenvalue lies too near the next one, ask for more n_components"
    )


def _sweep(x: Tensor, beta: float, E: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """Of sum_ij (E F^T)_ij K_ij: gradients in x (N, d) and in beta. One sweep over tiles."""
    out, beta_bar = torch.zeros_like(x), x.new_zeros(())
    for i in range(0, len(x), _TILE):
        a = slice(i, i + _TILE)
        # differences within tiles, so that points far from the origin lose nothing
        centre = x[a].mean(0)
        xa = x[a] - centre
        for j in range(0, len(x), _TILE):
            b = slice(j, j + _TILE)
            xb = x[b] - centre
            sq = torch.cdist(xa, xb, compute_mode="donot_use_mm_for_euclid_dist").square()
            # both orders of a pair at once
            G = (-beta * sq).exp() * (E[a] @ F[b].T + F[a] @ E[b].T)
            beta_bar -= 0.5 * (G * sq).sum()
            out[a] -= 2.0 * beta * (G.sum(1, keepdim=True) * xa - G @ xb)
    return out, beta_bar


def bridge_cost(
    X: Tensor,
    Y: Tensor,
    mu: Any = None,
    nu: Any = None,
    beta: float = 1.0,
    *,
    tol: float = 1e-9,
    max_iter: int = 10_000,
) -> Tensor:
    """min over plans of sum plan |x - y|^2 + (1 / beta) sum plan log plan, differentiable once.

    The plan is optimal, so it counts as constant (envelope theorem): the gradient in x_i is
    2 (mu_i x_i - (plan Y)_i), two products with the plan that is not stored.

    Args:
        X: (N, d) points, torch.
        Y: (M, d), same dtype.
        mu, nu: (N,), (M,) positive, sum 1; None is uniform. Not differentiated.
        beta: inverse temperature, 1 / epsilon; a number.
        tol: largest marginal error of the plan.
        max_iter: as for schroedinger_bridge.

    Returns:
        A float64 scalar.

    Example:
        >>> X = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
        >>> torch.autograd.grad(bridge_cost(X, X.detach() + 1.0), X)[0].sum().round(decimals=6)
        tensor(-4., dtype=torch.float64)

    Source: Feydy et al., AISTATS (2019), section 3 (gradients of entropic transport).
    """
    for name, x in (("X", X), ("Y", Y)):
        if not isinstance(x, Tensor):
            checks.fail(name, "be a torch tensor", type(x).__name__, error=TypeError)
    for name, w in (("mu", mu), ("nu", nu), ("beta", beta)):
        if isinstance(w, Tensor) and w.requires_grad:
            checks.fail(name, "not require grad", "requires_grad=True", "only X and Y have one")
    cost: Tensor = _BridgeCost.apply(X, Y, mu, nu, float(beta), tol, max_iter)
    return cost


class _BridgeCost(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        Y: Tensor,
        mu: Tensor | None,
        nu: Tensor | None,
        beta: float,
        tol: float,
        max_iter: int,
    ) -> Tensor:
        ctx.save_for_backward(X, Y)
        x, y = X.detach().double(), Y.detach().double()
        bridge = schroedinger_bridge(x, y, mu, nu, beta, tol=tol, max_iter=max_iter)
        f, g = bridge.potentials
        rows = bridge.apply(torch.ones_like(g))
        columns = bridge.apply_transpose(torch.ones_like(f))
        ctx.bridge, ctx.points, ctx.sums = bridge, (x, y), (rows, columns)
        ctx.dtypes = X.dtype, Y.dtype
        # log plan_ij = f_i + g_j - beta |x_i - y_j|^2, so the two terms of the cost are one sum
        cost: Tensor = ((rows * f).sum() + (columns * g).sum()) / beta
        return cost

    @staticmethod
    def backward(ctx: Any, out_bar: Tensor) -> Any:
        with torch.no_grad():
            bars = _BridgeCost.adjoint(ctx, out_bar)
        once = [None if bar is None else _Once.apply(bar, *ctx.saved_tensors) for bar in bars]
        return *once, None, None, None, None, None

    @staticmethod
    def adjoint(ctx: Any, out_bar: Tensor) -> tuple[Tensor | None, ...]:
        (x, y), (rows, columns) = ctx.points, ctx.sums
        x_bar = y_bar = None
        centre = y.mean(0)
        if ctx.needs_input_grad[0]:
            x_bar = 2.0 * (rows[:, None] * (x - centre) - ctx.bridge.apply(y - centre))
            x_bar = (out_bar * x_bar).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            y_bar = 2.0 * (columns[:, None] * (y - centre) - ctx.bridge.apply_transpose(x - centre))
            y_bar = (out_bar * y_bar).to(ctx.dtypes[1])
        return x_bar, y_bar
