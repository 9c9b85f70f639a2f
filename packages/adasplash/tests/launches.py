"""Every launch of the package, to be compiled for GPUs that are not there."""

from __future__ import annotations

import torch

from adasplash._call import ActiveSums, Attention, Lazy, Statistics, Tiles
from adasplash._paged_call import PagedDecode
from adasplash._triton import backward, configs, forward, lazy, paged
from shared_kernels.offline import Launch

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def _qkv(head_dim: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(2, 4, 512, head_dim, dtype=dtype)
    return q, q[:, ::2], q[:, ::2]


def _call(head_dim, alpha, dtype=BF16, save=True, causal=True, square=64, extras=""):
    q, k, v = _qkv(head_dim, dtype)
    pairs = torch.zeros(2, 4, 512, 512)
    return Attention(
        q,
        k,
        v,
        alpha=torch.full((4,), 1.5) if alpha is None else None,
        alpha_value=alpha or 0.0,
        is_causal=causal,
        varlen=torch.tensor([200, 512]) if extras else None,
        mask=pairs > 0 if "mask" in extras else None,
        bias=pairs if "bias" in extras else None,
        slopes=torch.ones(4) if extras else None,
        window=100 if extras else None,
        s_aux=torch.ones(4) if "sinks" in extras else None,
        softcap=5.0 if "cap" in extras and (dtype != FP32 or head_dim <= 128) else None,
        scale=0.1,
        square=square,
        save=save,
    )


def _forward(alpha, save=True, **options):
    def run(head_dim):
        forward.launch_attention_forward(_call(head_dim, alpha, save=save, **options))

    return run


def _stats(head_dim):
    forward.launch_attention_stats(Statistics(*_call(head_dim, 1.5)))


def _backward(alpha, *needs, **options):
    def run(head_dim):
        call = _call(head_dim, alpha, **options)
        squares = torch.ones(8, 8, 8, dtype=torch.int8)
        rows = torch.zeros(2, 4, 512)
        saved = Tiles(rows, rows, torch.zeros(call.q.shape), squares)
        slopes = {"slopes"} if "alpha" in needs and call.slopes is not None else set()
        backward.launch_attention_backward(call, saved, call.q, frozenset({*needs, *slopes}))

    return run


def _lazy_call(head_dim, mask, dtype, save=True):
    pairs, lengths = torch.zeros(2, 1, 512, 512) > 0, torch.tensor([200, 512])
    more = {"varlen": lengths, "mask": pairs} if mask else {}
    bias, tau = torch.zeros(4, 101), torch.zeros(4)
    return Lazy(*_qkv(head_dim, dtype), bias, tau, 100, scale=0.1, save=save, **more)


def _lazy_forward(mask=False, save=True, dtype=BF16):
    def run(head_dim):
        lazy.launch_lazy_forward(_lazy_call(head_dim, mask, dtype, save))

    return run


def _lazy_backward(mask=False, dtype=BF16):
    def run(head_dim):
        call = _lazy_call(head_dim, mask, dtype)
        rows = torch.zeros(2, 4, 512)
        saved = ActiveSums(rows, rows, torch.zeros(2, 4, 512, 2, head_dim))
        lazy.launch_lazy_backward(call, saved, call.q, frozenset())

    return run


def _dq_table(extra):
    return configs.DQ_CAPPED if "cap" in extra else configs.DQ_EDITED


def _paged(alpha, dtype=BF16, extras=False):
    def run(head_dim):
        pool = torch.zeros(2, 20, 64, head_dim, dtype=dtype)
        paged.launch_paged_decode(
            PagedDecode(
                torch.zeros(2, 4, 3, head_dim, dtype=dtype),
                pool,
                pool,
                torch.zeros(2, 20, 2 * head_dim),
                torch.zeros(2, 10, dtype=torch.int64),
                torch.tensor([600, 300]),
                alpha=torch.full((4,), 1.5) if alpha is None else None,
                alpha_value=alpha or 0.0,
                slopes=torch.ones(4) if extras else None,
                window=100 if extras else None,
                s_aux=torch.ones(4) if extras else None,
                softcap=30.0 if extras else None,
                scale=0.1,
            )
        )

    return run


# Beyond head dims of 128 a tile of M = 64 spills.
_ATTENTION = {"hmma_above": 128}
_ALL = {"extras": "mask, bias, sinks, soft cap", "dtype": FP32}

# Few rows read a page: no tile of M = 64.
_FEW_ROWS = {"hmma_above": 0, "largest": 128}

LAUNCHES = [
    Launch("paged, alpha 1.5", _paged(1.5), table=configs.PAGED, **_FEW_ROWS),
    Launch("paged, everything", _paged(None, extras=True), table=configs.PAGED, **_FEW_ROWS),
    Launch(
        "paged, everything, fp32",
        _paged(None, FP32, extras=True),
        table=configs.PAGED_FP32,
        **_FEW_ROWS,
    ),
    Launch("score, alpha 1.5", _forward(1.5, save=False), table=configs.SCORE, **_ATTENTION),
    Launch("forward, alpha 1.5", _forward(1.5), table=configs.FORWARD, **_ATTENTION),
    Launch("forward, alpha per head", _forward(None), table=configs.FORWARD, **_ATTENTION),
    Launch(
        "forward, no block mask",
        _forward(1.5, square=0),
        table=configs.FORWARD,
        **_ATTENTION,
    ),
    Launch("stats, alpha 1.5", _stats, table=configs.FORWARD, **_ATTENTION),
    Launch("dq, alpha per head", _backward(None, "alpha"), table=configs.DQ, **_ATTENTION),
    Launch("dk/dv, alpha 1.5", _backward(1.5), table=configs.DKDV, **_ATTENTION),
    Launch("dk/dv, no block mask", _backward(1.5, square=0), table=configs.DKDV, **_ATTENTION),
    *(
        Launch(f"{name}, {extra} and more", run, table=table, **_ATTENTION)
        for extra in ("mask", "bias", "mask and bias", "mask, bias, sinks, soft cap")
        for name, run, table in (
            ("score", _forward(None, False, extras=extra), configs.SCORE_EDITED),
            ("forward", _forward(None, extras=extra), configs.FORWARD_EDITED),
            ("dq", _backward(None, "alpha", extras=extra), _dq_table(extra)),
            ("dk/dv", _backward(None, extras=extra), configs.DKDV_EDITED),
        )
    ),
    *(
        Launch(
            f"dbias, {extra} and more",
            _backward(None, "bias", extras=extra),
            table=configs.DBIAS,
            **_ATTENTION,
        )
        for extra in ("bias", "mask and bias", "mask, bias, sinks, soft cap")
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
            ("dq", _backward(None, "alpha", **_ALL), configs.DQ_FP32),
            ("dk/dv", _backward(None, **_ALL), configs.DKDV_FP32),
            ("dbias", _backward(None, "bias", **_ALL), configs.DBIAS_FP32),
            ("lazy forward", _lazy_forward(True, dtype=FP32), configs.LAZY_FORWARD_FP32),
            ("lazy dq", _lazy_backward(True, dtype=FP32), configs.LAZY_DQ_FP32),
            ("lazy dk/dv", _lazy_backward(True, dtype=FP32), configs.LAZY_DKDV_FP32),
            ("lazy dbias", _lazy_backward(True, dtype=FP32), configs.LAZY_DBIAS_FP32),
        )
    ),
]
