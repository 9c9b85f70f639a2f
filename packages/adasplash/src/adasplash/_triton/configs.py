"""Tiles, warps and stages. Data only: the first entry of a key is the default."""

from shared_kernels.configs import ANY, Config, Entries, Table

# Attention. Entries are named by their tiles: Q queries, K keys, W warps, S1 where there is one
# stage instead of two. Queries come 64 at a time (64 keys in dk/dv): that is also the side of the
# squares that are kept or skipped, and the smallest M for which sm_90 uses its tensor cores well. A
# mask or a bias is one more tile on the chip: those calls have tables of their own.
_Q64_K64_W8 = (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=8, why="HGMMA on sm_90, no spill"),)
_Q64_K64_W4 = (
    Config(
        BLOCK_Q=64,
        BLOCK_K=64,
        num_warps=4,
        why="8 warps halve the VGPRs of a wave; on sm_90 4 hold whole rows of a product",
    ),
)
_Q64_K32_W8 = (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=8, why="64 keys do not fit"),)
_Q64_K32_W4 = (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=4, why="64 keys do not fit"),)
_Q64_K16_W8_S1 = (Config(BLOCK_Q=64, BLOCK_K=16, num_warps=8, num_stages=1, why="32 keys spill"),)
_Q32_K64_W8 = (Config(BLOCK_Q=32, BLOCK_K=64, num_warps=8, why="64 queries spill"),)
_Q32_K64_W4 = (Config(BLOCK_Q=32, BLOCK_K=64, num_warps=4, why="64 queries spill"),)
_Q16_K64_W8_S1 = (
    Config(BLOCK_Q=16, BLOCK_K=64, num_warps=8, num_stages=1, why="32 queries spill"),
)
_Q16_K64_W4_S1 = (
    Config(BLOCK_Q=16, BLOCK_K=64, num_warps=4, num_stages=1, why="32 queries spill"),
)
_Q64_K32_W8_S1 = (
    Config(BLOCK_Q=64, BLOCK_K=32, num_warps=8, num_stages=1, why="no sums of width D"),
)
_Q32_K32_W8_S1 = (Config(BLOCK_Q=32, BLOCK_K=32, num_warps=8, num_stages=1, why="64 rows spill"),)
_Q32_K32_W4_S1 = (
    Config(BLOCK_Q=32, BLOCK_K=32, num_warps=4, num_stages=1, why="64 rows of 256 spill"),
)
_Q32_K16_W8_S1 = (Config(BLOCK_Q=32, BLOCK_K=16, num_warps=8, num_stages=1, why="32 keys spill"),)
_Q32_K64_W4_S1 = (
    Config(BLOCK_Q=32, BLOCK_K=64, num_warps=4, num_stages=1, why="two stages spill"),
)
_Q16_K32_W8_S1 = (Config(BLOCK_Q=16, BLOCK_K=32, num_warps=8, num_stages=1, why="64 keys spill"),)
_Q16_K32_W4_S1 = (
    Config(BLOCK_Q=16, BLOCK_K=32, num_warps=4, num_stages=1, why="32 queries of 256 spill"),
)
_Q16_K16_W8_S1 = (Config(BLOCK_Q=16, BLOCK_K=16, num_warps=8, num_stages=1, why="32 rows spill"),)
_Q16_K16_W4_S1 = (Config(BLOCK_Q=16, BLOCK_K=16, num_warps=4, num_stages=1, why="32 rows spill"),)
_Q64_K64_W8_S1 = (
    Config(BLOCK_Q=64, BLOCK_K=64, num_warps=8, num_stages=1, why="two stages spill"),
)
# Head dims beyond 128 take fewer than 64 rows, as 64 spill: sm_90 then runs the older matrix
# instruction.

