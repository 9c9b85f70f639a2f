"""Offline compilation: real binaries for four GPUs, and gates that can fail."""

import json
import os
from types import SimpleNamespace

import pytest
from filelock import FileLock

from shared_kernels import configs
from shared_kernels.configs import ANY, Config, Table
from shared_kernels.device import SHARED_MEMORY
from shared_kernels.offline import (
    MORE,
    TARGETS,
    Launch,
    access,
    broken_gates,
    compare,
    compile_all,
    keys,
)
from shared_kernels.offline.__main__ import main
from shared_kernels.offline.plan import load, plan
from shared_kernels.offline.report import complaints, label, read_report, write_report
from shared_kernels.offline.run import why_not

pytestmark = pytest.mark.tools

# --------------------------------------------------------------------------------------
# the plan

SMALL, LARGE, OTHER = (Config(BLOCK=n, num_warps=4) for n in (16, 64, 128))
TABLE = Table(
    "tiles",
    {("sm_90", 64): (SMALL, LARGE), ("sm_90", 128): (LARGE,), (ANY, 64): (OTHER,), (ANY, ANY): ()},
)


def items(launches, arch="sm_90"):
    return [(item.size, item.config) for item in plan("package", launches, arch)]


def test_every_entry_a_target_can_pick_is_compiled_with_its_size():
    launch = Launch("forward", lambda size: None, table=TABLE)
    assert items([launch]) == [(64, SMALL), (64, LARGE), (128, LARGE)]
    assert items([launch], "gfx942") == [(64, OTHER)]


def test_entries_for_any_size_get_the_largest():
    table = Table("rows", {("sm_90", 64): (SMALL,), (ANY, ANY): (LARGE,), (ANY, 32): (OTHER,)})
    launch = Launch("rows", lambda size: None, table=table, largest=4096)
    assert items([launch]) == [(64, SMALL), (4096, LARGE), (32, OTHER)]  # 32: the exact size
    assert items([launch], "sm_80") == [(4096, LARGE), (32, OTHER)]


def test_a_fixed_launch_takes_the_entries_that_serve_its_size():
    narrow = Launch("narrow", lambda: None, table=TABLE, size=80)
    wide = Launch("wide", lambda: None, table=TABLE, size=64)
    assert items([narrow, wide]) == [(80, LARGE), (64, SMALL), (64, LARGE)]
    assert items([Launch("plain", lambda: None)]) == [(None, None)]


def test_entries_left_out_are_an_error():
    with pytest.raises(ValueError, match=r"no launch compiles entry \(sm_90, 64\).*'tiles'"):
        items([Launch("wide", lambda: None, table=TABLE, size=80)])
    with pytest.raises(ValueError, match="must take the size as a parameter"):
        items([Launch("vague", lambda: None, table=TABLE)])
    with pytest.raises(ValueError, match="two launches are called 'same'"):
        items([Launch("same", lambda: None), Launch("same", lambda: None)])


def test_the_plan_forces_each_entry():
    from shared_kernels.device import Target

    seen = []
    target = Target("cuda", "sm_90", 0, 1)
    launch = Launch("forward", lambda size: seen.append(TABLE.pick(target, size)), table=TABLE)
    for item in plan("package", [launch], "sm_90"):
        item.compile()
    assert seen == [SMALL, LARGE, LARGE]
    assert TABLE.pick(target, 128) == LARGE and not configs._forced


# --------------------------------------------------------------------------------------
# the judge

GOOD = {
    "target": "sm_90",
    "launch": "package: forward",
    "size": 64,
    "config": "BLOCK=64",
    "kernel": "_forward_kernel",
    "variant": 0,
    "num_warps": 8,
    "num_stages": 2,
    "shared": 1000,
    "matrix": True,
    "registers": 100,
    "stack": 0,
    "spills": 0,
    "HGMMA": 4,
    "HMMA": 0,
    "mfma": 0,
}


