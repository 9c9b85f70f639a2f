import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from flashdiffusion import DiffusionMap, committor, slow_manifold, trajectory
from flashdiffusion.trajectory import align_frames
from shared_kernels.testing import measure_memory

from .cases import CANCELLED, ROUNDING, SOLVED

# Timescales and a committor from one sampled walk.
SLOWEST, SECOND, MIDDLE = 0.12, 0.2, 0.15


def rotations(T, seed=0):
    q = torch.linalg.qr(
        torch.randn(T, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )[0]
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
    np.testing.assert_allclose(
        out, np.broadcast_to(shape - shape.mean(0), out.shape), atol=ROUNDING
    )
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
    assert np.linalg.norm(dm.X_fit_[3] - dm.X_fit_[9]) == pytest.approx(rmsd, rel=SOLVED)
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
    np.testing.assert_allclose(dm.timescales_[0] * lag, -1 / np.log(a), rtol=SLOWEST)
    np.testing.assert_allclose(dm.timescales_[1] * lag, -1 / np.log(a**2), rtol=SECOND)
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
    assert q[np.abs(path[::20]) < 0.1].mean() == pytest.approx(0.5, abs=MIDDLE)
    # the slow coordinate is slower than the others
    assert dm.timescales_[0] > 3 * dm.timescales_[1]


def test_delays_and_frame_weights():
    frames = np.random.default_rng(0).standard_normal((80, 4, 3))
    dm = slow_manifold(frames, 2, 2, align=None, beta=1.0, n_delays=3)
    flat = frames.reshape(80, 12) / 2.0
    stacked = np.concatenate([flat[k : k + 76] for k in (0, 2, 4)], 1) / 3**0.5
    exact = DiffusionMap(beta=1.0, n_components=2).fit(stacked)
    np.testing.assert_allclose(dm.eigenvectors_, exact.eigenvectors_, atol=SOLVED)
    omega = np.random.default_rng(1).random(80) + 0.1
    dm = slow_manifold(frames, 1, 2, align=None, beta=1.0, frame_weights=omega)
    plain = DiffusionMap(beta=1.0, n_components=2).fit(flat)
    K = np.exp(-((flat[:, None] - flat[None]) ** 2).sum(-1))
    w = plain.density_**-0.5 * omega**0.5
    d = w * (K @ w)
    np.testing.assert_allclose(dm.stationary_, d / d.sum(), rtol=SOLVED)
    assert np.isnan(dm.timescales_).all()


def drifting(T, atoms=6):
    """A trajectory as a function: batches made when they are asked for, the same each time."""

    def frames():
        shape = np.random.default_rng(0).standard_normal((atoms, 3))
        for start in range(0, T, 500):
            rng = np.random.default_rng(start + 1)
            n = min(500, T - start)
            phase = np.sin(np.arange(start, start + n) / 300.0)[:, None, None]
            noise = 0.1 * rng.standard_normal((n, atoms, 3))
            yield shape + phase * shape[::-1] + noise

    return frames


@pytest.mark.parametrize("n_delays", [1, 3])
def test_read_twice_is_what_is_kept(n_delays):
    frames = drifting(2300)
    options = {"n_components": 3, "beta": 1.0, "n_delays": n_delays, "landmarks": 150}
    dm = slow_manifold(frames, 4, **options)
    # all in memory, the same landmarks
    every = np.concatenate(list(frames()))
    aligned = align_frames(every, every[0]).reshape(2300, -1) / 6**0.5
    T = 2300 - 4 * (n_delays - 1)
    points = (
        np.concatenate([aligned[4 * k : 4 * k + T] for k in range(n_delays)], 1) / n_delays**0.5
    )
    exact = DiffusionMap(beta=1.0, n_components=3, landmarks=dm.landmarks_).fit(points)
    assert len(dm.landmarks_) == 150 and dm.get_params()["landmarks"] == 150
    for name in ("eigenvectors_", "eigenvalues_", "stationary_", "density_", "X_fit_"):
        np.testing.assert_allclose(
            getattr(dm, name), getattr(exact, name), rtol=SOLVED, atol=CANCELLED
        )
    assert abs(spearmanr(dm.transform()[:, 0], np.sin(np.arange(T) / 300)).statistic) > 0.9
    # however the frames come: an array, single frames, an iterator that can be read once
    for same in (every, lambda: (frame for batch in frames() for frame in batch), frames()):
        again = slow_manifold(same, 4, **options)
        np.testing.assert_array_equal(again.landmarks_, dm.landmarks_)
        np.testing.assert_allclose(again.eigenvectors_, dm.eigenvectors_, atol=SOLVED)
        np.testing.assert_allclose(again.timescales_, dm.timescales_, rtol=SOLVED)
    few = slow_manifold(frames, 4, **{**options, "landmarks": dm.landmarks_})
    np.testing.assert_allclose(few.eigenvectors_, dm.eigenvectors_, atol=ROUNDING)


@pytest.mark.system
def test_a_trajectory_need_not_fit_in_memory():
    T, atoms = 16000, 120
    whole = T * atoms * 3 * 8
    peaks = [
        measure_memory(
            lambda T=T: slow_manifold(
                drifting(T, atoms), n_components=2, beta=0.1, landmarks=100, align="center"
            )
        ).peak
        for T in (T // 2, T)
    ]
    # a batch, the landmarks, and a few numbers per frame
    assert peaks[1] < whole / 2 and peaks[1] - peaks[0] < whole / 50


def test_landmarks_are_a_fair_sample():
    counts = np.zeros(60)
    for state in range(200):
        rows = [torch.arange(start, start + 20.0)[:, None] for start in (0, 20, 40)]
        kept, numbers = trajectory._sample(rows, 6, state)
        assert (kept[:, 0].numpy() == numbers).all() and len(set(numbers)) == 6
        counts[numbers] += 1
    assert abs(counts[:20].sum() - 400) < 60 and abs(counts[40:].sum() - 400) < 60


def broken():
    yield np.zeros((4, 5, 3))
    raise OSError("no more bytes")


class Cut(list):
    """Promises more than it gives, as a reader of a file that was cut."""

    def __len__(self):
        return 3


def shrinking():
    left = [[np.zeros((8, 5, 3))], [np.zeros((9, 5, 3))]]
    return lambda: iter(left.pop())


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
        (np.zeros((10, 4, 3)), {"landmarks": 11}, "`landmarks` must be in"),
        (np.zeros((10, 4, 3)), {"landmarks": [3, 3]}, "`landmarks` must be a number or distinct"),
        (np.zeros((10, 4, 3)), {"landmarks": [3, 10]}, "`landmarks` must be in"),
        (Cut([np.zeros((9, 5, 3))]), {}, "`trajectory` must give all of its 3 batches or frames"),
        (shrinking(), {"landmarks": 3}, "the same frames each time it is read, got 9 points"),
    ],
)
def test_errors(trajectory, kwargs, words):
    with pytest.raises(ValueError, match=words):
        slow_manifold(trajectory, n_components=2, **kwargs)


