"""Each form that reaches memory, other lanes or matrices, in a program of its own, lane by lane.

The models follow the text of NVIDIA's PTX ISA: "ldmatrix", "stmatrix", "Matrix Fragments for
mma.m16n8k16", "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Register Fragments
for wgmma.mma_async.m64nNk16". The forms of arithmetic are in test_ptx_semantics.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared_kernels.offline.ptx import Kernel, Sanitizer
from shared_kernels.offline.ptx.memory import GlobalMemory
from shared_kernels.offline.ptx.parser import parse
from shared_kernels.offline.ptx.semantics import TABLE

pytestmark = pytest.mark.tools

FORMS = Path(__file__).parents[2] / "benchmarks" / "results" / "forms.json"
SHARED = 65536
HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry k(.param .u64 k_in, .param .u64 k_out, .param .u32 k_n, .param .s32 k_m)
.reqntid THREADS
{
.reg .pred %p<9>;
.reg .b16 %h<20>;
.reg .b32 %r<400>;
.reg .b64 %d<40>;
.reg .b8 %c<9>;
ld.param.b64 %d1, [k_in];
ld.param.b64 %d2, [k_out];
ld.param.b32 %r4, [k_n];
ld.param.s32 %r5, [k_m];
mov.u32 %r1, %tid.x;
mov.b32 %r2, memory;
"""


def program(body, threads):
    return HEAD.replace("THREADS", str(threads)) + body + "\nret;\n}\n"


def run(text, given, size, threads):
    """`size` bytes that the program wrote; the sanitizer finds nothing."""
    out, memory, sanitizer = torch.zeros(size, dtype=torch.uint8), GlobalMemory(), Sanitizer()
    given = torch.from_numpy(np.ascontiguousarray(given).view(np.uint8).reshape(-1).copy())
    arguments = [memory.address(given), memory.address(out), 7, -7]
    Kernel(text, SHARED).launch((1, 1, 1), threads, arguments, memory, sanitizer)
    assert not sanitizer.found, sanitizer.text()
    return out.numpy()


def at(base, stride, result, wide=True):
    """Lines that put base + thread * stride into a register."""
    if wide:
        return f"mul.wide.u32 %d9, %r1, {stride};\nadd.s64 {result}, {base}, %d9;\n"
    return f"mul.lo.s32 %r9, %r1, {stride};\nadd.s32 {result}, {base}, %r9;\n"


def through_shared_memory(count, bits):
    """Vectors of every width: global -> registers -> shared -> registers -> global."""
    kind, register = f"b{bits}", {8: "%c", 16: "%h", 32: "%r30", 64: "%d3"}[bits]
    size, vector = count * bits // 8, f"v{count}." if count > 1 else ""
    names = [f"{register}{k + 1}" for k in range(count)]
    listed = "{" + ", ".join(names) + "}" if count > 1 else names[0]
    body = at("%d1", size, "%d10") + at("%d2", size, "%d11") + at("%r2", size, "%r10", False)
    body += f"""ld.global.{vector}{kind} {listed}, [%d10];
    st.shared.{vector}{kind} [%r10], {listed};
    bar.sync 0;
    ld.shared.{vector}{kind} {listed}, [%r10];
    st.global.{vector}{kind} [%d11], {listed};"""
    given = np.arange(64 * size, dtype=np.uint64).astype(np.uint8)
    return program(body, 64), given, given, 64


def copied(how):
    """cp.async of 16 bytes for each thread."""
    body = at("%d1", 16, "%d10") + at("%d2", 16, "%d11") + at("%r2", 16, "%r10", False)
    body += f"""cp.async.{how}.shared.global [%r10], [%d10], 16, 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.v4.b32 {{%r301, %r302, %r303, %r304}}, [%r10];
    st.global.v4.b32 [%d11], {{%r301, %r302, %r303, %r304}};"""
    given = np.arange(1024, dtype=np.uint64).astype(np.uint8)
    return program(body, 64), given, given, 64


