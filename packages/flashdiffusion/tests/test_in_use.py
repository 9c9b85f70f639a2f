"""Other people's objects and environments: what they hand over, and what they find afterwards."""

import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.utils.estimator_checks import check_estimator

import flashdiffusion
from flashdiffusion import (
    DiffusionMap,
    FlashDiffusion,
    bgh_bandwidth,
    carre_du_champ,
    committor,
    doob_transform,
    knn_bandwidth,
    median_bandwidth,
    metric_tensor,
    nystrom_extension,
    probability_current,
    schroedinger_bridge,
    slow_manifold,
    stationary_distribution,
)
from flashdiffusion.eigensolver import SOLVERS
from flashdiffusion.trajectory import align_frames
from shared_kernels.testing import assert_close, others_thorough
from shared_kernels.testing.defaults import each_default

from .cases import ITERATED, ROUNDING, SOLVED, TOL


def points(N=60, d=3, seed=0):
    return np.random.default_rng(seed).standard_normal((N, d))


def frames(T=80, atoms=5, seed=0):
    rng = np.random.default_rng(seed)
    x = np.zeros((T, atoms, 3))
    x[:, :, 0] = np.arange(atoms)
    x[:, 1:, 1] = np.sin(np.linspace(0, 3, T))[:, None] * np.arange(1, atoms)
    return x + 0.01 * rng.standard_normal(x.shape)


# ------------------------------------------------------------------------------- what is refused

FITTED = DiffusionMap(0.3, n_components=2).fit(points())

TAKES_POINTS = {
    "fit": lambda X: DiffusionMap(0.3, n_components=2).fit(X),
    "transform": FITTED.transform,
    "nystrom": lambda X: nystrom_extension(FITTED, X),
    "primitive": lambda X: FlashDiffusion(X, X, points()),
    "values": lambda X: FlashDiffusion(points(), points(), X),
    "bgh": bgh_bandwidth,
    "median": median_bandwidth,
    "knn": knn_bandwidth,
    "stationary": stationary_distribution,
    "current": probability_current,
    "bridge": lambda X: schroedinger_bridge(X, points()),
    "markov": FITTED.markov,
    "gamma": lambda X: carre_du_champ(FITTED, X),
    "metric": lambda X: metric_tensor(FITTED, X),
    "doob": lambda X: doob_transform(FITTED, X),
    "committor": lambda X: committor(FITTED, X, [0]),
    "frames": slow_manifold,
    "align": lambda X: align_frames(X, frames()[0]),
}


@pytest.mark.parametrize("call", TAKES_POINTS)
def test_masked_values_are_counted_and_refused(call):
    X = np.ma.masked_greater(frames() if call in ("frames", "align") else points(), 1.0)
    X = X[:, 0] if call in ("gamma", "doob", "committor") else X
    masked = int(np.ma.count_masked(X))
    with pytest.raises(ValueError, match=f"no masked values, got {masked} of {X.size} masked"):
        TAKES_POINTS[call](X)


@pytest.mark.parametrize("call", TAKES_POINTS)
@pytest.mark.parametrize(("attribute", "advice"), [("xyz", r"\.xyz"), ("obsm", r"\.obsm")])
def test_objects_that_hold_an_array_are_refused_at_once(call, attribute, advice):
    """A trajectory of mdtraj or an AnnData would be read item by item, for minutes."""

    class Holder:
        def __len__(self):
            return 10**9

        def __getitem__(self, item):
            return self

    holder = Holder()
    setattr(holder, attribute, points())
    with pytest.raises(TypeError, match=f"must be an array, got Holder; pass {advice}|{advice}"):
        TAKES_POINTS[call](holder)


def test_views_of_an_array_are_arrays():
    """AnnData's views are arrays that have a `toarray`."""

    class View(np.ndarray):
        def toarray(self):
            raise AssertionError

    X = points().view(View)
    for call in ("fit", "transform", "primitive", "bgh", "knn", "stationary", "bridge", "markov"):
        TAKES_POINTS[call](X)


