"""The device functions against torch in float64, interpreted (TRITON_INTERPRET=1) or on a GPU."""

import os

import pytest
import torch

from shared_kernels import device
from shared_kernels.testing.tolerances import tolerance

FLOAT32 = tolerance(torch.float32)
ROUNDING32 = tolerance(torch.float32, "rounding")
ROUNDING64 = tolerance(torch.float64, "rounding")

pytest.importorskip("triton")

INTERPRETED = device.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a GPU"
)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from shared_kernels.triton import INTERPRET, dot, math, threshold, tiles  # noqa: E402

BLOCK = 64


# --------------------------------------------------------------------------------------
# kernels under test: each is one device function over one block


@triton.jit
def _dot_kernel(
    a_ptr, b_ptr, c_ptr, o_ptr, K: tl.constexpr, BLOCK: tl.constexpr, HAS_ACC: tl.constexpr
):
    b_a = tiles.load_tile(a_ptr, 0, BLOCK, K, BLOCK, K, K)
    b_b = tiles.load_tile(b_ptr, 0, K, BLOCK, K, BLOCK, BLOCK)
    if HAS_ACC:
        b_c = tiles.load_tile(c_ptr, 0, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK)
        b_o = dot.dot_acc(b_a, b_b, b_c)
    else:
        b_o = dot.dot(b_a, b_b)
    tiles.store_tile(o_ptr, b_o, 0, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK)


@triton.jit
def _unary_kernel(x_ptr, o_ptr, e, n, BLOCK: tl.constexpr, OP: tl.constexpr, FAST: tl.constexpr):
    b_x = tiles.load_row(x_ptr, 0, n, BLOCK)
    if OP == "log2":
        b_o = math.log2(b_x, FAST)
    elif OP == "exp2":
        b_o = math.exp2(b_x)
    elif OP == "relu":
        b_o = math.relu(b_x)
    elif OP == "cast":
        b_o = b_x
    else:
        b_o = math.power(b_x, e, FAST)
    tiles.store_row(o_ptr, b_o, 0, n, BLOCK)


