"""Native attention against dense attention in float64, gradients by autograd."""

from __future__ import annotations

import pytest
import torch

from shared_kernels import qexp
from shared_kernels.native.attention import Arguments, backward, forward, why_not
from shared_kernels.testing.compare import assert_close
from shared_kernels.testing.instructions import ON_EACH_SET, each_instruction_set

pytestmark = ON_EACH_SET
instructions = each_instruction_set()


def dense(a: Arguments) -> torch.Tensor:
    """The same by whole matrices of scores; one sequence after the other."""
    B, H, N_q, D = a.q.shape
    N_k, group = a.k.shape[2], H // a.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (a.k, a.v))
    rows = []
    batches = [(b, 0, N_q, 0, N_k) for b in range(B)]
    if a.cu_seqlens is not None:
        ends = a.cu_seqlens.tolist()
        batches = [(0, i, j - i, i, j - i) for i, j in zip(ends, ends[1:], strict=False)]
    elif a.varlen is not None:
        batches = [(b, 0, n, 0, n) for b, n in enumerate(a.varlen.tolist())]
    for b, q0, n_q, k0, n_k in batches:
        part = slice(q0, q0 + n_q), slice(k0, k0 + n_k)
        x = a.q[b, :, part[0]] @ k[b, :, part[1]].mT * (D**-0.5 if a.scale is None else a.scale)
        if a.softcap is not None:
            x = a.softcap * torch.tanh(x / a.softcap)
        distance = (torch.arange(n_q) + n_k - n_q)[:, None] - torch.arange(n_k)
        seen = torch.ones(n_q, n_k, dtype=torch.bool)
        if a.is_causal:
            seen = seen & (distance >= 0)
        if a.window is not None:
            seen = seen & (distance.abs() < a.window)
        if a.bias is not None:
            x = x + a.bias.expand(B, H, N_q, N_k)[b, :, part[0], part[1]]
        if a.slopes is not None:
            x = x - a.slopes.view(-1, 1, 1) * distance.abs()
        if a.mask is not None:
            seen = seen & a.mask.expand(B, H, N_q, N_k)[b, :, part[0], part[1]]
        s = torch.as_tensor(a.s, dtype=torch.float64)
        alpha = (s.reshape(-1, 1, 1) if s.dim() else s) + 1
        x = x.masked_fill(~seen, -torch.inf)
        if a.s_aux is not None:
            x = torch.cat([x, a.s_aux.view(-1, 1, 1).expand(H, n_q, 1)], -1)
        p = qexp.entmax(x, alpha)[..., :n_k]
        around = (0, 0, q0, N_q - q0 - n_q)
        rows.append((b, torch.nn.functional.pad(p @ v[b, :, part[1]], around)))
    return torch.stack([sum(o for at, o in rows if at == b) for b in range(B)])


def make(B=1, H=2, H_kv=None, N_q=70, N_k=None, D=20, D_v=None, sharp=1.0, **options):
    generator = torch.Generator().manual_seed(3)
    H_kv, N_k, D_v = H_kv or H, N_q if N_k is None else N_k, D_v or D
    shapes = (B, H, N_q, D), (B, H_kv, N_k, D), (B, H_kv, N_k, D_v)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return Arguments(q * sharp, k, v, **options)


