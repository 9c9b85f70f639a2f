"""Several processes find what one finds, stop when one dies, and go on where they were killed."""

import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.base import clone

from flashdiffusion import DiffusionMap, FlashDiffusion
from flashdiffusion._checkpoint import Checkpoint
from shared_kernels.testing import assert_close

from . import rank
from .cases import SOLVED

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()),
        reason="needs torch.distributed, gloo",
    ),
    pytest.mark.system,
]
# No job of these takes a tenth of it: a hang is what it would be.
LIMIT = 120


def torchrun(mode, folder, size):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={size}", rank.__file__, mode, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=LIMIT,
        capture_output=True,
        text=True,
        check=False,
    )


def job(mode, folder, size, **environment):
    """The same processes without torchrun's start: exit codes. size 0 is a process alone."""
    # forked where that exists: seconds of imports saved
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    processes = [
        context.Process(
            target=rank.run, args=(mode, str(folder), r if size else None, size, environment)
        )
        for r in range(max(1, size))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode is not None, "it hangs"
    return [process.exitcode for process in processes]


def loaded(path):
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_several_find_what_one_finds(size, tmp_path):
    assert job("results", tmp_path, size) == [0] * size
    one = rank.everything(None)
    found = loaded(tmp_path / "run0-rank0.npz")
    assert found.keys() == one.keys()
    for name, exact in one.items():
        # sums of float32 in another order: the rule of float32, whatever the result's own dtype
        as_float32 = [torch.from_numpy(np.asarray(a)).float() for a in (found[name], exact)]
        kind = "gradient" if "eigenvectors" in name or name == "transform" else "forward"
        assert_close(*as_float32, kind)
        assert found[name].dtype == exact.dtype
    # the same bits on every rank, and each time
    for run in range(2):
        for other in range(size):
            again = loaded(tmp_path / f"run{run}-rank{other}.npz")
            for name in one:
                np.testing.assert_array_equal(again[name], found[name], name)


@pytest.mark.thorough  # torchrun; what the ranks themselves do is the next test
def test_a_rank_that_dies_ends_the_job(tmp_path):
    before = time.monotonic()
    died = torchrun("dies", tmp_path, 2)
    assert died.returncode != 0 and time.monotonic() - before < LIMIT / 2
    assert "this rank has had enough" in died.stderr
    assert not list(tmp_path.glob("looks-whole*"))


def test_a_rank_that_dies_stops_the_others_without_torchrun(tmp_path, capfd):
    assert 0 not in job("dies", tmp_path, 2)
    output = capfd.readouterr().err
    assert "this rank has had enough" in output and "rank 0 of 2: another rank has died" in output
    assert not list(tmp_path.glob("looks-whole*"))


def test_what_one_rank_refuses_all_refuse(tmp_path):
    assert job("refuses", tmp_path, 2) == [0, 0]
    zero, one = ((tmp_path / f"said-{r}.txt").read_text().splitlines() for r in (0, 1))
    assert zero[0].startswith("rank 1 has refused its input: ValueError: Input X contains NaN")
    assert zero[1].startswith("rank 1 has refused its input: ValueError: `Q` must be finite")
    assert "NaN" in one[0] and one[1].startswith("`Q` must be finite")
    for line in (zero[2], one[2]):
        assert line.startswith("`X` must be the same on every rank")
    for line in (zero[3], one[3]):
        assert line.startswith("`Q` must be the same on every rank")
    for line in (zero[4], one[4]):
        assert line.startswith("`checkpoint` must be the same on every rank")
    assert "half precision" in zero[5] and zero[5] == one[5]


def test_arguments_that_differ_are_refused_by_all(tmp_path):
    assert job("arguments", tmp_path, 2) == [0, 0]
    zero, one = ((tmp_path / f"said-{r}.txt").read_text().splitlines() for r in (0, 1))
    names = (
        "A tol tol rank B tol rank rank V rank h rank f rank F X trajectory trajectory rank lag "
        "frame_weights"
    ).split()
    assert len(zero) == len(one) == len(names) + 2
    for name, *lines in zip(names, zero, one, strict=False):
        for line in lines:
            if name == "rank":
                continue
            assert line.startswith(f"`{name}` must be the same on every rank"), line
        if name == "rank":
            assert sum("has refused its input" in line for line in lines) == 1, lines
            assert not any("not refused" in line for line in lines)
    assert zero[-2:] == one[-2:]


@pytest.mark.parametrize(("size", "victim"), [(0, 0), (2, 1)])
def test_a_killed_run_resumes(size, victim, tmp_path):
    def run(name, **environment):
        return job("resumes", tmp_path, size, NAME=name, **environment)

    assert set(run("whole")) == {0}
    passes = int(loaded(tmp_path / "whole-0.npz")["sweeps"])
    # the last sweep measures the residuals: killed before it, and in the middle
    for at in (passes, passes // 2 + 1):
        name = f"killed-at-{at}"
        dead = run(name, CHECKPOINT="1", KILL_AT=str(at), KILL_RANK=str(victim))
        assert dead[victim] == -signal.SIGKILL and 0 not in dead
        assert not list(tmp_path.glob(f"{name}*.npz"))
        assert list((tmp_path / "checkpoint").rglob("state-*.pt"))
        assert set(run(f"resumed-{at}", CHECKPOINT="1")) == {0}
        exact, found = (loaded(tmp_path / f"{n}-0.npz") for n in ("whole", f"resumed-{at}"))
        np.testing.assert_array_equal(found["values"], exact["values"])
        np.testing.assert_array_equal(found["vectors"], exact["vectors"])
        assert found["passes"] == exact["passes"]
        # a sweep that only one of two processes had finished is done again
        assert found["sweeps"] <= passes - at + (2 if size else 1)
        assert not (tmp_path / "checkpoint").exists()


class Stop(Exception):  # noqa: N818 - it is no error
    pass


def save_and_stop(self, *state, save=Checkpoint.save):
    save(self, *state)
    raise Stop


@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_every_sweep_can_be_the_last(precision, tmp_path, monkeypatch):
    """Stopped after each sweep in turn, with restarts and a final float64 stage: the same bits."""
    from flashdiffusion import _solve

    monkeypatch.setattr(_solve, "_BASIS_BYTES", 1)
    parameters = {"n_components": 4, "tol": 1e-9, "precision": precision}
    X = rank.points(600)
    exact = DiffusionMap(8.0, **parameters).fit(X)
    assert exact.n_passes_ > 10
    dm = DiffusionMap(8.0, checkpoint=tmp_path / "c", **parameters)
    from flashdiffusion._operator import Kernel

    matvec = Kernel.matvec

    def stop(self, V, **options):
        if done[0] == 1:
            raise Stop
        done[0] += 1
        return matvec(self, V, **options)

    for start_again in range(200):
        # two sweeps sum rows before the first file is written
        done = [-1 if start_again == 0 else 0]
        monkeypatch.setattr(Kernel, "matvec", stop)
        try:
            dm.fit(X)
            break
        except Stop:
            states = list((tmp_path / "c").rglob("state-*.pt"))
            assert len(states) == min(2, start_again)
    assert start_again > 10
    np.testing.assert_array_equal(dm.eigenvalues_, exact.eigenvalues_)
    np.testing.assert_array_equal(dm.eigenvectors_, exact.eigenvectors_)


def test_a_checkpoint_of_something_else_is_refused(tmp_path, monkeypatch):
    X = rank.points(600)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_stop)
        with pytest.raises(Stop):
            DiffusionMap(8.0, n_components=4, checkpoint=tmp_path).fit(X)
    with pytest.raises(ValueError, match="`checkpoint` must belong to these points"):
        DiffusionMap(8.0, n_components=3, checkpoint=tmp_path).fit(X)
    with pytest.raises(ValueError, match="`checkpoint` must belong to these points"):
        DiffusionMap(8.0, n_components=4, checkpoint=tmp_path).fit(X + 1e-3)
    (state,) = tmp_path.rglob("state-*.pt")
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"`checkpoint` must be readable, got state-1-00001\.pt"
    ) as output:
        DiffusionMap(8.0, n_components=4, checkpoint=tmp_path).fit(X)
    assert "weights_only" not in str(output.value) and output.value.__suppress_context__
    state.write_bytes(whole)
    (tmp_path / "rank-0-of-1").rename(tmp_path / "rank-0-of-2")
    with pytest.raises(ValueError, match=r"written by 1 process\(es\), got a folder rank-0-of-2"):
        DiffusionMap(8.0, n_components=4, checkpoint=tmp_path).fit(X)


