"""Native lazy attention against dense attention in float64, gradients by autograd."""

from __future__ import annotations

import pytest
import torch

from shared_kernels.native.lazy import Arguments, backward, forward
from shared_kernels.testing.compare import assert_close
from shared_kernels.testing.instructions import ON_EACH_SET, each_instruction_set

pytestmark = ON_EACH_SET
instructions = each_instruction_set()


def dense(a: Arguments) -> torch.Tensor:
    B, H, N, _ = a.q.shape
    k, v = (x.repeat_interleave(H // a.k.shape[1], 1) for x in (a.k, a.v))
    i = torch.arange(N)
    distance, window = i[:, None] - i, a.bias.shape[1] - 1
    near = (distance >= 0) & (distance <= window)
    x = a.q @ k.mT * a.scale + torch.where(near, a.bias[:, distance.clamp(0, window)], 0.0)
    seen = (distance >= 0).expand(B, H, N, N)
    if a.mask is not None:
        seen = seen & a.mask
    if a.varlen is not None:
        seen = seen & (i[:, None] < a.varlen.view(-1, 1, 1, 1))
    p = x.masked_fill(~seen, -1e30).softmax(-1)
    w = (p + a.tau[:, None, None] / (i[:, None] + 1)).relu()
    return torch.where(seen, w, 0.0) @ v


def make(B=1, H=2, H_kv=None, N=70, D=20, D_v=None, window=9, tau=-1.0, sharp=1.0, **options):
    generator = torch.Generator().manual_seed(3)
    H_kv, D_v = H_kv or H, D_v or D
    shapes = (B, H, N, D), (B, H_kv, N, D), (B, H_kv, N, D_v), (H, window + 1)
    q, k, v, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return Arguments(q * sharp, k, v, bias, torch.linspace(tau, tau + 0.3, H), D**-0.5, **options)


# No weight of a case lies within rounding of 0, where the derivative jumps.
CASES = {
    "plain": make(),
    "lifted": make(N=150, tau=0.2),
    "softmax": make(N=150, tau=-0.3, H=2),
    "one token": make(N=1),
    "long": make(N=500, D=16, sharp=3.0, window=100),
    "sharp": make(N=300, D=64, sharp=100.0, tau=0.4),
    "groups": make(B=2, H=6, H_kv=2, N=65),
    "wide": make(N=40, D=130, D_v=256),
    "no window": make(window=0, N=130),
    "window beyond the start": make(window=200, N=130),
    "lengths": make(B=3, N=100, tau=0.1, varlen=torch.tensor([100, 0, 37])),
    "mask": make(B=2, N=90, tau=0.1, mask=torch.rand(2, 1, 90, 90) > 0.6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_float64(name, dtype):
    a = CASES[name]
    a = a._replace(**{n: getattr(a, n).to(dtype) for n in a._fields[:5]})
    exact = a._replace(**{n: getattr(a, n).double().requires_grad_() for n in a._fields[:5]})
    want = dense(exact)
    o, lse = forward(a)
    assert_close(o, want)
    d_out = torch.randn(o.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    for got, grad in zip(
        backward(a, lse, d_out).values(),
        torch.autograd.grad((want * d_out).sum(), exact[:5]),
        strict=True,
    ):
        assert_close(got, grad, "gradient")


@pytest.mark.parametrize("tau", [-1.0, 0.5])
def test_bits_do_not_depend_on_later_tokens_or_threads(tau):
    a = make(H=4, N=500, tau=tau)
    o, lse = forward(a)
    for n in (1, 25, 100, 317):
        first = a._replace(q=a.q[:, :, :n], k=a.k[:, :, :n], v=a.v[:, :, :n])
        assert torch.equal(forward(first)[0], o[:, :, :n]), n
    grads = backward(a, lse, o).values()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(forward(a)[0], o)
        assert all(map(torch.equal, backward(a, lse, o).values(), grads))
    finally:
        torch.set_num_threads(before)
