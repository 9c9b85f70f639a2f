"""The model of an inner loop: cycles that can be counted by hand."""

import re

import pytest

from shared_kernels.offline import TARGETS, model
from shared_kernels.offline.__main__ import main
from shared_kernels.offline.report import kernels, summary, write_report

pytestmark = pytest.mark.tools

NS, SHARE = 0.05, 1e-3  # half of the last digit that a report writes, and its whole
DATA_SHEET = 0.01  # data sheets round clocks and rates


def sass(text):
    """Lines of a listing: addresses, and a semicolon behind each instruction."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/    {line} ;"
        for i, line in enumerate(lines)
    )


# Two loops, one in the other; a branch that leaves the inner one and comes back; a trap; padding.
AMPERE = sass("""
    LDC R1, c[0x0][0x28]
    MUFU.RCP R2, R3
    .L_x_1:
    LDG.E.128 R8, desc[UR4][R2.64]
    .L_x_0:
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    @!P0 FFMA R5, R5, R6, R7
    MUFU.EX2 R5, R5
    F2FP.BF16.F32.PACK_AB R5, R5, R6
    IADD3 R2, R2, 0x10, RZ
    UIADD3 UR4, UR4, 0x1, URZ
    @P2 BRA `(.L_x_3)
    .L_x_4:
    LDSM.16.M88.4 R8, [R2]
    STS.64 [R2], R8
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P0 BRA `(.L_x_0)
    @!P1 BRA `(.L_x_1)
    EXIT
    .L_x_3:
    IMAD R2, R2, R3, R4
    BRA `(.L_x_4)
    .L_x_2:
    BRA `(.L_x_2)
    NOP
""")

# HGMMA is one instruction for four warps; a conditional jump without a predicate in front.
HOPPER = sass("""
    S2R R0, SR_TID.X
    .L_x_0:
    WARPGROUP.ARRIVE
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    FMNMX R5, R5, R6, !PT
    FADD R5, R5, R6
    LDGSTS.E.BYPASS.128 [R2], desc[UR4][R8.64]
    BRA.U !UP0, `(.L_x_0)
    EXIT
