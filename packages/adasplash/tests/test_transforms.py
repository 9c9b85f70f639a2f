"""Every public callable under torch's transforms: tracing, compiling, exporting, torch.func."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adasplash import (
    AlphaParameter,
    EntmaxAttention,
    LazyAttention,
    MultiheadAttention,
    adasplash,
    adasplash_no_block_mask,
    entmax_decode,
    lazy_attention_triton,
    scaled_dot_product_attention,
    triton_entmax,
    triton_entmax15,
    triton_sparsemax,
)
from shared_kernels.testing import assert_close, others_thorough


class Call(nn.Module):
    """A function of q, k and v made of one input, with a parameter."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(3, 1, 1, 1))

    def forward(self, x):
        return self.function(*(x.unflatten(-1, (2, 8)).transpose(1, 2) * w for w in self.weight))


class Own(nn.Module):
    """``MultiheadAttention`` of one input."""

    def __init__(self, need_weights=False, **options):
        super().__init__()
        self.inner = MultiheadAttention(16, 2, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x):
        return self.inner(x, x, x, need_weights=self.need_weights, is_causal=True)[0]


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = AlphaParameter(2)

    def forward(self, x):
        return triton_entmax(x, self.alpha().mean())


def lazy(q, k, v):
    return lazy_attention_triton(q, k, v, q[0, :, :1, :4].flatten(1), q[0, :, 0, 0], 3)


def with_slopes(q, k, v):
    # made here: torch 2.7 exports no tensor that stands outside of the module
    return adasplash(q, k, v, 1.5, True, alibi_slopes=0.1 + 0.2 * torch.arange(2))


PUBLIC = {
    "adasplash": lambda: Call(with_slopes),
    "no block mask": lambda: Call(adasplash_no_block_mask),
    "bias": lambda: Call(lambda q, k, v: adasplash(q, k, v, 1.3, bias=q @ k.mT)),
    "decode": lambda: Call(
        lambda q, k, v: entmax_decode(q, k, v, torch.full(q.shape[:1], k.shape[2]))
    ),
    "drop-in": lambda: Call(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)),
    "lazy": lambda: Call(lazy),
    "rows": lambda: Call(lambda q, k, v: triton_entmax(q @ k.mT, 1.3) @ v),
    "sparsemax": lambda: Call(lambda q, k, v: triton_sparsemax(q @ k.mT) @ v),
    "entmax15": lambda: Call(lambda q, k, v: triton_entmax15(q @ k.mT, dim=1) @ v),
    "AlphaParameter": Learned,
    "EntmaxAttention": lambda: EntmaxAttention(16, 2, causal=True),
    "EntmaxAttention, fixed": lambda: EntmaxAttention(16, 2, learn_alpha=False, n_kv_heads=1),
    "LazyAttention": lambda: LazyAttention(16, 2, 4),
    "MultiheadAttention": lambda: Own(learn_alpha=True),
    "MultiheadAttention, weights": lambda: Own(True, add_bias_kv=True, add_zero_attn=True),
}
every = pytest.mark.parametrize("name", PUBLIC)


def build(name, *shape):
    torch.manual_seed(0)
    return PUBLIC[name](), torch.randn(shape or (2, 5, 16))


def gradients(module, out):
    return torch.autograd.grad(out.square().sum(), [*module.parameters()])


@pytest.mark.system
@every
@pytest.mark.parametrize("trainable", [True, False])
def test_trace(name, trainable):
    """With parameters that want a gradient, checked by torch, saved, loaded, trained."""
    module, x = build(name)
    module.requires_grad_(trainable)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants
        traced = torch.jit.trace(module, (x,))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    y = torch.randn(2, 5, 16)
    assert_close(loaded(y), module(y), scale=0.1)
    if trainable:
        for a, b in zip(gradients(loaded, loaded(y)), gradients(module, module(y)), strict=True):
            assert_close(a, b, "gradient", scale=0.1)


def test_trace_of_a_function_alone():
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    for requires_grad in (False, True):
        leaves = tuple(x.detach().requires_grad_(requires_grad) for x in (q, k, v))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for function in (scaled_dot_product_attention, adasplash):
                traced = torch.jit.trace(function, leaves)
                assert_close(traced(q, k, v), function(q, k, v), scale=0.1)
            traced = torch.jit.trace(
                lambda q, k, v: scaled_dot_product_attention(
                    q, k[:, :2], v[:, :2], enable_gqa=True
                ),
                leaves,
            )
        exact = scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        assert_close(traced(q, k, v), exact, scale=0.1)


@pytest.mark.system
@pytest.mark.parametrize("name", others_thorough(PUBLIC, plain=4))
def test_compile_and_export(name):
    module, x = build(name)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), module(x), scale=0.1)
    for a, b in zip(gradients(module, compiled(x)), gradients(module, module(x)), strict=True):
        assert_close(a, b, "gradient", scale=0.1)
    length = torch.export.Dim("N", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: length},))
    y = torch.randn(2, 9, 16)
    assert_close(program.module()(y), module(y), scale=0.1)


@pytest.mark.system
@pytest.mark.parametrize("name", ["attention", "drop-in", "module"])
def test_an_alpha_that_changes_is_compiled_once(name):
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    block = EntmaxAttention(16, 2, learn_alpha=False)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(alpha):
        if name == "attention":
            return adasplash(q, k, v, alpha)
        if name == "drop-in":
            return scaled_dot_product_attention(q, k, v, alpha=alpha, is_causal=True)
        return adasplash(
            *(
                p(q.transpose(1, 2).flatten(2)).unflatten(-1, (2, 8)).transpose(1, 2)
                for p in (block.q_proj, block.k_proj, block.v_proj)
            ),
            alpha,
        )

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=count, fullgraph=True, dynamic=True)
    for i in range(12):
        alpha = 1.05 + 0.07 * i
        assert_close(compiled(alpha), call(alpha), scale=0.5)
    # up to some version behind 2.7, PyTorch takes the first value of a float for a constant
    assert len(graphs) == 1 or (len(graphs) == 2 and torch.__version__ < (2, 8))


@every
def test_fake_and_meta_tensors(name):
    module, x = build(name)
    shape = module(x).shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        out = module(fake)
        assert out.shape == shape and type(out).__name__ == "FakeTensor"
        out.sum().backward()
    with torch.device("meta"):
        module = PUBLIC[name]()
    if isinstance(module, Call) and name in ("adasplash", "decode"):
        return  # what they hold is on the CPU
    out = module(x.to("meta"))
    assert out.shape == shape and out.is_meta
    out.sum().backward()


@every
def test_torch_func(name):
    """grad, jacrev and gradients per sample, against autograd and a loop."""
    module, x = build(name)
    parameters = {key: p.detach() for key, p in module.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(module, parameters, sample[None]).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        exact = gradients(module, module(sample[None]))
        alone = torch.func.grad(loss)(parameters, sample)
        for key, wanted in zip(parameters, exact, strict=True):
            assert_close(alone[key], wanted, "gradient", scale=0.1)
            assert_close(found[key][i], wanted, "gradient", scale=0.1)

    def small(sample):
        return torch.func.functional_call(module, parameters, sample)[..., 0].sum(1)

    with torch.no_grad():
        assert torch.func.vmap(lambda s: small(s[None]))(x[:0]).shape[0] == 0
    jacobian = torch.func.jacrev(small)(x)
    assert_close(jacobian, torch.autograd.functional.jacobian(small, x), "gradient", scale=0.1)
