"""Launches of the package, for the offline compile leg.

The kernels of rows are shared-kernels' own: its list has every form of them. These are the ways in
which diffmax reaches them.
"""

import torch

from diffmax._call import Bisect, Weights
from diffmax._triton import rows
from shared_kernels.offline import Launch
from shared_kernels.triton import configs

NUMBER = torch.tensor(0.85)  # 0-d on the CPU: s is a scalar argument


def forward(length):
    rows.launch_bisect_forward(Bisect(torch.zeros(64, length, dtype=torch.bfloat16), NUMBER))


def backward(length):
    x = torch.zeros(64, length, dtype=torch.bfloat16)
    call = Bisect(x, torch.full((64, 1), 0.85))
    rows.launch_bisect_backward(call, Weights(x), x, frozenset({"X", "alpha"}))


LAUNCHES = [
    Launch("forward", forward, table=configs.ROWS_FORWARD, size=4096),
    Launch("backward", backward, table=configs.ROWS_BACKWARD_S, size=4096),
]
