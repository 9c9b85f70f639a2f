"""From their parameter to ours: every row of docs/flashdiffusion/conversions.md, against the peer.

datafold needs an older scikit-learn than ours: results/conversions.py has written what it gives.
scanpy's rows are in test_anndata.py, POT's cost and gradient in test_gradients.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdiffusion import DiffusionMap, FlashDiffusion, doob_transform, schroedinger_bridge

from .cases import CANCELLED, ITERATED, ORACLE, ROUNDING, ROWS, SOLVED

ANNEALED = 1e-2  # geomloss stops with the annealing, not with an error

pytestmark = pytest.mark.extras
N, K = 300, 5
RESULTS = Path(__file__).parents[1] / "results"


def points():
    return np.random.default_rng(0).standard_normal((N, 3)) * [3.0, 2.0, 1.0]


def ours(beta, alpha, X=None, **options):
    X = points() if X is None else X
    return DiffusionMap(beta=beta, alpha=alpha, n_components=K, solver="dense", **options).fit(X)


def same_up_to_sign(a, b, atol):
    signs = np.sign((a * b).sum(0))
    np.testing.assert_allclose(a * signs, b, atol=atol)


def unit(psi):
    return psi / np.linalg.norm(psi, axis=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_pydiffmap(alpha):
    pytest.importorskip("pydiffmap", reason="needs the optional pydiffmap")
    from pydiffmap import diffusion_map

    epsilon = 0.5
    theirs = diffusion_map.DiffusionMap.from_sklearn(
        n_evecs=K, epsilon=epsilon, alpha=alpha, k=N, neighbor_params={"algorithm": "brute"}
    )
    theirs.fit(points())
    dm = ours(1.0 / (4.0 * epsilon), alpha)
    np.testing.assert_allclose(theirs.evals, (dm.eigenvalues_ - 1.0) / epsilon, atol=ITERATED)
    same_up_to_sign(unit(theirs.evecs), unit(dm.eigenvectors_), ORACLE)
    np.testing.assert_allclose(
        np.abs(theirs.dmap), np.abs(theirs.evecs * np.sqrt(-1.0 / theirs.evals)), atol=ITERATED
    )


def test_pydiffmap_with_a_target_measure():
    pytest.importorskip("pydiffmap", reason="needs the optional pydiffmap")
    from pydiffmap import diffusion_map

    def omega(x):
        return np.exp(-0.1 * np.asarray(x)[..., 0] ** 2)

    theirs = diffusion_map.TMDmap(
        n_evecs=K,
        epsilon=0.5,
        alpha=1.0,
        k=N,
        change_of_measure=omega,
        neighbor_params={"algorithm": "brute"},
    )
    theirs.fit(points())
    tilted = doob_transform(ours(0.5, 1.0), np.sqrt(omega(points())))
    np.testing.assert_allclose(theirs.evals, (tilted.eigenvalues_ - 1.0) / 0.5, atol=ITERATED)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_datafold(alpha):
    written = RESULTS / "datafold.json"
    if not written.exists():
        pytest.skip("needs packages/flashdiffusion/results, which a source distribution leaves out")
    theirs = json.loads(written.read_text())
    assert theirs["datafold"] == "2.0.2"
    X, found = np.array(theirs["points"]), theirs["of_alpha"][str(alpha)]
    dm = DiffusionMap(1.0 / (2.0 * theirs["epsilon"]), alpha, 4, solver="dense").fit(X)
    np.testing.assert_allclose(found["eigenvalues"][1:], dm.eigenvalues_, atol=ROUNDING)
    vectors = np.array(found["eigenvectors"])[:, 1:]
    same_up_to_sign(vectors, unit(dm.eigenvectors_), CANCELLED)
    later = np.array(found["coordinates_of_time_2"])[:, 1:]
    lengths = np.linalg.norm(dm.eigenvectors_, axis=0)
    same_up_to_sign(later, dm.transform(t=2) / lengths, CANCELLED)


def test_mdanalysis():
    mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    from MDAnalysis.analysis import diffusionmap

    frames = np.random.default_rng(0).standard_normal((40, 6, 3)).astype(np.float32)
    universe = mda.Universe.empty(6, trajectory=True)
    universe.load_new(frames)
    epsilon = 4.0

    # their distance is the RMSD after superposition, or another: here plain
    def metric(a, b, **_):
        return float(np.sqrt(np.mean(((a - b) ** 2).sum(-1))))

    distances = diffusionmap.DistanceMatrix(universe, select="all", metric=metric)
    theirs = diffusionmap.DiffusionMap(distances, epsilon=epsilon)
    theirs.run()
    X = frames.reshape(40, -1).astype(np.float64) / np.sqrt(6.0)
    dm = ours(1.0 / epsilon, 0.0, X)
    np.testing.assert_allclose(theirs.eigenvalues[1 : K + 1], dm.eigenvalues_, atol=ORACLE)


def test_palantir():
    pytest.importorskip("palantir", reason="needs the optional palantir")
    from palantir.utils import determine_multiscale_space, diffusion_maps_from_kernel
    from scipy import sparse

    X, beta = points(), 0.3
    kernel = np.exp(-beta * ((X[:, None] - X[None]) ** 2).sum(-1))
    theirs = diffusion_maps_from_kernel(sparse.csr_matrix(kernel), n_components=K + 1)
    dm = ours(beta, 0.0)
    values = np.asarray(theirs["EigenValues"])
    np.testing.assert_allclose(values[1:], dm.eigenvalues_, atol=ORACLE)
    same_up_to_sign(np.asarray(theirs["EigenVectors"])[:, 1:], unit(dm.eigenvectors_), ROWS)
    scaled = np.asarray(determine_multiscale_space(theirs, n_eigs=K + 1))
    weights = dm.eigenvalues_ / (1.0 - dm.eigenvalues_)
    same_up_to_sign(scaled, unit(dm.eigenvectors_) * weights, ROWS)


def test_graphtools():
    graphtools = pytest.importorskip("graphtools", reason="needs the optional graphtools")
    X, b = points(), 2.0
    graph = graphtools.Graph(
        X, decay=2, bandwidth=b, thresh=0, graphtype="exact", anisotropy=0.5, use_pygsp=False
    )
    P = graph.diff_op
    P = P.toarray() if hasattr(P, "toarray") else np.asarray(P)
    dm = ours(1.0 / b**2, 0.5)
    np.testing.assert_allclose(
        P @ dm.eigenvectors_, dm.eigenvectors_ * dm.eigenvalues_, atol=CANCELLED
    )


@pytest.mark.parametrize("kind", ["rbf_kernel", "GP RBF", "laplacian_kernel"])
def test_scikit_learn(kind):
    from sklearn.gaussian_process.kernels import RBF
    from sklearn.metrics.pairwise import laplacian_kernel, rbf_kernel

    X, V = points(), np.random.default_rng(1).standard_normal((N, 2))
    exact, beta, score = {
        "rbf_kernel": (rbf_kernel(X, gamma=0.3), 0.3, None),
        "GP RBF": (RBF(1.5)(X), 1.0 / (2.0 * 1.5**2), None),
        "laplacian_kernel": (laplacian_kernel(X, gamma=0.3), 0.3, "l1"),
    }[kind]
    out = FlashDiffusion(X, X, V, beta=beta, alpha=0.0, normalize="none", score_mod=score)
    np.testing.assert_allclose(out, exact @ V, atol=SOLVED)


def test_deeptime_kernel():
    pytest.importorskip("deeptime", reason="needs the optional deeptime")
    from deeptime.kernels import GaussianKernel

    X, V = points(), np.random.default_rng(1).standard_normal((N, 2))
    out = FlashDiffusion(X, X, V, beta=1.0 / (2.0 * 1.5**2), alpha=0.0, normalize="none")
    np.testing.assert_allclose(out, GaussianKernel(1.5).apply(X, X) @ V, atol=SOLVED)


def test_deeptime_tica():
    pytest.importorskip("deeptime", reason="needs the optional deeptime")
    from deeptime.covariance import Covariance
    from deeptime.decomposition import TICA

    from flashdiffusion import slow_manifold

    rng = np.random.default_rng(0)
    frames = np.cumsum(rng.standard_normal((N, 5, 3)), 0) * 0.1 + rng.standard_normal((5, 3))
    lag = 2
    dm = slow_manifold(frames, lag=lag, n_components=3, align="center", beta="median")
    psi = dm.eigenvectors_
    # ours takes out the mean of all frames, theirs by default that of the pairs' ends
    moments = Covariance(
        lag,
        compute_c00=True,
        compute_c0t=True,
        reversible=True,
        remove_data_mean=False,
    ).fit_fetch(psi - psi.mean(0))
    theirs = TICA(scaling=None).fit_from_covariances(moments).fetch_model()
    np.testing.assert_allclose(lag * dm.timescales_, theirs.timescales(lagtime=lag), rtol=ROWS)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_pot(epsilon):
    ot = pytest.importorskip("ot", reason="needs the optional POT")
    X, Y = points()[:40], points()[40:90] + 1.0
    cost = ((X[:, None] - Y[None]) ** 2).sum(-1)
    a, b = np.full(40, 1 / 40), np.full(50, 1 / 50)
    plan, log = ot.sinkhorn(
        a, b, cost, epsilon, method="sinkhorn_log", numItermax=100_000, stopThr=1e-12, log=True
    )
    bridge = schroedinger_bridge(X, Y, beta=1.0 / epsilon, tol=1e-11, max_iter=100_000)
    f, g = bridge.potentials
    for ours_, theirs in ((f, log["log_u"]), (g, log["log_v"])):
        difference = ours_ - np.asarray(theirs)
        np.testing.assert_allclose(difference, difference.mean(), atol=ORACLE)
    np.testing.assert_allclose(bridge.apply(np.eye(50)), plan, atol=ITERATED)
    # with M / M.max()
    scaled = ot.sinkhorn(
        a,
        b,
        cost / cost.max(),
        epsilon / cost.max(),
        method="sinkhorn_log",
        numItermax=100_000,
        stopThr=1e-12,
    )
    np.testing.assert_allclose(scaled, plan, atol=ITERATED)


def test_geomloss():
    geomloss = pytest.importorskip("geomloss", reason="needs the optional geomloss")
    X, Y = points()[:40] * 0.3, points()[40:90] * 0.3 + 0.3
    blur = 0.7
    loss = geomloss.SamplesLoss(
        "sinkhorn",
        p=2,
        blur=blur,
        scaling=0.999,
        debias=False,
        potentials=True,
        backend="tensorized",
    )
    F, G = loss(torch.from_numpy(X), torch.from_numpy(Y))
    # their cost is |x - y|^2 / 2
    bridge = schroedinger_bridge(X, Y, beta=1.0 / (2.0 * blur**2), tol=1e-11, max_iter=100_000)
    f = F.numpy().ravel() / blur**2 + np.log(1 / 40)
    difference = f - bridge.potentials[0]
    # theirs stops with the annealing, not with an error
    assert np.abs(difference - difference.mean()).max() < ANNEALED
    assert G.numel() == 50
