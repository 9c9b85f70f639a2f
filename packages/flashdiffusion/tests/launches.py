"""Every launch that makes other machine code, for the offline compile leg."""

import torch

from flashdiffusion._problem import Problem
from flashdiffusion._triton import configs
from flashdiffusion._triton.products import TritonProducts
from shared_kernels.offline import Launch


def _matvec(features, columns, precision="float32"):
    problem = Problem(torch.zeros(300, features - 4), None, 1.0, precision=precision)
    TritonProducts(problem, None, None, None).matvec(torch.zeros(300, columns))


def matvec_block(features):
    _matvec(features, 8)


def matvec_wide(features):
    _matvec(features, 32)


def matvec_three_dimensions():
    _matvec(7, 1)


def half_block(features):
    _matvec(features, 12, "half")


def half_wide(features):
    _matvec(features, 32, "half")


def half_three_dimensions():
    _matvec(7, 12, "half")


LAUNCHES = [
    Launch("matvec, up to 16 columns", matvec_block, table=configs.MATVEC_FORWARD),
    Launch("matvec, 32 columns", matvec_wide, table=configs.MATVEC_FORWARD),
    Launch("matvec of 3-D points", matvec_three_dimensions, table=configs.MATVEC_FORWARD, size=16),
    Launch("half matvec, up to 16 columns", half_block, table=configs.MATVEC_HALF),
    Launch("half matvec, 32 columns", half_wide, table=configs.MATVEC_HALF),
    Launch("half matvec of 3-D points", half_three_dimensions, table=configs.MATVEC_HALF, size=16),
]
