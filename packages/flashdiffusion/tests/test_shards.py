"""Points that are split over processes: the map of one process that has them all."""

import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.base import clone

from flashdiffusion import (
    DiffusionMap,
    _ring,
    carre_du_champ,
    committor,
    doob_transform,
    kinetics,
    slow_manifold,
)
from flashdiffusion._checkpoint import Checkpoint
from shared_kernels.testing import assert_close
from shared_kernels.testing.ranks import needs_ranks, on_ranks, refused

from . import rank as job
from .cases import CANCELLED

pytestmark = [*needs_ranks, pytest.mark.system]
# of processes: as many points each, and numbers that no panel divides
SPLITS = {2: (523, 180), 4: (300, 1, 211, 191)}
FITS = {
    "krylov": ({"beta": 8.0}, np.float64),
    "bgh": ({"alpha": 1.0}, np.float64),
    "median": ({"beta": "median", "alpha": 0.0}, np.float64),
    "self-tuning": ({"beta": "self-tuning"}, np.float64),
    "dense": ({"beta": 8.0, "solver": "dense"}, np.float64),
    "float32": ({"beta": 8.0}, np.float32),
    "mixed": ({"beta": 8.0}, np.float16),  # float32, far from the origin
    "torch": ({"beta": 8.0, "tile": 32}, np.float32),
    "many": ({"beta": 8.0, "n_components": 31}, np.float64),
    # close eigenvalues: an iteration knows their vectors to its tolerance over the gap
    "copies": ({"beta": "self-tuning", "solver": "dense"}, None),
}


def points(name):
    dtype = FITS[name][1]
    if dtype is None:  # each point often: no point has a scale of its own
        return np.repeat(job.points(61), 12, 0)[: sum(SPLITS[2])]
    X = job.points(sum(SPLITS[2]))
    return X.astype(np.float32) + 30.0 if dtype == np.float16 else X.astype(dtype)


def parts(X, rank, size):
    start = sum(SPLITS[size][:rank])
    return X[start : start + SPLITS[size][rank]]


def results(name, group=None, rank=0, size=1):
    own = parts if size > 1 else lambda x, *_: x
    X = points(name)
    V = np.random.default_rng(1).standard_normal((len(X), 2))
    new = X[:36] + X.dtype.type(0.01)
    mine = np.array_split(new, size)[rank]
    options = {"n_components": 4, **FITS[name][0]}
    if group is not None:
        options.update(group=group, shard_points=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dm = DiffusionMap(**options).fit(own(X, rank, size))
    names = ("eigenvalues_", "eigenvectors_", "stationary_", "density_", "weights_", "row_sums_")
    found = {part: torch.from_numpy(getattr(dm, part)) for part in names}
    found["beta"] = torch.tensor(dm.beta_, dtype=torch.float64)
    if dm.sigma_ is not None:
        found["sigma"] = torch.from_numpy(dm.sigma_)
        found["fallback"] = torch.tensor(dm.sigma_fallback_, dtype=torch.float64)
    found["transform"] = torch.from_numpy(dm.transform(mine, t=2))
    found["coordinates"] = torch.from_numpy(dm.transform())
    found["markov"] = torch.from_numpy(dm.markov(own(V, rank, size)))
    found["flat"] = torch.from_numpy(dm.markov(own(V[:, 0], rank, size)))
    return found


OF_ALL = ("eigenvalues_", "beta", "fallback")


def work(rank, size, names):
    _ring.PANEL = 200
    return {name: results(name, "world", rank, size) for name in names}


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, ("krylov", "self-tuning")),
        pytest.param(2, tuple(FITS), marks=pytest.mark.thorough),
        pytest.param(4, tuple(FITS), marks=pytest.mark.thorough),
    ],
)
def test_split_points_have_the_map_of_all(size, names):
    every = on_ranks(size, work, size, names)
    for name in names:
        exact = results(name)
        for part, whole in exact.items():
            found = [each[name][part] for each in every]
            for other in found[1:]:
                if part in OF_ALL:
                    assert torch.equal(other, found[0])
            joined = found[0] if part in OF_ALL else torch.cat(found)
            assert joined.dtype == whole.dtype and joined.shape == whole.shape, (name, part)
            kind = (
                "gradient" if part in ("eigenvectors_", "transform", "coordinates") else "forward"
            )
            assert_close(joined.float(), whole.float(), kind)
            if name in ("krylov", "dense") and part not in OF_ALL and kind == "forward":
                assert float((joined - whole).abs().max() / whole.abs().max()) <= CANCELLED, part


