"""What the packages claim of memory and threads: linear growth, no leak, safe from several threads.

`hatch run memory` writes docs/memory.md from what is measured here.
"""

from __future__ import annotations

import gc
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adasplash import adasplash, lazy_attention_triton, triton_entmax
from difflayers import DiffusedHopfield, retrieve
from diffmax import diffmax_bisect
from dsalt import DSALTLMHeadModel
from dsalt.kernels import dsalt_attention
from flashdiffusion import DiffusionMap, FlashDiffusion
from shared_kernels import pairwise
from shared_kernels.testing import measure_memory, others_thorough

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
measured: dict[str, tuple[list[int], list[int], float]] = {}


def qkv(N, D=16, heads=2):
    return [torch.randn(1, heads, N, D, requires_grad=True) for _ in range(3)]


def trained(out, *inputs):
    torch.autograd.grad(out.square().sum(), inputs)


def entmax_attention(N):
    q, k, v = qkv(N)
    return lambda: trained(adasplash(q, k, v, 1.5, is_causal=True), q, k, v)


def softmax_attention(N):
    q, k, v = qkv(N)
    return lambda: trained(adasplash(q, k, v, 1.0), q, k, v)


def lazy_attention(N):
    q, k, v = qkv(N)
    bias, tau = torch.zeros(2, 65), torch.full((2,), -1.0)
    return lambda: trained(lazy_attention_triton(q, k, v, bias, tau, 64), q, k, v)


def window_attention(N):
    q, k, v = qkv(N)
    windows, landmarks = torch.full((1, 2, N), 64.0), torch.randint(0, N, (1, 2, 16))
    return lambda: trained(dsalt_attention(q, k, v, windows, landmarks), q, k, v)


def language_model(N):
    model = DSALTLMHeadModel(64, 32, 2, 2, n_min=8, n_max=32, k_lmk=8)
    ids = torch.randint(0, 64, (1, N))
    return lambda: model(ids, labels=ids).loss.backward()


def diffusion_product(N):
    X = torch.randn(N, 3)
    return lambda: FlashDiffusion(X, X, X, beta=1.0)


def diffusion_map(N):
    X = torch.randn(N, 3).numpy()
    return lambda: DiffusionMap(beta=1.0, n_components=3, tol=1e-4).fit(X)


def neighbours(N):
    X = torch.randn(N, 8)
    return lambda: pairwise.knn(X, 5, exclude_self=True)


def sparse_memory(N):
    layer = DiffusedHopfield(input_size=16, use_sparse=True, k_neighbors=4)
    stored, state = torch.randn(1, N, 16), torch.randn(1, 4, 16)
    return lambda: layer((stored, state, stored)).sum().backward()


LINEAR = {
    "adasplash, forward and backward, α = 1.5": (entmax_attention, 1024),
    "adasplash, forward and backward, α = 1": (softmax_attention, 1024),
    "lazy attention, forward and backward": (lazy_attention, 1024),
    "dsalt attention, forward and backward": (window_attention, 2048),
    "dsalt language model, a training step": (language_model, 1024),
    "FlashDiffusion, one product": (diffusion_product, 4096),
    "DiffusionMap, a fit": (diffusion_map, 2048),
    "nearest neighbours": (neighbours, 4096),
    "DiffusedHopfield, sparse, a training step": (sparse_memory, 2048),
}


@pytest.mark.parametrize("name", others_thorough(LINEAR))
def test_memory_grows_linearly(name):
    """Over four sizes, from N to 8 N: an N × N buffer would have an exponent of 2."""
    build, first = LINEAR[name]
    sizes = [first, 2 * first, 4 * first, 8 * first]
    peaks = []
    for N in sizes:
        torch.manual_seed(0)
        peaks.append(measure_memory(build(N)).peak)
    exponent = math.log(peaks[-1] / peaks[-2]) / math.log(sizes[-1] / sizes[-2])
    measured[name] = sizes, peaks, exponent
    assert exponent < 1.25
    assert peaks[-1] < 4 * sizes[-1] ** 2  # bytes: one float32 N × N buffer


SMALL = {
    "diffmax": lambda x: diffmax_bisect(x, 0.4),
    "entmax": lambda x: triton_entmax(x, 1.5),
    "attention": lambda x: adasplash(*x.view(1, 1, -1, 8).expand(3, 1, 1, -1, 8), 1.5),
    "windows": lambda x: dsalt_attention(
        *x.view(1, 1, -1, 8).expand(3, 1, 1, -1, 8),
        torch.full((1, 1, x.numel() // 8), 5),
        torch.full((1, 1, 1), -1),
    ),
    "diffusion": lambda x: FlashDiffusion(x, x, x, beta=1.0),
    "memory": lambda x: retrieve(x, x, beta=2.0).patterns,
    "neighbours": lambda x: pairwise.knn(x, 3)[0],
}


@pytest.mark.parametrize("name", SMALL)
def test_several_threads_get_what_one_gets(name):
    call = SMALL[name]
    inputs = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(24)]
    alone = [call(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(call, inputs * 4))
    assert all(torch.equal(a, b) for a, b in zip(alone * 4, together, strict=True))


def resident() -> int:
    """Most bytes this process ever held."""
    resource = pytest.importorskip("resource", reason="Windows does not count resident memory")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def calls(name, n):
    x = torch.randn(16, 8, requires_grad=name not in ("diffusion", "neighbours"))
    for _ in range(n):
        out = SMALL[name](x)
        if x.requires_grad:
            torch.autograd.grad(out.sum(), x)


def growth(name, n):
    """Objects and bytes that n calls leave behind, after as many to warm up."""
    calls(name, 200)
    gc.collect()
    gc.freeze()  # what other tests left is neither counted nor searched
    try:
        objects, held = len(gc.get_objects()), resident()
        calls(name, n)
        gc.collect()
        return len(gc.get_objects()) - objects, resident() - held
    finally:
        gc.unfreeze()


@pytest.mark.system
@pytest.mark.parametrize("name", others_thorough(SMALL))
def test_nothing_grows_over_many_calls(name):
    objects, held = growth(name, 500)
    assert objects < 50 and held < 8 << 20


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_nothing_grows_over_ten_thousand_calls(name):
    objects, held = growth(name, 10_000)
    assert objects < 50 and held < 8 << 20


@pytest.fixture(scope="module", autouse=True)
def page():
    yield
    if not os.environ.get("WRITE_MEMORY") or set(measured) != set(LINEAR):
        return
    rows = ""
    for name, (sizes, peaks, exponent) in measured.items():
        shown = ", ".join(f"{peak / 1e6:.1f}" for peak in peaks)
        rows += f"| {name} | {sizes[0]} … {sizes[-1]} | {shown} | {exponent:.2f} |\n"
    PAGE.write_text(
        f"""# Memory against length

Peak memory above the inputs on CPU, counted by PyTorch's allocator, at four lengths N that double,
and the exponent of its growth over the last doubling: 1 is linear, an N × N buffer has 2. Written
by `hatch run memory` (torch {torch.__version__}); a test holds every exponent below 1.25.

| | N | peak in MB | exponent |
|---|---|---|---|
{rows}""",
        encoding="utf-8",
    )