""")

# No matrices, fp64: what a consumer's processor does two of in a cycle.
BLACKWELL = sass("""
    LDCU UR4, c[0x0][0x28]
    .L_x_0:
    LDG.E.64 R4, desc[UR4][R2.64]
    DFMA R4, R4, R6, R8
    DSETP.GT.AND P0, PT, R4, R6, PT
    FSEL R4, R4, R6, P0
    @P0 BRA `(.L_x_0)
    EXIT
""")

GCN = """
_kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; %loop
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\tds_read_b128 v[4:7], v8
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\tv_fma_f32 v1, v2, v3, v4
\tv_pk_mul_f32 v[0:1], v[2:3], v[4:5]
\tv_exp_f32_e32 v1, v1
\tv_add_u32_e32 v2, v2, v3
\ts_cbranch_scc0 .LBB0_3
.LBB0_2:
\ts_add_i32 s0, s0, 1
\ts_waitcnt vmcnt(0)
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.LBB0_3:
\tv_cvt_f32_i32_e32 v1, v1
\tv_fma_f64 v[0:1], v[2:3], v[4:5], v[6:7]
\ts_branch .LBB0_2
"""

# What is expected of each: instructions of the inner loop, cycles by unit (counted beside it), mix.
CASES = {
    # 2048 products at 256; FFMA at 2 and IMAD at 2; F2FP and IADD3 at 2; one MUFU at 8; 512 + 256
    # bytes of shared memory at 128 for four quarters; 13 instructions, UIADD3 among them
    "sm_80": (
        AMPERE,
        13,
        {"tensor": 8, "fma": 4, "alu": 4, "special": 8, "shared": 24, "issue": 13},
        {"tensor": 1, "fp": 2, "special": 1, "integer": 2, "scalar": 1, "shared": 2, "wait": 4},
    ),
    # 131072 / 4 products at 512 and 2048 at 320; FADD at 1; FMNMX at 2; 512 bytes at 64
    "sm_90": (
        HOPPER,
        7,
        {"tensor": 64 + 6.4, "alu": 2, "fma": 1, "global": 32, "issue": 7},
        {"tensor": 2, "fp": 2, "global": 1, "wait": 2},
    ),
    # two in fp64 at 64; FSEL at 1; 256 bytes at 64
    "sm_120": (
        BLACKWELL,
        5,
        {"fp64": 128, "alu": 1, "global": 16, "issue": 5},
        {"fp": 1, "fp64": 2, "global": 1, "wait": 1},
    ),
    # 8192 products at 256; five vector instructions at 4, an exp2 and a conversion at 16, of one
    # unit; a scalar one at 4; 1024 bytes each of shared memory at 128 and global memory at 64
    "gfx942": (
        GCN,
        14,
        {"tensor": 32, "vector": 4 * 4 + 2 * 16, "scalar": 4, "shared": 32, "global": 64},
        {
            "tensor": 1,
            "fp": 2,
            "fp64": 1,
            "special": 2,
            "integer": 1,
            "scalar": 1,
            "shared": 1,
            "global": 1,
            "wait": 4,
        },
    ),
}


@pytest.mark.parametrize("target", TARGETS)
def test_the_inner_loop_and_its_cycles_counted_by_hand(target):
    code, length, cycles, mix = CASES[target]
    loop, looped = model.inner_loop(code, target != "gfx942")
    assert looped and len(loop) == length
    assert model.units(target, loop) == pytest.approx(cycles)
    row = model.described(target, code, num_warps=8)
    assert row["mix"] == mix and sum(mix.values()) == row["loop"] == length and row["looped"]
    bound = max(cycles, key=cycles.__getitem__)
    assert row["bound"] == bound and row["cycles"] == round(2 * cycles[bound])
    assert row["ns"] == pytest.approx(2 * cycles[bound] / model.RATES[target].clock, abs=NS)
    share = cycles.get("tensor", 0) / cycles[bound]
    assert row["tensor_share"] == pytest.approx(share, abs=SHARE)
    assert model.described(target, code, num_warps=4)["cycles"] == round(cycles[bound])


@pytest.mark.parametrize(
    ("target", "tflops", "card"),
    [("sm_80", 312, 108), ("sm_90", 989.4, 132), ("sm_120", 503.8, 188), ("gfx942", 1307.4, 304)],
)
def test_the_rates_are_those_of_the_data_sheets(target, tflops, card):
    rates = model.RATES[target]
    fastest = max(rates.products.values())
    assert TARGETS[target][3] == card
    assert 2e-3 * fastest * model.QUARTERS * card * rates.clock == pytest.approx(
        tflops, rel=DATA_SHEET
    )
    assert rates.lanes == TARGETS[target][2]


def test_a_branch_behind_the_loop_belongs_to_it_and_a_trap_does_not():
    loop, _ = model.inner_loop(AMPERE, nvidia=True)
    assert "IMAD" in loop and loop[0].startswith("HMMA") and loop.count("BRA") == 3
    without = AMPERE.replace("@P2 BRA `(.L_x_3)", "@P2 NOP")
    assert "IMAD" not in model.inner_loop(without, nvidia=True)[0]
    # the outer loop is the inner one when the jump back to the inner is gone
    outer, _ = model.inner_loop(AMPERE.replace("@P0 BRA `(.L_x_0)", "NOP"), nvidia=True)
    assert outer[0].startswith("LDG") and len(outer) == 15


@pytest.mark.parametrize("target", TARGETS)
def test_code_without_a_loop_counts_as_a_whole_and_says_so(target):
    code = re.sub(r"(?:@!?P\d )?BRA[^;]*|s_cbranch\w+ \S+|s_branch \S+", "NOP", CASES[target][0])
    row = model.described(target, code, 4)
    assert not row["looped"] and row["loop"] > CASES[target][1] - 4 and row["ns"] > 0
    with pytest.raises(ValueError, match=f"no instruction was read from the code for {target}"):
        model.described(target, "nothing", 4)


def test_the_padding_of_a_kernel_without_a_loop_is_not_counted():
    flat = sass("FADD R1, R1, R2\nEXIT\n.L_x_0:\nBRA `(.L_x_0)\nNOP\nNOP")
    assert model.inner_loop(flat, nvidia=True) == (["FADD", "EXIT"], False)
    nothing_but_waits = sass("BAR.SYNC 0x0\nEXIT")
    assert model.described("sm_80", nothing_but_waits, 4)["bound"] == "issue"


@pytest.mark.parametrize(
    ("opcode", "products"),
    [
        ("HMMA.16816.F32.BF16", 2048),
        ("HMMA.1688.F32.TF32", 2048),  # half the rate
        ("HGMMA.64x128x16.F32.BF16", 32768),
        ("v_mfma_f32_16x16x16_bf16_1k", 4096),
        ("v_mfma_f32_32x32x2f32", 16384),  # an eighth
        ("v_mfma_f32_32x32x4_xf32", 8192),
        ("v_mfma_f64_16x16x4_f64", 8192),
    ],
)
def test_matrix_instructions_are_counted_in_bf16_s_products(opcode, products):
    assert model._products(opcode)[1] == products