def save_and_stop(self, *state, save=Checkpoint.save):
    save(self, *state)
    raise KeyboardInterrupt


def resumed(rank, folder):
    """Stopped after each of the first sweeps in turn, and the fit without that."""
    X = parts(job.points(sum(SPLITS[2])), rank, 2)
    options = {"n_components": 3, "solver": "krylov", "group": "world", "shard_points": True}
    exact = DiffusionMap(8.0, **options).fit(X)
    kept = DiffusionMap(8.0, checkpoint=f"{folder}/kept", **options)
    save, stops = Checkpoint.save, 0
    Checkpoint.save = save_and_stop
    for _ in range(2):
        try:
            kept.fit(X)
        except KeyboardInterrupt:
            stops += 1
    other = refused({"other": lambda: clone(kept).fit(X + rank)})["other"]
    Checkpoint.save = save
    kept.fit(X)
    same = [
        np.array_equal(getattr(kept, n), getattr(exact, n))
        for n in ("eigenvectors_", "eigenvalues_")
    ]
    return {"stops": stops, "same": same, "other": other}


def test_a_split_fit_goes_on_from_its_checkpoint(tmp_path):
    for rank in on_ranks(2, resumed, str(tmp_path)):
        assert rank["stops"] == 2 and rank["same"] == [True, True]
        assert "`checkpoint` must belong to these points" in rank["other"], rank["other"]
    assert not (tmp_path / "kept").exists()


def misuse(rank):
    _ring.PANEL = 200
    X = parts(job.points(sum(SPLITS[2])), rank, 2)
    bad = X.copy()
    bad[3, 0] = np.nan
    options = {"n_components": 3, "group": "world", "shard_points": True}
    dm = DiffusionMap(8.0, **options).fit(X)
    # a function that returns batches, and rows that are mapped: the same bits
    batches = [X[:50], X[50:]]
    read = DiffusionMap(8.0, **options).fit(lambda: iter(batches))
    alone = pickle.loads(pickle.dumps(dm))
    n = len(X)
    A, B = X[:, 0] < -0.8, X[:, 0] > 0.9

    def fit(X=X, **more):
        return DiffusionMap(**{"beta": 8.0, **options, **more}).fit(X)

    def fails():
        """In the middle of a product, on one process, while panels go around."""
        matvec = _ring.Kernel.matvec
        count = [0]

        def counted(self, V):
            count[0] += 1
            if rank and count[0] == 5:
                raise MemoryError("no memory left")
            return matvec(self, V)

        _ring.Kernel.matvec = counted
        try:
            fit()
        except MemoryError as error:
            raise RuntimeError("MemoryError") from error
        finally:
            _ring.Kernel.matvec = matvec

    calls = {
        "nan": lambda: fit(bad if rank else X),
        "no rows": lambda: fit(X[:0] if rank else X),
        "columns": lambda: fit(X[:, : 3 - rank]),
        "dtype": lambda: fit(X.astype(np.float32) if rank else X),
        "beta": lambda: fit(beta=8.0 + rank),
        "shard_points": lambda: fit(X, shard_points=rank == 0),
        "group": lambda: fit(group=None),
        "flag": lambda: fit(shard_points="yes"),
        "landmarks": lambda: fit(landmarks=100),
        "neighbors": lambda: fit(neighbors=5),
        "half": lambda: fit(precision="half"),
        "solver": lambda: fit(solver="lanczos"),
        "n_components": lambda: fit(n_components=703),
        "no batches": lambda: fit(lambda: iter([] if rank else batches)),
        "batches": lambda: fit(lambda: iter([X[:5], X[5:9, :2]])),
        "fails": fails,
        "V": lambda: dm.markov(np.zeros(n + rank)),
        "V columns": lambda: dm.markov(np.zeros((n, 2 + rank))),
        "t": lambda: dm.transform(X, t=1 + rank),
        "new points": lambda: dm.transform(bad if rank else X),
        "committor": lambda: committor(dm, A, B),
        "passage": lambda: kinetics.mean_first_passage_time(dm, A),
        "doob": lambda: doob_transform(dm, np.exp(X[:, 0])),
        "carre du champ": lambda: carre_du_champ(dm, X[:, 0]),
        "operator": lambda: dm.operator(),
        "timescales": lambda: kinetics.implied_timescales(dm, [1]),
        "kernel": lambda: dm.kernel_to(X),
        "frames": lambda: slow_manifold(np.zeros((9, 2, 3)), **options),
        "alone": lambda: alone.transform(X),
    }
    words = refused(calls)
    words["read"] = np.array_equal(read.eigenvectors_, dm.eigenvectors_)
    words["own rows"] = np.array_equal(alone.transform(), dm.transform())
    none = dm.transform(X[: 5 * rank])  # a process may have no new points
    words["new"] = list(none.shape)
    return words