@triton.jit
def _threshold_kernel(
    x_ptr, o_ptr, tau_ptr, p, n, N_ITER: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    b_x = tiles.load_row(x_ptr + i * n, 0, n, BLOCK, other=-float("inf"))
    b_tau = tl.max(b_x, 0) - 1.0
    for _ in range(N_ITER):
        b_w, b_p = threshold.weight_pair(math.relu(b_x - b_tau), p, P)
        b_tau += threshold.newton_update(tl.sum(b_p, 0), tl.sum(b_w, 0), p, P)
    b_w, b_p = threshold.weight_pair(math.relu(b_x - b_tau), p, P)
    tiles.store_row(o_ptr + i * n, b_p, 0, n, BLOCK)
    tl.store(tau_ptr + i, b_tau)


@triton.jit
def _update_kernel(f_ptr, g_ptr, o_ptr, p, n, BLOCK: tl.constexpr, P: tl.constexpr):
    b_f = tiles.load_row(f_ptr, 0, n, BLOCK)
    b_g = tiles.load_row(g_ptr, 0, n, BLOCK)
    tiles.store_row(o_ptr, threshold.newton_update(b_f, b_g, p, P), 0, n, BLOCK)


@triton.jit
def _copy_kernel(
    x_ptr,
    y_ptr,
    start,
    n,
    stride_x,
    stride_xd,
    stride_y,
    stride_yd,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b_x = tiles.load_tile(x_ptr, start, n, stride_x, BLOCK_N, D, BLOCK_D, stride_xd)
    tiles.store_tile(y_ptr, b_x, start, n, stride_y, BLOCK_N, D, BLOCK_D, stride_yd)


@triton.jit
def _loop_copy_kernel(
    x_ptr, y_ptr, n, stride, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    for i_n in range(tl.cdiv(n, BLOCK_N)):
        b_x = tiles.load_tile(x_ptr, i_n * BLOCK_N, n, stride, BLOCK_N, D, BLOCK_D)
        tiles.store_tile(y_ptr, b_x, i_n * BLOCK_N, n, stride, BLOCK_N, D, BLOCK_D)


@triton.jit
def _offsets_kernel(o_ptr, start, stride, stride_d, BLOCK: tl.constexpr):
    b_o = tiles.offsets(start, stride, BLOCK, BLOCK, stride_d)
    o_n = tl.arange(0, BLOCK)
    tl.store(o_ptr + o_n[:, None] * BLOCK + o_n[None, :], b_o)


# --------------------------------------------------------------------------------------


def unary(op, x, e=1.0, fast=False, dtype=torch.float32):
    out = torch.full_like(x, float("nan"), dtype=dtype)
    block = triton.next_power_of_2(x.numel())
    _unary_kernel[(1,)](x, out, e, x.numel(), BLOCK=block, OP=op, FAST=fast)
    return out


def relative(out, exact):
    out, exact = out.double().cpu(), exact.double().cpu()
    return float((out - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


def test_the_mode_is_read_from_the_environment():
    # Compiled code that runs on CPU tensors (pytest --compiled) is not interpreted.
    assert bool(INTERPRET.value) == (os.environ.get("TRITON_INTERPRET", "0") == "1")


@pytest.mark.parametrize("has_acc", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_sums_in_fp32(dtype, has_acc):
    torch.manual_seed(0)
    a = torch.randn(BLOCK, 32, device=DEVICE).to(dtype)
    b = torch.randn(32, BLOCK, device=DEVICE).to(dtype)
    c = torch.randn(BLOCK, BLOCK, device=DEVICE)
    out = torch.full((BLOCK, BLOCK), float("nan"), device=DEVICE)
    _dot_kernel[(1,)](a, b, c, out, K=32, BLOCK=BLOCK, HAS_ACC=has_acc)
    exact = a.double() @ b.double() + (c.double() if has_acc else 0.0)
    assert relative(out, exact) < ROUNDING32  # products of half types are exact in fp32


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("e", [0.25, 1.0 / 3.0, 1.0, 1.7, 9.0])
def test_power_of_a_non_negative_number(e, fast):
    u = torch.cat([torch.zeros(3), torch.logspace(-30, 0, 50), torch.rand(30) * 20]).to(DEVICE)
    out = unary("power", u, e, fast)
    exact = u.double() ** e
    assert (out[:3] == 0).all()
    kept = exact > 1e-37
    bound = 1e-6 * max(1.0, e) * (40 if fast and not INTERPRET.value else 4)
    assert float(((out.double() - exact) / exact)[kept].abs().max()) < bound


def test_power_keeps_nan_and_is_zero_at_zero_for_every_exponent():
    u = torch.tensor([0.0, float("nan"), 1.0, float("inf")], device=DEVICE)
    out = unary("power", u, 1.5)
    assert out[0] == 0 and out[1].isnan() and out[2] == 1 and out[3].isinf()
    assert unary("power", u, 0.0)[0] == 0
    assert unary("power", u, -1.0)[0] == 0


def test_logarithm_and_exponential_to_base_two():
    x = torch.logspace(-30, 30, 64, device=DEVICE)
    assert relative(unary("log2", x), x.double().log2()) < ROUNDING32
    assert relative(unary("log2", x, fast=True), x.double().log2()) < ROUNDING32
    y = torch.cat([torch.linspace(-100, 20, 64), torch.tensor([-float("inf")])]).to(DEVICE)
    out = unary("exp2", y)
    assert out[-1] == 0
    assert float((out[:-1].double() / y[:-1].double().exp2() - 1).abs().max()) < ROUNDING32
    assert unary("exp2", x[:4].to(torch.bfloat16)).dtype == torch.float32


def test_double_precision_stays():
    x = torch.logspace(-200, 0, 64, device=DEVICE, dtype=torch.float64)
    assert relative(unary("log2", x, fast=True, dtype=x.dtype), x.log2()) < ROUNDING64 / 100
    assert relative(unary("exp2", -x, dtype=x.dtype), torch.exp2(-x)) < ROUNDING64 / 100
    assert relative(unary("power", x, 0.75, dtype=x.dtype), x**0.75) < ROUNDING64 / 10
    assert unary("power", torch.zeros_like(x), 0.75).abs().max() == 0


def test_relu_keeps_nan():
    x = torch.tensor([-1.0, 2.0, float("nan"), 0.0, -float("inf")], device=DEVICE)
    out = unary("relu", x)
    assert out[2].isnan()
    assert out[[0, 1, 3, 4]].tolist() == [0.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_round_to_nearest_like_torch(dtype):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500) * 10, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0])])
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), float("nan")])]).to(DEVICE)
    out = unary("cast", x, dtype=dtype)
    assert torch.equal(out[:-1], x[:-1].to(dtype)) and out[-1].isnan()


