"""The kernels, in Triton's interpreter or on a GPU, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from adasplash import adasplash, adasplash_no_block_mask, triton_entmax
from shared_kernels import device, dispatch
from shared_kernels.testing import assert_close, compare, parametrize, poisoned_empty

from .cases import ATTENTION, BY_NAME, PER_HEAD, inputs

pytestmark = pytest.mark.skipif(
    not (device.interpreting() or torch.cuda.is_available()),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)
WHERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _nothing_unwritten():
    with poisoned_empty():
        yield


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


@pytest.mark.parametrize("n", [1, 17, 128, 129, 300])
def test_row_lengths(n):
    check_rows(1.5, (3, n))


def test_long_rows_are_streamed(monkeypatch):
    from adasplash._triton import configs
    from shared_kernels.configs import Config, forcing

    small = Config(BLOCK_R=2, BLOCK_N=32, num_warps=4, num_stages=1)
    with forcing(configs.ROWS_FORWARD, small), forcing(configs.ROWS_BACKWARD, small):
        check_rows(1.5, (5, 100))
        check_rows(1.02, (5, 100))
        check_rows(torch.tensor([[1.3], [1.5], [2.0]], dtype=torch.float64), (3, 100))


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


def test_float64_is_refused_with_a_reason():
    with pytest.raises(NotImplementedError, match="float64"):
        triton_entmax(torch.randn(2, 3, dtype=torch.float64, device=WHERE), backend="triton")


def check(case, alpha=1.5, dtype=torch.float32, attend=adasplash):
    tensors, options = inputs(case, alpha)
    options = {k: x.to(WHERE) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    tensors = {k: x.to(WHERE) for k, x in tensors.items()}
    compare(
        lambda **x: attend(**x, **options, backend="triton"),
        lambda **x: attend(**x, **options, backend="reference"),
        tensors,
        differentiable=[name for name in tensors if name != "bias"],
        dtype=dtype,
    )
    assert dispatch.last("adasplash::attention") == "triton"
    assert dispatch.last("adasplash::attention_backward") == "triton"


@parametrize(ATTENTION)
def test_every_case(case):
    check(case)


@parametrize([c for c in ATTENTION if c.name not in ("mask", "bias", "scale", "flat")])
def test_every_case_with_an_alpha_per_head(case):
    check(case, PER_HEAD)


@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.25, 4 / 3, 1.7, 2.0])
def test_every_alpha(alpha):
    check(BY_NAME["grouped"], alpha)


@pytest.mark.parametrize("name", ["causal", "varlen-causal-grouped", "packed-causal", "window"])
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
@pytest.mark.parametrize("attend", [adasplash, adasplash_no_block_mask])
def test_several_tiles(case, attend):
    check(case, attend=attend)


def test_tiles_narrower_than_a_square():
    from adasplash._triton import configs
    from shared_kernels.configs import Config, forcing

    narrow = Config(BLOCK_Q=64, BLOCK_K=32, num_warps=8)
    with (
        forcing(configs.SCORE, narrow),
        forcing(configs.FORWARD, narrow),
        forcing(configs.DQ, narrow),
        forcing(configs.DKDV, Config(BLOCK_Q=16, BLOCK_K=64, num_warps=8)),
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


def test_the_gradient_of_bias_is_refused_with_a_reason():
    tensors, options = inputs(BY_NAME["bias"])
    leaves = {k: x.float().to(WHERE).requires_grad_() for k, x in tensors.items()}
    out = adasplash(**leaves, **options, backend="triton")
    with pytest.raises(NotImplementedError, match="gradient of `bias`"):
        out.sum().backward()
