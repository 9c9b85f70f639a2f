"""The slow manifold of a trajectory: aligned frames, diffusion map, implied timescales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks
from .dmap import DiffusionMap

ALIGN = ("kabsch", "center", None)
# Frames are aligned so many at a time.
_BATCH = 4096


def align_frames(frames: Any, reference: Any, weights: Any = None) -> Any:
    """Move and turn each frame onto the reference: the least weighted sum |R x_a + t - y_a|^2.

    Kabsch's solution by singular value decomposition; reflections are not allowed.

    Args:
        frames: (T, atoms, 3).
        reference: (atoms, 3); the result is centred on the origin, whatever its centre.
        weights: (atoms,) positive, for example masses; None is equal.

    Returns:
        (T, atoms, 3) of the frames' kind and dtype.

    Source: Kabsch, Acta Cryst. A32 (1976) 922.
    """
    x = _frames("frames", frames)
    y = _checks.as_tensor("reference", reference).double()
    checks.shape("reference", y, (x.shape[1], 3), f"({x.shape[1]}, 3), the atoms of `frames`")
    w = _atom_weights(weights, x.shape[1])
    y = y - w @ y
    out = torch.cat([_kabsch(part, y, w) for part in x.split(_BATCH)]) if len(x) else x
    return _checks.like_input(out.to(x.dtype), frames)


def _kabsch(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    x = x.double()
    x = x - torch.einsum("a,tak->tk", w, x)[:, None]
    u, _, vh = torch.linalg.svd(torch.einsum("tak,a,al->tkl", x, w, y))
    # a reflection becomes the best rotation by turning the weakest direction
    sign = torch.sign(torch.linalg.det(u @ vh))
    u = torch.cat((u[..., :2], u[..., 2:] * sign[:, None, None]), -1)
    return x @ (u @ vh)


def _frames(name: str, frames: Any) -> Tensor:
    x = _checks.as_tensor(name, frames)
    if x.dim() != 3 or x.shape[2] != 3:
        checks.fail(name, "have shape (T, atoms, 3)", tuple(x.shape))
    _checks.finite(name, x)
    return x


def _atom_weights(weights: Any, atoms: int) -> Tensor:
    if weights is None:
        return torch.full((atoms,), 1.0 / max(1, atoms), dtype=torch.float64)
    w = _checks.as_tensor("weights", weights).double()
    checks.shape("weights", w, (atoms,), f"({atoms},), one per atom")
    if not bool(((w > 0) & torch.isfinite(w)).all()):
        checks.fail("weights", "be positive and finite", f"values down to {float(w.min())}")
    return w / w.sum()


def _batches(trajectory: Any) -> Iterable[Tensor]:
    """Frames (b, atoms, 3) from an array, or from an iterable of batches or single frames."""
    if isinstance(trajectory, (np.ndarray, Tensor)):
        yield from _frames("trajectory", trajectory).split(_BATCH)
        return
    atoms = None
    for number, batch in enumerate(trajectory):
        x = _checks.as_tensor("trajectory", batch)
        x = _frames(f"trajectory[{number}]", x[None] if x.dim() == 2 else x)
        if atoms is not None and x.shape[1] != atoms:
            checks.fail(f"trajectory[{number}]", f"have {atoms} atoms as before it", x.shape[1])
        atoms = x.shape[1]
        yield x


def _features(
    trajectory: Any, align: str | None, weights: Any, reference: Any
) -> tuple[Tensor, Tensor]:
    """(T, atoms * 3) whose squared distances are squared RMSDs, and the reference (atoms, 3)."""
    parts: list[Tensor] = []
    root = target = w = None
    for batch in _batches(trajectory):
        if root is None or w is None:
            w = _atom_weights(weights, batch.shape[1])
            root = w.sqrt()[:, None]
            first = batch[0] if reference is None else _checks.as_tensor("reference", reference)
            checks.shape("reference", first, tuple(batch.shape[1:]), "(atoms, 3)")
            first = first.double()
            target = first - w @ first
        dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
        moved = batch.double()
        if align == "kabsch" and target is not None:
            moved = _kabsch(moved, target, w)
        elif align == "center":
            moved = moved - torch.einsum("a,tak->tk", w, moved)[:, None]
        parts.append((moved * root).to(dtype).flatten(1))
    if not parts or target is None:
        checks.fail("trajectory", "have at least one frame", "none")
    return torch.cat(parts), target


def slow_manifold(
    trajectory: Any,
    lag: int = 1,
    n_components: int = 4,
    align: str | None = "kabsch",
    *,
    weights: Any = None,
    reference: Any = None,
    n_delays: int = 1,
    frame_weights: Any = None,
    beta: float | str = "bgh",
    alpha: float = 0.5,
    **diffusion_map: Any,
) -> DiffusionMap:
    """A diffusion map of a trajectory in the RMSD metric, with its implied timescales.

    Each frame is aligned to the reference; squared distance is then (weighted) squared RMSD. With
    n_delays = m, frame t stands for the frames t, t + lag, .., t + (m-1) lag together. Timescales
    come from the motion along the coordinates: t_k = -1 / ln rho_k, with rho_k the eigenvalues of
    their time-lagged correlation (made symmetric in time).

    Args:
        trajectory: (T, atoms, 3) numpy or torch, or an iterable of batches (b, atoms, 3) or frames
            (atoms, 3). The aligned frames are kept, in float32 unless given as float64.
        lag: frames between the two times of a correlation, >= 1.
        n_components: coordinates.
        align: "kabsch" (move and turn), "center" (move) or None.
        weights: (atoms,) positive, for example masses.
        reference: (atoms, 3) to align to; None is the first frame.
        n_delays: frames per point.
        frame_weights: (T,) positive importance weights of the frames (target over sampled density);
            the chain then has the target's density (exact at alpha = 1/2). Correlations in time
            mean nothing there: timescales_ is nan.
        beta, alpha, diffusion_map: parameters of DiffusionMap; landmarks=m for many frames.

    Returns:
        A fitted DiffusionMap with `timescales_` (n_components,) in units of the lag, descending
        (nan where a correlation is not positive), and `reference_` (atoms, 3).

    Example:
        >>> frames = np.random.default_rng(0).standard_normal((60, 5, 3))
        >>> slow_manifold(frames, n_components=2).transform().shape
        (60, 2)

    Source: Rohrdanz, Zheng, Maggioni, Clementi, J. Chem. Phys. 134 (2011) 124116; Noe and Nueske,
    Multiscale Model. Simul. 11 (2013) 635 (timescales); Banisch et al. (2020) (frame weights).
    """
    checks.positive_int("lag", lag)
    checks.positive_int("n_delays", n_delays)
    checks.in_set("align", align, ALIGN)
    points, target = _features(trajectory, align, weights, reference)
    T = len(points) - (n_delays - 1) * lag
    if T - lag < 2:
        checks.fail(
            "trajectory", f"have more than {n_delays * lag + 1} frames for this lag and delays",
            len(points),
        )  # fmt: skip
    if n_delays > 1:
        delayed = [points[k * lag : k * lag + T] for k in range(n_delays)]
        points = torch.cat(delayed, 1) / n_delays**0.5
    dm = DiffusionMap(beta=beta, alpha=alpha, n_components=n_components, **diffusion_map)
    omega = None
    if frame_weights is not None:
        if dm.landmarks is not None:
            checks.fail("frame_weights", "be None with landmarks", "an array")
        omega = _checks.as_tensor("frame_weights", frame_weights).double()
        checks.shape("frame_weights", omega, (T,), f"({T},), one per point")
        if not bool(((omega > 0) & torch.isfinite(omega)).all()):
            checks.fail("frame_weights", "be positive and finite", float(omega.min()))
    dm.fit(points)
    if omega is None:
        dm.timescales_ = _timescales(dm.eigenvectors_, lag)
    else:
        dm = dm.reweighted(omega.sqrt())
        dm.timescales_ = np.full(n_components, np.nan)
    dm.reference_ = target.numpy()
    return dm


def _timescales(psi: np.ndarray, lag: int) -> np.ndarray:
    """-1 / ln rho of the generalised problem C(lag) v = rho C(0) v, symmetric in time."""
    from scipy.linalg import eigh

    psi = psi - psi.mean(0)
    before, after = psi[:-lag], psi[lag:]
    same = before.T @ before + after.T @ after
    moved = before.T @ after
    # a coordinate that is a combination of others has no timescale of its own
    jitter = 1e-12 * np.trace(same) / len(same)
    rho = eigh(moved + moved.T, same + jitter * np.eye(len(same)), eigvals_only=True)[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(
            (rho > 0) & (rho < 1), -1.0 / np.log(rho), np.where(rho >= 1, np.inf, np.nan)
        )