def matrices(count, is_transposed, is_store):
    """Matrices of 8 x 8 halves between rows of shared memory and a warp's fragments."""
    halves = np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8)
    fragments = np.zeros((32, count, 2), np.uint16)
    for lane in range(32):
        for e in range(2):
            row, column = lane // 4, 2 * (lane % 4) + e
            place = (column, row) if is_transposed else (row, column)
            fragments[lane, :, e] = halves[:, place[0], place[1]]
    names = ", ".join(f"%r{301 + k}" for k in range(count))
    form = f"m8n8.x{count}{'.trans' if is_transposed else ''}.shared.b16"
    body = f"and.b32 %r11, %r1, {8 * count - 1};\nmul.lo.s32 %r11, %r11, 16;\n"
    body += "add.s32 %r12, %r2, %r11;\n"
    if is_store:
        body += at("%d1", 4 * count, "%d10") + at("%d2", 2 * 2 * count, "%d11")
        body += "".join(f"ld.global.b32 %r{301 + k}, [%d10+{4 * k}];\n" for k in range(count))
        body += f"stmatrix.sync.aligned.{form} [%r12], {{{names}}};\nbar.sync 0;\n"
        body += at("%r2", 4 * count, "%r13", False)
        for k in range(count):
            body += f"ld.shared.b32 %r20, [%r13+{4 * k}];\nst.global.b32 [%d11+{4 * k}], %r20;\n"
        return program(body, 32), fragments, halves, 32
    body += at("%d1", 4 * count, "%d10") + at("%d2", 4 * count, "%d11")
    body += at("%r2", 4 * count, "%r13", False)
    for k in range(count):
        body += f"ld.global.b32 %r20, [%d10+{4 * k}];\nst.shared.b32 [%r13+{4 * k}], %r20;\n"
    body += f"bar.sync 0;\nldmatrix.sync.aligned.{form} {{{names}}}, [%r12];\n"
    body += "".join(f"st.global.b32 [%d11+{4 * k}], %r{301 + k};\n" for k in range(count))
    return program(body, 32), halves, fragments, 32


def numbers(shape, kind, seed):
    """Small integers, and their bits: 16 of a half type, 32 of tf32."""
    values = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    if kind == "tf32":
        return values, values.view(np.uint32)
    if kind == "f16":
        return values, values.astype(np.float16).view(np.uint16)
    return values, (values.view(np.uint32) >> 16).astype(np.uint16)


def left_fragments(bits):
    """What the lanes of a warp hold of a (16, 16) left operand: four words of two halves."""
    held = np.zeros((32, 4, 2), np.uint16)
    for lane in range(32):
        for r in range(4):
            for e in range(2):
                row, column = lane // 4 + 8 * (r & 1), 2 * (lane % 4) + e + 8 * (r >> 1)
                held[lane, r, e] = bits[row, column]
    return held