@pytest.mark.parametrize("trajectory", [None, 3, "run.dcd"])
def test_what_is_not_a_trajectory(trajectory):
    with pytest.raises(TypeError, match="`trajectory` must be an array, an iterable of frames or"):
        slow_manifold(trajectory)


@pytest.mark.parametrize("kwargs", [{}, {"landmarks": 2}])
def test_what_cannot_be_read_is_said(kwargs):
    with pytest.raises(OSError, match=r"cannot be read after 1 batches or frames: no more bytes"):
        slow_manifold(broken, n_components=1, beta=1.0, **kwargs)


def chain(T=30, atoms=12, seed=0):
    """A chain of constant bonds that writhes, without tumbling: (T, atoms, 3)."""
    rng = np.random.default_rng(seed)
    bend = rng.standard_normal((1, atoms - 1, 3)) + 0.1 * np.cumsum(
        rng.standard_normal((T, atoms - 1, 3)), 0
    )
    bonds = 3.8 * bend / np.linalg.norm(bend, axis=2, keepdims=True)
    return np.concatenate((np.zeros((T, 1, 3)), np.cumsum(bonds, 1)), 1)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, np.float32])
@pytest.mark.parametrize("shape", [(30, 12), (200, 7), (8, 150)])
def test_atoms_before_frames_are_refused(kind, shape):
    right = chain(*shape)
    slow_manifold(kind(right), n_components=2, beta="median")
    with pytest.raises(ValueError, match="order='fac'"):
        slow_manifold(kind(right.transpose(1, 0, 2).copy()), n_components=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "frames",
    [
        np.random.default_rng(0).standard_normal((60, 8, 3)),
        chain() + 100.0 * np.random.default_rng(0).standard_normal((30, 1, 3)),
        chain() @ rotations(30),
        chain()[np.random.default_rng(0).permutation(30)],
        np.cumsum(np.random.default_rng(0).standard_normal((60, 8, 3)), 0),
        np.broadcast_to(chain()[0], (20, 12, 3)).copy(),
        hinge(40),
        chain()[:, :3],
    ],
    ids=["noise", "drift", "tumbling", "shuffled", "walk", "still", "hinge", "three"],
)
def test_frames_before_atoms_are_not(frames):
    trajectory.require_frames_first(frames)
    slow_manifold(frames, n_components=2, beta="median")


def test_who_means_it_passes_a_list():
    frames = list(chain().transpose(1, 0, 2).copy())
    assert slow_manifold(frames, n_components=2, beta="median").transform().shape == (12, 2)
