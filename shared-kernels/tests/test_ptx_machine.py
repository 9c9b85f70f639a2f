"""Memory, other lanes, matrices, branches and the sanitizer, one small PTX program each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared_kernels.offline.ptx import Counters, FaultError, Kernel, Sanitizer, UnsupportedError
from shared_kernels.offline.ptx.memory import GlobalMemory

pytestmark = pytest.mark.tools

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
.param .u64 .ptr .global .align 1 k_param_0,
.param .u64 .ptr .global .align 1 k_param_1
)
.reqntid THREADS
{
.reg .pred %p<20>;
.reg .b16 %rs<20>;
.reg .b32 %r<200>;
.reg .b64 %rd<60>;
ld.param.b64 %rd1, [k_param_0];
ld.param.b64 %rd2, [k_param_1];
mov.u32 %r100, %tid.x;
mul.wide.u32 %rd3, %r100, 16;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
mov.b32 %r101, global_smem;
shl.b32 %r102, %r100, 2;
add.s32 %r103, %r101, %r102;
"""


def run(body, given=None, threads=64, shared=4096, sanitizer=None, counters=None):
    """%rd4 and %rd5 are where this thread's four words of input and output lie."""
    text = HEAD.replace("THREADS", str(threads)) + body + "\nret;\n}\n"
    given = torch.arange(threads * 4, dtype=torch.int32) if given is None else given
    out = torch.zeros(threads * 4, dtype=torch.int32)
    memory = GlobalMemory()
    arguments = [memory.address(given), memory.address(out)]
    Kernel(text, shared).launch((1, 1, 1), threads, arguments, memory, sanitizer, counters)
    return out.reshape(threads, 4).numpy()


LANE = np.arange(64) % 32


def test_vector_loads_and_stores():
    body = """ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd4];
    st.global.v4.b32 [%rd5], {%r4, %r3, %r2, %r1};"""
    assert (run(body) == np.arange(256).reshape(64, 4)[:, ::-1]).all()