def test_a_mask_or_indices_but_never_a_guess():
    X = points()
    mask = X[:, 0] < -0.5
    B = np.flatnonzero(X[:, 0] > 0.8)
    q = committor(FITTED, mask, B)
    np.testing.assert_array_equal(q, committor(FITTED, np.flatnonzero(mask), B))
    np.testing.assert_array_equal(q, committor(FITTED, torch.from_numpy(mask), B.tolist()))
    for kind in (np.int64, np.uint8, np.int8):
        with pytest.raises(ValueError, match="60 integers, all 0 or 1; pass A == 1"):
            committor(FITTED, mask.astype(kind), B)
        with pytest.raises(ValueError, match="pass B == 1 for a mask"):
            committor(FITTED, mask, (X[:, 0] > 0.8).astype(kind).tolist())
    for call in (
        lambda: DiffusionMap(0.3, n_components=2, landmarks=mask).fit(X),
        lambda: slow_manifold(frames(60), landmarks=mask),
    ):
        with pytest.raises(ValueError, match=r"pass np\.flatnonzero\(landmarks\)"):
            call()


# ------------------------------------------------------------------------------ committors apart


@pytest.mark.parametrize("apart", [1, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_points_that_reach_neither_set(apart, dtype):
    X = points(500, 2)
    island = 0.1 * points(apart, 2, seed=1) + 1e3
    parameters = {"beta": 2.0, "n_components": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = DiffusionMap(**parameters).fit(X.astype(dtype))
        dm = DiffusionMap(**parameters).fit(np.concatenate((X, island)).astype(dtype))
    A, B = np.flatnonzero(X[:, 0] < -1), np.flatnonzero(X[:, 0] > 1)
    with pytest.warns(UserWarning, match=f"{apart} of {500 + apart} points reach neither"):
        q = committor(dm, A, B)
    assert np.isnan(q[500:]).all()
    np.testing.assert_allclose(q[:500], committor(alone, A, B), atol=10 * ITERATED)
    # an island that is a set of its own, or that reaches one of them, has an answer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = committor(dm, A, np.arange(500, 500 + apart))
        assert np.array_equal(whole, (np.arange(500 + apart) >= 500).astype(float))


# ----------------------------------------------------------------------------------- trajectories


def test_a_buffer_that_is_refilled_is_copied():
    x = frames()
    exact = slow_manifold(x, n_components=2, beta="median")
    tensor, array = torch.empty(5, 3, dtype=torch.float64), np.empty((5, 3))

    def refilled(buffer, fill):
        for frame in x:
            fill(buffer, frame)
            yield buffer

    def timesteps():
        for frame in x:
            array[:] = frame
            yield SimpleNamespace(positions=array)

    for batches in (
        refilled(tensor, lambda b, f: b.copy_(torch.from_numpy(f))),
        refilled(array, lambda b, f: b.__setitem__(slice(None), f)),
        refilled(tensor[None], lambda b, f: b[0].copy_(torch.from_numpy(f))),
        timesteps(),
    ):
        dm = slow_manifold(batches, n_components=2, beta="median")
        np.testing.assert_array_equal(dm.eigenvalues_, exact.eigenvalues_)
    for shared in (list(refilled(array, lambda b, f: None)), [tensor] * 80):
        with pytest.raises(ValueError, match=r"80 arrays in 1 buffer.*append ts\.positions\.copy"):
            slow_manifold(shared)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"align": "center"},
        {"n_delays": 3, "lag": 2},
        {"weights": np.arange(1.0, 6.0)},
        {"landmarks": 40},
        {"frame_weights": np.ones(80)},
    ],
)
def test_new_frames_of_a_slow_manifold(options):
    x = frames()
    dm = slow_manifold(x, n_components=2, beta="median", **options)
    np.testing.assert_allclose(dm.transform(x), dm.transform(), atol=10 * SOLVED)
    turned = x @ np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) + 7.0
    if options.get("align") != "center":
        np.testing.assert_allclose(dm.transform(turned), dm.transform(), atol=10 * SOLVED)
    few = dm.transform(torch.from_numpy(x[:9]))
    np.testing.assert_allclose(few, dm.transform()[: len(few)], atol=10 * SOLVED)
    assert len(few) == 9 - (dm.frames_.n_delays - 1) * dm.frames_.lag
    with pytest.raises(ValueError, match="atoms"):
        dm.transform(x[:, :4])