ROWS = {"config": "BLOCK_R=1, BLOCK_N=1024, num_warps=4, num_stages=2", "num_warps": 4}
WIDE = {**ROWS, "access": 16, "load": [4, 16], "store": [16, 16]}


@pytest.mark.parametrize(
    "change,text",
    [
        ({"stack": 40}, "stack 40 B per thread"),
        ({"shared": 227 * 1024 + 1}, "sm_90 has 232448 B"),
        ({"HGMMA": 0, "HMMA": 64}, "no HGMMA"),
        ({"target": "sm_120", "HMMA": 1, "shared": 99 * 1024 + 1}, "sm_120 has 101376 B"),
        ({"target": "sm_80", "HMMA": 1, "shared": 163 * 1024 + 1}, "sm_80 has 166912 B"),
        ({"target": "sm_80", "HMMA": 0}, "no HMMA"),
        ({"target": "gfx942", "mfma": 1, "shared": 64 * 1024 + 1}, "gfx942 has 65536 B"),
        ({"target": "gfx942", "mfma": 1, "stack": 4}, "4 B of scratch"),
        ({"target": "gfx942", "mfma": 1, "spills": 2}, "2 spilled VGPRs"),
        ({"target": "gfx942", "mfma": 0}, "no mfma"),
        ({"target": "sm_86", "HMMA": 1, "shared": 99 * 1024 + 1}, "sm_86 has 101376 B"),
        ({"target": "sm_100", "HMMA": 0, "UTCHMMA": 0}, "no UTCHMMA"),
        ({"target": "gfx950", "mfma": 1, "shared": 160 * 1024 + 1}, "gfx950 has 163840 B"),
        ({**WIDE, "load": [2, 8]}, "loads at most 8 B a thread at once, must be 16 B"),
        ({**WIDE, "store": []}, "stores at most 0 B"),
        ({**WIDE, "load": [2, 16]}, "loads 2 B a thread at once somewhere, beside 16 B"),
        ({**WIDE, "store": [2, 16]}, "stores 2 B"),
        (
            {**WIDE, "target": "gfx942", "mfma": 1, "load": [4, 4]},
            "loads at most 4 B a thread at once, must be 8 B",
        ),
        ({"error": "ptxas says no"}, "does not compile: ptxas says no"),
    ],
)
def test_each_gate_can_fail_and_says_why(change, text):
    (found,) = broken_gates({**GOOD, **change})
    assert text in found


def test_what_is_allowed_passes():
    assert broken_gates(GOOD) == []
    assert broken_gates({**GOOD, "stack": 32, "shared": 227 * 1024}) == []
    assert broken_gates({**GOOD, "matrix": False, "HGMMA": 0}) == []
    assert broken_gates({**GOOD, "target": "sm_80", "HGMMA": 0, "HMMA": 8}) == []
    assert broken_gates({**GOOD, "target": "gfx942", "HGMMA": 0, "mfma": 8}) == []
    assert broken_gates({**GOOD, "target": "sm_103", "HGMMA": 0, "UTCHMMA": 8}) == []
    assert broken_gates({**GOOD, **WIDE}) == []
    assert broken_gates({**GOOD, "load": [2, 2], "store": [2, 2]}) == []  # nothing is asked


def test_a_wide_head_may_give_up_hgmma_and_nothing_else():
    launch = Launch("backward", lambda size: None, table=TABLE, hmma_above=64)
    rows = [item.row() for item in plan("package", [launch], "sm_90")]
    assert [row.get("hmma_allowed", False) for row in rows] == [False, False, True]
    wide = {**GOOD, "hmma_allowed": True, "HGMMA": 0, "HMMA": 64}
    assert broken_gates(wide) == []
    assert "no HGMMA" in broken_gates({**wide, "HMMA": 0})[0]
    assert "spills" in broken_gates({**wide, "stack": 64})[0]