def test_what_split_points_cannot_do_is_refused_by_all():
    zero, one = on_ranks(2, misuse)
    starts = {
        "beta": "`X.dtype, its columns and the parameters` must be the same",
        "columns": "`X.dtype, its columns and the parameters` must be the same",
        "dtype": "`X.dtype, its columns and the parameters` must be the same",
        "group": "`group` must be given with shard_points=True",
        "flag": "`shard_points` must be True or False",
        "shard_points": "`shard_points` must be the same on every rank",
        "landmarks": "`landmarks` must be None with shard_points=True",
        "neighbors": "`shard_points` must be False with a sparse kernel",
        "half": "`precision` must not be 'half' with shard_points=True",
        "solver": "`solver` must be",
        "n_components": "`n_components` must be at most 702",
        "batches": "`X` must return batches (b, (3,)) of float64",
        "t": "`t and the map` must be the same on every rank",
        "V columns": "`V.ndim and its columns` must be the same",
        "frames": "`shard_points` must be False for frames",
        "alone": "`group` must be the 2 processes that hold the points, got no group",
    }
    whole = ("committor", "passage", "doob", "carre du champ", "operator", "timescales", "kernel")
    for name in whole:
        starts[name] = "`dm` must hold all points here, got the points of one process"
    for name, start in starts.items():
        for words in (zero, one):
            assert words[name].startswith(start), (name, words[name])
    for name in ("nan", "no rows", "no batches", "V", "new points"):
        assert "rank 1 has refused its input" in zero[name], (name, zero[name])
    assert zero["fails"] == "rank 1 has refused its input: MemoryError: no memory left"
    assert "MemoryError" in one["fails"]
    for rank, words in enumerate((zero, one)):
        assert words["read"] and words["own rows"] and words["new"] == [5 * rank, 3]


def test_a_group_of_one_has_all_points():
    X = job.points(600)
    alone = DiffusionMap(8.0, n_components=3).fit(X)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dm = DiffusionMap(8.0, n_components=3, group="world", shard_points=True).fit(X)
        new = dm.transform(X[:7] + 0.01)
    finally:
        dist.destroy_process_group()
    for found, exact in (
        (dm.eigenvalues_, alone.eigenvalues_),
        (dm.transform(), alone.transform()),
        (new, alone.transform(X[:7] + 0.01)),
    ):
        assert_close(torch.from_numpy(found).float(), torch.from_numpy(exact).float(), "gradient")
