"""What must hold on a GPU beyond the kernels' own tests; on a CPU the same checks at toy sizes.

`benchmarks/gpu_check.sh` runs this file with `-m gpu` on a machine that has one.
"""

from __future__ import annotations

import copy

import pytest
import torch

from adasplash import adasplash, lazy_attention_triton, triton_entmax
from difflayers import DiffusedHopfield
from diffmax import diffmax_bisect
from dsalt.kernels import dsalt_attention
from flashdiffusion import FlashDiffusion
from shared_kernels import device, pairwise
from shared_kernels.testing import assert_close, compare, tolerance

PLACES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
everywhere = pytest.mark.parametrize("where", PLACES)


@pytest.fixture(autouse=True)
def _not_interpreted():
    if device.interpreting():
        pytest.skip("the interpreter has tests of its own")


def length(where, odd=True):
    """A length that no tile divides."""
    return (1237 if where == "cuda" else 77) if odd else 1024


def windows(q, n_marks=5):
    B, H, N, _ = q.shape
    marks = torch.arange(n_marks, device=q.device, dtype=torch.int32) * (N // n_marks)
    return torch.full((B, H, N), 37.0, device=q.device), marks.expand(B, H, -1)


def lazy(q, k, v, **options):
    H = q.shape[1]
    bias = torch.linspace(-1, 1, H * 65, device=q.device).view(H, 65)
    tau = torch.full((H,), -1.0, device=q.device)
    return lazy_attention_triton(q, k, v, bias.to(q.dtype), tau.to(q.dtype), 64, **options)


def dsalt(q, k, v, **options):
    sizes, marks = windows(q)
    return dsalt_attention(q, k, v, sizes.to(q.dtype), marks, **options)


def own_points(q, k, v, **options):
    return FlashDiffusion(
        q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2), beta=0.1, normalize="none", **options
    )


# name -> (q, k, v) -> out
ATTENTION = {
    "adasplash": lambda q, k, v, **o: adasplash(q, k, v, 1.5, **o),
    "adasplash-causal": lambda q, k, v, **o: adasplash(q, k, v, 4 / 3, True, **o),
    "lazy": lazy,
    "dsalt": dsalt,
}
# name -> x -> out, along the last dimension
ROWS = {
    "diffmax": lambda x, **o: diffmax_bisect(x, 0.4, **o),
    "entmax": lambda x, **o: triton_entmax(x, 1.5, **o),
}
ALL = {
    **ATTENTION,
    "FlashDiffusion": own_points,
    **{name: lambda q, k, v, row=row: row(q.flatten(0, 2)) for name, row in ROWS.items()},
}


def qkv(where, dtype=torch.float32, N=None, D=64, heads=3):
    N = length(where) if N is None else N
    generator = torch.Generator().manual_seed(N)
    made = (torch.randn(1, heads, N, D, generator=generator).to(where, dtype) for _ in range(3))
    return list(made)


def gradients(call, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    wanted = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out)
    found = torch.autograd.grad(out, leaves, wanted, allow_unused=True)
    return [out.detach(), *(g for g in found if g is not None)]


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_odd_length(name, dtype, where):
    call = ATTENTION[name]
    compare(
        call,
        lambda q, k, v: call(q, k, v, backend="reference"),
        dict(zip("qkv", qkv(where, torch.float64), strict=True)),
        differentiable="qkv",
        dtype=dtype,
    )


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_odd_length(name, dtype, where):
    x = 3 * torch.randn(9, length(where), dtype=torch.float64)
    call = ROWS[name]
    compare(
        call,
        lambda x: call(x, backend="reference"),
        {"x": x.to(where)},
        differentiable="x",
        dtype=dtype,
    )


@everywhere
def test_products_and_neighbours_of_odd_length(where):
    X = torch.randn(length(where), 7, generator=torch.Generator().manual_seed(0)).to(where)
    wide = X.double()
    distances = (wide[:, None] - wide).square().sum(-1)
    out = FlashDiffusion(X, X, X[:, :3], beta=0.5, normalize="none")
    assert_close(out, torch.exp(-0.5 * distances) @ wide[:, :3])
    values, index = pairwise.knn(X, 6)
    assert_close(values, distances.topk(6, largest=False).values)
    assert torch.equal(index[:, 0], torch.arange(len(X), device=index.device))


