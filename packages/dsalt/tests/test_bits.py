"""A row's bits depend on what it attends: not on later tokens, other rows, packing, threads."""

from __future__ import annotations

import pytest
import torch

from dsalt.kernels import dsalt_attention, select_landmarks
from shared_kernels import device

from .cases import NATIVE, needs_native

# D, landmark block (0: one list), heads per key head, scale of the scores, width of the windows
SHAPES = [
    pytest.param(16, 32, 1, 1.0, 20.0, id="blocks"),
    pytest.param(16, 8, 2, 1.0, 50.0, id="small-blocks-grouped"),
    pytest.param(8, 27, 1, 30.0, 9.0, id="odd-blocks-large-scores"),
    pytest.param(16, 100, 1, 1.0, 70.0, id="long-blocks"),
    pytest.param(4, 65, 1, 1.0, 3.0, id="block-of-65"),
    pytest.param(1, 1, 1, 1.0, 20.0, id="head-dim-1-block-of-one"),
    pytest.param(16, 0, 2, 3.0, 20.0, id="one-list"),
    pytest.param(160, 16, 1, 1.0, 20.0, id="head-dim-160"),
]


# Under the interpreter a few small ones: the kernels are the same code for all
ON_TRITON = ("blocks", "odd-blocks-large-scores", "one-list")
ON_CPU = [pytest.param("cpu", 300, 187, *p.values, id=p.id) for p in SHAPES]
EVERYWHERE = (
    ON_CPU
    + [
        pytest.param("native", 300, 187, *p.values, id=f"{p.id}-native", marks=needs_native)
        for p in SHAPES
    ]
    + [
        pytest.param("triton", 90, 57, *p.values, id=f"{p.id}-triton")
        for p in SHAPES
        if p.id in ON_TRITON and device.interpreting()
    ]
)
NAMES = ("backend", "N", "p", "D", "block", "G", "gain", "width")


class Inputs:
    """Tensors of N tokens; ``call`` attends with any part of them."""

    def __init__(self, N, D, block, G, gain, width, dtype=torch.float32, B=2, H_kv=2, hard=False):
        g = torch.Generator().manual_seed(N)

        def randn(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.block, H = block, H_kv * G
        self.q, self.k, self.v = (
            randn(B, H, N, D) * gain,
            randn(B, H_kv, N, D),
            randn(B, H_kv, N, D),
        )
        windows = torch.rand(B, H, N, generator=g) * 2 * width
        self.w = windows.int() if hard else windows
        self.scores = randn(B, H, N).float()

    def call(self, backend, rows=slice(None), last=None, stop=None, cu=None):
        """Batch elements ``rows`` of the first ``stop`` tokens, the ``last`` so many as queries."""
        q, k, v, w = (x[rows][:, :, :stop] for x in (self.q, self.k, self.v, self.w))
        N = k.shape[2]
        scores = self.scores[rows][:, :, :N]
        if self.block:
            idx = select_landmarks(scores, 4, landmark_block=self.block, cu_seqlens=cu)
        else:
            idx = select_landmarks(self.scores[rows][:, :, :20], 4)
        slots = idx.clamp(min=0).long().flatten(2)
        bias = 3 * scores.gather(2, slots).view(idx.shape)
        if last is not None:
            q, w = q[:, :, -last:], w[:, :, -last:]
            if self.block:
                first = (N - last) // self.block
                idx, bias = idx[:, :, first:], bias[:, :, first:]
        options = {"landmark_block": self.block or None, "window_ramp": 5.0, "backend": backend}
        return dsalt_attention(q, k, v, w, idx, landmark_bias=bias, cu_seqlens=cu, **options)


@pytest.mark.parametrize(NAMES, EVERYWHERE)
def test_no_bit_depends_on_later_tokens(backend, N, p, D, block, G, gain, width):
    given = Inputs(N, D, block, G, gain, width)
    whole = given.call(backend)
    for stop in (20, p, p + 1, 128, N - 1) if backend != "triton" else (p,):
        assert torch.equal(given.call(backend, stop=stop), whole[:, :, :stop]), stop
    changes = [("k", 1e4), ("w", 40), ("q", 1e3)]
    if backend != "triton":  # a kernel multiplies a zero weight with the value
        changes += [("k", torch.nan), ("v", torch.inf)]
    for name, factor in changes:
        changed = Inputs(N, D, block, G, gain, width)
        getattr(changed, name)[:, :, p:] *= factor
        assert torch.equal(changed.call(backend)[:, :, :p], whole[:, :, :p]), name


@pytest.mark.parametrize(NAMES, EVERYWHERE)
def test_no_bit_depends_on_how_many_rows_are_computed(backend, N, p, D, block, G, gain, width):
    given = Inputs(N, D, block, G, gain, width)
    whole = given.call(backend)
    for last in (1, 2, 5, 31, 64, 100) if backend != "triton" else (1, 31):
        assert torch.equal(given.call(backend, last=last), whole[:, :, -last:]), last
        now = given.call(backend, last=min(last, p), stop=p)
        assert torch.equal(now, whole[:, :, p - min(last, p) : p]), last


@pytest.mark.parametrize(NAMES, EVERYWHERE)
def test_no_bit_depends_on_other_batch_elements(backend, N, p, D, block, G, gain, width):
    given = Inputs(N, D, block, G, gain, width, B=3)
    whole = given.call(backend)
    assert torch.equal(given.call(backend, rows=slice(1, 2)), whole[1:2])
    given.k[0, 1] *= 1e3
    given.v[2, 0, 5] = torch.inf
    given.w[2] *= 7
    assert torch.equal(given.call(backend)[1:2], whole[1:2])


@pytest.mark.parametrize("backend", ["cpu", NATIVE])
@pytest.mark.parametrize(("D", "block", "G", "gain", "width"), SHAPES)
def test_no_bit_depends_on_the_pack(backend, D, block, G, gain, width):
    given = Inputs(300, D, block, G, gain, width, B=1)
    if not block:
        pytest.skip("one list names tokens of one sequence")
    cu = torch.tensor([0, 1, 71, 71, 230, 300])
    whole = given.call(backend, cu=cu)
    for start, stop in zip(cu[:-1], cu[1:], strict=True):
        alone = Inputs(300, D, block, G, gain, width, B=1)
        for name in ("q", "k", "v", "w", "scores"):
            setattr(alone, name, getattr(given, name)[:, :, start:stop])
        if stop > start:
            assert torch.equal(alone.call(backend), whole[:, :, start:stop])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("D", [16, 160])
@pytest.mark.parametrize("backend", ["cpu", NATIVE])
def test_every_dtype_and_kind_of_window(dtype, hard, D, backend):
    given = Inputs(300, D, 32, 1, 2.0, 30.0, dtype=dtype, hard=hard)
    whole = given.call(backend)
    assert torch.equal(given.call(backend, stop=187), whole[:, :, :187])
    assert torch.equal(given.call(backend, last=1), whole[:, :, -1:])
    assert torch.equal(given.call(backend, rows=slice(1, 2)), whole[1:])


@pytest.mark.parametrize("gain", [1.0, 30.0])
@pytest.mark.parametrize("backend", ["cpu", NATIVE])
def test_no_bit_depends_on_the_number_of_threads(gain, backend):
    given = Inputs(700, 16, 32, 1, gain, 100.0, B=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = given.call(backend)
        for n in (2, 3, 5):
            torch.set_num_threads(n)
            assert torch.equal(given.call(backend), one), n
    finally:
        torch.set_num_threads(before)
