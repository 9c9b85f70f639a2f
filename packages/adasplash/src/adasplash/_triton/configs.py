"""Tiles, warps and stages. Data only: the first entry of a key is the default."""

from shared_kernels.configs import ANY, Config, Table

# Attention. Queries come 64 at a time (64 keys in dk/dv): that is also the side of the squares that
# are kept or skipped, and the smallest M for which sm_90 uses its tensor cores well. A mask or a
# bias is one more tile on the chip: those calls have tables of their own.
_WIDE = (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=8, why="HGMMA on sm_90, no spill"),)
_FOUR = (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=4, why="8 warps halve the VGPRs of a wave"),)
_NARROW = (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=8, why="64 keys do not fit"),)
_NARROW4 = (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=4, why="64 keys do not fit"),)
_THIN = (Config(BLOCK_Q=64, BLOCK_K=16, num_warps=8, num_stages=1, why="32 keys spill"),)
_DKDV = (Config(BLOCK_Q=32, BLOCK_K=64, num_warps=8, why="64 queries spill"),)
_DKDV4 = (Config(BLOCK_Q=32, BLOCK_K=64, num_warps=4, why="64 queries spill"),)
_DKDV_THIN = (Config(BLOCK_Q=16, BLOCK_K=64, num_warps=8, num_stages=1, why="32 queries spill"),)
_DKDV_THIN4 = (Config(BLOCK_Q=16, BLOCK_K=64, num_warps=4, num_stages=1, why="32 queries spill"),)
# Head dims beyond 128: M = 64 spills, so sm_90 runs the older matrix instruction there.
_BROAD = (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=8, num_stages=1, why="no sums of width D"),)
_SMALL = (Config(BLOCK_Q=32, BLOCK_K=32, num_warps=8, num_stages=1, why="64 rows of 256 spill"),)
_SMALL4 = (Config(BLOCK_Q=32, BLOCK_K=32, num_warps=4, num_stages=1, why="64 rows of 256 spill"),)
_FEW = (Config(BLOCK_Q=32, BLOCK_K=32, num_warps=8, num_stages=1, why="64 rows spill"),)
_LEAST = (Config(BLOCK_Q=32, BLOCK_K=16, num_warps=8, num_stages=1, why="32 keys spill"),)
_DKDV4_SINGLE = (Config(BLOCK_Q=32, BLOCK_K=64, num_warps=4, num_stages=1, why="two stages spill"),)
_DKDV_LEAST = (Config(BLOCK_Q=16, BLOCK_K=32, num_warps=8, num_stages=1, why="64 keys spill"),)
_DKDV_LEAST4 = (
    Config(BLOCK_Q=16, BLOCK_K=32, num_warps=4, num_stages=1, why="32 queries of 256 spill"),
)
_TINY = (Config(BLOCK_Q=16, BLOCK_K=16, num_warps=8, num_stages=1, why="32 rows spill"),)
_LEAST_SQUARE = (Config(BLOCK_Q=16, BLOCK_K=16, num_warps=4, num_stages=1, why="32 rows spill"),)
_SINGLE = (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=8, num_stages=1, why="two stages spill"),)

