"""DiffusionMap as an estimator."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from flashdiffusion import DiffusionMap, _reference, nystrom_extension
from shared_kernels.testing import measure_memory, others_thorough

from .cases import CANCELLED, FLOAT32, ROUNDING, ROWS, SOLVED, SPANS, TOL, circle, swiss_roll

LANDMARKS = 0.02  # eigenvalues of 800 landmarks against those of 3000 points

# clouds of normal points have lonely ones
pytestmark = pytest.mark.filterwarnings("ignore:the first coordinate lives on")


def cloud(n=200, d=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", ["bgh", "self-tuning"])
def test_check_estimator(beta):
    check_estimator(DiffusionMap(beta=beta, n_components=2))


# scikit-learn's checks make matrices that are no affinities
NO_AFFINITIES = {
    "check_estimator_sparse_tag": "not symmetric",
    "check_estimator_sparse_array": "not symmetric",
    "check_estimator_sparse_matrix": "not symmetric",
    "check_fit2d_1feature": "a row of zeros",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    others_thorough(
        [
            {"neighbors": 3},
            {"affinity": "precomputed"},
            {"neighbors": 1, "search": "tree"},
            {"neighbors": 3, "beta": "self-tuning", "solver": "krylov"},
            {"neighbors": 3, "solver": "lobpcg"},
            {"neighbors": 3, "solver": "lanczos"},
        ],
        plain=2,
    ),
)
def test_check_estimator_of_sparse_kernels(options):
    expected = NO_AFFINITIES if "affinity" in options else {}
    check_estimator(DiffusionMap(n_components=1, **options), expected_failed_checks=expected)


def test_the_quick_start():
    X = cloud()
    dm = DiffusionMap(beta=1.0, alpha=0.5, n_components=8)
    dm.fit(X)
    coords = dm.transform()
    assert coords.shape == (200, 8)
    np.testing.assert_array_equal(coords, dm.fit_transform(X))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("N", [60, 620])
def test_equals_the_dense_map(alpha, N):
    X = cloud(N)
    dm = DiffusionMap(beta=1.5, alpha=alpha, n_components=5).fit(X)
    values, psi, stationary = _reference.diffusion_map(torch.from_numpy(X), 1.5, alpha, 5)
    np.testing.assert_allclose(dm.eigenvalues_, values, rtol=0, atol=CANCELLED)
    np.testing.assert_allclose(dm.stationary_, stationary, rtol=SOLVED)
    sign = np.sign((dm.eigenvectors_ * psi.numpy()).sum(0))
    np.testing.assert_allclose(dm.eigenvectors_ * sign, psi, rtol=ROWS, atol=FLOAT32)
    np.testing.assert_allclose(
        dm.density_, np.exp(-1.5 * ((X[:, None] - X[None]) ** 2).sum(-1)).sum(1), rtol=SOLVED
    )


def test_normalisation_of_psi():
    dm = DiffusionMap(beta=2.0, n_components=6).fit(cloud(700))
    weighted = dm.stationary_[:, None] * dm.eigenvectors_
    np.testing.assert_allclose(dm.eigenvectors_.T @ weighted, np.eye(6), atol=SOLVED)
    np.testing.assert_allclose(weighted.sum(0), 0.0, atol=SOLVED)
    residual = dm.markov(dm.eigenvectors_) - dm.eigenvalues_ * dm.eigenvectors_
    assert np.abs(residual).max() < ROWS
    np.testing.assert_allclose(dm.markov(np.ones(700)), 1.0, rtol=0.1 * ROUNDING)


def test_time_and_signs():
    X = cloud(100)
    dm = DiffusionMap(beta=1.0, n_components=4).fit(X)
    for t in (0, 1, 2.5):
        np.testing.assert_allclose(
            dm.transform(t=t), dm.eigenvalues_**t * dm.eigenvectors_, rtol=ROUNDING
        )
    largest = np.abs(dm.eigenvectors_).argmax(0)
    assert (dm.eigenvectors_[largest, range(4)] > 0).all()
    # the same signs from another start and another dtype
    for other in (
        DiffusionMap(beta=1.0, n_components=4, solver="krylov", random_state=5).fit(X),
        DiffusionMap(beta=1.0, n_components=4).fit(X.astype(np.float32)),
    ):
        np.testing.assert_allclose(other.eigenvectors_, dm.eigenvectors_, atol=5 * ROWS)


@pytest.mark.parametrize("beta", [2.0, "self-tuning"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_new_points(beta, dtype):
    X = cloud(900).astype(dtype)
    dm = DiffusionMap(beta=beta, n_components=4, tol=1e-7 if dtype == np.float64 else 1e-6).fit(X)
    # training rows are new points like any other
    np.testing.assert_allclose(dm.transform(X), dm.transform(), rtol=0, atol=ROWS)
    np.testing.assert_allclose(nystrom_extension(dm, X), dm.eigenvectors_, rtol=0, atol=ROWS)
    np.testing.assert_allclose(dm.transform(X[:9], t=3), dm.transform(t=3)[:9], rtol=0, atol=ROWS)
    assert dm.transform(X[:5]).dtype == dtype
    # and a function between them is continuous
    near = dm.transform(X[:50] + dtype(1e-4))
    assert np.abs(near - dm.transform()[:50]).max() < 0.02


def test_a_new_point_far_away():
    dm = DiffusionMap(beta=2.0, n_components=3).fit(cloud(300))
    out = dm.transform(np.array([[1e3, 0.0, 0.0]]))
    assert np.isfinite(out).all()


def test_self_tuning_equals_its_formula():
    X = cloud(80)
    dm = DiffusionMap(beta="self-tuning", alpha=0.0, n_components=3).fit(X)
    sq = ((X[:, None] - X[None]) ** 2).sum(-1)
    sigma = np.sort(sq, 1)[:, 7] ** 0.5
    K = np.exp(-sq / (sigma[:, None] * sigma[None]))
    exact = np.sort(np.linalg.eigvals(K / K.sum(1, keepdims=True)).real)[::-1][1:4]
    np.testing.assert_allclose(dm.eigenvalues_, exact, atol=SOLVED)
    np.testing.assert_allclose(dm.sigma_, sigma, rtol=ROUNDING)


def test_bandwidth_rules():
    X = circle(400)
    found = DiffusionMap(n_components=2).fit(X)
    assert 0.7 < found.dimension_ < 1.4
    assert DiffusionMap(n_components=2).fit(X).beta_ == found.beta_
    median = DiffusionMap(beta="median", n_components=2).fit(X)
    assert 0.1 < median.beta_ < 1.0


def test_landmarks():
    X, _ = swiss_roll(3000)
    whole = DiffusionMap(beta=0.05, n_components=3).fit(X)
    part = DiffusionMap(beta=0.05, n_components=3, landmarks=800).fit(X)
    assert part.transform().shape == (3000, 3) and len(part.landmarks_) == 800
    np.testing.assert_allclose(part.eigenvalues_, whole.eigenvalues_, atol=LANDMARKS)
    for k in range(2):
        assert abs(np.corrcoef(part.eigenvectors_[:, k], whole.eigenvectors_[:, k])[0, 1]) > 0.98
    np.testing.assert_allclose(part.stationary_.sum(), 1.0)
    np.testing.assert_allclose(part.transform(X[:50]), part.transform()[:50], atol=ROWS)
    # landmarks = all rows is the map itself
    small = X[:600]
    rows = DiffusionMap(beta=0.05, n_components=3, landmarks=np.arange(600)).fit(small)
    exact = DiffusionMap(beta=0.05, n_components=3).fit(small)
    np.testing.assert_allclose(rows.eigenvectors_, exact.eigenvectors_, atol=ROWS)
    np.testing.assert_allclose(rows.stationary_, exact.stationary_, rtol=TOL)
    np.testing.assert_allclose(rows.density_, exact.density_, rtol=TOL)


def test_clone_pickle_pipeline_names():
    X = cloud(120)
    dm = DiffusionMap(beta=1.0, n_components=3)
    assert clone(dm).get_params() == dm.get_params()
    dm.fit(X)
    copy = pickle.loads(pickle.dumps(dm))
    np.testing.assert_array_equal(copy.transform(X[:5]), dm.transform(X[:5]))
    pipeline = make_pipeline(StandardScaler(), DiffusionMap(beta=1.0, n_components=2))
    assert pipeline.fit_transform(X).shape == (120, 2)
    assert list(pipeline.get_feature_names_out()) == ["diffusionmap0", "diffusionmap1"]
    with pytest.raises(NotFittedError):
        DiffusionMap().transform()


def test_torch_tensors():
    X = cloud(100)
    dm = DiffusionMap(beta=1.0, n_components=3).fit(torch.from_numpy(X))
    np.testing.assert_array_equal(
        dm.transform(), DiffusionMap(beta=1.0, n_components=3).fit_transform(X)
    )
    half = DiffusionMap(beta=1.0, n_components=3).fit(torch.from_numpy(X).bfloat16())
    assert half.transform().dtype == np.float32


@pytest.mark.filterwarnings("ignore:the second eigenvalue")
def test_warnings_say_what_is_wrong():
    X = cloud(300)
    with pytest.warns(UserWarning, match="bandwidth is too small"):
        DiffusionMap(beta=1e6, n_components=2).fit(X)
    two = np.concatenate((X, X + 1000.0))
    with pytest.warns(UserWarning, match="disconnected"):
        dm = DiffusionMap(beta=1.0, n_components=2).fit(two)
    assert np.isfinite(dm.transform()).all() and np.isfinite(dm.transform(two[:3])).all()
    # the first coordinate tells the parts apart
    first = dm.transform()[:, 0]
    assert (first[:300] > 0).all() != (first[300:] > 0).all()
    with pytest.warns(ConvergenceWarning, match="largest residual"):
        DiffusionMap(beta=20.0, n_components=4, tol=1e-15).fit(cloud(600).astype(np.float32))
    # blocks of many columns that do not fill a small space
    with pytest.warns(ConvergenceWarning, match="largest residual"):
        dm = DiffusionMap(beta=1.0, n_components=40, solver="krylov").fit(cloud(50))
    assert dm.eigenvectors_.shape == (50, 40) and np.isfinite(dm.eigenvectors_).all()


def test_a_coordinate_of_few_points_is_said_to_be_one():
    X = cloud(600)
    apart = np.concatenate((X, [[0.0, 0.0, 4.8]]))
    with pytest.warns(UserWarning, match="the first coordinate lives on 0.*smallest row sum"):
        dm = DiffusionMap(beta=1.0, n_components=2).fit(apart)
    assert np.abs(dm.eigenvectors_[:, 0]).argmax() == 600
    # a rare half is no outlier
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiffusionMap(beta=0.5, n_components=2).fit(X)
        line = np.concatenate((X, X[:60] + [7.0, 0.0, 0.0]))
        DiffusionMap(beta=0.3, n_components=2).fit(line)


@pytest.mark.filterwarnings("ignore:the second eigenvalue", "ignore:the first coordinate")
def test_duplicates_outliers_and_one_far_cluster():
    X = cloud(600)
    duplicates = np.concatenate((X[:300], X[:300]))
    outliers = np.concatenate((X, [[1e5, 0, 0], [0, -1e4, 0]]))
    cluster = np.concatenate((X, 1e4 + 1e-3 * X[:100]))
    for points in (duplicates, outliers, cluster):
        for beta in (1.0, "bgh", "median", "self-tuning"):
            dm = DiffusionMap(beta=beta, n_components=4).fit(points)
            assert np.isfinite(dm.transform()).all()
            assert dm.residuals_.max() < SPANS
    equal = DiffusionMap(n_components=2).fit(np.ones((20, 2)))
    assert np.isfinite(equal.transform()).all()


def test_every_number_of_components():
    X = cloud(30)
    for k in (1, 5, 29):
        assert DiffusionMap(beta=1.0, n_components=k).fit_transform(X).shape == (30, k)
    assert DiffusionMap(beta=1.0, n_components=1).fit_transform(X[:2]).shape == (2, 1)


@pytest.mark.system
def test_nothing_of_size_n_squared():
    X = cloud(9000).astype(np.float32)
    dm = DiffusionMap(beta=2.0, n_components=4)
    memory = measure_memory(lambda: dm.fit(X))
    assert memory.peak < 9000**2 * 4 / 2  # the basis grows with N, not with N^2
    assert memory.largest < 9000**2
    assert len(pickle.dumps(dm)) < 9000 * 8 * 20


def test_memory_grows_with_n():
    def peak(N):
        X = cloud(N).astype(np.float32)
        dm = DiffusionMap(beta=2.0, n_components=4, tol=0.5)
        return measure_memory(lambda: dm.fit(X)).peak

    assert peak(6000) < 2.3 * peak(3000)


@pytest.mark.filterwarnings("ignore:the second eigenvalue")
def test_two_threads_find_what_one_finds_twice_with_the_same_bits():
    X = cloud(900)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = DiffusionMap(beta=2.0, n_components=4).fit(X)
        torch.set_num_threads(2)
        two, again = (DiffusionMap(beta=2.0, n_components=4).fit(X) for _ in range(2))
        # the caller's own setting is there again, also after a warning
        assert torch.get_num_threads() == 2
        with pytest.warns(ConvergenceWarning):
            DiffusionMap(beta=20.0, n_components=4, tol=1e-15).fit(X.astype(np.float32))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(two.eigenvectors_, again.eigenvectors_)
    np.testing.assert_allclose(two.eigenvalues_, one.eigenvalues_, rtol=0, atol=SOLVED)
    np.testing.assert_allclose(two.eigenvectors_, one.eigenvectors_, rtol=0, atol=ROWS)


def test_quiet_unless_asked(capsys):
    DiffusionMap(beta=1.0, n_components=2).fit(cloud(600))
    assert capsys.readouterr() == ("", "")
    DiffusionMap(beta=1.0, n_components=2, verbose=1).fit(cloud(600))
    assert "diffusion map" in capsys.readouterr().err


def test_precisions_agree():
    X = cloud(700)
    exact = DiffusionMap(beta=1.0, n_components=3, precision="float64").fit(X).eigenvalues_
    for precision in ("auto", "mixed", "float32"):
        dm = DiffusionMap(beta=1.0, n_components=3, precision=precision).fit(X)
        atol = SOLVED if precision == "auto" else 3 * TOL
        np.testing.assert_allclose(dm.eigenvalues_, exact, rtol=0, atol=atol)


def test_lanczos_on_simple_eigenvalues():
    X = cloud(700)
    exact = DiffusionMap(beta=1.0, n_components=3).fit(X)
    dm = DiffusionMap(beta=1.0, n_components=3, solver="lanczos").fit(X)
    np.testing.assert_allclose(dm.eigenvalues_, exact.eigenvalues_, rtol=0, atol=SOLVED)
    assert dm.n_passes_ > exact.n_passes_


class Recorder:
    """A callback of scikit-learn 1.9; `stop_at` asks to stop at that look at the residuals."""

    def __init__(self, stop_at=None):
        self.stop_at, self.told, self.events = stop_at, [], []

    def setup(self, estimator, context):
        self.events.append("setup")

    def teardown(self, estimator, context):
        self.events.append("teardown")

    def on_fit_task_begin(self, estimator, context, *, X=None, fitted_estimator=None):
        self.events.append(f"begin {context.task_name}")

    def on_fit_task_end(self, estimator, context, *, metadata=None, fitted_estimator=None):
        self.events.append(f"end {context.task_name}")
        if context.task_name == "fit":
            self.result = fitted_estimator.transform()
        else:
            self.told.append(metadata)
        return context.task_name != "fit" and len(self.told) == self.stop_at


@pytest.mark.parametrize("options", [{}, {"neighbors": 8}, {"landmarks": 600}], ids=str)
def test_callbacks_are_told_of_each_look(options):
    pytest.importorskip("sklearn.callback", reason="callbacks came with scikit-learn 1.9")
    X = np.random.default_rng(0).standard_normal((700, 3))
    options = {"beta": "self-tuning", "n_components": 3, **options}
    recorder = Recorder()
    dm = DiffusionMap(**options).set_callbacks(recorder)
    dm.fit(X)
    events = recorder.events
    assert events[:2] == ["setup", "begin fit"] and events[-2:] == ["end fit", "teardown"]
    assert len(recorder.told) >= 1 and events.count("end passes") == len(recorder.told)
    passes = [told["passes"] for told in recorder.told]
    assert passes == sorted(passes) and passes[-1] <= dm.n_passes_
    assert recorder.told[-1]["residual"] <= recorder.told[-1]["tol"] == dm.tol
    np.testing.assert_array_equal(recorder.result, dm.transform())
    np.testing.assert_array_equal(DiffusionMap(**options).fit(X).eigenvalues_, dm.eigenvalues_)
    # a failing fit is taken down, too
    with pytest.raises(ValueError, match="NaN"):
        dm.fit(np.full((700, 3), np.nan))
    assert recorder.events[-1] == "teardown"


@pytest.mark.parametrize(
    "options", [{"beta": 20.0}, {"beta": "self-tuning", "neighbors": 8}], ids=str
)
def test_a_callback_stops_a_fit(options):
    pytest.importorskip("sklearn.callback", reason="callbacks came with scikit-learn 1.9")
    X = np.random.default_rng(0).random((3000, 3))
    recorder = Recorder(stop_at=1)
    dm = DiffusionMap(n_components=4, tol=1e-9, **options).set_callbacks(recorder)
    with pytest.warns(ConvergenceWarning, match="converged"):
        dm.fit(X)
    whole = DiffusionMap(n_components=4, **options).fit(X)
    assert not dm.converged_ and dm.n_passes_ < whole.n_passes_
    # the residual that is reported is measured
    assert dm.residuals_.max() > dm.tol


def test_warnings_name_the_line_that_called():
    with pytest.warns(UserWarning, match="too small") as caught:
        DiffusionMap(beta=1e6, n_components=2).fit(np.random.default_rng(0).random((40, 2)))
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("tile", [16, 100, np.int64(64)])
def test_the_tile_of_a_map(tile):
    X = np.random.default_rng(0).standard_normal((130, 3))
    options = {"beta": 0.3, "n_components": 3}
    ours, chosen = DiffusionMap(**options, tile=tile).fit(X), DiffusionMap(**options).fit(X)
    np.testing.assert_allclose(ours.eigenvalues_, chosen.eigenvalues_, atol=CANCELLED)
    with pytest.raises(ValueError, match="`tile` must"):
        DiffusionMap(**options, tile=0).fit(X)
    with pytest.raises(ValueError, match="`tile` must be None with a sparse kernel"):
        DiffusionMap(n_components=3, neighbors=5, tile=64).fit(X)