def test_frame_weights_with_delays_are_one_per_frame():
    x, omega = frames(), np.random.default_rng(1).random(80) + 0.5
    options = {"n_components": 2, "beta": "median", "n_delays": 3, "lag": 2}
    one, other = (slow_manifold(x, frame_weights=w, **options) for w in (omega, omega[:76]))
    np.testing.assert_array_equal(one.eigenvalues_, other.eigenvalues_)
    with pytest.raises(ValueError, match=r"have shape \(80,\), one per frame, or \(76,\)"):
        slow_manifold(x, frame_weights=omega[:77], **options)


def test_a_trajectory_that_does_not_move_has_no_timescales():
    with pytest.warns(UserWarning, match="all entries of the kernel are nearly 1"):
        dm = slow_manifold(np.repeat(frames()[:1], 40, 0), n_components=2)
    assert np.isnan(dm.timescales_).all()


# ------------------------------------------------------------------------------------ estimators


@pytest.mark.parametrize("solver", others_thorough(s for s in SOLVERS if s != "auto"))
def test_check_estimator_for_every_solver(solver):
    check_estimator(DiffusionMap(n_components=2, solver=solver))


# blocks that do not fill a small space leave krylov unconverged, and it says so: see test_dmap.py
@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "krylov"])
@pytest.mark.parametrize("N", [5, 11, 40])
def test_few_points_for_every_solver(solver, N):
    X = points(N)
    exact = DiffusionMap(0.5, n_components=4, solver="dense").fit(X)
    dm = DiffusionMap(0.5, n_components=4, solver=solver).fit(X)
    assert dm.converged_ and dm.n_converged_ == 4
    np.testing.assert_allclose(dm.eigenvalues_, exact.eigenvalues_, atol=TOL)


@pytest.mark.extras
def test_data_frames_come_back():
    import pandas as pd

    X = pd.DataFrame(points(), columns=list("abc"), index=np.arange(60) + 5)
    dm = DiffusionMap(0.3, n_components=2).set_output(transform="pandas")
    names = ["diffusionmap0", "diffusionmap1"]
    assert dm.fit(X).get_feature_names_out().tolist() == names
    for found in (dm.fit_transform(X), dm.transform(X)):
        assert found.columns.tolist() == names and found.index.equals(X.index)
    assert dm.transform().columns.tolist() == names
    both = ColumnTransformer([("map", DiffusionMap(0.3, n_components=2), ["a", "b"])])
    assert both.set_output(transform="pandas").fit_transform(X).index.equals(X.index)


def test_set_output_default_is_an_array():
    dm = DiffusionMap(0.3, n_components=2).set_output(transform="default")
    assert type(dm.fit_transform(points())) is type(dm.transform()) is np.ndarray


def test_a_refit_forgets_dimension_and_graph():
    dm = DiffusionMap("bgh", n_components=2, neighbors=5).fit(points())
    assert dm.dimension_ > 0 and dm.affinity_.shape == (len(points()),) * 2
    dm.set_params(beta=0.3, neighbors=None).fit(points())
    assert not hasattr(dm, "dimension_") and not hasattr(dm, "affinity_")


def test_read_only_memory_maps_without_a_warning(tmp_path):
    np.save(tmp_path / "x.npy", points(600))
    X = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dm = DiffusionMap(0.3, n_components=2).fit(X)
        dm.transform(X)
        FlashDiffusion(X, X, X)


