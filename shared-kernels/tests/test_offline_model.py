"""The model of an inner loop: cycles that can be counted by hand."""

import pytest

from shared_kernels.offline import model
from shared_kernels.offline.__main__ import main
from shared_kernels.offline.report import summary, write_report

SASS = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MUFU.RCP R2, R3 ;
.L_x_1:
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/              @!P0 FFMA R5, R5, R6, R7 ;
        /*0050*/                   MUFU.EX2 R5, R5 ;
        /*0060*/                   F2FP.BF16.F32.PACK_AB R5, R5, R6 ;
        /*0070*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0080*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0090*/                   STS.64 [R2], R8 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
        /*00c0*/              @!P1 BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
.L_x_2:
        /*00e0*/                   BRA `(.L_x_2);
        /*00f0*/                   NOP;
"""

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
\ts_add_i32 s0, s0, 1
\ts_waitcnt vmcnt(0)
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def test_the_inner_loop_of_nvidia_s_code():
    loop = model.inner_loop(SASS, nvidia=True)
    assert len(loop) == 9 and loop[0].startswith("HMMA") and loop[-1] == "BRA"
    used = model.units("sm_80", loop)
    # 2048 multiply-adds at 256; FFMA and F2FP at 2; one MUFU at 8; IADD3 at 2; 512 + 256 bytes of
    # shared memory at 128 for four quarters
    assert used == {
        "tensor": 8, "fp": 4, "special": 8, "integer": 2, "shared": 24, "global": 0, "issue": 9,
    }  # fmt: skip


def test_the_columns_follow_from_the_cycles():
    row = model.described("sm_80", SASS, num_warps=8)
    assert row["bound"] == "shared" and row["cycles"] == 48 and row["loop"] == 9
    assert row["ns"] == pytest.approx(48 / 1.41, abs=0.05)
    assert row["tensor_share"] == pytest.approx(8 / 24, abs=1e-3)
    assert row["mix"] == {
        "tensor": 1, "fp": 2, "special": 1, "integer": 1, "shared": 2, "wait": 2,
    }  # fmt: skip


def test_the_inner_loop_of_amd_s_code():
    loop = model.inner_loop(GCN, nvidia=False)
    assert len(loop) == 10
    # 8192 products at 256; two fp at 4; one exp at 16; one VALU and one scalar integer; 1024 bytes
    # each of shared memory at 128 and of global memory at 64, for four SIMDs
    assert model.units("gfx942", loop) == {
        "tensor": 32, "fp": 8, "special": 16, "integer": 5, "shared": 32, "global": 64, "issue": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("opcode", "products"),
    [
        ("HMMA.16816.F32.BF16", 2048),
        ("HMMA.1688.F32.TF32", 2048),  # half the rate
        ("HGMMA.64x128x16.F32.BF16", 32768),
        ("v_mfma_f32_16x16x16_bf16_1k", 4096),
        ("v_mfma_f32_32x32x2f32", 16384),  # an eighth
        ("v_mfma_f32_32x32x4_xf32", 8192),
    ],
)
def test_matrix_instructions_are_counted_in_bf16_s_products(opcode, products):
    assert model._products(opcode)[1] == products


@pytest.mark.parametrize(
    ("opcode", "kind", "width"),
    [
        ("LDG.E.U8", "global", 1), ("LDG.E.64", "global", 8), ("LDGSTS.E.BYPASS.128", "global", 16),
        ("STL.64", "global", 8), ("SHFL.BFLY", "shared", 4), ("LDSM.16.MT88.2", "shared", 8),
        ("ds_write2_b32", "shared", 8), ("ds_bpermute_b32", "shared", 4),
        ("global_load_ushort", "global", 2), ("buffer_store_dword", "global", 4),
    ],
)  # fmt: skip
def test_bytes_of_loads_and_stores(opcode, kind, width):
    assert model._kind(opcode) == kind and model._width(opcode) == width


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("I2FP.F32.S32", "fp"), ("F2F.F64.F32", "special"), ("I2F.S16", "special"),
        ("FSETP.GT.AND", "fp"), ("IMAD.WIDE", "integer"), ("WARPGROUP.ARRIVE", "wait"),
        ("v_cmp_gt_f32_e32", "fp"), ("v_cmp_gt_u32_e32", "integer"), ("v_log_f32_e32", "special"),
        ("s_barrier", "wait"), ("s_mul_i32", "integer"),
    ],
)  # fmt: skip
def test_kinds(opcode, kind):
    assert model._kind(opcode) == kind


def test_code_without_a_loop_counts_as_a_whole_and_without_an_instruction_is_an_error():
    flat = SASS.replace("BRA", "NOP")
    assert len(model.inner_loop(flat, nvidia=True)) == 16
    with pytest.raises(ValueError, match="no instruction"):
        model.described("sm_90", "nothing", 4)
    with pytest.raises(ValueError, match="shape of HGMMA"):
        model._products("HGMMA.F32")


def test_the_summary(tmp_path, capsys):
    row = {
        "target": "sm_80", "launch": "package: forward", "size": 64, "config": "", "kernel": "_k",
        "registers": 90, "variant": 0, **model.described("sm_80", SASS, 8),
    }  # fmt: skip
    old = {k: v for k, v in row.items() if k not in ("bound", "mix")} | {"launch": "other: old"}
    text = summary([row, old])
    assert "| sm_80 | `_k` | package: forward, 64 | 90 | 9 | 1 tensor, 2 fp," in text
    assert "| shared | 34.0 | 33% |" in text and "- sm_80: shared 1" in text
    assert "1 kernels were recorded without an inner loop" in text
    path = tmp_path / "offline.json"
    write_report(path, [row, old])
    assert main(["--summary", str(path), "--only", "package", "--targets", "sm_80"]) == 0
    said = capsys.readouterr().out
    assert "package: forward" in said and "without an inner loop" not in said
    with pytest.raises(SystemExit):
        main([])