@pytest.mark.parametrize("s", [1.0, 0.5, 1.0 / 3.0, 0.25, 0.2, 0.7])
def test_newton_finds_the_threshold(s):
    torch.manual_seed(0)
    rows, n = 5, 50
    scores = torch.randn(rows, n, device=DEVICE) * 3
    scores[1, 10:] = -float("inf")
    scores[2, :] = 0.25  # all tied: weights 1/n
    x = (scores - scores.amax(1, keepdim=True)) * s
    out, tau = torch.full_like(x, float("nan")), torch.full_like(x[:, 0], float("nan"))
    P = threshold.integer_exponent(s)
    assert P == {1.0: 1, 0.5: 2, 1.0 / 3.0: 3, 0.25: 4}.get(s, 0)
    _threshold_kernel[(rows,)](x, out, tau, 1.0 / s, n, N_ITER=14, BLOCK=BLOCK, P=P)

    # bisection in float64
    z, p = x.double(), 1.0 / s
    low, high = z.amax(1, keepdim=True) - 1, z.amax(1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        enough = ((z - middle).clamp_min(0) ** p).sum(1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    exact = (z - low).clamp_min(0) ** p
    assert float((tau.double() - low[:, 0]).abs().max()) < 2 * ROUNDING32
    assert float((out.double() - exact).abs().max()) < FLOAT32 / 2
    assert torch.equal(out == 0, exact == 0)
    if P:  # the integer powers agree with the general one
        general = torch.full_like(out, float("nan"))
        _threshold_kernel[(rows,)](x, general, tau, 1.0 / s, n, N_ITER=14, BLOCK=BLOCK, P=0)
        assert float((general - out).abs().max()) < FLOAT32 / 2


@pytest.mark.parametrize("P", [0, 1, 2, 3, 4])
def test_newton_update_is_its_formula_and_stands_still_on_empty_rows(P):
    p = P or 2.5
    f = torch.tensor([0.0, 1.0, 4.0, 1e-6, float("nan")], device=DEVICE)
    g = torch.tensor([0.0, 2.0, 3.0, 1e-3, 1.0], device=DEVICE)
    out = torch.full_like(f, 7.0)
    _update_kernel[(1,)](f, g, out, p, 5, BLOCK=8, P=P)
    exact = (f.double() - f.double() ** (1 - 1 / p)) / g.double()
    assert out[0] == 0 and out[1].abs() < ROUNDING32 and out[4].isnan()
    assert torch.allclose(out[2:4].double(), exact[2:4], rtol=FLOAT32 / 2)


def test_integer_exponents_are_found_within_rounding():
    assert [threshold.integer_exponent(s) for s in (1, 0.5, 1 / 3, 0.25, 0.2)] == [1, 2, 3, 4, 0]
    assert threshold.integer_exponent(4 / 3 - 1) == 3  # alpha - 1
    assert threshold.integer_exponent(1 - 2 / 3) == 3  # 1 - alpha
    assert threshold.integer_exponent(0.333) == 0
    assert threshold.integer_exponent(0.0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d,block_d", [(16, 16), (20, 32), (1, 16)])
@pytest.mark.parametrize("start", [0, 16, 32])
def test_tiles_read_zeros_outside_and_write_nothing_there(dtype, d, block_d, start):
    torch.manual_seed(0)
    n, extra = 37, 3
    x = torch.randn(n, d + extra, device=DEVICE).to(dtype)[:, :d]  # a stride that is not d
    y = torch.full((n + 40, d + 1), 5.0, device=DEVICE, dtype=dtype)
    _copy_kernel[(1,)](
        x,
        y,
        start,
        n,
        x.stride(0),
        1,
        y.stride(0),
        1,
        BLOCK_N=16,
        D=d,
        BLOCK_D=block_d,
    )
    expected = torch.full_like(y, 5.0)
    expected[start : min(start + 16, n), :d] = x[start : start + 16]
    assert torch.equal(y, expected)
    # as rows beyond n are masked in the store too, look at them through a longer target
    z = torch.full((start + 16, block_d), 5.0, device=DEVICE, dtype=dtype)
    _load_only(x, z, start, n, d, block_d)
    assert (z[n:] == 0).all() and (z[start:, d:] == 0).all()
    assert torch.equal(z[start : min(n, start + 16), :d], x[start : start + 16])


@triton.jit
def _load_only_kernel(
    x_ptr, z_ptr, start, n, stride_x, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    b_x = tiles.load_tile(x_ptr, start, n, stride_x, BLOCK_N, D, BLOCK_D)
    tiles.store_tile(z_ptr, b_x, start, start + BLOCK_N, BLOCK_D, BLOCK_N, BLOCK_D, BLOCK_D)


def _load_only(x, z, start, n, d, block_d):
    _load_only_kernel[(1,)](x, z, start, n, x.stride(0), BLOCK_N=16, D=d, BLOCK_D=block_d)


def test_tiles_of_a_transposed_matrix():
    x = torch.randn(20, 32, device=DEVICE).T  # rows are 32, columns 20 apart by 32
    y = torch.full((32, 20), float("nan"), device=DEVICE)
    _copy_kernel[(1,)](
        x,
        y,
        16,
        32,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        y.stride(1),
        BLOCK_N=16,
        D=20,
        BLOCK_D=32,
    )
    assert torch.equal(y[16:], x[16:]) and y[:16].isnan().all()


def test_tiles_in_a_loop():
    x = torch.randn(70, 16, device=DEVICE)
    y = torch.full_like(x, float("nan"))
    _loop_copy_kernel[(1,)](x, y, 70, 16, BLOCK_N=32, D=16, BLOCK_D=16)
    assert torch.equal(x, y)


def test_offsets_do_not_wrap_at_two_to_the_31():
    out = torch.zeros(16, 16, dtype=torch.int64, device=DEVICE)
    rows = torch.arange(16, device=DEVICE)[:, None] + 2**20
    columns = torch.arange(16, device=DEVICE)[None, :]
    for stride, stride_d in ((2**15, 1), (1, 2**28), (2**28, 2**28)):
        _offsets_kernel[(1,)](out, 2**20, stride, stride_d, BLOCK=16)
        assert torch.equal(out, rows * stride + columns * stride_d)


@triton.jit
def _plain_max_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # [N]
    b_x = tl.load(x_ptr + tl.arange(0, N))
    b_max, _ = tl.max(b_x, axis=0, return_indices=True)
    tl.store(y_ptr, b_max)


@triton.jit
def _plain_cumsum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # [N]
    o_n = tl.arange(0, N)
    b_x = tl.load(x_ptr + o_n)
    tl.store(y_ptr + o_n, tl.cumsum(b_x, axis=0).to(tl.float32))


@triton.jit
def _plain_sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # [N]
    b_x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr, tl.sum(b_x, axis=0).to(tl.float32))


@triton.jit
def _plain_dot_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # [N, N]
    o_x = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(x_ptr + o_x)
    # [N, N] x [N, N]
    tl.store(y_ptr + o_x, tl.dot(b_x, b_x).to(tl.float32))


@pytest.mark.skipif(not INTERPRET.value, reason="not interpreted")
@pytest.mark.parametrize(
    ("kernel", "x", "exact", "right_in"),
    [
        (_plain_max_kernel, torch.tensor([1.0, 5.0, float("nan"), 3.0]), [float("nan")], ["3.7"]),
        (_plain_cumsum_kernel, torch.ones(4).bfloat16(), [1.0, 2.0, 3.0, 4.0], ["3.7"]),
        (_plain_sum_kernel, torch.ones(4).bfloat16(), [4.0], []),
        (_plain_dot_kernel, torch.ones(16, 16).bfloat16(), [16.0] * 256, []),
        (_plain_dot_kernel, torch.full((32, 32), 127).char(), [516128.0] * 1024, ["3.7", "3.9"]),
    ],
    ids=[
        *("NaN in a maximum with its place", "bf16 running sum", "bf16 sum", "bf16 product"),
        "int8 product",
    ],
)
def test_where_the_interpreter_differs(kernel, x, exact, right_in):
    """A change of these rows is one of Triton's interpreter: docs/shared-kernels/compiled.md."""
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in ("3.7", "3.9"):
        pytest.skip(f"nobody has looked at the interpreter of Triton {version}")
    y = torch.zeros(len(exact))
    kernel[(1,)](x, y, x.shape[-1])
    is_right = torch.equal(y.nan_to_num(-1.0), torch.tensor(exact).nan_to_num(-1.0))
    assert is_right == (version in right_in)


@pytest.mark.skipif(not INTERPRETED, reason="holds the interpreter")
def test_the_language_is_replaced_once_per_launch(monkeypatch):
    """Triton replaces it at every call of a device function; that gives the same bits."""
    from triton.runtime import interpreter

    once, searches = interpreter._patch_lang, []
    patch = getattr(once, "patch", None)
    if patch is None:
        pytest.skip(f"left as it is with Triton {triton.__version__}")

    def counted(function):
        searches.append(function.__name__)
        return patch(function)

    def run():
        searches.clear()
        o, tau = torch.empty(3, BLOCK), torch.empty(3)
        _threshold_kernel[(3,)](x, o, tau, 2.0, BLOCK, N_ITER=6, BLOCK=BLOCK, P=2)
        return o, len(searches)

    x = torch.randn(3, BLOCK)
    monkeypatch.setattr(once, "patch", counted)
    remembered, few = run()
    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    repeated, many = run()
    assert few <= 3 and many > 20 and torch.equal(remembered, repeated)
    assert not once.patched  # the next launch replaces the language again
    assert tl.core.is_builtin(tl.load)  # and this one has put it back