CASES = {
    "plain": make(),
    "causal": make(N_q=150, is_causal=True),
    "sharp": make(N_q=300, D=64, sharp=4.0, is_causal=True),
    "flat": make(N_q=130, sharp=0.1, is_causal=True),
    "one key": make(N_q=1),
    "many tiles": make(N_q=700, D=16, sharp=3.0),
    "decode": make(N_q=3, N_k=500, is_causal=True),
    "more queries than keys": make(N_q=90, N_k=40, is_causal=True),
    "groups": make(B=2, H=6, H_kv=2, N_q=65),
    "wide": make(N_q=40, D=130, D_v=256),
    "values narrower": make(N_q=80, D=64, D_v=5),
    "window": make(N_q=600, window=30, is_causal=True),
    "window both ways": make(N_q=600, window=70),
    "slopes": make(N_q=600, slopes=torch.tensor([0.5, 0.01]), is_causal=True),
    "negative slopes": make(N_q=500, slopes=torch.tensor([-0.02, 0.0])),
    "lengths": make(B=3, N_q=100, varlen=torch.tensor([100, 0, 37])),
    "packed": make(N_q=200, cu_seqlens=torch.tensor([0, 1, 70, 70, 200]), is_causal=True),
    "mask": make(B=2, N_q=90, mask=torch.rand(2, 1, 90, 90) > 0.6),
    "bias": make(B=2, N_q=90, bias=torch.randn(2, 90, 90)),
    "one bias for all": make(B=2, N_q=90, bias=torch.randn(90)),
    "scale": make(scale=1.0),
    "sparsemax": make(N_q=150, s=1.0, is_causal=True),
    "softmax": make(N_q=150, s=0.0, is_causal=True),
    "nearly softmax": make(N_q=150, s=0.01),
    "broad": make(N_q=150, s=0.15),
    "real power": make(N_q=150, s=0.7),
    "cubes": make(N_q=150, s=1 / 3),
    "sinks": make(N_q=150, s_aux=torch.tensor([0.5, -1.0]), is_causal=True),
    "sinks over many tiles": make(N_q=700, D=16, sharp=3.0, s_aux=torch.tensor([2.0, 30.0])),
    "sinks of softmax": make(N_q=90, s=0.0, s_aux=torch.tensor([0.5, -torch.inf])),
    "sinks, more queries": make(N_q=90, N_k=40, is_causal=True, s_aux=torch.tensor([0.5, -3.0])),
    "soft cap": make(N_q=150, softcap=0.8, is_causal=True),
    "soft cap over many tiles": make(N_q=700, D=16, sharp=3.0, softcap=2.0),
    "soft cap far away": make(N_q=90, softcap=1e4),
    "soft cap, slopes, bias, sinks": make(
        H=4,
        N_q=120,
        s=torch.tensor([0.0, 0.25, 0.5, 0.9]),
        softcap=1.5,
        slopes=torch.linspace(-0.01, 0.3, 4),
        bias=torch.randn(120, 120),
        s_aux=torch.linspace(-1, 2, 4),
    ),
    "per head": make(H=4, N_q=80, s=torch.tensor([0.0, 0.25, 0.5, 0.9])),
}