# -------------------------------------------------------------------------------- bridges


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_bridge_to_itself_takes_few_steps(seed, beta, steps):
    X = points(10 * (seed + 1), 2, seed)
    mu = np.random.default_rng(seed).random(len(X)) + 0.1 if seed % 2 else np.ones(len(X))
    mu = mu / mu.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bridge = schroedinger_bridge(X, X, mu, mu, beta=beta, steps=steps)
    assert bridge.n_iter <= 45 and bridge.marginal_error <= TOL
    ones = np.ones(len(X))
    np.testing.assert_allclose(bridge.apply(ones), mu, atol=ROUNDING)
    np.testing.assert_allclose(bridge.apply_transpose(ones), mu, atol=TOL)


# ----------------------------------------------------------------------------- empty and no grad


def test_empty_inputs_give_empty_results():
    X, x = points(), frames()
    tuned = DiffusionMap("self-tuning", n_components=2).fit(X)
    slow = slow_manifold(x, n_components=2, beta="median")
    for found in (FITTED.transform(X[:0]), tuned.transform(X[:0]), slow.transform(x[:0])):
        assert found.shape == (0, 2)
    assert nystrom_extension(FITTED, X[:0]).shape == (0, 2)
    assert knn_bandwidth(X[:0], Y=X).shape == (0,)
    assert FITTED.markov(X[:, :0]).shape == (60, 0)
    assert metric_tensor(FITTED, X[:, :0])[0].shape == (60, 0, 0)
    assert probability_current(X, X + 1.0, X[:, :0]).shape == (60, 0)
    assert schroedinger_bridge(X, X).apply(X[:, :0]).shape == (60, 0)
    assert align_frames(x[:0], x[0]).shape == (0, 5, 3)
    # no dimension: all points are one
    none = X[:, :0]
    assert np.array_equal(knn_bandwidth(none), np.ones(60))
    for score in (None, "l1", "dot"):
        out = FlashDiffusion(none, none, X, normalize="row", score_mod=score)
        assert_close(torch.from_numpy(out), torch.from_numpy(np.tile(X.mean(0), (60, 1))))
    # what is undefined without points is refused by name
    for call in (bgh_bandwidth, median_bandwidth, knn_bandwidth, stationary_distribution):
        with pytest.raises(ValueError, match="must have at least"):
            call(X[:0])
    with pytest.raises(ValueError, match="must have at least"):
        schroedinger_bridge(X[:0], X[:0])