@pytest.mark.parametrize("beta", ["bgh", "median", "self-tuning", 8])
def test_a_fit_goes_on_with_what_it_has_chosen(beta, tmp_path, monkeypatch):
    """Another random_state chooses another beta from a sample; a number is what it is worth."""
    from flashdiffusion import utils

    rule = utils.bgh_bandwidth, utils.median_bandwidth
    for function in rule:
        small = functools.partial(function, n_sample=300)
        monkeypatch.setattr(utils, function.__name__, small)
    X = rank.points(700)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_stop)
        with pytest.raises(Stop):
            DiffusionMap(beta, n_components=4, checkpoint=tmp_path, random_state=0).fit(X)
    if beta in ("bgh", "median"):
        with pytest.raises(ValueError, match="`checkpoint` must belong to these points"):
            DiffusionMap(beta, n_components=4, checkpoint=tmp_path, random_state=1).fit(X)
    same = np.float64(beta) if beta == 8 else beta
    other = {"n_components": np.int64(4), "alpha": np.float32(0.5), "checkpoint": tmp_path}
    dm = DiffusionMap(same, random_state=0 if beta in ("bgh", "median") else 1, **other).fit(X)
    exact = DiffusionMap(beta, n_components=4, random_state=0).fit(X)
    assert dm.converged_
    np.testing.assert_array_equal(dm.eigenvalues_, exact.eigenvalues_)


