import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from flashdiffusion import DiffusionMap, committor, slow_manifold
from flashdiffusion.trajectory import align_frames


def rotations(T, seed=0):
    q = torch.linalg.qr(torch.randn(T, 3, 3, dtype=torch.float64,
                                    generator=torch.Generator().manual_seed(seed)))[0]  # fmt: skip
    q[torch.linalg.det(q) < 0, :, 0] *= -1
    return q.numpy()


def hinge(T, atoms=12, seed=0):
    """Two rigid arms that open from 20 to 160 degrees, tumbling and moving about."""
    angle = np.radians(np.linspace(20, 160, T))
    arm = np.linspace(1.0, 4.0, atoms // 2)
    frames = np.zeros((T, atoms, 3))
    frames[:, : atoms // 2, 0] = arm
    frames[:, atoms // 2 :, 0] = np.cos(angle)[:, None] * arm
    frames[:, atoms // 2 :, 1] = np.sin(angle)[:, None] * arm
    frames[:, :, 2] = np.linspace(0, 1, atoms)
    rng = np.random.default_rng(seed)
    frames += 0.01 * rng.standard_normal(frames.shape)
    return frames @ rotations(T, seed) + rng.standard_normal((T, 1, 3)) * 5.0


def test_kabsch_undoes_rotations():
    rng = np.random.default_rng(0)
    shape = rng.standard_normal((7, 3))
    moved = shape @ rotations(20) + rng.standard_normal((20, 1, 3))
    out = align_frames(moved, shape)
    np.testing.assert_allclose(out, np.broadcast_to(shape - shape.mean(0), out.shape), atol=1e-12)
    # a mirror image stays one: its RMSD does not vanish, and no rotation does better
    mirror = shape * [1, 1, -1]
    aligned = align_frames(mirror[None], shape)[0]
    best = ((aligned - shape + shape.mean(0)) ** 2).sum()
    assert best > 0.1
    for turn in rotations(200, 1):
        assert ((mirror - mirror.mean(0)) @ turn - shape + shape.mean(0)).__pow__(2).sum() >= best


def test_weights_decide_what_is_matched():
    rng = np.random.default_rng(0)
    shape = rng.standard_normal((6, 3))
    bent = (shape + rng.standard_normal((6, 3))) @ rotations(1)[0]
    w = np.array([1e6, 1e6, 1e6, 1.0, 1.0, 1.0])
    moved, flat = align_frames(bent[None], shape, w)[0], align_frames(bent[None], shape)[0]
    centre = (w / w.sum()) @ shape

    def misfit(x, origin, w):
        return (w[:, None] * (x - (shape - origin)) ** 2).sum()

    assert misfit(moved, centre, w) < misfit(flat, shape.mean(0), w)
    assert misfit(flat, shape.mean(0), np.ones(6)) < misfit(moved, centre, np.ones(6))


@pytest.mark.parametrize("as_batches", [False, True])
def test_the_hinge_opens(as_batches):
    frames = hinge(300)
    trajectory = iter(np.array_split(frames, 7)) if as_batches else frames
    dm = slow_manifold(trajectory, n_components=2, beta="median")
    psi = dm.transform()[:, 0]
    assert abs(spearmanr(psi, np.arange(300)).statistic) > 0.999
    assert dm.reference_.shape == (12, 3)
    # without alignment tumbling hides it
    blind = slow_manifold(frames, n_components=2, beta="median", align="center")
    assert abs(spearmanr(blind.transform()[:, 0], np.arange(300)).statistic) < 0.9


def test_distances_are_rmsds():
    frames = hinge(40)
    w = np.arange(1.0, 13.0)
    dm = slow_manifold(frames, n_components=2, beta=1.0, weights=w, reference=frames[7])
    aligned = align_frames(frames, frames[7], w)
    rmsd = np.sqrt((w / w.sum() * ((aligned[3] - aligned[9]) ** 2).sum(1)).sum())
    assert np.linalg.norm(dm.X_fit_[3] - dm.X_fit_[9]) == pytest.approx(rmsd, rel=1e-9)
    single = slow_manifold((f for f in frames.astype(np.float32)), n_components=2, beta=1.0)
    assert single.X_fit_.dtype == np.float32


def ar1(T, a, seed=0):
    noise = np.random.default_rng(seed).standard_normal(T) * (1 - a * a) ** 0.5
    x = np.empty(T)
    x[0] = noise[0]
    for t in range(1, T):
        x[t] = a * x[t - 1] + noise[t]
    return x


@pytest.mark.parametrize("lag", [1, 5])
def test_timescale_of_an_autoregressive_process(lag):
    a = 0.95
    frames = np.zeros((20000, 1, 3))
    frames[:, 0, 0] = ar1(20000, a)
    dm = slow_manifold(frames, lag, 3, align=None, beta=2.0, landmarks=400)
    # the slowest function is x itself, the next x^2 - 1
    assert abs(spearmanr(dm.transform()[:, 0], frames[:, 0, 0]).statistic) > 0.999
    np.testing.assert_allclose(dm.timescales_[0] * lag, -1 / np.log(a), rtol=0.12)
    np.testing.assert_allclose(dm.timescales_[1] * lag, -1 / np.log(a**2), rtol=0.2)
    assert (np.diff(dm.timescales_) < 0).all()


def test_double_well_committor_is_a_half_on_the_barrier():
    rng = np.random.default_rng(0)
    x, path = -1.0, np.empty(40000)
    for t in range(len(path)):
        x = x - 0.01 * 6.0 * x * (x * x - 1.0) + 0.1 * 2.0**0.5 * rng.standard_normal()
        path[t] = x
    frames = np.zeros((2000, 1, 3))
    frames[:, 0, 0] = path[::20]
    dm = slow_manifold(frames, 1, 3, align=None, beta=20.0)
    assert abs(spearmanr(dm.transform()[:, 0], path[::20]).statistic) > 0.99
    q = committor(dm, path[::20] < -1.0, path[::20] > 1.0)
    assert q[np.abs(path[::20]) < 0.1].mean() == pytest.approx(0.5, abs=0.15)
    # the slow coordinate is slower than the others
    assert dm.timescales_[0] > 3 * dm.timescales_[1]


def test_delays_and_frame_weights():
    frames = np.random.default_rng(0).standard_normal((80, 4, 3))
    dm = slow_manifold(frames, 2, 2, align=None, beta=1.0, n_delays=3)
    flat = frames.reshape(80, 12) / 2.0
    stacked = np.concatenate([flat[k : k + 76] for k in (0, 2, 4)], 1) / 3**0.5
    exact = DiffusionMap(beta=1.0, n_components=2).fit(stacked)
    np.testing.assert_allclose(dm.eigenvectors_, exact.eigenvectors_, atol=1e-9)
    omega = np.random.default_rng(1).random(80) + 0.1
    dm = slow_manifold(frames, 1, 2, align=None, beta=1.0, frame_weights=omega)
    plain = DiffusionMap(beta=1.0, n_components=2).fit(flat)
    K = np.exp(-((flat[:, None] - flat[None]) ** 2).sum(-1))
    w = plain.density_**-0.5 * omega**0.5
    d = w * (K @ w)
    np.testing.assert_allclose(dm.stationary_, d / d.sum(), rtol=1e-9)
    assert np.isnan(dm.timescales_).all()


@pytest.mark.parametrize(
    ("trajectory", "kwargs", "words"),
    [
        (np.zeros((10, 4)), {}, r"\(T, atoms, 3\)"),
        ([np.zeros((5, 4, 3)), np.zeros((5, 3, 3))], {}, r"`trajectory\[1\]` must have 4 atoms"),
        ([], {}, "at least one frame"),
        (np.full((10, 4, 3), np.nan), {}, "finite"),
        (np.zeros((3, 4, 3)), {"lag": 2}, "more than 3 frames"),
        (np.zeros((10, 4, 3)), {"lag": 0}, "`lag`"),
        (np.zeros((10, 4, 3)), {"align": "procrustes"}, "`align`"),
        (np.zeros((10, 4, 3)), {"weights": np.ones(3)}, "`weights` must have shape"),
        (np.zeros((10, 4, 3)), {"weights": np.zeros(4)}, "`weights` must be positive"),
        (np.zeros((10, 4, 3)), {"reference": np.zeros((3, 3))}, "`reference` must have shape"),
        (np.zeros((10, 4, 3)), {"frame_weights": np.ones(9)}, "`frame_weights` must have"),
    ],
)
def test_errors(trajectory, kwargs, words):
    with pytest.raises(ValueError, match=words):
        slow_manifold(trajectory, n_components=2, **kwargs)
