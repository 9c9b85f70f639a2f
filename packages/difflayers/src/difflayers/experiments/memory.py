"""Memory of a sparse diffused association over many stored patterns, in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from ..diffused_attention import DiffusedHopfield
from .report import Result, command, spread

SIZE, N_STATES = 64, 256


def _most_held() -> float:
    """The most memory that this process ever held, in MB."""
    import resource

    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _measure(N: int, seed: int) -> float:
    """MB by which the process grew for N patterns, their graph and one association."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    layer = DiffusedHopfield(SIZE, num_heads=4, use_sparse=True, k_neighbors=10)

    def associate(N: int) -> None:
        stored, state = torch.randn(1, N, SIZE), torch.randn(1, N_STATES, SIZE)
        with torch.no_grad():
            layer((stored, state, stored))

    associate(500)  # what is loaded and allocated once
    before = _most_held()
    associate(N)
    return _most_held() - before


def run(data: str, seeds: list[int], quick: bool) -> list[Result]:
    try:
        import resource  # noqa: F401
    except ImportError as error:
        raise SystemExit("memory is read from the operating system: Linux or macOS") from error
    rows = []
    for N in (2000, 5000) if quick else (10_000, 25_000, 50_000):
        found = []
        for seed in seeds:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found.append(pool.submit(_measure, N, seed).result())
        rows.append([str(N), spread(found, digits=0), f"{N * N * 4 / 1e6:.0f}"])
    return [
        Result(
            f"Memory of a sparse DiffusedHopfield, {data}",
            ["stored patterns", "process grew by, MB", "one N x N buffer, MB"],
            rows,
            f"use_sparse, k 10, size {SIZE}, 4 heads, {N_STATES} states: patterns, graph and one "
            f"association; {len(seeds)} seeds, each size and seed in a new process; one thread.",
            levels=False,
        )
    ]


def main(argv: list[str] | None = None) -> int:
    return command("memory", run, argv, data=("random patterns",), seeds=3)


if __name__ == "__main__":
    raise SystemExit(main())
