"""One list of cases for every backend: shape, dim, scale, and alpha in one of its forms."""

import pytest
import torch

from diffmax import _reference
from diffmax._call import Bisect
from shared_kernels.testing import Case, cpu_backends

# what CPU tensors can run on
on_each_backend = pytest.mark.parametrize("backend", cpu_backends())

CASES = [
    Case("small", shape=(3, 7), alpha=0.5),
    Case("one", shape=(4, 1), alpha=0.3),
    Case("general", shape=(2, 33), alpha=0.85),
    Case("default", shape=(5, 40), alpha=0.9),
    Case("four-fifths", shape=(5, 40), alpha=0.8),
    Case("cubes", shape=(2, 3, 17), alpha=2 / 3),
    Case("sparse", shape=(3, 130), alpha=0.05),
    Case("nearly-sparsemax", shape=(3, 50), alpha=0.001),
    Case("nearly-softmax", shape=(3, 50), alpha=0.98),
    Case("flat", shape=(3, 100), alpha=0.4, scale=0.01),
    Case("steep", shape=(3, 100), alpha=0.7, scale=30.0),
    Case("first-dim", shape=(20, 3, 2), dim=0, alpha=0.6),
    Case("middle-dim", shape=(2, 20, 3), dim=-2, alpha=0.75),
    Case("tensor", shape=(2, 3, 9), alpha=torch.tensor(0.6)),
    Case("per-head", shape=(2, 3, 4, 9), alpha=torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)),
    Case("per-row", shape=(3, 21), alpha=torch.tensor([[0.1], [0.5], [0.94]])),
    Case("per-column", shape=(21, 3), dim=0, alpha=torch.tensor([0.1, 0.5, 0.94])),
    Case("masked", shape=(4, 19), alpha=0.5, masked=True),
    Case("masked-general", shape=(4, 19), alpha=0.85, masked=True),
]


def scores(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(case.name))
    X = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    X = X * case.get("scale", 1.0)
    if case.get("masked"):
        X[1, 5:] = -torch.inf
        X[2] = -torch.inf
        X[3, 0] = torch.finfo(dtype).min
    return X.to(dtype)


def inputs(case, dtype=torch.float32):
    """The tensors of a case; alpha among them if it is one."""
    found = {"X": scores(case, dtype)}
    if isinstance(case.alpha, torch.Tensor):
        found["alpha"] = case.alpha.to(dtype)
    return found


def bound(function, case, **keywords):
    """function(X[, alpha]) with the case's dim, and its alpha where that is a number."""

    def call(X, alpha=None):
        value = alpha if isinstance(case.alpha, torch.Tensor) else case.alpha
        return function(X, value, case.get("dim", -1), **keywords)

    return call


def reference(X, alpha, dim=-1):
    """The specification itself, not by way of the op: what the op ran last is told by ours."""
    if not isinstance(alpha, torch.Tensor):
        alpha = torch.tensor(alpha, dtype=torch.float64)
    return _reference.bisect(Bisect(X, alpha, dim))


def gradients(G, Y, alpha, dim=-1):
    """dX = S (G - q), q = sum(S G) / sum(S), S = Y^alpha on the support; dalpha = sum H (G - q)."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    exact = alpha.to(Y.device, Y.dtype)
    a = 1 - exact
    support = Y != 0
    L = torch.where(support, Y, 1).log()
    S = torch.where(support, torch.exp(exact * L), 0)
    mass = S.sum(dim, keepdim=True)
    q = (S * G).sum(dim, keepdim=True) / torch.where(mass == 0, 1, mass)
    u = -a * L
    phi, term = torch.zeros_like(u), torch.full_like(u, 0.5)  # sum_k u^k / (k + 2)!
    for k in range(60):
        phi, term = phi + term, term * u / (k + 3)
    H = torch.where(support, Y * L * L * phi, 0)
    per_row = (H * (G - q)).sum(dim, keepdim=True)
    return S * (G - q), per_row.sum_to_size(alpha.shape)


def backward(G, Y, alpha, needs="X,alpha", dim=-1, backend="auto"):
    """The op's gradients from the weights Y alone."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    call = Bisect(None, alpha, dim)
    return torch.ops.diffmax.bisect_backward(G, *call, Y, needs, backend)
