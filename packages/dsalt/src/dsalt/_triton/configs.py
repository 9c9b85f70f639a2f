"""Tiles, warps and stages by head dim. Data only; the first entry is the default.

In the key-parallel kernels BLOCK_K is the program's own tile and BLOCK_Q is streamed. Above head
dim 128 tiles of 64 rows do not fit the registers: sm_90 then uses its older matrix instruction.
fp32 products are exact ("ieee"), not TF32: the bound of 2e-5 holds on every backend.
"""

from shared_kernels.configs import ANY, Config, Entries, Table

# Entries are named by their tiles: Q queries, K keys, W warps, S1 where there is one stage.
_Q64_K64_W8 = (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=8, why="M = 64: HGMMA; no spill"),)
_Q64_K64_W4 = (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=4, why="no spill"),)
_Q64_K32_W4 = (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=4, why="128 rows with 8 warps spill"),)
_Q64_K32_W4_S1 = (
    Config(BLOCK_Q=64, BLOCK_K=32, num_warps=4, num_stages=1, why="a second stage spills"),
)
_Q32_K64_W8 = (
    Config(BLOCK_Q=32, BLOCK_K=64, num_warps=8, why="32 streamed rows: vectors fit registers"),
)
_Q16_K64_W8 = (Config(BLOCK_Q=16, BLOCK_K=64, num_warps=8, why="32 streamed rows spill"),)
_Q32_K64_W4 = (
    Config(BLOCK_Q=32, BLOCK_K=64, num_warps=4, why="8 warps would cap the registers at 256"),
)
_Q32_K32_W8_S1 = (
    Config(BLOCK_Q=32, BLOCK_K=32, num_warps=8, num_stages=1, why="64 rows of 256 spill"),
)
_Q32_K32_W4_S1 = (
    Config(BLOCK_Q=32, BLOCK_K=32, num_warps=4, num_stages=1, why="64 rows of 256 spill"),
)
# Exact fp32 products go without tensor cores.
_Q16_K32_W8_S1 = (
    Config(BLOCK_Q=16, BLOCK_K=32, num_warps=8, num_stages=1, why="larger tiles spill in fp32"),
)
_Q16_K16_W8_S1 = (
    Config(BLOCK_Q=16, BLOCK_K=16, num_warps=8, num_stages=1, why="larger tiles spill in fp32"),
)
_Q16_K16_W4_S1 = (
    Config(
        BLOCK_Q=16,
        BLOCK_K=16,
        num_warps=4,
        num_stages=1,
        why="8 warps would cap the registers at 256",
    ),
)
_Q16_K32_W4_S1 = (
    Config(BLOCK_Q=16, BLOCK_K=32, num_warps=4, num_stages=1, why="32 rows of 256 spill"),
)
# Products of vectors: no key.
_Q32_W4 = (Config(BLOCK_Q=32, num_warps=4, why="4096 products per program"),)
_Q16_W4 = (Config(BLOCK_Q=16, num_warps=4, why="4096 products per program"),)

_QUERY: Entries = {
    (ANY, 128): _Q64_K64_W8,
    (ANY, 256): _Q32_K32_W8_S1,
    ("gfx942", 64): _Q64_K64_W4,
    ("gfx942", 128): _Q64_K32_W4,
    ("gfx942", 256): _Q32_K32_W4_S1,
}
_KEY: Entries = {
    (ANY, 128): _Q32_K64_W8,
    (ANY, 256): _Q32_K32_W8_S1,
    ("gfx942", 128): _Q32_K64_W4,
    ("gfx942", 256): _Q16_K32_W4_S1,
}
_QUERY_FP32: Entries = {
    (ANY, 128): _Q16_K16_W8_S1,
    (ANY, 256): _Q16_K16_W8_S1,
    ("gfx942", 128): _Q16_K16_W8_S1,
    ("gfx942", 256): _Q16_K16_W4_S1,
}
_KEY_FP32: Entries = {
    (ANY, 128): _Q16_K32_W8_S1,
    (ANY, 256): _Q16_K16_W8_S1,
    ("gfx942", 128): _Q16_K32_W8_S1,
    ("gfx942", 256): _Q16_K16_W4_S1,
}

FORWARD = Table(
    "dsalt forward",
    {
        **_QUERY,
        (ANY, 64): _Q64_K64_W4,
        ("sm_90", 128): _Q64_K64_W4,
        ("sm_100", 128): _Q64_K64_W8,
        ("sm_103", 128): _Q64_K64_W8,
        ("gfx950", 128): _Q64_K32_W4,
    },
)
DQ = Table("dsalt dq", {**_QUERY, ("gfx942", 128): _Q64_K32_W4_S1})
DKDV = Table(
    "dsalt dk/dv",
    {**_KEY, ("sm_100", 128): _Q16_K64_W8, ("sm_103", 128): _Q16_K64_W8},
)
LANDMARKS = Table("dsalt landmarks", _KEY)
FORWARD_FP32 = Table("dsalt forward, fp32", _QUERY_FP32)
DQ_FP32 = Table("dsalt dq, fp32", _QUERY_FP32)
DKDV_FP32 = Table("dsalt dk/dv, fp32", _KEY_FP32)
LANDMARKS_FP32 = Table("dsalt landmarks, fp32", _KEY_FP32)
DELTA = Table("dsalt delta", {(ANY, 128): _Q32_W4, (ANY, 256): _Q16_W4})
