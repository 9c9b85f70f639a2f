"""Every launch that makes other machine code, for the offline compile leg."""

import torch

from dsalt._call import Attention, Normalized
from dsalt._triton import backward, configs, forward, keys
from dsalt._triton.launch import BackwardArguments
from shared_kernels.offline import Launch

N, BLOCK, SLOTS = 256, 32, 64


def _given(head_dim, dtype=torch.bfloat16, lists=True, bias=True, packed=False, hard=False):
    q = torch.zeros(1, 2, N, head_dim, dtype=dtype)
    k, v = torch.zeros(2, 1, 1, N, head_dim, dtype=dtype)
    cu = torch.tensor([0, 100, N], dtype=torch.int32) if packed else None
    n_lists = N // BLOCK + (2 if packed else 0)
    shape = (1, 2, n_lists, SLOTS) if lists else (1, 2, SLOTS)
    idx = torch.zeros(shape, dtype=torch.int32)
    gates = torch.zeros(shape) if bias else None
    windows = torch.full((1, 2, N), 20.0)
    ramp, block = 1.0 if hard else 8.0, BLOCK if lists else None
    return Attention(q, k, v, windows, idx, gates, cu, 0.1, ramp, block, hard)


def _call(head_dim, soft=True, **flags):
    call = _given(head_dim, **flags)
    row = torch.zeros(call.q.shape[:-1])
    return BackwardArguments(call, Normalized(call.q, row, row), call.q, soft), row


def run_forward(head_dim, **flags):
    forward.launch_attention_forward(_given(head_dim, **flags))


def run_dq(head_dim, **flags):
    backward.launch_dq(*_call(head_dim, **flags))


def run_dkdv(head_dim, **flags):
    keys.launch_dkdv(*_call(head_dim, **flags))


def run_landmarks(head_dim, **flags):
    keys.launch_landmarks(*_call(head_dim, **flags))


def run_delta(head_dim, **flags):
    backward.launch_delta(_call(head_dim, **flags)[0])


def _launch(name, run, table, **flags):
    return Launch(name, lambda head_dim: run(head_dim, **flags), table, hmma_above=128)


ONE = {"lists": False, "bias": False}
F32 = {"dtype": torch.float32}
LAUNCHES = [
    _launch("forward, lists and gates", run_forward, configs.FORWARD),
    _launch("forward, one list", run_forward, configs.FORWARD, **ONE),
    _launch("forward, hard windows", run_forward, configs.FORWARD, hard=True),
    _launch("forward, packed", run_forward, configs.FORWARD, packed=True),
    _launch("forward, fp32", run_forward, configs.FORWARD_FP32, packed=True, **F32),
    _launch("dq, lists and gates", run_dq, configs.DQ),
    _launch("dq, one list", run_dq, configs.DQ, **ONE),
    _launch("dq, hard windows", run_dq, configs.DQ, soft=False),
    _launch("dq, packed", run_dq, configs.DQ, packed=True),
    _launch("dq, fp32", run_dq, configs.DQ_FP32, packed=True, **F32),
    _launch("dk/dv", run_dkdv, configs.DKDV),
    _launch("dk/dv, packed", run_dkdv, configs.DKDV, packed=True),
    _launch("dk/dv, fp32", run_dkdv, configs.DKDV_FP32, packed=True, **F32),
    _launch("landmarks, lists and gates", run_landmarks, configs.LANDMARKS),
    _launch("landmarks, one list", run_landmarks, configs.LANDMARKS, **ONE),
    _launch("landmarks, packed", run_landmarks, configs.LANDMARKS, packed=True),
    _launch("landmarks, fp32", run_landmarks, configs.LANDMARKS_FP32, packed=True, **F32),
    _launch("delta", run_delta, configs.DELTA),
    _launch("delta, fp32", run_delta, configs.DELTA, **F32),
]
