"""Would a first rung in half precision save time? Passes counted, with the rung emulated densely.

    python packages/flashdiffusion/results/half_rung.py --out packages/flashdiffusion/results

On a GPU one fp16 product instead of the three of split fp16 is at best three times as fast. The
rung solves to a tolerance of its own; its vectors then start the solver in full precision. It pays
where the passes that it saves are more than a third of those that it takes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

import torch
from scaling import SETS
from torch import Tensor

from flashdiffusion import __version__
from flashdiffusion._operator import Reversible
from flashdiffusion._problem import LOG2_E
from flashdiffusion.eigensolver import Eigenpairs, block_krylov

PAIRS, COLUMNS, TOL, RUNGS = 8, 12, 1e-6, (1e-1, 3e-2, 1e-2, 3e-3)


class Dense:
    """A kernel matrix with the products of one."""

    def __init__(self, matrix: Tensor, half: bool = False) -> None:
        self.matrix, self.half = matrix, half

    def matvec(self, V: Tensor) -> Tensor:
        if not self.half:
            return self.matrix @ V.double()
        size = V.abs().amax(0)
        return (self.matrix @ (V / size).half().float()).double() * size


def in_half(x: Tensor, beta: float) -> Tensor:
    """The matrix as one fp16 product has it: augmented rows and weights rounded, sums in fp32."""
    norm = -beta * LOG2_E * (x * x).sum(1, keepdim=True)
    coarse, one = norm.half().double(), torch.ones_like(norm)
    points = (2.0 * beta * LOG2_E) ** 0.5 * x
    left = torch.cat((points, coarse, norm - coarse, one, one), 1).half().float()
    right = torch.cat((points, one, one, coarse, norm - coarse), 1).half().float()
    return torch.exp2(left @ right.T).half().float()


def solver(P: Reversible, kernel: Dense, top: Tensor):
    def solve(start: Tensor, n_pairs: int, tol: float) -> Eigenpairs:
        return block_krylov(
            lambda V: P.apply(V, kernel), n_pairs, start, locked=top, tol=tol, max_passes=60
        )

    return solve


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=None, help="folder of half_rung.json")
    given = parser.parse_args(argv)
    result: dict = {"points": given.points, "pairs": PAIRS, "columns": COLUMNS, "tol": TOL}
    for name, (make, beta) in SETS.items():
        x = torch.from_numpy(make(given.points)).double()
        x = x - x.mean(0)
        exact = Dense(torch.exp(-beta * torch.cdist(x, x).square()))
        P = Reversible(exact, exact.matrix.sum(1) ** -0.5)  # type: ignore[arg-type]
        rough = Dense(in_half(x, beta), half=True)
        top = (P.degree / P.degree.sum()).sqrt()[:, None]
        noise = torch.randn(len(x), COLUMNS, generator=torch.Generator().manual_seed(0))
        start = noise.double() * top

        full, half = solver(P, exact, top), solver(P, rough, top)
        without = full(start, PAIRS, TOL).n_passes
        rungs = []
        for tol in RUNGS:
            rung = half(start, COLUMNS, tol)
            after = full(rung.vectors, PAIRS, TOL)
            saved = without - after.n_passes
            rungs.append(
                {
                    "tol": tol,
                    "half passes": rung.n_passes,
                    "residual": float(rung.residuals.max()),
                    "full passes after it": after.n_passes,
                    "full passes saved, net": round(saved - rung.n_passes / 3, 1),
                }
            )
        rows = {"full passes without": without, "rungs": rungs}
        result[name] = rows
    result |= {
        "date": str(datetime.date.today()),
        "versions": {
            "flashdiffusion": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    if given.out is not None:
        (given.out / "half_rung.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(), indent=1) + "\n")
