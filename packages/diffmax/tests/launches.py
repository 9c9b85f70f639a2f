"""Every launch that makes other machine code, for the offline compile leg."""

import torch

from diffmax._triton import backward, configs, forward
from shared_kernels.offline import Launch

NUMBER = torch.tensor(0.85)  # 0-d on the CPU: s is a scalar argument


def _scores(length, dtype=torch.bfloat16):
    return torch.zeros(64, length, dtype=dtype)


def forward_general(length):
    forward.launch_bisect_forward(_scores(length), NUMBER, -1, 50, True)


def forward_general_fp32(length):
    forward.launch_bisect_forward(_scores(length, torch.float32), NUMBER, -1, 50, True)


def forward_careful(length):
    forward.launch_bisect_forward(_scores(length), torch.full((64, 1), 0.85), -1, 50, True)


def forward_near_softmax():
    forward.launch_bisect_forward(_scores(4096), torch.tensor(0.999), -1, 50, True)


def forward_integer(alpha, length):
    forward.launch_bisect_forward(
        _scores(length), torch.tensor(alpha, dtype=torch.float64), -1, 50, True
    )


def forward_raw():
    forward.launch_bisect_forward(_scores(4096), NUMBER, -1, 50, False)


def backward_scores(length):
    x = _scores(length)
    backward.launch_bisect_backward(x, x, NUMBER, -1, False)


def backward_both(length):
    x = _scores(length)
    backward.launch_bisect_backward(x, x, torch.full((64, 1), 0.85), -1, True)


def forward_wide(length):
    forward.launch_bisect_forward(_scores(length, torch.float64), NUMBER, -1, 50, True)


def backward_wide(length, alpha_grad=True):
    x = _scores(length, torch.float64)
    backward.launch_bisect_backward(x, x, NUMBER, -1, alpha_grad)


LONG = 65536
LAUNCHES = [
    Launch("forward general", forward_general, table=configs.FORWARD),
    Launch("forward general fp32", forward_general_fp32, table=configs.FORWARD),
    Launch("forward alpha per row", forward_careful, table=configs.FORWARD_CAREFUL),
    Launch("forward near softmax", forward_near_softmax, table=configs.FORWARD_CAREFUL, size=4096),
    Launch("forward raw", forward_raw, table=configs.FORWARD, size=4096),
    Launch("forward p=2", lambda n: forward_integer(0.5, n), table=configs.FORWARD),
    Launch("forward p=10", lambda n: forward_integer(0.9, n), table=configs.FORWARD),
    Launch("stream general", forward_general, table=configs.STREAM, largest=LONG),
    Launch("stream alpha per row", forward_careful, table=configs.STREAM, largest=LONG),
    Launch("stream p=10", lambda n: forward_integer(0.9, n), table=configs.STREAM, largest=LONG),
    Launch("backward", backward_scores, table=configs.BACKWARD),
    Launch("backward with alpha", backward_both, table=configs.BACKWARD_ALPHA),
    Launch("forward fp64", forward_wide, table=configs.FORWARD_WIDE),
    Launch("backward fp64", lambda n: backward_wide(n, False), table=configs.BACKWARD_WIDE),
    Launch("backward with alpha fp64", backward_wide, table=configs.BACKWARD_WIDE),
    Launch("stream fp64", forward_wide, table=configs.STREAM_WIDE, largest=LONG),
    Launch("stream backward fp64", backward_wide, table=configs.STREAM_WIDE, largest=LONG),
    Launch("stream backward", backward_scores, table=configs.STREAM, largest=LONG),
    Launch("stream backward with alpha", backward_both, table=configs.STREAM, largest=LONG),
]