def test_a_matrix_instruction_of_unknown_shape_is_an_error():
    with pytest.raises(ValueError, match="shape of HGMMA"):
        model._products("HGMMA.F32")


@pytest.mark.parametrize(
    ("opcode", "kind", "width"),
    [
        ("LDG.E.U8", "global", 1),
        ("LDG.E.64", "global", 8),
        ("LDGSTS.E.BYPASS.128", "global", 16),
        ("STL.64", "global", 8),
        ("SHFL.BFLY", "shared", 4),
        ("LDSM.16.MT88.2", "shared", 8),
        ("ds_write2_b32", "shared", 8),
        ("ds_bpermute_b32", "shared", 4),
        ("ds_read_u16", "shared", 2),
        ("ds_read2st64_b64", "shared", 16),
        ("ds_write_b16_d16_hi", "shared", 2),
        ("buffer_load_ubyte", "global", 1),
        ("global_load_ushort", "global", 2),
        ("buffer_store_dword", "global", 4),
    ],
)
def test_bytes_of_loads_and_stores(opcode, kind, width):
    assert model._kind(opcode) == kind and model._width(opcode) == width


@pytest.mark.parametrize(
    ("opcode", "kind", "unit"),
    [
        ("I2FP.F32.S32", "fp", "alu"),
        ("F2F.F64.F32", "special", "special"),
        ("I2F.S16", "special", "special"),
        ("F2FP.BF16.F32.PACK_AB", "fp", "alu"),
        ("FSETP.GT.AND", "fp", "alu"),
        ("IMAD.WIDE", "integer", "fma"),
        ("MOV", "integer", "alu"),
        ("DEPBAR.LE", "wait", None),
        ("DMUL", "fp64", "fp64"),
        ("FENCE.VIEW", "wait", None),
        ("WARPGROUP.ARRIVE", "wait", None),
        ("ULDC.64", "scalar", None),
        ("LDCU", "scalar", None),
        ("v_cmp_gt_f32_e32", "fp", "vector"),
        ("v_cmp_gt_u32_e32", "integer", "vector"),
        ("v_div_scale_f32", "fp", "vector"),
        ("v_add_f64", "fp64", "vector"),
        ("v_log_f32_e32", "special", "vector"),
        ("v_cvt_pk_bf16_f32", "fp", "vector"),
        ("s_barrier", "wait", None),
        ("s_mul_i32", "scalar", "scalar"),
        ("s_load_dwordx4", "scalar", "scalar"),
    ],
)
def test_kinds_and_units(opcode, kind, unit):
    found = model._entry(opcode)
    assert (found[0], found[2]) == (kind, unit)
    assert found[1] is None or all(
        found[1] in rates.cycles
        for target, rates in model.RATES.items()
        if target.startswith("sm_") == opcode[0].isupper()
    )


def row_for(target, launch="package: forward", **changes):
    code = CASES[target][0]
    return {
        "target": target,
        "launch": launch,
        "size": 64,
        "config": "",
        "kernel": "_k",
        "registers": 90,
        "variant": 0,
        **model.described(target, code, 8),
        **changes,
    }


def test_the_summary(tmp_path, capsys):
    row = row_for("sm_80")
    old = {k: v for k, v in row.items() if k not in ("bound", "mix")} | {"launch": "other: old"}
    text = summary([row, {**row, "looped": False}, old])
    assert "| sm_80 | `_k` | package: forward, 64 | 90 | 13 | 1 tensor, 2 fp," in text
    assert "| 13, no loop |" in text
    assert "| shared | 34.0 | 33% |" in text and "- sm_80: shared 2" in text
    assert "1 kernels were recorded without an inner loop" in text
    path = tmp_path / "offline.json"
    write_report(path, [row, old])
    assert main(["--summary", str(path), "--only", "package", "--targets", "sm_80"]) == 0
    said = capsys.readouterr().out
    assert "package: forward" in said and "without an inner loop" not in said
    with pytest.raises(SystemExit):
        main([])


def test_the_short_summary_has_a_line_for_each_kernel():
    rows = [row_for("sm_80"), row_for("sm_80", "package: wide", ns=99.0, tensor_share=0.5)]
    rows += [row_for("gfx942", looped=False), row_for("sm_120", "other: sums", kernel="_s")]
    text = kernels(rows)
    assert (
        "| package | `_k` | 2 | shared; 34.0 … 99.0 ns; 33 … 50 % | – | – | global, no loop;"
        in text
    )
    assert "| other | `_s` | 1 | – | – | fp64; 98.5 ns | – |" in text
    assert kernels([]).count("\n") == 1
