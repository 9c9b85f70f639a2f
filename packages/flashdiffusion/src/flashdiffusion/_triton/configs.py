"""Tiles, warps and stages. Data only: the first entry of a key is the default."""

from shared_kernels.configs import ANY, Config, Table

MATVEC_FORWARD = Table(
    "flashdiffusion matvec forward",
    {
        (ANY, 64): (Config(BLOCK_Q=128, BLOCK_K=64, num_warps=8, why="4 warps spill"),),
        (ANY, 128): (Config(BLOCK_Q=128, BLOCK_K=32, num_warps=8, why="64 keys do not fit"),),
        (ANY, 256): (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=8, why="128 queries do not fit"),),
        ("sm_90", 64): (Config(BLOCK_Q=128, BLOCK_K=128, num_warps=8, why="HGMMA, no spill"),),
        ("sm_90", 128): (Config(BLOCK_Q=128, BLOCK_K=64, num_warps=8, why="HGMMA, no spill"),),
        ("sm_90", 256): (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=8, why="HGMMA, no spill"),),
        ("sm_120", 64): (Config(BLOCK_Q=128, BLOCK_K=64, num_warps=8, why="4 warps spill"),),
        ("sm_120", 128): (Config(BLOCK_Q=128, BLOCK_K=32, num_warps=8, why="99 KB"),),
        ("sm_120", 256): (Config(BLOCK_Q=64, BLOCK_K=16, num_warps=8, why="99 KB"),),
        ("gfx942", 64): (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=4, why="no scratch"),),
        ("gfx942", 128): (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=4, why="no scratch"),),
        ("gfx942", 256): (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=4, why="64 KB of LDS"),),
    },
    axis="features",
)

MATVEC_HALF = Table(
    "flashdiffusion matvec in half precision",
    {
        (ANY, 64): (Config(BLOCK_Q=128, BLOCK_K=128, num_warps=8, why="4 warps spill"),),
        (ANY, 128): (Config(BLOCK_Q=128, BLOCK_K=64, num_warps=8, why="99 KB"),),
        (ANY, 256): (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=8, why="99 KB"),),
        ("sm_90", 64): (Config(BLOCK_Q=128, BLOCK_K=128, num_warps=8, why="HGMMA, no spill"),),
        ("sm_90", 128): (Config(BLOCK_Q=128, BLOCK_K=128, num_warps=8, why="HGMMA, no spill"),),
        ("sm_90", 256): (Config(BLOCK_Q=64, BLOCK_K=64, num_warps=8, why="HGMMA, no spill"),),
        ("gfx942", 64): (Config(BLOCK_Q=128, BLOCK_K=128, num_warps=8, why="no scratch"),),
        ("gfx942", 128): (Config(BLOCK_Q=128, BLOCK_K=64, num_warps=8, why="no scratch"),),
        ("gfx942", 256): (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=4, why="64 KB of LDS"),),
    },
    axis="features",
)
