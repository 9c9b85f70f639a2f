"""Tiles, warps and stages. Data only: the first entry of a key is the default."""

from ..configs import ANY, Config, Table

KNN_FORWARD = Table(
    "shared_kernels knn forward",
    {(ANY, ANY): (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=8, why="fp32: 64 keys spill"),)},
    axis="features",
)

# Rows: BLOCK_R rows per program, in registers up to BLOCK_N entries, tile by tile beyond.
_LONG = "16 scores a thread in flight"

ROWS_FORWARD = Table(
    "shared_kernels rows forward",
    {
        (ANY, 64): (Config(BLOCK_R=32, BLOCK_N=64, num_warps=4, why="16 scores a thread"),),
        (ANY, 256): (Config(BLOCK_R=8, BLOCK_N=256, num_warps=4, why="2048 scores a program"),),
        (ANY, 1024): (Config(BLOCK_R=2, BLOCK_N=1024, num_warps=4, why="2048 scores a program"),),
        (ANY, 4096): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=8, why="16 scores a thread"),),
        (ANY, 16384): (Config(BLOCK_R=1, BLOCK_N=16384, num_warps=16, why="no spill"),),
        (ANY, ANY): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=8, why=_LONG),),
    },
    axis="row length",
)

# One s per row, or s near 0, needs a careful logarithm: half the row fits.
ROWS_FORWARD_CAREFUL = Table(
    "shared_kernels rows forward, careful",
    {
        (ANY, 64): (Config(BLOCK_R=32, BLOCK_N=64, num_warps=4, why="16 scores a thread"),),
        (ANY, 256): (Config(BLOCK_R=8, BLOCK_N=256, num_warps=4, why="2048 scores a program"),),
        (ANY, 1024): (Config(BLOCK_R=2, BLOCK_N=1024, num_warps=4, why="2048 scores a program"),),
        (ANY, 4096): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=8, why="16 scores a thread"),),
        (ANY, 8192): (Config(BLOCK_R=1, BLOCK_N=8192, num_warps=16, why="16384 spills"),),
        (ANY, ANY): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=8, why=_LONG),),
    },
    axis="row length",
)

# fp64: a number takes two registers.
ROWS_FORWARD_FP64 = Table(
    "shared_kernels rows forward, fp64",
    {
        (ANY, 64): (Config(BLOCK_R=16, BLOCK_N=64, num_warps=4, why="8 scores a thread"),),
        (ANY, 256): (Config(BLOCK_R=4, BLOCK_N=256, num_warps=4, why="1024 scores a program"),),
        (ANY, 1024): (Config(BLOCK_R=1, BLOCK_N=1024, num_warps=4, why="1024 scores a program"),),
        (ANY, 4096): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=16, why="8 scores a thread"),),
        (ANY, ANY): (Config(BLOCK_R=1, BLOCK_N=2048, num_warps=8, why="8 scores a thread"),),
    },
    axis="row length",
)

ROWS_BACKWARD = Table(
    "shared_kernels rows backward",
    {
        (ANY, 64): (Config(BLOCK_R=32, BLOCK_N=64, num_warps=4, why="as forward"),),
        (ANY, 256): (Config(BLOCK_R=8, BLOCK_N=256, num_warps=4, why="as forward"),),
        (ANY, 1024): (Config(BLOCK_R=2, BLOCK_N=1024, num_warps=4, why="as forward"),),
        (ANY, 4096): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=8, why="two rows in registers"),),
        (ANY, 16384): (Config(BLOCK_R=1, BLOCK_N=16384, num_warps=16, why="64 numbers a thread"),),
        (ANY, ANY): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=8, why=_LONG),),
    },
    axis="row length",
)

# The gradient in s needs another logarithm and a series: half the row fits.
ROWS_BACKWARD_S = Table(
    "shared_kernels rows backward with s",
    {
        (ANY, 64): (Config(BLOCK_R=16, BLOCK_N=64, num_warps=4, why="1024 scores a program"),),
        (ANY, 256): (Config(BLOCK_R=4, BLOCK_N=256, num_warps=4, why="1024 scores a program"),),
        (ANY, 1024): (Config(BLOCK_R=1, BLOCK_N=1024, num_warps=4, why="1024 scores a program"),),
        (ANY, 4096): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=8, why="16 scores a thread"),),
        (ANY, 8192): (Config(BLOCK_R=1, BLOCK_N=8192, num_warps=16, why="16384 spills"),),
        (ANY, ANY): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=8, why=_LONG),),
    },
    axis="row length",
)

ROWS_BACKWARD_FP64 = Table(
    "shared_kernels rows backward, fp64",
    {
        (ANY, 64): (Config(BLOCK_R=8, BLOCK_N=64, num_warps=4, why="two rows, and a series"),),
        (ANY, 256): (Config(BLOCK_R=2, BLOCK_N=256, num_warps=4, why="512 scores a program"),),
        (ANY, 1024): (Config(BLOCK_R=1, BLOCK_N=1024, num_warps=8, why="4 scores a thread"),),
        (ANY, 4096): (Config(BLOCK_R=1, BLOCK_N=4096, num_warps=16, why="8 scores a thread"),),
        (ANY, ANY): (Config(BLOCK_R=1, BLOCK_N=2048, num_warps=8, why="8 scores a thread"),),
    },
    axis="row length",
)
