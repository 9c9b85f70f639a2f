"""A program of a user, for a strict type checker: `python -m mypy --strict typed_program.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import diffmax
from diffmax import (
    DiffmaxBisectModule,
    ExpMap,
    HillMap,
    TanhMap,
    diffmax_bisect,
    diffmax_loss,
    explain,
    sparsity_stats,
)

scores = torch.randn(2, 4, 9, 9)
learned = nn.Parameter(torch.tensor(0.4))
rows: Tensor = diffmax_bisect(scores, 0.3, dim=1, n_iter=20, ensure_sum_one=False)
rows = rows + diffmax_bisect(scores, learned) + diffmax_bisect(scores, lambda: learned)
target = torch.tensor([1, 0])
loss: Tensor = diffmax_loss(scores[:, 0, 0], target, alpha=learned, reduction="sum")
stats: dict[str, float] = sparsity_stats(rows, dim=-1)
text: str = explain(diffmax_bisect, scores)


class Attention(nn.Module):
    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weights = DiffmaxBisectModule(0.85, alpha_map=HillMap(c=0.3), num_heads=num_heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.weights(q @ k.mT)
        return weights @ v


attended: Tensor = Attention(4).forward(scores, scores, scores)
alpha: float | Tensor = DiffmaxBisectModule(0.5, alpha_map=TanhMap(), dtype=torch.float64).alpha
beta: float = ExpMap(c=2.0).inverse(0.5)
again: Tensor = HillMap().from_log_beta(0.0) + TanhMap()(beta)
version: str = diffmax.__version__
total: Tensor = rows.sum() + loss + attended.sum() + again + stats["sparsity"]