def test_a_checkpoint_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`checkpoint` must be a folder, got a file file"):
        DiffusionMap(8.0, n_components=4, checkpoint=tmp_path / "file").fit(rank.points(600))


def test_a_group_that_does_not_exist():
    X = rank.points(50)
    for call in (
        lambda group: DiffusionMap(1.0, n_components=2, group=group).fit(X),
        lambda group: FlashDiffusion(X, X, X, group=group),
    ):
        with pytest.raises(ValueError, match="`group` must be None without torch.distributed"):
            call("world")
    with pytest.raises(ValueError, match="`solver` must be 'auto', 'krylov' or 'dense' with"):
        DiffusionMap(1.0, n_components=2, solver="lanczos", checkpoint="x").fit(X)


def test_a_group_of_one(tmp_path):
    X = rank.points(600)
    alone = DiffusionMap(8.0, n_components=3).fit(X)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        dm = DiffusionMap(8.0, n_components=3, group="world")
        given = clone(dm).fit(X)
        np.testing.assert_array_equal(given.density_, alone.density_)
        np.testing.assert_allclose(given.eigenvalues_, alone.eigenvalues_, rtol=SOLVED)
        kept = pickle.loads(pickle.dumps(given))
        with pytest.raises(ValueError, match="`group` must be one of"):
            dm.set_params(group="everyone").fit(X)
        with pytest.raises(TypeError, match="`group` must be None, 'world' or a ProcessGroup"):
            dm.set_params(group=3).fit(X)
        with pytest.raises(ValueError, match="`group` must be None with backend='reference'"):
            FlashDiffusion(X, X, X, group="world", backend="reference")
    finally:
        dist.destroy_process_group()
    # a map outlives the processes that made it
    assert kept.group is None and kept.transform(X[:5]).shape == (5, 3)