@pytest.mark.parametrize(
    ("code", "is_ptx", "load", "store"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", True, [16], []),
        ("ld.global.L1::evict_last.L2::cache_hint.v2.b64 {%rd1, %rd2}, [%rd3];", True, [16], []),
        ("ld.global.nc.b16 %rs1, [%rd1]; st.global.v2.f32 [%rd2], {%f1, %f2};", True, [2], [8]),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", True, [16], []),
        ("ld.shared.v4.b32 {%r1}, [%r2]; ld.param.b64 %r, [p]; st.local.b32 [a];", True, [], []),
        ("global_load_dwordx4 v[0:3], v4, s[2:3]\nglobal_store_short v0, v1", False, [16], [2]),
        ("buffer_load_ushort v1, v2, s[0:3], 0\nbuffer_store_dwordx2 v[1:2]", False, [2], [8]),
        ("global_load_short_d16_hi v1, v2\nglobal_load_ubyte v1, v2", False, [2, 1], []),
        ("ds_load_b128 v[0:3], v1\ns_load_dwordx4 s[0:3], s[4:5]", False, [], []),
    ],
)
def test_the_bytes_of_an_access_are_read_from_the_code(code, is_ptx, load, store):
    assert access.accesses(code, is_ptx) == {"load": load, "store": store}


def test_a_kernel_that_many_launches_share_is_complained_of_once():
    bad = {**GOOD, "stack": 64}
    (text,) = complaints([bad, GOOD, {**bad, "launch": "package: other"}])
    assert "package: forward" in text and "(and 1 more launches of it)" in text
    assert len(complaints([bad, {**bad, "target": "sm_80", "HMMA": 1}])) == 2


def test_the_comparison_finds_absent_new_and_slower():
    other = {**GOOD, "launch": "package: backward"}
    assert compare([GOOD], [GOOD]) == []
    assert compare([{**GOOD, "registers": 7, "seconds": 9}], [GOOD]) == []
    (absent,) = compare([GOOD], [GOOD, other])
    assert absent.startswith("absent: sm_90 | package: backward | size 64")
    (new,) = compare([GOOD, other], [GOOD])
    assert new.startswith("new: sm_90 | package: backward") and "--report" in new
    (lost,) = compare([{**GOOD, "HGMMA": 0}], [GOOD])
    assert lost.startswith("HGMMA lost") and "had 4" in lost
    (partly,) = compare([{**GOOD, "HGMMA": 2, "HMMA": 16}], [GOOD])
    assert partly.startswith("HGMMA lost")
    assert len(compare([{**GOOD, "config": "BLOCK=32"}], [GOOD])) == 2  # another entry of a table


# --------------------------------------------------------------------------------------
# real compilations

