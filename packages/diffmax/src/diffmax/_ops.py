"""torch.ops.diffmax.bisect and torch.ops.diffmax.bisect_backward.

    diffmax_bisect(X, alpha, ...)                  api.py: checks
        -> torch.ops.diffmax.bisect                here: schema, fake, vmap, fp32 under autocast
            -> Triton kernel | PyTorch | reference chosen by shared_kernels.dispatch
    loss.backward()
        -> bisect's autograd                       _autograd.py
            -> torch.ops.diffmax.bisect_backward   here; it has its own autograd: double backward

On a CPU, where X alone wants a gradient, bisect_escort and escort_backward take their places: the
forward pass keeps the escort distribution Y^alpha / sum(Y^alpha), which the solver all but has, and
the backward pass is that of softmax: no powers. Long rows that are mostly zeros need neither.

One kernel is registered for every device; it asks where the tensors are. ROCm comes through the
CUDA key. The key of Ascend's NPUs (PrivateUse1) is registered by name, and only where torch_npu can
be imported; PyTorch runs on the NPU itself. torch_npu is not imported here.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from shared_kernels import rows
from shared_kernels.ops import register_op

from . import _autograd
from ._rows import spread

# Rows of this length whose alpha is below 1/2 go back through their support alone.
_LONG = 2048
_NPU = ("PrivateUse1",) if importlib.util.find_spec("torch_npu") is not None else ()


def _like(X: Tensor, dim: int) -> Tensor:
    return torch.empty(X.movedim(dim, -1).shape, dtype=X.dtype, device=X.device).movedim(-1, dim)


def _bisect_fake(X, alpha, dim=-1, n_iter=50, ensure_sum_one=True, backend="auto"):
    return _like(X, dim)


def _backward_fake(G, Y, alpha, dim=-1, alpha_grad=True, backend="auto"):
    return _like(Y, dim), alpha.new_empty(alpha.shape)


def _escort_fake(X, alpha, dim=-1, n_iter=50, ensure_sum_one=True, backend="auto"):
    mass = _like(X.narrow(dim, 0, 1) if X.shape[dim] else X.sum(dim, keepdim=True), dim)
    return _like(X, dim), _like(X, dim), mass


def _escort_backward_fake(G, Y, alpha, escort, mass, dim=-1, backend="auto"):
    return _like(Y, dim)


def _bisect_operators(X, alpha, dim=-1, n_iter=50, ensure_sum_one=True, backend="auto"):
    s = 1 - spread(alpha, X.shape, dim)
    return rows.in_operators(X.movedim(dim, -1), s, ensure_sum_one).movedim(-1, dim)


def _batch_first(x: Tensor, batch_dim: int | None, rank: int) -> Tensor:
    """The batch in front of `rank` dimensions; without a batch broadcasting does the rest."""
    if batch_dim is None:
        return x
    x = x.movedim(batch_dim, 0)
    return x.reshape(x.shape[0], *(1,) * (rank + 1 - x.dim()), *x.shape[1:])


def _rows_vmap(call, info, in_dims, tensors, alpha, alpha_dim, dim, rest):
    """Put the batch in front of every tensor; `dim` counts from the end."""
    rank = tensors[0].dim() - (in_dims[0] is not None)
    dim = dim % rank - rank
    tensors = [_batch_first(x, d, rank) for x, d in zip(tensors, in_dims, strict=True)]
    tensors = [x if x.dim() > rank else x.expand(info.batch_size, *x.shape) for x in tensors]
    return call(*tensors, _batch_first(alpha, alpha_dim, rank), dim, *rest)


def _bisect_vmap(info, in_dims, X, alpha, dim=-1, *rest):
    return _rows_vmap(bisect, info, in_dims[:1], [X], alpha, in_dims[1], dim, rest), 0


def _backward_vmap(info, in_dims, G, Y, alpha, dim=-1, alpha_grad=True, backend="auto"):
    if in_dims[2] is None:  # one alpha for the batch has one gradient per member all the same
        alpha = alpha.expand(info.batch_size, *alpha.shape)
    else:
        alpha = alpha.movedim(in_dims[2], 0)
    rest = (alpha_grad, backend)
    dX, d_alpha = _rows_vmap(bisect_backward, info, in_dims[:2], [G, Y], alpha, 0, dim, rest)
    return (dX, d_alpha.reshape(alpha.shape)), (0, 0)


def _escort_vmap(info, in_dims, X, alpha, dim=-1, *rest):
    found = _rows_vmap(bisect_escort, info, in_dims[:1], [X], alpha, in_dims[1], dim, rest)
    return found, (0, 0, 0)


def _escort_backward_vmap(info, in_dims, G, Y, alpha, escort, mass, dim=-1, backend="auto"):
    def call(G, Y, escort, mass, alpha, dim):
        return escort_backward(G, Y, alpha, escort, mass, dim, backend)

    tensors, of_tensors = [G, Y, escort, mass], (*in_dims[:2], *in_dims[3:5])
    return _rows_vmap(call, info, of_tensors, tensors, alpha, in_dims[2], dim, ()), 0


def choose_bisect(X: Tensor, alpha: Tensor, number: object, dim: int, backend: str):
    """The op to call: `bisect`, or `bisect_escort` where a backward pass on a CPU gains by it.

    number: alpha as it was given, because a tensor's value is not read.
    """
    is_wanted = torch.is_grad_enabled() and X.requires_grad and not alpha.requires_grad
    # a trace is compared with one without gradients; an exported program is one for both
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        is_wanted = False
    is_served = X.device.type == "cpu" and X.dtype in (torch.float32, torch.float64)
    is_sparse = X.shape[dim] >= _LONG and isinstance(number, float) and number < 0.5
    if is_wanted and is_served and not is_sparse and backend in ("auto", "cpu"):
        return lambda *args: bisect_escort(*args)[0]
    return bisect


bisect = register_op(
    "diffmax::bisect",
    "(Tensor X, Tensor alpha, int dim=-1, int n_iter=50, bool ensure_sum_one=True, "
    "str backend='auto') -> Tensor",
    implementations={
        "triton": "diffmax._triton.forward:launch_bisect_forward",
        "cpu": "diffmax._cpu:bisect",
        "reference": "diffmax._reference:bisect",
    },
    fake=_bisect_fake,
    setup_context=_autograd.bisect_context,
    backward=_autograd.bisect_grad,
    autocast=torch.float32,
    vmap=_bisect_vmap,
    keys=_NPU,
    decomposition=_bisect_operators,
)

bisect_backward = register_op(
    "diffmax::bisect_backward",
    "(Tensor G, Tensor Y, Tensor alpha, int dim=-1, bool alpha_grad=True, str backend='auto') "
    "-> (Tensor, Tensor)",
    implementations={
        "triton": "diffmax._triton.backward:launch_bisect_backward",
        "cpu": "diffmax._cpu:bisect_backward",
        "reference": "diffmax._reference:bisect_backward",
    },
    fake=_backward_fake,
    setup_context=_autograd.backward_context,
    backward=_autograd.backward_grad,
    vmap=_backward_vmap,
    keys=_NPU,
)

bisect_escort = register_op(
    "diffmax::bisect_escort",
    "(Tensor X, Tensor alpha, int dim=-1, int n_iter=50, bool ensure_sum_one=True, "
    "str backend='auto') -> (Tensor, Tensor, Tensor)",
    implementations={"cpu": "diffmax._cpu:bisect_escort"},
    fake=_escort_fake,
    setup_context=_autograd.escort_context,
    backward=_autograd.escort_grad,
    autocast=torch.float32,
    vmap=_escort_vmap,
)

escort_backward = register_op(
    "diffmax::escort_backward",
    "(Tensor G, Tensor Y, Tensor alpha, Tensor escort, Tensor mass, int dim=-1, "
    "str backend='auto') -> Tensor",
    implementations={"cpu": "diffmax._cpu:escort_backward"},
    fake=_escort_backward_fake,
    setup_context=_autograd.escort_backward_context,
    backward=_autograd.escort_backward_grad,
    vmap=_escort_backward_vmap,
)