def warp_product(kind):
    """mma.m16n8k16."""
    a, a_bits = numbers((16, 16), kind, 0)
    b, b_bits = numbers((16, 8), kind, 1)
    held = np.zeros((32, 6, 2), np.uint16)
    held[:, :4] = left_fragments(a_bits)
    expected = np.zeros((32, 4), np.float32)
    for lane in range(32):
        for e in range(2):
            for r in range(2):
                held[lane, 4 + r, e] = b_bits[2 * (lane % 4) + e + 8 * r, lane // 4]
        for r in range(4):
            expected[lane, r] = (a @ b)[lane // 4 + 8 * (r >> 1), 2 * (lane % 4) + (r & 1)]
    body = at("%d1", 24, "%d10") + at("%d2", 16, "%d11")
    body += "".join(f"ld.global.b32 %r{301 + k}, [%d10+{4 * k}];\n" for k in range(6))
    body += f"""mov.b32 %r20, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r311, %r312, %r313, %r314}},
      {{%r301, %r302, %r303, %r304}}, {{%r305, %r306}}, {{%r20, %r20, %r20, %r20}};
    st.global.v4.b32 [%d11], {{%r311, %r312, %r313, %r314}};"""
    return program(body, 32), held, expected, 32


def warp_product_in_tf32():
    """mma.m16n8k8: operands of 32 bits."""
    (a, a_bits), (b, b_bits) = numbers((16, 8), "tf32", 0), numbers((8, 8), "tf32", 1)
    held, expected = np.zeros((32, 6), np.uint32), np.zeros((32, 4), np.float32)
    for lane in range(32):
        g, k = lane // 4, lane % 4
        held[lane, :4] = [a_bits[g + 8 * (r & 1), k + 4 * (r >> 1)] for r in range(4)]
        held[lane, 4:] = b_bits[k, g], b_bits[k + 4, g]
        for r in range(4):
            expected[lane, r] = (a @ b)[g + 8 * (r >> 1), 2 * k + (r & 1)]
    body = at("%d1", 24, "%d10") + at("%d2", 16, "%d11")
    body += "".join(f"ld.global.b32 %r{301 + k}, [%d10+{4 * k}];\n" for k in range(6))
    body += """mov.b32 %r20, 0;
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r311, %r312, %r313, %r314},
      {%r301, %r302, %r303, %r304}, {%r305, %r306}, {%r20, %r20, %r20, %r20};
    st.global.v4.b32 [%d11], {%r311, %r312, %r313, %r314};"""
    return program(body, 32), held, expected, 32


def swizzled(bits):
    """Rows of 128 bytes, of which the first 32 bytes are given, in the 128-byte swizzle."""
    rows = np.zeros((len(bits), 128), np.uint8)
    for r, row in enumerate(bits):
        for k, x in enumerate(row):
            size = bits.itemsize
            place = (size * k) ^ (r % 8 << 4)
            rows[r, place : place + size] = np.array([x], bits.dtype).view(np.uint8)
    return rows


# A descriptor: where the operand starts / 16, 1024 bytes from eight rows to the next, the swizzle.
DESCRIPTOR = (1 << 62) | (1024 // 16 << 32) | (1 << 16)


def group_product(N, kind, from_registers):
    """wgmma of (64, K) and (N, K) with the right operand's rows along K: 16, or 8 of tf32."""
    K = 8 if kind == "tf32" else 16
    a, a_bits = numbers((64, K), kind, 0)
    b, b_bits = numbers((N, K), kind, 1)
    laid = np.concatenate([swizzled(a_bits), swizzled(b_bits)])
    held = np.zeros((128, 4, 2), np.uint16)
    if from_registers:
        held = np.concatenate([left_fragments(a_bits[16 * w : 16 * w + 16]) for w in range(4)])
    given = np.concatenate([laid.reshape(-1), held.reshape(-1).view(np.uint8)])
    n, expected = N // 2, np.zeros((128, N // 2), np.float32)
    for t in range(128):
        for i in range(n):
            row = 16 * (t // 32) + t % 32 // 4 + 8 * (i >> 1 & 1)
            expected[t, i] = (a @ b.T)[row, 8 * (i >> 2) + 2 * (t % 4) + (i & 1)]
    body = ""
    for k in range(laid.size // 2048):  # 128 threads of 16 bytes
        body += at("%d1", 16, "%d10") + at("%r2", 16, "%r10", False)
        body += f"""ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d10+{2048 * k}];
        st.shared.v4.b32 [%r10+{2048 * k}], {{%r20, %r21, %r22, %r23}};\n"""
    if laid.size % 2048:
        body += f"""setp.lt.u32 %p2, %r1, {laid.size % 2048 // 16};
        @%p2 ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d10+{laid.size // 2048 * 2048}];
        @%p2 st.shared.v4.b32 [%r10+{laid.size // 2048 * 2048}], {{%r20, %r21, %r22, %r23}};\n"""
    body += f"""bar.sync 0;
    fence.proxy.async.shared::cta;
    shr.u32 %r11, %r2, 4;
    cvt.u64.u32 %d20, %r11;
    mov.b64 %d21, {DESCRIPTOR};
    or.b64 %d22, %d20, %d21;
    add.s64 %d23, %d22, {64 * 128 // 16};
    setp.ne.b32 %p1, %r1, %r1;\n"""
    body += at("%d1", 16, "%d10")
    body += "".join(f"ld.global.b32 %r{24 + k}, [%d10+{laid.size + 4 * k}];\n" for k in range(4))
    sums = ", ".join(f"%r{100 + i}" for i in range(n))
    body += "".join(f"mov.b32 %r{100 + i}, 0;\n" for i in range(n))
    left, last = "%d22", "1, 1, 0, 0"
    if from_registers:
        left, last = "{%r24, %r25, %r26, %r27}", "1, 1, 0"
    if kind == "tf32":  # is never transposed
        last = "1, 1"
    shape = f"m64n{N}k{K}.f32.{kind}.{kind}"
    body += f"""wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.{shape} {{{sums}}}, {left}, %d23, %p1, {last};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;\n"""
    body += at("%d2", 4 * n, "%d11")
    body += "".join(f"st.global.b32 [%d11+{4 * i}], %r{100 + i};\n" for i in range(n))
    return program(body, 128), given, expected, 128


def of_a_warp(form, operands, model):
    """Shuffles and reductions of the lanes' own words."""
    body = at("%d1", 4, "%d10") + at("%d2", 4, "%d11")
    body += f"""ld.global.b32 %r20, [%d10];
    {form} %r21, %r20, {operands};
    st.global.b32 [%d11], %r21;"""
    given = np.random.default_rng(0).integers(-99, 99, 32).astype(np.int32)
    return program(body, 32), given, model(given), 32


def jumps():
    """Both branches, and the numbers among the parameters."""
    body = at("%d2", 4, "%d11")
    body += """setp.lt.u32 %p1, %r1, 7;
    mov.b32 %r20, %r4;
    @%p1 bra $L1;
    mov.b32 %r20, %r5;
    bra.uni $L2;
$L1:
    add.s32 %r20, %r20, 1;
    bra $L2;
$L2:
    bar.warp.sync -1;
    st.global.b32 [%d11], %r20;"""
    expected = np.where(np.arange(32) < 7, 8, -7).astype(np.int32)
    return program(body, 32), np.zeros(4, np.uint8), expected, 32


LANES = np.arange(32)
CASES = {
    **{
        f"vectors of {count} x {bits} bits": through_shared_memory(count, bits)
        for count in (1, 2, 4)
        for bits in (8, 16, 32, 64)
        if count * bits <= 128
    },
    "cp.async.ca": copied("ca"),
    "cp.async.cg": copied("cg"),
    **{
        f"{'st' if is_store else 'ld'}matrix x{count} {is_transposed}": matrices(
            count, is_transposed, is_store
        )
        for count in (1, 2, 4)
        for is_transposed in (False, True)
        for is_store in (False, True)
    },
    "mma f16": warp_product("f16"),
    "mma bf16": warp_product("bf16"),
    "mma tf32": warp_product_in_tf32(),
    "wgmma 16 tf32": group_product(16, "tf32", False),
    **{
        f"wgmma {N} {kind} {'registers' if held else 'shared'}": group_product(N, kind, held)
        for N in (8, 16, 32, 64, 128)
        for kind in ("f16", "bf16")
        for held in (False, True)
    },
    "shfl.bfly": of_a_warp("shfl.sync.bfly.b32", "5, 31, -1", lambda x: x[LANES ^ 5]),
    "shfl.idx": of_a_warp("shfl.sync.idx.b32", "3, 31, -1", lambda x: x[LANES * 0 + 3]),
    "shfl.up": of_a_warp(
        "shfl.sync.up.b32", "5, 0, -1", lambda x: x[np.where(LANES >= 5, LANES - 5, LANES)]
    ),
    "redux.add": of_a_warp(
        "redux.sync.add.s32",
        "-1",
        lambda x: np.full(32, x.sum(dtype=np.int64)).astype(np.int32),  # modulo 2^32
    ),
    "redux.max": of_a_warp("redux.sync.max.s32", "-1", lambda x: np.full(32, x.max(), np.int32)),
    "redux.min": of_a_warp("redux.sync.min.s32", "-1", lambda x: np.full(32, x.min(), np.int32)),
    "branches": jumps(),
}


@pytest.mark.parametrize("name", CASES)
def test_a_form_does_what_the_isa_says(name):
    text, given, expected, threads = CASES[name]
    expected = np.ascontiguousarray(expected).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(run(text, given, expected.size, threads), expected)


def test_every_form_that_a_kernel_uses_has_a_test():
    committed = json.loads(FORMS.read_text("utf-8"))
    used = {
        form
        for packages in committed.values()
        for kernels in packages.values()
        for forms in kernels.values()
        for form in forms
    }
    tested = {form for form, _ in TABLE}  # each of them in test_ptx_semantics.py
    for text, *_ in CASES.values():
        tested |= {i.form for block in parse(text).blocks for i in block.instructions}
    assert used - tested == set()


def test_the_page_of_forms_is_of_the_committed_ones():
    from shared_kernels.offline.ptx.forms import page

    committed = json.loads(FORMS.read_text("utf-8"))
    text = FORMS.parents[2].joinpath("docs", "shared-kernels", "forms.md").read_text("utf-8")
    assert text == page(committed)
