"""One process of a job that tests start: python rank.py MODE FOLDER, alone or under torchrun."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from flashdiffusion import (
    DiffusionMap,
    FlashDiffusion,
    carre_du_champ,
    committor,
    doob_transform,
    kinetics,
    metric_tensor,
    slow_manifold,
)
from flashdiffusion._operator import Kernel


def points(N, dtype=np.float64, shift=0.0):
    rng = np.random.default_rng(0)
    t = 1.5 * np.pi * (1.0 + 2.0 * rng.random(N))
    roll = np.stack((t * np.cos(t), 21.0 * rng.random(N), t * np.sin(t)), 1) + shift
    return (roll / 10.0).astype(dtype)


def everything(group):
    """What several processes must find like one: name -> array."""
    X, Y = points(700), points(300, shift=1.0)
    V = np.random.default_rng(1).standard_normal((700, 3))
    found = {
        "symmetric": FlashDiffusion(X, X, V, 3.0, tile=128, group=group),
        "doob": FlashDiffusion(X, X, V, 3.0, h=1.0 + X[:, 1] ** 2, tile=128, group=group),
        "rows": FlashDiffusion(Y, X, V, 3.0, tile=128, group=group),
        "single": FlashDiffusion(Y, X, V.astype(X.dtype)[:, 0], 3.0, 0.0, group=group),
        "dot": FlashDiffusion(X, X, V, 0.3, score_mod="dot", normalize="symmetric", group=group),
        "none": FlashDiffusion(X, X, V, 3.0, normalize="none", tile=64, group=group),
    }
    for name, parameters, X in (
        ("dense", {"beta": 8.0}, points(200)),
        ("krylov", {"beta": 8.0}, points(1300)),
        ("float32", {"beta": 8.0, "alpha": 1.0}, points(1300, np.float32)),
        ("self-tuning", {"beta": "self-tuning"}, points(700)),
        ("landmarks", {"landmarks": 600}, points(900)),
    ):
        dm = DiffusionMap(n_components=4, group=group, **parameters).fit(X)
        for part in ("eigenvalues_", "eigenvectors_", "stationary_", "density_"):
            found[f"{name} {part}"] = getattr(dm, part)
        if name == "krylov":
            found["transform"] = dm.transform(X[:9] + 0.01)
            found["markov"] = dm.markov(X)
            found["committor"] = committor(dm, X[:, 0] < -0.8, X[:, 0] > 0.9)
            found["tilted"] = doob_transform(dm, np.exp(X[:, 1])).eigenvalues_
    return found


def results(folder, group, rank):
    for run in range(2):
        np.savez(folder / f"run{run}-rank{rank}.npz", **everything(group))


def rough(folder, group, rank):
    """A first solve in half precision: where Triton runs, or its interpreter."""
    X = points(200, np.float32) / 2.0
    dm = DiffusionMap(3.0, n_components=4, solver="krylov", precision="half", group=group).fit(X)
    np.savez(
        folder / f"rough-{rank}.npz",
        values=dm.eigenvalues_,
        vectors=dm.eigenvectors_,
        passes=[dm.n_passes_, dm.n_half_passes_],
    )


def after(passes, act):
    """Let `act` happen in this process at its sweep number `passes`."""
    matvec, count = Kernel.matvec, [0]

    def counted(self, V, **options):
        count[0] += 1
        if count[0] == passes:
            act()
        return matvec(self, V, **options)

    Kernel.matvec = counted


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise MemoryError("this rank has had enough")


def dies(folder, group, rank):
    if rank == 1:
        after(5, fail)
    DiffusionMap(8.0, n_components=4, group=group).fit(points(700))
    (folder / f"looks-whole-{rank}").touch()


def refuses(folder, group, rank):
    X = points(700)
    lines = []
    for change in (np.nan, 1.0):
        mine = X.copy()
        if rank == 1:
            mine[3, 0] = change
        for call in (
            lambda x: DiffusionMap(8.0, n_components=4, group=group).fit(x),
            lambda x: FlashDiffusion(x, x, X, group=group),
        ):
            try:
                call(mine)
            except ValueError as error:
                lines.append(str(error))
    try:
        kept = folder / "kept" if rank == 1 else None
        DiffusionMap(8.0, n_components=4, group=group, checkpoint=kept).fit(X)
    except ValueError as error:
        lines.append(str(error))
    try:
        DiffusionMap(1e3, n_components=4, precision="half", group=group).fit(X)
    except NotImplementedError as error:
        lines.append(str(error).replace("\n", " "))
    (folder / f"said-{rank}.txt").write_text("\n".join(line.splitlines()[0] for line in lines))


def arguments(folder, group, rank):
    """What a group map is asked for must be the same on every rank, and legal on every rank."""
    X = points(300)
    dm = DiffusionMap(8.0, n_components=3, group=group).fit(X)
    other = X[:, 0] + rank
    A, B = X[:, 0] < -0.8, X[:, 0] > 0.9
    bad = np.full(300, np.nan) if rank else X[:, 1]
    frames = np.random.default_rng(3).standard_normal((90, 4, 3))
    longer = frames[: 90 - 5 * rank]
    options = {"n_components": 2, "beta": "median", "group": group}
    calls = [
        lambda: committor(dm, A if rank else X[:, 0] < -0.7, B),
        lambda: committor(dm, A, B, tol=1e-8 if rank else 1e-7),
        lambda: committor(dm, A, B, max_iter=1000 + rank),
        lambda: committor(dm, A, A if rank else B),
        lambda: kinetics.mean_first_passage_time(dm, A if rank else B),
        lambda: kinetics.mean_first_passage_time(dm, A, tol=1e-8 if rank else 1e-7),
        lambda: kinetics.mean_first_passage_time(dm, A[: 300 - rank]),
        lambda: kinetics.reactive_flux(dm, A, A if rank else B),
        lambda: dm.markov(other),
        lambda: dm.markov(bad[: 300 - rank]),
        lambda: doob_transform(dm, np.exp(other)),
        lambda: doob_transform(dm, np.exp(bad)),
        lambda: carre_du_champ(dm, other),
        lambda: carre_du_champ(dm, X[:, 0], bad),
        lambda: metric_tensor(dm, np.stack((X[:, 0], other), 1)),
        lambda: slow_manifold(longer, **options),
        lambda: slow_manifold(longer, landmarks=30, **options),
        lambda: slow_manifold(lambda: iter(longer), landmarks=30, **options),
        lambda: slow_manifold(frames * (1 if rank else np.nan), landmarks=30, **options),
        lambda: slow_manifold(frames, lag=1 + rank, **options),
        lambda: slow_manifold(frames, frame_weights=np.exp(frames[:, 0, 0] + rank), **options),
    ]
    lines = []
    for number, call in enumerate(calls):
        try:
            call()
            lines.append(f"{number} not refused")
        except ValueError as error:
            lines.append(str(error).splitlines()[0])
    # after all this they still agree
    found = slow_manifold(frames, landmarks=40, random_state=None, **options)
    lines.append(repr(found.eigenvalues_.tolist()) + repr(found.landmarks_.tolist()))
    lines.append(repr(committor(dm, A, B).tolist()))
    (folder / f"said-{rank}.txt").write_text("\n".join(lines))


def resumes(folder, group, rank):
    """Killed at the sweep in KILL_AT, if any; what it multiplied goes into the file too."""
    count = [0]
    if "KILL_AT" in os.environ and rank == int(os.environ.get("KILL_RANK", 0)):
        after(int(os.environ["KILL_AT"]), kill)
    else:
        after(-1, fail)
        matvec = Kernel.matvec

        def counted(self, V, **options):
            count[0] += 1
            return matvec(self, V, **options)

        Kernel.matvec = counted
    checkpoint = folder / "checkpoint" if "CHECKPOINT" in os.environ else None
    dm = DiffusionMap(8.0, n_components=4, group=group, checkpoint=checkpoint).fit(points(1300))
    np.savez(
        folder / f"{os.environ['NAME']}-{rank}.npz",
        values=dm.eigenvalues_,
        vectors=dm.eigenvectors_,
        sweeps=count[0],
        passes=dm.n_passes_,
    )


def run(mode, folder, rank=None, size=1, environment=None):
    """The process' whole life; under torchrun, rank and size come from the environment."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    group = None
    if rank is not None:
        store = f"file://{folder}/store-{os.environ.get('NAME', mode)}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    elif "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    if rank is not None:
        group = "world"
    modes = {f.__name__: f for f in (results, rough, dies, refuses, arguments, resumes)}
    modes[mode](Path(folder), group, rank or 0)
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(*sys.argv[1:])