LAUNCHES = """
import os

import torch
import triton
import triton.language as tl

from shared_kernels import device
from shared_kernels.configs import ANY, Config, Table
from shared_kernels.offline import Launch
from shared_kernels.triton import dot, math, threshold, tiles

SIZES = Table("sizes", {(ANY, 64): (Config(BLOCK=64, num_warps=4),)})


@triton.jit
def _product_kernel(a_ptr, b_ptr, o_ptr, n, stride, BLOCK: tl.constexpr, D: tl.constexpr):
    b_o = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, tl.cdiv(n, D)):
        b_a = tiles.load_tile(a_ptr + i * D, 0, BLOCK, stride, BLOCK, D, D)
        b_b = tiles.load_tile(b_ptr + i * D, 0, BLOCK, stride, BLOCK, D, D)
        b_o = dot.dot_acc(b_a, tl.trans(b_b), b_o)
    tiles.store_tile(o_ptr, b_o, 0, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK)


@triton.jit
def _crowded_kernel(x_ptr, o_ptr, BLOCK: tl.constexpr):
    o_n = tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o_n)  # all of it must stay while the sum is made
    tl.store(o_ptr + o_n, b_x - tl.sum(b_x, 0))


@triton.jit
def _newton_kernel(x_ptr, o_ptr, p, n, BLOCK: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr):
    b_x = tiles.load_row(x_ptr, 0, n, BLOCK, other=-float("inf"))
    b_tau = tl.max(b_x, 0) - 1.0
    for _ in range(0, 2):
        b_w, b_p = threshold.weight_pair(math.relu(b_x - b_tau), p, P, FAST)
        b_tau += threshold.newton_update(tl.sum(b_p, 0), tl.sum(b_w, 0), p, P)
    b_w, b_p = threshold.weight_pair(math.relu(b_x - b_tau), p, P, FAST)
    tiles.store_row(o_ptr, math.exp2(math.log2(b_p, FAST)), 0, n, BLOCK)


FACTOR = tl.constexpr(3.0)


@triton.jit
def _scaled(x):
    return x * FACTOR


@triton.jit
def _early_kernel(x_ptr):
    tl.store(x_ptr, _scaled(tl.load(x_ptr)))


@triton.jit
def _late_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, _scaled(tl.load(x_ptr)))


def newton(P, fast):
    x, out = torch.empty(1024), torch.empty(1024, dtype=torch.bfloat16)
    fast = fast and math.fast(device.target(x))
    _newton_kernel[(1,)](x, out, 2.5, 1000, BLOCK=1024, P=P, FAST=fast)


def product(block, **options):
    x = torch.empty(256, 256, dtype=torch.float16)
    assert not x.any()  # torch.empty is zeroed, so that launchers meet no garbage
    out = torch.empty(block, block)
    _product_kernel[(1,)](x, x, out, 256, 256, BLOCK=block, D=64, **options)


def good(size):
    config = SIZES.pick(device.target(torch.empty(1)), size)
    product(config["BLOCK"], num_warps=config.num_warps, num_stages=config.num_stages)


def narrow():
    product(16, num_warps=4)


def greedy():
    product(128, num_warps=8, num_stages=5 if device.target().backend == "hip" else 9)


def crowded():
    n = 32768 if device.target().backend == "hip" else 16384
    _crowded_kernel[(1,)](torch.empty(n), torch.empty(n), BLOCK=n, num_warps=1)


def dying():
    if device.target().arch == "sm_120":
        os.abort()
    narrow()


def raising():
    raise ValueError("not for this GPU")


LAUNCHES = [
    Launch("good", good, table=SIZES),
    Launch("narrow", narrow),
    Launch("exact", lambda: newton(0, False)),
    Launch("fast", lambda: newton(0, True)),
    Launch("cubic", lambda: newton(3, True)),
    Launch("greedy", greedy),
    Launch("dying", dying),
    Launch("raising", raising),
    Launch("crowded", crowded),
    Launch("early", lambda: _early_kernel[(1,)](torch.empty(1))),
    Launch("late", lambda: _late_kernel[(1,)](torch.empty(1), torch.empty(1))),
]
"""

