"""Every launch that makes other machine code, for the offline compile leg."""

import torch

from difflayers._triton import backward, configs, forward
from shared_kernels.offline import Launch


def _lists(head_dim, dtype):
    x = torch.zeros(1, 2, 64, head_dim, dtype=dtype)
    return x, torch.zeros(1, 64, 8, dtype=torch.int64)


def _sum(columns, dtype):
    zeros = torch.zeros(64, dtype=torch.int64)
    x = torch.zeros(64, columns, dtype=dtype)
    forward.launch_neighbour_sum(x, torch.zeros(65, dtype=torch.int64), zeros, torch.zeros(64))


def neighbour_sum(columns):
    _sum(columns, torch.bfloat16)


def neighbour_sum_fp32(columns):
    _sum(columns, torch.float32)


def attention(head_dim):
    x, index = _lists(head_dim, torch.bfloat16)
    forward.launch_neighbour_attention_forward(x, x, x, index, 0.1)


def attention_backward(head_dim):
    x, index = _lists(head_dim, torch.bfloat16)
    lse = torch.zeros(1, 2, 64)
    backward.launch_neighbour_attention_backward(x, x, x, x, index, x, lse, 0.1)


LAUNCHES = [
    Launch("neighbour sum", neighbour_sum, table=configs.NEIGHBOUR_SUM),
    Launch("neighbour sum fp32", neighbour_sum_fp32, table=configs.NEIGHBOUR_SUM),
    Launch("neighbour attention", attention, table=configs.NEIGHBOUR_ATTENTION),
    Launch("neighbour attention backward", attention_backward, table=configs.NEIGHBOUR_ATTENTION),
]
