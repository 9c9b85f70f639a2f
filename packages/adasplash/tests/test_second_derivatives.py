"""Second derivatives of everything that has a first one: by finite differences, in O(N) memory."""

from __future__ import annotations

import pytest
import torch

from adasplash import (
    EntmaxAttention,
    LazyAttention,
    MultiheadAttention,
    adasplash,
    entmax_decode,
    lazy_attention_triton,
    scaled_dot_product_attention,
)
from shared_kernels import device
from shared_kernels.testing import assert_close, others_thorough
from shared_kernels.testing.memory import measure_memory

from .cases import BY_NAME, PER_HEAD, inputs

SMALL = {"N_q": 4, "N_k": 5, "B": 1, "D": 2, "D_v": 3}
CASES = ("plain", "grouped", "bias", "bias-per-key", "mask", "window-causal", "alibi-causal")
CASES += ("sink", "sink-causal-window", "softcap", "softcap-bias-alibi")
LENGTHS = {"varlen": [3, 0], "cu_seqlens": [0, 1, 1, 4]}


def check(f, leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


EVERY = [("plain", alpha) for alpha in (1.0, 1.02, 1.3, 2.0)]
EVERY += [(name, alpha) for name in CASES for alpha in (1.5, PER_HEAD)]


@pytest.mark.parametrize(("name", "alpha"), EVERY)
def test_attention(name, alpha):
    case = BY_NAME[name].replaced(name, **SMALL)
    tensors, options = inputs(case, alpha)
    names = list(tensors)

    def f(*leaves):
        return adasplash(**dict(zip(names, leaves, strict=True)), **options)

    check(f, tensors.values())


@pytest.mark.parametrize("name", LENGTHS)
def test_attention_of_several_lengths(name):
    B = 2 if name == "varlen" else 1
    q, k, v = (torch.randn(B, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    slopes, alpha = torch.rand(2, 2, dtype=torch.float64)
    options = {name: torch.tensor(LENGTHS[name])}
    check(
        lambda q, k, v, slopes, alpha: adasplash(
            q, k, v, 1.2 + alpha / 2, True, alibi_slopes=slopes, **options
        ),
        (q, k, v, slopes, alpha),
    )


def test_decode():
    q, k, v = (torch.randn(2, 2, n, 3, dtype=torch.float64) for n in (2, 5, 5))
    slopes = torch.rand(2, dtype=torch.float64)
    lengths = torch.tensor([3, 5])
    check(lambda *x: entmax_decode(*x[:3], lengths, alibi_slopes=x[3]), (q, k, v, slopes))


@pytest.mark.parametrize("hiding", [False, True])
@pytest.mark.parametrize("options", [{}, {"varlen": [3, 5]}, {"mask": True}], ids=str)
def test_lazy(options, hiding):
    options = {
        name: torch.tensor(x) if name == "varlen" else torch.rand(2, 1, 5, 5) > 0.3
        for name, x in options.items()
    }
    q, k, v = (torch.randn(2, n, 5, d, dtype=torch.float64) for n, d in ((4, 2), (2, 2), (2, 3)))
    bias, tau = torch.randn(4, 4, dtype=torch.float64), torch.tensor([-0.9, -0.5, 0.3, -0.2])
    hidden = torch.zeros(4, 4)
    if hiding:  # -inf, which finite differences cannot start from, is added to finite biases
        hidden[0, 1] = hidden[1, :2] = hidden[2] = -torch.inf

    def f(q, k, v, bias, tau):
        return lazy_attention_triton(q, k, v, bias + hidden, tau, 3, **options)

    check(f, (q, k, v, bias, tau.double()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": True},
        {"attn_mask": True, "dropout_p": 0.3},
        {"is_causal": True, "dropout_p": 0.3},
    ],
    ids=str,
)
def test_drop_in(options, monkeypatch):
    monkeypatch.setattr("adasplash._recomputed.TILE_SCORES", 20)
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64) for n in (4, 5, 5))
    mask = [torch.randn(4, 5, dtype=torch.float64)] if "attn_mask" in options else [None]
    options = {name: x for name, x in options.items() if name != "attn_mask"}

    def f(q, k, v, alpha, *mask):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return scaled_dot_product_attention(q, k, v, *mask, **options, alpha=alpha)

    alpha = torch.tensor([1.3, 1.7], dtype=torch.float64)
    check(f, (q, k, v, alpha, *(x for x in mask if x is not None)))


MODULES = {
    "MultiheadAttention": lambda: MultiheadAttention(4, 2, batch_first=True, learn_alpha=True),
    "MultiheadAttention, dropout": lambda: MultiheadAttention(4, 2, 0.4, batch_first=True),
    "MultiheadAttention, free keys": lambda: MultiheadAttention(
        4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True
    ),
    "EntmaxAttention": lambda: EntmaxAttention(4, 2, causal=True),
    "LazyAttention": lambda: LazyAttention(4, 2, 3),
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, need_weights):
    if need_weights and not name.startswith("Multihead"):
        return
    torch.manual_seed(0)
    module = MODULES[name]().double()
    if name == "LazyAttention":
        torch.nn.init.constant_(module.tau, -0.6)
    names = [name for name, _ in module.named_parameters()]
    leaves = [0.5 + torch.rand_like(p) for p in module.parameters()]

    def f(x, *leaves):
        arguments = (x, x, x) if "Multihead" in type(module).__name__ else (x,)
        options = {"need_weights": need_weights} if len(arguments) == 3 else {}
        with torch.random.fork_rng():
            torch.manual_seed(1)
            out = torch.func.functional_call(
                module, dict(zip(names, leaves, strict=True)), arguments, options
            )
        return out[0] if isinstance(out, tuple) else out

    x = torch.randn(1, 3, 4, dtype=torch.float64)
    check(lambda x: f(x, *leaves), [x])
    leaves = [p.detach().requires_grad_() for p in leaves]
    assert torch.autograd.gradgradcheck(lambda *p: f(x, *p), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_dtypes(dtype):
    """The gradient of a gradient penalty, as training with one needs it."""

    def gradient(dtype, *leaves):
        leaves = [x.to(dtype).requires_grad_() for x in leaves]
        out = adasplash(*leaves[:3], leaves[3], True)
        first = torch.autograd.grad(out.float().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.float().square().sum() for x in first), leaves)

    torch.manual_seed(0)
    leaves = [x.to(torch.bfloat16) for x in torch.randn(3, 2, 2, 9, 8)]
    leaves.append(torch.tensor([1.25, 1.75]))
    exact = gradient(torch.float64, *leaves)
    for found, wanted in zip(gradient(dtype, *leaves), exact, strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, "gradient")


@pytest.mark.parametrize("name", others_thorough(["lazy", "entmax"]))
def test_memory_stays_linear(name):
    N = 4096
    q, k, v = (torch.randn(1, 1, N, 8, requires_grad=True) for _ in range(3))
    bias, tau = torch.zeros(1, 9), torch.zeros(1)

    def both() -> None:
        out = lazy_attention_triton(q, k, v, bias, tau, 8) if name == "lazy" else adasplash(q, k, v)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        dq.square().sum().backward()

    assert measure_memory(both).peak < N * N * 4


def test_a_named_kernel_is_refused_and_so_is_a_third_derivative():
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    if device.interpreting() or torch.cuda.is_available():
        out = adasplash(x, x, x, backend="triton").square().sum()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            first.sum().backward()
    out = adasplash(x, x, x).square().sum()
    for _ in range(2):
        (out,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        torch.autograd.grad(out.square().sum(), x)
