"""diffmax_bisect with its numbers logged to swanlab (the extra `diffmax[monitoring]`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.rows import wide

from . import _checks
from ._rows import spread
from .api import _row_stats, diffmax_bisect

_FORWARD = ("sparsity", "support_mean", "support_min", "entropy", "max_prob", "sum_error")
_CONVERGED = 1e-4


def diffmax_bisect_monitored(
    X: Tensor,
    alpha: _checks.Alpha = 0.9,
    dim: int = -1,
    n_iter: int = 50,
    ensure_sum_one: bool = True,
    *,
    name_prefix: str = "diffmax",
    step: int | None = None,
    extra_metadata: Mapping[str, float] | None = None,
) -> Tensor:
    """`diffmax_bisect`, logging to the swanlab run that the caller has started.

    The result and its gradients are those of `diffmax_bisect`. Logged as plain finite numbers, with
    one wait for the device per call, under `{name_prefix}/`:

        forward/      sparsity, support_mean, support_min, entropy, max_prob, sum_error
        alpha/        mean, min, max
        convergence/  iterations (Newton steps until sum - 1 < 1e-4), residual_max (the largest
                      |sum - 1| before the division), tau_mean
        backward/     grad_norm and grad_max of dL/dX, alpha_grad (the sum of dL/dalpha); logged
                      when the gradients are computed, each only if it is
        meta/         rows, length, n_iter, and extra_metadata

    Dead rows (only -inf) are outside every mean.

    Args:
        X, alpha, dim, n_iter, ensure_sum_one: as in `diffmax_bisect`.
        name_prefix: what the keys begin with.
        step: swanlab's step; None lets swanlab count.
        extra_metadata: further numbers for `meta/`.

    Raises:
        ImportError: swanlab is not installed (at the import of this name).
    """
    import swanlab

    _checks.scores(X, dim)
    tensor = _checks.alpha_tensor(alpha, X, dim)
    extra = {str(k): float(v) for k, v in (extra_metadata or {}).items()}
    for name, value in extra.items():
        if not math.isfinite(value):
            checks.fail("extra_metadata", "hold finite numbers", f"{name}={value}")

    def log(numbers: Mapping[str, float]) -> None:
        swanlab.log({f"{name_prefix}/{key}": value for key, value in numbers.items()}, step=step)

    if torch.is_grad_enabled() and (X.requires_grad or tensor.requires_grad):
        X, tensor = _Probe.apply(X, tensor, log)
    Y = diffmax_bisect(X, tensor, dim, n_iter, ensure_sum_one)
    given = tensor.detach().double()
    x, y = ((t.reshape(1) if t.dim() == 0 else t.movedim(dim, -1)).double() for t in (X, Y))
    a = 1 - (spread(given, X.shape, dim) if X.dim() else given).to(x.device)
    shape = math.prod(x.shape[:-1]), x.shape[-1]
    found = {f"alpha/{name}": getattr(given, name)() for name in ("mean", "min", "max")}
    found |= _statistics(
        x.detach().reshape(shape),
        y.detach().reshape(shape),
        a.expand(*x.shape[:-1], 1).reshape(-1, 1),
        n_iter,
    )
    meta = {"rows": float(shape[0]), "length": float(shape[1]), "n_iter": float(n_iter), **extra}
    log({**_read(found), **{f"meta/{name}": value for name, value in meta.items()}})
    return Y


class _Probe(torch.autograd.Function):
    """The identity on (X, alpha); on the way back it logs what passes."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, alpha: Tensor, log: Any) -> tuple[Tensor, Tensor]:
        ctx.log = log
        ctx.set_materialize_grads(False)
        return X.view_as(X), alpha.view_as(alpha)

    @staticmethod
    def backward(ctx: Any, dX: Tensor | None, d_alpha: Tensor | None) -> Any:
        found: dict[str, Tensor] = {}
        if ctx.needs_input_grad[0] and dX is not None:
            flat = dX.detach().to(wide(dX)).reshape(-1)
            found["backward/grad_norm"] = torch.linalg.vector_norm(flat)
            found["backward/grad_max"] = flat.abs().amax() if flat.numel() else flat.sum()
        if ctx.needs_input_grad[1] and d_alpha is not None:
            found["backward/alpha_grad"] = d_alpha.detach().sum()
        if found:
            ctx.log(_read(found))
        return dX, d_alpha, None


def _read(found: Mapping[str, Tensor]) -> dict[str, float]:
    """All numbers in one wait for each device they are on; never NaN or infinite."""
    device = next(iter(found.values())).device
    stacked = torch.stack([x.to(device, torch.float64) for x in found.values()])
    return dict(zip(found, stacked.nan_to_num().tolist(), strict=True))


def _statistics(x: Tensor, y: Tensor, a: Tensor, n_iter: int) -> dict[str, Tensor]:
    """`forward/` and `convergence/` of scores x and weights y (rows, N) with a = 1 - alpha."""
    if x.numel() == 0:
        names = [f"forward/{n}" for n in _FORWARD]
        names += [f"convergence/{n}" for n in ("iterations", "residual_max", "tau_mean")]
        return dict.fromkeys(names, x.new_zeros(()))
    found = {f"forward/{n}": v for n, v in zip(_FORWARD, _row_stats(y), strict=True)}
    solved = _convergence(x, a, n_iter)
    return found | {f"convergence/{name}": value for name, value in solved.items()}


def _convergence(x: Tensor, a: Tensor, n_iter: int) -> dict[str, Tensor]:
    """Newton's course on these rows, in fp64 and a fixed number of steps: nothing is read back."""
    top = x.amax(-1, keepdim=True)
    live = top.isfinite()
    z = torch.where(live, x - top, 0.0)
    tau = torch.zeros_like(top)
    used = torch.zeros_like(top[0])
    residual = torch.zeros_like(top)
    for _ in range(min(n_iter, 20)):
        u = (a * (z - tau)).clamp(min=-1)
        inside = u > -1
        log = torch.log1p(torch.where(inside, u, 0.0)) / a
        p = torch.where(inside, log.exp(), 0.0)
        F = p.sum(-1, keepdim=True)
        G = torch.where(inside, (log * (1 - a)).exp(), 0.0).sum(-1, keepdim=True)
        residual = torch.where(live, (F - 1).abs(), 0.0)
        used += (residual > _CONVERGED).any()
        tau = tau - F * torch.expm1(-a * F.log()) / (a * G)
    tau = torch.where(live, tau + top, 0.0).sum() / live.sum().clamp(min=1)
    return {"iterations": used[0], "residual_max": residual.amax(), "tau_mean": tau}
