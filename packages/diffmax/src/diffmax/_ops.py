"""The op torch.ops.diffmax.bisect, and bisect_backward beside it.

    diffmax_bisect(X, alpha, ...)   api.py: checks, the call
        -> bisect(call, backend)    here; fp32 under autocast
            -> Triton | native | PyTorch | reference, chosen by shared_kernels.dispatch
    loss.backward()
        -> bisect_backward          first derivatives of the backend that ran
        -> _autograd.second         second derivatives

Every backend keeps the weights alone for the backward pass.

One kernel is registered for every device; it asks where the tensors are. ROCm comes through the
CUDA key. The key of Ascend's NPUs (PrivateUse1) is registered by name, and only where torch_npu can
be imported; PyTorch runs on the NPU itself. torch_npu is not imported here.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from shared_kernels import native, rows
from shared_kernels.calls import replaced
from shared_kernels.ops import Backend, define_op
from shared_kernels.rows import batch_first

from . import _autograd
from ._call import Bisect, LinearLoss, Support, Weights
from ._rows import spread

_NPU = ("PrivateUse1",) if importlib.util.find_spec("torch_npu") is not None else ()


def _decomposed(call: Bisect) -> Tensor:
    """The weights in PyTorch's own operators, for `run_decompositions`."""
    s = 1 - spread(call.alpha, call.X.shape, call.dim)
    x = call.X.movedim(call.dim, -1)
    return rows.in_operators(x, s, call.ensure_sum_one).movedim(-1, call.dim)


def _batched(x: Tensor, at: int | None, rank: int, size: int) -> Tensor:
    return batch_first(x, at, rank) if at is not None else x.expand(size, *x.shape)


def _vmap(
    info: Any, in_dims: Any, X: Tensor, alpha: Tensor, dim: int = -1, *rest: Any
) -> tuple[Any, Any]:
    """The batch goes in front; `dim` counts from the end."""
    rank = X.dim() - (in_dims[0] is not None)
    X = _batched(X, in_dims[0], rank, info.batch_size)
    return bisect.overload(X, batch_first(alpha, in_dims[1], rank), dim % rank - rank, *rest), 0


def _backward_vmap(
    info: Any,
    in_dims: Any,
    G: Tensor,
    *rest: Any,
) -> tuple[Any, Any]:
    n = len(Bisect._fields)
    call, (Y, needs, *backend) = Bisect(*rest[:n]), rest[n:]
    at_G, at, at_Y = in_dims[0], Bisect(*in_dims[1 : n + 1]), in_dims[n + 1]
    rank = Y.dim() - (at_Y is not None)
    G, Y = (_batched(x, place, rank, info.batch_size) for x, place in ((G, at_G), (Y, at_Y)))
    alpha = call.alpha
    if at.alpha is None:  # one alpha for the batch has one gradient per member all the same
        alpha = alpha.expand(info.batch_size, *alpha.shape)
    else:
        alpha = alpha.movedim(int(at.alpha), 0)
    rows_alpha = batch_first(alpha, 0, rank)
    call = replaced(call, X=None, alpha=rows_alpha, dim=call.dim % rank - rank)
    dX, d_alpha = bisect.backward(G, *call, Y, needs, *backend)
    wanted = needs.split(",")
    d_alpha = d_alpha.reshape(alpha.shape) if "alpha" in wanted else d_alpha
    return (dX, d_alpha), tuple(0 if field in wanted else None for field in ("X", "alpha"))


def _group_why_not(call: LinearLoss) -> str | None:
    return "the reference knows one device, no group" if call.group else None


bisect = define_op(
    "diffmax::bisect",
    Bisect,
    {
        "triton": Backend(
            "diffmax._triton.rows:launch_bisect_forward",
            "diffmax._triton.rows:launch_bisect_backward",
            Weights,
        ),
        "native": Backend(
            "diffmax._native:bisect",
            "diffmax._native:bisect_backward",
            Weights,
            why_not=lambda call: native.why_not(call.X),
        ),
        "torch": Backend("diffmax._torch:bisect", "diffmax._torch:bisect_backward", Weights),
        "reference": Backend("diffmax._reference:bisect"),
    },
    gradients=("X", "alpha"),
    drops=("X",),
    second=_autograd.second,
    autocast=torch.float32,
    vmap=_vmap,
    backward_vmap=_backward_vmap,
    keys=_NPU,
    decomposition=_decomposed,
)

linear_loss = define_op(
    "diffmax::linear_loss",
    LinearLoss,
    {
        "triton": Backend(
            "diffmax._triton.linear:launch_linear_loss",
            "diffmax._triton.linear:launch_linear_loss_backward",
            Support,
        ),
        "native": Backend(
            "diffmax._native:linear_loss",
            "diffmax._native:linear_loss_backward",
            Support,
            why_not=lambda call: native.why_not(call.hidden),
        ),
        "torch": Backend(
            "diffmax._torch_linear:linear_loss",
            "diffmax._torch_linear:linear_loss_backward",
            Support,
        ),
        "reference": Backend("diffmax._reference:linear_loss", why_not=_group_why_not),
    },
    gradients=("hidden", "weight", "bias", "alpha"),
    vmap="each",
)
