"""Tiles by head dim (or columns). Data only; the first entry is the default."""

from shared_kernels.configs import ANY, Config, Table

# One program: one pattern, BLOCK_D columns, BLOCK_E edges at a time.
NEIGHBOUR_SUM = Table(
    "difflayers neighbour sum",
    {
        (ANY, 32): (Config(BLOCK_D=32, BLOCK_E=32, num_warps=2, why="1024 numbers in flight"),),
        (ANY, 128): (Config(BLOCK_D=128, BLOCK_E=16, num_warps=4, why="2048 numbers in flight"),),
        (ANY, ANY): (Config(BLOCK_D=256, BLOCK_E=16, num_warps=8, why="wide rows, few programs"),),
    },
    axis="columns",
)

# One program: one state (forward, dq) or one stored pattern (dk/dv), BLOCK_K partners at a time.
NEIGHBOUR_ATTENTION = Table(
    "difflayers neighbour attention",
    {
        (ANY, 64): (Config(BLOCK_K=16, num_warps=2, why="two 16 x 64 gathers in flight"),),
        (ANY, 128): (Config(BLOCK_K=16, num_warps=4, why="two 16 x 128 gathers in flight"),),
        (ANY, 256): (Config(BLOCK_K=16, num_warps=8, why="two 16 x 256 gathers in flight"),),
    },
)