@everywhere
@pytest.mark.parametrize("name", ["adasplash", "dsalt"])
def test_packed_sequences_are_those_alone(name, where):
    """cu_seqlens: an empty sequence and one token among them."""
    q, k, v = qkv(where)
    N = q.shape[2]
    bounds = [0, 1, 1, N // 3, N]
    if name == "adasplash":
        call = ATTENTION["adasplash-causal"]
    else:

        def call(q, k, v, **options):
            no_marks = torch.full((1, 3, 1), -1, device=q.device, dtype=torch.int32)
            return dsalt_attention(q, k, v, windows(q)[0], no_marks, **options)

    cu = torch.tensor(bounds, dtype=torch.int32, device=where)
    packed = gradients(lambda *x: call(*x, cu_seqlens=cu), (q, k, v))
    wanted = torch.cos(torch.arange(q.numel(), device=q.device)).view(q.shape)
    for a, b in zip(bounds, bounds[1:], strict=False):
        if a == b:
            continue
        leaves = [x[:, :, a:b].detach().clone().requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        alone = [out, *torch.autograd.grad(out, leaves, wanted[:, :, a:b])]
        for i, (x, y) in enumerate(zip(packed, alone, strict=True)):
            assert_close(x[:, :, a:b], y.double(), "gradient" if i else "forward")


@everywhere
def test_dead_rows_are_zero_and_have_zero_gradients(where):
    q, k, v = qkv(where)
    for call in (ATTENTION["adasplash"], lazy):
        dead = torch.zeros(1, dtype=torch.int32, device=where)
        for found in gradients(lambda *x, call=call, n=dead: call(*x, varlen=n), (q, k, v)):
            assert not found.any()
    x = torch.randn(4, length(where)).to(where)
    x[1] = -torch.inf
    for call in ROWS.values():
        out, grad = gradients(call, (x,))
        assert not out[1].any() and not grad[1].any() and out.isfinite().all()
        assert grad.isfinite().all() and out[0].any()


@everywhere
@pytest.mark.parametrize("name", ATTENTION)
def test_strides_beyond_two_to_the_31(name, where):
    """Two batch rows of one buffer, more than 2^31 elements apart."""
    apart = (1 << 31) + 64 if where == "cuda" else 1 << 18
    heads, N, D = 2, 200, 64
    buffer = torch.zeros(apart + 3 * heads * N * D, device=where, dtype=torch.bfloat16)
    shape, strides = (2, heads, N, D), (apart, N * D, D, 1)
    far = [buffer.as_strided(shape, strides, i * heads * N * D) for i in range(3)]
    near = [torch.randn(shape).to(where, torch.bfloat16) for _ in far]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    call = ATTENTION[name]
    assert torch.equal(call(*far), call(*near))


@everywhere
@pytest.mark.parametrize("name", ROWS)
def test_more_than_two_to_the_31_elements(name, where):
    n, N = ((1 << 31) // 4096 + 3, 4096) if where == "cuda" else (67, 96)
    x = torch.zeros(n, N, device=where, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, N).to(x)
    out = ROWS[name](x)
    assert torch.equal(out[-3:], ROWS[name](x[-3:].clone()))
    assert torch.equal(out[0], out[n // 2])


@everywhere
@pytest.mark.parametrize("name", ALL)
def test_three_runs_give_the_same_bits(name, where):
    dtype = torch.float32 if name == "FlashDiffusion" else torch.bfloat16
    inputs = qkv(where, dtype)

    def run():
        if name == "FlashDiffusion":
            return [ALL[name](*inputs)]
        return gradients(ALL[name], inputs)

    first = run()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@everywhere
@pytest.mark.parametrize("name", ALL)
def test_a_recorded_graph_replays(name, where):
    """CUDA graph: recorded once, replayed on new numbers. On a CPU: called twice on one buffer."""
    if where == "cuda" and name == "FlashDiffusion":
        pytest.skip("an estimator's product: it may choose its precision by looking at values")
    inputs, fresh = qkv(where), [x.neg() for x in qkv(where)]
    if where == "cpu":
        ALL[name](*inputs)
        for x, y in zip(inputs, fresh, strict=True):
            x.copy_(y)
        assert torch.equal(ALL[name](*inputs), ALL[name](*fresh))
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ALL[name](*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ALL[name](*inputs)
    for x, y in zip(inputs, fresh, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, ALL[name](*fresh))


@pytest.mark.system
@everywhere
@pytest.mark.parametrize("name", [*ATTENTION, *ROWS])
def test_compiled_whole(name, where):
    """fullgraph: nothing falls back to Python. The CPU form traces without a C++ compiler."""
    torch._dynamo.reset()
    how = {} if where == "cuda" else {"backend": "aot_eager"}
    inputs = qkv(where)
    compiled = torch.compile(ALL[name], fullgraph=True, **how)
    for i, (a, b) in enumerate(
        zip(gradients(compiled, inputs), gradients(ALL[name], inputs), strict=True)
    ):
        assert_close(a, b.double(), "gradient" if i else "forward")


@everywhere
def test_a_layer_moves_between_devices(where):
    layer = DiffusedHopfield(16, num_heads=2, k_neighbors=4).eval()
    stored, state = torch.randn(1, 40, 16), torch.randn(1, 5, 16)
    with torch.no_grad():
        here = layer((stored, state, stored))
        there = copy.deepcopy(layer).to(where)(
            (stored.to(where), state.to(where), stored.to(where))
        )
    scale = here.abs().max().clamp(min=1)
    assert (here - there.cpu()).abs().max() <= tolerance(torch.float32, "gradient") * scale
