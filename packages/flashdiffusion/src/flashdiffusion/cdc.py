"""The carre du champ of a diffusion map: how fast functions change along the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shared_kernels import checks, distributed

from . import _checks
from .dmap import DiffusionMap


def _columns(dm: DiffusionMap, name: str, given: Any) -> torch.Tensor:
    """(N,) or (N, k) on the fitted points -> centred float64 columns."""
    dm.require_fitted()
    f = _checks.as_tensor(name, given).to(dtype=torch.float64)
    if f.dim() == 1:
        f = f[:, None]
    N = len(dm.X_fit_)
    checks.shape(name, f, (N, None), lambda: f"({N},) or ({N}, k), one row per fitted point")
    _checks.finite(name, f)
    # a constant does not matter, and leaves digits for what does
    return f - f.mean(0)


def carre_du_champ(dm: DiffusionMap, f: Any, g: Any = None) -> np.ndarray:
    """Gamma(f, g)_i = 1/2 sum_j P_ij (f_j - f_i)(g_j - g_i), about grad f . grad g / (4 beta).

    Computed as [P(fg) - f Pg - g Pf + f g] / 2 with centred functions and float64 sums: one pass
    over the kernel, exact against the sum of differences. Gamma(f, f) >= 0.

    Args:
        dm: a fitted DiffusionMap (with alpha = 1 the gradient is that of the manifold).
        f, g: (N,) values at the fitted points; g None is f.

    Returns:
        (N,), float64.

    Source: Bakry, Gentil and Ledoux (2014), section 1.4.
    """
    with dm.agreement() as agreed:
        f = _columns(dm, "f", f)
        g = f if g is None else _columns(dm, "g", g)
        for name, x in (("f", f), ("g", g)):
            checks.shape(name, x, (len(f), 1), "(N,)")
            agreed.equal[name] = distributed.fingerprint(x.numpy())
    same = g is f
    Pf, Pg, Pfg = _markov(dm, torch.cat((f, g, f * g), 1)).unbind(1)
    f, g = f[:, 0], g[:, 0]
    gamma = 0.5 * (Pfg - f * Pg - g * Pf + f * g)
    found: np.ndarray = (gamma.clamp(min=0.0) if same else gamma).numpy()
    return found


def metric_tensor(dm: DiffusionMap, F: Any) -> tuple[np.ndarray, np.ndarray]:
    """G_i = Gamma(F, F)_i for all pairs of columns of F, and M = sum_i G_i G_i^T.

    One pass with k + k (k + 1) / 2 columns.

    Args:
        dm: a fitted DiffusionMap.
        F: (N, k) functions, for example coordinates: then G is the metric's inverse / (4 beta).

    Returns:
        G (N, k, k) symmetric positive semi-definite, and M (k, k), float64.
    """
    with dm.agreement() as agreed:
        F = _columns(dm, "F", F)
        agreed.equal["F"] = distributed.fingerprint(F.numpy())
    N, k = F.shape
    a, b = torch.triu_indices(k, k)
    products = _markov(dm, torch.cat((F, F[:, a] * F[:, b]), 1))
    PF, PFF = products[:, :k], products[:, k:]
    upper = 0.5 * (PFF - F[:, a] * PF[:, b] - F[:, b] * PF[:, a] + F[:, a] * F[:, b])
    G = F.new_empty(N, k, k)
    G[:, a, b] = upper
    G[:, b, a] = upper
    return G.numpy(), torch.einsum("nij,nkj->ik", G, G).numpy()


def _markov(dm: DiffusionMap, columns: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(dm.markov(columns.numpy()))
