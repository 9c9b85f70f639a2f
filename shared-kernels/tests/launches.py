"""Every launch that makes other machine code, for the offline compile leg."""

import torch

from shared_kernels.offline import Launch
from shared_kernels.triton import configs, knn, rows


def _knn(D, n_keep, first):
    x = torch.zeros(300, D)
    knn.launch_knn_forward(x, x, torch.zeros(300), n_keep, first)


def knn_of_one_set():
    _knn(64, 16, 0)


def knn_of_two_sets():
    _knn(64, 16, None)


def knn_three_dimensions():
    _knn(3, 16, None)


def knn_largest():
    _knn(256, 64, 0)


BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
COLUMN = torch.full((64, 1), 0.15)


def _rows(s, dtype=BF16, divide=True):
    def run(length):
        rows.launch_rows_forward(torch.zeros(64, length, dtype=dtype), s, 50, divide)

    return run


def _rows_backward(s, need_s, dtype=BF16):
    def run(length):
        x = torch.zeros(64, length, dtype=dtype)
        rows.launch_rows_backward(x, x, s, need_s)

    return run


FORWARD, CAREFUL, WIDE = (
    configs.ROWS_FORWARD,
    configs.ROWS_FORWARD_CAREFUL,
    configs.ROWS_FORWARD_FP64,
)
BACKWARD = configs.ROWS_BACKWARD
LONG = 65536  # streamed
ROWS = [
    *(
        Launch(
            f"rows forward, {name}",
            _rows(s, dtype),
            table=table,
            largest=LONG,
            access=16 if dtype is BF16 else None,
        )
        for name, s, dtype, table in (
            ("general", 0.15, BF16, FORWARD),
            ("general, fp32", 0.15, FP32, FORWARD),
            ("p=1", 1.0, BF16, FORWARD),
            ("p=2", 0.5, BF16, FORWARD),
            ("p=10", 0.1, BF16, FORWARD),
            ("s per row", COLUMN, BF16, CAREFUL),
            ("fp64", 0.15, FP64, WIDE),
        )
    ),
    Launch("rows forward, p=3", _rows(1 / 3), FORWARD, largest=4096, access=16),
    Launch(
        "rows forward, not divided", _rows(0.15, divide=False), FORWARD, largest=4096, access=16
    ),
    Launch("rows forward, near softmax", _rows(0.001), CAREFUL, largest=4096, access=16),
    Launch("rows forward, p=2, fp64", _rows(0.5, FP64), table=WIDE, size=4096),
    *(
        Launch(
            f"rows backward, {name}",
            _rows_backward(s, need_s, dtype),
            table=t,
            largest=LONG,
            access=16 if dtype is BF16 else None,
        )
        for name, s, need_s, dtype, t in (
            ("general", 0.15, False, BF16, BACKWARD),
            ("p=2", 0.5, False, BF16, BACKWARD),
            ("with s per row", COLUMN, True, BF16, configs.ROWS_BACKWARD_S),
            ("fp64", 0.15, False, FP64, configs.ROWS_BACKWARD_FP64),
            ("with s per row, fp64", COLUMN.double(), True, FP64, configs.ROWS_BACKWARD_FP64),
        )
    ),
    Launch("rows backward, p=1", _rows_backward(1.0, False), BACKWARD, largest=4096, access=16),
]
LAUNCHES = [
    *ROWS,
    Launch("knn among themselves", knn_of_one_set, table=configs.KNN_FORWARD, size=64),
    Launch("knn of two sets", knn_of_two_sets, table=configs.KNN_FORWARD, size=64),
    Launch("knn in 3-D", knn_three_dimensions, table=configs.KNN_FORWARD, size=3),
    Launch("knn, 256-D, 64 candidates", knn_largest, table=configs.KNN_FORWARD, size=256),
]