def in_dtype(a: Arguments, dtype: torch.dtype) -> Arguments:
    floats = ("q", "k", "v", "bias", "slopes", "s_aux")
    return a._replace(**{n: getattr(a, n).to(dtype) for n in floats if getattr(a, n) is not None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_float64(name, dtype):
    assert_like_dense(in_dtype(CASES[name], dtype))


def assert_like_dense(a: Arguments) -> None:
    """Output and gradients are those of dense attention in float64."""
    dtype = a.q.dtype
    assert why_not(*a[:3]) is None
    floats = ("q", "k", "v", "bias", "slopes", "s_aux")
    exact = a._replace(
        s=torch.as_tensor(a.s, dtype=torch.float64).clone().requires_grad_(),
        **{n: getattr(a, n).double().requires_grad_() for n in floats if getattr(a, n) is not None},
    )
    want = dense(exact)
    o, kept = forward(a)
    assert_close(o, want)
    assert torch.equal(o, forward(a, room=0)[0])
    d_out = torch.randn(o.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    inputs = [x for x in exact if isinstance(x, torch.Tensor) and x.requires_grad]
    found = torch.autograd.grad((want * d_out).sum(), inputs)
    grads = {id(x): grad for x, grad in zip(inputs, found, strict=True)}
    needed = [getattr(a, n) is not None for n in ("slopes", "bias", "s_aux")]
    got = backward(a, kept, d_out, True, *needed)
    for n in ("q", "k", "v", "bias"):
        if getattr(a, n) is not None:
            assert_close(getattr(got, n), grads[id(getattr(exact, n))], "gradient")
    per_head = got.s.sum((0, 2))
    assert_close(per_head if exact.s.dim() else per_head.sum(), grads[id(exact.s)], "gradient")
    for n in ("slopes", "s_aux"):
        if getattr(a, n) is not None:
            assert_close(getattr(got, n).sum((0, 2)), grads[id(getattr(exact, n))], "gradient")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_come_back_as_they_came(dtype):
    a = make(N_q=90, is_causal=True)
    half = a._replace(q=a.q.to(dtype), k=a.k.to(dtype), v=a.v.to(dtype))
    exact = a._replace(q=half.q.double(), k=half.k.double(), v=half.v.double())
    o, kept = forward(half)
    assert o.dtype == dtype
    assert_close(o, dense(exact))
    assert {x.dtype for x in backward(half, kept, torch.ones_like(o))[:3]} == {dtype}


@pytest.mark.parametrize("s", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize(
    "sharp, dtype", [(0.1, torch.float32), (3.0, torch.float32), (3.0, torch.float64)]
)
def test_a_row_s_bits_do_not_depend_on_later_tokens_or_threads(s, sharp, dtype):
    a = in_dtype(make(H=4, N_q=800, sharp=sharp, is_causal=True, s=s), dtype)
    o = forward(a)[0]
    for n in (1, 25, 100, 517):
        first = a._replace(q=a.q[:, :, :n], k=a.k[:, :, :n], v=a.v[:, :, :n])
        assert torch.equal(forward(first)[0], o[:, :, :n]), n
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(forward(a)[0], o)
    finally:
        torch.set_num_threads(before)


def test_a_nan_key_spoils_the_rows_that_see_it_and_no_others():
    a = make(N_q=600, is_causal=True)
    k = a.k.clone()
    k[0, 0, 410, 3] = torch.nan
    o, clean = forward(a._replace(k=k))[0], forward(a)[0]
    assert o[0, 0, 410:].isnan().all()
    assert torch.equal(o[0, 0, :410], clean[0, 0, :410]) and torch.equal(o[0, 1], clean[0, 1])


@pytest.mark.parametrize("sharp", [0.02, 0.3, 3.0])  # whole rows, both kinds in a block, lists
@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_value_reaches_the_queries_that_give_it_a_weight_and_no_others(value, s, sharp):
    a = make(H=1, N_q=200, sharp=sharp, is_causal=True, s=s)
    weight = forward(a._replace(v=(torch.arange(200) == 70).float().view(1, 1, 200, 1)))[0]
    v = a.v.clone()
    v[0, 0, 70, 3] = value
    o, clean = forward(a._replace(v=v))[0][0, 0], forward(a)[0][0, 0]
    reached = weight[0, 0, :, 0] > 0
    assert reached.any() and not reached[:70].any()
    want = torch.full((int(reached.sum()),), value)
    torch.testing.assert_close(o[reached, 3], want, equal_nan=True)
    others = torch.arange(20) != 3
    assert torch.equal(o[~reached], clean[~reached])
    assert_close(o[:, others], clean[:, others])


@pytest.mark.parametrize("sharp", [0.02, 0.3, 3.0])  # whole rows, both kinds in a block, lists
@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_gradients_that_are_not_finite_go_along_weights_and_nowhere_else(value, s, sharp):
    """A value of key 70 that is not finite, then a gradient of query 120."""
    a = make(H=1, N_q=200, sharp=sharp, is_causal=True, s=s)
    weight = forward(a._replace(v=torch.eye(200)[None, None]))[0][0, 0] > 0
    o, kept = forward(a)
    clean = backward(a, kept, torch.ones_like(o))

    def only(q, k, v, found):
        for name, reached in (("q", q), ("k", k), ("v", v)):
            x, same = (getattr(g, name)[0, 0] for g in (found, clean))
            assert torch.equal(~x.isfinite().all(-1), reached), name
            assert_close(x[~reached], same[~reached], "gradient")

    v, g = a.v.clone(), torch.ones_like(o)
    v[0, 0, 70, 3] = g[0, 0, 120, 3] = value
    spoilt = a._replace(v=v)
    rows = weight[:, 70]
    found = backward(spoilt, forward(spoilt)[1], torch.ones_like(o))
    only(rows, weight[rows].any(0), torch.zeros_like(rows), found)
    one = torch.arange(200) == 120
    only(one, weight[120], weight[120], backward(a, kept, g))


@pytest.mark.parametrize("sink", [torch.nan, torch.inf])
def test_a_sink_that_is_no_number_spoils_its_head_and_no_other(sink):
    a = make(N_q=50, N_k=30, is_causal=True, s_aux=torch.tensor([sink, 0.0]))
    o, kept = forward(a)
    clean = forward(a._replace(s_aux=torch.zeros(2)))[0]
    assert o[:, 0, 20:].isnan().all() and (o[:, 0, :20] == 0).all()
    assert torch.equal(o[:, 1], clean[:, 1])
    grads = backward(a, kept, torch.ones_like(o), need_sinks=True)
    assert grads.s_aux[:, 0, 20:].isnan().all() and grads.s_aux[:, 1].isfinite().all()


def test_no_keys_and_no_queries_give_zeros():
    none = make(N_q=5)._replace(k=torch.ones(1, 2, 0, 20), v=torch.ones(1, 2, 0, 20))
    assert (forward(none)[0] == 0).all()
    assert (forward(make(N_q=5, mask=torch.zeros(1, dtype=torch.bool)))[0] == 0).all()
    assert forward(make(N_q=1)._replace(q=torch.ones(1, 2, 0, 20)))[0].shape == (1, 2, 0, 20)


@pytest.mark.parametrize("size", [1e10, 1e14, 1e18, 1e25])
@pytest.mark.parametrize("s", [0.0, 0.2, 0.5, 0.7, 1.0])
def test_of_huge_scores_the_largest_wins(s, size):
    a = make(N_q=200, s=s)
    winner = dense(a._replace(q=a.q.double() * 1e9, k=a.k.double(), v=a.v.double(), s=1.0))
    assert_close(forward(a._replace(q=a.q * size))[0], winner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(8))
def test_odd_sizes_and_strides(seed, dtype):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def strided(*shape: int) -> torch.Tensor:
        """Numbers that lie in no order: dims exchanged, every second column."""
        x = torch.randn(*shape[::-1][:-1], 2 * shape[0], generator=generator)
        return x[..., ::2].permute(*range(len(shape))[::-1])

    B, H_kv, group, N_q, N_k = (draw(1, high) for high in (4, 4, 4, 90, 150))
    D, D_v, H = draw(1, 80), draw(1, 80), H_kv * group
    a = Arguments(strided(B, H, N_q, D), strided(B, H_kv, N_k, D), strided(B, H_kv, N_k, D_v))
    bias = strided(B, N_q, N_k)[:, None]
    bias = torch.where(strided(B, N_q, N_k)[:, None] > 1, -torch.inf, bias)
    mask = strided(N_k, H).T[None, :, None] > -1
    a = in_dtype(a._replace(bias=bias, mask=mask, is_causal=seed % 2 == 1), dtype)
    o, kept = forward(a)
    assert_close(o, dense(in_dtype(a, torch.float64)).nan_to_num())  # rows that see no key
    d_out = strided(*o.shape).to(dtype)
    packed = a._replace(**{n: getattr(a, n).contiguous() for n in ("q", "k", "v", "bias", "mask")})
    got, want = (backward(x, kept, d_out, need_bias=True) for x in (a, packed))
    assert all(torch.equal(x, y) for x, y in zip(got[:3], want[:3], strict=True))
    assert torch.equal(got.bias, want.bias)


@pytest.mark.parametrize("of", ["scores", "values", "weights"])
def test_denormal_numbers(of):
    a = make(N_q=200, is_causal=True)
    if of == "scores":
        a = a._replace(q=a.q * 1e-39)
    elif of == "values":
        a = a._replace(v=a.v * 1e-39)
    else:  # the other keys weigh less than the smallest normal number
        a = make(N_q=200, s=0.0, bias=torch.where(torch.arange(200) < 1, 0.0, -88.0))
    exact = dense(in_dtype(a, torch.float64))
    scale = 1e39 if of == "values" else 1.0
    assert_close((forward(a)[0].double() * scale).float(), exact * scale)


def test_steps_of_more_than_32_bits():
    # the rows lie far apart in memory that is asked for and, but for them, never touched
    a, step = make(N_q=3, N_k=40, H=1), 2**31 + 7
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    wide = torch.empty(2 * step + 40, dtype=torch.bool)
    far = wide.as_strided((1, 1, 3, 40), (0, 0, step, 1))
    far.copy_(rows > 0)
    assert torch.equal(forward(a._replace(mask=far))[0], forward(a._replace(mask=rows > 0))[0])
    wide = torch.empty(2 * 2**30 + 40)
    far = wide.as_strided((1, 1, 3, 40), (0, 0, 2**30, 1))
    far.copy_(rows)
    assert torch.equal(forward(a._replace(bias=far))[0], forward(a._replace(bias=rows))[0])


def test_why_not_names_what_is_not_taken():
    a = make()
    assert "256" in why_not(torch.ones(1, 1, 2, 300), a.k, a.v)
    assert "int32" in why_not(a.q.int(), a.k, a.v)
    assert "meta" in why_not(a.q, a.k, a.v.to("meta"))
