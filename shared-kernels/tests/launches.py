"""Every launch that makes other machine code, for the offline compile leg."""

import torch

from shared_kernels.offline import Launch
from shared_kernels.triton import configs, knn


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


LAUNCHES = [
    Launch("knn among themselves", knn_of_one_set, table=configs.KNN_FORWARD, size=64),
    Launch("knn of two sets", knn_of_two_sets, table=configs.KNN_FORWARD, size=64),
    Launch("knn in 3-D", knn_three_dimensions, table=configs.KNN_FORWARD, size=3),
    Launch("knn, 256-D, 64 candidates", knn_largest, table=configs.KNN_FORWARD, size=256),
]