@pytest.mark.parametrize(
    ("form", "operands", "source"),
    [
        ("bfly", "5, 31", LANE ^ 5),
        ("idx", "3, 31", np.full(64, 3)),
        ("idx", "3, 6175", LANE // 8 * 8 + 3),  # segments of eight: 0x181f
        ("up", "2, 0", np.where(LANE >= 2, LANE - 2, LANE)),
        ("down", "2, 31", np.where(LANE < 30, LANE + 2, LANE)),
    ],
)
def test_shuffles(form, operands, source):
    body = f"shfl.sync.{form}.b32 %r1, %r100, {operands}, -1;\nst.global.b32 [%rd5], %r1;"
    assert (run(body)[:, 0] == source + np.arange(64) // 32 * 32).all()


def test_reductions_over_a_warp():
    body = """redux.sync.max.s32 %r1, %r100, -1;
    setp.gt.u32 %p1, %r100, 60;
    vote.sync.ballot.b32 %r2, %p1, -1;
    st.global.v2.b32 [%rd5], {%r1, %r2};"""
    out = run(body)
    assert (out[:, 0] == np.arange(64) // 32 * 32 + 31).all()
    assert (out[:, 1].view(np.uint32) == np.where(np.arange(64) < 32, 0, 0xE0000000)).all()


def test_threads_part_in_a_loop_and_meet_again():
    body = """mov.u32 %r1, 0;
    mov.u32 %r2, 0;
$L1:
    add.s32 %r1, %r1, %r2;
    add.s32 %r2, %r2, 1;
    setp.le.u32 %p1, %r2, %r100;
    @%p1 bra $L1;
    bar.sync 0;
    st.global.b32 [%rd5], %r1;"""
    lane = np.arange(64)
    assert (run(body)[:, 0] == lane * (lane + 1) // 2).all()


def test_threads_meet_again_before_a_block_below():
    body = """mov.u32 %r1, 1;
    setp.gt.u32 %p1, %r100, 5;
    @%p1 bra $L2;
$L1:
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    st.global.b32 [%rd5], %r2;
    bra $L3;
$L2:
    mov.u32 %r1, 2;
    bra $L1;
$L3:
    bar.sync 0;"""
    lane = np.arange(64)
    assert (run(body)[:, 0] == np.where((lane ^ 1) > 5, 2, 1)).all()


@pytest.mark.parametrize("is_transposed", [False, True])
def test_matrices_go_from_shared_memory_to_fragments(is_transposed):
    body = f"""ld.global.b32 %r1, [%rd4];
    st.shared.b32 [%r103], %r1;
    bar.sync 0;
    shl.b32 %r104, %r100, 4;
    and.b32 %r104, %r104, 127;
    add.s32 %r105, %r101, %r104;
    ldmatrix.sync.aligned.m8n8.x1{".trans" if is_transposed else ""}.shared.b16 {{%r2}}, [%r105];
    st.global.b32 [%rd5], %r2;"""
    words = torch.randint(0, 1 << 30, (64, 4), dtype=torch.int32)
    halves = words[:32, 0].contiguous().numpy().view(np.uint16).reshape(8, 8)
    out = run(body, words.reshape(-1))[:32, 0].copy().view(np.uint16).reshape(32, 2)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        pair = [(row, column), (row, column + 1)]
        expected = [halves[c, r] if is_transposed else halves[r, c] for r, c in pair]
        assert list(out[lane]) == expected


def test_a_product_of_tensor_cores():
    body = """ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd4];
    mov.b32 %r5, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
      {%r6, %r7, %r8, %r9}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r5, %r5, %r5, %r5};
    st.global.v4.b32 [%rd5], {%r6, %r7, %r8, %r9};"""
    fragments = np.random.default_rng(0).integers(-4, 5, (32, 4, 2)).astype(np.float16)
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for r in range(4):
            for e in range(2):
                a[g + 8 * (r & 1), 2 * t + e + 8 * (r >> 1)] = fragments[lane, r, e]
                if r < 2:
                    b[2 * t + e + 8 * r, g] = fragments[lane, r, e]
    given = torch.from_numpy(fragments.reshape(-1).view(np.int32).copy())
    out = run(body, given, threads=32).view(np.float32)
    for lane in range(32):
        for r in range(4):
            expected = (a @ b)[lane // 4 + 8 * (r >> 1), 2 * (lane % 4) + (r & 1)]
            assert out[lane, r] == expected


COPY = """shl.b32 %r104, %r100, 4;
    add.s32 %r105, %r101, %r104;
    cp.async.cg.shared.global [%r105], [%rd4], 16, 16;
    cp.async.commit_group;
    WAIT
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r105];
    st.global.v4.b32 [%rd5], {%r1, %r2, %r3, %r4};"""


def test_a_copy_lands_only_when_waited_for():
    waited = run(COPY.replace("WAIT", "cp.async.wait_group 0;"))
    assert (waited == np.arange(256).reshape(64, 4)).all()
    assert (run(COPY.replace("WAIT", "")) != waited).any()


EXCHANGE = """st.shared.b32 [%r103], %r100;
    BARRIER
    xor.b32 %r104, %r102, 128;
    add.s32 %r105, %r101, %r104;
    ld.shared.b32 %r1, [%r105];
    st.global.b32 [%rd5], %r1;"""
FOUND = {
    "race": EXCHANGE.replace("BARRIER", ""),
    "uninitialised": "ld.shared.b32 %r1, [%r103];",
    "out of bounds": "ld.global.b32 %r1, [%rd4+1024];",
    "missing wait": COPY.replace("WAIT", ""),
    "non-deterministic atomic": (
        "mov.b32 %r1, 0f3F800000;\nred.global.gpu.relaxed.add.f32 [%rd2], %r1;"
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_the_sanitizer_finds(kind):
    sanitizer = Sanitizer()
    run(FOUND[kind], sanitizer=sanitizer)
    assert sanitizer.kinds() == {kind}, sanitizer.text()


@pytest.mark.parametrize(
    "body", [EXCHANGE.replace("BARRIER", "bar.sync 0;"), COPY.replace("WAIT", "cp.async.wait_all;")]
)
def test_the_sanitizer_is_silent_where_all_is_well(body):
    sanitizer = Sanitizer()
    run(body, sanitizer=sanitizer)
    assert not sanitizer.found, sanitizer.text()


STOPS = {
    "misaligned": "ld.global.b32 %r1, [%rd4+2];",
    "out of bounds": "ld.shared.b32 %r1, [%r103+1048576];",
    "divergent": "setp.gt.u32 %p1, %r100, 5;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:\nmov.b32 %r1, 0;",
}


@pytest.mark.parametrize("words", STOPS)
def test_what_a_gpu_would_not_survive_stops_the_run(words):
    with pytest.raises(FaultError, match=words):
        run(STOPS[words])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("frob.b32 %r1, %r2;", "frob.b32"),
        ("add.sat.s32 %r1, %r2, %r3;", "add.sat.s32"),
        ("min.s32 %r1, %r2, %r3, %r4;", "min.s32 with 3 source operands"),
        ("ld.local.b32 %r1, [%r2];", "ld.local.b32"),
        ("@%p1 bar.sync 0;", "bar.sync"),
        ("mov.b32 %x1, 0;", "%x1"),
        ("mbarrier.init.shared.b64 [%r1], 1;", "mbarrier.init"),
    ],
)
def test_an_unknown_form_is_an_error_that_names_it(body, words):
    with pytest.raises(UnsupportedError, match=words):
        run(body)


def test_another_version_or_no_ptx_is_refused():
    with pytest.raises(UnsupportedError, match=r"PTX 6\.5"):
        Kernel(".version 6.5\n.visible .entry k(\n)\n{\nret;\n}\n")
    with pytest.raises(UnsupportedError, match="is it PTX"):
        Kernel("define void @k() { ret void }")


def test_conflicts_and_sectors_are_counted():
    counters = Counters()
    body = """shl.b32 %r104, %r100, 5;
    add.s32 %r105, %r101, %r104;
    st.shared.b32 [%r105], %r100;
    ld.global.b32 %r1, [%rd4];"""
    run(body, counters=counters)
    # 32 bytes apart, eight lanes of a warp share each bank; 16 bytes apart, four loads share 64.
    assert list(counters.shared.values()) == [[2, 16]]
    assert list(counters.sectors.values()) == [[2, 32, 8]]
    assert counters.instructions()["k"]["st.shared"] == 2


def test_memory_that_an_operator_allocates_is_watched():
    pytest.importorskip("triton")
    from shared_kernels.offline.ptx import executing
    from shared_kernels.offline.ptx.memory import POISON

    seen = []

    @torch.library.custom_op("ptx_machine_tests::allocates", mutates_args=())
    def allocates(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.empty(4, dtype=torch.int32).tolist())
        return x.clone()

    with executing("sm_80"):
        allocates(torch.ones(3))
    assert [n & 0xFFFFFFFF for n in seen[0]] == [POISON] * 4
