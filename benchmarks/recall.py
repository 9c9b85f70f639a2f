"""Certified recall over a million patterns beside faiss' flat inner product and a dense update.

`python -m benchmarks.recall` renews the results; `faiss-cpu` is optional.

One update with entmax15 of 1 and of 16 queries, each a stored pattern and noise of a tenth of its
length; one thread, CPU time, medians, interleaved. All three read the same fp32 patterns. "same":
the share of queries for which the pattern of the largest weight is the one that faiss returns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from difflayers import PatternPages, retrieve

from .registry import peer

N, D, REPEATS = 1_000_000, 64, 7
RESULTS = Path(__file__).parent / "results" / "recall.jsonl"
# Of unit vectors: the largest weight is one where the next pattern is 2 / beta behind in score.
BETA = 4096.0


def patterns(kind: str) -> Tensor:
    """(N, D) unit vectors.

    surface: a smooth map of three numbers; clusters: 1000 centres and noise of a tenth of their
    length; independent: uniform on the sphere.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "surface":
        return F.normalize(torch.sin(noise(N, 3) @ noise(3, D) + 3 * noise(D)), dim=-1)
    if kind == "clusters":
        centres = F.normalize(noise(1000, D), dim=-1)
        near = centres[torch.randint(len(centres), (N,), generator=generator)]
        return F.normalize(near.add_(noise(N, D).mul_(0.1 * D**-0.5)), dim=-1)
    return F.normalize(noise(N, D), dim=-1)


def flat(memory: Tensor) -> Callable[[Tensor], Tensor] | str:
    """Queries to the places of the patterns with the largest inner product, by faiss."""

    def make(faiss: Any) -> Callable[[Tensor], Tensor]:
        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(D)
        index.add(memory.numpy())
        return lambda query: torch.from_numpy(index.search(query.numpy(), 1)[1][:, 0])

    return peer("faiss", make)


def measured(kind: str) -> list[dict[str, Any]]:
    memory = patterns(kind)
    search = flat(memory)
    start = time.process_time()
    held = PatternPages(memory)
    made = {"seconds_to_make_pages": time.process_time() - start}
    rows = [_one_size(memory, held, search, n) for n in (1, 16)]
    return [{"patterns": kind, **row, **made} for row in rows]


def _one_size(
    memory: Tensor, held: PatternPages, search: Callable[[Tensor], Tensor] | str, n: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(memory), (n,), generator=generator)
    query = memory[chosen] + 0.1 * D**-0.5 * torch.randn(n, D, generator=generator)
    options: dict[str, Any] = {"beta": BETA, "steps": 1, "separation": "entmax15"}
    contenders: dict[str, Callable[[], Any]] = {
        "certified": lambda: retrieve(memory, query, **options, certified=held).patterns,
        "dense": lambda: retrieve(memory, query, **options).patterns,
    }
    if not isinstance(search, str):
        contenders["faiss"] = lambda: search(query)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    results = {name: call() for name, call in contenders.items()}
    for _ in range(REPEATS):
        for name, call in contenders.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    exact = retrieve(memory.double(), query.double(), **options).patterns
    row: dict[str, Any] = {
        "N": len(memory),
        "D": D,
        "queries": n,
        "beta": BETA,
        "share_read": float(held.update(query, BETA).pages_read.double().mean()) / len(held.order),
        "error": float((results["certified"].double() - exact).abs().max()),
        "seconds": {name: statistics.median(x) for name, x in times.items()},
    }
    if isinstance(search, str):
        return {**row, "faiss": search}
    best = memory[results["faiss"]]
    nearest = [  # the pattern of largest weight is the nearest one to what one step returns
        int((memory @ x).argmax()) for x in F.normalize(results["certified"], dim=-1)
    ]
    same = (memory[nearest] == best).all(1)
    return {**row, "same": float(same.double().mean())}


def main() -> None:
    torch.set_num_threads(1)
    rows = [row for kind in ("surface", "clusters", "independent") for row in measured(kind)]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(RESULTS.read_text("utf-8"))


if __name__ == "__main__":
    main()
