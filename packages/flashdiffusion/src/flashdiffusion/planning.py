"""What a diffusion map will take, before it is started: time and memory from a stated model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared_kernels import checks

from . import _checks
from ._operator import Kernel
from ._problem import Problem
from ._ring import PANEL
from ._tiles import SKIP, Tiles
from .dmap import DiffusionMap

# Sweeps to 1e-6: 7 to 28 in our runs; their geometric mean is within a factor two of both.
SWEEPS = 14
# float64 work on a basis: points the probe multiplies, and columns.
_PROBE_POINTS = 8192
_SAMPLE = 2000
_PROBE_SECONDS = 0.4


@dataclass(frozen=True)
class Plan:
    """Time and memory of one process among world_size, and what they are made of.

    Attributes:
        seconds: of the whole fit.
        sweep_seconds: of one sweep over the kernel.
        algebra_seconds: of the orthogonalisation, all sweeps together.
        sweeps: the number assumed.
        bytes: most memory at once beyond the interpreter and the given X.
        basis_bytes: the Krylov basis' share of it.
        entries_per_second: kernel entries that one process handles in a second.
        world_size: processes.
    """

    seconds: float
    sweep_seconds: float
    algebra_seconds: float
    sweeps: int
    bytes: int
    basis_bytes: int
    entries_per_second: float
    world_size: int

    def __str__(self) -> str:
        return (
            f"{self.seconds:.3g} s = {self.sweeps} sweeps of {self.sweep_seconds:.3g} s and "
            f"{self.algebra_seconds:.3g} s of algebra; {self.bytes / 2**20:.0f} MB in each of "
            f"{self.world_size} process(es), {self.basis_bytes / 2**20:.0f} MB of it the basis"
        )


def plan(
    N: int,
    d: int,
    r: int | None = None,
    k: int = 8,
    device: Any = None,
    world_size: int = 1,
    *,
    sweeps: int | None = None,
    points: Any = None,
    beta: float | None = None,
    fraction: float | None = None,
    entries_per_second: float | None = None,
    network: float = 1e9,
    shard_points: bool = False,
) -> Plan:
    """Predict DiffusionMap.fit on N float32 points of d dimensions before running it.

    seconds = (sweeps + 3) (fraction N^2 / 2 / entries_per_second / world_size + exchange) +
    algebra, with exchange = 12 N r bytes / network (world_size > 1), and algebra = the float64
    products of a growing basis of m columns with r new ones, 6 m r N / world_size flops each. The
    two rates are measured here and now, by a short sweep and a short product on the device, unless
    they are given.
    bytes = augmented points, vectors of a sweep, the basis' share of rows, tiles.

    With shard_points each process needs its N / world_size rows of all of these, and three panels
    of points. It then multiplies both halves of the matrix, fraction N^2 / world_size entries of a
    sweep, and receives all points and vectors: exchange = 4 N (d + r) bytes / network, as if
    nothing of it were hidden behind the products.

    The number of sweeps depends on the spectrum: 7 to 28 in our runs to 1e-6. With `points`, the
    solver counts them on a sample: the spectrum of the operator hardly depends on N. The share of
    tile pairs that see each other is counted there too, on tiles as large as N's. Restarts, which a
    small basis forces on a large N, come on top.

    Args:
        N: points.
        d: dimensions.
        r: columns of a sweep; None is what DiffusionMap takes, max(k + 4, 6).
        k: eigenpairs.
        device: torch device; None is the CPU with torch.get_num_threads() threads per process.
        world_size: processes that share the work (`group`), each with a machine as this one.
        sweeps: of the solver; None counts them on `points`, or assumes 14.
        points: (n, d) some of the points, at most 2000 of which are used, with their `beta`.
        beta: as for DiffusionMap, a number; None takes its rule.
        fraction: of the tile pairs that are not skipped, below 1 for small bandwidths in few
            dimensions; None counts it on `points`, or assumes 1.
        entries_per_second: of a process, for another machine than this; None measures.
        network: bytes per second between processes.
        shard_points: as of DiffusionMap.

    Returns:
        Plan.

    Example:
        >>> there = plan(10**7, 3, k=8, world_size=64, entries_per_second=1e12)
        >>> there.sweep_seconds < 3.0, there.bytes < 8e9
        (True, True)
        >>> split = plan(
        ...     10**7, 50, world_size=64, entries_per_second=1e12, shard_points=True
        ... )
        >>> split.bytes < 1e9
        True
    """
    for name, value in (("N", N), ("d", d), ("k", k), ("world_size", world_size)):
        checks.positive_int(name, value)
    if points is not None and None in (sweeps, fraction):
        counted = _counted(points, beta, k, N)
    else:
        counted = SWEEPS, 1.0
    sweeps = counted[0] if sweeps is None else sweeps
    fraction = counted[1] if fraction is None else fraction
    checks.positive_int("sweeps", sweeps)
    if N <= k + 1:
        checks.fail("k", f"be at most {N - 1}, points minus one", k)
    if not 0.0 < fraction <= 1.0:
        checks.fail("fraction", "be in (0, 1]", fraction)
    network = _checks.positive("network", network)
    r = (max(k + 4, 6) if k < 30 else 32) if r is None else r
    checks.positive_int("r", r)
    on = torch.device("cpu" if device is None else device)
    if entries_per_second is None:
        rate = _measured_entries(d, r, on)
    else:
        rate = _checks.positive("entries_per_second", entries_per_second)
    flops = _measured_flops(r, on)
    exchange = (4.0 * N * (d + r) if shard_points else 12.0 * N * r) / network
    entries = fraction * (N * float(N) if shard_points else N * (N + 1) / 2)
    sweep = entries / rate / world_size + (exchange if world_size > 1 else 0.0)
    # the basis as in DiffusionMap: 96 MB, at least three times the wanted pairs and a block
    columns = min(400, max(3 * (k + r), 96 * 2**20 // (8 * N)))
    reached = [min((i + 1) * r, columns) for i in range(sweeps)]
    algebra = sum(6.0 * m * r * N / world_size / flops for m in reached)
    rows = -(-N // world_size)
    basis = 8 * (columns + r) * rows
    # points in float64 while they are prepared, two augmented copies, V and K V with their pieces
    held = N * (16 * d + 8 * (d + 2)) + N * r * (8 * 4 + 4 * 3) + 8 * 8 * N
    if shard_points:
        # own points and their float64 copies while they are ordered; panels, one of them prepared
        held = rows * (4 * d + 16 * d) + rows * r * (8 * 4 + 4 * 3) + 8 * 8 * rows
        panel = min(PANEL, rows)
        held += panel * (3 * 4 * (d + r) + 2 * (4 * 8 * d + 8 * r))
    tiles = 4 * 384 * 384 * 2 * torch.get_num_threads()
    # what a step of the solver makes of it: the vectors of the result, residuals, a restart's copy
    bytes_ = int(held + basis + 8 * rows * 6 * r + tiles)
    return Plan(
        (sweeps + 3) * sweep + algebra, sweep, algebra, sweeps, bytes_, basis, rate, world_size
    )


def _counted(points: Any, beta: float | None, k: int, N: int) -> tuple[int, float]:
    """(sweeps, share of the entries that are not skipped) of a sample, as if it were N points."""
    rows = _checks.as_tensor("points", points)
    if rows.dim() != 2 or rows.shape[0] <= 5 * (k + 1):
        shape = tuple(rows.shape)
        checks.fail("points", f"have shape (n, d) with n > {5 * (k + 1)}", shape)
    rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).long()].float()
    dm = DiffusionMap("bgh" if beta is None else beta, n_components=k, solver="krylov").fit(rows)
    n = len(rows)
    tile = max(8, 256 * n // max(n, N))
    problem = Problem(rows, None, dm.beta_)
    tiles = Tiles(problem, tile, problem.negligible * n / N)
    size = np.array([len(t) for t in tiles.a_tiles])
    seen = np.triu(np.outer(size, size) * (tiles.plan() != SKIP))
    # without the two sums of rows
    return max(1, dm.n_passes_ - 3), min(1.0, float(seen.sum() / (n * n / 2)))


def _best(work: Any, on: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    fastest, spent = float("inf"), 0.0
    while spent < _PROBE_SECONDS:
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        start = time.perf_counter()
        work()
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        took = time.perf_counter() - start
        fastest, spent = min(fastest, took), spent + took
    return fastest


def _measured_entries(d: int, r: int, on: torch.device) -> float:
    """Entries of a symmetric sweep per second, each pair counted once."""
    n = _PROBE_POINTS if on.type == "cpu" else 8 * _PROBE_POINTS
    n = min(n, max(1024, 2**26 // d))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator).to(on)
    kernel = Kernel(Problem(x, None, 0.5 / d, precision="float32"))
    V = torch.randn(n, r, generator=generator).to(on)
    return n * (n + 1) / 2 / _best(lambda: kernel.matvec(V), on)


def _measured_flops(r: int, on: torch.device) -> float:
    """Flops per second of a tall float64 basis times a block."""
    basis = torch.zeros(64, _PROBE_POINTS, dtype=torch.float64, device=on)
    block = torch.zeros(r, _PROBE_POINTS, dtype=torch.float64, device=on)
    return 2.0 * 64 * r * _PROBE_POINTS / _best(lambda: basis @ block.T, on)
