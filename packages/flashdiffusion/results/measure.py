"""Measure diffusion maps: python measure.py WHAT [N] [TOL], one JSON line on stdout.

WHAT is one of

- ours: DiffusionMap.fit; CPU seconds of the process.
- published: version 0.1.2 of the package of this name, which must come first on PYTHONPATH. Its own
  top-level import fails as its README has it, so the class is taken from flashdiffusion.dmap.
  TOL is the tolerance it gets; its own default is 0, machine precision.
- dense: the float32 matrix and scipy's eigsh.
- matvec: one product, r = 1 and 8, against KeOps (pykeops) and a matrix that is already built.
- floor: what the four torch calls of a tile (product, power, two products) take for all its tiles,
  with nothing around them: no product through torch can be faster.
- datafold: datafold 2.0.2, in an environment of its own (it wants scikit-learn 1.2).
- memory: peak resident memory during the fit, above what the process held before.
- threads: wall seconds of the fit and of one product, with OMP_NUM_THREADS as it is.
- large: N points, wall and CPU seconds, peak memory, passes and residuals.

All fit the same swiss roll in float32: 8 components, alpha = 1/2, beta = 20, tolerance 1e-6.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import sys
import time

import numpy as np

BETA, COMPONENTS, TOL = 20.0, 8, 1e-6


def swiss_roll(N):
    rng = np.random.default_rng(0)
    t = 1.5 * np.pi * (1 + 2 * rng.random(N))
    X = np.stack((t * np.cos(t), 21 * rng.random(N), t * np.sin(t)), 1)
    return ((X - X.mean(0)) / X.std()).astype(np.float32)


def versions(*names):
    found = {name: importlib.metadata.version(name) for name in names}
    found.update(python=platform.python_version(), date=time.strftime("%Y-%m-%d"))
    with contextlib.suppress(ImportError):
        from shared_kernels import native

        found["instructions"] = native.why_not() or native.instruction_set()
    return found


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def estimator():
    from flashdiffusion import DiffusionMap

    return DiffusionMap(beta=BETA, alpha=0.5, n_components=COMPONENTS, tol=TOL)


def ours(N):
    X = swiss_roll(N)
    estimator().fit(swiss_roll(1000))
    seconds = []
    for _ in range(3 if N <= 20_000 else 1):
        start = time.process_time()
        dm = estimator().fit(X)
        seconds.append(time.process_time() - start)
    return {
        "cpu_seconds": sorted(seconds)[len(seconds) // 2],
        "residual": float(dm.residuals_.max()),
        "passes": dm.n_passes_,
        "eigenvalues": dm.eigenvalues_.round(7).tolist(),
        **versions("torch", "numpy", "scipy", "scikit-learn"),
    }


def published(N):
    from flashdiffusion.dmap import DiffusionMap

    X = swiss_roll(N)
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        dm = DiffusionMap(beta=BETA, alpha=0.5, n_components=COMPONENTS + 1).fit(X)
        tol = float(sys.argv[3]) if len(sys.argv) > 3 else TOL
        dm.transform(tol=tol)
    return {
        "tol": tol,
        "cpu_seconds": time.process_time() - start,
        "eigenvalues": np.sort(dm.eigenvalues_)[::-1][1:].round(7).tolist(),
        **versions("torch", "numpy", "scipy"),
    }


def dense(N):
    import torch
    from scipy.sparse.linalg import eigsh

    x = torch.from_numpy(swiss_roll(N))
    before, start = peak_bytes(), time.process_time()
    # exp and products are many times slower below the normal numbers: nothing falls under e^-60
    K = torch.exp((-BETA * torch.cdist(x, x).square()).clamp_(min=-60.0))
    r = K.sum(1).rsqrt()
    K *= r[:, None] * r
    scale = K.sum(1).rsqrt()
    K *= scale[:, None] * scale
    values = eigsh(K.numpy(), k=COMPONENTS + 1, tol=TOL, v0=(1 / scale).numpy())[0]
    return {
        "cpu_seconds": time.process_time() - start,
        "extra_megabytes": (peak_bytes() - before) / 2**20,
        "eigenvalues": np.sort(values)[::-1][1:].round(7).tolist(),
        **versions("torch", "scipy"),
    }


def matvec(N):
    import torch
    from pykeops.torch import LazyTensor

    from flashdiffusion import FlashDiffusion

    torch.manual_seed(0)
    X = torch.randn(N, 3)
    K = torch.exp(-torch.cdist(X, X).square())
    result = {}
    for r in (1, 8):
        V = torch.randn(N, r)
        keops = (-((LazyTensor(X[:, None]) - LazyTensor(X[None])) ** 2).sum(-1)).exp()
        calls = {
            "ours": lambda V=V: FlashDiffusion(X, X, V, beta=1.0, normalize="none"),
            "keops": lambda V=V, keops=keops: keops @ V,
            "built": lambda V=V: K @ V,
        }
        exact = K.double() @ V.double()
        seconds = {name: [] for name in calls}
        for name, call in calls.items():
            error = float((call().double() - exact).abs().max() / exact.abs().max())
            result[f"r{r}_{name}_error"] = error
        for _ in range(7):
            for name, call in calls.items():
                start = time.process_time()
                call()
                seconds[name].append(time.process_time() - start)
        for name, values in seconds.items():
            result[f"r{r}_{name}_cpu_seconds"] = sorted(values)[3]
    return {**result, **versions("torch", "pykeops")}


def floor(N, tile=384):
    import torch

    a, b, s = torch.randn(tile, 5), torch.randn(5, tile), torch.empty(tile, tile)
    result, calls = {}, 100
    for r in (1, 8):
        v, out = (torch.randn(r, tile), torch.zeros(r, tile)) if r > 1 else torch.zeros(2, tile)
        seconds: dict[str, list[float]] = {"power": [], "all": []}
        for _ in range(9):
            start = time.process_time()
            for _ in range(calls):
                s.exp2_()
            seconds["power"].append(time.process_time() - start)
            start = time.process_time()
            for _ in range(calls):
                torch.mm(a, b, out=s)
                s.exp2_()
                if r == 1:
                    out.addmv_(s, v)
                    out.addmv_(s.t(), v)
                else:
                    out.addmm_(v, s.t())
                    out.addmm_(v, s)
            seconds["all"].append(time.process_time() - start)
            out.zero_()
        share = N * (N + 1) / 2 / (calls * tile * tile)
        for name, values in seconds.items():
            result[f"r{r}_{name}_cpu_seconds"] = sorted(values)[4] * share
    return {**result, **versions("torch")}


def datafold(N):
    from datafold.dynfold import DiffusionMaps
    from datafold.pcfold import GaussianKernel

    X = swiss_roll(N).astype(np.float64)
    before, start = peak_bytes(), time.process_time()
    # exp(-d^2 / (2 epsilon)), dense
    dm = DiffusionMaps(
        GaussianKernel(epsilon=1 / (2 * BETA)), n_eigenpairs=COMPONENTS + 1, alpha=0.5
    ).fit(X)
    return {
        "cpu_seconds": time.process_time() - start,
        "extra_megabytes": (peak_bytes() - before) / 2**20,
        "eigenvalues": np.sort(np.asarray(dm.eigenvalues_))[::-1][1:].round(7).tolist(),
        **versions("datafold", "scikit-learn", "numpy", "scipy"),
    }


def memory(N):
    X = swiss_roll(N)
    # what torch and scipy load once
    estimator().fit(swiss_roll(600))
    before = peak_bytes()
    estimator().fit(X)
    return {"extra_megabytes": (peak_bytes() - before) / 2**20, **versions("torch")}


def threads(N):
    import torch

    from flashdiffusion import FlashDiffusion

    X = torch.from_numpy(swiss_roll(N))
    V = torch.ones(N, 8)
    result = {"threads": torch.get_num_threads()}
    calls = {
        "product": lambda: FlashDiffusion(X, X, V, beta=BETA, normalize="none"),
        "fit": lambda: estimator().fit(X),
    }
    for name, call in calls.items():
        call()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        result[f"{name}_wall_seconds"] = sorted(seconds)[2]
    return {**result, **versions("torch")}


def large(N):
    import torch

    X = swiss_roll(N)
    estimator().fit(swiss_roll(1000))
    before, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    dm = estimator().fit(X)
    return {
        "threads": torch.get_num_threads(),
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "extra_megabytes": (peak_bytes() - before) / 2**20,
        "passes": dm.n_passes_,
        "residual": float(dm.residuals_.max()),
        "converged": bool(dm.converged_),
        "eigenvalues": dm.eigenvalues_.round(7).tolist(),
        **versions("torch", "numpy"),
    }


if __name__ == "__main__":
    LOAD = os.getloadavg()[0]
    what, N = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5000
    known = {
        "ours": ours,
        "published": published,
        "dense": dense,
        "matvec": matvec,
        "floor": floor,
        "datafold": datafold,
        "memory": memory,
        "threads": threads,
        "large": large,
    }
    measured = {"load_before": LOAD, **known[what](N)}
    sys.stdout.write(json.dumps({"what": what, "N": N, **measured}) + "\n")
