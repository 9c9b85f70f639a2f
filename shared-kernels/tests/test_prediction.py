"""Counts of executed instructions, and the times made of them, for programs counted by hand."""

from __future__ import annotations

import pytest
import torch

from shared_kernels.offline.model import RATES
from shared_kernels.offline.prediction import CARDS, _products, _unit, predicted, work
from shared_kernels.offline.ptx import Counters, Kernel
from shared_kernels.offline.ptx.memory import GlobalMemory

pytestmark = pytest.mark.tools

ROUNDED = 0.01  # rates and clocks of data sheets have three digits

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry k(.param .u64 k_in)
.reqntid 64
{
.reg .pred %p<3>;
.reg .b32 %r<30>;
.reg .b64 %d<9>;
ld.param.b64 %d1, [k_in];
mov.u32 %r1, %tid.x;
mul.wide.u32 %d2, %r1, 16;
add.s64 %d3, %d1, %d2;
"""
BODY = """ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d3];
mov.b32 %r9, 0;
$L1:
fma.rn.f32 %r2, %r2, %r3, %r4;
ex2.approx.ftz.f32 %r5, %r2;
shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;
add.s32 %r9, %r9, 1;
setp.lt.s32 %p1, %r9, 10;
@%p1 bra $L1;
st.global.v4.b32 [%d3], {%r2, %r3, %r4, %r6};"""


def counted(body, launches=1):
    counters, memory, given = Counters(), GlobalMemory(), torch.ones(256)
    kernel = Kernel(HEAD + body + "\nret;\n}\n", 4096)
    for _ in range(launches):
        counters.begin()
        kernel.launch((1, 1, 1), 64, [memory.address(given)], memory, None, counters)
    return counters


def test_a_loop_counts_as_often_as_it_runs():
    counters = counted(BODY)
    # two warps, ten passes
    assert counters.forms()["k"]["ex2.approx.ftz.f32"] == 20
    done = work(counters, "sm_90")
    rates = RATES["sm_90"].cycles
    assert done["cycles"]["special"] == 20 * rates["special"]
    # ten multiply-adds, and one multiplication of addresses
    assert done["cycles"]["fma"] == 20 * rates["fma"] + 2 * rates["imad"]
    assert done["cycles"]["shared"] == 20 * 4
    assert (done["sectors"], done["ideal"]) == (64, 64)


def test_memory_is_counted_at_first_touch_of_each_launch():
    assert counted(BODY).first_touched == 1024
    assert counted(BODY, launches=3).first_touched == 3 * 1024


def test_what_is_issued_beside_a_product_is_counted():
    sums = ", ".join(f"%r{10 + i}" for i in range(4))
    product = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{sums}}}"
    from shared_kernels.offline.ptx.counters import _issued_beside
    from shared_kernels.offline.ptx.parser import parse

    text = f"""wgmma.fence.sync.aligned;
    {product}, %d1, %d2, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    add.s32 %r2, %r2, 1;
    mov.b32 %r3, %r2;
    add.s32 %r2, %r2, 1;
    wgmma.wait_group.sync.aligned 0;
    add.s32 %r2, %r2, 1;"""
    block = parse(HEAD + text + "\nret;\n}\n").blocks[0].instructions
    assert _issued_beside(block, False) == 2
    # with one on its way from before, everything up to the wait counts but moves: two of the head
    assert _issued_beside(block, True) == 5


def test_the_slowest_unit_bounds_and_copies_add_up():
    counters = counted(BODY.replace("%r9, 10;", "%r9, 100;"))
    card = CARDS["H200"]
    one, many = predicted(card, counters), predicted(card, counters, copies=1000)
    cycles = one["cycles"]["special"]
    assert one["bound"] == "special"
    assert one["bound_ms"] == pytest.approx(cycles / (132 * 4 * 1.83e6))
    assert many["bound_ms"] == pytest.approx(1000 * one["bound_ms"])
    assert one["in_turn_ms"] >= one["bound_ms"]


def test_peak_rates_are_those_of_the_data_sheets():
    # bf16 with fp32 sums, in TFLOP/s
    sheets = {"A100 80 GB": 312, "H100 SXM": 989, "H200": 989, "RTX 5090": 209.5}
    for name, tflops in sheets.items():
        card = CARDS[name]
        rate = max({**RATES[card.target].products, **card.products}.values())
        assert 2e-3 * rate * 4 * card.processors * card.clock == pytest.approx(tflops, rel=ROUNDED)


@pytest.mark.parametrize(
    ("form", "unit"),
    [
        ("add.f32", "fma"),
        ("fma.rn.f32x2", "fma"),
        ("add.rn.f64", "fp64"),
        ("add.s32", "alu"),
        ("mad.lo.s32", "imad"),
        ("mul.wide.u32", "imad"),
        ("max.NaN.f32", "alu"),
        ("lg2.approx.ftz.f32", "special"),
        ("cvt.rn.f32.s32", "special"),
        ("mov.b32", ""),
        ("cvt.rn.bf16x2.f32", "alu"),
        ("ld.shared.v4.b32", "shared"),
        ("ld.param.b64", ""),
        ("cp.async.cg.shared.global", "global"),
        ("cp.async.wait_group", ""),
        ("wgmma.wait_group.sync.aligned", ""),
        ("redux.sync.max.s32", "shuffle"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "tensor"),
    ],
)
def test_the_unit_of_a_form(form, unit):
    assert _unit(form)[0] == unit


def test_the_multiply_adds_of_products():
    assert _products("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == ("HMMA", 2048)
    form = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
    assert _products(form) == ("HGMMA", 64 * 128 * 16 / 4)
    with pytest.raises(ValueError, match="shape of mma.sync is not known"):
        _products("mma.sync")
