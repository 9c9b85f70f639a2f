"""Every launch of the package, to be compiled for GPUs that are not there."""

from __future__ import annotations

import torch

from adasplash._triton import backward, configs, forward, lazy
from shared_kernels.offline import Launch

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def _qkv(head_dim: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(2, 4, 512, head_dim, dtype=dtype)
    return q, q[:, ::2], q[:, ::2]


def _options(alpha, causal=True, block_mask=True, extras=""):
    """The arguments of the attention launchers after q, k, v and what the forward saved."""
    tensor, value = (torch.full((4,), 1.5), 0.0) if alpha is None else (None, alpha)
    pairs = torch.zeros(2, 4, 512, 512)
    return (
        tensor, value, causal, torch.tensor([200, 512]) if extras else None, None,
        pairs > 0 if "mask" in extras else None, pairs if "bias" in extras else None,
        torch.ones(4) if extras else None,
        100 if extras else None, 0.1, 40, block_mask,
    )  # fmt: skip


def _forward(alpha, save=True, dtype=BF16, **options):
    def run(head_dim):
        q, k, v = _qkv(head_dim, dtype)
        forward.launch_attention_forward(q, k, v, *_options(alpha, **options), save)

    return run


def _stats(head_dim):
    q, k, _ = _qkv(head_dim)
    forward.launch_attention_stats(q, k, 64, *_options(1.5)[:-1])


def _backward(alpha, need_alpha=False, need_bias=False, dtype=BF16, **options):
    def run(head_dim):
        q, k, v = _qkv(head_dim, dtype)
        squares = torch.ones(8, 8, 8, dtype=torch.int8)
        theta, o2 = torch.zeros(2, 4, 512), torch.zeros(q.shape)
        kept = (theta, o2, squares, squares, squares)
        need_slopes = need_alpha and bool(options.get("extras"))
        options_and_needs = (*_options(alpha, **options), need_alpha, need_bias, need_slopes)
        backward.launch_attention_backward(q, q, k, v, *kept, *options_and_needs)

    return run


def _lazy_options(mask):
    pairs = torch.zeros(2, 1, 512, 512) > 0 if mask else None
    return 100, torch.tensor([200, 512]) if mask else None, pairs, 0.1


def _lazy_forward(mask=False, save=True, dtype=BF16):
    def run(head_dim):
        q, k, v = _qkv(head_dim, dtype)
        bias, tau = torch.zeros(4, 101), torch.zeros(4)
        lazy.launch_lazy_forward(q, k, v, bias, tau, *_lazy_options(mask), save)

    return run


def _lazy_backward(mask=False, dtype=BF16):
    def run(head_dim):
        q, k, v = _qkv(head_dim, dtype)
        bias, tau, lse = torch.zeros(4, 101), torch.zeros(4), torch.zeros(q.shape[:3])
        saved = (lse, torch.zeros(*q.shape[:3], 2, q.shape[-1]))
        lazy.launch_lazy_backward(q, q, k, v, bias, tau, *saved, *_lazy_options(mask))

    return run


# Beyond head dims of 128 a tile of M = 64 spills.
_ATTENTION = {"hmma_above": 128}
_ALL = {"extras": "mask and bias", "dtype": FP32}

LAUNCHES = [
    Launch("score, alpha 1.5", _forward(1.5, save=False), table=configs.SCORE, **_ATTENTION),
    Launch("forward, alpha 1.5", _forward(1.5), table=configs.FORWARD, **_ATTENTION),
    Launch("forward, alpha per head", _forward(None), table=configs.FORWARD, **_ATTENTION),
    Launch(
        "forward, no block mask",
        _forward(1.5, block_mask=False),
        table=configs.FORWARD,
        **_ATTENTION,
    ),
    Launch("stats, alpha 1.5", _stats, table=configs.FORWARD, **_ATTENTION),
    Launch("dq, alpha per head", _backward(None, need_alpha=True), table=configs.DQ, **_ATTENTION),
    Launch("dk/dv, alpha 1.5", _backward(1.5), table=configs.DKDV, **_ATTENTION),
    Launch(
        "dk/dv, no block mask", _backward(1.5, block_mask=False), table=configs.DKDV, **_ATTENTION
    ),
    *(
        Launch(f"{name}, {extra} and more", run, table=table, **_ATTENTION)
        for extra in ("mask", "bias", "mask and bias")
        for name, run, table in (
            ("score", _forward(None, False, extras=extra), configs.SCORE_EDITED),
            ("forward", _forward(None, extras=extra), configs.FORWARD_EDITED),
            ("dq", _backward(None, True, extras=extra), configs.DQ_EDITED),
            ("dk/dv", _backward(None, extras=extra), configs.DKDV_EDITED),
        )
    ),
    *(
        Launch(
            f"dbias, {extra} and more",
            _backward(None, False, True, extras=extra),
            table=configs.DBIAS,
            **_ATTENTION,
        )
        for extra in ("bias", "mask and bias")
    ),
    Launch(
        "lazy forward, no gradient",
        _lazy_forward(save=False),
        table=configs.LAZY_FORWARD,
        **_ATTENTION,
    ),
    *(
        Launch(
            f"lazy {name}{', mask and lengths' if mask else ''}",
            run(mask),
            table=table,
            **_ATTENTION,
        )
        for mask in (False, True)
        for name, run, table in (
            ("forward", _lazy_forward, configs.LAZY_FORWARD),
            ("dq", _lazy_backward, configs.LAZY_DQ),
            ("dk/dv", _lazy_backward, configs.LAZY_DKDV),
            ("dbias", _lazy_backward, configs.LAZY_DBIAS),
        )
    ),
    *(
        Launch(f"{name}, fp32", run, table=table, **_ATTENTION)
        for name, run, table in (
            ("score", _forward(None, False, **_ALL), configs.SCORE_FP32),
            ("forward", _forward(None, **_ALL), configs.FORWARD_FP32),
            ("dq", _backward(None, True, **_ALL), configs.DQ_FP32),
            ("dk/dv", _backward(None, **_ALL), configs.DKDV_FP32),
            ("dbias", _backward(None, False, True, **_ALL), configs.DBIAS_FP32),
            ("lazy forward", _lazy_forward(True, dtype=FP32), configs.LAZY_FORWARD_FP32),
            ("lazy dq", _lazy_backward(True, dtype=FP32), configs.LAZY_DQ_FP32),
            ("lazy dk/dv", _lazy_backward(True, dtype=FP32), configs.LAZY_DKDV_FP32),
            ("lazy dbias", _lazy_backward(True, dtype=FP32), configs.LAZY_DBIAS_FP32),
        )
    ),
]