SCORE = Table(
    "adasplash score",
    {
        (ANY, 128): _WIDE,
        (ANY, 256): _BROAD,
        ("gfx942", 128): _FOUR,
        ("gfx942", 256): _SMALL4,
    },
)
FORWARD = Table(
    "adasplash forward",
    {
        (ANY, 64): _WIDE,
        (ANY, 128): _WIDE,
        (ANY, 256): _SMALL,
        ("sm_120", 128): _NARROW,
        ("gfx942", 64): _FOUR,
        ("gfx942", 128): _NARROW4,
        ("gfx942", 256): _SMALL4,
    },
)
DQ = Table(
    "adasplash dq",
    {
        (ANY, 64): _WIDE,
        (ANY, 128): _WIDE,
        (ANY, 256): _SMALL,
        ("gfx942", 64): _FOUR,
        ("gfx942", 128): _NARROW4,
        ("gfx942", 256): _SMALL4,
    },
)
DKDV = Table(
    "adasplash dk/dv",
    {
        (ANY, 128): _DKDV,
        (ANY, 256): _SMALL,
        ("gfx942", 128): _DKDV4,
        ("gfx942", 256): _DKDV_LEAST4,
    },
)
SCORE_EDITED = Table(
    "adasplash score, mask or bias",
    {
        (ANY, 128): _NARROW,
        (ANY, 256): _BROAD,
        ("gfx942", 128): _NARROW4,
        ("gfx942", 256): _SMALL4,
    },
)
FORWARD_EDITED = Table(
    "adasplash forward, mask or bias",
    {
        (ANY, 128): _THIN,
        (ANY, 256): _TINY,
        ("sm_120", 128): _THIN,
        ("sm_120", 256): _LEAST_SQUARE,
        ("gfx942", 128): _NARROW4,
        ("gfx942", 256): _SMALL4,
    },
)
DQ_EDITED = Table(
    "adasplash dq, mask or bias",
    {
        (ANY, 128): _NARROW,
        (ANY, 256): _SMALL,
        ("gfx942", 128): _NARROW4,
        ("gfx942", 256): _SMALL4,
    },
)
DKDV_EDITED = Table(
    "adasplash dk/dv, mask or bias",
    {
        (ANY, 128): _DKDV_THIN,
        (ANY, 256): _DKDV_LEAST,
        ("sm_120", 128): _DKDV_LEAST,
        ("gfx942", 128): _DKDV_THIN4,
        ("gfx942", 256): _DKDV_LEAST4,
    },
)
DBIAS = Table(
    "adasplash dbias",
    {
        (ANY, 128): _FEW,
        (ANY, 256): _LEAST,
        ("sm_80", 128): _LEAST,
        ("sm_90", 128): _NARROW,
        ("gfx942", 128): _NARROW4,
        ("gfx942", 256): _SMALL4,
    },
)

# Lazy attention. Its dbias sums along the diagonals of square tiles.
LAZY_FORWARD = Table(
    "lazy forward",
    {
        (ANY, 64): _WIDE,
        (ANY, 128): _NARROW,
        (ANY, 256): _SMALL,
        ("sm_90", 128): _WIDE,
        ("gfx942", 128): _NARROW4,
        ("gfx942", 256): _SMALL4,
    },
)
LAZY_DQ = Table(
    "lazy dq",
    {
        (ANY, 128): _WIDE,
        (ANY, 256): _SMALL,
        ("gfx942", 128): _NARROW4,
        ("gfx942", 256): _SMALL4,
    },
)
LAZY_DKDV = Table(
    "lazy dk/dv",
    {
        (ANY, 128): _DKDV,
        (ANY, 256): _DKDV_LEAST,
        ("sm_80", 128): _DKDV_THIN,
        ("sm_90", 128): _DKDV_THIN,
        ("gfx942", 128): _DKDV4_SINGLE,
        ("gfx942", 256): _DKDV_LEAST4,
    },
)
LAZY_DBIAS = Table(
    "lazy dbias",
    {
        (ANY, 128): _FEW,
        (ANY, 256): _LEAST_SQUARE,
        ("sm_90", 128): _SINGLE,
        ("gfx942", 128): _SMALL4,
        ("gfx942", 256): _SMALL4,
    },
)

# fp32: exact products, on NVIDIA without tensor cores; with a mask or a bias or without.
_EXACT = {
    (ANY, 128): (Config(BLOCK_Q=32, BLOCK_K=32, num_warps=8, num_stages=1, why="fp32 on a chip"),),
    (ANY, 256): (Config(BLOCK_Q=16, BLOCK_K=16, num_warps=8, num_stages=1, why="fp32 on a chip"),),
    ("gfx942", 128): _SMALL4,
    ("gfx942", 256): _LEAST_SQUARE,
}
SCORE_FP32 = Table("adasplash score, fp32", _EXACT)
FORWARD_FP32 = Table("adasplash forward, fp32", _EXACT)
DQ_FP32 = Table("adasplash dq, fp32", _EXACT)
DKDV_FP32 = Table("adasplash dk/dv, fp32", _EXACT)
DBIAS_FP32 = Table("adasplash dbias, fp32", _EXACT)
LAZY_FORWARD_FP32 = Table("lazy forward, fp32", {**_EXACT, (ANY, 128): _LEAST})
LAZY_DQ_FP32 = Table("lazy dq, fp32", _EXACT)
LAZY_DKDV_FP32 = Table("lazy dk/dv, fp32", _EXACT)
LAZY_DBIAS_FP32 = Table("lazy dbias, fp32", _EXACT)
