"""Launches of the package, for the offline compile leg.

The kernels of rows are shared-kernels' own: its list has every form of them. These are the ways in
which diffmax reaches them.
"""

import torch

from diffmax._call import Bisect, LinearLoss, Weights
from diffmax._torch_linear import Shard
from diffmax._triton import configs as own
from diffmax._triton import linear, rows
from shared_kernels.offline import Launch
from shared_kernels.triton import configs

NUMBER = torch.tensor(0.85)  # 0-d on the CPU: s is a scalar argument


def forward(length):
    rows.launch_bisect_forward(Bisect(torch.zeros(64, length, dtype=torch.bfloat16), NUMBER))


def backward(length):
    x = torch.zeros(64, length, dtype=torch.bfloat16)
    call = Bisect(x, torch.full((64, 1), 0.85))
    rows.launch_bisect_backward(call, Weights(x), x, frozenset({"X", "alpha"}))


def search(dtype, **options):
    """Both sweeps over a vocabulary, and the rows between them."""
    x = torch.zeros(64, 64, dtype=dtype)
    call = LinearLoss(
        hidden=x,
        weight=torch.zeros(4096, 64, dtype=dtype),
        bias=None,
        target=torch.zeros(64, 1, dtype=torch.int64),
        target_weights=torch.ones(64, 1),
        alpha=torch.tensor(0.5),
        label_smoothing=0.0,
        softcap=None,
        reduction="mean",
        group="",
        with_alpha=False,
        at_once=False,
        save=True,
    )
    linear.launch_linear_search(call._replace(**options), Shard(0, 4096, ""), torch.arange(64))


def plain(dtype):
    return lambda: search(dtype)


def with_everything(dtype):
    return lambda: search(
        dtype, bias=torch.zeros(4096, dtype=dtype), softcap=3.0, label_smoothing=0.1
    )


SEARCHES = {
    "bf16": (torch.bfloat16, own.LINEAR),
    "fp32": (torch.float32, own.LINEAR_FP32),
    "fp64": (torch.float64, own.LINEAR_FP64),
}

LAUNCHES = [
    Launch("forward", forward, table=configs.ROWS_FORWARD, largest=4096, access=16),
    Launch("backward", backward, table=configs.ROWS_BACKWARD_S, largest=4096, access=16),
    *(
        Launch(f"linear loss, {name}", plain(dtype), table=table, size=64)
        for name, (dtype, table) in SEARCHES.items()
    ),
    *(
        Launch(f"linear loss, {name}, bias, cap, total", with_everything(dtype), table, size=64)
        for name, (dtype, table) in SEARCHES.items()
    ),
]