needs_compilers = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("package") / "launches.py"
    path.write_text(LAUNCHES, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(launches, tmp_path_factory):
    """All of them for all targets; of pytest-xdist's workers the first one compiles for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    report = folder / "rows.json"
    with FileLock(f"{report}.lock"):
        if not report.exists():
            report.write_text(json.dumps(compile_all([str(launches)])))
    return json.loads(report.read_text())


def find(rows, target, launch):
    (row,) = [r for r in rows if r["target"] == target and r["launch"] == f"launches: {launch}"]
    return row


@needs_compilers
@pytest.mark.parametrize("target", TARGETS)
def test_a_launch_compiles_for_a_gpu_that_is_not_there(rows, target):
    row = find(rows, target, "good")
    assert broken_gates(row) == []
    assert row["kernel"] == "_product_kernel" and row["matrix"] and row["num_warps"] == 4
    assert (row["size"], row["config"]) == (64, "BLOCK=64, num_warps=4, num_stages=2")
    assert 16 < row["registers"] < 255 and row["shared"] > 0 and row["instructions"] > 50
    counts = {name for name in ("HGMMA", "HMMA", "mfma") if row[name]}
    assert counts == {{"sm_90": "HGMMA", "gfx942": "mfma"}.get(target, "HMMA")}
    assert row["mix"]["tensor"] <= row[counts.pop()] and row["mix"]["tensor"] > 0
    assert row["loop"] < row["instructions"] and sum(row["mix"].values()) == row["loop"]
    assert 0 < row["tensor_share"] <= 1 and row["ns"] > 0


@needs_compilers
@pytest.mark.parametrize("target", TARGETS)
def test_spills_and_too_much_shared_memory_are_found(rows, target):
    (spill,) = broken_gates(find(rows, target, "crowded"))
    assert spill.startswith("spills:")
    (greed,) = broken_gates(find(rows, target, "greedy"))
    assert "of shared memory" in greed


@needs_compilers
def test_sixteen_rows_lose_the_fast_matrix_instruction_on_hopper_alone(rows):
    (found,) = broken_gates(find(rows, "sm_90", "narrow"))
    assert "no HGMMA" in found
    assert broken_gates(find(rows, "sm_80", "narrow")) == []


@needs_compilers
@pytest.mark.parametrize("target", TARGETS)
def test_the_fast_logarithm_is_shorter_and_for_nvidia_alone(rows, target):
    exact, fast, cubic = (find(rows, target, name) for name in ("exact", "fast", "cubic"))
    assert broken_gates(exact) == broken_gates(fast) == broken_gates(cubic) == []
    assert not exact["matrix"] and exact["tensor_share"] == 0 and exact["mix"]["special"] > 0
    if target == "gfx942":
        assert fast["instructions"] == exact["instructions"]
    else:
        assert fast["instructions"] < 0.8 * exact["instructions"]


@needs_compilers
@pytest.mark.thorough
def test_kernels_hold_their_gates_without_fused_products_too(launches, rows, monkeypatch):
    """Triton 3.10 will not fuse a product with a sum unless TRITON_DEFAULT_FP_FUSION is 1."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    (fused,) = compile_all([str(launches)], ["sm_90"], "*exact*")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    (apart,) = compile_all([str(launches)], ["sm_90"], "*exact*")
    assert broken_gates(fused) == broken_gates(apart) == []
    # the tables and the committed report are those of fused products, the default up to Triton 3.9
    default = find(rows, "sm_90", "exact")
    assert fused["instructions"] == default["instructions"] < apart["instructions"]


COPIES = """
import torch
import triton
import triton.language as tl

from shared_kernels.offline import Launch


@triton.jit(do_not_specialize=["n"])
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr):
    if IS_EVEN:
        n = n // 8 * 8
    o_n = tl.arange(0, BLOCK)
    tl.store(y_ptr + o_n, tl.load(x_ptr + o_n, mask=o_n < n, other=0.0), mask=o_n < n)


def copy(is_even):
    x = torch.zeros(2048, dtype=torch.bfloat16)
    return lambda: _copy_kernel[(1,)](x, x, 2000, BLOCK=2048, IS_EVEN=is_even)


LAUNCHES = [
    Launch("even, nothing asked", copy(True)),
    Launch("even", copy(True), access=16),
    Launch("odd", copy(False), access=16),
]
"""


@pytest.mark.thorough
@needs_compilers
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_mask_that_hides_the_vector_breaks_the_gate(target, tmp_path):
    """The same copy with a length that the compiler knows as a multiple of eight, and without."""
    path, report = tmp_path / "launches.py", tmp_path / "report.json"
    path.write_text(COPIES, "utf-8")
    rows = compile_all([str(path)], [target])
    even, odd, silent = (
        find(rows, target, name) for name in ("even", "odd", "even, nothing asked")
    )
    assert even["load"] == even["store"] == silent["load"] == [16, 16]
    assert broken_gates(even) == broken_gates(silent) == [] and "access" not in silent
    assert [text.split(" a thread")[0] for text in broken_gates(odd)] == [
        "loads at most 2 B",
        "stores at most 2 B",
    ]
    # a report from before the gate says nothing of accesses: what asks for them is compiled anew
    old = [{k: v for k, v in row.items() if k not in ("load", "store")} for row in rows]
    write_report(report, [{**row, "registers": -1} for row in old])
    again = compile_all([str(path)], [target], known=str(report))
    assert broken_gates(find(again, target, "odd")) == broken_gates(odd)
    write_report(report, [{**row, "registers": -1} for row in rows])
    again = compile_all([str(path)], [target], known=str(report))
    assert {row["registers"] for row in again} == {-1}
    assert broken_gates(find(again, target, "odd")) == broken_gates(odd)


@needs_compilers
def test_a_failure_costs_one_launch_and_hides_no_other(rows):
    assert "process ended" in broken_gates(find(rows, "sm_120", "dying"))[0]
    assert broken_gates(find(rows, "sm_80", "dying")) == []
    for target in TARGETS:
        assert "ValueError: not for this GPU" in broken_gates(find(rows, target, "raising"))[0]
    assert len(rows) == 11 * len(TARGETS)


@pytest.mark.thorough
@needs_compilers
def test_other_cards_get_one_launch_of_each_kernel(launches):
    assert not set(MORE) & set(TARGETS) and set(MORE) <= set(SHARED_MEMORY)
    rows = compile_all([str(launches)], ["sm_100"])
    product = find(rows, "sm_100", "good")
    assert broken_gates(product) == [] and product["UTCHMMA"] > 0 and "bound" not in product
    assert "ValueError: not for this GPU" in broken_gates(find(rows, "sm_100", "raising"))[0]
    kernels = [row["kernel"] for row in rows if "kernel" in row]
    assert len(kernels) == len(set(kernels)) == 5


@needs_compilers
def test_the_command_line(launches, rows, tmp_path, capsys, monkeypatch):
    def compiled(files, targets, only, jobs, known):
        assert (files, targets, only, jobs, known) == ([str(launches)], ["sm_80"], "good", 2, "")
        return [find(rows, "sm_80", "good")]

    monkeypatch.setattr("shared_kernels.offline.__main__.compile_all", compiled)
    arguments = [str(launches), "--targets", "sm_80", "--only", "good"]
    report = tmp_path / "results" / "offline.json"
    assert main([*arguments, "--report", str(report), "-v"]) == 0
    out = capsys.readouterr().out
    assert "sm_80 | launches: good | size 64" in out and "every gate holds" in out
    head = json.loads(report.read_text())
    assert set(head) == {"triton", "torch", "date", "commit", "kernels"}
    write_report(report, rows)  # all targets and launches: --targets and --only limit the check
    assert main([*arguments, "--check", str(report)]) == 0
    write_report(report, [{**r, "config": "BLOCK=8"} for r in rows])
    assert main([*arguments, "--check", str(report)]) == 1
    out = capsys.readouterr().out
    assert "FAILED absent: sm_80" in out and "FAILED new: sm_80" in out and "2 failures" in out
    # a report keeps what this run did not compile
    other = {**GOOD, "launch": "launches: good, too"}
    write_report(report, [GOOD, other, {**find(rows, "sm_80", "good"), "config": "BLOCK=8"}])
    assert main([*arguments, "--report", str(report)]) == 0
    assert read_report(report) == [find(rows, "sm_80", "good"), other, GOOD]
    with pytest.raises(SystemExit):
        main([str(launches), "--targets", "sm_75"])


@pytest.mark.thorough
@needs_compilers
def test_only_what_changed_is_compiled_again(launches, rows, tmp_path):
    """A known kernel's row is the report's, told by a mark in it; a changed kernel is compiled."""
    here = [row for row in rows if row["target"] == "sm_80" and "key" in row]
    marked = [{**row, "registers": -1} for row in here]
    report = tmp_path / "report.json"
    write_report(report, marked)
    again = compile_all([str(launches)], ["sm_80"], known=str(report))
    assert sum(row.get("registers") == -1 for row in again) == len(here)

    changed = tmp_path / "launches.py"
    source = launches.read_text("utf-8")
    changed.write_text(source.replace("b_x - tl.sum(b_x, 0)", "b_x + tl.sum(b_x, 0)"), "utf-8")
    again = compile_all([str(changed)], ["sm_80"], known=str(report))
    compiled = {row["launch"] for row in again if row.get("registers", -1) != -1}
    assert compiled == {"launches: crowded"}

    # what described a kernel otherwise describes it no more
    write_report(report, [{**row, "key": "0" * 16} for row in marked])
    again = compile_all([str(launches)], ["sm_80"], "*exact*", known=str(report))
    assert [row["registers"] for row in again] == [
        row["registers"] for row in here if row["launch"] == "launches: exact"
    ]


@pytest.mark.thorough
@needs_compilers
def test_a_key_knows_neither_order_nor_lines(launches, rows, tmp_path):
    """Other launches before one, or a comment above its kernel: nothing is compiled again."""
    marked = [{**row, "registers": -1} for row in rows if "key" in row]
    report, moved = tmp_path / "report.json", tmp_path / "launches.py"
    write_report(report, marked)
    source = "# one line more" + launches.read_text("utf-8") + "\nLAUNCHES.reverse()\n"
    source = source.replace("(x):\n", '(x):\n    """A docstring."""  # a comment\n')
    moved.write_text(source, "utf-8")
    again = compile_all([str(moved)], ["sm_80"], known=str(report))
    here = [row for row in marked if row["target"] == "sm_80"]
    assert sum(row.get("registers") == -1 for row in again) == len(here)
    # a constant of a function that the kernel calls is part of its key
    moved.write_text(source.replace("constexpr(3.0)", "constexpr(4.0)"), "utf-8")
    again = compile_all([str(moved)], ["sm_80"], known=str(report))
    compiled = {row["launch"] for row in again if row.get("registers", -1) != -1}
    assert compiled == {"launches: early", "launches: late"}


def test_a_key_knows_no_folder(tmp_path):
    """Where a device library lies is nothing to a key, and what it holds is."""
    digests = []
    for folder, content in (("here", "a"), ("there", "a"), ("elsewhere", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ocml.bc").write_text(content, "utf-8")
        libraries = (("ocml", str(tmp_path / folder / "ocml.bc")),)
        digests.append(keys._options(SimpleNamespace(num_warps=4, extern_libs=libraries)))
    assert digests[0] == digests[1] != digests[2]


def test_the_package_is_the_folder_above_the_tests(tmp_path):
    path = tmp_path / "packages" / "wonder" / "tests" / "launches.py"
    path.parent.mkdir(parents=True)
    path.write_text("LAUNCHES = []\n", encoding="utf-8")
    assert load(path) == ("wonder", [])
    assert label({**GOOD, "size": None}).startswith("sm_90 | package: forward | BLOCK=64")


@pytest.mark.parametrize(
    ("platform", "version", "word"),
    [("darwin", "3.7.1", "Linux"), ("linux", "3.3.0", "got 3.3.0"), ("linux", "3.10.0", None)],
)
def test_an_old_triton_is_said(monkeypatch, capsys, platform, version, word):
    triton = pytest.importorskip("triton", reason="no Triton on this platform")
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(triton, "__version__", version)
    reason = why_not()
    assert (reason is None) if word is None else (word in reason)
    if word:
        assert main(["launches.py"]) and word in capsys.readouterr().out
