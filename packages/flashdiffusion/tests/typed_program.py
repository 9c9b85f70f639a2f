"""What a user writes, as mypy --strict sees it: arrays stay arrays, tensors tensors."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashdiffusion import (
    DiffusionMap,
    FlashDiffusion,
    carre_du_champ,
    committor,
    knn_bandwidth,
    probability_current,
    slow_manifold,
    stationary_distribution,
)

X: NDArray[Any] = np.zeros((10, 3))
x: torch.Tensor = torch.zeros(10, 3)

product: NDArray[Any] = FlashDiffusion(X, X, X, beta=2.0)
tensor: torch.Tensor = FlashDiffusion(x, x, x)
sigma: NDArray[Any] = knn_bandwidth(X)
pi: torch.Tensor = stationary_distribution(x)
flow: NDArray[Any] = probability_current(X, X)
dm: DiffusionMap = DiffusionMap(1.0).fit(X)
coordinates: NDArray[Any] = dm.transform()
q: NDArray[Any] = committor(dm, [0], [1])
gamma: NDArray[Any] = carre_du_champ(dm, X[:, 0])
slow: DiffusionMap = slow_manifold(np.zeros((9, 2, 3)))
