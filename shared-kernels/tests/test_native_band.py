"""Native attention over a band and landmarks against dense attention in float64."""

from __future__ import annotations

import pytest
import torch

from shared_kernels.native.band import Band, backward, forward, why_not
from shared_kernels.testing.compare import assert_close
from shared_kernels.testing.instructions import ON_EACH_SET, each_instruction_set

pytestmark = ON_EACH_SET
instructions = each_instruction_set()
GRADIENTS = ("q", "k", "v", "windows", "bias")


def dense(a: Band) -> torch.Tensor:
    """The same by whole matrices of factors and scores."""
    B, H, N_q, _ = a.q.shape
    N_k, group = a.k.shape[2], H // a.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (a.k, a.v))
    key = torch.arange(N_k)
    d = torch.arange(N_k - N_q, N_k)[:, None] - key
    w = a.windows[..., None]
    # no gradient at the ends of the edge, which clamp would give
    m = torch.where((d > w) & (d < w + a.ramp), (a.ramp + w - d) / a.ramp, (d <= w).to(w.dtype))
    idx = a.landmarks.long()
    gate = torch.ones(idx.shape, dtype=a.q.dtype) if a.bias is None else a.bias.exp()
    gate = torch.where((idx >= 0) & (idx < N_k), gate, 0)
    g = torch.zeros(*idx.shape[:3], N_k, dtype=a.q.dtype)
    g = g.scatter_add(-1, idx.clamp(0, N_k - 1), gate)[:, :, a.lists]
    M = torch.where((d >= 0) & (key >= a.starts[:, None]), m + (1 - m) * g, 0)
    s = (a.q @ k.mT * a.scale).masked_fill(M == 0, -torch.inf)
    e = M * (s - s.amax(-1, keepdim=True).detach()).exp()
    return e / e.sum(-1, keepdim=True) @ v


def make(
    B=1,
    H=2,
    H_kv=None,
    N_q=70,
    N_k=None,
    D=20,
    K=5,
    n_lists=1,
    w=20.0,
    ramp=3.0,
    bias=True,
    starts=(0,),
    sharp=1.0,
    scale=None,
    seed=3,
):
    generator = torch.Generator().manual_seed(seed)
    H_kv, N_k = H_kv or H, N_q if N_k is None else N_k
    shapes = (B, H, N_q, D), (B, H_kv, N_k, D), (B, H_kv, N_k, D)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    windows = 2 * w * torch.rand(B, H, N_q, generator=generator)
    if not ramp % 1:
        windows[..., ::7] = windows[..., ::7].round()
    order = torch.rand(B, H, n_lists, N_k, generator=generator).argsort(-1)[..., :K]
    order[..., ::4] = -1
    b = torch.randn(order.shape, generator=generator) if bias else None
    place = torch.arange(N_k - N_q, N_k)
    ends = torch.tensor(starts)
    rows = ends[torch.searchsorted(ends, place, right=True) - 1]
    lists = torch.arange(N_q) * n_lists // max(N_q, 1)
    factor = D**-0.5 if scale is None else scale
    return Band(q * sharp, k, v, windows, order.int(), b, rows, lists, factor, ramp)


