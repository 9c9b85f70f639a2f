"""The drop-ins: at alpha = 1 they are PyTorch's own, in every corner of their signatures."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import adasplash
from adasplash import MultiheadAttention, scaled_dot_product_attention
from shared_kernels.testing import assert_close
from shared_kernels.testing.memory import measure_memory


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(*lead: int, N_q: int = 9, N_k: int = 7, H_kv: int | None = None):
    kv = lead if H_kv is None else (*lead[:-1], H_kv)
    sizes = ((*lead, N_q, 8), (*kv, N_k, 8), (*kv, N_k, 5))
    return [randn(*size, seed=i).requires_grad_() for i, size in enumerate(sizes)]


# --- scaled_dot_product_attention ----------------------------------------------------------------

SDPA = {
    "plain": (qkv(2, 4), {}),
    "no-batch": (qkv(), {}),
    "three-dimensions": (qkv(3), {}),
    "five-dimensions": (qkv(2, 3, 4), {}),
    "causal": (qkv(2, 4, N_k=9), {"is_causal": True}),
    "causal-fewer-keys": (qkv(2, 4), {"is_causal": True}),
    "causal-more-keys": (qkv(2, 4, N_q=5), {"is_causal": True}),
    "causal-one-key": (qkv(2, 4, N_k=1), {"is_causal": True}),
    "upper-left": (qkv(2, 4, N_q=5), {"attn_mask": causal_upper_left(5, 7)}),
    "lower-right": (qkv(2, 4, N_q=5), {"attn_mask": causal_lower_right(5, 7)}),
    "scale": (qkv(2, 4), {"scale": 0.7}),
    "scale-0": (qkv(2, 4), {"scale": 0.0}),
    "grouped": (qkv(2, 4, H_kv=2), {"enable_gqa": True}),
    "one-key-head": (qkv(2, 4, H_kv=1), {}),
    "one-batch-of-keys": ([qkv(2, 4)[0], *qkv(1, 4)[1:]], {}),
    "boolean": (qkv(2, 4), {"attn_mask": randn(2, 1, 9, 7) < 1}),
    "boolean-three": (qkv(3), {"attn_mask": randn(3, 9, 7) < 1}),
    "boolean-five": (qkv(2, 3, 4), {"attn_mask": randn(2, 1, 4, 9, 7) < 1}),
    "keys": (qkv(2, 4), {"attn_mask": randn(1, 7) < 1}),
    "bias": (qkv(2, 4), {"attn_mask": randn(4, 9, 7).requires_grad_()}),
    "bias-no-batch": (qkv(), {"attn_mask": randn(9, 7).requires_grad_()}),
    "bias-five": (qkv(2, 3, 4), {"attn_mask": randn(3, 1, 9, 7).requires_grad_()}),
}


@pytest.mark.parametrize("name", SDPA)
def test_alpha_1_is_pytorch(name):
    (q, k, v), options = SDPA[name]
    ours = scaled_dot_product_attention(q, k, v, **options, alpha=1.0)
    exact = F.scaled_dot_product_attention(q, k, v, **options)
    assert_close(ours, exact)
    mask = options.get("attn_mask")
    learned = type(mask) is torch.Tensor and mask.requires_grad  # CausalBias answers no question
    leaves = [q, k, v, mask] if learned else [q, k, v]
    weight = randn(*exact.shape, seed=9)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((exact * weight).sum(), leaves),
        strict=True,
    ):
        assert_close(a, b, "gradient")


def test_its_signature_is_pytorch_s_and_alpha():
    ours = inspect.signature(scaled_dot_product_attention).parameters
    theirs = F.scaled_dot_product_attention.__doc__.partition(")")[0].partition("(")[2]
    names = [part.partition("=")[0].strip() for part in theirs.split(",")]
    assert [*ours][: len(names)] == names
    assert {"alpha", "backend"} == set(ours) - set(names)


def test_alpha_is_passed_on():
    q, k, v = qkv(2, 4)
    for alpha in (1.5, 2.0, torch.tensor([1.2, 1.5, 1.7, 2.0], dtype=torch.float64)):
        exact = adasplash.adasplash(q, k, v, alpha, backend="reference")
        assert_close(scaled_dot_product_attention(q, k, v, alpha=alpha), exact)
    first = scaled_dot_product_attention(q, k, v, is_causal=True, alpha=2.0)
    exact = adasplash.adasplash(q[:, :, :7], k, v, 2.0, True, backend="reference")
    assert_close(first[:, :, :7], exact)


def test_a_query_without_keys_gives_zero():
    q, k, v = qkv(2, 4)
    mask = torch.ones(9, 7, dtype=torch.bool)
    mask[3] = False
    out = scaled_dot_product_attention(q, k, v, mask)
    assert bool((out[:, :, 3] == 0).all()) and bool(out.isfinite().all())
    assert scaled_dot_product_attention(*qkv(2, 4, N_q=0)).shape == (2, 4, 0, 5)
    assert bool((scaled_dot_product_attention(*qkv(2, 4, N_k=0), is_causal=True) == 0).all())


# --- dropped weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
def test_dropped_weights_are_a_mask_on_the_weights(options, monkeypatch):
    """With v = 1 the weights show; each is dropped or grown; the backward uses the same mask."""
    monkeypatch.setattr("adasplash._recomputed.TILE_SCORES", 200)
    q, k, _ = qkv(2, 4, N_k=9, H_kv=2 if "enable_gqa" in options else None)
    v = torch.eye(9, dtype=torch.float64).expand(2, k.shape[1], 9, 9).clone().requires_grad_()
    alpha = torch.tensor([1.2, 1.5, 1.7, 2.0], dtype=torch.float64, requires_grad=True)
    weights = scaled_dot_product_attention(q, k, v, **options, alpha=alpha)
    torch.manual_seed(1)
    dropped = scaled_dot_product_attention(q, k, v, None, 0.25, **options, alpha=alpha)
    kept = dropped != 0
    assert_close(dropped[kept] * 0.75, weights[kept])
    assert 0.5 < kept.sum() / (weights != 0).sum() < 0.95
    mask = kept.double() / 0.75
    exact = (
        adasplash.adasplash(q, k, v, alpha, options.get("is_causal", False), backend="reference")
        * mask
    )
    weight = randn(*exact.shape, seed=9)
    for a, b in zip(
        torch.autograd.grad((dropped * weight).sum(), (q, k, alpha)),
        torch.autograd.grad((exact * weight).sum(), (q, k, alpha)),
        strict=True,
    ):
        assert_close(a, b, "gradient")


def test_dropout_repeats_with_the_seed_and_keeps_the_mean(monkeypatch):
    monkeypatch.setattr("adasplash._recomputed.TILE_SCORES", 5000)
    q, k, v = (x.detach() for x in qkv(2, 4))

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    mean = torch.stack([run(i) for i in range(400)]).mean(0)
    assert (mean - scaled_dot_product_attention(q, k, v)).abs().mean() < 0.05
    assert bool((scaled_dot_product_attention(q, k, v, dropout_p=1.0) == 0).all())


@pytest.mark.system
def test_dropout_keeps_linear_memory():
    N = 4096
    q, k, v = (torch.randn(1, 1, N, 8, requires_grad=True) for _ in range(3))

    def both() -> None:
        scaled_dot_product_attention(q, k, v, None, 0.1, True).sum().backward()

    assert measure_memory(both).peak < N * N * 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 1.5}, ValueError, "`dropout_p` must be in"),
        ({"dropout_p": "x"}, TypeError, "`dropout_p` must be a number"),
        ({"dropout_p": 0.1, "backend": "cpu"}, NotImplementedError, "`dropout_p` must be 0"),
        (
            {"is_causal": True, "attn_mask": torch.ones(9, 7)},
            ValueError,
            "`attn_mask` must be None",
        ),
        ({"attn_mask": torch.ones(9, 8)}, ValueError, "`attn_mask` must broadcast"),
        ({"attn_mask": torch.ones(9, 7).int()}, TypeError, "`attn_mask` must be a floating"),
        ({"attn_mask": torch.ones(1, 1, 1, 9, 7)}, ValueError, "`attn_mask` must broadcast"),
        ({"attn_mask": 3}, TypeError, "`attn_mask` must be a torch.Tensor"),
        ({"alpha": 2.5}, ValueError, "`alpha` must be in"),
        ({"key": qkv(2, 2)[1], "value": qkv(2, 2)[2]}, ValueError, "enable_gqa=True"),
        ({"key": qkv(3, 4)[1]}, ValueError, "`key` must broadcast with"),
        ({"key": qkv(4)[1]}, ValueError, "`key` must have the dimensions"),
        ({"query": qkv(2, 4)[0].long()}, TypeError, "`query` must be a floating"),
    ],
)
def test_bad_input_is_named(options, error, message):
    q, k, v = qkv(2, 4)
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**{"query": q, "key": k, "value": v, **options})


# --- MultiheadAttention --------------------------------------------------------------------------

CONSTRUCTORS = {
    "plain": {},
    "no-bias": {"bias": False},
    "free-keys": {"add_bias_kv": True, "add_zero_attn": True},
    "free-zero": {"add_zero_attn": True},
    "sizes": {"kdim": 6, "vdim": 10},
}
CALLS = {
    "plain": {},
    "padding": {"key_padding_mask": torch.arange(7) >= torch.tensor([[4], [7], [6]])},
    "padding-float": {"key_padding_mask": randn(3, 7)},
    "mask": {"attn_mask": randn(9, 7) > 1},
    "mask-heads": {"attn_mask": randn(12, 9, 7)},
    "both-boolean": {
        "attn_mask": randn(9, 7) > 1,
        "key_padding_mask": torch.arange(7) >= torch.tensor([[4], [7], [6]]),
    },
    "both-float": {"attn_mask": randn(9, 7), "key_padding_mask": randn(3, 7, seed=1)},
    "causal-hint": {"attn_mask": torch.ones(9, 7, dtype=torch.bool).triu(1), "is_causal": True},
}


def modules(alpha: float = 1.0, **options):
    torch.manual_seed(0)
    exact = nn.MultiheadAttention(16, 4, dtype=torch.float64, **options)
    for parameter in exact.parameters():  # biases start at 0: move them
        nn.init.normal_(parameter, std=0.4)
    ours = MultiheadAttention(16, 4, dtype=torch.float64, **options, alpha=alpha)
    ours.load_state_dict(exact.state_dict(), strict=True)
    exact.load_state_dict(ours.state_dict(), strict=True)
    return ours, exact


def same(ours, exact, inputs, **call):
    """Outputs, weights and every gradient."""
    runs = []
    for module in (ours, exact):
        out, weights = module(*inputs, **call)
        leaves = [*inputs, *module.parameters()]
        loss = (out * randn(*out.shape, seed=8)).sum()
        if weights is not None:
            loss = loss + (weights * randn(*weights.shape, seed=9)).sum()
        runs.append((out, weights, torch.autograd.grad(loss, leaves, allow_unused=True)))
    (out, weights, grads), (out2, weights2, grads2) = runs
    assert_close(out, out2)
    if weights2 is None:
        assert weights is None
    else:
        assert_close(weights, weights2)
    for a, b in zip(grads, grads2, strict=True):
        assert_close(a, b, "gradient")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", CONSTRUCTORS)
def test_module_is_pytorch_s_at_alpha_1(options, call):
    keywords, extra = CALLS[call], CONSTRUCTORS[options]
    ours, exact = modules(**extra)
    sizes = (16, extra.get("kdim", 16), extra.get("vdim", 16))
    lengths = (9, 7, 7)
    inputs = [
        randn(n, 3, d, seed=n + d).requires_grad_() for n, d in zip(lengths, sizes, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch on masks of two kinds
        same(ours, exact, inputs, **keywords)
        same(ours, exact, inputs, average_attn_weights=False, **keywords)
        if not ("free" in options and "causal" in call):  # PyTorch hides the free keys there
            same(ours, exact, inputs, need_weights=False, **keywords)


def test_batch_first_and_no_batch():
    ours, exact = modules(batch_first=True)
    x, y = (randn(3, n, 16, seed=n).requires_grad_() for n in (9, 7))
    same(ours, exact, [x, y, y.detach().clone().requires_grad_()])
    one = [t[0].detach().requires_grad_() for t in (x, y, y)]
    padding = torch.arange(7) > 4
    for need_weights in (True, False):
        same(ours, exact, one, key_padding_mask=padding, need_weights=need_weights)
    heads = {"attn_mask": randn(4, 9, 7), "average_attn_weights": False}
    same(ours, exact, one, **heads)


def test_causal_needs_no_mask_and_both_ways_agree():
    ours, _ = modules(alpha=1.5, batch_first=True, add_zero_attn=True)
    for n_q, n_k in ((7, 7), (5, 7), (9, 7)):
        x, y = randn(3, n_q, 16), randn(3, n_k, 16, seed=1)
        mask = torch.ones(n_q, n_k, dtype=torch.bool).triu(1)
        exact, weights = ours(x, y, y, attn_mask=mask)
        assert bool((weights == 0).any())
        for need_weights in (True, False):
            assert_close(ours(x, y, y, need_weights=need_weights, is_causal=True)[0], exact)


def test_same_start_from_the_same_seed():
    for options in CONSTRUCTORS.values():
        torch.manual_seed(3)
        exact = nn.MultiheadAttention(16, 4, **options).state_dict()
        torch.manual_seed(3)
        ours = MultiheadAttention(16, 4, **options).state_dict()
        assert exact.keys() == ours.keys()
        assert all(torch.equal(ours[name], exact[name]) for name in exact)


def test_dropout_is_on_the_weights_and_in_training_only():
    module = MultiheadAttention(16, 4, 0.5, batch_first=True, dtype=torch.float64)
    x = randn(2, 9, 16)
    eye = module.eval()(x, x, x, average_attn_weights=False)[1]
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    module.train()
    _, dropped = module(x, x, x, average_attn_weights=False)
    kept = dropped != 0
    assert_close(dropped[kept] * 0.5, eye[kept])
    torch.manual_seed(0)
    out = torch.stack([module(x, x, x, need_weights=False)[0] for _ in range(200)])
    assert not torch.equal(out[0], out[1])
    exact = module.eval()(x, x, x, need_weights=False)[0]
    assert (out.mean(0) - exact).abs().mean() < 0.05


@pytest.mark.parametrize("training", [False, True])
def test_inside_pytorch_s_encoder(training):
    """alpha = 1 gives PyTorch's layer; alpha = 2 must differ: no softmax fast path in between."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, **options), 2, enable_nested_tensor=False
    )
    encoder.train(training)
    x = randn(3, 9, 16)
    padding = torch.arange(9) >= torch.tensor([[4], [9], [6]])
    causal = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    calls = (
        {},
        {"src_key_padding_mask": padding},
        {"mask": causal},
        {"mask": causal, "is_causal": True},
        {"mask": causal, "src_key_padding_mask": padding.double() * -1e30},
    )
    with torch.no_grad():
        exact = [encoder(x, **call) for call in calls]
        softmax = [layer.self_attn for layer in encoder.layers]
        for alpha in (1.0, 2.0):
            for layer, module in zip(encoder.layers, softmax, strict=True):
                layer.self_attn = MultiheadAttention.from_torch(module, alpha=alpha)
            for call, wanted in zip(calls, exact, strict=True):
                out = encoder(x, **call)
                seen = ~padding if "src_key_padding_mask" in call else padding >= 0
                if alpha == 1.0:
                    assert_close(out[seen], wanted[seen])
                else:
                    assert (out - wanted)[seen].abs().max() > 1e-3


