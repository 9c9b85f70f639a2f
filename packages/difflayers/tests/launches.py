"""Every launch that makes other machine code, for the offline compile leg."""

import torch

from difflayers._call import LogSumExp, NeighbourAttention, NeighbourSum
from difflayers._triton import backward, configs, forward
from shared_kernels.offline import Launch


def _attention(head_dim):
    x = torch.zeros(1, 2, 64, head_dim, dtype=torch.bfloat16)
    return NeighbourAttention(x, x, x, torch.zeros(1, 64, 8, dtype=torch.int64), 0.1)


def _sum(columns, dtype):
    zeros = torch.zeros(64, dtype=torch.int64)
    x = torch.zeros(64, columns, dtype=dtype)
    crow = torch.zeros(65, dtype=torch.int64)
    forward.launch_neighbour_sum(NeighbourSum(x, crow, zeros, torch.zeros(64)))


def neighbour_sum(columns):
    _sum(columns, torch.bfloat16)


def neighbour_sum_fp32(columns):
    _sum(columns, torch.float32)


def attention(head_dim):
    forward.launch_neighbour_attention_forward(_attention(head_dim))


def attention_backward(head_dim):
    call = _attention(head_dim)
    saved, needs = LogSumExp.fake(call), frozenset(("q", "k", "v"))
    backward.launch_neighbour_attention_backward(call, saved, call.fake(), needs)


LAUNCHES = [
    Launch("neighbour sum", neighbour_sum, table=configs.NEIGHBOUR_SUM),
    Launch("neighbour sum fp32", neighbour_sum_fp32, table=configs.NEIGHBOUR_SUM),
    Launch("neighbour attention", attention, table=configs.NEIGHBOUR_ATTENTION),
    Launch("neighbour attention backward", attention_backward, table=configs.NEIGHBOUR_ATTENTION),
]