CASES = {
    "plain": make(),
    "groups": make(B=2, H=6, H_kv=2, N_q=65),
    "list per query": make(N_q=50, n_lists=50),
    "many lists": make(N_q=150, n_lists=19),
    "two lists": make(N_q=150, n_lists=2, K=33),
    "no landmarks": make(K=0),
    "no bias": make(bias=False),
    "packed": make(N_q=200, starts=(0, 1, 30, 100)),
    "last queries": make(N_q=21, N_k=300),
    "packed last queries": make(N_q=90, N_k=300, starts=(0, 130, 250)),
    "decode": make(B=3, H=4, H_kv=1, N_q=1, N_k=500),
    "one token": make(N_q=1),
    "wide windows": make(N_q=260, w=500.0),
    "windows of all widths": make(N_q=700, w=150.0, D=16),
    "windows of zero": make(w=0.0, ramp=1.0),
    "a long edge": make(N_q=200, ramp=41.5),
    "an edge of no width": make(ramp=1e-30),
    "an endless edge": make(ramp=1e30),
    "head dim 1": make(D=1),
    "head dim 64": make(D=64, N_q=130),
    "head dim 256": make(D=256, N_q=40),
    "more landmarks than lanes": make(N_q=90, K=70),
    "sharp": make(sharp=30.0),
    "scale 0": make(scale=0.0),
    "negative scale": make(scale=-0.7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_float64(name, dtype):
    given = CASES[name]
    names = [n for n in GRADIENTS if getattr(given, n) is not None]
    a = given._replace(**{n: getattr(given, n).to(dtype) for n in names})
    assert why_not(*a[:3]) is None
    exact = a._replace(**{n: getattr(a, n).double().requires_grad_() for n in names})
    want = dense(exact)
    o, *rows = forward(a)
    assert_close(o, want)
    d_out = torch.randn(o.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = backward(a, o, *rows, d_out, True, True)
    expected = torch.autograd.grad((want * d_out).sum(), [getattr(exact, n) for n in names])
    for n, gradient in zip(names, expected, strict=True):
        assert_close(found[n], gradient, "gradient")


def test_strides_are_taken_as_they_are():
    a = CASES["last queries"]
    want = forward(a)[0]
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in a[:3])
    assert torch.equal(forward(Band(*turned, *a[3:]))[0], want)
    longer = torch.randn(1, 2, 400, 20)
    longer[:, :, :300] = a.k
    assert torch.equal(forward(a._replace(k=longer[:, :, :300]))[0], want)
    columns = a.v.mT.contiguous().mT
    assert torch.equal(forward(a._replace(v=columns))[0], want)


def test_a_cotangent_of_any_layout_gives_the_same_bits():
    a = make(B=2, H=6, H_kv=2, N_q=130)
    o, *rows = forward(a)
    d_out = torch.randint(-3, 4, a.q.shape).float()  # fp16 holds it
    want = backward(a, o, *rows, d_out, True, True)
    turned = d_out.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (turned, d_out.mT.contiguous().mT, d_out.half()):
        found = backward(a, o, *rows, other, True, True)
        assert all(torch.equal(found[name], want[name]) for name in want)
    ones = torch.ones(()).expand(a.q.shape)
    want = backward(a, o, *rows, ones.contiguous(), True, True)
    found = backward(a, o, *rows, ones, True, True)
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["two lists", "windows of all widths", "packed", "sharp"])
def test_a_row_s_bits_depend_on_what_it_sees(name):
    a = CASES[name]
    o, *rows = forward(a)
    N = a.q.shape[2]
    for n in (1, 2, 25, 64):
        last = a._replace(
            q=a.q[:, :, -n:], windows=a.windows[:, :, -n:], starts=a.starts[-n:], lists=a.lists[-n:]
        )
        assert torch.equal(forward(last)[0], o[:, :, -n:]), n
        first = Band(
            *(x[:, :, : N - n] for x in a[:4]),
            a.landmarks,
            a.bias,
            a.starts[:-n],
            a.lists[:-n],
            a.scale,
            a.ramp,
        )
        assert torch.equal(forward(first)[0], o[:, :, : N - n]), n
    changed = a._replace(k=a.k.clone(), v=a.v.clone())
    changed.k[:, :, -20:] = torch.nan
    changed.v[:, :, -20:] = torch.inf
    assert torch.equal(forward(changed)[0][:, :, :-20], o[:, :, :-20])
    assert forward(changed)[0][:, :, -20:].isnan().all()


def test_threads_change_no_bit_of_output_or_gradients():
    a = make(B=2, H=4, H_kv=2, N_q=900, w=100.0, n_lists=9)
    d_out = torch.randn(a.q.shape)
    before = torch.get_num_threads()
    runs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            o, *rows = forward(a)
            runs.append((o, *rows, *backward(a, o, *rows, d_out, True, True).values()))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("which", ["q", "k", "v", "d_out"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_the_rows_that_see_it(which, value):
    a = make(N_q=300, w=20.0)._replace(scale=0.3)
    d_out = torch.randn(a.q.shape)

    def run(harmed):
        given = {n: getattr(a, n).clone() for n in ("q", "k", "v")} | {"d_out": d_out.clone()}
        if harmed:
            given[which][0, 0, 150, 3] = value
        d = given.pop("d_out")
        b = a._replace(**given)
        o, *rows = forward(b)
        return {"o": o, **backward(b, o, *rows, d, True, True)}

    clean, harmed = run(False), run(True)
    marked = a.landmarks[0, 0, 0].tolist()
    seen_by = slice(150, 300) if which in ("k", "v") else slice(150, 151)
    for name in ("o", "q", "windows"):
        same = torch.ones(300, dtype=torch.bool)
        same[seen_by] = False
        assert torch.equal(clean[name][0, 0, same], harmed[name][0, 0, same]), name
        assert torch.equal(clean[name][0, 1], harmed[name][0, 1]), name
    for name in ("k", "v"):  # keys that no harmed query sees
        far = [j for j in range(100) if j not in marked] if which in ("q", "d_out") else []
        after = [*range(220, 300)] if which in ("q", "d_out") else []
        assert torch.equal(clean[name][0, 1], harmed[name][0, 1]), name
        assert torch.equal(clean[name][0, 0, far + after], harmed[name][0, 0, far + after]), name
    if which != "d_out":
        assert not harmed["o"][0, 0, 150].isfinite().all()


def test_a_row_without_a_finite_score_gives_zeros():
    a = make(N_q=5, K=0)
    a.q.fill_(1e30)
    a.k.fill_(-1e30)
    o, *rows = forward(a)
    assert (o == 0).all() and (rows[1] == torch.inf).all()
    found = backward(a, o, *rows, torch.ones_like(o), True, True)
    assert all((x == 0).all() for x in found.values())


def test_nothing_gives_nothing():
    for a in (make(N_q=0, N_k=9), make(B=0), make(N_q=0)):
        o, *rows = forward(a)
        assert o.shape == a.q.shape and {x.shape for x in rows} == {a.q.shape[:3]}
        found = backward(a, o, *rows, torch.ones_like(o), True, True)
        assert {n: x.shape for n, x in found.items()} == {n: getattr(a, n).shape for n in GRADIENTS}
        assert all((x == 0).all() for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_fp32(dtype):
    a = make(N_q=90)
    half = a._replace(q=a.q.to(dtype), k=a.k.to(dtype), v=a.v.to(dtype))
    wide = a._replace(q=half.q.float(), k=half.k.float(), v=half.v.float())
    o = forward(half)[0]
    assert o.dtype == dtype and torch.equal(o, forward(wide)[0].to(dtype))


def test_why_not_names_what_is_not_taken():
    a = make()
    assert "256" in why_not(torch.ones(1, 1, 2, 300), a.k, a.v)
    assert "int32" in why_not(a.q.int(), a.k, a.v)
    assert "meta" in why_not(a.q, a.k, a.v.to("meta"))
