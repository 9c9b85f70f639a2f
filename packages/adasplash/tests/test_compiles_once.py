"""Lengths are run-time values: no graph and no kernel is compiled again for another length."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

from adasplash import (
    EntmaxAttention,
    LazyAttention,
    adasplash,
    lazy_attention_triton,
    scaled_dot_product_attention,
    triton_entmax,
)
from shared_kernels import device

pytestmark = pytest.mark.system
LENGTHS = (3, 64, 100, 129)


def qkv(n: int) -> list[torch.Tensor]:
    return [torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3)]


def lazy(q, k, v, bias, tau):
    return lazy_attention_triton(q, k, v, bias, tau, 8)


GRAPHS = {
    "rows": (lambda x: triton_entmax(x, 1.5), lambda n: [torch.randn(5, n)]),
    "attention": (lambda q, k, v: adasplash(q, k, v, 1.5, is_causal=True), qkv),
    "lengths": (
        lambda *x: adasplash(*x[:3], 1.5, True, x[3]),
        lambda n: [*qkv(n), torch.tensor([n])],
    ),
    "mask": (
        lambda *x: adasplash(*x[:3], 1.5, mask=x[3]),
        lambda n: [*qkv(n), torch.ones(n, n) > 0],
    ),
    "drop-in": (lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), qkv),
    "lazy": (lazy, lambda n: [*qkv(n), torch.randn(2, 9), torch.zeros(2)]),
    "EntmaxAttention": (EntmaxAttention(32, 2, causal=True), lambda n: [torch.randn(2, n, 32)]),
    "LazyAttention": (LazyAttention(32, 2, 8), lambda n: [torch.randn(2, n, 32)]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_one_graph_for_all_lengths(name):
    call, inputs = GRAPHS[name]
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=count, fullgraph=True, dynamic=True)
    for n in LENGTHS:
        compiled(*inputs(n))
    assert len(graphs) == 1


SCRIPT = """
import json
import torch
from adasplash._call import ActiveSums, Attention, Lazy, Tiles
from adasplash._triton import backward, forward, lazy
from shared_kernels.offline.compiler import compiling

with compiling("sm_90") as kernels:
    for n in (1, 77, 640, 2048):
        q, theta = torch.zeros(2, 2, n, 64, dtype=torch.bfloat16), torch.zeros(2, 2, n)
        wide, tiles = theta.unsqueeze(-1).expand(q.shape), -(-n // 64)
        call = Attention(q, q, q, alpha_value=1.5, is_causal=True, window=n, save=True)
        forward.launch_attention_forward(call)
        squares = torch.ones(4, tiles, tiles, dtype=torch.int8)
        backward.launch_attention_backward(call, Tiles(theta, theta, wide, squares), q, frozenset())
        call = Lazy(q, q, q, torch.zeros(2, 9), torch.zeros(2), 8, save=True)
        lazy.launch_lazy_forward(call)
        saved = ActiveSums(theta, theta, wide.unsqueeze(-2).expand(-1, -1, -1, 2, -1))
        lazy.launch_lazy_backward(call, saved, q, frozenset())
found = {}
for kernel, _ in kernels:
    found.setdefault(kernel.metadata.name, set()).add(kernel.report_key)
print(json.dumps({name: len(keys) for name, keys in found.items()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (device.has_triton() and platform.system() == "Linux" and platform.machine() == "x86_64"),
    reason="compiles kernels, which needs triton on Linux x86_64",
)
def test_one_kernel_for_all_lengths():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert len(compiled) == 9 and set(compiled.values()) == {1}, compiled