SCORE = Table(
    "adasplash score",
    {
        (ANY, 128): _Q64_K64_W8,
        (ANY, 256): _Q64_K32_W8_S1,
        ("sm_90", 128): _Q64_K64_W4,
        ("gfx942", 128): _Q64_K64_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)
FORWARD = Table(
    "adasplash forward",
    {
        (ANY, 64): _Q64_K64_W8,
        (ANY, 128): _Q64_K64_W8,
        (ANY, 256): _Q32_K32_W8_S1,
        ("sm_90", 64): _Q64_K64_W4,
        ("sm_120", 128): _Q64_K32_W8,
        ("gfx942", 64): _Q64_K64_W4,
        ("gfx942", 128): _Q64_K32_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)
DQ = Table(
    "adasplash dq",
    {
        (ANY, 64): _Q64_K64_W8,
        (ANY, 128): _Q64_K64_W8,
        (ANY, 256): _Q32_K32_W8_S1,
        ("sm_80", 64): _Q64_K32_W8,
        ("sm_90", 64): _Q64_K64_W4,
        ("sm_90", 128): _Q64_K32_W4,
        ("sm_120", 64): _Q64_K32_W8,
        ("gfx942", 64): _Q64_K64_W4,
        ("gfx942", 128): _Q64_K32_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)
DKDV = Table(
    "adasplash dk/dv",
    {
        (ANY, 128): _Q32_K64_W8,
        (ANY, 256): _Q32_K32_W8_S1,
        ("sm_90", 64): _Q32_K64_W4,
        ("gfx942", 128): _Q32_K64_W4,
        ("gfx942", 256): _Q16_K32_W4_S1,
    },
)
SCORE_EDITED = Table(
    "adasplash score, mask or bias",
    {
        (ANY, 128): _Q64_K32_W8,
        (ANY, 256): _Q64_K32_W8_S1,
        ("gfx942", 128): _Q64_K32_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)
FORWARD_EDITED = Table(
    "adasplash forward, mask or bias",
    {
        (ANY, 128): _Q64_K16_W8_S1,
        (ANY, 256): _Q16_K16_W8_S1,
        ("sm_80", 256): _Q16_K32_W8_S1,
        ("sm_120", 128): _Q64_K16_W8_S1,
        ("sm_120", 256): _Q16_K32_W8_S1,
        ("gfx942", 128): _Q64_K32_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)
DQ_EDITED = Table(
    "adasplash dq, mask or bias",
    {
        (ANY, 128): _Q64_K32_W8,
        (ANY, 256): _Q32_K32_W8_S1,
        ("sm_80", 64): _Q64_K32_W8,
        ("sm_80", 128): _Q64_K16_W8_S1,
        ("sm_120", 128): _Q64_K16_W8_S1,
        ("gfx942", 128): _Q64_K32_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)
DQ_CAPPED = Table(
    "adasplash dq, soft cap",
    {
        (ANY, 128): _Q64_K16_W8_S1,
        (ANY, 256): _Q32_K32_W8_S1,
        ("gfx942", 128): _Q64_K32_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)
DKDV_EDITED = Table(
    "adasplash dk/dv, mask or bias",
    {
        (ANY, 128): _Q16_K64_W8_S1,
        (ANY, 256): _Q16_K32_W8_S1,
        ("sm_120", 128): _Q16_K32_W8_S1,
        ("sm_120", 256): _Q16_K16_W8_S1,
        ("gfx942", 128): _Q16_K64_W4_S1,
        ("gfx942", 256): _Q16_K32_W4_S1,
    },
)
DBIAS = Table(
    "adasplash dbias",
    {
        (ANY, 128): _Q32_K32_W8_S1,
        (ANY, 256): _Q32_K16_W8_S1,
        ("sm_80", 128): _Q32_K16_W8_S1,
        ("sm_90", 128): _Q64_K32_W8,
        ("gfx942", 128): _Q64_K32_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)

# Lazy attention. Its dbias sums along the diagonals of square tiles.
LAZY_FORWARD = Table(
    "lazy forward",
    {
        (ANY, 64): _Q64_K64_W8,
        (ANY, 128): _Q64_K32_W8,
        (ANY, 256): _Q32_K32_W8_S1,
        ("sm_90", 128): _Q64_K64_W8,
        ("gfx942", 64): _Q64_K32_W4,
        ("gfx942", 128): _Q64_K32_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)
LAZY_DQ = Table(
    "lazy dq",
    {
        (ANY, 128): _Q64_K64_W8,
        (ANY, 256): _Q32_K32_W8_S1,
        ("gfx942", 128): _Q64_K32_W4,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)
LAZY_DKDV = Table(
    "lazy dk/dv",
    {
        (ANY, 128): _Q32_K64_W8,
        (ANY, 256): _Q16_K32_W8_S1,
        ("sm_80", 128): _Q16_K64_W8_S1,
        ("sm_90", 128): _Q16_K64_W8_S1,
        ("gfx942", 128): _Q32_K64_W4_S1,
        ("gfx942", 256): _Q16_K32_W4_S1,
    },
)
LAZY_DBIAS = Table(
    "lazy dbias",
    {
        (ANY, 128): _Q32_K32_W8_S1,
        (ANY, 256): _Q16_K16_W4_S1,
        ("sm_90", 128): _Q64_K64_W8_S1,
        ("gfx942", 128): _Q32_K32_W4_S1,
        ("gfx942", 256): _Q32_K32_W4_S1,
    },
)

# fp32: exact products, on NVIDIA without tensor cores; with a mask or a bias or without.
_EXACT: Entries = {
    (ANY, 128): _Q32_K32_W8_S1,
    (ANY, 256): _Q16_K16_W8_S1,
    ("gfx942", 128): _Q32_K32_W4_S1,
    ("gfx942", 256): _Q16_K16_W4_S1,
}
# Attention has one more copy of the queries in registers: NVIDIA's do not hold those of 256.
_NARROW: Entries = {
    (ANY, 128): _Q32_K32_W8_S1,
    ("interpret", 256): _Q16_K16_W8_S1,
    ("gfx942", 128): _Q32_K32_W4_S1,
    ("gfx942", 256): _Q16_K16_W4_S1,
}
SCORE_FP32 = Table("adasplash score, fp32", _NARROW)
FORWARD_FP32 = Table("adasplash forward, fp32", {**_NARROW, (ANY, 128): _Q16_K16_W8_S1})
DQ_FP32 = Table("adasplash dq, fp32", {**_NARROW, ("sm_120", 128): _Q32_K16_W8_S1})
DKDV_FP32 = Table("adasplash dk/dv, fp32", {**_NARROW, ("sm_120", 128): _Q16_K32_W8_S1})
DBIAS_FP32 = Table("adasplash dbias, fp32", _NARROW)
LAZY_FORWARD_FP32 = Table("lazy forward, fp32", {**_EXACT, (ANY, 128): _Q32_K16_W8_S1})
LAZY_DQ_FP32 = Table("lazy dq, fp32", _EXACT)
LAZY_DKDV_FP32 = Table("lazy dk/dv, fp32", {**_EXACT, ("sm_120", 128): _Q16_K32_W8_S1})
LAZY_DBIAS_FP32 = Table("lazy dbias, fp32", _EXACT)

# Decoding over pages: R rows of queries, K keys at once of a page (a whole one where it has fewer),
# P pages whose bounds are found.
# Beyond head dims of 128 the narrowest tiles spill: there is no kernel.
_R16_K16_P16_W8_S1 = (
    Config(BLOCK_R=16, BLOCK_K=16, BLOCK_P=16, num_warps=8, num_stages=1, why="4 warps spill"),
)
_R16_K16_P16_W4_S1 = (
    Config(BLOCK_R=16, BLOCK_K=16, BLOCK_P=16, num_warps=4, num_stages=1, why="few rows read"),
)
_R16_K32_P16_W2_S1 = (
    Config(BLOCK_R=16, BLOCK_K=32, BLOCK_P=16, num_warps=2, num_stages=1, why="4 warps spill"),
)
PAGED = Table(
    "adasplash paged",
    {
        (ANY, 128): _R16_K32_P16_W2_S1,
        ("gfx942", 128): _R16_K16_P16_W4_S1,
    },
)
PAGED_FP32 = Table("adasplash paged, fp32", {(ANY, 128): _R16_K16_P16_W8_S1})
