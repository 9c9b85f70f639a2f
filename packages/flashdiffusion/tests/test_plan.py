import time

import numpy as np
import pytest
import torch

from flashdiffusion import DiffusionMap, plan
from flashdiffusion._problem import Problem
from flashdiffusion._tiles import Tiles
from shared_kernels.testing import measure_memory

from .cases import swiss_roll

MODEL = 1e-3  # what the model adds to a sweep beside its entries
SOLVE = 0.2  # the share of a fit that is not sweeps


@pytest.mark.system
def test_the_prediction_is_of_the_right_size():
    N = 3000
    X = swiss_roll(N)[0].astype(np.float32) / 10.0

    def ratio():
        # predicted and taken in turn: other work on the machine slows both
        predicted = plan(N, 3, points=X, beta=3.0)
        start = time.perf_counter()
        dm = DiffusionMap(3.0).fit(X)
        return predicted, (time.perf_counter() - start) / predicted.seconds, dm

    found = [ratio() for _ in range(3)]
    predicted, _, dm = found[0]
    # the result file holds the factor two; a test shares its machine
    assert 0.25 < np.median([r for _, r, _ in found]) < 4.0
    assert 0.5 < predicted.sweeps / (dm.n_passes_ - 3) < 2.0
    memory = measure_memory(lambda: DiffusionMap(3.0).fit(X)).peak
    assert 0.5 < predicted.bytes / memory < 2.0
    assert f"{predicted.sweeps} sweeps" in str(predicted)


@pytest.mark.thorough
def test_the_model_scales_as_it_says():
    small = plan(10**5, 3, entries_per_second=1e9, sweeps=10)
    assert small.sweep_seconds == pytest.approx(5.0, rel=MODEL)
    assert small.seconds == pytest.approx(13 * 5.0, rel=SOLVE)
    large = plan(10**6, 3, entries_per_second=1e9, sweeps=10)
    assert large.sweep_seconds == pytest.approx(100 * small.sweep_seconds, rel=MODEL)
    # memory is linear
    assert large.bytes < 12 * small.bytes
    shared = plan(10**6, 3, entries_per_second=1e9, sweeps=10, world_size=8, network=1e30)
    assert shared.sweep_seconds == pytest.approx(large.sweep_seconds / 8, rel=MODEL)
    assert shared.basis_bytes == large.basis_bytes / 8
    slow = plan(10**6, 3, entries_per_second=1e9, sweeps=10, world_size=8, network=1e6)
    # 8 pairs are solved with blocks of 12 columns
    assert slow.sweep_seconds - shared.sweep_seconds == pytest.approx(12 * 10**6 * 12 / 1e6)
    skipped = plan(10**6, 3, entries_per_second=1e9, sweeps=10, fraction=0.1)
    assert skipped.sweep_seconds == pytest.approx(0.1 * large.sweep_seconds, rel=MODEL)


@pytest.mark.system
def test_split_points_need_their_share_of_memory():
    options = {"entries_per_second": 1e9, "sweeps": 10, "world_size": 8}
    whole, split = (plan(10**7, 50, shard_points=s, **options) for s in (False, True))
    assert split.bytes < 0.2 * whole.bytes and split.basis_bytes == whole.basis_bytes
    more = plan(10**7, 50, shard_points=True, **{**options, "world_size": 64})
    assert more.bytes < 0.2 * split.bytes
    # both halves of the matrix
    fast = [plan(10**7, 50, shard_points=s, network=1e30, **options) for s in (False, True)]
    assert fast[1].sweep_seconds == pytest.approx(2 * fast[0].sweep_seconds, rel=MODEL)
    assert split.sweep_seconds - fast[1].sweep_seconds == pytest.approx(4 * 10**7 * 62 / 1e9)


def test_tiles_that_do_not_see_each_other_are_counted_on_a_sample():
    X = swiss_roll(20_000)[0].astype(np.float32) / 6.0

    def entries(beta, **kwargs):
        given = plan(len(X), 3, points=X, beta=beta, sweeps=10, entries_per_second=1e9, **kwargs)
        return given.sweep_seconds * 1e9 / (len(X) ** 2 / 2)

    assert entries(0.5) == pytest.approx(1.0, rel=MODEL)
    assert entries(20.0, fraction=0.5) == pytest.approx(0.5, rel=MODEL)
    problem = Problem(torch.from_numpy(X), None, 20.0)
    whole = Tiles(problem, None, problem.negligible)
    assert 0.8 < entries(20.0) / (whole.plan() != 0).mean() < 1.25


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"N": 0}, "`N`"),
        ({"k": 100}, "`k` must be at most 99"),
        ({"fraction": 0.0}, "`fraction` must be in"),
        ({"world_size": 0}, "`world_size`"),
        ({"entries_per_second": -1.0}, "`entries_per_second`"),
        ({"points": np.zeros((20, 2))}, "`points` must have shape"),
    ],
)
def test_errors(kwargs, words):
    with pytest.raises(ValueError, match=words):
        plan(**{"N": 100, "d": 2, "entries_per_second": 1e9, **kwargs})