def test_inside_pytorch_s_decoder():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 4, 32, 0.0, dtype=torch.float64)
    x, memory = randn(5, 2, 16), randn(9, 2, 16, seed=1)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    exact = layer(x, memory, tgt_mask=causal, tgt_is_causal=True)
    for name in ("self_attn", "multihead_attn"):
        setattr(layer, name, MultiheadAttention.from_torch(getattr(layer, name), alpha=1.0))
    assert_close(layer(x, memory, tgt_mask=causal, tgt_is_causal=True), exact)


def test_from_torch_shares_parameters_and_learns_alpha():
    _, exact = modules(add_bias_kv=True)
    ours = MultiheadAttention.from_torch(exact.eval(), alpha=1.4, learn_alpha=True)
    assert not ours.training and ours.in_proj_weight is exact.in_proj_weight
    assert set(ours.state_dict()) == {*exact.state_dict(), "alpha.raw"}
    x = randn(9, 3, 16)
    for need_weights in (True, False):
        ours.zero_grad()
        ours(x, x, x, need_weights=need_weights)[0].square().sum().backward()
        assert ours.alpha.raw.grad is not None and bool((ours.alpha.raw.grad != 0).all())


def test_bad_calls_of_the_module_are_named():
    module = MultiheadAttention(16, 4)
    x = torch.randn(9, 3, 16)
    bad = {
        "`query` must have shape": (x[..., :8], x, x),
        "`key` must have query's batch size": (x, x[:, :2], x[:, :2]),
        "`value` must have key's lengths": (x, x, x[:4]),
        "`key` must have shape": (x, x[0], x[0]),
    }
    for message, inputs in bad.items():
        with pytest.raises(ValueError, match=message):
            module(*inputs)
    with pytest.raises(ValueError, match="`attn_mask` must have shape"):
        module(x, x, x, attn_mask=torch.zeros(9, 8))
    with pytest.raises(ValueError, match="`key_padding_mask` must have shape"):
        module(x, x, x, key_padding_mask=torch.zeros(9, 3))
    with pytest.raises(NotImplementedError, match="enable_nested_tensor=False"):
        nested = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
        module(nested, nested, nested)
    for arguments, message in (((15, 4), "embed_dim"), ((16, 0), "num_heads")):
        with pytest.raises(ValueError, match=f"`{message}` must be"):
            MultiheadAttention(*arguments)
    with pytest.raises(ValueError, match="`alpha` must be in"):
        MultiheadAttention(16, 4, alpha=3.0)
    with pytest.raises(ValueError, match="`dropout` must be in"):
        MultiheadAttention(16, 4, -0.1)


def test_the_memory_is_linear():
    N = 8192
    module = adasplash.MultiheadAttention(8, 1, batch_first=True)
    x = torch.randn(1, N, 8)
    padding = torch.arange(N)[None] > N - 100

    def both() -> None:
        out, _ = module(x, x, x, padding, need_weights=False, is_causal=True)
        out.sum().backward()

    assert measure_memory(both).peak < N * N * 4 / 4


@pytest.mark.system
@pytest.mark.thorough
def test_they_compile_whole_for_every_length():
    module = MultiheadAttention(16, 4, batch_first=True)

    def both(x):
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        out = module(x, x, x, need_weights=False, is_causal=True)[0]
        return out, scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (9, 11, 17):
        x = torch.randn(2, N, 16)
        for a, b in zip(compiled(x), both(x), strict=True):
            assert_close(a, b, scale=0.1)
