"""Pictures of a diffusion map; matplotlib comes with the extra `flashdiffusion[plots]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shared_kernels import checks

from .utils import Bandwidth

if TYPE_CHECKING:
    from .dmap import DiffusionMap


def _axes(ax: Any, **kwargs: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "flashdiffusion[plots]"') from error
    return plt.subplots(layout="constrained", **kwargs)[1]


def plot_spectrum(dm: DiffusionMap, ax: Any = None) -> Any:
    """Eigenvalues, and their residuals on a logarithmic axis below 1.

    Args:
        dm: a fitted DiffusionMap.
        ax: matplotlib axes; None makes a figure.

    Returns:
        The axes of the eigenvalues.
    """
    dm.require_fitted()
    ax = _axes(ax, figsize=(5.0, 3.2))
    index = np.arange(1, len(dm.eigenvalues_) + 1)
    ax.plot(index, dm.eigenvalues_, "o-", color="C0", label="eigenvalue")
    ax.set_xlabel("k")
    ax.set_ylabel("eigenvalue", color="C0")
    ax.set_ylim(min(0.0, float(dm.eigenvalues_.min())), 1.02)
    residuals = ax.twinx()
    # a residual of exactly zero has no logarithm
    residuals.semilogy(index, np.maximum(dm.residuals_, 1e-17), "x", color="C1")
    residuals.axhline(dm.tol, color="C1", linewidth=0.8, linestyle=":")
    residuals.set_ylabel("residual", color="C1")
    ax.set_title(f"{len(dm.eigenvalues_)} pairs in {dm.n_passes_} passes")
    return ax


def plot_embedding(
    dm: DiffusionMap,
    color: Any = None,
    *,
    components: tuple[int, ...] = (0, 1),
    t: float = 1,
    ax: Any = None,
) -> Any:
    """The fitted points in two diffusion coordinates.

    Args:
        dm: a fitted DiffusionMap.
        color: (N,) values for the colour; None colours by the first coordinate.
        components: which two coordinates, from 0.
        t: diffusion time.
        ax: matplotlib axes; None makes a figure.
    """
    coordinates = dm.transform(t=t)
    if len(components) != 2 or not all(0 <= c < coordinates.shape[1] for c in components):
        last = coordinates.shape[1] - 1
        checks.fail("components", f"be two indices in [0, {last}]", components)
    if color is not None and len(color) != len(coordinates):
        checks.fail("color", f"have {len(coordinates)} values", len(color))
    ax = _axes(ax, figsize=(4.6, 4.0))
    x, y = (coordinates[:, c] for c in components)
    drawn = ax.scatter(x, y, s=6, c=coordinates[:, 0] if color is None else color, cmap="viridis")
    ax.figure.colorbar(drawn, ax=ax)
    ax.set_xlabel(f"coordinate {components[0] + 1}")
    ax.set_ylabel(f"coordinate {components[1] + 1}")
    return ax


def plot_bandwidth(found: Bandwidth, ax: Any = None) -> Any:
    """The curve of `bgh_bandwidth`: twice the slope, the dimension seen at each beta.

    Args:
        found: what `bgh_bandwidth` returned.
        ax: matplotlib axes; None makes a figure.
    """
    ax = _axes(ax, figsize=(5.0, 3.2))
    ax.semilogx(found.betas, 2.0 * found.slopes, ".-")
    ax.axvline(found.beta, color="C1", linewidth=0.8)
    ax.set_xlabel("beta")
    ax.set_ylabel("dimension seen")
    ax.set_title(f"beta = {found.beta:.3g}, dimension {found.dimension:.2f}")
    return ax


def plot_timescales(lags: Any, timescales: Any, ax: Any = None) -> Any:
    """Implied timescales against the lag, on a logarithmic axis; below the grey line is noise.

    Args:
        lags: (n,) frames.
        timescales: (n, k) of `kinetics.implied_timescales`.
        ax: matplotlib axes; None makes a figure.
    """
    lags, timescales = np.asarray(lags), np.asarray(timescales)
    if timescales.ndim != 2 or len(timescales) != len(lags):
        checks.fail("timescales", f"have shape ({len(lags)}, k)", timescales.shape)
    ax = _axes(ax, figsize=(5.0, 3.2))
    ax.semilogy(lags, timescales, ".-")
    # what is faster than the lag has decayed before it is seen
    ax.fill_between(lags, lags, np.full(len(lags), float(lags.min()) * 0.5), color="0.85")
    ax.set_xlabel("lag (frames)")
    ax.set_ylabel("implied timescale (frames)")
    return ax


def plot_free_energy(coordinates: Any, ax: Any = None, **options: Any) -> Any:
    """The free energy over one or two coordinates, in units of kT.

    Args:
        coordinates: (T, k), or a fitted map.
        ax: matplotlib axes; None makes a figure.
        options: of `kinetics.free_energy`.
    """
    from .kinetics import free_energy

    F, edges = free_energy(coordinates, **options)
    ax = _axes(ax, figsize=(4.6, 4.0))
    middles = [0.5 * (edge[1:] + edge[:-1]) for edge in edges]
    if F.ndim == 1:
        ax.plot(middles[0], F)
        ax.set_ylabel("free energy (kT)")
    else:
        finite = np.where(np.isfinite(F), F, np.nan)
        drawn = ax.pcolormesh(*edges, finite.T, cmap="viridis")
        ax.figure.colorbar(drawn, ax=ax, label="free energy (kT)")
        ax.set_ylabel("coordinate 2")
    ax.set_xlabel("coordinate 1")
    return ax
