import sys

import numpy as np
import pytest

from flashdiffusion import DiffusionMap, bgh_bandwidth, plots

from .cases import TOL, circle


@pytest.fixture(scope="module")
def fitted():
    pytest.importorskip("matplotlib")
    return DiffusionMap(beta=20.0, n_components=4).fit(circle(100))


def test_spectrum(fitted):
    ax = plots.plot_spectrum(fitted)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), fitted.eigenvalues_)
    (residuals,) = [a for a in ax.figure.axes if a is not ax]
    np.testing.assert_allclose(residuals.lines[0].get_ydata(), fitted.residuals_)


def test_embedding(fitted):
    ax = plots.plot_embedding(fitted, np.arange(100), components=(1, 3), t=0)
    points = ax.collections[0].get_offsets()
    np.testing.assert_allclose(points, fitted.eigenvectors_[:, [1, 3]])
    assert ax.collections[0].get_array().tolist() == list(range(100))
    with pytest.raises(ValueError, match="`components` must be two indices"):
        plots.plot_embedding(fitted, components=(0, 4))
    with pytest.raises(ValueError, match="`color` must have 100 values"):
        plots.plot_embedding(fitted, np.arange(9))


def test_bandwidth_on_given_axes(fitted):
    import matplotlib.pyplot as plt

    _, mine = plt.subplots()
    found = bgh_bandwidth(circle(200))
    assert plots.plot_bandwidth(found, mine) is mine
    assert mine.lines[0].get_ydata().max() == pytest.approx(found.dimension, rel=TOL)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"flashdiffusion\[plots\]"):
        plots.plot_bandwidth(bgh_bandwidth(circle(30)))