GRADIENTS = {
    "Q": lambda p, x: FlashDiffusion(x, p, p),
    "K": lambda p, x: FlashDiffusion(p, x, p),
    "V": lambda p, x: FlashDiffusion(p, p, x),
    "h": lambda p, x: FlashDiffusion(p, p, p, h=x[:, 0].exp()),
    "X fit": lambda p, x: DiffusionMap(0.3).fit(x),
    "X transform": lambda p, x: FITTED.transform(x),
    "V markov": lambda p, x: FITTED.markov(x),
    "h doob": lambda p, x: doob_transform(FITTED, x[:, 0].exp()),
    "f": lambda p, x: carre_du_champ(FITTED, x[:, 0]),
    "F": lambda p, x: metric_tensor(FITTED, x),
    "X knn": lambda p, x: knn_bandwidth(x),
    "Y": lambda p, x: knn_bandwidth(p, Y=x),
    "X bgh": lambda p, x: bgh_bandwidth(x),
    "Q pi": lambda p, x: stationary_distribution(x),
    "K pi": lambda p, x: stationary_distribution(p, x),
    "V current": lambda p, x: probability_current(p, p, x),
    "X bridge": lambda p, x: schroedinger_bridge(x, p),
    "Y bridge": lambda p, x: schroedinger_bridge(p, x),
    "mu": lambda p, x: schroedinger_bridge(p, p, mu=x[:, 0].softmax(0)),
    "nu": lambda p, x: schroedinger_bridge(p, p, nu=x[:, 0].softmax(0)),
    "frames": lambda p, x: align_frames(x[:, None], p[:1]),
    "reference": lambda p, x: align_frames(p[:, None], x[:1]),
    "trajectory": lambda p, x: slow_manifold(x.view(12, 5, 3)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_that_is_not_given_is_refused_by_name(name):
    x = torch.from_numpy(points()).requires_grad_()
    with pytest.raises(ValueError, match=f"`{name.split()[0]}.*must not require grad"):
        GRADIENTS[name](x.detach(), x)


def test_numpy_scalars_are_numbers():
    X = points()
    options = {"tile": np.int64(32), "tile_skip_tol": np.float32(1e-9)}
    FlashDiffusion(X, X, X, beta=np.float32(1.0), alpha=np.float64(0.5), **options)
    DiffusionMap(
        np.float32(0.3),
        alpha=np.float16(0.5),
        n_components=np.int32(2),
        tol=np.float64(1e-6),
        landmarks=np.int64(40),
    ).fit(X).transform(t=np.float32(1.0))
    schroedinger_bridge(X, X, beta=np.float32(2.0), steps=np.int64(2), max_iter=np.int32(50))
    committor(FITTED, [0], [1], tol=np.float32(1e-8), max_iter=np.int64(500))
    knn_bandwidth(X, np.int8(3))
    bgh_bandwidth(X, n_sample=np.int16(20))
    slow_manifold(frames(), lag=np.int64(1), n_components=np.int64(2), n_delays=np.uint8(2))


# ------------------------------------------------------------------------------- environments


def test_overlapping_calls_give_torchs_threads_back():
    """The second call must not take the one thread of the first for what there was."""
    before = torch.get_num_threads()
    X = points(700)
    exact = DiffusionMap(1.0, n_components=3).fit(X).eigenvalues_
    inside = threading.Barrier(3)
    results = {}

    def work(k):
        inside.wait()
        time.sleep(0.02 * k)
        results[k] = DiffusionMap(1.0, n_components=3).fit(X).eigenvalues_, torch.get_num_threads()

    try:
        torch.set_num_threads(2)
        two = DiffusionMap(1.0, n_components=3).fit(X).eigenvalues_
        workers = [threading.Thread(target=work, args=(k,)) for k in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert torch.get_num_threads() == 2
        for values, threads in results.values():
            assert threads == 2
            np.testing.assert_array_equal(values, two)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(two, exact, atol=TOL)


@pytest.mark.thorough  # the tools' test_isolation.py holds every package to it
def test_import_loads_no_scientific_library():
    probe = (
        "import sys, flashdiffusion; late = {'scipy', 'sklearn'} & set(sys.modules);"
        "assert not late, late; assert 'DiffusionMap' in dir(flashdiffusion);"
        "flashdiffusion.dmap; flashdiffusion.DiffusionMap; assert 'sklearn' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'DifusionMap'"):
        flashdiffusion.DifusionMap  # noqa: B018 - the look-up is the test


def _used():
    """Numbers of a map of all points, of one of neighbours, and of what rests on a map."""
    X = points(120).astype(np.float32)
    dm = DiffusionMap(0.3, n_components=2).fit(X)
    of_neighbours = DiffusionMap(0.3, n_components=2, neighbors=8).fit(X)
    return [
        dm.transform(X),
        DiffusionMap("median", n_components=2).fit_transform(X),
        of_neighbours.transform(X),
        knn_bandwidth(X),
        carre_du_champ(dm, X[:, 0]),
        committor(dm, np.arange(5), np.arange(60, 65)),
        doob_transform(dm, np.exp(X[:, 0])).stationary_,
        doob_transform(of_neighbours, np.exp(X[:, 0])).stationary_,
    ]


@each_default()
def test_torchs_defaults_change_no_result(default):
    exact = _used()
    with default():
        found = _used()
    for ours, right in zip(found, exact, strict=True):
        assert np.array_equal(ours, right) and ours.dtype == right.dtype
