"""Against what other packages hold: a real trajectory, and entropic transport in POT."""

import os

import numpy as np
import pytest
from scipy.stats import spearmanr

from flashdiffusion import schroedinger_bridge, slow_manifold

from .cases import ROWS, SOLVED


@pytest.mark.extras
@pytest.mark.parametrize("atoms", ["name CA", "all"])
def test_adenylate_kinase_opens_along_the_first_coordinate(atoms):
    mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    files = pytest.importorskip(
        "MDAnalysisTests.datafiles", reason="needs the optional MDAnalysisTests"
    )
    universe = mda.Universe(files.PSF, files.DCD)
    chosen = universe.select_atoms(atoms)

    def frames():
        for _ in universe.trajectory:
            yield chosen.positions.astype(np.float64)

    options = {"n_components": 2, "weights": chosen.masses, "beta": "median"}
    dm = slow_manifold(frames, **options)
    # the trajectory leads from the closed to the open state
    assert dm.transform().shape == (98, 2)
    assert abs(spearmanr(dm.transform()[:, 0], np.arange(98)).statistic) >= 0.999
    assert dm.timescales_[0] > 2 * dm.timescales_[1]
    few = slow_manifold(frames, **options, landmarks=60)
    assert abs(spearmanr(few.transform()[:, 0], np.arange(98)).statistic) >= 0.999


@pytest.mark.extras
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("beta", ["median", "bgh", "self-tuning"])
def test_adenylate_kinase_with_tumbled_copies(beta, dtype):
    """Copies of frames, turned and moved, are the same points after alignment but for rounding."""
    mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    files = pytest.importorskip(
        "MDAnalysisTests.datafiles", reason="needs the optional MDAnalysisTests"
    )
    universe = mda.Universe(files.PSF, files.DCD)
    chosen = universe.select_atoms("name CA")
    frames = np.stack([chosen.positions.astype(np.float64) for _ in universe.trajectory])
    rng = np.random.default_rng(0)
    turns = np.linalg.qr(rng.standard_normal((12, 3, 3)))[0]
    turns *= np.sign(np.linalg.det(turns))[:, None, None]
    copied = np.linspace(0, 97, 12).astype(int)
    tumbled = frames[copied] @ turns + 30.0 * rng.standard_normal((12, 1, 3))
    frames = np.concatenate((frames, tumbled)).astype(dtype)
    dm = slow_manifold(frames, n_components=4, beta=beta)
    assert dm.converged_ and np.isfinite(dm.eigenvectors_).all()
    assert 0.0 < dm.eigenvalues_.min() and dm.eigenvalues_.max() <= 1.0
    # a copy is where its frame is; float32 positions of a moved copy round by 4e-6 A
    bound = {np.float32: ROWS, np.float64: SOLVED}[dtype]
    np.testing.assert_allclose(dm.eigenvectors_[98:], dm.eigenvectors_[copied], atol=bound)
    if beta == "median":
        # the median length of 98 frames and of 110 differ: one beta for both
        alone = slow_manifold(frames[:98], n_components=4, beta=dm.beta_)
        opened = np.corrcoef(alone.eigenvectors_[:, 0], dm.eigenvectors_[:98, 0])[0, 1]
        assert abs(opened) >= 0.99


@pytest.mark.extras
@pytest.mark.parametrize("selection", ["name CA", "all"])
def test_atoms_before_frames_of_a_dcd(selection):
    mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    files = pytest.importorskip(
        "MDAnalysisTests.datafiles", reason="needs the optional MDAnalysisTests"
    )
    universe = mda.Universe(files.PSF, files.DCD)
    chosen = universe.select_atoms(selection)
    with pytest.raises(ValueError, match="order='fac'"):
        slow_manifold(universe.trajectory.timeseries(chosen, order="afc"), n_components=2)
    frames = universe.trajectory.timeseries(chosen, order="fac")
    assert slow_manifold(frames, n_components=2, beta="median").transform().shape == (98, 2)


@pytest.mark.extras
def test_a_file_that_cannot_be_read(tmp_path):
    mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    files = pytest.importorskip(
        "MDAnalysisTests.datafiles", reason="needs the optional MDAnalysisTests"
    )
    copy = tmp_path / "cut.dcd"
    with open(files.DCD, "rb") as whole:
        copy.write_bytes(whole.read())
    universe = mda.Universe(files.PSF, str(copy))
    os.truncate(copy, copy.stat().st_size // 2)

    class Positions:
        def __len__(self):
            return len(universe.trajectory)

        def __iter__(self):
            return (frame.positions for frame in universe.trajectory)

    # this reader takes the end of the file for that of the trajectory
    with pytest.raises(ValueError, match=r"`trajectory` must give all of its 98 batches or frames"):
        slow_manifold(Positions(), n_components=2)


@pytest.mark.extras
@pytest.mark.parametrize("epsilon", [0.3, 0.03])
def test_the_bridge_is_entropic_transport(epsilon):
    ot = pytest.importorskip("ot", reason="needs the optional POT")
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((60, 2)), rng.standard_normal((70, 2)) + 0.5
    mu, nu = rng.random(60) + 0.2, rng.random(70) + 0.2
    mu, nu = mu / mu.sum(), nu / nu.sum()
    cost = ((X[:, None] - Y[None]) ** 2).sum(-1)
    theirs = ot.sinkhorn(
        mu, nu, cost, epsilon, method="sinkhorn_log", numItermax=100_000, stopThr=1e-11
    )
    bridge = schroedinger_bridge(X, Y, mu, nu, beta=1.0 / epsilon, tol=1e-10, max_iter=100_000)
    np.testing.assert_allclose(bridge.apply(np.eye(70)), theirs, atol=SOLVED)
    np.testing.assert_allclose(bridge.apply(np.ones(70)), mu, atol=SOLVED)
