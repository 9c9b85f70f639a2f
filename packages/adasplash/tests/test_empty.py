"""Every size 0 in turn: empty results and zero gradients, as PyTorch's own attention gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adasplash import (
    EntmaxAttention,
    LazyAttention,
    MultiheadAttention,
    adasplash,
    adasplash_no_block_mask,
    attention_stats,
    entmax_decode,
    lazy_attention_triton,
    scaled_dot_product_attention,
    triton_entmax,
    triton_entmax15,
    triton_sparsemax,
)
from shared_kernels import device
from shared_kernels.testing import assert_close, pairwise

BACKENDS = ("triton",) if device.interpreting() else ("auto", "torch", "reference")
SIZES = {"B": 2, "H": 4, "N_q": 5, "N_k": 5, "D": 8, "D_v": 8}
EMPTY = {name: {name: 0} for name in SIZES} | {
    "B and H": {"B": 0, "H": 0},
    "N": {"N_q": 0, "N_k": 0},
    "D and D_v": {"D": 0, "D_v": 0},
    "every": dict.fromkeys(SIZES, 0),
}
OPTIONS = ("plain", "causal", "lengths", "mask", "bias", "slopes", "alpha", "window", "grouped")
OPTIONS += ("sinks",)


def tensors(sizes, grouped=False):
    B, H, N_q, N_k, D, D_v = ({**SIZES, **sizes}[name] for name in SIZES)
    H_kv = H // 2 if grouped else H
    shapes = ((B, H, N_q, D), (B, H_kv, N_k, D), (B, H_kv, N_k, D_v))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def check(out, shape, leaves):
    assert out.shape == shape
    if out.numel():  # no key: zeros
        assert bool((out == 0).all())
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and bool((grad == 0).all())


@pairwise(
    empty=EMPTY,
    option=("bias", "slopes", "sinks") if device.interpreting() else OPTIONS,
    backend=BACKENDS,
)
def test_attention(empty, option, backend):
    q, k, v = leaves = tensors(EMPTY[empty], option == "grouped")
    (B, H, N_q, D), N_k = q.shape, k.shape[2]
    options = {
        "causal": {"is_causal": True},
        "lengths": {"varlen": torch.full((B,), min(N_k, 3))},
        "mask": {"mask": torch.ones(B, 1, N_q, N_k) > 0},
        "bias": {"bias": torch.randn(1, H, N_q, N_k, requires_grad=True)},
        "slopes": {"alibi_slopes": torch.rand(H, requires_grad=True)},
        "alpha": {"alpha": torch.full((H,), 1.4, requires_grad=True)},
        "window": {"window": 2},
        "sinks": {"s_aux": torch.rand(H, requires_grad=True), "softcap": 2.0},
    }.get(option, {})
    if option == "lengths" and N_q != N_k:
        return  # lengths ask for N_q = N_k
    leaves += [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    for function in (adasplash, adasplash_no_block_mask):
        out = function(q, k, v, **options, backend=backend)
        if D == 0 and out.numel() and N_k:  # every score is 0
            assert option != "plain" or empty != "D" or bool(out.isfinite().all())
            grads = torch.autograd.grad(out.sum(), leaves)
            assert [g.shape for g in grads] == [x.shape for x in leaves]
        else:
            check(out, (B, H, N_q, v.shape[-1]), leaves)
    stats = attention_stats(q, k, **options, backend=backend)
    assert stats.support.shape == stats.tau.shape == (B, H, N_q) and str(stats)


@pairwise(empty=EMPTY, options=[{}, {"is_causal": True}, {"attn_mask": True}], backend=BACKENDS)
def test_the_drop_in_gives_what_pytorch_gives(empty, options, backend):
    q, k, v = tensors(EMPTY[empty])
    if "attn_mask" in options:
        options = {"attn_mask": torch.ones(q.shape[2], k.shape[2]) > 0}
    runs = []
    for function, more in (
        (scaled_dot_product_attention, {"alpha": 1.0, "backend": backend}),
        (F.scaled_dot_product_attention, {}),
    ):
        out = function(q, k, v, **options, **more)
        runs.append((out, torch.autograd.grad(out.sum(), (q, k, v))))
    (ours, grads), (exact, exact_grads) = runs
    assert_close(ours, exact)
    for a, b in zip(grads, exact_grads, strict=True):
        assert_close(a, b, "gradient")
    dropped = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert dropped.shape == exact.shape and dropped.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", EMPTY)
def test_lazy(empty, backend):
    sizes = EMPTY[empty] | {"N_k": EMPTY[empty].get("N_q", 5), "N_q": EMPTY[empty].get("N_q", 5)}
    if empty == "N_k":
        return  # lazy attention has one length
    q, k, v = tensors(sizes)
    B, H, N, D = q.shape
    leaves = [q, k, v, torch.randn(H, 4, requires_grad=True), torch.zeros(H, requires_grad=True)]
    for varlen in (None, torch.full((B,), min(N, 3))):
        out = lazy_attention_triton(*leaves, 3, varlen, backend=backend)
        if out.numel():
            assert D == 0 and bool(out.isfinite().all())
            torch.autograd.grad(out.sum(), leaves)
        else:
            check(out, (B, H, N, v.shape[-1]), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", EMPTY)
def test_decode(empty, backend):
    q, k, v = leaves = tensors(EMPTY[empty])
    q = q[:, :, :1]
    for lengths in {0, k.shape[2]}:
        out = entmax_decode(q, k, v, torch.full(q.shape[:1], lengths), backend=backend)
        if empty == "D" and lengths:
            assert bool(out.isfinite().all())
        else:
            assert out.shape == (*q.shape[:3], v.shape[-1])
            assert lengths and out.numel() or bool((out == 0).all())
        torch.autograd.grad(out.sum(), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_zero_and_of_no_sequence(backend):
    q, k, v = leaves = tensors({})
    check(
        adasplash(q, k, v, varlen=torch.zeros(2, dtype=torch.long), backend=backend),
        (2, 4, 5, 8),
        leaves,
    )
    q, k, v = (x[:1] for x in leaves)
    for ends in ([0], [0, 0], [0, 0, 0]):
        out = adasplash(q, k, v, cu_seqlens=torch.tensor(ends), backend=backend)
        check(out, (1, 4, 5, 8), leaves)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0,)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [triton_entmax, triton_entmax15, triton_sparsemax])
def test_rows(function, backend, shape):
    x = torch.randn(shape, requires_grad=True)
    check(function(x, backend=backend), shape, [x])


MODULES = {
    "EntmaxAttention": lambda: EntmaxAttention(16, 2, causal=True),
    "EntmaxAttention, fixed": lambda: EntmaxAttention(16, 2, learn_alpha=False, n_kv_heads=1),
    "LazyAttention": lambda: LazyAttention(16, 2, 4),
}


@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16), (0, 0, 16)], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, shape):
    module, x = MODULES[name](), torch.randn(shape, requires_grad=True)
    leaves = [x, *module.parameters()]
    check(module(x), shape, leaves)
    check(module(x, varlen=torch.full(shape[:1], min(shape[1], 1))), shape, leaves)
    if name != "EntmaxAttention, fixed":
        out, cache = module(x, use_cache=True)
        assert out.shape == shape and cache.length == shape[1]
        more, cache = module(x, past_key_value=cache, use_cache=True)
        assert more.shape == shape and cache.length == 2 * shape[1]
    if hasattr(module, "weights"):
        assert module.weights(x).shape == (shape[0], 2, shape[1], shape[1])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0), (0, 0, 0)], ids=str)
def test_multi_head_attention_gives_what_pytorch_gives(sizes, need_weights):
    torch.manual_seed(0)
    exact = nn.MultiheadAttention(16, 2, batch_first=True)
    ours = MultiheadAttention.from_torch(exact, alpha=1.0)
    dropping = MultiheadAttention(16, 2, 0.5, batch_first=True)
    B, N_q, N_k = sizes
    x = torch.randn(B, N_q, 16, requires_grad=True)
    y = torch.randn(B, N_k, 16, requires_grad=True)
    # PyTorch takes no mask here without weights: it cannot tell the sizes of an empty view
    found = ours(x, y, y, torch.zeros(B, N_k) > 0, need_weights=need_weights)
    wanted = exact(x, y, y, need_weights=need_weights)
    assert_close(found[0], wanted[0])
    assert not need_weights or found[1].shape == wanted[1].shape
    for module, out in ((ours, found[0]), (exact, wanted[0])):
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(out.sum(), (x, y)))
        assert not module.zero_grad()
    out = dropping(x, y, y, need_weights=need_weights)[0]
    assert out.shape == wanted[0].shape and out.requires_grad
