"""The bits of a row do not depend on the future, on other sequences, on padding or on lengths."""

from __future__ import annotations

import functools

import pytest
import torch

from adasplash import adasplash, lazy_attention_triton
from shared_kernels import device

from .cases import NATIVE

KERNELS = device.interpreting()
# Below this length the CPU path takes whole tiles; a list of keys depends on all rows of a tile.
N, KEPT, H = (70, 40, 1) if KERNELS else (100, 66, 2)  # the interpreter is slow
CALLS = {
    "softmax": lambda *x, **o: adasplash(*x, 1.0, True, **o),
    "alpha 1.3": lambda *x, **o: adasplash(*x, 1.3, True, **o),
    "alpha 1.5": lambda *x, **o: adasplash(*x, 1.5, True, **o),
    "alpha 2": lambda *x, **o: adasplash(*x, 2.0, True, **o),
    "slopes": lambda *x, **o: adasplash(
        *x, 1.5, True, **o, alibi_slopes=torch.tensor([0.1, 0.3])[:H]
    ),
    "sinks and a soft cap": lambda *x, **o: adasplash(
        *x, 1.5, True, **o, s_aux=torch.tensor([0.3, -0.2])[:H], softcap=2.0
    ),
    "lazy": lambda *x, **o: lazy_attention_triton(
        *x, torch.linspace(-1, 1, 18).view(2, 9)[:H], torch.tensor([-1.0, -0.5])[:H], 8, **o
    ),
}
RUNS = [(name, "triton" if KERNELS else "torch") for name in CALLS]
if not KERNELS:
    RUNS += [pytest.param(name, *NATIVE.values, marks=NATIVE.marks) for name in CALLS]


def qkv(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, H, N, 16, generator=generator).to(dtype) for _ in range(3)]


def replaced(tensors, where):
    """Other values at ``where``, large enough to move every maximum."""
    others = [x.clone() for x in tensors]
    for i, x in enumerate(others):
        noise = torch.randn(x[where].shape, generator=torch.Generator().manual_seed(9 + i))
        x[where] = (5 * noise).to(x.dtype)
    return others


@pytest.mark.parametrize("dtype", [torch.float32] if KERNELS else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_a_row_keeps_its_bits(name, backend, dtype):
    call, x = functools.partial(CALLS[name], backend=backend), qkv(dtype)
    out = call(*x)
    future = replaced(x, (slice(None), slice(None), slice(KEPT, None)))
    assert torch.equal(call(*future)[:, :, :KEPT], out[:, :, :KEPT])
    assert torch.equal(call(*replaced(x, 1))[0], out[0])
    assert torch.equal(call(*(t[:1] for t in x)), out[:1])
    lengths = torch.tensor([KEPT, N])
    padded = call(*x, varlen=lengths)
    assert torch.equal(call(*future, varlen=lengths)[0], padded[0])
    if backend != "torch":  # there a tile does not know how long the sequence is
        assert torch.equal(call(*(t[:, :, :KEPT] for t in x)), out[:, :, :KEPT])
        assert torch.equal(padded[0, :, :KEPT], out[0, :, :KEPT])
