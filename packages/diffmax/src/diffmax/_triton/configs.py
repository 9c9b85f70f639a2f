"""Rows per program, warps and stages by row length. Data only; the first entry is the default.

BLOCK_N is the next power of two of the row length; rows longer than a table's last entry are
streamed in tiles.
"""

from shared_kernels.configs import ANY, Config, Table

LONGEST_ROW = 16384
LONGEST_ROW_ALPHA = 8192
LONGEST_ROW_WIDE = 4096  # fp64: a number takes two registers

FORWARD = Table(
    "diffmax forward",
    {
        (ANY, 64): (Config(BLOCK_R=32, num_warps=4, why="2048 scores per program: 16 a thread"),),
        (ANY, 256): (Config(BLOCK_R=8, num_warps=4, why="2048 scores per program"),),
        (ANY, 1024): (Config(BLOCK_R=2, num_warps=4, why="2048 scores per program"),),
        (ANY, 4096): (Config(BLOCK_R=1, num_warps=8, why="one row stays in registers"),),
        (ANY, LONGEST_ROW): (Config(BLOCK_R=1, num_warps=16, why="32 scores a thread, no spill"),),
    },
    axis="row length",
)

# One alpha per row, or alpha near 1, needs a careful logarithm: half the row fits.
FORWARD_CAREFUL = Table(
    "diffmax forward, careful",
    {
        (ANY, 64): (Config(BLOCK_R=32, num_warps=4, why="as forward"),),
        (ANY, 256): (Config(BLOCK_R=8, num_warps=4, why="as forward"),),
        (ANY, 1024): (Config(BLOCK_R=2, num_warps=4, why="as forward"),),
        (ANY, 4096): (Config(BLOCK_R=1, num_warps=8, why="as forward"),),
        (ANY, LONGEST_ROW_ALPHA): (Config(BLOCK_R=1, num_warps=16, why="16384 spills on NVIDIA"),),
    },
    axis="row length",
)

BACKWARD = Table(
    "diffmax backward",
    {
        (ANY, 64): (Config(BLOCK_R=32, num_warps=4, why="as forward"),),
        (ANY, 256): (Config(BLOCK_R=8, num_warps=4, why="as forward"),),
        (ANY, 1024): (Config(BLOCK_R=2, num_warps=4, why="as forward"),),
        (ANY, 4096): (Config(BLOCK_R=1, num_warps=8, why="two rows stay in registers"),),
        (ANY, LONGEST_ROW): (Config(BLOCK_R=1, num_warps=16, why="64 numbers a thread"),),
    },
    axis="row length",
)

# The gradient in alpha needs another logarithm and a series: half the row fits.
BACKWARD_ALPHA = Table(
    "diffmax backward with alpha",
    {
        (ANY, 64): (Config(BLOCK_R=16, num_warps=4, why="1024 scores per program"),),
        (ANY, 256): (Config(BLOCK_R=4, num_warps=4, why="1024 scores per program"),),
        (ANY, 1024): (Config(BLOCK_R=1, num_warps=4, why="1024 scores per program"),),
        (ANY, 4096): (Config(BLOCK_R=1, num_warps=8, why="16 scores a thread"),),
        (ANY, LONGEST_ROW_ALPHA): (Config(BLOCK_R=1, num_warps=16, why="16384 spills on NVIDIA"),),
    },
    axis="row length",
)

STREAM = Table(
    "diffmax stream",
    {(ANY, ANY): (Config(BLOCK_N=4096, num_warps=8, why="16 scores a thread in flight"),)},
    axis="row length",
)

FORWARD_WIDE = Table(
    "diffmax forward fp64",
    {
        (ANY, 64): (Config(BLOCK_R=16, num_warps=4, why="1024 scores: 16 registers a thread"),),
        (ANY, 256): (Config(BLOCK_R=4, num_warps=4, why="1024 scores per program"),),
        (ANY, 1024): (Config(BLOCK_R=1, num_warps=4, why="1024 scores per program"),),
        (ANY, LONGEST_ROW_WIDE): (Config(BLOCK_R=1, num_warps=16, why="8 scores a thread"),),
    },
    axis="row length",
)

BACKWARD_WIDE = Table(
    "diffmax backward fp64",
    {
        (ANY, 64): (Config(BLOCK_R=8, num_warps=4, why="512 scores: two rows, and a series"),),
        (ANY, 256): (Config(BLOCK_R=2, num_warps=4, why="512 scores per program"),),
        (ANY, 1024): (Config(BLOCK_R=1, num_warps=8, why="4 scores a thread"),),
        (ANY, LONGEST_ROW_WIDE): (Config(BLOCK_R=1, num_warps=16, why="8 scores a thread"),),
    },
    axis="row length",
)

STREAM_WIDE = Table(
    "diffmax stream fp64",
    {(ANY, ANY): (Config(BLOCK_N=2048, num_warps=8, why="8 scores a thread in flight"),)},
    axis="row length",
)
