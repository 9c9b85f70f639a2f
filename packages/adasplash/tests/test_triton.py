"""The kernels, in Triton's interpreter or on a GPU, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from adasplash import (
    _ops,
    adasplash,
    adasplash_no_block_mask,
    attention_stats,
    triton_entmax,
)
from adasplash._call import Attention, Lazy, Statistics
from shared_kernels import dispatch
from shared_kernels.testing import (
    assert_close,
    compare,
    others_thorough,
    parametrize,
)

from .cases import ATTENTION, BY_NAME, PER_HEAD, inputs
from .kernels import WHERE, nothing_unwritten, pytestmark  # noqa: F401


def check_rows(alpha, shape, dtype=torch.float32, dim=-1):
    tensors = {"x": 3 * torch.randn(shape, dtype=torch.float64).to(WHERE)}
    options = {"dim": dim}
    if isinstance(alpha, torch.Tensor):
        tensors["alpha"] = alpha.to(WHERE)
    else:
        options["alpha"] = alpha
    compare(
        lambda **x: triton_entmax(**x, **options, backend="triton"),
        lambda **x: triton_entmax(**x, **options, backend="reference"),
        tensors,
        differentiable=list(tensors),
        dtype=dtype,
    )
    assert dispatch.last("adasplash::entmax") == "triton"
    assert dispatch.last("adasplash::entmax_backward") == "triton"


@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.02, 1.25, 4 / 3, 1.5, 1.7, 2.0])
def test_rows(alpha):
    check_rows(alpha, (5, 70))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_rows_in_half_types(alpha, dtype):
    check_rows(alpha, (5, 70), dtype)


@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.25, 4 / 3, 1.3333333, 1.5, 2.0])
def test_rows_in_float64(alpha):
    check_rows(alpha, (5, 70), torch.float64)


def test_attention_in_float64_is_refused_with_a_reason():
    with pytest.raises(NotImplementedError, match="float64"):
        adasplash(*torch.randn(3, 1, 1, 4, 8, dtype=torch.float64, device=WHERE), backend="triton")


@pytest.mark.parametrize("n", [1, 17, 128, 129, 300])
def test_row_lengths(n):
    check_rows(1.5, (3, n))


def test_long_rows_are_streamed(monkeypatch):
    from shared_kernels.configs import Config, forcing
    from shared_kernels.triton import configs

    small = Config(BLOCK_R=2, BLOCK_N=32, num_warps=4, num_stages=1)
    with forcing(configs.ROWS_FORWARD, small), forcing(configs.ROWS_BACKWARD, small):
        check_rows(1.5, (5, 100))
        check_rows(1.02, (5, 100))
        check_rows(torch.tensor([[1.3], [1.5], [2.0]], dtype=torch.float64), (3, 100))
    with forcing(configs.ROWS_FORWARD_FP64, small), forcing(configs.ROWS_BACKWARD_FP64, small):
        check_rows(1.5, (5, 100), torch.float64)
        check_rows(
            torch.tensor([[1.3], [1.5], [2.0]], dtype=torch.float64), (3, 100), torch.float64
        )


@pytest.mark.parametrize("shape", [(), (1, 1, 7), (5, 1, 1)])
def test_rows_with_a_tensor_alpha(shape):
    check_rows(1.02 + 0.9 * torch.rand(shape, dtype=torch.float64), (5, 30, 7), dim=1)


def test_rows_at_alpha_one_in_a_tensor():
    check_rows(torch.ones(4, 1, dtype=torch.float64), (4, 20))


def test_awkward_rows():
    x = torch.randn(6, 40, device=WHERE)
    x[1] = -torch.inf
    x[2, 3] = torch.nan
    x[3] *= 1e30
    x[4, 5:] = -torch.inf
    x[5, 7] = torch.inf
    ours = triton_entmax(x, 1.5, backend="triton")
    assert_close(ours, triton_entmax(x, 1.5, backend="cpu"))
    wide = torch.randn(6, 80, device=WHERE)[:, ::2]
    assert_close(
        triton_entmax(wide, 1.5, backend="triton"), triton_entmax(wide, 1.5, backend="cpu")
    )
    assert triton_entmax(x[:0], backend="triton").shape == (0, 40)


def moved(case, alpha=1.5):
    tensors, options = inputs(case, alpha)
    options = {k: x.to(WHERE) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    return {k: x.to(WHERE) for k, x in tensors.items()}, options


def check(case, alpha=1.5, dtype=torch.float32, attend=adasplash):
    tensors, options = moved(case, alpha)

    def kernels(**x):
        out = attend(**x, **options, backend="triton")
        assert dispatch.last("adasplash::attention") == "triton"
        return out

    compare(
        kernels,
        lambda **x: attend(**x, **options, backend="reference"),
        tensors,
        differentiable=list(tensors),
        dtype=dtype,
    )
    assert dispatch.last("adasplash::attention_backward") == "triton"


# These cases meet an alpha for each head, the others one alpha; under --thorough all meet both.
OPTIONS = {
    *("grouped", "cross-more-queries", "varlen-causal-grouped", "packed-causal", "window-causal"),
    *("bias-per-head-causal", "alibi-causal", "sink-causal-window", "sink-softcap-varlen"),
    *("sink-packed-mask", "sharp"),
}


@parametrize(ATTENTION, plain={case.name for case in ATTENTION} - OPTIONS)
def test_every_case(case):
    check(case)


@parametrize(
    [c for c in ATTENTION if c.name not in ("mask", "bias", "scale", "flat")], plain=OPTIONS
)
def test_every_case_with_an_alpha_per_head(case):
    check(case, PER_HEAD)


@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.25, 4 / 3, 1.7, 2.0])
def test_every_alpha(alpha):
    check(BY_NAME["causal"].replaced("small", B=1), alpha)


@pytest.mark.parametrize(
    "name",
    others_thorough(["varlen-causal-grouped", "packed-causal", "causal", "window"], plain=2),
)
def test_without_a_block_mask(name):
    check(BY_NAME[name], PER_HEAD, attend=adasplash_no_block_mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.5, PER_HEAD])
def test_half_types(alpha, dtype):
    check(BY_NAME["grouped"], alpha, dtype)


LONG = BY_NAME["causal"].replaced("long", B=1, H=2, H_kv=1, N_q=150, N_k=200)


@parametrize(
    [
        LONG,
        LONG.replaced("long-window", window=30),
        LONG.replaced("long-packed", N_q=150, N_k=150, cu_seqlens=(0, 70, 140)),
    ]
)
@pytest.mark.parametrize("attend", others_thorough([adasplash, adasplash_no_block_mask]))
def test_several_tiles(case, attend):
    check(case, attend=attend)


@pytest.mark.parametrize("rows, columns", [((64, 64), (64, 64)), ((64, 32), (16, 64))])
def test_tiles_of_a_square_and_narrower(rows, columns):
    from adasplash._triton import configs
    from shared_kernels.configs import Config, forcing

    by_rows, by_columns = (Config(BLOCK_Q=q, BLOCK_K=k, num_warps=8) for q, k in (rows, columns))
    with (
        forcing(configs.SCORE_FP32, by_rows),
        forcing(configs.FORWARD_FP32, by_rows),
        forcing(configs.DQ_FP32, by_rows),
        forcing(configs.DKDV_FP32, by_columns),
    ):
        check(LONG)


def test_a_nan_query_harms_only_its_row():
    q, k, v = torch.randn(3, 1, 2, 70, 16, device=WHERE)
    clean = adasplash(q, k, v, backend="triton")
    q[0, 1, 5] = torch.nan
    out = adasplash(q, k, v, backend="triton")
    assert bool(out[0, 1, 5].isnan().all())
    clean[0, 1, 5] = out[0, 1, 5] = 0
    assert torch.equal(out, clean)


@pytest.mark.parametrize(
    "name",
    others_thorough(["long", "packed-causal", "varlen-causal-grouped", "mask", "bias"], plain=2),
)
def test_stats_count_what_the_kernels_visit(name):
    case = LONG if name == "long" else BY_NAME[name]
    tensors, options = moved(case, PER_HEAD)
    tensors.pop("v")
    tensors = {k: x.float() for k, x in tensors.items()}
    ours = attention_stats(**tensors, **options, backend="triton")
    assert dispatch.last("adasplash::attention_stats") == "triton"
    exact = attention_stats(**tensors, **options, backend="cpu")
    assert torch.equal(ours.support, exact.support)
    assert_close(ours.tau, exact.tau)
    assert torch.equal(ours.tile_density, exact.tile_density)
    assert bool((ours.tile_visited >= ours.tile_density).all())
    assert bool((ours.tile_visited <= 1).all())


def test_stats_of_block_diagonal_scores():
    x = 12 * torch.eye(4, device=WHERE).repeat_interleave(64, 0)[None, None]
    stats = attention_stats(x, x, alpha=1.5, backend="triton")
    assert bool((stats.tile_density == 0.25).all() and (stats.tile_visited == 0.25).all())
    elsewhere = attention_stats(x, x.roll(128, 2), alpha=1.5, backend="triton")
    assert bool((elsewhere.tile_visited == 0.25).all())
    flat = attention_stats(0 * x, x, backend="triton")
    assert bool((flat.tile_density == 1).all() and (flat.tile_visited == 1).all())
    with pytest.raises(NotImplementedError, match="tiles of 64, not of 16"):
        attention_stats(x, x, tile=16, backend="triton")
    assert attention_stats(x[:, :, :0], x, backend="triton").support.shape == (1, 1, 0)


BIASES = [
    BY_NAME["bias"].replaced("bias-and-mask", mask=True),
    *(
        BY_NAME["causal"].replaced(f"bias-{shape}", bias=shape)
        for shape in ("11QK", "BHQ1", "1H11")
    ),
    BY_NAME["varlen-causal-grouped"].replaced("bias-varlen", bias="1HQK"),
    BY_NAME["varlen-causal-grouped"].replaced("bias-varlen-per-key", bias="111K", mask=True),
    BY_NAME["packed-causal"].replaced("bias-packed", bias="1HQK"),
    BY_NAME["packed-causal"].replaced("bias-packed-per-key", bias="1H1K"),
    BY_NAME["window-causal"].replaced("bias-window", bias="11QK", alibi=True),
    BY_NAME["causal"].replaced("bias-long", B=2, H=1, N_q=70, N_k=130, bias="11QK"),
    BY_NAME["causal"].replaced("bias-long-per-query", B=1, H=2, N_q=70, N_k=130, bias="1HQ1"),
]


# one of each shape, of each way to see less, and one that is longer than a tile
DAILY = {f"bias-{x}" for x in ("and-mask", "BHQ1", "varlen-per-key", "packed", "window", "long")}


@parametrize(BIASES, plain=DAILY)
def test_the_gradient_of_any_bias(case):
    check(case, PER_HEAD)


@parametrize(
    [case for case in BIASES if case.name in ("bias-packed", "bias-long", "bias-1H11")],
    plain={"bias-packed"},
)
def test_the_gradient_of_a_bias_without_a_block_mask(case):
    check(case, PER_HEAD, attend=adasplash_no_block_mask)


def test_the_gradient_of_a_bias_in_half_precision():
    check(BY_NAME["bias-per-head-causal"], 1.5, torch.float16)


EVERYTHING = BY_NAME["varlen"].replaced(
    "everything",
    B=3,
    varlen=(0, 70, 33),
    N_q=70,
    N_k=70,
    H=4,
    H_kv=2,
    is_causal=True,
    window=40,
    alibi=True,
    mask=True,
    bias="1H1K",
)


@parametrize(
    [
        EVERYTHING,
        EVERYTHING.replaced("everything-packed", B=1, varlen=None, cu_seqlens=(0, 12, 12, 70)),
    ],
    plain={"everything-packed"},
)
def test_every_option_at_once(case):
    check(case, PER_HEAD)


@pytest.mark.parametrize("D, D_v", [(160, 160), (256, 32), (24, 200)])
def test_wide_heads(D, D_v):
    check(BY_NAME["grouped"].replaced("wide", D=D, D_v=D_v, N_q=70, N_k=70, B=1, H=2, H_kv=1))


EDITED = {"mask": True, "bias": "1H1K", "alibi": True, "window": 9}


@pytest.mark.parametrize(
    "D, D_v, options, dtype, attend",
    [
        (136, 136, {"mask": True}, torch.float32, adasplash),
        (160, 24, {"bias": "11QK"}, torch.float32, adasplash_no_block_mask),
        (256, 256, EDITED, torch.float16, adasplash),
    ],
)
def test_wide_heads_with_a_mask_or_a_bias(D, D_v, options, dtype, attend):
    sizes = {"D": D, "D_v": D_v, "N_q": 20, "N_k": 37, "B": 1, "H": 2, "H_kv": 1}
    check(BY_NAME["causal"].replaced("wide", **sizes, **options), PER_HEAD, dtype, attend)


def counting(monkeypatch, module, name):
    """The grids with which a kernel is launched."""
    kernel, grids = getattr(module, name), []

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, name, Counted())
    return grids


@pytest.mark.parametrize("tile", others_thorough([64, 32]))
def test_the_longest_column_is_split(monkeypatch, tile):
    from adasplash._triton import backward, configs
    from shared_kernels.configs import Config, forcing

    monkeypatch.setattr(backward, "LONG_COLUMN", 3)
    joined = counting(monkeypatch, backward, "_join_backward_kernel")
    N, D = 192, 16
    x = 6 * torch.eye(D)[torch.arange(N) // 64]
    q, k = x.clone(), x.clone()
    q[:, 9] = k[:64, 9] = 6  # every query sees the first 64 keys, and the 64 of its own block
    noise = 0.1 * torch.randn(5, N, D)
    tensors = {"q": q + noise[:2], "k": k + noise[2:3], "v": noise[3:4] / 0.1}
    tensors = {name: x[None].double().to(WHERE) for name, x in tensors.items()}
    stats = attention_stats(tensors["q"].float(), tensors["k"].float(), backend="triton")
    assert bool((stats.tile_density == 5 / 9).all())
    with forcing(configs.DKDV_FP32, Config(BLOCK_Q=tile, BLOCK_K=tile, num_warps=8)):
        compare(
            lambda **x: adasplash(**x, backend="triton"),
            lambda **x: adasplash(**x, backend="reference"),
            tensors,
            differentiable=["q", "k", "v"],
        )
    assert joined == [(64 // tile,)] * 2  # the tiles of one of three columns, for dk and for dv


@parametrize(
    [
        LONG,
        LONG.replaced("long-packed", N_q=150, N_k=150, cu_seqlens=(0, 70, 140)),
        LONG.replaced("long-varlen", B=2, N_q=150, N_k=150, varlen=(70, 150)),
    ],
    plain={"long-packed"},
)
def test_every_column_split(case, monkeypatch):
    from adasplash._triton import backward

    monkeypatch.setattr(backward, "LONG_COLUMN", 1)
    monkeypatch.setattr(backward, "COLUMNS_PER_SPLIT", 1)
    check(case, PER_HEAD)


def test_strided_inputs_and_an_expanded_gradient():
    wide = torch.randn(2, 37, 3, 2, 16, device=WHERE)
    grads = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x = wide.clone().to(dtype).requires_grad_()
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind()
        k = k[:1].expand(2, -1, -1, -1)
        adasplash(q, k.mT.contiguous().mT, v, 1.4, backend=backend).sum().backward()
        grads.append(x.grad)
    assert_close(*grads, "gradient")


def test_one_gradient_at_a_time():
    tensors, options = moved(BY_NAME["bias"].replaced("bias-once", B=1), PER_HEAD)
    tensors = {name: x.float() for name, x in tensors.items()}
    every = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out = adasplash(**every, **options, backend="triton").square().sum()
    wanted = dict(zip(every, torch.autograd.grad(out, list(every.values())), strict=True))
    for name in tensors:
        leaves = {n: x.clone().requires_grad_(n == name) for n, x in tensors.items()}
        out = adasplash(**leaves, **options, backend="triton").square().sum()
        assert torch.equal(torch.autograd.grad(out, leaves[name])[0], wanted[name])


def test_padding_is_zero_and_does_not_matter():
    tensors, options = moved(BY_NAME["varlen-causal-grouped"], PER_HEAD)
    tensors = {name: x.float() for name, x in tensors.items()}
    clean = adasplash(**tensors, **options, backend="triton")
    junk = torch.ones_like(clean)
    for b, n in enumerate(options["varlen"].tolist()):
        for x in (*(tensors[name] for name in "qkv"), junk):
            x[b, :, n:] = torch.nan
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = adasplash(**leaves, **options, backend="triton")
    grads = torch.autograd.grad(out, list(leaves.values()), junk)
    assert torch.equal(out, clean) and all(bool(grad.isfinite().all()) for grad in grads)
    for b, n in enumerate(options["varlen"].tolist()):
        assert bool((out[b, :, n:] == 0).all())
        assert all(bool((grad[b, :, n:] == 0).all()) for grad in grads[:3])


@pytest.mark.parametrize("N_q, N_k", [(0, 5), (5, 0), (0, 0)])
def test_no_token_at_all(N_q, N_k):
    q, k = (torch.zeros(1, 2, n, 8, device=WHERE, requires_grad=True) for n in (N_q, N_k))
    bias = torch.zeros(1, 2, N_q, N_k, device=WHERE, requires_grad=True)
    out = adasplash(q, k, k, bias=bias, backend="triton")
    out.sum().backward()
    assert out.shape == q.shape and bool((out == 0).all())
    assert q.grad.shape == q.shape and k.grad.shape == k.shape and bias.grad.shape == bias.shape


def test_two_runs_same_bits():
    runs = []
    for _ in range(2):
        tensors, options = moved(BIASES[0], PER_HEAD)
        leaves = {name: x.float().requires_grad_() for name, x in tensors.items()}
        out = adasplash(**leaves, **options, backend="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_fakes_know_the_shapes_of_what_kernels_return():
    q = torch.randn(2, 2, 20, 16, device=WHERE, requires_grad=True)
    k = torch.randn(2, 1, 30, 16, device=WHERE)
    bias = torch.randn(1, 2, 20, 30, device=WHERE)
    call = Attention(q, k, k, alpha_value=1.5, is_causal=True, bias=bias).check()
    line, tau = torch.randn(2, 7, device=WHERE), torch.zeros(2, device=WHERE)
    lazy = Lazy(q, k[:, :, :20], k[:, :, :20], line, tau, 6).check()
    for op, arguments in (
        (_ops.attention, call),
        (_ops.attention_stats, Statistics(*call)),
        (_ops.lazy, lazy),
    ):
        torch.library.opcheck(op.overload, (*arguments, "triton"), test_utils="test_faketensor")
